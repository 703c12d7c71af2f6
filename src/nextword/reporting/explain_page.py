"""A text explained, as one page that can be sent to anybody: no address outside of it, and nothing that a text could run."""

import base64
import hashlib
import json
import unicodedata
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from nextword.common.fs import atomic_write
from nextword.reporting.run_data import escape_html, format_count
from nextword.reporting.task_results import short_path_name

LARGE_HEADING_CHARS, MAX_HEADING_CHARS = 90, 500  # characters that are set large, and that are set at all
LOGIT_LENS_NOTES = {
    "pre": "Each layer adds to a stream that becomes the answer after the last one. Here the final norm and {matrix} are put "
    "to it after every layer already.",
    "post": "Each layer of this model ends with its own norm, so {matrix} is put to what each layer gives, as it is after the "
    "last one.",
}
ACTUAL_TOKEN_NOTE = " What is marked ✓ is what the text really goes on with."


def write_explanation_page(explanation: dict[str, Any], path: Path) -> Path:
    """Write what `explain` gives as a page of its own; its path."""
    resources_by_type = {name: read_resource(f"explain.{name}") for name in ("html", "css", "js")}
    text = "\n".join(explanation["texts"]) or "Nothing yet"
    heading = text if len(text) <= MAX_HEADING_CHARS else f"{text[:MAX_HEADING_CHARS]} …"
    is_pre_norm = explanation["about"]["norms"] == "pre"
    page = Template(resources_by_type["html"]).substitute(
        policy=content_security_policy(resources_by_type["css"], resources_by_type["js"]), style=resources_by_type["css"], script=resources_by_type["js"],
        title=escape_html(" ".join(text.split())[:60]), heading=escape_html(heading),
        long=' class="long"' if len(text) > LARGE_HEADING_CHARS else "",
        about=escape_html(format_model_summary(explanation)), lens=format_logit_lens_note(explanation),
        notes="".join(f'<p class="note">{escape_html(note)}</p>' for note in explanation["notes"]),
        norm_open="<mi>norm</mi><mo>(</mo>" if is_pre_norm else "", norm_close="<mo>)</mo>" if is_pre_norm else "",
        leaning=escape_html(format_attribution_note(explanation)), numbers=script_safe_json(page_data(explanation)),
    )  # fmt: skip
    atomic_write(path, page)
    return path


def read_resource(name: str) -> str:
    return (resources.files("nextword.reporting") / "explain" / name).read_text(encoding="utf-8")


