"""Predictions of a fine-tuned model, their metrics, and the metrics of baselines that need no model."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError
from nextword.common.statistics import ScoreWithCI
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Completion, Engine, Prompt
from nextword.inference.loglikelihood import ProgressCallback
from nextword.inference.perplexity import evaluation_mode
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT
from nextword.tasks import baselines
from nextword.tasks import metrics as task_metrics
from nextword.tasks.calibration import CalibrationResult, measure_calibration
from nextword.tasks.dataset import (
    HEAD_KINDS,
    PROBABILITY_KINDS,
    TASK_KINDS,
    EncodedExample,
    ExampleEncoder,
    TaskDataset,
    TaskSpec,
)
from nextword.tasks.examples import Example, input_texts
from nextword.tasks.linear import LinearClassifier, combine
from nextword.training.losses import DeviceBatch, example_logits, multiple_choice_logits, sequence_logprobs
from nextword.training.step import to_device

MAX_BATCH_TOKENS = 8192  # tokens of a forward pass
GENERATION_BATCH_SIZE = 32  # answers generated together

Prediction = dict[str, Any]  # a line of `nextword predict`


@dataclass(frozen=True)
class EvaluationResult:
    """The evaluation of a model on labeled examples.

    Attributes:
        scores: The metrics of the task by name.
        loss: Mean loss per example; in nats per target token for generated text.
        bits_per_byte: The same in bits per byte of the targets; None for tasks with a head.
        predictions: The predictions, as `Predictor.predict` returns them.
        logits: The outputs of the head for each example, without a head None.
        num_unfinished: Number of generated answers that were cut off at the maximum length.
    """

    scores: dict[str, ScoreWithCI]
    loss: float
    bits_per_byte: float | None
    predictions: list[Prediction]
    logits: list[np.ndarray] | None = None
    num_unfinished: int = 0


class Predictor:
    """Predicts examples of one task. A prediction does not depend on the other examples, within rounding.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task_spec: The task.
        ensemble: A linear classifier whose probabilities are combined with the model's, and its weight. Default: none.
        windows: Whether a text to classify that is longer than the context is read in windows, whose outputs are averaged.

    Raises:
        UsageError: The task has no windows.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        task_spec: TaskSpec,
        ensemble: tuple[LinearClassifier, float] | None = None,
        windows: bool = False,
    ):
        self.model, self.tokenizer, self.task_spec, self.ensemble = model, tokenizer, task_spec, ensemble
        self.windows = windows
        if windows and task_spec.task != "classify":
            raise UsageError(f"--windows needs a model that classifies texts; this one has the task {task_spec.task}")

    @cached_property
    def encoder(self) -> ExampleEncoder:
        """Encodes examples as the model was trained on."""
        return ExampleEncoder(self.task_spec, self.tokenizer, self.model.config.context_length)

    # ------------------------------------------------------------ forward passes

    def iter_batches(
        self, encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None
    ) -> Iterator[tuple[list[int], DeviceBatch]]:
        """Batches of examples of similar length, each with the indices of its examples."""
        pad_token_id = self.tokenizer.pad_id if self.tokenizer.pad_id is not None else self.tokenizer.eos_id
        data = TaskDataset(encoded, 1, 0, pad_token_id=pad_token_id, kind=self.task_spec.kind)
        order = sorted(range(len(encoded)), key=lambda i: encoded[i].max_length)
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

    def logits(
        self, examples: Sequence[Example], encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None
    ) -> list[np.ndarray]:
        """The outputs of the head, or of the ensemble, for each example [n_labels]; for multiple choice, of its choices [C]."""
        logits = self._map_batches(self._head_outputs, encoded, progress)
        if self.task_spec.kind == "choice":
            return [row[: len(e.sequences)] for row, e in zip(logits, encoded, strict=True)]
        return self._combine(examples, logits)

    def _head_outputs(self, batch: DeviceBatch) -> Tensor:
        assert batch.labels is not None
        compute = multiple_choice_logits if self.task_spec.kind == "choice" else example_logits
        return compute(self.model, self.model(batch.tokens), batch.labels)

    def _combine(self, examples: Sequence[Example], logits: list[np.ndarray]) -> list[np.ndarray]:
        """The outputs of the ensemble for each example; without one, those of the model."""
        if self.ensemble is None or not logits:
            return logits
        classifier, weight = self.ensemble
        texts = [input_texts(self.task_spec.task, example)[0] for example in examples]
        return list(combine(np.array(logits), classifier.probabilities(texts), weight))

    def log_likelihoods(
        self, encoded: Sequence[EncodedExample], progress: ProgressCallback | None = None
    ) -> np.ndarray:
        """The log-likelihood of the target tokens of each sequence of each example [E, sequences], in nats."""
        return np.array(self._map_batches(lambda batch: sequence_logprobs(self.model, batch), encoded, progress))

    def _map_batches(
        self,
        forward: Callable[[DeviceBatch], Tensor],
        encoded: Sequence[EncodedExample],
        progress: ProgressCallback | None,
    ) -> list[np.ndarray]:
        """The results of a function of batches, divided among their examples."""
        results: dict[int, np.ndarray] = {}
        with evaluation_mode(self.model):
            for indices, batch in self.iter_batches(encoded, progress):
                table = forward(batch).cpu().double().numpy().reshape(len(indices), -1)
                results.update(zip(indices, table, strict=True))
        return [results[i] for i in range(len(encoded))]

    def generate_answers(
        self, examples: Sequence[Example], progress: ProgressCallback | None = None, issues: IssueLog | None = None
    ) -> list[Completion]:
        """A greedy answer to each example. Identical prompts are answered once."""
        prompts = [tuple(self.encoder.encode_prompt(example, issues)) for example in examples]
        distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
        sampling = Sampling(temperature=0.0, max_tokens=max(1, self.task_spec.answer_tokens))
        with evaluation_mode(self.model):
            engine = Engine(self.model, self.tokenizer, max_batch=GENERATION_BATCH_SIZE, seed=0)
            completions = generate_in_batches(engine, distinct, sampling, progress)
        answers = dict(zip(distinct, completions, strict=True))
        return [answers[prompt] for prompt in prompts]

    # ------------------------------------------------------------ predictions

    def prediction(self, logits: np.ndarray, example: Example) -> Prediction:
        """The prediction of a classification head, from its outputs for an example."""
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
        if self.windows:
            return list(map(self.prediction, self._window_logits(examples, progress), examples))
        ranks_answers = self.task_spec.kind == "preference" and all("chosen" in example.fields for example in examples)
        if self.task_spec.kind not in HEAD_KINDS and not ranks_answers:
            return list(map(_answer_prediction, self.generate_answers(examples, progress, issues)))
        encoded: list[EncodedExample] = []
        for example in examples:
            encoding = self.encoder.encode(example, issues, with_target=False)
            if encoding is None:
                raise NextwordError(str(issues.issues[-1]))
            encoded.append(encoding)
        if ranks_answers:
            return _preference_predictions(self.log_likelihoods(encoded, progress))
        return list(map(self.prediction, self.logits(examples, encoded, progress), examples))

    def _window_logits(self, examples: Sequence[Example], progress: ProgressCallback | None) -> list[np.ndarray]:
        """The outputs for each example [n_labels]: the mean over its windows, and of the ensemble if there is one."""
        windows = [self.encoder.encode_windows(example) for example in examples]
        outputs = iter(
            self._map_batches(self._head_outputs, [window for group in windows for window in group], progress)
        )
        means = [np.mean([next(outputs) for _ in group], axis=0) for group in windows]
        return self._combine(examples, means)

    # ------------------------------------------------------------ metrics

    def evaluate(
        self,
        examples: Sequence[Example],
        encoded: Sequence[EncodedExample],
        *,
        generate: bool = True,
        metrics: Sequence[str] = task_metrics.GENERATION_METRICS,
    ) -> EvaluationResult:
        """Evaluate the model on examples with targets.

        Args:
            examples: The examples.
            encoded: Their encodings, with targets.
            generate: Whether to generate and score answers, which is slow; if false, only the loss is computed.
            metrics: The metrics of generated answers, and F1 scores of single labels.

        Raises:
            NextwordError: There are no examples.
        """
        if not examples:
            raise NextwordError("there are no examples to evaluate on")
        kind = self.task_spec.kind
        if kind in HEAD_KINDS:
            logits = self.logits(examples, encoded)
            predictions = list(map(self.prediction, logits, examples))
            losses = [head_loss(kind, row, example.target) for row, example in zip(logits, encoded, strict=True)]
            scores = compute_metrics(self.task_spec, examples, predictions, metrics)
            return EvaluationResult(scores, float(np.mean(losses)), None, predictions, logits)
        log_likelihoods = self.log_likelihoods(encoded)
        # Loss and bits per byte of the targets of each example's first sequence.
        target_ids = [example.sequences[0].ids[example.sequences[0].loss_mask].tolist() for example in encoded]
        # The bytes that the tokens stand for; an unknown token stands for none.
        known_ids = [[id for id in ids if id != self.tokenizer.unk_id] for ids in target_ids]
        num_bytes = sum(len(self.tokenizer.decode_bytes(ids)) for ids in known_ids)
        nats = -float(log_likelihoods[:, 0].sum())
        loss, bits_per_byte = nats / max(1, sum(map(len, target_ids))), nats / math.log(2) / max(1, num_bytes)
        predictions: list[Prediction] = []
        num_unfinished = 0
        if kind == "preference":
            predictions = _preference_predictions(log_likelihoods)
        elif generate:
            answers = self.generate_answers(examples)
            predictions = list(map(_answer_prediction, answers))
            num_unfinished = sum(answer.finish_reason == "length" for answer in answers)
        scores = compute_metrics(self.task_spec, examples, predictions, metrics) if predictions else {}
        return EvaluationResult(scores, loss, bits_per_byte, predictions, num_unfinished=num_unfinished)


