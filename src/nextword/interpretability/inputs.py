"""The input of an explanation: a text to continue, or an example of a task with its special tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nextword.common.errors import UsageError
from nextword.common.fs import read_json
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.interpretability.activations import max_explained_tokens
from nextword.model.hf_config import parse_labels
from nextword.pipeline.language_model import LanguageModel
from nextword.pipeline.predictor import Predictor
from nextword.tasks.dataset import HEAD_KINDS, EncodedExample, ExampleEncoder, TaskSpec, TokenSequence
from nextword.tasks.examples import example_from_texts

PROBLEM_TYPES: dict[str, Any] = {"multi_label_classification": "labels", "regression": "score"}
UNLIMITED_CONTEXT = 10**9


@dataclass(frozen=True)
class ModelInput:
    """One sequence to explain.

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
    output_names: tuple[str, ...] = ()
    target_index: int = 0
    prediction: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


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
        input_ids = _encode_plain_text(model.tokenizer, texts[0])
        note = f"The text has {len(input_ids):,} tokens; the last {max_tokens:,} of them are explained."
    else:
        example = example_from_texts(task_spec.task, texts)
        input_ids = ExampleEncoder(task_spec, model.tokenizer, UNLIMITED_CONTEXT).encode_prompt(example)
        limit = max_tokens + max(1, task_spec.answer_tokens)
        note = f"The text has {len(input_ids):,} tokens with its special tokens; it is truncated to {max_tokens:,}."
        if len(input_ids) > max_tokens:
            truncated = ExampleEncoder(task_spec, model.tokenizer, limit).encode_prompt(example)
            return ModelInput(truncated, task_spec.task, notes=(note,))
    notes = (note,) if len(input_ids) > max_tokens else ()
    return ModelInput(input_ids[-max_tokens:], task_spec and task_spec.task, notes=notes)


def _resolve_task_spec(model: LanguageModel) -> TaskSpec | None:
    """The task specification of a model; for a stock directory with a classification head, that of plain texts."""
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
    if model.task_spec is None:  # the head of a stock class reads the last token of the plain text
        token_ids = np.array(_encode_plain_text(model.tokenizer, texts[0])[:max_tokens])
        encoded = EncodedExample((TokenSequence(token_ids, token_ids >= 0),))
    else:
        encoded = ExampleEncoder(task_spec, model.tokenizer, max_tokens).encode(example, issues, with_target=False)
        if encoded is None:
            raise UsageError(f"this example is not usable: {issues.issues[-1]}")
    predictor = Predictor(model.gpt, model.tokenizer, task_spec)
    (logits,) = predictor.logits([encoded])
    prediction = predictor.prediction(logits, example)
    is_choice = task_spec.kind == "choice"
    output_names = task_spec.output_names
    options = [str(i) for i in range(len(logits))] if is_choice else list(output_names)
    if label is not None and label not in options:
        raise UsageError(f"--label {label!r}: this model has {', '.join(options)}")
    target = int(logits.argmax()) if label is None else options.index(label)
    notes = [f"The text is truncated to {max_tokens:,} tokens."] if issues.issues else []
    if task_spec.task == "similarity":
        notes.append("The score is the sum over both orders of the texts; the given order is explained.")
    if is_choice:
        notes.append(f"Each choice is read by itself after the question; choice {target} is explained.")
    sequence, index = encoded.sequences[target if is_choice else 0], 0 if is_choice else target
    return ModelInput(sequence.ids.tolist(), task_spec.task, output_names, index, prediction, tuple(notes))


def _encode_plain_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text after the beginning-of-text token, if there is one; never empty."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*begin, *tokenizer.encode(text)] or [tokenizer.eos_id]


def has_lm_head(model: LanguageModel) -> bool:
    """Whether the model predicts tokens. A classification model does not if its output embeddings were untied: its stock class
    does not store them."""
    if not model.gpt.config.n_labels:
        return True
    tied = read_json(model.directory / "config.json").get("tie_word_embeddings")
    return model.gpt.config.family in ("gpt1", "gpt2") if tied is None else tied is True


def next_token_id(model: LanguageModel, input_ids: Sequence[int], word: str) -> tuple[int, str | None]:
    """The first token of a word that follows a text, with or without a space before it, whichever is likelier.

    Returns:
        The token and, if the word has more tokens, a note.

    Raises:
        UsageError: the word is empty.
    """
    tokenizations = {tuple(model.tokenizer.encode(text)) for text in (word, f" {word}")} - {()}
    if not word or not tokenizations:
        raise UsageError("--word needs a word, for example --word doctor")
    with torch.no_grad():
        hidden = model.gpt(torch.tensor([list(input_ids)], device=model.gpt.unembedding.device))
        logits = model.gpt.unembed(hidden[0, -1])
    best = max(tokenizations, key=lambda tokens: (float(logits[tokens[0]]), tokens))
    if len(best) == 1:
        return best[0], None
    first = model.tokenizer.token_bytes(best[0]).decode("utf-8", "replace").strip()
    return best[0], f"“{word}” is {len(best)} tokens; the first, “{first}”, is explained."
