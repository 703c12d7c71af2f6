"""Explanation of a prediction: next-token probabilities, attention, the logit lens and attributions to the input tokens.

Shapes: T tokens, L layers, H heads, D model width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextword.common.errors import UsageError
from nextword.common.fs import read_json
from nextword.common.text_units import nfc
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.interpretability.activations import capture, head_patterns, logit_lens, max_explained_tokens
from nextword.interpretability.attribution import OutputFunction, integrated_gradients
from nextword.model.gpt import GPT
from nextword.model.hf_config import parse_labels
from nextword.pipeline.language_model import LanguageModel
from nextword.pipeline.predictor import Predictor
from nextword.tasks.dataset import HEAD_KINDS, EncodedExample, ExampleEncoder, TaskSpec, TokenSequence
from nextword.tasks.examples import example_from_texts

TOP_K = 10  # next tokens listed per position
ROUND_DIGITS = 6  # of weights and probabilities
PROBLEM_TYPES: dict[str, Any] = {"multi_label_classification": "labels", "regression": "score"}
UNLIMITED_CONTEXT = 10**9


@dataclass(frozen=True)
class ModelInput:
    """One sequence to explain: a text to continue, or an example of a task with its special tokens.

    Attributes:
        input_ids: its tokens [T].
        task: the task the model was fine-tuned for, if any.
        output_names: the outputs of the task head; empty for a language model, which predicts the next token.
        target_index: the output that is explained.
        prediction: the model's prediction, as `nextword predict` prints it.
        notes: remarks for the reader, one sentence each.
    """

    input_ids: list[int]
    task: str | None = None
    output_names: Sequence[str] = ()
    target_index: int = 0
    prediction: dict[str, Any] | None = None
    notes: Sequence[str] = ()


def explain(
    model: LanguageModel, texts: Sequence[str], *, word: str | None = None, label: str | None = None
) -> dict[str, Any]:
    """Explain a prediction, as `nextword explain --json` prints it.

    Args:
        model: the model.
        texts: one text; for a fine-tuned model the texts of one example, as `nextword predict` takes them.
        word: the next word whose probability is explained, all of its tokens together (default: the likeliest token).
        label: the label whose logit is explained (default: the predicted label).

    Returns:
        `tokens`: every token with its `text`, its `probability`, `rank` (from 1) and `surprisal` in bits given the tokens
        before it (None for the first and for special tokens), and `next`, the likeliest tokens to follow. `attention`:
        [L][H][t], the weights on the tokens 0 … t. `heads`: [L][H], the share of attention on the token before, the first
        one and itself. `layers`: for the embeddings and every layer, the likeliest token at each position by the logit
        lens. `leaning`: the attributions of the explained output to the tokens, with their sum, the value it should have,
        and the relative error.

    Raises:
        UsageError: texts, a word or a label that do not fit the model.
    """
    model_input = prepare_input(model, texts, label)
    input_ids, notes, config = model_input.input_ids, list(model_input.notes), model.gpt.config
    if message := model.tokenizer.form_message([*texts, word or ""]):
        notes.append(f"{message[:1].upper()}{message[1:]}.")
    activations, predicts_tokens = capture(model.gpt, input_ids), has_lm_head(model)
    word_ids: list[int] = []
    if model_input.output_names:
        if word is not None:
            raise UsageError("--word is for models that generate text; this model has a task head: use --label LABEL")
        kind, unit, target = "label", "logit", model_input.output_names[model_input.target_index]
        output_function = class_logit(model.gpt, model_input.target_index)
    else:
        likeliest = int(logit_lens(model.gpt, activations.residual_streams[-1, -1:]).argmax())
        word_ids = [likeliest] if word is None else next_word_ids(model, input_ids, word)
        kind, unit, target = "word", "nats", word or describe_token(model.tokenizer, likeliest)["text"]
        output_function = log_prob_of(model.gpt, word_ids)
    if not predicts_tokens:
        notes.append("This model was made for its task and no longer predicts tokens.")
    tokens = [describe_token(model.tokenizer, token_id) for token_id in input_ids]
    special = [t for t, token in enumerate(tokens) if token["kind"] == "marker"]
    fixed_positions = [] if len(special) == len(tokens) else special
    read_ids = [*input_ids, *word_ids[:-1]]  # a word of several tokens is predicted token by token
    fixed_positions += range(len(input_ids), len(read_ids))
    attributions = integrated_gradients(model.gpt, read_ids, output_function, fixed_positions)
    if predicts_tokens:
        tokens = _with_probabilities(model, tokens, logit_lens(model.gpt, activations.residual_streams[-1]))
    shares = np.round(head_patterns(activations.attention).double().numpy(), ROUND_DIGITS).tolist()
    attention = np.round(activations.attention.double().numpy(), ROUND_DIGITS)
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
        "tokens": tokens,
        "attention": [[[row[: t + 1].tolist() for t, row in enumerate(head)] for head in layer] for layer in attention],
        "heads": [[_describe_head(head) for head in layer] for layer in shares],
        "layers": [
            {"layer": layer, **_describe_layer(model, model_input, stream, predicts_tokens)}
            for layer, stream in enumerate(activations.residual_streams)
        ],
        "leaning": {
            "kind": kind,
            "target": target,
            "unit": unit,
            "baseline": "the mean of all token embeddings for every token but special tokens",
            "parts": attributions.per_token[: len(input_ids)],
            "sum": attributions.total,
            "output": attributions.target_output,
            "at_baseline": attributions.baseline_output,
            "difference": attributions.output_difference,
            "relative_error": attributions.completeness_error,
            "steps": attributions.steps,
        },
    }


def log_prob_of(model: GPT, token_ids: Sequence[int]) -> OutputFunction:
    """log P(tokens | text), in nats, from the positions of the text and of all but the last of the tokens."""
    targets = torch.tensor(token_ids, device=model.unembedding.device)[None, :, None]

    def log_prob(hidden: Tensor) -> Tensor:
        log_probs = model.unembed(hidden[:, -len(token_ids) :]).float().log_softmax(-1)
        return log_probs.gather(-1, targets.expand(len(hidden), -1, -1)).sum((1, 2))

    return log_prob


def class_logit(model: GPT, class_index: int) -> OutputFunction:
    """One logit of the classification head at the last position."""
    return lambda hidden: model.classify(hidden[:, -1]).float()[:, class_index]


# ---------------------------------------------------------------- tokens and layers


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


def _with_probabilities(model: LanguageModel, tokens: Sequence[dict[str, Any]], logits: Tensor) -> list[dict[str, Any]]:
    """The tokens of the text with their probabilities and the likeliest tokens to follow, from the logits [T, V]."""
    probabilities = logits.cpu().double().softmax(-1)
    top_probabilities, top_ids = (top.numpy() for top in probabilities.topk(min(TOP_K, probabilities.shape[-1])))
    entries: list[dict[str, Any]] = []
    for t, token in enumerate(tokens):
        entry = {**token, "probability": None, "rank": None, "surprisal": None}
        if t and token["kind"] != "marker":  # special tokens are inserted, not predicted
            probability = float(probabilities[t - 1, token["id"]])
            entry["probability"] = probability
            entry["rank"] = 1 + int((probabilities[t - 1] > probability).sum())
            entry["surprisal"] = -math.log2(max(probability, 1e-300))
        entry["next"] = _describe_candidates(model, top_ids[t], top_probabilities[t])
        entries.append(entry)
    return entries


def _describe_head(shares: Sequence[float]) -> dict[str, float | None]:
    """The shares of a head's attention; None in texts that are too short to tell them apart."""
    names = ("before", "first", "itself")
    return {name: None if math.isnan(share) else share for name, share in zip(names, shares, strict=True)}


