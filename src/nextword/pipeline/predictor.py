"""Predictions of a fine-tuned model, their metrics, and the metrics of baselines that need no model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nextword.common.errors import NextwordError
from nextword.common.statistics import ScoreWithCI
from nextword.data.dataset import IGNORE_INDEX
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine
from nextword.inference.model_runner import build_runner
from nextword.inference.perplexity import evaluation_mode
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT
from nextword.tasks import baselines
from nextword.tasks import metrics as task_metrics
from nextword.tasks.dataset import TaskDataset
from nextword.tasks.examples import Example, input_texts
from nextword.tasks.templates import HEAD_KINDS, EncodedExample, ExampleEncoder, TaskKind, TaskSpec
from nextword.training.losses import DeviceBatch, example_logits, multiple_choice_logits, sequence_logprobs
from nextword.training.step import to_device

MAX_BATCH_TOKENS = 8192  # tokens of a forward pass
GENERATION_BATCH_SIZE = 32  # answers generated together
# The metric of each task that selects the best checkpoint, unless labels are imbalanced.
SELECTION_METRIC: dict[TaskKind, str] = {
    "label": "accuracy",
    "labels": "micro_f1",
    "score": "pearson",
    "choice": "accuracy",
    "answer": "chrf",
    "preference": "preferred",
}

ProgressCallback = Callable[[int, int], None]
Prediction = dict[str, Any]  # a line of `nextword predict`


@dataclass(frozen=True)
class EvaluationResult:
    """The evaluation of a model on labelled examples.

    Attributes:
        scores: The metrics of the task by name.
        loss: Mean loss per example; in nats per target token for generated text.
        bits_per_byte: The same in bits per byte of the targets; None for tasks with a head.
        predictions: The predictions, as `Predictor.predict` returns them.
    """

    scores: dict[str, ScoreWithCI]
    loss: float
    bits_per_byte: float | None
    predictions: list[Prediction]


class Predictor:
    """Predicts examples of one task. A prediction does not depend on the other examples, within rounding."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, task_spec: TaskSpec):
        self.model, self.tokenizer, self.task_spec = model, tokenizer, task_spec

    @cached_property
    def encoder(self) -> ExampleEncoder:
        return ExampleEncoder(self.task_spec, self.tokenizer, self.model.config.context_length)

    # ------------------------------------------------------------ forward passes

    def iter_batches(
        self, encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None
    ) -> Iterator[tuple[list[int], DeviceBatch]]:
        """Batches of examples of similar length, each with the indices of its examples."""
        pad_token_id = self.tokenizer.pad_id if self.tokenizer.pad_id is not None else self.tokenizer.eos_id
        data = TaskDataset(encoded, 1, 0, pad_token_id=pad_token_id, kind=self.task_spec.kind)
        order = np.argsort([example.max_length for example in encoded], kind="stable").tolist()
        start = 0
        while start < len(order):
            end, num_rows = start, 0
            while end < len(order):
                num_rows += len(encoded[order[end]].sequences)
                if end > start and num_rows * encoded[order[end]].max_length > MAX_BATCH_TOKENS:
                    break
                end += 1
            indices = order[start:end]
            yield indices, to_device(data.collate([[i] for i in indices]), self.model, seed=0)
            start = end
            if progress is not None:
                progress(start, len(order))

    def logits(self, encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None) -> list[np.ndarray]:
        """The outputs of the head for each example [n_labels]; for multiple choice, of its choices [C]."""
        is_choice = self.task_spec.kind == "choice"
        compute_logits = multiple_choice_logits if is_choice else example_logits
        logits: dict[int, np.ndarray] = {}
        with evaluation_mode(self.model):
            for indices, batch in self.iter_batches(encoded, progress):
                assert batch.labels is not None
                table = compute_logits(self.model, self.model(batch.tokens), batch.labels).cpu().double().numpy()
                for i, row in zip(indices, table, strict=True):
                    logits[i] = row[: len(encoded[i].sequences)] if is_choice else row
        return [logits[i] for i in range(len(encoded))]

    def log_likelihoods(
        self, encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None
    ) -> np.ndarray:
        """The log-likelihood of the target tokens of each sequence of each example [E, sequences], in nats."""
        log_likelihoods = np.zeros((len(encoded), len(encoded[0].sequences) if encoded else 0))
        with evaluation_mode(self.model):
            for indices, batch in self.iter_batches(encoded, progress):
                rows = sequence_logprobs(self.model, batch).cpu().double().numpy()
                log_likelihoods[indices] = rows.reshape(len(indices), -1)
        return log_likelihoods

    def causal_lm_loss(self, encoded: Sequence[EncodedExample]) -> float:
        """Nats per target token of the sequences of the examples."""
        total, num_targets = 0.0, 0
        with evaluation_mode(self.model):
            for _, batch in self.iter_batches(encoded):
                total -= float(sequence_logprobs(self.model, batch).double().sum())
                num_targets += int((batch.targets != IGNORE_INDEX).sum())
        return total / max(1, num_targets)

    def generate_answers(self, examples: Sequence[Example], progress: ProgressCallback | None = None) -> list[str]:
        """A greedy answer to each example. Identical prompts are answered once."""
        prompts = [tuple(self.encoder.encode_prompt(example)) for example in examples]
        distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
        sampling = Sampling(temperature=0.0, max_tokens=max(1, self.task_spec.answer_tokens))
        answers: dict[tuple[int, ...], str] = {}
        with evaluation_mode(self.model):
            runner = build_runner(self.model)
            for start in range(0, len(distinct), GENERATION_BATCH_SIZE):
                batch = distinct[start : start + GENERATION_BATCH_SIZE]
                engine = Engine(self.model, self.tokenizer, max_batch=GENERATION_BATCH_SIZE, seed=0, runner=runner)
                completions = engine.generate(batch, sampling)
                answers.update((prompt, c.text.strip()) for prompt, c in zip(batch, completions, strict=True))
                if progress is not None:
                    progress(len(answers), len(distinct))
        return [answers[prompt] for prompt in prompts]

    # ------------------------------------------------------------ predictions

    def encode_examples(
        self, examples: Sequence[Example], issues: IssueLog, with_targets: bool
    ) -> tuple[list[Example], list[EncodedExample]]:
        """The examples that can be encoded, and their encodings."""
        pairs = [(example, self.encoder.encode(example, issues, with_targets)) for example in examples]
        encodable = [(example, encoded) for example, encoded in pairs if encoded is not None]
        return [example for example, _ in encodable], [encoded for _, encoded in encodable]

    def predictions_from_logits(self, logits: Sequence[np.ndarray], examples: Sequence[Example]) -> list[Prediction]:
        """The predictions of a classification head."""
        return [self._prediction(row, example) for row, example in zip(logits, examples, strict=True)]

    def _prediction(self, logits: np.ndarray, example: Example) -> Prediction:
        kind, names = self.task_spec.kind, self.task_spec.labels
        if kind == "score":
            return {"score": float(logits[0])}
        if kind == "labels":
            probabilities = dict(zip(names, (1 / (1 + np.exp(-logits))).tolist(), strict=True))
            return {"labels": [name for name, p in probabilities.items() if p > 0.5], "probabilities": probabilities}
        exponentials, best = np.exp(logits - logits.max()), int(logits.argmax())
        softmax = (exponentials / exponentials.sum()).tolist()
        if kind == "label":
            return {"label": names[best], "probabilities": dict(zip(names, softmax, strict=True))}
        return {"label": best, "text": example.fields["choices"][best], "probabilities": softmax}

    def predict(
        self, examples: Sequence[Example], issues: IssueLog | None = None, progress: ProgressCallback | None = None
    ) -> list[Prediction]:
        """Predict each example, in order.

        Args:
            examples: The examples; targets are not needed, but preferences are ranked if all have both answers.
            issues: Log for truncated examples.
            progress: Called with the number of finished examples and of all examples.

        Returns:
            For each example `label`, `labels`, `score` or `text`, and `probabilities` if the task has a head.

        Raises:
            NextwordError: An example cannot be encoded; the message names file and line.
        """
        issues = IssueLog() if issues is None else issues
        ranks_answers = self.task_spec.kind == "preference" and all("chosen" in example.fields for example in examples)
        if self.task_spec.kind not in HEAD_KINDS and not ranks_answers:
            return [{"text": text} for text in self.generate_answers(examples, progress)]
        encoded: list[EncodedExample] = []
        for example in examples:
            encoding = self.encoder.encode(example, issues, with_target=False)
            if encoding is None:
                raise NextwordError(str(issues.issues[-1]))
            encoded.append(encoding)
        if ranks_answers:
            return _preference_predictions(self.log_likelihoods(encoded, progress))
        return self.predictions_from_logits(self.logits(encoded, progress), examples)

    # ------------------------------------------------------------ metrics

    def evaluate(
        self,
        examples: Sequence[Example],
        encoded: Sequence[EncodedExample],
        *,
        generate: bool = True,
        metrics: Sequence[str] = task_metrics.GENERATION_METRICS,
        progress: ProgressCallback | None = None,
    ) -> EvaluationResult:
        """Evaluate the model on examples with targets.

        Args:
            examples: The examples.
            encoded: Their encodings, with targets.
            generate: Whether to generate and score answers, which is slow; if false, only the loss is computed.
            metrics: The metrics of generated answers.
            progress: Called with the number of finished examples and of all examples.

        Raises:
            NextwordError: There are no examples.
        """
        if not examples:
            raise NextwordError("there are no examples to evaluate on")
        kind = self.task_spec.kind
        if kind in HEAD_KINDS:
            logits = self.logits(encoded, progress)
            predictions = self.predictions_from_logits(logits, examples)
            losses = [head_loss(kind, row, example.target) for row, example in zip(logits, encoded, strict=True)]
            scores = compute_metrics(self.task_spec, examples, predictions)
            return EvaluationResult(scores, float(np.mean(losses)), None, predictions)
        log_likelihoods = self.log_likelihoods(encoded, progress)
        loss, bits_per_byte = self._token_loss_and_bits_per_byte(log_likelihoods[:, 0], encoded)
        if kind == "preference":
            predictions = _preference_predictions(log_likelihoods)
            scores = task_metrics.preference([prediction["score"] for prediction in predictions])
        elif generate:
            predictions = [{"text": text} for text in self.generate_answers(examples, progress)]
            scores = compute_metrics(self.task_spec, examples, predictions, metrics)
        else:
            predictions, scores = [], {}
        return EvaluationResult(scores, loss, bits_per_byte, predictions)

    def _token_loss_and_bits_per_byte(
        self, log_likelihoods: np.ndarray, encoded: Sequence[EncodedExample]
    ) -> tuple[float, float]:
        """Nats per target token and bits per byte of the targets of each example's first sequence."""
        target_ids = [example.sequences[0].ids[example.sequences[0].loss_mask] for example in encoded]
        num_bytes = sum(len(self.tokenizer.decode_bytes(ids.tolist())) for ids in target_ids)
        nats = -float(log_likelihoods.sum())
        return nats / max(1, sum(map(len, target_ids))), nats / np.log(2) / max(1, num_bytes)