def generate_in_batches(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, progress: ProgressCallback | None = None
) -> list[Completion]:
    """The completions of any number of prompts. Each batch has a seed of its own, if the sampling has one."""
    completions: list[Completion] = []
    for start in range(0, len(prompts), GENERATION_BATCH_SIZE):
        batch_sampling = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + start)
        completions += engine.generate(prompts[start : start + GENERATION_BATCH_SIZE], batch_sampling)
        if progress is not None:
            progress(len(completions), len(prompts))
    return completions


def _answer_prediction(completion: Completion) -> Prediction:
    return {"text": completion.text.strip()}


def _preference_predictions(log_likelihoods: np.ndarray) -> list[Prediction]:
    """Predictions from the log-likelihoods of the chosen and the rejected answers [E, 2]."""
    margins = (log_likelihoods[:, 0] - log_likelihoods[:, 1]).tolist()
    return [{"label": "chosen" if margin > 0 else "rejected", "score": margin} for margin in margins]


def head_loss(kind: str, logits: np.ndarray, target: Any) -> float:
    """The loss of one example, as in `training.losses.classification_loss`."""
    if kind == "score":
        return float((logits[0] - target) ** 2)
    if kind == "labels":
        return float((np.logaddexp(0, logits) - target * logits).mean())
    return float(np.logaddexp.reduce(logits) - logits[target])


