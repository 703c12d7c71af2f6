"""Explanation of a prediction: next-token probabilities, attention, the logit lens and attributions to the input tokens.

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

TOP_K = 10  # next tokens listed per position
ROUND_DIGITS = 6  # of weights and probabilities


def explain(
    model: LanguageModel, texts: Sequence[str], *, word: str | None = None, label: str | None = None
) -> dict[str, Any]:
    """Explain a prediction, as `nextword explain --json` prints it.

    Args:
        texts: one text; for a fine-tuned model the texts of one example, as `nextword predict` takes them.
        word: the next word whose probability is explained (default: the likeliest token).
        label: the label whose logit is explained (default: the predicted label).

    Returns:
        `tokens`: every token with its `text`, its `probability`, `rank` (from 1) and `surprisal` in bits given the tokens
            before
        it (None for the first and for special tokens), and `next`, the likeliest tokens to follow. `attention`: [L][H][t],
        the weights on the tokens 0 … t. `heads`: [L][H], the share of attention on the token before, the first one and
        itself. `layers`: for the embeddings and every layer, the likeliest token at each position by the logit lens.
        `leaning`: the attributions of the explained output to the tokens, with their sum, the value it should have, and the
        relative error.

    Raises:
        UsageError: texts, a word or a label that do not fit the model.
    """
    model_input = prepare_input(model, texts, label)
    input_ids, notes = model_input.input_ids, list(model_input.notes)
    activations, predicts_tokens = capture(model.gpt, input_ids), has_lm_head(model)
    if model_input.output_names:
        if word is not None:
            raise UsageError("--word is for models that generate text; this model has a task head: use --label LABEL")
        kind, target = "label", model_input.output_names[model_input.target_index]
        output_function = class_logit(model.gpt, model_input.target_index)
    else:
        token_id, note = int(logit_lens(model.gpt, activations.residual_streams[-1, -1:]).argmax()), None
        if word is not None:
            token_id, note = next_token_id(model, input_ids, word)
        notes += [note] if note else []
        kind, target = "word", describe_token(model.tokenizer, token_id)["text"]
        output_function = token_log_prob(model.gpt, token_id)
    if not predicts_tokens:
        notes.append("This model was made for its task and no longer predicts tokens.")
    entries = _describe_tokens(model, input_ids, activations, predicts_tokens)
    special = [t for t, entry in enumerate(entries) if entry["kind"] == "marker"]
    fixed_positions = [] if len(special) == len(entries) else special
    attributions = integrated_gradients(model.gpt, input_ids, output_function, fixed_positions)
    config = model.gpt.config
    return {
        "model": str(model.path),
        "about": {
            "layers": config.n_layers,
            "heads": config.n_heads,
            "width": config.d_model,
            "parameters": config.parameters,
            "vocabulary": config.vocab_size,
            "norms": config.norm_position,
        },
        "task": model_input.task,
        "texts": list(texts),
        "notes": notes,
        "answer": model_input.prediction,
        "tokens": entries,
        "attention": _attention_to_list(activations.attention),
        "heads": _head_patterns_to_list(activations.attention),
        "layers": _describe_layers(model, model_input, activations, predicts_tokens),
        "leaning": _attributions_to_dict(attributions, kind, target),
    }


def token_log_prob(model: GPT, token_id: int) -> OutputFunction:
    """log P(token | text), in nats, at the last position."""
    return lambda hidden: model.unembed(hidden[:, -1]).float().log_softmax(-1)[:, token_id]


def class_logit(model: GPT, class_index: int) -> OutputFunction:
    """One logit of the classification head at the last position."""
    return lambda hidden: model.classify(hidden[:, -1]).float()[:, class_index]


def describe_token(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    """A token as text: a special token by its name, bytes of an incomplete character in hexadecimal."""
    token_bytes = tokenizer.token_bytes(token_id)
    if not token_bytes:
        name = tokenizer.backend.id_to_token(token_id)
        return {"id": token_id, "text": name or f"token {token_id}", "kind": "marker"}
    try:
        return {"id": token_id, "text": token_bytes.decode(), "kind": "text"}
    except UnicodeDecodeError:
        return {"id": token_id, "text": token_bytes.hex(" ").upper(), "kind": "bytes"}


def _describe_tokens(
    model: LanguageModel, input_ids: Sequence[int], activations: Activations, predicts_tokens: bool
) -> list[dict[str, Any]]:
    """The tokens of the text, with their probabilities and the likeliest tokens to follow."""
    entries = [describe_token(model.tokenizer, token_id) for token_id in input_ids]
    if not predicts_tokens:
        return entries
    probabilities = logit_lens(model.gpt, activations.residual_streams[-1]).cpu().double().softmax(-1)  # [T, V]
    top_probabilities, top_ids = probabilities.topk(min(TOP_K, probabilities.shape[-1]))
    for t, entry in enumerate(entries):
        entry |= {"probability": None, "rank": None, "surprisal": None}
        if t and entry["kind"] != "marker":  # special tokens are inserted, not predicted
            probability = float(probabilities[t - 1, input_ids[t]])
            rank = 1 + int((probabilities[t - 1] > probability).sum())
            surprisal = -math.log2(max(probability, 1e-300))
            entry |= {"probability": probability, "rank": rank, "surprisal": surprisal}
        entry["next"] = [
            {**describe_token(model.tokenizer, token_id), "probability": probability}
            for token_id, probability in zip(top_ids[t].tolist(), top_probabilities[t].tolist(), strict=True)
        ]
    return entries


def _attention_to_list(attention: Tensor) -> list[Any]:
    """The rows of the causal attention weights, each up to its own token."""
    return [
        [[[round(x, ROUND_DIGITS) for x in row[: t + 1]] for t, row in enumerate(head)] for head in layer]
        for layer in attention.tolist()
    ]


def _head_patterns_to_list(attention: Tensor) -> list[Any]:
    def describe(shares: list[float]) -> dict[str, float | None]:
        rounded = [None if math.isnan(share) else round(share, ROUND_DIGITS) for share in shares]
        return dict(zip(("before", "first", "itself"), rounded, strict=True))

    return [[describe(head) for head in layer] for layer in head_patterns(attention).tolist()]


def _describe_layers(
    model: LanguageModel, model_input: ModelInput, activations: Activations, predicts_tokens: bool
) -> list[dict[str, Any]]:
    """The logit lens after the embeddings and every layer: the likeliest token at each position, and the outputs of a head."""
    entries: list[dict[str, Any]] = []
    for layer, stream in enumerate(activations.residual_streams):
        entry: dict[str, Any] = {"layer": layer}
        if predicts_tokens:
            probabilities, ids = logit_lens(model.gpt, stream).softmax(-1).max(-1)  # [T]
            entry["says"] = [
                {**describe_token(model.tokenizer, token_id), "probability": round(probability, ROUND_DIGITS)}
                for token_id, probability in zip(ids.tolist(), probabilities.tolist(), strict=True)
            ]
        if model_input.output_names:
            entry["outputs"] = _head_outputs(model.gpt, stream[-1:], model_input)
        entries.append(entry)
    return entries


@torch.no_grad()
def _head_outputs(model: GPT, last_hidden: Tensor, model_input: ModelInput) -> dict[str, float]:
    """What the task head computes from a layer's last position [1, D]: probabilities of labels, or a score."""
    logits = model.classify(model.final_norm(last_hidden))[0].float()
    if "labels" in (model_input.prediction or {}):
        logits = logits.sigmoid()
    elif len(model_input.output_names) > 1:
        logits = logits.softmax(-1)
    return dict(zip(model_input.output_names, logits.tolist(), strict=True))


def _attributions_to_dict(attributions: Attributions, kind: str, target: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "target": target,
        "unit": "nats" if kind == "word" else "logit",
        "baseline": "the mean of all token embeddings for every token but special tokens",
        "parts": attributions.per_token,
        "sum": attributions.total,
        "output": attributions.target_output,
        "at_baseline": attributions.baseline_output,
        "difference": attributions.output_difference,
        "relative_error": attributions.completeness_error,
        "steps": attributions.steps,
    }