def _preference_predictions(log_likelihoods: np.ndarray) -> list[Prediction]:
    """Predictions from the log-likelihoods of the chosen and the rejected answers [E, 2]."""
    margins = (log_likelihoods[:, 0] - log_likelihoods[:, 1]).tolist()
    return [{"label": "chosen" if margin > 0 else "rejected", "score": margin} for margin in margins]


def head_loss(kind: str, logits: np.ndarray, target: Any) -> float:
    """The loss of one example, as in `training.losses.classification_loss`."""
    if kind == "score":
        return float((logits[0] - target) ** 2)
    if kind == "labels":
        return float(np.mean(np.logaddexp(0, logits) - target * logits))
    return float(np.logaddexp.reduce(logits) - logits[target])


def compute_metrics(
    task_spec: TaskSpec,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    metrics: Sequence[str] = task_metrics.GENERATION_METRICS,
) -> dict[str, ScoreWithCI]:
    """The metrics of predictions for examples with targets; `metrics` selects those of generated text."""

    def targets(name: str) -> list[Any]:
        return [example.fields[name] for example in examples]

    def predicted(name: str) -> list[Any]:
        return [prediction[name] for prediction in predictions]

    if task_spec.kind == "label":
        return task_metrics.classification(targets("label"), predicted("label"), task_spec.labels)
    if task_spec.kind == "labels":
        return task_metrics.multilabel(targets("labels"), predicted("labels"), task_spec.labels)
    if task_spec.kind == "score":
        return task_metrics.similarity(targets("score"), predicted("score"))
    if task_spec.kind == "choice":
        return task_metrics.multiple_choice(targets("answer"), predicted("label"))
    # A source with several references is answered once and counts once.
    references: dict[tuple[str, ...], list[str]] = {}
    texts: dict[tuple[str, ...], str] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        source = input_texts(task_spec.task, example)
        references.setdefault(source, []).append(reference_text(example))
        texts[source] = prediction["text"]
    return task_metrics.generation_metrics([references[source] for source in texts], list(texts.values()), metrics)


