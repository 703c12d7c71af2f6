"""What a run that learned a task has reached: its scores, beside what needs no model, and what it has forgotten."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nextword.reporting.run_data import RunData, as_mapping, get_nested, is_number

LOWER_IS_BETTER_METRICS = ("bits_per_byte", "loss")
THIS_MODEL, BEFORE_TRAINING = "this model", "before this training"


class MetricInfo(NamedTuple):
    """How a score is called, what it says, and how many digits of it are worth showing."""

    name: str
    description: str
    digits: int = 3


METRICS = {
    "accuracy": MetricInfo("accuracy", "the share of examples that are answered right"),
    "macro_f1": MetricInfo(
        "macro-F1", "the mean of the labels' F1, in which a rare label counts as much as a common one"
    ),
    "micro_f1": MetricInfo("micro-F1", "the F1 of all labels of all examples together"),
    "exact_match": MetricInfo("exact match", "the share of examples whose labels are all right"),
    "matthews": MetricInfo(
        "Matthews correlation", "the correlation of answer and truth: 0 is chance, 1 is always right"
    ),
    "pearson": MetricInfo("Pearson correlation", "how straight a line answers and truth make: 0 is none, 1 is a line"),
    "spearman": MetricInfo(
        "Spearman correlation", "how alike answers and truth are ranked: 0 is not at all, 1 is the same"
    ),
    "chrf": MetricInfo("chrF", "the sequences of letters shared with the reference, 0 to 100", 1),
    "bleu": MetricInfo("BLEU", "the sequences of words shared with the reference, 0 to 100", 1),
    "rouge1": MetricInfo("ROUGE-1", "the words shared with the reference, 0 to 100", 1),
    "rouge2": MetricInfo("ROUGE-2", "the pairs of words shared with the reference, 0 to 100", 1),
    "rougeL": MetricInfo("ROUGE-L", "the longest common sequence of words, 0 to 100", 1),
    "preferred": MetricInfo("preferred", "the share of pairs whose chosen answer is likelier than the rejected one"),
    "bits_per_byte": MetricInfo("bits per byte", "how many bits the model needs for a byte of what was held out"),
    "loss": MetricInfo("loss", "the mean on what was held out"),
}


class ScoreWithCI(NamedTuple):
    """A score, with the ends of its 95 % interval and the number of examples (or runs) where they are known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def parse(cls, value: Any) -> "ScoreWithCI | None":
        """From a number, or {"value", "low", "high", "n"}; None where there is no finite number."""
        if is_number(value):
            return cls(float(value))
        number, low, high, n = (get_nested(value, key) for key in ("value", "low", "high", "n"))
        if not is_number(number):
            return None
        has_interval = is_number(low) and is_number(high) and low <= high
        return cls(float(number), *((low, high) if has_interval else (None, None)), int(n) if is_number(n) else None)

    def format_value(self, metric: str) -> str:
        return format_score(self.value, metric)

    def format_interval(self, metric: str) -> str:
        """ "0.077 to 0.270", or nothing where no interval is known."""
        if self.low is None or self.high is None:
            return ""
        return f"{format_score(self.low, metric)} to {format_score(self.high, metric)}"

    def overlaps(self, other: "ScoreWithCI") -> bool | None:
        """Whether the two intervals share a point; None where one is not known."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high


def format_score(value: float, metric: str, sign: str = "") -> str:
    """As many digits as the metric deserves, and a true minus; `sign` "+" shows that of a difference too."""
    number_format = f"z,.{METRICS[metric].digits}f" if abs(value) < 1e9 else ".3g"
    return f"{value:{sign}{number_format}}".replace("-", "−")


def parse_scores(values: Any) -> dict[str, ScoreWithCI]:
    """Those of a table's scores whose names and numbers are ones."""
    scores = {name: ScoreWithCI.parse(value) for name, value in as_mapping(values).items() if name in METRICS}
    return {name: one for name, one in scores.items() if one is not None}


