"""The explanation of a text as one self-contained page: no external resource, and nothing in the text can run or be markup."""

import base64
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from nextword.common.fs import atomic_write
from nextword.reporting.rendering import read_resource, render_html
from nextword.reporting.run_data import as_mapping

LARGE_HEADING_CHARS, MAX_HEADING_CHARS = 90, 500


def write_explanation_page(explanation: Mapping[str, Any], path: Path) -> Path:
    """Write the result of `nextword explain` as a page.

    Args:
        explanation: The result, as `nextword explain --json` prints it.

    Returns:
        The path of the page.
    """
    style, script = read_resource("explain.css"), read_resource("explain.js")
    text = "\n".join(explanation["texts"]) or "Empty text"
    page = render_html(
        "explain.html",
        policy=Markup(content_security_policy(style, script)),
        style=Markup(style),
        script=Markup(script),
        title=" ".join(text.split())[:60],
        heading=text if len(text) <= MAX_HEADING_CHARS else f"{text[:MAX_HEADING_CHARS]} …",
        is_long=len(text) > LARGE_HEADING_CHARS,
        explanation=explanation,
        show_whitespace=show_whitespace,
        data=script_safe_json(page_data(explanation)),
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


def script_safe_json(value: Any) -> Markup:
    """JSON for a script element. It contains no "<", so no text can end the element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def show_whitespace(text: str) -> str:
    """A token inside a sentence: line breaks and tabs as arrows, a token of spaces as ␣, control characters as U+FFFD."""
    visible = text.replace("\n", "↵").replace("\t", "⇥")
    visible = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf") else c for c in visible)
    return visible.strip(" ") or "␣" * len(visible)


def text_direction(texts: Sequence[str]) -> str:
    """ "ltr" or "rtl", by the first character that has a direction."""
    kinds = (unicodedata.bidirectional(character) for character in "".join(texts))
    return "rtl" if next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L" else "ltr"


def page_data(explanation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers for the script: every distinct token text once, every attention weight as a 16-bit integer (of 65,535)."""
    vocabulary: dict[tuple[str, str], int] = {}

    def token_id(token: Mapping[str, Any]) -> int:
        return vocabulary.setdefault((token["text"], token["kind"]), len(vocabulary))

    def candidate(token: Mapping[str, Any]) -> list[Any]:
        return [token_id(token), float(f"{token['probability']:.4g}")]

    tokens: list[dict[str, Any]] = []
    for token in explanation["tokens"]:
        entry = {key: token[key] for key in ("probability", "rank", "surprisal") if key in token}
        entry["word"] = token_id(token)
        if "next" in token:
            entry["next"] = [candidate(other) for other in token["next"]]
        tokens.append(entry)
    layers: list[dict[str, Any]] = []
    for layer in explanation["layers"]:
        predictions = {"predictions": [candidate(token) for token in layer["says"]]} if "says" in layer else {}
        layers.append(predictions | {key: layer[key] for key in ("outputs",) if key in layer})
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
    lowest_layer = len(heads) // 2
    weights = [
        (sum(share or 0.0 for share in head.values()), layer, index)
        for layer, heads_of_layer in enumerate(heads)
        for index, head in enumerate(heads_of_layer)
        if layer >= lowest_layer
    ]
    return min(weights)[1:]
