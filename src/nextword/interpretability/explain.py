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
from nextword.interpretability.activations import Activations, capture, head_patterns, logit_lens
from nextword.interpretability.attribution import Attributions, OutputFunction, integrated_gradients
from nextword.interpretability.inputs import ModelInput, has_lm_head, next_token_id, prepare_input
from nextword.model.gpt import GPT
from nextword.pipeline.language_model import LanguageModel

TOP_K = 10  # next words that are told of each position
ROUND_DIGITS = 6  # of a weight or a probability; what is less is no longer seen


def explain(model: LanguageModel, texts: Sequence[str], *, word: str | None = None, label: str | None = None) -> dict[str, Any]:
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
    model_input = prepare_input(model, texts, label)
    activations, notes, predicts_tokens = (
        capture(model.gpt, model_input.input_ids),
        list(model_input.notes),
        has_lm_head(model),
    )
    if model_input.output_names:
        if word is not None:
            raise UsageError("--word is for models that go on with a text; this one answers a task: --label LABEL")
        kind, target, output = (
            "label",
            model_input.output_names[model_input.target_index],
            class_logit(model.gpt, model_input.target_index),
        )
    else:
        token_id, note = int(logit_lens(model.gpt, activations.residual_streams[-1, -1:]).argmax()), None
        if word is not None:
            token_id, note = next_token_id(model, model_input.input_ids, word)
        notes += [note] if note else []
        kind, target, output = (
            "word",
            describe_token(model.tokenizer, token_id)["text"],
            token_log_prob(model.gpt, token_id),
        )
    if not predicts_tokens:
        notes.append("It was made for its task alone and has no matrix for the next word any more.")
    token_entries = tokens_to_list(model, model_input.input_ids, activations, predicts_tokens)
    special_positions = [t for t, one in enumerate(token_entries) if one["kind"] == "marker"]
    attributions = integrated_gradients(
        model.gpt,
        model_input.input_ids,
        output,
        fixed_positions=[] if len(special_positions) == len(token_entries) else special_positions,
    )
    return {
        "model": str(model.path), "about": model_summary(model), "task": model_input.task, "texts": list(texts), "notes": notes,
        "answer": model_input.prediction, "tokens": token_entries,
        "attention": attention_to_list(activations.attention), "heads": head_patterns_to_list(activations.attention),
        "layers": layers_to_list(model, model_input, activations, predicts_tokens), "leaning": attributions_to_dict(attributions, kind, target),
    }  # fmt: skip


# ---------------------------------------------------------------- what is explained


def token_log_prob(model: GPT, token_id: int) -> OutputFunction:
    """log P(word | text; θ), in nats, of the last position."""
    return lambda hidden: model.unembed(hidden[:, -1]).float().log_softmax(-1)[:, token_id]


def class_logit(model: GPT, class_index: int) -> OutputFunction:
    """One logit of the classification head, read at the last position."""
    return lambda hidden: model.classify(hidden[:, -1]).float()[:, class_index]


# ---------------------------------------------------------------- as numbers and texts


def model_summary(model: LanguageModel) -> dict[str, Any]:
    config = model.gpt.config
    return {
        "layers": config.n_layers, "heads": config.n_heads, "width": config.d_model, "parameters": config.parameters,
        "vocabulary": config.vocab_size, "norms": config.norm_position,
    }  # fmt: skip