def compute_metrics(
    task_spec: TaskSpec,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    metrics: Sequence[str] = task_metrics.GENERATION_METRICS,
) -> dict[str, ScoreWithCI]:
    """The metrics of predictions for examples with targets; `metrics` selects those of generated text and of labels."""
    kind = task_spec.kind
    predicted = [prediction[TASK_KINDS[kind].prediction_field] for prediction in predictions]
    if kind == "preference":
        return task_metrics.preference(predicted)
    if kind in HEAD_KINDS:
        targets = [example.fields[TASK_KINDS[kind].target_field] for example in examples]
        if kind == "label":
            return task_metrics.classification(targets, predicted, task_spec.labels, metrics)
        if kind == "labels":
            return task_metrics.multilabel(targets, predicted, task_spec.labels)
        return (task_metrics.similarity if kind == "score" else task_metrics.multiple_choice)(targets, predicted)
    names = [name for name in dict.fromkeys(metrics) if name in task_metrics.TEXT_METRICS]
    return task_metrics.generation_metrics(*_answers_by_source(task_spec, examples, predicted), names)


def _answers_by_source(
    task_spec: TaskSpec, examples: Sequence[Example], predicted: Sequence[str]
) -> tuple[list[list[str]], list[str]]:
    """The references and the answer of each source: one with several references is answered once and counts once."""
    references: dict[tuple[str, ...], list[str]] = {}
    texts: dict[tuple[str, ...], str] = {}
    for example, text in zip(examples, predicted, strict=True):
        source = input_texts(task_spec.task, example)
        is_chat = "messages" in example.fields
        reference = example.fields["messages"][-1]["content"] if is_chat else example.fields["completion"]
        references.setdefault(source, []).append(reference)
        texts[source] = text
    return [references[source] for source in texts], list(texts.values())