@dataclass(frozen=True)
class TaskResults:
    """The scores of a run and of what stands beside it.

    Attributes:
        metric: the score that the run was judged by; another one where that is not known.
        by_who: who (this model, before, each rule that needs no model) → the scores by name.
        finished: whether they are the result's, on everything that was held out; else the best look's so far.
    """

    metric: str
    by_system: dict[str, dict[str, ScoreWithCI]]
    is_final: bool

    @classmethod
    def from_run(cls, run: RunData) -> "TaskResults":
        model_scores = parse_scores(run.result) | parse_scores(run.result.get("scores"))
        if not run.result:
            validation_values = {name: [y for _, y in run.series("validation", name)] for name in METRICS}
            model_scores = {
                name: ScoreWithCI(best_value(name, values)) for name, values in validation_values.items() if values
            }
        by_who = {THIS_MODEL: model_scores, BEFORE_TRAINING: parse_scores(run.result.get("before"))}
        by_who |= {str(name): parse_scores(scores) for name, scores in as_mapping(run.result.get("baselines")).items()}
        candidates = (run.result.get("metric"), run.metadata.get("metric"), "bits_per_byte", "loss")
        metric = next((name for name in candidates if isinstance(name, str) and name in model_scores), "loss")
        return cls(metric, {who: scores for who, scores in by_who.items() if scores}, bool(run.result))

    @property
    def model_score(self) -> ScoreWithCI | None:
        return get_nested(self.by_system, THIS_MODEL, self.metric)

    @property
    def score_before(self) -> ScoreWithCI | None:
        return get_nested(self.by_system, BEFORE_TRAINING, self.metric)

    @property
    def metric_scores(self) -> list[tuple[str, ScoreWithCI]]:
        """Who has how much of the metric."""
        return [(who, scores[self.metric]) for who, scores in self.by_system.items() if self.metric in scores]

    @property
    def baselines(self) -> list[tuple[str, ScoreWithCI]]:
        """What the rules that need no model have of the metric."""
        return [(who, one) for who, one in self.metric_scores if who not in (THIS_MODEL, BEFORE_TRAINING)]

    @property
    def best_baseline(self) -> tuple[str, ScoreWithCI] | None:
        return min(self.baselines, key=lambda rule: -self.direction * rule[1].value, default=None)

    @property
    def direction(self) -> int:
        """1 where a higher value is better, else −1."""
        return -1 if self.metric in LOWER_IS_BETTER_METRICS else 1

    @property
    def metric_names(self) -> list[str]:
        """The scores that are known, the metric first; the loss is no score beside others."""
        names = dict.fromkeys([self.metric, *(name for scores in self.by_system.values() for name in scores)])
        return [name for name in names if name != "loss" or self.metric == "loss"]

    def summarize(self) -> str:
        """How well it does, and whether that is better than no model and than before."""
        model = self.model_score
        if model is None:
            return ""
        interval = f" (95 % interval {model.format_interval(self.metric)})" if model.low is not None else ""
        sample_text = f"On {model.n:,} held-out examples" if model.n else "On what was held out"
        lower = ", and lower is better" if self.direction < 0 else ""
        so_far = "" if self.is_final else ", the best so far"
        sentences = [
            f"{sample_text}: {METRICS[self.metric].name} {model.read_offset(self.metric)}{interval}{so_far}{lower}."
        ]
        if self.best_baseline is not None:
            name, rule = self.best_baseline
            sentences.append(
                f"The best rule that needs no model, {name}, has {rule.read_offset(self.metric)}: {self._compare_with_baseline(rule)}."
            )
        if self.score_before is not None:
            sentences.append(f"Before this training it was {self.score_before.read_offset(self.metric)}.")
        return " ".join(sentences)

    def _compare_with_baseline(self, baseline: ScoreWithCI) -> str:
        model = self.model_score
        assert model is not None
        advantage = self.direction * (model.value - baseline.value)
        if not advantage:
            return "the model has the same"
        comparison = "the model is ahead of it" if advantage > 0 else "the model is behind it"
        overlap = model.overlaps(baseline)
        if overlap is None:
            return comparison
        return f"{comparison}, {'though' if overlap else 'and'} the intervals {'overlap' if overlap else 'are apart'}"


def best_value(metric: str, values: Iterable[float]) -> float:
    """The best of some values of a metric."""
    return min(values) if metric in LOWER_IS_BETTER_METRICS else max(values)


def format_forgetting(run: RunData) -> str:
    """What the model has forgotten of the text it was pre-trained on; nothing where that was not measured."""
    before, after = (get_nested(run.result, "forgetting", when) for when in ("before", "after"))
    if not is_number(before) or not is_number(after) or before <= 0 or get_nested(run.metadata, "recipe", "scratch"):
        return ""
    share = after / before - 1
    losses_text = f"held-out text of its pre-training costs {after:.3f} bits per byte now and cost {before:.3f} before"
    if round(100 * share, 1) <= 0:
        return f"Nothing was forgotten: {losses_text}."
    return f"What was forgotten: {losses_text}, {100 * share:.1f} % more."


def base_model_name(run: RunData) -> str | None:
    """The folder's name of the model that the run began with, without the way to it."""
    path = get_nested(run.metadata, "base", "model")
    return short_path_name(path) if isinstance(path, str) and path else None


def short_path_name(path: str) -> str:
    """The last part of a path; of a run's `model` folder the run's own name."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if len(parts) > 1 and parts[-1] == "model":
        return parts[-2]
    return parts[-1] if parts else path


def format_columns(columns: Mapping[str, Any]) -> str:
    """Which column each part of an example was read from: "prompt (english), completion (french)"."""
    return ", ".join(role if role == column else f"{role} ({column})" for role, column in columns.items())