def describe_token(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    """A token as text: a marker by its name, bytes that are only a part of a character in hexadecimal."""
    token_bytes = tokenizer.token_bytes(token_id)
    if not token_bytes:
        name = tokenizer.backend.id_to_token(token_id)
        return {"id": token_id, "text": name or f"token {token_id}", "kind": "marker"}
    try:
        return {"id": token_id, "text": token_bytes.decode(), "kind": "text"}
    except UnicodeDecodeError:
        return {"id": token_id, "text": token_bytes.hex(" ").upper(), "kind": "bytes"}


def tokens_to_list(
    model: LanguageModel, input_ids: Sequence[int], activations: Activations, predicts_tokens: bool
) -> list[dict[str, Any]]:
    """The text's tokens, each with how it was predicted and what is likeliest to follow it."""
    entries = [describe_token(model.tokenizer, id) for id in input_ids]
    if not predicts_tokens:
        return entries
    probabilities = logit_lens(model.gpt, activations.residual_streams[-1]).cpu().double().softmax(-1)  # [T, V]
    top_probabilities, top_ids = probabilities.topk(min(TOP_K, probabilities.shape[-1]))
    for t, entry in enumerate(entries):
        entry |= {"probability": None, "rank": None, "surprisal": None}
        if t and entry["kind"] != "marker":  # a task's markers are put there, and are no words that were to be expected
            probability = probabilities[t - 1, input_ids[t]]
            rank = 1 + int((probabilities[t - 1] > probability).sum())
            entry |= {
                "probability": float(probability),
                "rank": rank,
                "surprisal": -math.log2(max(float(probability), 1e-300)),
            }
        entry["next"] = [
            {**describe_token(model.tokenizer, id), "probability": probability}
            for id, probability in zip(top_ids[t].tolist(), top_probabilities[t].tolist(), strict=True)
        ]
    return entries


def attention_to_list(attention: Tensor) -> list[Any]:
    """Each layer's and head's rows, each as long as it may look."""
    return [
        [[[round(x, ROUND_DIGITS) for x in row[: t + 1]] for t, row in enumerate(head)] for head in layer]
        for layer in attention.tolist()
    ]


def head_patterns_to_list(attention: Tensor) -> list[Any]:
    patterns = head_patterns(attention).tolist()
    names = ("before", "first", "itself")
    return [
        [{name: None if math.isnan(x) else round(x, ROUND_DIGITS) for name, x in zip(names, head, strict=True)} for head in layer]
        for layer in patterns
    ]  # fmt: skip


def layers_to_list(
    model: LanguageModel, model_input: ModelInput, activations: Activations, predicts_tokens: bool
) -> list[dict[str, Any]]:
    """What the embeddings and each layer would say: of each position the likeliest next token, and of a task its outputs."""
    entries = []
    for layer, stream in enumerate(activations.residual_streams):
        entry: dict[str, Any] = {"layer": layer}
        if predicts_tokens:
            top_probabilities, top_ids = logit_lens(model.gpt, stream).softmax(-1).max(-1)  # [T]
            entry["says"] = [
                {**describe_token(model.tokenizer, id), "probability": round(p, ROUND_DIGITS)}
                for id, p in zip(top_ids.tolist(), top_probabilities.tolist(), strict=True)
            ]
        if model_input.output_names:
            entry["outputs"] = head_outputs(model.gpt, stream[-1:], model_input)
        entries.append(entry)
    return entries


@torch.no_grad()
def head_outputs(model: GPT, last_hidden: Tensor, model_input: ModelInput) -> dict[str, float]:
    """What the head would make of a layer's last position [1, D]: probabilities of labels, else the number itself."""
    logits = model.classify(model.final_norm(last_hidden))[0].float()
    if "labels" in (model_input.prediction or {}):
        logits = logits.sigmoid()
    elif len(model_input.output_names) > 1:
        logits = logits.softmax(-1)
    return dict(zip(model_input.output_names, logits.tolist(), strict=True))


def attributions_to_dict(attributions: Attributions, kind: str, target: str) -> dict[str, Any]:
    return {
        "kind": kind, "target": target, "unit": "nats" if kind == "word" else "logit",
        "baseline": "every word the mean of all token embeddings, markers as they are", "parts": attributions.per_token, "sum": attributions.total,
        "output": attributions.target_output, "at_baseline": attributions.baseline_output, "difference": attributions.output_difference,
        "relative_error": attributions.completeness_error, "steps": attributions.steps,
    }  # fmt: skip
