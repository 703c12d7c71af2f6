"""Scores with 95 % confidence intervals.

- Proportions have the interval of Agresti and Coull (1998), and differences of two independent proportions Newcombe's hybrid
  of two such intervals: both hold near 0 and 1 and for small samples.
- Means over examples, and differences of paired examples, have Student's t interval, joined with Hall's for skewed values.
- Other smooth statistics of sums are linearized (the infinitesimal jackknife, Efron 1982, chapter 6), and then have the
  interval of a mean, or that of a proportion with an effective sample size if they are bounded, as F1 scores are.
- Means over runs of different seeds have Student's t interval.

Where no method holds, for example with fewer than `MIN_UNITS` examples, there is a score without an interval. `make
calibration` measures the coverage of all of them; see docs/evaluation.md.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nextword.common.errors import UsageError

CONFIDENCE_LEVEL = 0.95
SIGNIFICANCE_LEVEL = 0.05
MIN_UNITS = 20  # examples, for the interval of a mean or another statistic of values of an unknown distribution
MIN_VARYING = 10  # examples that differ from the most frequent value, for the same


@dataclass(frozen=True)
class ScoreWithCI:
    """A score with its 95 % confidence interval, as far as it is known.

    Attributes:
        value: The score on all examples.
        low: Lower bound of the interval.
        high: Upper bound of the interval.
        n: Number of examples (or runs) behind the score.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def is_above(self, reference: float) -> bool:
        """Whether the whole interval lies above a reference value."""
        return self.low is not None and self.low > reference

    def is_below(self, reference: float) -> bool:
        """Whether the whole interval lies below a reference value."""
        return self.high is not None and self.high < reference

    def transform(self, function: Callable[[float], float]) -> "ScoreWithCI":
        """An increasing function of the score, with the interval of the function."""
        bounds = (None if bound is None else function(bound) for bound in (self.low, self.high))
        return ScoreWithCI(function(self.value), *bounds, n=self.n)

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields, as JSON stores them."""
        return asdict(self)


def mean(values: Sequence[float] | np.ndarray) -> ScoreWithCI:
    """The mean of one number per example, with the interval of `statistic_of_sums`.

    Raises:
        UsageError: There are no examples, or a value is not finite.
    """
    check_lengths(values)
    column = require_finite(values, "score")
    return statistic_of_sums(np.stack([column, np.ones_like(column)], axis=1), lambda sums: sums[:, 0] / sums[:, 1])


def mean_of_runs(values: Sequence[float] | np.ndarray) -> ScoreWithCI:
    """The mean of the scores of runs that differ by their seed, with Student's t interval. A single run has no interval.

    Raises:
        UsageError: There are no runs, or a score is not finite.
    """
    n, column = check_lengths(values), require_finite(values, "score")
    center = float(column.mean())
    if n == 1:
        return ScoreWithCI(center, n=n)
    margin = t_quantile(n - 1) * float(column.std(ddof=1)) / math.sqrt(n)
    return ScoreWithCI(center, center - margin, center + margin, n)


def proportion(values: Sequence[float] | np.ndarray) -> ScoreWithCI:
    """The mean of numbers between 0 and 1, with the interval of Agresti and Coull (1998).

    It contains Wilson's score interval, whose coverage falls below 0.9 near 0 and 1 (Brown, Cai and DasGupta 2001). Values
    other than 0, 1/2 (a tie) and 1 vary less: they have the interval of a mean, if enough of them differ.

    Raises:
        UsageError: There are no examples, or a value is not finite.
    """
    n, column = check_lengths(values), require_finite(values, "score")
    value = float(column.mean())
    low, high = _proportion_interval(value, n, t_quantile(math.inf))
    if not _are_outcomes(column):
        score = mean(column)
        varying = n - np.unique(column, return_counts=True)[1].max()
        if score.low is not None and score.high is not None and varying >= MIN_VARYING:
            low, high = max(0.0, score.low), min(1.0, score.high)
    return ScoreWithCI(value, low, high, n)


def proportion_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> ScoreWithCI:
    """The difference of the proportions of two groups of examples, with Newcombe's hybrid of two intervals.

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10, with
    the intervals of `proportion`. n is the size of the smaller group.

    Raises:
        UsageError: A group has no examples, or a value is not finite.
    """
    first, second = proportion(a), proportion(b)
    assert first.low is not None and first.high is not None and second.low is not None and second.high is not None
    difference = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return ScoreWithCI(difference, difference - below, difference + above, min(len(a), len(b)))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> ScoreWithCI:
    """The mean of a − b, with the interval of a mean.

    For outcomes (0, 1, and 1/2 for a tie) the interval is Student's, with one half of an example added to each of the two
    discordant outcomes, and one whole to the others (Agresti and Min 2005), so that it holds if few or no examples differ.

    Args:
        a: Scores of one system, one per example.
        b: Scores of another system on the same examples.

    Raises:
        UsageError: There are no examples, the lengths differ, or a value is not finite.
    """
    n = check_lengths(a, b)
    first, second = require_finite(a, "first score"), require_finite(b, "second score")
    differences = first - second
    if not (_are_outcomes(first) and _are_outcomes(second)):
        return mean(differences)
    center, square = differences.sum() / (n + 2), (np.square(differences).sum() + 1) / (n + 2)
    margin = t_quantile(n + 1) * math.sqrt(max(0.0, square - center**2) / (n + 2))
    value, low, high = float(differences.mean()), max(-1.0, float(center - margin)), min(1.0, float(center + margin))
    return ScoreWithCI(value, min(value, low), max(value, high), n)


def statistic_of_sums(
    columns: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    counts: np.ndarray | None = None,
    bounds: tuple[float, float] | None = None,
    prior: tuple[np.ndarray, np.ndarray] | None = None,
) -> ScoreWithCI:
    """A smooth statistic of column sums, such as a ratio of two sums or an F1 score.

    The statistic is linearized: the influence of an example is the derivative with respect to its weight (the infinitesimal
    jackknife, Efron 1982, chapter 6). The interval contains Student's, and that of Hall (1992), "On the removal of skewness
    by transformation". A bounded statistic has the interval of a proportion, with the effective number of examples that
    gives a proportion the same variance (Dean and Pagano 2015). There is no interval for fewer than `MIN_UNITS` examples, or
    if no example differs from the others.

    Args:
        columns: Numbers per example [n, columns].
        statistic: Maps sums [R, columns] to the statistic [R]. Multiplying all sums must not change it.
        counts: How many examples each row stands for [n]; default: one.
        bounds: The least and greatest value of the statistic.
        prior: Pseudo-observations [m, columns] and their weights [m], which enter the interval only.

    Raises:
        UsageError: There are no examples.
    """
    check_lengths(columns)
    rows, weights = columns.astype(np.float64), np.ones(len(columns)) if counts is None else counts.astype(np.float64)
    n, value = round(weights.sum()), float(statistic(weights @ rows[None])[0])
    if prior is not None:
        rows, weights = np.vstack([rows, prior[0]]), np.concatenate([weights, prior[1]])
    center, influence = _influence(rows, weights, statistic)
    error = math.sqrt(float(weights @ influence**2) / (n - 1) / n) if n > 1 else 0.0
    if n < MIN_UNITS or error <= 1e-9 * (1 + abs(value)):
        return ScoreWithCI(value, n=n)
    quantile = t_quantile(n - 1)
    if bounds is not None:
        low, span = bounds[0], bounds[1] - bounds[0]
        share = (center - low) / span
        interval = _proportion_interval((value - low) / span, share * (1 - share) * (span / error) ** 2, quantile)
        return ScoreWithCI(value, *(low + span * bound for bound in interval), n=n)
    skewness = float(weights @ influence**3) / n / (float(weights @ influence**2) / n) ** 1.5
    skewness *= math.sqrt(n * (n - 1)) / (n - 2)
    margins = [_hall_margin(side * quantile, skewness / math.sqrt(n)) for side in (-1, 1)]
    below, above = max(quantile, margins[1]), max(quantile, -margins[0])
    return ScoreWithCI(value, value - below * error, value + above * error, n)


def _influence(
    rows: np.ndarray, weights: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, np.ndarray]:
    """The statistic of weighted rows, and n times its derivative with respect to the weight of each row, centered."""
    total, step = weights @ rows, 1e-4
    center = float(statistic(total[None])[0])
    slope = (center - statistic(total - step * rows)) / step
    return center, (slope - weights @ slope / weights.sum()) * weights.sum()


def _hall_margin(quantile: float, skewness: float) -> float:
    """The value of Student's statistic at which Hall's cubic transformation of it equals a quantile; skewness is γ / √n."""
    a = skewness / 3
    return (float(np.cbrt(1 + 3 * a * (quantile - skewness / 6))) - 1) / a if abs(a) > 1e-6 else quantile


def _proportion_interval(p: float, n: float, quantile: float) -> tuple[float, float]:
    """The interval of Agresti and Coull (1998) of a proportion p of n examples, within 0 and 1."""
    total = n + quantile**2
    center = (p * n + quantile**2 / 2) / total
    spread = quantile * math.sqrt(max(0.0, center * (1 - center)) / total)
    return min(p, max(0.0, center - spread)), max(p, min(1.0, center + spread))


def _are_outcomes(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0, 0.5, 1)).all())


def clustered_ratio(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *factors: Sequence[object]
) -> ScoreWithCI:
    """A smooth statistic of column sums of examples that share clusters, such as all examples of one template or of one word.

    The variance of several crossed factors is V₁ + V₂ − V₁₂ (Cameron, Gelbach and Miller 2011, equation 2.2), at least that of
    each factor, with V of a factor from the jackknife over its clusters. The interval is Student's, with the degrees of freedom
    of the factor with the fewest clusters. n is that number. A factor of a single cluster is fixed: the score is that of it.

    Args:
        columns: Numbers per example [n, columns].
        statistic: Maps sums [R, columns] to the statistic [R].
        *factors: The cluster of each example, by factor; one or two.

    Raises:
        UsageError: There are no examples, or the lengths differ.
    """
    check_lengths(columns, *factors)
    total = columns.sum(0, keepdims=True)
    value = float(statistic(total)[0])

    def jackknife(clusters: np.ndarray) -> float:
        count = int(clusters.max()) + 1
        sums = np.stack([np.bincount(clusters, column, count) for column in columns.T], axis=1)
        left_out = statistic(total - sums)
        return (count - 1) / count * float(np.square(left_out - left_out.mean()).sum())

    ids = [np.unique(np.asarray(factor), return_inverse=True)[1] for factor in factors]
    random = [factor for factor in ids if factor.max() > 0]
    if not random:
        return ScoreWithCI(value, n=1)
    variances = [jackknife(factor) for factor in random]
    if len(random) > 1:
        both = np.unique(np.stack(random, 1), axis=0, return_inverse=True)[1].ravel()
        variances.append(sum(variances) - jackknife(both))
    n = min(int(factor.max()) + 1 for factor in random)
    margin = t_quantile(n - 1) * math.sqrt(max(variances))
    return ScoreWithCI(value, value - margin, value + margin, n)


def ratio_of_sums(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> ScoreWithCI:
    """The ratio of two sums over independent units, such as the loss of documents to their bytes.

    The variance is the jackknife's over the units (Cochran 1977, section 6.17). The interval is Student's, with the degrees of
    freedom of Bell and McCaffrey (2002) for units of unequal size: n − 1 if all sizes are equal, fewer if some units outweigh
    the others. n is the number of units.

    Args:
        numerators: A number per unit, [n].
        denominators: The size of each unit, at least 0, [n].

    Returns:
        The ratio; without an interval if it rests on one unit: if Kish's effective number of units, (Σw)² / Σw², is below 2.

    Raises:
        UsageError: There are no units, the lengths differ, a value is not finite, or all sizes are 0.
    """
    n, total = check_lengths(numerators, denominators), float(np.sum(denominators))
    sums, sizes = require_finite(numerators, "sum"), require_finite(denominators, "size")
    if total <= 0:
        raise UsageError("there is nothing to score: all sizes are 0")
    value, w = float(sums.sum()) / total, sizes / total
    square = float(np.square(w).sum())
    if square > 0.5 + 1e-9:
        return ScoreWithCI(value, n=n)
    left_out = (sums.sum() - sums) / (total - sizes)
    variance = (n - 1) / n * float(np.square(left_out - value).sum())
    # Satterthwaite's trace(A)² / trace(A²) for units of one variance: A = C (I − 1wᵀ)(I − 1wᵀ)ᵀ C, with C = diag(w / (1 − w)).
    c = np.square(w / (1 - w))
    c0, c1, c2 = (float((c * w**k).sum()) for k in range(3))
    trace = c0 * (1 + square) - 2 * c1
    trace_of_square = float((c**2 * (1 + 2 * square - 4 * w)).sum())
    trace_of_square += (square * c0) ** 2 + 2 * c0 * c2 - 4 * square * c0 * c1 + 2 * c1**2
    margin = t_quantile(trace**2 / trace_of_square) * math.sqrt(variance)
    return ScoreWithCI(value, value - margin, value + margin, n)


def mcnemar_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p-value of McNemar's exact test (McNemar 1947; Dietterich 1998, section 3.1).

    The test counts the examples that exactly one system answers correctly. Under the null hypothesis each of the two systems
    is the correct one with probability 1/2.

    Args:
        a: 1 for each example that the first system answers correctly, else 0.
        b: The same for the second system.

    Raises:
        UsageError: There are no examples, or the lengths differ.
    """
    check_lengths(a, b)
    only_a, only_b = (int(np.greater(*pair).sum()) for pair in ((a, b), (b, a)))
    return float(_scipy_stats().binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def interval_p_value(score: ScoreWithCI, null: float) -> float:
    """The two-sided p-value of a null value, below 0.05 if and only if the interval of a score excludes it.

    Source: Altman and Bland 2011, "How to obtain the P value from a confidence interval"; with Student's t distribution of
    n − 1 degrees of freedom and the half of the interval on the side of the null value.
    """
    assert score.low is not None and score.high is not None and score.n is not None
    distance = abs(score.value - null)
    margin = score.value - score.low if score.value > null else score.high - score.value
    if margin <= 0 or distance == 0:
        return float(distance == 0)
    degrees_of_freedom = max(1, score.n - 1)
    t = t_quantile(degrees_of_freedom) * distance / margin
    return round(2 * float(importlib.import_module("scipy.special").stdtr(degrees_of_freedom, -t)), 12)


def holm(p_values: Sequence[float | None]) -> list[bool]:
    """Which of several comparisons are significant together: by chance alone one is in at most one of twenty sets.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: The p-value of each comparison; None for one without a test, which does not count.
    """
    ordered = sorted((p_value, i) for i, p_value in enumerate(p_values) if p_value is not None)
    result, is_significant = [False] * len(p_values), True
    for rank, (p_value, i) in enumerate(ordered):
        is_significant = is_significant and p_value < SIGNIFICANCE_LEVEL / (len(ordered) - rank)
        result[i] = is_significant
    return result


def noise_floor(values: Sequence[float]) -> float:
    """The largest difference of two runs, at the 95 % level, that the seed alone explains: t · s · √2.

    t is the quantile of Student's distribution with n − 1 degrees of freedom, s the standard deviation of n runs.

    Raises:
        UsageError: There are fewer than two runs, or a score is not finite.
    """
    n = check_lengths(values)
    if n < 2:
        raise UsageError("a noise floor needs at least two runs with different seeds; 1 run was given")
    return t_quantile(n - 1) * float(require_finite(values, "score").std(ddof=1)) * math.sqrt(2)


def check_lengths(first: Sequence[object] | np.ndarray, *others: Sequence[object] | np.ndarray) -> int:
    """The common length of some sequences.

    Raises:
        UsageError: The first is empty, or the lengths differ.
    """
    if len(first) == 0:
        raise UsageError("there is nothing to score: give at least one example")
    for other in others:
        if len(other) != len(first):
            raise UsageError(f"{len(first)} targets but {len(other)} predictions: give one prediction for each example")
    return len(first)


def require_finite(values: Sequence[float] | np.ndarray, value_name: str) -> np.ndarray:
    """The values as an array [n].

    Raises:
        UsageError: A value is NaN or infinite.
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        i = int(np.argmin(np.isfinite(array)))
        raise UsageError(
            f"{value_name} {i + 1} is {array[i]}, not a finite number: correct it or leave the example out"
        )
    return array


def t_quantile(degrees_of_freedom: float) -> float:
    """The two-sided 95 % quantile of Student's t distribution; with infinite degrees of freedom, of the normal distribution."""
    return float(importlib.import_module("scipy.special").stdtrit(degrees_of_freedom, (1 + CONFIDENCE_LEVEL) / 2))


def _scipy_stats() -> Any:
    """The module `scipy.stats`, which has no types and takes about a second to import."""
    return importlib.import_module("scipy.stats")
