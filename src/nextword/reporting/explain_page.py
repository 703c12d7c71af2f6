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

from nextword.common.fs import write_durably
from nextword.reporting.run_data import escaped, short_count
from nextword.reporting.task_results import name_of

HEADING, MOST_HEADING = 90, 500  # characters that are set large, and that are set at all
LENS = {
    "pre": "Each layer adds to a stream that becomes the answer after the last one. Here the final norm and {matrix} are put "
    "to it after every layer already.",
    "post": "Each layer of this model ends with its own norm, so {matrix} is put to what each layer gives, as it is after the "
    "last one.",
}
MARKED = " What is marked ✓ is what the text really goes on with."


def write_page(explained: dict[str, Any], path: Path) -> Path:
    """Write what `explain` gives as a page of its own; its path."""
    parts = {name: resource(f"explain.{name}") for name in ("html", "css", "js")}
    text = "\n".join(explained["texts"]) or "Nothing yet"
    heading = text if len(text) <= MOST_HEADING else f"{text[:MOST_HEADING]} …"
    pre = explained["about"]["norms"] == "pre"
    page = Template(parts["html"]).substitute(
        policy=policy(parts["css"], parts["js"]), style=parts["css"], script=parts["js"],
        title=escaped(" ".join(text.split())[:60]), heading=escaped(heading),
        long=' class="long"' if len(text) > HEADING else "",
        about=escaped(about_in_words(explained)), lens=lens_in_words(explained),
        notes="".join(f'<p class="note">{escaped(note)}</p>' for note in explained["notes"]),
        norm_open="<mi>norm</mi><mo>(</mo>" if pre else "", norm_close="<mo>)</mo>" if pre else "",
        leaning=escaped(leaning_in_words(explained)), numbers=in_script(numbers_of(explained)),
    )  # fmt: skip
    write_durably(path, page)
    return path


def resource(name: str) -> str:
    return (resources.files("nextword.reporting") / "explain" / name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """A policy under which this style sheet and this script alone have any effect, and no text can become markup."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def in_script(value: Any) -> str:
    """JSON that can stand inside a script element: no "<" is in it, so that no text ends the element."""
    whole = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return whole.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------- words


def about_in_words(explained: dict[str, Any]) -> str:
    about = explained["about"]
    sizes = f"{about['layers']} layers of {about['heads']} heads, width {about['width']:,}"
    parts = (name_of(explained["model"]), explained["task"], sizes, f"{short_count(about['parameters'])} parameters")
    return " · ".join(part for part in parts if part)


def lens_in_words(explained: dict[str, Any]) -> str:
    words = "next" in explained["tokens"][0]
    matrix = "the vocabulary's matrix" if words else "the task's head"
    said = LENS[explained["about"]["norms"]].format(matrix=matrix)
    return f"{said} Read from top to bottom how the answer forms.{MARKED if words else ''}"


def leaning_in_words(explained: dict[str, Any]) -> str:
    leaning = explained["leaning"]
    what = (
        f"the log-probability of “{shown(leaning['target'])}” as the next word, in nats"
        if leaning["kind"] == "word"
        else f"the model's number for “{shown(leaning['target'])}” (its logit)"
    )
    return (
        f"How much each token has added to {what}, compared with a text of the same length in which every word is an average "
        "one, the mean of all token embeddings. Above zero it speaks for it, below zero against it."
    )


def shown(text: str) -> str:
    """A token as it stands in a sentence: line ends and spaces that are all of it by their signs."""
    plain = text.replace("\n", "↵").replace("\t", "⇥")
    return plain.strip(" ") or "␣" * len(plain)


def answer_in_parts(explained: dict[str, Any]) -> list[Any]:
    """The page's first sentence, its tokens as [text, kind]."""
    answer = explained["answer"]
    if answer is None:
        first, second, *_ = [*explained["tokens"][-1]["next"], None]
        told: list[Any] = [
            "The likeliest next token is ",
            [first["text"], first["kind"]],
            f", {100 * first['probability']:.1f} %",
        ]
        if second:
            told += ["; then ", [second["text"], second["kind"]], f", {100 * second['probability']:.1f} %"]
        return [*told, "."]
    if "score" in answer:
        return [f"The score is {answer['score']:.3f}."]
    chances = answer["probabilities"]
    if "labels" in answer:
        named = [x for label in answer["labels"] for x in ([label, "label"], f" ({100 * chances[label]:.1f} %) ")]
        return ["The labels are ", *named] if named else ["None of the labels fits."]
    if "text" in answer:
        return ["The answer is ", [answer["text"], "label"], f", {100 * chances[answer['label']]:.1f} %."]
    return ["The answer is ", [answer["label"], "label"], f", {100 * chances[answer['label']]:.1f} %."]


def direction(texts: Iterable[str]) -> str:
    """Which way a text runs: as its first letter that has a direction does."""
    for character in "".join(texts):
        kind = unicodedata.bidirectional(character)
        if kind in ("L", "R", "AL"):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"


# ---------------------------------------------------------------- numbers


def numbers_of(explained: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, each token's text said once and each attention weight in two bytes (of 65,535)."""
    words: dict[tuple[str, str], int] = {}

    def place(token: dict[str, Any]) -> int:
        return words.setdefault((token["text"], token["kind"]), len(words))

    def pair(token: dict[str, Any]) -> list[Any]:
        return [place(token), float(f"{token['probability']:.4g}")]

    tokens = []
    for token in explained["tokens"]:
        one = {key: token[key] for key in ("probability", "rank", "surprisal") if key in token} | {"word": place(token)}
        tokens.append(one | ({"next": [pair(other) for other in token["next"]]} if "next" in token else {}))
    layers = [
        {**({"says": [pair(one) for one in layer["says"]]} if "says" in layer else {}),
         **({"outputs": layer["outputs"]} if "outputs" in layer else {})}
        for layer in explained["layers"]
    ]  # fmt: skip
    weights = [x for layer in explained["attention"] for head in layer for row in head for x in row]
    packed = np.round(65535 * np.array(weights)).astype("<u2").tobytes()
    layer, head = telling_head(explained["heads"])
    return {
        "about": explained["about"], "tokens": tokens, "layers": layers, "words": [list(word) for word in words],
        "attention": base64.b64encode(packed).decode(), "layer": layer, "head": head, "leaning": explained["leaning"],
        "direction": direction(explained["texts"]), "answer": answer_in_parts(explained),
        "shares": isinstance((explained["answer"] or {}).get("probabilities"), dict),
    }  # fmt: skip


def telling_head(heads: list[Any]) -> tuple[int, int]:
    """The head that is shown first: of the upper half of the layers the one that looks elsewhere most, neither at the token
    itself nor at the first one nor the one before."""
    lowest = len(heads) // 2
    plain = [
        (sum(share or 0.0 for share in head.values()), layer, place)
        for layer, several in enumerate(heads)
        for place, head in enumerate(several)
        if layer >= lowest
    ]
    return min(plain)[1:]
