"""What a run that learned a task has reached: its scores, beside what needs no model, and what it has forgotten."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nextword.reporting.run_data import Run, at, is_number, mapping

LOWER_IS_BETTER = ("bits_per_byte", "loss")
MODEL, BEFORE = "this model", "before this training"


class Metric(NamedTuple):
    """How a score is called, what it says, and how many digits of it are worth showing."""

    name: str
    meaning: str
    digits: int = 3


METRICS = {
    "accuracy": Metric("accuracy", "the share of examples that are answered right"),
    "macro_f1": Metric("macro-F1", "the mean of the labels' F1, in which a rare label counts as much as a common one"),
    "micro_f1": Metric("micro-F1", "the F1 of all labels of all examples together"),
    "exact_match": Metric("exact match", "the share of examples whose labels are all right"),
    "matthews": Metric("Matthews correlation", "the correlation of answer and truth: 0 is chance, 1 is always right"),
    "pearson": Metric("Pearson correlation", "how straight a line answers and truth make: 0 is none, 1 is a line"),
    "spearman": Metric(
        "Spearman correlation", "how alike answers and truth are ranked: 0 is not at all, 1 is the same"
    ),
    "chrf": Metric("chrF", "the sequences of letters shared with the reference, 0 to 100", 1),
    "bleu": Metric("BLEU", "the sequences of words shared with the reference, 0 to 100", 1),
    "rouge1": Metric("ROUGE-1", "the words shared with the reference, 0 to 100", 1),
    "rouge2": Metric("ROUGE-2", "the pairs of words shared with the reference, 0 to 100", 1),
    "rougeL": Metric("ROUGE-L", "the longest common sequence of words, 0 to 100", 1),
    "preferred": Metric("preferred", "the share of pairs whose chosen answer is likelier than the rejected one"),
    "bits_per_byte": Metric("bits per byte", "how many bits the model needs for a byte of what was held out"),
    "loss": Metric("loss", "the mean on what was held out"),
}


class Measured(NamedTuple):
    """A score, with the ends of its 95 % interval and the number of examples (or runs) where they are known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def read(cls, value: Any) -> "Measured | None":
        """From a number, or {"value", "low", "high", "n"}; None where there is no finite number."""
        if is_number(value):
            return cls(float(value))
        number, low, high, n = (at(value, key) for key in ("value", "low", "high", "n"))
        if not is_number(number):
            return None
        whole = is_number(low) and is_number(high) and low <= high
        return cls(float(number), *((low, high) if whole else (None, None)), int(n) if is_number(n) else None)

    def shown(self, metric: str) -> str:
        return as_score(self.value, metric)

    def interval(self, metric: str) -> str:
        """ "0.077 to 0.270", or nothing where no interval is known."""
        if self.low is None or self.high is None:
            return ""
        return f"{as_score(self.low, metric)} to {as_score(self.high, metric)}"

    def overlaps(self, other: "Measured") -> bool | None:
        """Whether the two intervals share a point; None where one is not known."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high


def as_score(value: float, metric: str, sign: str = "") -> str:
    """As many digits as the metric deserves, and a true minus; `sign` "+" shows that of a difference too."""
    shape = f"z,.{METRICS[metric].digits}f" if abs(value) < 1e9 else ".3g"
    return f"{value:{sign}{shape}}".replace("-", "−")


def measured(values: Any) -> dict[str, Measured]:
    """Those of a table's scores whose names and numbers are ones."""
    found = {name: Measured.read(value) for name, value in mapping(values).items() if name in METRICS}
    return {name: one for name, one in found.items() if one is not None}