def metric_difference(
    task_spec: TaskSpec, examples: Sequence[Example], a: Sequence[Prediction], b: Sequence[Prediction], metric: str
) -> ScoreWithCI | None:
    """By how much predictions a score above predictions b; None for a metric without a paired interval."""
    kind = task_spec.kind
    first, second = ([prediction[TASK_KINDS[kind].prediction_field] for prediction in system] for system in (a, b))
    if kind == "answer" and metric in task_metrics.GENERATION_METRICS:
        references, texts = _answers_by_source(task_spec, examples, first)
        return task_metrics.generation_metric_difference(
            references, texts, _answers_by_source(task_spec, examples, second)[1], metric
        )
    if kind not in ("label", "labels", "choice"):
        return None
    targets = [example.fields[TASK_KINDS[kind].target_field] for example in examples]
    if kind == "labels":
        return task_metrics.label_metric_difference(targets, first, second, task_spec.labels, metric)
    labels = task_spec.labels if kind == "label" else sorted({*targets, *first, *second})
    sets = [[[label] for label in values] for values in (targets, first, second)]
    return task_metrics.label_metric_difference(sets[0], sets[1], sets[2], labels, metric)


def compute_calibration(
    task_spec: TaskSpec, examples: Sequence[Example], predictions: Sequence[Prediction]
) -> CalibrationResult | None:
    """The calibration of predictions for examples with targets; None if they are no probabilities.

    For several labels per example, each decision on a label counts.
    """
    if task_spec.kind not in PROBABILITY_KINDS or not examples:
        return None
    confidences: list[float] = []
    is_right: list[bool] = []
    for example, prediction in zip(examples, predictions, strict=True):
        target = example.fields[TASK_KINDS[task_spec.kind].target_field]
        if task_spec.kind == "labels":
            confidences += [max(p, 1 - p) for p in prediction["probabilities"].values()]
            is_right += [(p > 0.5) == (name in target) for name, p in prediction["probabilities"].items()]
        else:
            probabilities = prediction["probabilities"]
            confidences.append(max(probabilities.values() if task_spec.kind == "label" else probabilities))
            is_right.append(prediction["label"] == target)
    return measure_calibration(confidences, is_right)


