"""Scores with confidence intervals: bootstrap, exact tests and Student's t.

Bootstrap intervals are percentile intervals (Efron and Tibshirani 1993, section 13.3): the statistic is computed on 1,000
resamples of the examples, drawn with replacement by a seeded generator, and the 2.5 % and 97.5 % quantiles are the bounds.
The resampling is written here and not taken from `scipy.stats.bootstrap`, which refuses a single example and copies the data
of every resample; sums over resamples are one matrix product.
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


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> ScoreWithCI:
    """The mean of one number per example, with its bootstrap interval.

    Raises:
        UsageError: There are no examples, or a value is not finite.
    """
    column = require_finite(values, "score")[:, None]
    return bootstrap_ratio(column, lambda sums: sums[:, 0] / len(column), seed=seed)


def proportion(values: Sequence[float], *, seed: int = 0) -> ScoreWithCI:
    """The mean of 0/1 outcomes, with its bootstrap interval.

    If all outcomes are equal, the resamples cannot vary, and the interval is the exact binomial one (Clopper and Pearson 1934).

    Raises:
        UsageError: There are no examples, or a value is not finite.
    """
    score = bootstrap_mean(values, seed=seed)
    if set(values) not in ({0.0}, {1.0}):
        return score
    interval = _scipy_stats().binomtest(int(sum(values)), len(values)).proportion_ci(CONFIDENCE_LEVEL, "exact")
    return ScoreWithCI(score.value, float(interval.low), float(interval.high), len(values))


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> ScoreWithCI:
    """The mean of a − b with its paired bootstrap interval.

    Args:
        a: Scores of one system, one per example.
        b: Scores of another system on the same examples.
        seed: Seed of the resamples.

    Raises:
        UsageError: There are no examples, the lengths differ, or a value is not finite.
    """
    check_lengths(a, b)
    return bootstrap_mean(require_finite(a, "first score") - require_finite(b, "second score"), seed=seed)


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


def seed_interval(values: Sequence[float]) -> ScoreWithCI:
    """The mean of runs with different seeds and its Student's t interval: mean ± t · s / √n with n − 1 degrees of freedom.

    A single run has no interval: both bounds are its value.

    Raises:
        UsageError: There are no runs, or a value is not finite.
    """
    n = check_lengths(values)
    scores = require_finite(values, "value")
    mean = float(scores.mean())
    margin = t_quantile(n - 1) * float(scores.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return ScoreWithCI(mean, mean - margin, mean + margin, n)


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


def score_from_resamples(values: np.ndarray, n: int) -> ScoreWithCI:
    """The score of values [1 + R]: the statistic of all n examples, then of each resample."""
    low, high = np.quantile(values[1:], [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return ScoreWithCI(float(values[0]), float(low), float(high), n)


def check_lengths(first: Sequence[object] | np.ndarray, *others: Sequence[object]) -> int:
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


def t_quantile(degrees_of_freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution."""
    return float(importlib.import_module("scipy.special").stdtrit(degrees_of_freedom, (1 + CONFIDENCE_LEVEL) / 2))


def _scipy_stats() -> Any:
    """The module `scipy.stats`, which has no types and takes about a second to import."""
    return importlib.import_module("scipy.stats")
