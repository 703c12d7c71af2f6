"""The files of a run directory, as reports and model cards read them, and the scores in them.

Any of them may be incomplete, from an older version, or edited by hand: values of an unexpected type are treated as missing.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from nextword.common.errors import NextwordError
from nextword.common.fs import read_jsonl, read_sealed_json
from nextword.common.results import is_number, short_path_name
from nextword.common.run_dir import RunDir
from nextword.common.statistics import ScoreWithCI
from nextword.reporting.formatting import describe_intervals
from nextword.tasks.metrics import LABEL_F1, LOWER_IS_BETTER_METRICS

LM_LOSS_TASKS = (None, "continue", "chat", "rewrite")
LOSS_UNITS = {
    "label": "nats per example",
    "labels": "binary cross-entropy, nats per label",
    "score": "squared error",
    "choice": "nats per example",
    "preference": "nats per token of the chosen answer",
}
IMBALANCE_RATIO = 2.0  # of the most to the least frequent label, from which on labels count as imbalanced
THIS_MODEL, BASE_MODEL, ENSEMBLE = "this model", "base model", "ensemble with TF-IDF"

Point = tuple[float, float]


class MetricInfo(NamedTuple):
    """Display name of a metric, and what it measures."""

    name: str
    description: str


METRICS = {
    "accuracy": MetricInfo("accuracy", "the fraction of examples predicted correctly"),
    "macro_f1": MetricInfo("macro-F1", "the unweighted mean of the F1 scores of the labels"),
    "micro_f1": MetricInfo("micro-F1", "the F1 score over all labels of all examples"),
    "exact_match": MetricInfo("exact match", "the fraction of examples with exactly the right labels"),
    "matthews": MetricInfo(
        "Matthews correlation", "the correlation of predictions and labels (0 is chance, 1 is perfect)"
    ),
    "pearson": MetricInfo("Pearson correlation", "the linear correlation of predictions and targets (1 is perfect)"),
    "spearman": MetricInfo("Spearman correlation", "the rank correlation of predictions and targets (1 is perfect)"),
    "chrf": MetricInfo("chrF", "the character n-gram F-score against the reference, 0 to 100"),
    "bleu": MetricInfo(
        "BLEU",
        "the n-gram precision against the reference with a brevity penalty (characters in scripts without spaces), 0 to 100",
    ),
    "rouge1": MetricInfo("ROUGE-1", "the unigram overlap with the reference, 0 to 100"),
    "rouge2": MetricInfo("ROUGE-2", "the bigram overlap with the reference, 0 to 100"),
    "rougeL": MetricInfo("ROUGE-L", "the longest common subsequence with the reference, 0 to 100"),
    "final_number": MetricInfo("final number", "the fraction of answers whose last number is right"),
    "preferred": MetricInfo("preference accuracy", "the fraction of pairs whose chosen answer is the more likely one"),
    "bits_per_byte": MetricInfo("bits per byte", "the mean code length per byte of the validation set"),
    "loss": MetricInfo("loss", "the mean loss on the validation set"),
}


def metric_info(metric: str) -> MetricInfo | None:
    """Display name and meaning of a metric; None for an unknown one."""
    if metric.startswith(LABEL_F1):
        label = metric.removeprefix(LABEL_F1)
        return MetricInfo(f"F1 of {label}", f"the F1 score of the label {label}")
    return METRICS.get(metric)


@dataclass(frozen=True)
class RunData:
    """The contents of a run directory.

    Attributes:
        name: Name of the directory.
        metadata: Contents of run.json.
        records: Lines of metrics.jsonl.
        result: Contents of result.json. Empty while the run is not finished.
    """

    name: str
    metadata: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any]

    @classmethod
    def load(cls, run_dir: Path) -> "RunData":
        """Read a run directory.

        Raises:
            NextwordError: `run_dir` is not a run directory.
            CorruptFileError: One of its files is not valid JSON or has the wrong shape.
        """
        run = RunDir(run_dir)
        if not run.exists:
            raise NextwordError(
                f"{run_dir}: not a run directory (run.json is missing). Pass the --out directory of a training command"
            )
        result = read_sealed_json(run.result_path) if run.is_complete else {}
        return cls(run_dir.resolve().name, read_sealed_json(run_dir / "run.json"), read_jsonl(run.metrics_path), result)

    # ---------------------------------------------------------------- metrics.jsonl and result.json

    def series(self, *keys: str) -> list[Point]:
        """(step, value) of every record with a finite number at `keys`, for example `series("validation", "loss")`."""
        return [(step, float(value)) for step, value in self._values(*keys) if is_number(value)]

    def _values(self, *keys: str) -> list[tuple[float, Any]]:
        """(step, value) of every record with a step."""
        values = ((record.get("step"), get_nested(record, *keys)) for record in self.records)
        return [(float(step), value) for step, value in values if is_number(step)]

    def last_value(self, key: str) -> float | None:
        """The last finite number under `key`."""
        return next((y for _, y in reversed(self.series(key))), None)

    @property
    def planned_tokens_per_second(self) -> float | None:
        """The training speed that the plan was made with."""
        seconds = self.get("plan", "seconds_per_token")
        return 1 / seconds if is_number(seconds) and seconds > 0 else None

    @property
    def median_tokens_per_second(self) -> float | None:
        """The median speed of the training steps."""
        speeds = [speed for _, speed in self.series("tokens_per_second")]
        return statistics.median(speeds) if speeds else None

    @property
    def resumed_steps(self) -> list[float]:
        """The steps that a resume continued from."""
        return [step for step, value in self._values("resumed") if value is True]

    @property
    def best_validation(self) -> Point | None:
        """Step and value of the lowest validation loss."""
        return min(self.series("validation", "loss"), key=lambda point: point[1], default=None)

    def final_value(self, metric: str) -> float | None:
        """The final loss or bits per byte on the validation set, or the lowest value so far."""
        value = self.result.get(metric)
        return value if is_number(value) else min((y for _, y in self.series("validation", metric)), default=None)

    def final_bits_per_byte(self, split: str = "") -> tuple[ScoreWithCI, str] | None:
        """The final bits per byte with their interval, and what that speaks of ("" in runs of earlier versions).

        Args:
            split: "" for the validation set, "test_" for the test set.
        """
        interval = as_mapping(self.result.get(f"{split}interval"))
        score = parse_score({**interval, "value": self.result.get(f"{split}bits_per_byte")})
        return score and (score, str(interval.get("basis") or ""))

    @property
    def seconds(self) -> float | None:
        """Wall time of the run so far."""
        value = self.result.get("seconds")
        return value if is_number(value) else self.last_value("seconds")

    @property
    def calibration(self) -> Mapping[str, Any] | None:
        """The calibration of a classifier in result.json, if it is complete."""
        values = as_mapping(self.result.get("calibration"))
        bins = [as_list(entry) for entry in as_list(values.get("bins"))]
        names = ("error", "confidence", "accuracy", "temperature")
        numbers = [values.get(name) for name in names] + [x for entry in bins for x in entry]
        is_complete = bins and all(len(entry) == 3 for entry in bins) and all(map(is_number, numbers))
        return values if is_complete else None

    @property
    def unfinished(self) -> Mapping[str, Any] | None:
        """How many generated answers did not end, from result.json; None if all did or it is unknown."""
        values = as_mapping(self.result.get("unfinished"))
        is_complete = all(is_number(values.get(name)) for name in ("count", "n", "max_tokens"))
        return values if is_complete and values["count"] > 0 else None

    @property
    def forgetting(self) -> tuple[float, float] | None:
        """Bits per byte on the pre-training corpus before and after a fine-tuning."""
        before, after = (get_nested(self.result, "forgetting", key) for key in ("before", "after"))
        known = is_number(before) and is_number(after) and before > 0 and not self.get("recipe", "scratch")
        return (before, after) if known else None

    @property
    def samples_by_step(self) -> dict[Any, list[tuple[str, str]]]:
        """The samples generated during training as (prompt, text), grouped by step."""
        by_step: dict[Any, list[tuple[str, str]]] = {}
        for record in self.records:
            step, sample = record.get("step"), record.get("sample")
            if isinstance(sample, dict):
                prompt, text = (str(as_mapping(sample).get(key) or "") for key in ("prompt", "text"))
                by_step.setdefault(step if is_number(step) else str(step), []).append((prompt, text))
        return by_step

    # ---------------------------------------------------------------- run.json

    def get(self, *keys: str) -> Any:
        """A value of run.json by its path, or None."""
        return get_nested(self.metadata, *keys)

    @property
    def task(self) -> str | None:
        """Fine-tuning task, "continue" for continued pre-training, None for pre-training."""
        task = self.get("task", "task")
        return task if isinstance(task, str) else None

    @property
    def has_lm_loss(self) -> bool:
        """Whether the training and the validation loss are both the language modeling loss."""
        return self.task in LM_LOSS_TASKS

    @property
    def task_kind(self) -> str:
        """What the model predicts: "label", "labels", "score", "choice", "answer" or "preference"."""
        return str(self.get("task", "kind"))

    @property
    def loss_unit(self) -> str:
        """What the validation loss is."""
        return LOSS_UNITS.get(self.task_kind, "nats per token")

    @property
    def labels(self) -> list[str]:
        """The labels of a classification task."""
        return [str(label) for label in as_list(self.get("task", "labels"))]

    @property
    def label_counts(self) -> list[tuple[str, int]]:
        """(label, number of training examples), the most frequent label first."""
        counts = as_mapping(self.get("data", "labels")).items()
        pairs = [(str(label), int(n)) for label, n in counts if is_number(n) and n >= 0]
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))

    @property
    def is_imbalanced(self) -> bool:
        """Whether the label distribution deserves a section of its own."""
        counts = self.label_counts
        return len(counts) > 1 and counts[0][1] >= IMBALANCE_RATIO * counts[-1][1]

    @property
    def base_model(self) -> str | None:
        """Name of the model that the run started from, without its directory."""
        path = self.get("base", "model")
        return short_path_name(path) if isinstance(path, str) and path else None

    @property
    def task_metadata(self) -> dict[str, Any]:
        """What a fine-tuning trained on what, by display name; unknown values are left out."""
        rank, counts = self.get("tuning", "rank"), self.label_counts
        weights = f"LoRA, rank {int(rank)}" if is_number(rank) else "LoRA"
        weights = weights if self.get("recipe", "lora") else "all weights"
        columns = as_mapping(self.get("task", "columns")).items()
        values: dict[str, Any] = {
            "task": self.task,
            "base model": self.base_model,
            "columns": ", ".join(role if role == name else f"{role} ({name})" for role, name in columns) or None,
            "labels": len(self.labels) or None,
            "trained": f"{weights}, from random initialization" if self.get("recipe", "scratch") else weights,
        }
        if counts and not self.is_imbalanced:
            values["examples per label"] = f"{counts[-1][1]:,} to {counts[0][1]:,}"
        return {name: value for name, value in values.items() if self.task and value is not None}


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class TaskResults:
    """The scores of a run, of its base model and of the baselines.

    Attributes:
        metric: The selection metric of the run, or another one if that is unknown.
        by_system: System (this model, base model, each baseline) → scores by metric.
        is_final: Whether the scores come from the final evaluation; otherwise they are the best values so far.
        baseline_difference: By how much the score is above that of the best baseline, with a paired confidence interval.
    """

    metric: str
    by_system: dict[str, dict[str, ScoreWithCI]]
    is_final: bool
    baseline_difference: ScoreWithCI | None = None

    @classmethod
    def from_run(cls, run: RunData) -> "TaskResults":
        """The scores in result.json; of an unfinished run the best ones in metrics.jsonl."""
        scores = parse_metrics(run.result) | parse_metrics(run.result.get("scores"))
        if bits_per_byte := run.final_bits_per_byte():
            scores["bits_per_byte"] = bits_per_byte[0]
        if not run.result:
            history = {
                name: [y for _, y in run.series("validation", name)] for name in (*METRICS, str(run.get("metric")))
            }
            scores = {
                name: ScoreWithCI(min(values) if name in LOWER_IS_BETTER_METRICS else max(values))
                for name, values in history.items()
                if values
            }
        by_system = {THIS_MODEL: scores, BASE_MODEL: parse_metrics(run.result.get("before"))}
        baselines = as_mapping(run.result.get("baselines"))
        by_system[ENSEMBLE] = parse_metrics(get_nested(run.result, "ensemble", "scores"))
        by_system |= {str(name): parse_metrics(values) for name, values in baselines.items()}
        candidates = (run.result.get("metric"), run.get("metric"), "bits_per_byte", "loss")
        metric = next((name for name in candidates if isinstance(name, str) and name in scores), "loss")
        difference = parse_score(run.result.get("baseline_difference"))
        return cls(
            metric,
            {system: found for system, found in by_system.items() if found},
            bool(run.result),
            difference if difference and difference.low is not None else None,
        )

    @property
    def info(self) -> MetricInfo:
        """Name and meaning of the selection metric."""
        return metric_info(self.metric) or METRICS["loss"]

    @property
    def metric_scores(self) -> dict[str, ScoreWithCI]:
        """System → score by the selection metric."""
        return {name: scores[self.metric] for name, scores in self.by_system.items() if self.metric in scores}

    @property
    def model_score(self) -> ScoreWithCI | None:
        """Score of the run by the selection metric."""
        return self.metric_scores.get(THIS_MODEL)

    @property
    def interval_note(self) -> str:
        """How the intervals of this model's scores were computed, and why a score has none."""
        scores = [
            (info.name, metric, score)
            for metric, score in self.by_system.get(THIS_MODEL, {}).items()
            if (info := metric_info(metric)) and metric not in LOWER_IS_BETTER_METRICS and score.n is not None
        ]
        return describe_intervals("examples", scores)

    @property
    def base_score(self) -> ScoreWithCI | None:
        """Score of the base model by the selection metric."""
        return self.metric_scores.get(BASE_MODEL)

    @property
    def best_baseline(self) -> tuple[str, ScoreWithCI] | None:
        """Name and score of the best baseline by the selection metric."""
        baselines = [row for row in self.metric_scores.items() if row[0] not in (THIS_MODEL, BASE_MODEL, ENSEMBLE)]
        return min(baselines, key=lambda row: -self.direction * row[1].value, default=None)

    @property
    def direction(self) -> int:
        """1 if higher is better, -1 if lower is."""
        return -1 if self.metric in LOWER_IS_BETTER_METRICS else 1

    @property
    def metric_names(self) -> dict[str, str]:
        """The metrics by display name, the selection metric first. The loss is listed only if it is the selection metric."""
        metrics = dict.fromkeys([self.metric, *(name for scores in self.by_system.values() for name in scores)])
        names = {name: info.name for name in metrics if (info := metric_info(name))}
        return {shown: name for name, shown in names.items() if name != "loss" or self.metric == "loss"}