@dataclass(frozen=True)
class Outcome:
    """The scores of a run and of what stands beside it.

    Attributes:
        metric: the score that the run was judged by; another one where that is not known.
        by_who: who (this model, before, each rule that needs no model) → the scores by name.
        finished: whether they are the result's, on everything that was held out; else the best look's so far.
    """

    metric: str
    by_who: dict[str, dict[str, Measured]]
    finished: bool

    @classmethod
    def of(cls, run: Run) -> "Outcome":
        own = measured(run.result) | measured(run.result.get("scores"))
        if not run.result:
            looks = {name: [y for _, y in run.series("validation", name)] for name in METRICS}
            own = {name: Measured(best(name, values)) for name, values in looks.items() if values}
        by_who = {MODEL: own, BEFORE: measured(run.result.get("before"))}
        by_who |= {str(name): measured(scores) for name, scores in mapping(run.result.get("baselines")).items()}
        told = (run.result.get("metric"), run.facts.get("metric"), "bits_per_byte", "loss")
        metric = next((name for name in told if isinstance(name, str) and name in own), "loss")
        return cls(metric, {who: scores for who, scores in by_who.items() if scores}, bool(run.result))

    @property
    def model(self) -> Measured | None:
        return at(self.by_who, MODEL, self.metric)

    @property
    def before(self) -> Measured | None:
        return at(self.by_who, BEFORE, self.metric)

    @property
    def rows(self) -> list[tuple[str, Measured]]:
        """Who has how much of the metric."""
        return [(who, scores[self.metric]) for who, scores in self.by_who.items() if self.metric in scores]

    @property
    def rules(self) -> list[tuple[str, Measured]]:
        """What the rules that need no model have of the metric."""
        return [(who, one) for who, one in self.rows if who not in (MODEL, BEFORE)]

    @property
    def best_rule(self) -> tuple[str, Measured] | None:
        return min(self.rules, key=lambda rule: -self.sign * rule[1].value, default=None)

    @property
    def sign(self) -> int:
        """1 where a higher value is better, else −1."""
        return -1 if self.metric in LOWER_IS_BETTER else 1

    @property
    def names(self) -> list[str]:
        """The scores that are known, the metric first; the loss is no score beside others."""
        names = dict.fromkeys([self.metric, *(name for scores in self.by_who.values() for name in scores)])
        return [name for name in names if name != "loss" or self.metric == "loss"]

    def in_words(self) -> str:
        """How well it does, and whether that is better than no model and than before."""
        model = self.model
        if model is None:
            return ""
        interval = f" (95 % interval {model.interval(self.metric)})" if model.low is not None else ""
        on = f"On {model.n:,} held-out examples" if model.n else "On what was held out"
        lower = ", and lower is better" if self.sign < 0 else ""
        so_far = "" if self.finished else ", the best so far"
        said = [f"{on}: {METRICS[self.metric].name} {model.shown(self.metric)}{interval}{so_far}{lower}."]
        if self.best_rule is not None:
            name, rule = self.best_rule
            said.append(
                f"The best rule that needs no model, {name}, has {rule.shown(self.metric)}: {self._against(rule)}."
            )
        if self.before is not None:
            said.append(f"Before this training it was {self.before.shown(self.metric)}.")
        return " ".join(said)

    def _against(self, rule: Measured) -> str:
        model = self.model
        assert model is not None
        ahead = self.sign * (model.value - rule.value)
        if not ahead:
            return "the model has the same"
        said = "the model is ahead of it" if ahead > 0 else "the model is behind it"
        overlap = model.overlaps(rule)
        if overlap is None:
            return said
        return f"{said}, {'though' if overlap else 'and'} the intervals {'overlap' if overlap else 'are apart'}"


def best(metric: str, values: Iterable[float]) -> float:
    """The best of some values of a metric."""
    return min(values) if metric in LOWER_IS_BETTER else max(values)


def forgetting_in_words(run: Run) -> str:
    """What the model has forgotten of the text it was pre-trained on; nothing where that was not measured."""
    before, after = (at(run.result, "forgetting", when) for when in ("before", "after"))
    if not is_number(before) or not is_number(after) or before <= 0 or at(run.facts, "recipe", "scratch"):
        return ""
    share = after / before - 1
    what = f"held-out text of its pre-training costs {after:.3f} bits per byte now and cost {before:.3f} before"
    if round(100 * share, 1) <= 0:
        return f"Nothing was forgotten: {what}."
    return f"What was forgotten: {what}, {100 * share:.1f} % more."


def base_name(run: Run) -> str | None:
    """The folder's name of the model that the run began with, without the way to it."""
    path = at(run.facts, "base", "model")
    return name_of(path) if isinstance(path, str) and path else None


def name_of(path: str) -> str:
    """The last part of a path; of a run's `model` folder the run's own name."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if len(parts) > 1 and parts[-1] == "model":
        return parts[-2]
    return parts[-1] if parts else path


def columns_in_words(columns: Mapping[str, Any]) -> str:
    """Which column each part of an example was read from: "prompt (english), completion (french)"."""
    return ", ".join(role if role == column else f"{role} ({column})" for role, column in columns.items())
