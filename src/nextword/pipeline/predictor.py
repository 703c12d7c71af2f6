"""A fine-tuned model's answers to examples, their scores, and what no model at all would score."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from nextword.common.errors import NextwordError
from nextword.data.dataset import IGNORE_INDEX, Batch
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine
from nextword.inference.model_runner import build_runner
from nextword.inference.perplexity import evaluation_mode
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT
from nextword.tasks import baselines
from nextword.tasks import metrics as task_metrics
from nextword.tasks.dataset import HEAD_KINDS, EncodedExample, ExampleEncoder, TaskDataset, TaskSpec
from nextword.tasks.examples import Example, input_texts
from nextword.tasks.metrics import Score
from nextword.training.losses import DeviceBatch, example_logits, multiple_choice_logits, sequence_logprobs
from nextword.training.step import to_device

MAX_BATCH_TOKENS = 8192  # tokens that go through the model at once
GENERATION_BATCH_SIZE = 32  # answers that are written side by side
# The one of each kind's scores that decides which weights are kept, where it is not changed for rare labels.
SELECTION_METRIC = {
    "label": "accuracy",
    "labels": "micro_f1",
    "score": "pearson",
    "choice": "accuracy",
    "answer": "chrf",
    "preference": "preferred",
}

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationResult:
    """A set of examples with a model's answers: scores by name, and the task's loss (mean over examples, or nats per
    learned token), and for texts bits per byte of what was learned."""

    scores: dict[str, Score]
    loss: float
    bits_per_byte: float | None
    predictions: list[dict[str, Any]]


class Predictor:
    """Answers examples of one task. Each answer is that of the example alone, within rounding, whatever else is asked."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, task_spec: TaskSpec):
        self.model, self.tokenizer, self.task_spec = model, tokenizer, task_spec

    @cached_property
    def encoder(self) -> ExampleEncoder:
        return ExampleEncoder(self.task_spec, self.tokenizer, self.model.config.context_length)

    # ------------------------------------------------------------ through the model

    def iter_batches(
        self, encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None
    ) -> Iterator[tuple[list[int], DeviceBatch]]:
        """Which examples, and their rows: examples of about one length together."""
        pad = self.tokenizer.pad_id if self.tokenizer.pad_id is not None else self.tokenizer.eos_id
        data = TaskDataset(encoded, 1, 0, pad_token_id=pad, kind=self.task_spec.kind)
        order = np.argsort([one.max_length for one in encoded], kind="stable").tolist()
        start = 0
        while start < len(order):
            end, rows = start, 0
            while end < len(order):
                rows += len(encoded[order[end]].texts)
                if end > start and rows * encoded[order[end]].length > MAX_BATCH_TOKENS:
                    break
                end += 1
            batch: Batch = data.collate([[i] for i in order[start:end]])
            yield order[start:end], to_device(batch, self.model, seed=0)
            start = end
            if progress is not None:
                progress(start, len(order))

    def logits(self, encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None) -> list[np.ndarray]:
        """The head's outputs [n_labels] of each example, or of a choice those of its choices [C]."""
        logits_by_index: dict[int, np.ndarray] = {}
        with evaluation_mode(self.model):
            for indices, inputs in self.iter_batches(encoded, progress):
                assert inputs.labels is not None
                hidden = self.model(inputs.tokens)
                compute_logits = multiple_choice_logits if self.task_spec.kind == "choice" else example_logits
                table = compute_logits(self.model, hidden, inputs.labels).cpu().double().numpy()
                for i, row in zip(indices, table, strict=True):
                    logits_by_index[i] = row[: len(encoded[i].sequences)] if self.task_spec.kind == "choice" else row
        return [logits_by_index[i] for i in range(len(encoded))]

    def log_likelihoods(
        self, encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None
    ) -> np.ndarray:
        """Σ log P of what is learned in each text of each example [E, texts], in nats."""
        logprobs = np.zeros((len(encoded), len(encoded[0].sequences) if encoded else 0))
        with evaluation_mode(self.model):
            for indices, inputs in self.iter_batches(encoded, progress):
                rows: Tensor = sequence_logprobs(self.model, inputs)
                logprobs[indices] = rows.cpu().double().numpy().reshape(len(indices), -1)
        return logprobs

    def causal_lm_loss(self, encoded: Sequence[EncodedExample]) -> float:
        """Nats per learned token of the examples' texts."""
        total, count = 0.0, 0
        with evaluation_mode(self.model):
            for _, inputs in self.iter_batches(encoded):
                total -= float(sequence_logprobs(self.model, inputs).double().sum())
                count += int((inputs.targets != IGNORE_INDEX).sum())
        return total / max(1, count)

    def generate_answers(self, examples: Sequence[Example], progress: ProgressCallback | None = None) -> list[str]:
        """An answer in words to each example: always the likeliest token, the same prompt answered once."""
        prompts = [tuple(self.encoder.encode_prompt(example)) for example in examples]
        distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
        max_tokens = max(1, self.task_spec.answer_tokens)
        answers: dict[tuple[int, ...], str] = {}
        with evaluation_mode(self.model):
            reader = build_runner(self.model)
            for start in range(0, len(distinct), GENERATION_BATCH_SIZE):
                prompt_batch = distinct[start : start + GENERATION_BATCH_SIZE]
                engine = Engine(self.model, self.tokenizer, max_batch=GENERATION_BATCH_SIZE, seed=0, runner=reader)
                completions = engine.generate(prompt_batch, Sampling(temperature=0.0, max_tokens=max_tokens))
                answers.update(
                    {prompt: one.text.strip() for prompt, one in zip(prompt_batch, completions, strict=True)}
                )
                if progress is not None:
                    progress(len(answers), len(distinct))
        return [answers[prompt] for prompt in prompts]

    # ------------------------------------------------------------ answers

    def encode_examples(
        self, examples: Sequence[Example], problems: IssueLog, with_targets: bool
    ) -> tuple[list[Example], list[EncodedExample]]:
        """The examples that can be used, and their tokens."""
        both = [(example, self.encoder.encode(example, problems, with_targets)) for example in examples]
        return [e for e, x in both if x is not None], [x for _, x in both if x is not None]

    def predictions_from_logits(
        self, logits: Sequence[np.ndarray], examples: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """What a head's outputs say, in the words of `nextword predict`."""
        kind, names = self.task_spec.kind, self.task_spec.labels
        predictions: list[dict[str, Any]] = []
        for row, example in zip(logits, examples, strict=True):
            if kind == "score":
                predictions.append({"score": float(row[0])})
            elif kind == "labels":
                p = 1 / (1 + np.exp(-row))
                chosen = [name for name, one in zip(names, p, strict=True) if one > 0.5]
                predictions.append({"labels": chosen, "probabilities": dict(zip(names, p.tolist(), strict=True))})
            else:
                p = np.exp(row - row.max())
                p, best = p / p.sum(), int(row.argmax())
                if kind == "label":
                    predictions.append(
                        {"label": names[best], "probabilities": dict(zip(names, p.tolist(), strict=True))}
                    )
                else:
                    choice = example.fields["choices"][best]
                    predictions.append({"label": best, "text": choice, "probabilities": p.tolist()})
        return predictions

    def predict(
        self, examples: Sequence[Example], problems: IssueLog | None = None, progress: ProgressCallback | None = None
    ) -> list[dict[str, Any]]:
        """An answer to each example, in order; what had to be cut goes to `problems`.

        Raises:
            NextwordError: an example that cannot be read at all, by its file and line.
        """
        problems = IssueLog() if problems is None else problems
        ranks_answers = self.task_spec.kind == "preference" and all("chosen" in example.fields for example in examples)
        if self.task_spec.kind not in HEAD_KINDS and not ranks_answers:
            return [{"text": text} for text in self.generate_answers(examples, progress)]
        encoded = []
        for example in examples:
            one = self.encoder.encode(example, problems, with_target=False)
            if one is None:
                raise NextwordError(str(problems.issues[-1]))
            encoded.append(one)
        if not ranks_answers:
            return self.predictions_from_logits(self.logits(encoded, progress), examples)
        sums = self.log_likelihoods(encoded, progress)
        return [{"label": "chosen" if a > b else "rejected", "score": float(a - b)} for a, b in sums]

    # ------------------------------------------------------------ scores

    def evaluate(
        self, examples: Sequence[Example], encoded: Sequence[EncodedExample], *, generate: bool = True,
        metrics: Sequence[str] = ("chrf", "bleu", "rouge1", "rouge2", "rougeL"), progress: ProgressCallback | None = None,
    ) -> EvaluationResult:  # fmt: skip
        """Score the model on examples with their gold. `write` False leaves out answers in words, which take long."""
        if not examples:
            raise NextwordError("there is no example to be scored on")
        kind = self.task_spec.kind
        if kind in HEAD_KINDS:
            logits = self.logits(encoded, progress)
            predictions = self.predictions_from_logits(logits, examples)
            loss = float(np.mean([head_loss(kind, row, one.target) for row, one in zip(logits, encoded, strict=True)]))
            return EvaluationResult(compute_metrics(self.task_spec, examples, predictions), loss, None, predictions)
        sums = self.log_likelihoods(encoded, progress)
        if kind == "preference":
            margins = sums[:, 0] - sums[:, 1]
            predictions = [
                {"label": "chosen" if margin > 0 else "rejected", "score": float(margin)} for margin in margins
            ]
            loss, bits = self._token_loss_and_bits_per_byte(sums[:, :1], encoded)
            return EvaluationResult(task_metrics.preference(margins.tolist()), loss, bits, predictions)
        loss, bits = self._token_loss_and_bits_per_byte(sums, encoded)
        if not generate:
            return EvaluationResult({}, loss, bits, [])
        predictions = [{"text": text} for text in self.generate_answers(examples, progress)]
        return EvaluationResult(
            compute_metrics(self.task_spec, examples, predictions, metrics), loss, bits, predictions
        )

    def _token_loss_and_bits_per_byte(self, sums: np.ndarray, encoded: Sequence[EncodedExample]) -> tuple[float, float]:
        """Nats per learned token, and bits per byte of what they stand for; of each example's first text."""
        target_ids = [one.sequences[0].ids[one.sequences[0].loss_mask] for one in encoded]
        n_bytes = sum(len(self.tokenizer.decode_bytes(ids.tolist())) for ids in target_ids)
        nats = -float(sums[:, 0].sum())
        return nats / max(1, sum(map(len, target_ids))), nats / np.log(2) / max(1, n_bytes)


def head_loss(kind: str, logits: np.ndarray, target: Any) -> float:
    """The loss of one example, as `training.objectives.labelled` has it."""
    if kind == "score":
        return float((logits[0] - target) ** 2)
    if kind == "labels":
        return float(np.mean(np.logaddexp(0, logits) - target * logits))
    return float(np.logaddexp.reduce(logits) - logits[target])


def compute_metrics(
    task_spec: TaskSpec, examples: Sequence[Example], predictions: Sequence[dict[str, Any]],
    metrics: Sequence[str] = ("chrf", "bleu", "rouge1", "rouge2", "rougeL"),
) -> dict[str, Score]:  # fmt: skip
    """The task's usual scores of answers beside the examples' gold."""
    fields = [example.fields for example in examples]
    if task_spec.kind == "label":
        return task_metrics.classification(
            [f["label"] for f in fields], [a["label"] for a in predictions], task_spec.labels
        )
    if task_spec.kind == "labels":
        return task_metrics.multilabel(
            [f["labels"] for f in fields], [a["labels"] for a in predictions], task_spec.labels
        )
    if task_spec.kind == "score":
        return task_metrics.similarity([f["score"] for f in fields], [a["score"] for a in predictions])
    if task_spec.kind == "choice":
        return task_metrics.multiple_choice([f["answer"] for f in fields], [a["label"] for a in predictions])
    # One source may have several references: it is answered once, and counts once.
    references: dict[tuple[str, ...], list[str]] = {}
    texts: dict[tuple[str, ...], str] = {}
    for example, answer in zip(examples, predictions, strict=True):
        source = input_texts(task_spec.task, example)
        references.setdefault(source, []).append(reference_text(example))
        texts[source] = answer["text"]
    return task_metrics.generation_metrics([references[source] for source in texts], list(texts.values()), metrics)


def compute_labelled_metrics(
    task_spec: TaskSpec, examples: Sequence[Example], predictions: Sequence[dict[str, Any]]
) -> dict[str, Score]:
    """The scores of those answers whose examples have their gold; none where no example has it."""
    if task_spec.kind == "preference":
        return (
            task_metrics.preference([a["score"] for a in predictions]) if all("score" in a for a in predictions) else {}
        )
    labelled = [(e, a) for e, a in zip(examples, predictions, strict=True) if has_target(task_spec, e)]
    return compute_metrics(task_spec, [e for e, _ in labelled], [a for _, a in labelled]) if labelled else {}


def has_target(task_spec: TaskSpec, example: Example) -> bool:
    """Whether an example says what is right, in labels that the model knows."""
    fields = example.fields
    if task_spec.kind == "label":
        return fields.get("label") in task_spec.labels
    if task_spec.kind == "labels":
        return "labels" in fields and set(fields["labels"]) <= set(task_spec.labels)
    if task_spec.task == "chat":
        return fields["messages"][-1]["role"] == "assistant"
    return {"score": "score", "choice": "answer", "answer": "completion"}[task_spec.kind] in fields


def reference_text(example: Example) -> str:
    """The answer in words that an example holds."""
    if "messages" in example.fields:
        return example.fields["messages"][-1]["content"]
    return example.fields["completion"]


# ---------------------------------------------------------------- without a model


def baseline_predictions(
    task_spec: TaskSpec, train: Sequence[Example], test: Sequence[Example]
) -> dict[str, list[dict[str, Any]]]:
    """What simple rules answer that need no model, by the rule's name; learned from the training examples alone."""
    test_inputs, train_inputs = (
        [input_texts(task_spec.task, e) for e in test],
        [input_texts(task_spec.task, e) for e in train],
    )
    if task_spec.kind == "label":
        train_labels = [e.fields["label"] for e in train]
        features = baselines.ngram_features if task_spec.task == "classify" else baselines.pair_features
        naive_bayes = baselines.NaiveBayes(
            [one[0] if len(one) == 1 else one for one in train_inputs], train_labels, features
        )
        return {
            "majority": [{"label": label} for label in baselines.majority(train_labels, len(test))],
            "bag of words": [
                {"label": x} for x in naive_bayes.predict([one[0] if len(one) == 1 else one for one in test_inputs])
            ],
        }
    if task_spec.kind == "labels":
        sets = [e.fields["labels"] for e in train]
        naive_bayes = baselines.naive_bayes_multilabel(
            [one[0] for one in train_inputs], sets, [one[0] for one in test_inputs]
        )
        return {
            "majority": [{"labels": one} for one in baselines.majority([tuple(sorted(s)) for s in sets], len(test))],
            "bag of words": [{"labels": one} for one in naive_bayes],
        }
    if task_spec.kind == "score":
        return {
            "shared words": [
                {"score": x} for x in baselines.tfidf_similarity([(one[0], one[1]) for one in test_inputs])
            ]
        }
    if task_spec.kind == "choice":
        first = baselines.majority([e.fields["answer"] for e in train], len(test))
        shared = baselines.most_similar_choice([one[0] for one in test_inputs], [one[1:] for one in test_inputs])
        return {"majority": [{"label": i} for i in first], "shared words": [{"label": i} for i in shared]}
    if task_spec.task == "rewrite":
        sources = [one[0] for one in test_inputs]
        rules = {"copying": baselines.copy_source(sources), "first sentence": baselines.lead_sentences(sources)}
        if rules["first sentence"] == rules["copying"]:
            del rules["first sentence"]
        rules["nearest"] = baselines.nearest_neighbor_targets(
            [one[0] for one in train_inputs], [reference_text(e) for e in train], sources
        )
        return {name: [{"text": text} for text in texts] for name, texts in rules.items()}
    return {}


def baseline_scores(
    task_spec: TaskSpec, train: Sequence[Example], test: Sequence[Example]
) -> dict[str, dict[str, Score]]:
    """The scores of each rule that needs no model."""
    if task_spec.kind == "preference":
        longer = [len(e.fields["chosen"]) - len(e.fields["rejected"]) for e in test]
        return {"the longer one": task_metrics.preference(longer)}
    return {
        name: compute_metrics(task_spec, test, a) for name, a in baseline_predictions(task_spec, train, test).items()
    }