def parse_score(value: Any) -> ScoreWithCI | None:
    """A score from a number or from {"value", "low", "high", "n"}; None without a finite value."""
    fields = as_mapping(value) or {"value": value}
    value, low, high, n = (x if is_number(x) else None for x in map(fields.get, ("value", "low", "high", "n")))
    if low is None or high is None or low > high:
        low = high = None
    return None if value is None else ScoreWithCI(float(value), low, high, None if n is None else int(n))


def parse_scores(values: Any) -> dict[str, ScoreWithCI]:
    """The entries of a mapping that have a finite value."""
    scores = {str(name): parse_score(value) for name, value in as_mapping(values).items()}
    return {name: score for name, score in scores.items() if score}


def parse_metrics(values: Any) -> dict[str, ScoreWithCI]:
    """The entries of a mapping that are metrics with a finite value."""
    return {name: score for name, score in parse_scores(values).items() if metric_info(name)}


# ---------------------------------------------------------------- JSON of any shape


def get_nested(value: Any, *keys: str) -> Any:
    """value[key][key]…, or None if a key is missing."""
    for key in keys:
        value = as_mapping(value).get(key)
    return value


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping if it is not one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """The value, or an empty list if it is not one."""
    return cast("list[Any]", value) if isinstance(value, list) else []
