"""What a model is given to read, and what is asked of it: a text to go on with, or an example of its task with its markers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nextword.common.errors import UsageError
from nextword.common.fs import read_json
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.interpretability.activations import max_explained_tokens
from nextword.model.hf_config import parse_labels
from nextword.pipeline.language_model import LanguageModel
from nextword.pipeline.predictor import Predictor
from nextword.tasks.examples import example_from_texts
from nextword.tasks.templates import HEAD_KINDS, EncodedExample, ExampleEncoder, TaskSpec, TokenSequence

# The kinds of head in a stock directory that no task of ours is known for, in its config's words.
PROBLEM_TYPES: dict[str, Any] = {"multi_label_classification": "labels", "regression": "score"}
UNLIMITED_CONTEXT = 10**9  # a context that nothing is cut for


@dataclass(frozen=True)
class ModelInput:
    """One sequence as a model reads it.

    Attributes:
        ids: its tokens [T].
        task: what the model was fine-tuned for, if anything.
        outputs: what the head's outputs are called; none where the next word is asked for.
        chosen: the output that is explained.
        answer: what the model answers, in the words of `nextword predict`.
        notes: what a reader has to know, a sentence each.
    """

    input_ids: list[int]
    task: str | None = None
    output_names: tuple[str, ...] = ()
    target_index: int = 0
    prediction: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def prepare_input(model: LanguageModel, texts: Sequence[str], label: str | None) -> ModelInput:
    """The sequence that is explained: of a language model its text, of a task's model the example in its template.

    Raises:
        UsageError: too few or too many texts for the task, or a label that the model does not have.
    """
    task_spec, max_tokens = _resolve_task_spec(model), max_explained_tokens(model.gpt)
    if task_spec is not None and task_spec.kind in HEAD_KINDS:
        return _prepare_example(model, task_spec, texts, label, max_tokens)
    if label is not None:
        raise UsageError("--label is for models that give labels; this one goes on with a text: --word WORD")
    if task_spec is None:
        if len(texts) != 1:
            raise UsageError(
                f"this model goes on with one text, and {len(texts)} were given: put it in quotation marks"
            )
        input_ids = model.tokenizer.encode(texts[0])
        if model.tokenizer.bos_id is not None:
            input_ids = [model.tokenizer.bos_id, *input_ids]
        input_ids = input_ids or [model.tokenizer.eos_id]
    else:
        example = example_from_texts(task_spec.task, texts)
        input_ids = ExampleEncoder(task_spec, model.tokenizer, UNLIMITED_CONTEXT).encode_prompt(example)
        if len(input_ids) > max_tokens:
            truncated_ids = ExampleEncoder(
                task_spec, model.tokenizer, max_tokens + max(1, task_spec.answer_tokens)
            ).encode_prompt(example)
            note = f"The text has {len(input_ids):,} tokens with its markers; it is cut to {len(truncated_ids):,}."
            return ModelInput(truncated_ids, task_spec.task, notes=(note,))
    note = f"The text has {len(input_ids):,} tokens; the last {max_tokens:,} of them are read and shown."
    return ModelInput(
        input_ids[-max_tokens:], task_spec and task_spec.task, notes=(note,) if len(input_ids) > max_tokens else ()
    )


def _resolve_task_spec(model: LanguageModel) -> TaskSpec | None:
    """How examples are given to the model; of a stock directory with a classification head, as bare texts."""
    task_spec = model.task_spec
    if task_spec is not None or not model.gpt.config.n_labels:
        return task_spec
    path = model.directory / "config.json"
    config = read_json(path)
    kind = PROBLEM_TYPES.get(str(config.get("problem_type")), "label" if model.gpt.config.n_labels > 1 else "score")
    return TaskSpec("classify", kind, tuple(parse_labels(config, path) or ()))


def _prepare_example(
    model: LanguageModel, task_spec: TaskSpec, texts: Sequence[str], label: str | None, max_tokens: int
) -> ModelInput:
    """A task's example, and what the head says of it."""
    example, problems = example_from_texts(task_spec.task, texts), IssueLog()
    if model.task_spec is None:  # a stock class's head reads at the last token of the bare text
        encoded = _encode_plain_text(model.tokenizer, texts[0], max_tokens)
    else:
        encoded_or_none = ExampleEncoder(task_spec, model.tokenizer, max_tokens).encode(
            example, problems, with_target=False
        )
        if encoded_or_none is None:
            raise UsageError(f"this example cannot be read: {problems.issues[-1]}")
        encoded = encoded_or_none
    predictor = Predictor(model.gpt, model.tokenizer, task_spec)
    (logits,) = predictor.logits([encoded])
    (prediction,) = predictor.predictions_from_logits([logits], [example])
    output_names = ("score",) if task_spec.kind in ("score", "choice") else task_spec.labels
    option_names = [str(i) for i in range(len(logits))] if task_spec.kind == "choice" else list(output_names)
    target_index = int(logits.argmax()) if label is None else _label_index(option_names, label)
    notes = [f"Longer than the {max_tokens:,} tokens that are shown: it is cut."] if problems.issues else []
    if task_spec.task == "similarity":
        notes.append("The score is the sum over both orders of the texts; what is shown is the order as given.")
    if task_spec.kind == "choice":
        notes.append(f"Each choice is read by itself behind the question; what is shown is choice {target_index}.")
    sequence = encoded.sequences[target_index if task_spec.kind == "choice" else 0]
    return ModelInput(
        sequence.ids.tolist(),
        task_spec.task,
        output_names,
        0 if task_spec.kind == "choice" else target_index,
        prediction,
        tuple(notes),
    )