def compute_labelled_metrics(
    task_spec: TaskSpec, examples: Sequence[Example], predictions: Sequence[Prediction]
) -> dict[str, ScoreWithCI]:
    """The metrics of the predictions whose examples have targets; empty if there are none."""
    if task_spec.kind == "preference":
        if not all("score" in prediction for prediction in predictions):
            return {}
        return task_metrics.preference([prediction["score"] for prediction in predictions])
    pairs = zip(examples, predictions, strict=True)
    labelled = [(example, prediction) for example, prediction in pairs if has_target(task_spec, example)]
    if not labelled:
        return {}
    return compute_metrics(task_spec, [example for example, _ in labelled], [prediction for _, prediction in labelled])


def has_target(task_spec: TaskSpec, example: Example) -> bool:
    """Whether an example has a target, with labels that the model knows."""
    fields = example.fields
    if task_spec.kind == "label":
        return fields.get("label") in task_spec.labels
    if task_spec.kind == "labels":
        return "labels" in fields and set(fields["labels"]) <= set(task_spec.labels)
    if task_spec.task == "chat":
        return fields["messages"][-1]["role"] == "assistant"
    return {"score": "score", "choice": "answer", "answer": "completion"}[task_spec.kind] in fields


def reference_text(example: Example) -> str:
    """The target text of an example."""
    if "messages" in example.fields:
        return example.fields["messages"][-1]["content"]
    return example.fields["completion"]