def _describe_layer(
    model: LanguageModel, model_input: ModelInput, stream: Tensor, predicts_tokens: bool
) -> dict[str, Any]:
    """A layer's residual stream [T, D] by the logit lens: the likeliest token at each position, and the outputs of a head."""
    entry: dict[str, Any] = {}
    if predicts_tokens:
        probabilities, ids = (top.cpu().numpy() for top in logit_lens(model.gpt, stream).softmax(-1).max(-1))  # [T]
        entry["says"] = _describe_candidates(model, ids, np.round(probabilities.astype(np.float64), ROUND_DIGITS))
    if model_input.output_names:
        with torch.no_grad():
            logits = model.gpt.classify(model.gpt.final_norm(stream[-1:]))[0].float()
        if "labels" in (model_input.prediction or {}):
            logits = logits.sigmoid()
        elif len(model_input.output_names) > 1:
            logits = logits.softmax(-1)
        entry["outputs"] = dict(zip(model_input.output_names, logits.cpu().numpy().tolist(), strict=True))
    return entry


def _describe_candidates(model: LanguageModel, ids: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    return [
        {**describe_token(model.tokenizer, token_id), "probability": probability}
        for token_id, probability in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]


# ---------------------------------------------------------------- input


def prepare_input(model: LanguageModel, texts: Sequence[str], label: str | None) -> ModelInput:
    """The tokens of a text, or of a task's example in its template.

    Raises:
        UsageError: the number of texts does not fit the task, or the model does not have the label.
    """
    task_spec, max_tokens = _resolve_task_spec(model), max_explained_tokens(model.gpt)
    if task_spec is not None and task_spec.kind in HEAD_KINDS:
        return _prepare_example(model, task_spec, texts, label, max_tokens)
    if label is not None:
        raise UsageError("--label is for models with labels; this model generates text: use --word WORD")
    if task_spec is None:
        if len(texts) != 1:
            raise UsageError(f"this model takes one text, but {len(texts)} were given: put it in quotation marks")
        full = _encode_plain_text(model.tokenizer, texts[0])
        note = f"The text has {len(full):,} tokens; the last {max_tokens:,} of them are explained."
        return ModelInput(full[-max_tokens:], notes=[note] if len(full) > max_tokens else [])
    example = example_from_texts(task_spec.task, texts)
    limits = (UNLIMITED_CONTEXT, max_tokens + max(1, task_spec.answer_tokens))
    full, truncated = (ExampleEncoder(task_spec, model.tokenizer, limit).encode_prompt(example) for limit in limits)
    note = f"The text has {len(full):,} tokens with its special tokens; it is truncated to {max_tokens:,}."
    return ModelInput(truncated, task_spec.task, notes=[note] if len(full) > max_tokens else [])


def _resolve_task_spec(model: LanguageModel) -> TaskSpec | None:
    """The task specification of a model; for a Hugging Face directory with a classification head, that of plain texts."""
    if model.task_spec is not None or not model.gpt.config.n_labels:
        return model.task_spec
    path = model.directory / "config.json"
    config = read_json(path)
    default = "label" if model.gpt.config.n_labels > 1 else "score"
    kind = PROBLEM_TYPES.get(str(config.get("problem_type")), default)
    return TaskSpec("classify", kind, tuple(parse_labels(config, path) or ()))


def _prepare_example(
    model: LanguageModel, task_spec: TaskSpec, texts: Sequence[str], label: str | None, max_tokens: int
) -> ModelInput:
    """An example of a task with a head, and the prediction for it."""
    example, issues = example_from_texts(task_spec.task, texts), IssueLog()
    if model.task_spec is None:  # the head of a transformers class reads the last token of the plain text
        full = _encode_plain_text(model.tokenizer, texts[0])
        token_ids, is_cut = np.array(full[:max_tokens]), len(full) > max_tokens
        encoded = EncodedExample((TokenSequence(token_ids, token_ids >= 0),))
    else:
        encoder = ExampleEncoder(task_spec, model.tokenizer, max_tokens)
        encoded, is_cut = encoder.encode(example, issues, with_target=False), bool(encoder.cut_counts)
        if encoded is None:
            raise UsageError(f"this example is not usable: {issues.issues[-1]}")
    predictor = Predictor(model.gpt, model.tokenizer, task_spec)
    (logits,) = predictor.logits([example], [encoded])
    prediction = predictor.prediction(logits, example)
    is_choice = task_spec.kind == "choice"
    output_names = task_spec.output_names
    options = [str(i) for i in range(len(logits))] if is_choice else list(output_names)
    known = list(map(nfc, options))
    if label is not None and nfc(label) not in known:
        raise UsageError(f"--label {label!r}: this model has {', '.join(options)}")
    target = int(logits.argmax()) if label is None else known.index(nfc(label))
    notes = [f"The text is truncated to {max_tokens:,} tokens."] if is_cut else []
    if task_spec.task == "similarity":
        notes.append("The score is the sum over both orders of the texts; the given order is explained.")
    if is_choice:
        notes.append(f"Each choice is read by itself after the question; choice {target} is explained.")
    sequence, index = encoded.sequences[target if is_choice else 0], 0 if is_choice else target
    return ModelInput(sequence.ids.tolist(), task_spec.task, output_names, index, prediction, notes)


def _encode_plain_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text after the beginning-of-text token, if there is one; never empty."""
    return [*tokenizer.bos_ids, *tokenizer.encode(text)] or [tokenizer.eos_id]


def has_lm_head(model: LanguageModel) -> bool:
    """Whether the model predicts tokens. A classification model does not if its output embeddings were untied: its class in
    transformers does not store them."""
    if not model.gpt.config.n_labels:
        return True
    tied = read_json(model.directory / "config.json").get("tie_word_embeddings")
    return model.gpt.config.family in ("gpt1", "gpt2") if tied is None else tied is True


def next_word_ids(model: LanguageModel, input_ids: Sequence[int], word: str) -> list[int]:
    """The tokens of a word that follows a text, with or without a space before it, whichever is likelier.

    Raises:
        UsageError: the word is empty, or does not fit into the context after the text.
    """
    tokenizations = {tuple(model.tokenizer.encode(text)) for text in (word, f" {word}")} - {()}
    if not word or not tokenizations:
        raise UsageError("--word needs a word, for example --word doctor")
    context_length = model.gpt.config.context_length
    if (length := len(input_ids) + max(map(len, tokenizations)) - 1) > context_length:
        raise UsageError(f"the text and --word have {length:,} tokens, more than the context of {context_length:,}")

    def log_prob(token_ids: tuple[int, ...]) -> float:
        read_ids = torch.tensor([[*input_ids, *token_ids[:-1]]], device=model.gpt.unembedding.device)
        with torch.no_grad():
            return float(log_prob_of(model.gpt, token_ids)(model.gpt(read_ids)))

    return list(max(tokenizations, key=lambda token_ids: (log_prob(token_ids), token_ids)))