def content_security_policy(style: str, script: str) -> str:
    """A policy under which this style sheet and this script alone have any effect, and no text can become markup."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def script_safe_json(value: Any) -> str:
    """JSON that can stand inside a script element: no "<" is in it, so that no text ends the element."""
    json_text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return json_text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------- words


def format_model_summary(explanation: dict[str, Any]) -> str:
    about = explanation["about"]
    sizes = f"{about['layers']} layers of {about['heads']} heads, width {about['width']:,}"
    parts = (
        short_path_name(explanation["model"]),
        explanation["task"],
        sizes,
        f"{format_count(about['parameters'])} parameters",
    )
    return " · ".join(part for part in parts if part)


def format_logit_lens_note(explanation: dict[str, Any]) -> str:
    predicts_tokens = "next" in explanation["tokens"][0]
    matrix = "the vocabulary's matrix" if predicts_tokens else "the task's head"
    note = LOGIT_LENS_NOTES[explanation["about"]["norms"]].format(matrix=matrix)
    return f"{note} Read from top to bottom how the answer forms.{ACTUAL_TOKEN_NOTE if predicts_tokens else ''}"


def format_attribution_note(explanation: dict[str, Any]) -> str:
    attributions = explanation["leaning"]
    target_text = (
        f"the log-probability of “{show_whitespace(attributions['target'])}” as the next word, in nats"
        if attributions["kind"] == "word"
        else f"the model's number for “{show_whitespace(attributions['target'])}” (its logit)"
    )
    return (
        f"How much each token has added to {target_text}, compared with a text of the same length in which every word is an average "
        "one, the mean of all token embeddings. Above zero it speaks for it, below zero against it."
    )


def show_whitespace(text: str) -> str:
    """A token as it stands in a sentence: line ends and spaces that are all of it by their signs."""
    plain = text.replace("\n", "↵").replace("\t", "⇥")
    return plain.strip(" ") or "␣" * len(plain)


def answer_segments(explanation: dict[str, Any]) -> list[Any]:
    """The page's first sentence, its tokens as [text, kind]."""
    answer = explanation["answer"]
    if answer is None:
        first, second, *_ = [*explanation["tokens"][-1]["next"], None]
        segments: list[Any] = [
            "The likeliest next token is ",
            [first["text"], first["kind"]],
            f", {100 * first['probability']:.1f} %",
        ]
        if second:
            segments += ["; then ", [second["text"], second["kind"]], f", {100 * second['probability']:.1f} %"]
        return [*segments, "."]
    if "score" in answer:
        return [f"The score is {answer['score']:.3f}."]
    probabilities = answer["probabilities"]
    if "labels" in answer:
        label_segments = [
            x for label in answer["labels"] for x in ([label, "label"], f" ({100 * probabilities[label]:.1f} %) ")
        ]
        return ["The labels are ", *label_segments] if label_segments else ["None of the labels fits."]
    if "text" in answer:
        return ["The answer is ", [answer["text"], "label"], f", {100 * probabilities[answer['label']]:.1f} %."]
    return ["The answer is ", [answer["label"], "label"], f", {100 * probabilities[answer['label']]:.1f} %."]


def text_direction(texts: Iterable[str]) -> str:
    """Which way a text runs: as its first letter that has a direction does."""
    for character in "".join(texts):
        kind = unicodedata.bidirectional(character)
        if kind in ("L", "R", "AL"):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"


# ---------------------------------------------------------------- numbers


def page_data(explanation: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, each token's text said once and each attention weight in two bytes (of 65,535)."""
    vocabulary: dict[tuple[str, str], int] = {}

    def word_index(token: dict[str, Any]) -> int:
        return vocabulary.setdefault((token["text"], token["kind"]), len(vocabulary))

    def token_probability_pair(token: dict[str, Any]) -> list[Any]:
        return [word_index(token), float(f"{token['probability']:.4g}")]

    tokens = []
    for token in explanation["tokens"]:
        entry = {key: token[key] for key in ("probability", "rank", "surprisal") if key in token} | {
            "word": word_index(token)
        }
        tokens.append(
            entry | ({"next": [token_probability_pair(other) for other in token["next"]]} if "next" in token else {})
        )
    layers = [
        {**({"says": [token_probability_pair(entry) for entry in layer["says"]]} if "says" in layer else {}),
         **({"outputs": layer["outputs"]} if "outputs" in layer else {})}
        for layer in explanation["layers"]
    ]  # fmt: skip
    weights = [x for layer in explanation["attention"] for head in layer for row in head for x in row]
    packed = np.round(65535 * np.array(weights)).astype("<u2").tobytes()
    layer, head = most_informative_head(explanation["heads"])
    return {
        "about": explanation["about"], "tokens": tokens, "layers": layers, "words": [list(word) for word in vocabulary],
        "attention": base64.b64encode(packed).decode(), "layer": layer, "head": head, "leaning": explanation["leaning"],
        "direction": text_direction(explanation["texts"]), "answer": answer_segments(explanation),
        "shares": isinstance((explanation["answer"] or {}).get("probabilities"), dict),
    }  # fmt: skip


def most_informative_head(heads: list[Any]) -> tuple[int, int]:
    """The head that is shown first: of the upper half of the layers the one that looks elsewhere most, neither at the token
    itself nor at the first one nor the one before."""
    first_layer = len(heads) // 2
    candidates = [
        (sum(share or 0.0 for share in head.values()), layer, place)
        for layer, several in enumerate(heads)
        for place, head in enumerate(several)
        if layer >= first_layer
    ]
    return min(candidates)[1:]