def compute_labeled_metrics(
    task_spec: TaskSpec, examples: Sequence[Example], predictions: Sequence[Prediction]
) -> dict[str, ScoreWithCI]:
    """The metrics of the predictions whose examples have targets; empty if there are none.

    A label that the model does not know is a target like others, which no prediction meets.
    """
    unknown = unknown_labels(task_spec, examples)
    task_spec = replace(task_spec, labels=(*task_spec.labels, *unknown))
    labeled = [
        (example, prediction)
        for example, prediction in zip(examples, predictions, strict=True)
        if ("score" in prediction if task_spec.kind == "preference" else has_target(task_spec, example))
    ]
    if not labeled:
        return {}
    return compute_metrics(task_spec, [example for example, _ in labeled], [prediction for _, prediction in labeled])


def unknown_labels(task_spec: TaskSpec, examples: Sequence[Example]) -> Counter[str]:
    """The number of examples with each label that the model does not know."""
    targets = (example.fields.get(TASK_KINDS[task_spec.kind].target_field) for example in examples)
    names = (name for target in targets for name in ((target,) if task_spec.kind == "label" else target or ()))
    is_label = task_spec.kind in ("label", "labels")
    return Counter(name for name in names if name and name not in task_spec.labels) if is_label else Counter()


def has_target(task_spec: TaskSpec, example: Example) -> bool:
    """Whether an example has a target, with labels that the model knows."""
    if task_spec.task == "chat":
        return example.fields["messages"][-1]["role"] == "assistant"
    target = example.fields.get(TASK_KINDS[task_spec.kind].target_field)
    if task_spec.kind == "labels":
        return target is not None and set(target) <= set(task_spec.labels)
    return target in task_spec.labels if task_spec.kind == "label" else target is not None


# ---------------------------------------------------------------- baselines


def baseline_predictions(
    task_spec: TaskSpec, train: Sequence[Example], test: Sequence[Example]
) -> dict[str, list[Prediction]]:
    """The predictions of each baseline by name, learned from the training examples alone."""
    task, kind = task_spec.task, task_spec.kind
    train_inputs, test_inputs = ([input_texts(task, example) for example in examples] for examples in (train, test))
    first_train, first_test = [texts[0] for texts in train_inputs], [texts[0] for texts in test_inputs]
    targets: list[Any] = [example.fields.get(TASK_KINDS[kind].target_field) for example in train]
    predicted: dict[str, Sequence[Any]] = {}
    if kind == "label":
        features = baselines.ngram_features if task == "classify" else baselines.pair_features
        predicted = {
            "majority": baselines.majority(targets, len(test)),
            "bag of words": baselines.naive_bayes(train_inputs, targets, test_inputs, features),
        }
    elif kind == "labels":
        predicted = {
            "majority": baselines.majority([tuple(sorted(labels)) for labels in targets], len(test)),
            "bag of words": baselines.naive_bayes_multilabel(first_train, targets, first_test),
        }
    elif kind == "score":
        train_pairs, test_pairs = ([(texts[0], texts[1]) for texts in inputs] for inputs in (train_inputs, test_inputs))
        predicted = {"shared words": baselines.tfidf_similarity(train_pairs, test_pairs)}
    elif kind == "choice":
        predicted = {
            "majority": baselines.majority(targets, len(test)),
            "shared words": baselines.most_similar_choice(
                [text for texts in train_inputs for text in texts], first_test, [texts[1:] for texts in test_inputs]
            ),
        }
    elif kind == "preference":
        lengths = [len(example.fields["chosen"]) - len(example.fields["rejected"]) for example in test]
        predicted = {"the longer one": lengths}
    elif task == "rewrite":
        predicted = {"copying": first_test, "first sentence": list(map(baselines.lead_sentence, first_test))}
        if predicted["first sentence"] == first_test:
            del predicted["first sentence"]
        predicted["nearest"] = baselines.nearest_neighbor_targets(first_train, targets, first_test)
    return {
        name: [{TASK_KINDS[kind].prediction_field: value} for value in values] for name, values in predicted.items()
    }
