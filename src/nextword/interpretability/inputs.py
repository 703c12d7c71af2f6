"""What a model is given to read, and what is asked of it: a text to go on with, or an example of its task with its markers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nextword.common.errors import UsageError
from nextword.common.fs import read_json
from nextword.data.documents import Problems
from nextword.data.tokenizer import Tokenizer
from nextword.interpretability.activations import most_tokens
from nextword.model.hf_config import labels_of
from nextword.pipeline.language_model import Model
from nextword.pipeline.predictor import Predictor
from nextword.tasks.dataset import HEADS, Encoded, Encoder, Form, Text
from nextword.tasks.task_data import example_of

# The kinds of head in a stock directory that no task of ours is known for, in its config's words.
KINDS: dict[str, Any] = {"multi_label_classification": "labels", "regression": "score"}
LONG = 10**9  # a context that nothing is cut for


@dataclass(frozen=True)
class Reading:
    """One sequence as a model reads it.

    Attributes:
        ids: its tokens [T].
        task: what the model was fine-tuned for, if anything.
        outputs: what the head's outputs are called; none where the next word is asked for.
        chosen: the output that is explained.
        answer: what the model answers, in the words of `nextword predict`.
        notes: what a reader has to know, a sentence each.
    """

    ids: list[int]
    task: str | None = None
    outputs: tuple[str, ...] = ()
    chosen: int = 0
    answer: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def read(model: Model, texts: Sequence[str], label: str | None) -> Reading:
    """The sequence that is explained: of a language model its text, of a task's model the example in its template.

    Raises:
        UsageError: too few or too many texts for the task, or a label that the model does not have.
    """
    form, limit = _form(model), most_tokens(model.gpt)
    if form is not None and form.kind in HEADS:
        return _example(model, form, texts, label, limit)
    if label is not None:
        raise UsageError("--label is for models that give labels; this one goes on with a text: --word WORD")
    if form is None:
        if len(texts) != 1:
            raise UsageError(
                f"this model goes on with one text, and {len(texts)} were given: put it in quotation marks"
            )
        ids = model.tokenizer.encode(texts[0])
        if model.tokenizer.begin_of_text is not None:
            ids = [model.tokenizer.begin_of_text, *ids]
        ids = ids or [model.tokenizer.end_of_text]
    else:
        example = example_of(form.task, texts)
        ids = Encoder(form, model.tokenizer, LONG).prompt(example)
        if len(ids) > limit:
            short = Encoder(form, model.tokenizer, limit + max(1, form.answer_tokens)).prompt(example)
            note = f"The text has {len(ids):,} tokens with its markers; it is cut to {len(short):,}."
            return Reading(short, form.task, notes=(note,))
    note = f"The text has {len(ids):,} tokens; the last {limit:,} of them are read and shown."
    return Reading(ids[-limit:], form and form.task, notes=(note,) if len(ids) > limit else ())


def _form(model: Model) -> Form | None:
    """How examples are given to the model; of a stock directory with a classification head, as bare texts."""
    form = model.form
    if form is not None or not model.gpt.config.n_labels:
        return form
    path = model.directory / "config.json"
    raw = read_json(path)
    kind = KINDS.get(str(raw.get("problem_type")), "label" if model.gpt.config.n_labels > 1 else "score")
    return Form("classify", kind, tuple(labels_of(raw, path) or ()))


def _example(model: Model, form: Form, texts: Sequence[str], label: str | None, limit: int) -> Reading:
    """A task's example, and what the head says of it."""
    example, problems = example_of(form.task, texts), Problems()
    if model.form is None:  # a stock class's head reads at the last token of the bare text
        encoded = _bare(model.tokenizer, texts[0], limit)
    else:
        found = Encoder(form, model.tokenizer, limit).encode(example, problems, gold=False)
        if found is None:
            raise UsageError(f"this example cannot be read: {problems.found[-1]}")
        encoded = found
    predictor = Predictor(model.gpt, model.tokenizer, form)
    (row,) = predictor.logits([encoded])
    (answer,) = predictor.answers([row], [example])
    outputs = ("score",) if form.kind in ("score", "choice") else form.labels
    names = [str(i) for i in range(len(row))] if form.kind == "choice" else list(outputs)
    chosen = int(row.argmax()) if label is None else _place(names, label)
    notes = [f"Longer than the {limit:,} tokens that are shown: it is cut."] if problems.found else []
    if form.task == "similarity":
        notes.append("The score is the sum over both orders of the texts; what is shown is the order as given.")
    if form.kind == "choice":
        notes.append(f"Each choice is read by itself behind the question; what is shown is choice {chosen}.")
    sequence = encoded.texts[chosen if form.kind == "choice" else 0]
    return Reading(
        sequence.ids.tolist(), form.task, outputs, 0 if form.kind == "choice" else chosen, answer, tuple(notes)
    )


def _bare(tokenizer: Tokenizer, text: str, limit: int) -> Encoded:
    ids = tokenizer.encode(text)
    if tokenizer.begin_of_text is not None:
        ids = [tokenizer.begin_of_text, *ids]
    kept = torch.tensor((ids or [tokenizer.end_of_text])[:limit]).numpy()
    return Encoded((Text(kept, kept >= 0),))


def _place(names: Sequence[str], label: str) -> int:
    if label not in names:
        raise UsageError(f"--label {label!r}: this model has {', '.join(names)}")
    return names.index(label)


def speaks(model: Model) -> bool:
    """Whether the model predicts words: a classification model does not where it had a matrix of its own for them, which its
    stock class has no place for."""
    if not model.gpt.config.n_labels:
        return True
    shared = read_json(model.directory / "config.json").get("tie_word_embeddings")
    return model.gpt.config.family in ("gpt1", "gpt2") if shared is None else shared is True


def following(model: Model, ids: Sequence[int], word: str) -> tuple[int, str | None]:
    """The token that a word begins with where it follows a text: with a space before it or without, whichever is the likelier;
    and a note where the word has more tokens.

    Raises:
        UsageError: there is nothing in the word.
    """
    spelled = {tuple(model.tokenizer.encode(one)) for one in (word, f" {word}")} - {()}
    if not word or not spelled:
        raise UsageError("--word: name a word, such as --word doctor")
    with torch.no_grad():
        hidden = model.gpt(torch.tensor([list(ids)], device=model.gpt.unembedding.device))
        logits = model.gpt.unembed(hidden[0, -1])
    best = max(spelled, key=lambda tokens: (float(logits[tokens[0]]), tokens))
    if len(best) == 1:
        return best[0], None
    first = model.tokenizer.spelling(best[0]).decode("utf-8", "replace").strip()
    return best[0], f"“{word}” is {len(best)} tokens; what is explained is the first, “{first}”."
