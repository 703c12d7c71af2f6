"""Findings of an audit: measured values, each with its confidence interval and the value expected without a problem."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nextword.common.statistics import ScoreWithCI

MAX_EXAMPLES = 5

Examples = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Finding:
    """One measured value.

    Attributes:
        section: "bias", "memory", "corpus" or "cost".
        name: what was measured, for example "CrowS-Pairs, gender".
        value: the point estimate, in `unit`.
        low, high: the 95 % confidence interval, if there is one.
        unit: "%" (proportions are given in per cent), "bits/byte", "documents", "kWh" and so on.
        n: the number of items, samples or documents measured.
        reference: the value without a problem: 50 for stereotype preference, 0 for a gap, that of held-out text for
            memorization.
        notable: whether the finding is flagged: the interval excludes the reference, or something problematic was found.
        note: one sentence on how it was measured or what it means.
        examples: instances of what was found, as named strings: {"document": …, "passage": …}.
    """

    section: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    n: int | None = None
    reference: float | None = None
    notable: bool = False
    note: str = ""
    examples: Examples = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"examples": [dict(example) for example in self.examples]}


def percentages(score: ScoreWithCI) -> tuple[float, float, float]:
    """The value and the interval of a proportion in per cent."""
    return 100 * score.value, 100 * score.low, 100 * score.high


def count_finding(
    section: str, name: str, count: int, unit: str, n: int, note: str, examples: Examples = ()
) -> Finding:
    """A number of problematic occurrences, flagged if it is not 0."""
    return Finding(section, name, count, None, None, unit, n, 0.0, count > 0, note, examples)


def proportion_finding(
    section: str, name: str, score: ScoreWithCI, reference: ScoreWithCI | None, note: str, examples: Examples = ()
) -> Finding:
    """A proportion in per cent, flagged if its interval lies above the reference (0 without one) and it is not 0."""
    value, low, high = percentages(score)
    baseline = 100 * reference.value if reference else None
    flagged = value > 0 and low > (baseline or 0.0)
    return Finding(section, name, value, low, high, "%", score.n, baseline, flagged, note, examples)


def first_distinct(examples: Iterable[dict[str, str]]) -> Examples:
    """The first `MAX_EXAMPLES` different examples."""
    distinct: list[dict[str, str]] = []
    for example in examples:
        if example not in distinct and len(distinct) < MAX_EXAMPLES:
            distinct.append(example)
    return tuple(distinct)
