"""A text explained by a model's own numbers: what comes next, who looks where, what each layer would say, what it leans on.

Shapes: T tokens, L layers, H heads, D model width, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nextword.common.errors import UsageError
from nextword.data.tokenizer import Tokenizer
from nextword.interpretability.activations import Inside, kinds_of_heads, look_inside, said_by_layer
from nextword.interpretability.attribution import Leaning, Output, leaning
from nextword.interpretability.inputs import Reading, following, read, speaks
from nextword.model.gpt import GPT
from nextword.pipeline.language_model import Model

LIKELIEST = 10  # next words that are told of each position
DIGITS = 6  # of a weight or a probability; what is less is no longer seen


def explain(model: Model, texts: Sequence[str], *, word: str | None = None, label: str | None = None) -> dict[str, Any]:
    """What `nextword explain --json` prints.

    Args:
        texts: one text; of a task's model those of one example, as `nextword predict` takes them.
        word: the next word whose probability is explained; the likeliest where not given.
        label: the label whose logit is explained; the one that the model gives where not given.

    Returns:
        `tokens`: each with its `text`, how it was predicted by those before (`probability`, `rank` from 1, `surprisal` in bits;
        None of the first one and of markers), and `next`, the likeliest tokens to follow it. `attention`: [L][H][t], the
        weights of the tokens 0 … t. `heads`: [L][H], the shares of a head's weight that go to the token before, the first one
        and itself. `layers`: for the embeddings and after each layer, what that layer would already say at each position.
        `leaning`: what each token has added to what is explained, with its sum, what the sum should be, and how far it is off.

    Raises:
        UsageError: texts, a word or a label that are not this model's.
    """
    reading = read(model, texts, label)
    inside, notes, words = look_inside(model.gpt, reading.ids), list(reading.notes), speaks(model)
    if reading.outputs:
        if word is not None:
            raise UsageError("--word is for models that go on with a text; this one answers a task: --label LABEL")
        kind, target, output = "label", reading.outputs[reading.chosen], of_head(model.gpt, reading.chosen)
    else:
        id, note = int(said_by_layer(model.gpt, inside.streams[-1, -1:]).argmax()), None
        if word is not None:
            id, note = following(model, reading.ids, word)
        notes += [note] if note else []
        kind, target, output = "word", spelled(model.tokenizer, id)["text"], of_word(model.gpt, id)
    if not words:
        notes.append("It was made for its task alone and has no matrix for the next word any more.")
    told = tokens_told(model, reading.ids, inside, words)
    markers = [t for t, one in enumerate(told) if one["kind"] == "marker"]
    found = leaning(model.gpt, reading.ids, output, fixed=[] if len(markers) == len(told) else markers)
    return {
        "model": str(model.path), "about": about(model), "task": reading.task, "texts": list(texts), "notes": notes,
        "answer": reading.answer, "tokens": told,
        "attention": attention_told(inside.attention), "heads": heads_told(inside.attention),
        "layers": layers_told(model, reading, inside, words), "leaning": leaning_told(found, kind, target),
    }  # fmt: skip


# ---------------------------------------------------------------- what is explained


def of_word(model: GPT, id: int) -> Output:
    """log P(word | text; θ), in nats, of the last position."""
    return lambda hidden: model.unembed(hidden[:, -1]).float().log_softmax(-1)[:, id]


def of_head(model: GPT, place: int) -> Output:
    """One logit of the classification head, read at the last position."""
    return lambda hidden: model.classify(hidden[:, -1]).float()[:, place]


# ---------------------------------------------------------------- as numbers and texts


def about(model: Model) -> dict[str, Any]:
    config = model.gpt.config
    return {
        "layers": config.n_layers, "heads": config.n_heads, "width": config.d_model, "parameters": config.parameters,
        "vocabulary": config.vocab_size, "norms": config.norm_position,
    }  # fmt: skip


def spelled(tokenizer: Tokenizer, id: int) -> dict[str, Any]:
    """A token as text: a marker by its name, bytes that are only a part of a character in hexadecimal."""
    spelling = tokenizer.spelling(id)
    if not spelling:
        name = tokenizer.backend.id_to_token(id)
        return {"id": id, "text": name or f"token {id}", "kind": "marker"}
    try:
        return {"id": id, "text": spelling.decode(), "kind": "text"}
    except UnicodeDecodeError:
        return {"id": id, "text": spelling.hex(" ").upper(), "kind": "bytes"}


def tokens_told(model: Model, ids: Sequence[int], inside: Inside, words: bool) -> list[dict[str, Any]]:
    """The text's tokens, each with how it was predicted and what is likeliest to follow it."""
    told = [spelled(model.tokenizer, id) for id in ids]
    if not words:
        return told
    p = said_by_layer(model.gpt, inside.streams[-1]).cpu().double().softmax(-1)  # [T, V]
    chances, best = p.topk(min(LIKELIEST, p.shape[-1]))
    for t, one in enumerate(told):
        one |= {"probability": None, "rank": None, "surprisal": None}
        if t and one["kind"] != "marker":  # a task's markers are put there, and are no words that were to be expected
            chance = p[t - 1, ids[t]]
            rank = 1 + int((p[t - 1] > chance).sum())
            one |= {"probability": float(chance), "rank": rank, "surprisal": -math.log2(max(float(chance), 1e-300))}
        one["next"] = [
            {**spelled(model.tokenizer, id), "probability": chance}
            for id, chance in zip(best[t].tolist(), chances[t].tolist(), strict=True)
        ]
    return told