def _encode_plain_text(tokenizer: Tokenizer, text: str, max_tokens: int) -> EncodedExample:
    input_ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None:
        input_ids = [tokenizer.bos_id, *input_ids]
    kept_ids = torch.tensor((input_ids or [tokenizer.eos_id])[:max_tokens]).numpy()
    return EncodedExample((TokenSequence(kept_ids, kept_ids >= 0),))


def _label_index(names: Sequence[str], label: str) -> int:
    if label not in names:
        raise UsageError(f"--label {label!r}: this model has {', '.join(names)}")
    return names.index(label)


def has_lm_head(model: LanguageModel) -> bool:
    """Whether the model predicts words: a classification model does not where it had a matrix of its own for them, which its
    stock class has no place for."""
    if not model.gpt.config.n_labels:
        return True
    tied_embeddings = read_json(model.directory / "config.json").get("tie_word_embeddings")
    return model.gpt.config.family in ("gpt1", "gpt2") if tied_embeddings is None else tied_embeddings is True


def next_token_id(model: LanguageModel, input_ids: Sequence[int], word: str) -> tuple[int, str | None]:
    """The token that a word begins with where it follows a text: with a space before it or without, whichever is the likelier;
    and a note where the word has more tokens.

    Raises:
        UsageError: there is nothing in the word.
    """
    tokenizations = {tuple(model.tokenizer.encode(one)) for one in (word, f" {word}")} - {()}
    if not word or not tokenizations:
        raise UsageError("--word: name a word, such as --word doctor")
    with torch.no_grad():
        hidden = model.gpt(torch.tensor([list(input_ids)], device=model.gpt.unembedding.device))
        logits = model.gpt.unembed(hidden[0, -1])
    best_tokens = max(tokenizations, key=lambda tokens: (float(logits[tokens[0]]), tokens))
    if len(best_tokens) == 1:
        return best_tokens[0], None
    first = model.tokenizer.token_bytes(best_tokens[0]).decode("utf-8", "replace").strip()
    return best_tokens[0], f"“{word}” is {len(best_tokens)} tokens; what is explained is the first, “{first}”."
