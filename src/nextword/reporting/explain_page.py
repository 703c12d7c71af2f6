"""The explanation of a text as one self-contained page: no external resource, and nothing in the text can run or be markup."""

import base64
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from nextword.common.format import show_whitespace
from nextword.common.fs import atomic_write
from nextword.reporting.formatting import TEMPLATES, render
from nextword.reporting.run_data import as_mapping

LARGE_HEADING_CHARS, MAX_HEADING_CHARS = 90, 500


def write_explanation_page(explanation: Mapping[str, Any], path: Path) -> Path:
    """Write the result of `nextword explain` as a page.

    Args:
        explanation: The result, as `nextword explain --json` prints it.
        path: The page.

    Returns:
        The path of the page.
    """
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("explain.css", "explain.js"))
    text = "\n".join(explanation["texts"]) or "Empty text"
    page = render(
        "explain.html",
        policy=Markup(content_security_policy(style, script)),
        style=Markup(style),
        script=Markup(script),
        title=" ".join(text.split())[:60],
        heading=text if len(text) <= MAX_HEADING_CHARS else f"{text[:MAX_HEADING_CHARS]} …",
        is_long=len(text) > LARGE_HEADING_CHARS,
        explanation=explanation,
        show_whitespace=show_whitespace,
        data=htmlsafe_json_dumps(page_data(explanation), separators=(",", ":")),  # no text can end the script element
    )
    atomic_write(path, page)
    return path


def content_security_policy(style: str, script: str) -> str:
    """A policy that permits this style sheet and this script only, and turns no text into markup."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def text_direction(texts: Sequence[str]) -> str:
    """ "ltr" or "rtl", by the first character that has a direction."""
    kinds = (unicodedata.bidirectional(character) for character in "".join(texts))
    return "rtl" if next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L" else "ltr"


def page_data(explanation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers for the script: every distinct token text once, every attention weight as a 16-bit integer (of 65,535)."""
    vocabulary: dict[tuple[str, str], int] = {}

    def token_id(token: Mapping[str, Any]) -> int:
        return vocabulary.setdefault((token["text"], token["kind"]), len(vocabulary))

    def candidates(tokens: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [[token_id(token), float(f"{token['probability']:.4g}")] for token in tokens]

    def describe(entry: Mapping[str, Any], kept: Sequence[str], **candidate_keys: str) -> dict[str, Any]:
        lists = {name: candidates(entry[key]) for name, key in candidate_keys.items() if key in entry}
        return {key: entry[key] for key in kept if key in entry} | lists

    numbers = ("probability", "rank", "surprisal")
    tokens = [{"word": token_id(token)} | describe(token, numbers, next="next") for token in explanation["tokens"]]
    layers = [describe(layer, ("outputs",), predictions="says") for layer in explanation["layers"]]
    weights = [weight for layer in explanation["attention"] for head in layer for row in head for weight in row]
    layer, head = most_informative_head(explanation["heads"])
    return {
        "model": explanation["about"],
        "tokens": tokens,
        "layers": layers,
        "words": [list(word) for word in vocabulary],
        "attention": base64.b64encode(np.round(65535 * np.array(weights)).astype("<u2").tobytes()).decode(),
        "layer": layer,
        "head": head,
        "attribution": explanation["leaning"],
        "direction": text_direction(explanation["texts"]),
        "hasProbabilities": isinstance(as_mapping(explanation["answer"]).get("probabilities"), dict),
    }


def most_informative_head(heads: Sequence[Sequence[Mapping[str, float | None]]]) -> tuple[int, int]:
    """(layer, head) shown first: in the upper half of the layers, the head with the least weight on the first token, the
    previous token and the token itself."""
    weights = (
        (sum(share or 0.0 for share in head.values()), layer, index)
        for layer in range(len(heads) // 2, len(heads))
        for index, head in enumerate(heads[layer])
    )
    return min(weights)[1:]