def attention_told(attention: Tensor) -> list[Any]:
    """Each layer's and head's rows, each as long as it may look."""
    return [
        [[[round(x, DIGITS) for x in row[: t + 1]] for t, row in enumerate(head)] for head in layer]
        for layer in attention.tolist()
    ]


def heads_told(attention: Tensor) -> list[Any]:
    shares = kinds_of_heads(attention).tolist()
    names = ("before", "first", "itself")
    return [
        [{name: None if math.isnan(x) else round(x, DIGITS) for name, x in zip(names, head, strict=True)} for head in layer]
        for layer in shares
    ]  # fmt: skip


def layers_told(model: Model, reading: Reading, inside: Inside, words: bool) -> list[dict[str, Any]]:
    """What the embeddings and each layer would say: of each position the likeliest next token, and of a task its outputs."""
    told = []
    for layer, stream in enumerate(inside.streams):
        one: dict[str, Any] = {"layer": layer}
        if words:
            chances, best = said_by_layer(model.gpt, stream).softmax(-1).max(-1)  # [T]
            one["says"] = [
                {**spelled(model.tokenizer, id), "probability": round(p, DIGITS)}
                for id, p in zip(best.tolist(), chances.tolist(), strict=True)
            ]
        if reading.outputs:
            one["outputs"] = outputs_of(model.gpt, stream[-1:], reading)
        told.append(one)
    return told


@torch.no_grad()
def outputs_of(model: GPT, last: Tensor, reading: Reading) -> dict[str, float]:
    """What the head would make of a layer's last position [1, D]: probabilities of labels, else the number itself."""
    logits = model.classify(model.final_norm(last))[0].float()
    if "labels" in (reading.answer or {}):
        logits = logits.sigmoid()
    elif len(reading.outputs) > 1:
        logits = logits.softmax(-1)
    return dict(zip(reading.outputs, logits.tolist(), strict=True))


def leaning_told(found: Leaning, kind: str, target: str) -> dict[str, Any]:
    return {
        "kind": kind, "target": target, "unit": "nats" if kind == "word" else "logit",
        "baseline": "every word the mean of all token embeddings, markers as they are", "parts": found.parts, "sum": found.sum,
        "output": found.output, "at_baseline": found.at_baseline, "difference": found.difference,
        "relative_error": found.relative_error, "steps": found.steps,
    }  # fmt: skip
