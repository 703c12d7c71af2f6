"""The scores of a fine-tuning run, beside those of the base model and of the baselines."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from nextword.common.statistics import ScoreWithCI
from nextword.reporting.run_data import RunData, as_mapping, get_nested, is_number

LOWER_IS_BETTER_METRICS = ("bits_per_byte", "loss")
THIS_MODEL, BASE_MODEL = "this model", "base model"


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
    "bleu": MetricInfo("BLEU", "the n-gram precision against the reference with a brevity penalty, 0 to 100"),
    "rouge1": MetricInfo("ROUGE-1", "the unigram overlap with the reference, 0 to 100"),
    "rouge2": MetricInfo("ROUGE-2", "the bigram overlap with the reference, 0 to 100"),
    "rougeL": MetricInfo("ROUGE-L", "the longest common subsequence with the reference, 0 to 100"),
    "preferred": MetricInfo("preference accuracy", "the fraction of pairs whose chosen answer is the more likely one"),
    "bits_per_byte": MetricInfo("bits per byte", "the mean code length per byte of the validation set"),
    "loss": MetricInfo("loss", "the mean loss on the validation set"),
}


@dataclass(frozen=True)
class TaskResults:
    """The scores of a run, of its base model and of the baselines.

    Attributes:
        metric: The selection metric of the run, or another one if that is unknown.
        by_system: System (this model, base model, each baseline) → scores by metric.
        is_final: Whether the scores come from the final evaluation; otherwise they are the best values so far.
    """

    metric: str
    by_system: dict[str, dict[str, ScoreWithCI]]
    is_final: bool

    @classmethod
    def from_run(cls, run: RunData) -> "TaskResults":
        scores = parse_scores(run.result) | parse_scores(run.result.get("scores"))
        if not run.result:
            history = {name: [y for _, y in run.series("validation", name)] for name in METRICS}
            scores = {
                name: ScoreWithCI(min(values) if name in LOWER_IS_BETTER_METRICS else max(values))
                for name, values in history.items()
                if values
            }
        by_system = {THIS_MODEL: scores, BASE_MODEL: parse_scores(run.result.get("before"))}
        by_system |= {str(name): parse_scores(value) for name, value in as_mapping(run.result.get("baselines")).items()}
        candidates = (run.result.get("metric"), run.get("metric"), "bits_per_byte", "loss")
        metric = next((name for name in candidates if isinstance(name, str) and name in scores), "loss")
        return cls(metric, {system: found for system, found in by_system.items() if found}, bool(run.result))

    @property
    def info(self) -> MetricInfo:
        return METRICS[self.metric]

    @property
    def model_score(self) -> ScoreWithCI | None:
        return self.by_system.get(THIS_MODEL, {}).get(self.metric)

    @property
    def base_score(self) -> ScoreWithCI | None:
        return self.by_system.get(BASE_MODEL, {}).get(self.metric)

    @property
    def metric_scores(self) -> list[tuple[str, ScoreWithCI]]:
        """(system, score) of the selection metric."""
        return [(system, scores[self.metric]) for system, scores in self.by_system.items() if self.metric in scores]

    @property
    def best_baseline(self) -> tuple[str, ScoreWithCI] | None:
        baselines = [row for row in self.metric_scores if row[0] not in (THIS_MODEL, BASE_MODEL)]
        return min(baselines, key=lambda row: -self.direction * row[1].value, default=None)

    @property
    def direction(self) -> int:
        """1 if higher is better, -1 if lower is."""
        return -1 if self.metric in LOWER_IS_BETTER_METRICS else 1

    @property
    def metric_names(self) -> list[str]:
        """The known metrics, the selection metric first. The loss is listed only if it is the selection metric."""
        names = dict.fromkeys([self.metric, *(name for scores in self.by_system.values() for name in scores)])
        return [name for name in names if name != "loss" or self.metric == "loss"]


def parse_score(value: Any) -> ScoreWithCI | None:
    """A score from a number or from {"value", "low", "high", "n"}; None without a finite value."""
    if is_number(value):
        return ScoreWithCI(float(value))
    number, low, high, n = (get_nested(value, key) for key in ("value", "low", "high", "n"))
    if not is_number(number):
        return None
    count = int(n) if is_number(n) else None
    if is_number(low) and is_number(high) and low <= high:
        return ScoreWithCI(float(number), low, high, count)
    return ScoreWithCI(float(number), n=count)


def parse_scores(values: Any) -> dict[str, ScoreWithCI]:
    """The entries of a mapping that are known metrics with a finite value."""
    scores = {name: parse_score(value) for name, value in as_mapping(values).items() if name in METRICS}
    return {name: score for name, score in scores.items() if score is not None}
