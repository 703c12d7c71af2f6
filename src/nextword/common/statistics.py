"""Scores with 95 % confidence intervals.

- Proportions have Wilson's score interval, and differences of two independent proportions Newcombe's hybrid score interval:
  both hold near 0 and 1 and for small samples, where a bootstrap has no width.
- Means, and paired differences, have Student's t interval.
- Other statistics have percentile bootstrap intervals (Efron and Tibshirani 1993, section 13.3): the statistic is computed on
  1,000 resamples of the examples, drawn with replacement by a seeded generator, and the 2.5 % and 97.5 % quantiles are the
  bounds. The resampling is written here and not taken from `scipy.stats.bootstrap`, which refuses a single example and copies
  the data of every resample; sums over resamples are one matrix product.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nextword.common.errors import UsageError

NUM_RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
MAX_DRAWS_IN_MEMORY = 2**20  # 8 MB of indices


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

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields, as JSON stores them."""
        return asdict(self)


def mean(values: Sequence[float] | np.ndarray) -> ScoreWithCI:
    """The mean of one number per example, with Student's t interval. A single example has no interval.

    Raises:
        UsageError: There are no examples, or a value is not finite.
    """
    n, column = check_lengths(values), require_finite(values, "score")
    center = float(column.mean())
    if n == 1:
        return ScoreWithCI(center, n=n)
    margin = t_quantile(n - 1) * float(column.std(ddof=1)) / math.sqrt(n)
    return ScoreWithCI(center, center - margin, center + margin, n)


def proportion(values: Sequence[float] | np.ndarray) -> ScoreWithCI:
    """The mean of numbers between 0 and 1, with Wilson's score interval (Wilson 1927).

    The interval is that of 0/1 outcomes; values between them, such as 0.5 for a tie, vary less, so that it is conservative.

    Raises:
        UsageError: There are no examples, or a value is not finite.
    """
    n, p = check_lengths(values), float(require_finite(values, "score").mean())
    z = t_quantile(math.inf)
    center, spread = p + z**2 / (2 * n), z * math.sqrt(max(0.0, p * (1 - p)) / n + (z / (2 * n)) ** 2)
    low, high = (center - spread) / (1 + z**2 / n), (center + spread) / (1 + z**2 / n)
    return ScoreWithCI(p, min(p, max(0.0, low)), max(p, min(1.0, high)), n)


def proportion_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> ScoreWithCI:
    """The difference of the proportions of two groups of examples, with Newcombe's hybrid score interval.

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10. n is the size
    of the smaller group.

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
    """The mean of a − b with Student's t interval.

    For scores between 0 and 1, one half of an example is added to each of the two discordant outcomes, and one whole to the
    others (Agresti and Min 2005), so that the interval holds if few or no examples differ.

    Args:
        a: Scores of one system, one per example.
        b: Scores of another system on the same examples.

    Raises:
        UsageError: There are no examples, the lengths differ, or a value is not finite.
    """
    n = check_lengths(a, b)
    first, second = require_finite(a, "first score"), require_finite(b, "second score")
    differences = first - second
    if min(first.min(), second.min()) < 0 or max(first.max(), second.max()) > 1:
        return mean(differences)
    center, square = differences.sum() / (n + 2), (np.square(differences).sum() + 1) / (n + 2)
    margin = t_quantile(n + 1) * math.sqrt(max(0.0, square - center**2) / (n + 2))
    value, low, high = float(differences.mean()), max(-1.0, float(center - margin)), min(1.0, float(center + margin))
    return ScoreWithCI(value, min(value, low), max(value, high), n)


def bootstrap_ratio(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0
) -> ScoreWithCI:
    """A statistic of column sums, such as a ratio of two sums, with its bootstrap interval.

    Args:
        columns: Numbers per example [n, columns].
        statistic: Maps sums [R, columns] to the statistic [R].
        seed: Seed of the resamples.

    Raises:
        UsageError: There are no examples.
    """
    check_lengths(columns)
    return score_from_resamples(statistic(resampled_sums(columns.astype(np.float64), seed)), len(columns))


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


def resample_indices(n: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Bootstrap resamples as blocks of example indices [rows, n], with `NUM_RESAMPLES` rows in total."""
    rng = np.random.default_rng(seed)
    rows = max(1, MAX_DRAWS_IN_MEMORY // n)
    for start in range(0, NUM_RESAMPLES, rows):
        yield rng.integers(n, size=(min(rows, NUM_RESAMPLES - start), n))


def resampled_sums(columns: np.ndarray, seed: int = 0) -> np.ndarray:
    """Column sums [1 + R, columns] of [n, columns]: over all examples first, then over each resample."""
    n = len(columns)
    sums = [columns.sum(0, keepdims=True)]
    for indices in resample_indices(n, seed):
        rows = len(indices)
        cells = (indices + n * np.arange(rows)[:, None]).ravel()
        counts = np.bincount(cells, minlength=rows * n).reshape(rows, n)  # how often each example was drawn
        sums.append(counts.astype(np.float64) @ columns)
    return np.concatenate(sums)


def score_from_resamples(values: np.ndarray, n: int, posterior: np.ndarray | None = None) -> ScoreWithCI:
    """The score of values [1 + R]: the statistic of all n examples, then of each resample.

    With draws of the statistic from a posterior [R], the interval is the union of both.
    """
    probabilities = [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2]
    low, high = np.quantile(values[1:], probabilities)
    if posterior is not None:
        posterior_low, posterior_high = np.quantile(posterior, probabilities)
        low, high = min(low, posterior_low), max(high, posterior_high)
    return ScoreWithCI(float(values[0]), float(low), float(high), n)


def posterior_sums(rows: np.ndarray, weights: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Weighted column sums [R, columns] of rows [m, columns], with weights from a Dirichlet distribution times n.

    With weight 1 for each example, this is the Bayesian bootstrap (Rubin 1981); rows of small weights are a prior.
    """
    rng = np.random.default_rng(seed)
    block = max(1, MAX_DRAWS_IN_MEMORY // len(rows))
    sums: list[np.ndarray] = []
    for start in range(0, NUM_RESAMPLES, block):
        draws = rng.standard_gamma(weights, size=(min(block, NUM_RESAMPLES - start), len(rows)))
        sums.append(n * draws @ rows / draws.sum(1, keepdims=True))
    return np.concatenate(sums)


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
