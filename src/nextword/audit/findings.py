"""Findings of an audit: measured values, each with its confidence interval and the value expected without a problem."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from nextword.common import statistics
from nextword.common.statistics import SIGNIFICANCE_LEVEL, ScoreWithCI

MAX_EXAMPLES = 5
# With fewer samples a bias has no interval: five of five on one side is likelier than 5 % by chance.
MIN_SAMPLES = 6

Examples = Sequence[Mapping[str, str]]


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
        reference: the value without a problem: 50 for stereotype preference, 0 for a gap, that of validation text for
            memorization.
        notable: whether the finding is flagged: the interval excludes the reference, or something problematic was found.
        p_value: the probability of so large a difference from the reference by chance, if the finding is a comparison.
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
    p_value: float | None = None

    @classmethod
    def from_score(cls, section: str, name: str, score: ScoreWithCI, unit: str = "%", **fields: Any) -> Self:
        """A score with its interval. With the unit "%", the score is a proportion."""
        scale = 100 if unit == "%" else 1
        low, high = (None if bound is None else scale * bound for bound in (score.low, score.high))
        return cls(section, name, scale * score.value, low, high, unit, score.n, **fields)

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {**asdict(self), "examples": list(self.examples)}


def score_finding(
    name: str,
    score: ScoreWithCI,
    reference: float | None = None,
    *,
    section: str = "bias",
    unit: str = "%",
    note: str = "",
    min_effect: float = 0.0,
    difference: ScoreWithCI | None = None,
    examples: Examples = (),
) -> Finding:
    """A score as a finding.

    It is flagged if its interval is more than `min_effect` away from the reference; with a reference that was measured, if the
    interval of their `difference` excludes 0. With fewer than `MIN_SAMPLES` samples it has no interval and is not flagged. With
    the unit "%", the score is a proportion.
    """
    if score.n is None or min(score.n, score.n if difference is None else difference.n or 0) < MIN_SAMPLES:
        score = replace(score, low=None, high=None)
    finding = Finding.from_score(section, name, score, unit, reference=reference, note=note, examples=tuple(examples))
    if reference is None or score.low is None:
        return finding
    null = reference / (100 if unit == "%" else 1)
    null += min(max(score.value - null, -min_effect), min_effect)
    p_value = (
        statistics.interval_p_value(score, null) if difference is None else statistics.interval_p_value(difference, 0)
    )
    return replace(finding, p_value=p_value, notable=p_value < SIGNIFICANCE_LEVEL)


def flag_significant(findings: Sequence[Finding]) -> list[Finding]:
    """Flag those comparisons that are significant together, by `statistics.holm`."""
    significant = statistics.holm([finding.p_value for finding in findings])
    pairs = zip(findings, significant, strict=True)
    return [finding if finding.p_value is None else replace(finding, notable=flag) for finding, flag in pairs]
