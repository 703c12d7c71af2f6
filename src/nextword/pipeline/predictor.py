"""A fine-tuned model's answers to examples, their scores, and what no model at all would score."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from nextword.common.errors import NextwordError
from nextword.data.dataset import IGNORE, Batch
from nextword.data.documents import Problems
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine
from nextword.inference.model_runner import reader_of
from nextword.inference.perplexity import evaluating
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT
from nextword.tasks import baselines
from nextword.tasks import metrics as task_metrics
from nextword.tasks.dataset import HEADS, Encoded, Encoder, Form, TaskDataset
from nextword.tasks.examples import Example, inputs_of
from nextword.tasks.metrics import Score
from nextword.training.losses import Inputs, choice_logits, example_logits, row_log_likelihoods
from nextword.training.step import to_inputs

BATCH_TOKENS = 8192  # tokens that go through the model at once
WRITTEN_AT_ONCE = 32  # answers that are written side by side
# The one of each kind's scores that decides which weights are kept, where it is not changed for rare labels.
METRIC = {
    "label": "accuracy",
    "labels": "micro_f1",
    "score": "pearson",
    "choice": "accuracy",
    "answer": "chrf",
    "preference": "preferred",
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Judged:
    """A set of examples with a model's answers: scores by name, and the task's loss (mean over examples, or nats per
    learned token), and for texts bits per byte of what was learned."""

    scores: dict[str, Score]
    loss: float
    bits_per_byte: float | None
    predictions: list[dict[str, Any]]


class Predictor:
    """Answers examples of one task. Each answer is that of the example alone, within rounding, whatever else is asked."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, form: Form):
        self.model, self.tokenizer, self.form = model, tokenizer, form

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.form, self.tokenizer, self.model.config.context_length)

    # ------------------------------------------------------------ through the model

    def batches(
        self, encoded: Sequence[Encoded], progress: Progress | None = None
    ) -> Iterator[tuple[list[int], Inputs]]:
        """Which examples, and their rows: examples of about one length together."""
        pad = self.tokenizer.pad if self.tokenizer.pad is not None else self.tokenizer.end_of_text
        data = TaskDataset(encoded, 1, 0, pad=pad, kind=self.form.kind)
        order = np.argsort([one.length for one in encoded], kind="stable").tolist()
        start = 0
        while start < len(order):
            end, rows = start, 0
            while end < len(order):
                rows += len(encoded[order[end]].texts)
                if end > start and rows * encoded[order[end]].length > BATCH_TOKENS:
                    break
                end += 1
            batch: Batch = data.assemble([[i] for i in order[start:end]])
            yield order[start:end], to_inputs(batch, self.model, seed=0)
            start = end
            if progress is not None:
                progress(start, len(order))

    def logits(self, encoded: Sequence[Encoded], progress: Progress | None = None) -> list[np.ndarray]:
        """The head's outputs [n_labels] of each example, or of a choice those of its choices [C]."""
        found: dict[int, np.ndarray] = {}
        with evaluating(self.model):
            for which, inputs in self.batches(encoded, progress):
                assert inputs.labels is not None
                hidden = self.model(inputs.tokens)
                read = choice_logits if self.form.kind == "choice" else example_logits
                table = read(self.model, hidden, inputs.labels).cpu().double().numpy()
                for i, row in zip(which, table, strict=True):
                    found[i] = row[: len(encoded[i].texts)] if self.form.kind == "choice" else row
        return [found[i] for i in range(len(encoded))]

    def log_likelihoods(self, encoded: Sequence[Encoded], progress: Progress | None = None) -> np.ndarray:
        """Σ log P of what is learned in each text of each example [E, texts], in nats."""
        found = np.zeros((len(encoded), len(encoded[0].texts) if encoded else 0))
        with evaluating(self.model):
            for which, inputs in self.batches(encoded, progress):
                rows: Tensor = row_log_likelihoods(self.model, inputs)
                found[which] = rows.cpu().double().numpy().reshape(len(which), -1)
        return found

    def next_word_loss(self, encoded: Sequence[Encoded]) -> float:
        """Nats per learned token of the examples' texts."""
        total, count = 0.0, 0
        with evaluating(self.model):
            for _, inputs in self.batches(encoded):
                total -= float(row_log_likelihoods(self.model, inputs).double().sum())
                count += int((inputs.targets != IGNORE).sum())
        return total / max(1, count)

    def write(self, examples: Sequence[Example], progress: Progress | None = None) -> list[str]:
        """An answer in words to each example: always the likeliest token, the same prompt answered once."""
        prompts = [tuple(self.encoder.prompt(example)) for example in examples]
        distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
        room = max(1, self.form.answer_tokens)
        answers: dict[tuple[int, ...], str] = {}
        with evaluating(self.model):
            reader = reader_of(self.model)
            for start in range(0, len(distinct), WRITTEN_AT_ONCE):
                some = distinct[start : start + WRITTEN_AT_ONCE]
                engine = Engine(self.model, self.tokenizer, max_batch=WRITTEN_AT_ONCE, seed=0, reader=reader)
                done = engine.generate(some, Sampling(temperature=0.0, max_tokens=room))
                answers.update({prompt: one.text.strip() for prompt, one in zip(some, done, strict=True)})
                if progress is not None:
                    progress(len(answers), len(distinct))
        return [answers[prompt] for prompt in prompts]

    # ------------------------------------------------------------ answers

    def encode(
        self, examples: Sequence[Example], problems: Problems, gold: bool
    ) -> tuple[list[Example], list[Encoded]]:
        """The examples that can be used, and their tokens."""
        both = [(example, self.encoder.encode(example, problems, gold)) for example in examples]
        return [e for e, x in both if x is not None], [x for _, x in both if x is not None]

    def answers(self, logits: Sequence[np.ndarray], examples: Sequence[Example]) -> list[dict[str, Any]]:
        """What a head's outputs say, in the words of `nextword predict`."""
        kind, names = self.form.kind, self.form.labels
        found: list[dict[str, Any]] = []
        for row, example in zip(logits, examples, strict=True):
            if kind == "score":
                found.append({"score": float(row[0])})
            elif kind == "labels":
                p = 1 / (1 + np.exp(-row))
                chosen = [name for name, one in zip(names, p, strict=True) if one > 0.5]
                found.append({"labels": chosen, "probabilities": dict(zip(names, p.tolist(), strict=True))})
            else:
                p = np.exp(row - row.max())
                p, best = p / p.sum(), int(row.argmax())
                if kind == "label":
                    found.append({"label": names[best], "probabilities": dict(zip(names, p.tolist(), strict=True))})
                else:
                    choice = example.fields["choices"][best]
                    found.append({"label": best, "text": choice, "probabilities": p.tolist()})
        return found

    def predict(
        self, examples: Sequence[Example], problems: Problems | None = None, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """An answer to each example, in order; what had to be cut goes to `problems`.

        Raises:
            NextwordError: an example that cannot be read at all, by its file and line.
        """
        problems = Problems() if problems is None else problems
        preferring = self.form.kind == "preference" and all("chosen" in example.fields for example in examples)
        if self.form.kind not in HEADS and not preferring:
            return [{"text": text} for text in self.write(examples, progress)]
        encoded = []
        for example in examples:
            one = self.encoder.encode(example, problems, gold=False)
            if one is None:
                raise NextwordError(str(problems.found[-1]))
            encoded.append(one)
        if not preferring:
            return self.answers(self.logits(encoded, progress), examples)
        sums = self.log_likelihoods(encoded, progress)
        return [{"label": "chosen" if a > b else "rejected", "score": float(a - b)} for a, b in sums]

    # ------------------------------------------------------------ scores

    def judge(
        self, examples: Sequence[Example], encoded: Sequence[Encoded], *, write: bool = True,
        metrics: Sequence[str] = ("chrf", "bleu", "rouge1", "rouge2", "rougeL"), progress: Progress | None = None,
    ) -> Judged:  # fmt: skip
        """Score the model on examples with their gold. `write` False leaves out answers in words, which take long."""
        if not examples:
            raise NextwordError("there is no example to be scored on")
        kind = self.form.kind
        if kind in HEADS:
            logits = self.logits(encoded, progress)
            answers = self.answers(logits, examples)
            loss = float(np.mean([head_loss(kind, row, one.gold) for row, one in zip(logits, encoded, strict=True)]))
            return Judged(score_answers(self.form, examples, answers), loss, None, answers)
        sums = self.log_likelihoods(encoded, progress)
        if kind == "preference":
            margins = sums[:, 0] - sums[:, 1]
            answers = [{"label": "chosen" if margin > 0 else "rejected", "score": float(margin)} for margin in margins]
            loss, bits = self._per_token(sums[:, :1], encoded)
            return Judged(task_metrics.preference(margins.tolist()), loss, bits, answers)
        loss, bits = self._per_token(sums, encoded)
        if not write:
            return Judged({}, loss, bits, [])
        answers = [{"text": text} for text in self.write(examples, progress)]
        return Judged(score_answers(self.form, examples, answers, metrics), loss, bits, answers)

    def _per_token(self, sums: np.ndarray, encoded: Sequence[Encoded]) -> tuple[float, float]:
        """Nats per learned token, and bits per byte of what they stand for; of each example's first text."""
        learned = [one.texts[0].ids[one.texts[0].learned] for one in encoded]
        n_bytes = sum(len(self.tokenizer.decode_bytes(ids.tolist())) for ids in learned)
        nats = -float(sums[:, 0].sum())
        return nats / max(1, sum(map(len, learned))), nats / np.log(2) / max(1, n_bytes)


def head_loss(kind: str, logits: np.ndarray, gold: Any) -> float:
    """The loss of one example, as `training.objectives.labelled` has it."""
    if kind == "score":
        return float((logits[0] - gold) ** 2)
    if kind == "labels":
        return float(np.mean(np.logaddexp(0, logits) - gold * logits))
    return float(np.logaddexp.reduce(logits) - logits[gold])


def score_answers(
    form: Form, examples: Sequence[Example], answers: Sequence[dict[str, Any]],
    metrics: Sequence[str] = ("chrf", "bleu", "rouge1", "rouge2", "rougeL"),
) -> dict[str, Score]:  # fmt: skip
    """The task's usual scores of answers beside the examples' gold."""
    fields = [example.fields for example in examples]
    if form.kind == "label":
        return task_metrics.classification([f["label"] for f in fields], [a["label"] for a in answers], form.labels)
    if form.kind == "labels":
        return task_metrics.several_labels([f["labels"] for f in fields], [a["labels"] for a in answers], form.labels)
    if form.kind == "score":
        return task_metrics.similarity([f["score"] for f in fields], [a["score"] for a in answers])
    if form.kind == "choice":
        return task_metrics.choices([f["answer"] for f in fields], [a["label"] for a in answers])
    # One source may have several references: it is answered once, and counts once.
    references: dict[tuple[str, ...], list[str]] = {}
    texts: dict[tuple[str, ...], str] = {}
    for example, answer in zip(examples, answers, strict=True):
        source = inputs_of(form.task, example)
        references.setdefault(source, []).append(gold_text(example))
        texts[source] = answer["text"]
    return task_metrics.writing([references[source] for source in texts], list(texts.values()), metrics)


def score_predictions(form: Form, examples: Sequence[Example], answers: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """The scores of those answers whose examples have their gold; none where no example has it."""
    if form.kind == "preference":
        return task_metrics.preference([a["score"] for a in answers]) if all("score" in a for a in answers) else {}
    both = [(e, a) for e, a in zip(examples, answers, strict=True) if has_gold(form, e)]
    return score_answers(form, [e for e, _ in both], [a for _, a in both]) if both else {}


def has_gold(form: Form, example: Example) -> bool:
    """Whether an example says what is right, in labels that the model knows."""
    fields = example.fields
    if form.kind == "label":
        return fields.get("label") in form.labels
    if form.kind == "labels":
        return "labels" in fields and set(fields["labels"]) <= set(form.labels)
    if form.task == "chat":
        return fields["messages"][-1]["role"] == "assistant"
    return {"score": "score", "choice": "answer", "answer": "completion"}[form.kind] in fields


def gold_text(example: Example) -> str:
    """The answer in words that an example holds."""
    if "messages" in example.fields:
        return example.fields["messages"][-1]["content"]
    return example.fields["completion"]


# ---------------------------------------------------------------- without a model


def baseline_answers(form: Form, train: Sequence[Example], test: Sequence[Example]) -> dict[str, list[dict[str, Any]]]:
    """What simple rules answer that need no model, by the rule's name; learned from the training examples alone."""
    asked, given = [inputs_of(form.task, e) for e in test], [inputs_of(form.task, e) for e in train]
    if form.kind == "label":
        gold = [e.fields["label"] for e in train]
        features = baselines.words if form.task == "classify" else baselines.compared
        bag = baselines.NaiveBayes([one[0] if len(one) == 1 else one for one in given], gold, features)
        return {
            "majority": [{"label": label} for label in baselines.majority(gold, len(test))],
            "bag of words": [{"label": x} for x in bag.predict([one[0] if len(one) == 1 else one for one in asked])],
        }
    if form.kind == "labels":
        sets = [e.fields["labels"] for e in train]
        bag = baselines.naive_bayes_several([one[0] for one in given], sets, [one[0] for one in asked])
        return {
            "majority": [{"labels": one} for one in baselines.majority([tuple(sorted(s)) for s in sets], len(test))],
            "bag of words": [{"labels": one} for one in bag],
        }
    if form.kind == "score":
        return {"shared words": [{"score": x} for x in baselines.overlap([(one[0], one[1]) for one in asked])]}
    if form.kind == "choice":
        first = baselines.majority([e.fields["answer"] for e in train], len(test))
        shared = baselines.overlap_choice([one[0] for one in asked], [one[1:] for one in asked])
        return {"majority": [{"label": i} for i in first], "shared words": [{"label": i} for i in shared]}
    if form.task == "rewrite":
        sources = [one[0] for one in asked]
        rules = {"copying": baselines.copying(sources), "first sentence": baselines.first_sentence(sources)}
        if rules["first sentence"] == rules["copying"]:
            del rules["first sentence"]
        rules["nearest"] = baselines.nearest([one[0] for one in given], [gold_text(e) for e in train], sources)
        return {name: [{"text": text} for text in texts] for name, texts in rules.items()}
    return {}


def baseline_scores(form: Form, train: Sequence[Example], test: Sequence[Example]) -> dict[str, dict[str, Score]]:
    """The scores of each rule that needs no model."""
    if form.kind == "preference":
        longer = [len(e.fields["chosen"]) - len(e.fields["rejected"]) for e in test]
        return {"the longer one": task_metrics.preference(longer)}
    return {name: score_answers(form, test, a) for name, a in baseline_answers(form, train, test).items()}