# ---------------------------------------------------------------- baselines


def baseline_predictions(
    task_spec: TaskSpec, train: Sequence[Example], test: Sequence[Example]
) -> dict[str, list[Prediction]]:
    """The predictions of each baseline by name, learned from the training examples alone."""
    train_inputs, test_inputs = (
        [input_texts(task_spec.task, example) for example in examples] for examples in (train, test)
    )
    first_train, first_test = [texts[0] for texts in train_inputs], [texts[0] for texts in test_inputs]
    if task_spec.kind == "label":
        labels = [example.fields["label"] for example in train]
        features = baselines.ngram_features if task_spec.task == "classify" else baselines.pair_features
        naive_bayes = baselines.NaiveBayes(train_inputs, labels, features)
        return _named_predictions(
            "label",
            {"majority": baselines.majority(labels, len(test)), "bag of words": naive_bayes.predict(test_inputs)},
        )
    if task_spec.kind == "labels":
        label_sets = [example.fields["labels"] for example in train]
        most_frequent = baselines.majority([tuple(sorted(labels)) for labels in label_sets], len(test))
        naive_bayes = baselines.naive_bayes_multilabel(first_train, label_sets, first_test)
        return _named_predictions("labels", {"majority": most_frequent, "bag of words": naive_bayes})
    if task_spec.kind == "score":
        similarities = baselines.tfidf_similarity([(texts[0], texts[1]) for texts in test_inputs])
        return _named_predictions("score", {"shared words": similarities})
    if task_spec.kind == "choice":
        most_frequent = baselines.majority([example.fields["answer"] for example in train], len(test))
        most_similar = baselines.most_similar_choice(first_test, [texts[1:] for texts in test_inputs])
        return _named_predictions("label", {"majority": most_frequent, "shared words": most_similar})
    if task_spec.task == "rewrite":
        targets = [reference_text(example) for example in train]
        rules = {"copying": first_test, "first sentence": baselines.lead_sentences(first_test)}
        if rules["first sentence"] == rules["copying"]:
            del rules["first sentence"]
        rules["nearest"] = baselines.nearest_neighbor_targets(first_train, targets, first_test)
        return _named_predictions("text", rules)
    return {}


def _named_predictions(field: str, values_by_baseline: dict[str, Any]) -> dict[str, list[Prediction]]:
    return {name: [{field: value} for value in values] for name, values in values_by_baseline.items()}


def baseline_scores(
    task_spec: TaskSpec, train: Sequence[Example], test: Sequence[Example]
) -> dict[str, dict[str, ScoreWithCI]]:
    """The metrics of each baseline by name."""
    if task_spec.kind == "preference":
        length_margins = [len(e.fields["chosen"]) - len(e.fields["rejected"]) for e in test]
        return {"the longer one": task_metrics.preference(length_margins)}
    predictions = baseline_predictions(task_spec, train, test)
    return {name: compute_metrics(task_spec, test, values) for name, values in predictions.items()}
