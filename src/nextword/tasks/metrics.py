"""What a prediction is worth: each task's usual scores, each with its bootstrap interval.

An interval is the percentile bootstrap's (Efron and Tibshirani 1993, section 13.3): the score of 1,000 resamples of the
examples, drawn with replacement, and of these the 2.5 % and 97.5 % quantiles. The draws are seeded.
Shapes: n examples, R resamples, K labels.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nextword.common.errors import MissingDependencyError, UsageError

RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
MAX_DRAWS_IN_MEMORY = 2**20  # draws that are held at once: 8 MB
GENERATION_METRICS = ("chrf", "bleu", "rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval.

    Attributes:
        value: the score on the examples themselves.
        low, high: the interval's ends.
        n: how many examples (or runs) it was measured on.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def classification(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str], *, seed: int = 0
) -> dict[str, Score]:
    """Scores of one label an example: `accuracy`, `macro_f1`, `matthews`, the first two 0 to 1, the last −1 to 1.

    `macro_f1` is the mean F1 of the labels that occur in gold or predicted. `matthews` is Gorodkin (2004)'s R_K, for
    two labels the Matthews correlation; it is 0 where gold or predicted hold one label only. The resamples are
    multinomial draws over the confusion matrix, which is the same as drawing examples.

    Raises:
        UsageError: no examples, not as many predictions as gold labels, or a label that is not among `labels`.
    """
    n = _check_lengths(targets, predictions)
    label_to_id = {label: i for i, label in enumerate(labels)}
    pairs = np.array(
        [
            [_label_id(label_to_id, one, i) for one in pair]
            for i, pair in enumerate(zip(targets, predictions, strict=True))
        ]
    )
    cells, counts = np.unique(pairs, axis=0, return_counts=True)  # the confusion matrix where it is not zero
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    table = np.vstack([counts, draws]).astype(np.float64)  # [1 + R, cells]
    occurring = np.unique(cells)
    true, predicted_mask = cells[:, :1] == occurring, cells[:, 1:] == occurring  # [cells, K]
    hits, t, p = (table @ one.astype(np.float64) for one in (true & predicted_mask, true, predicted_mask))  # [1 + R, K]
    correct = hits.sum(1)
    return {
        "accuracy": _score_from_resamples(correct / n, n),
        "macro_f1": _score_from_resamples(_macro_f1(hits, t + p), n),
        "matthews": _score_from_resamples(_matthews(correct, t, p, n), n),
    }


def multilabel(
    targets: Sequence[Collection[str]], predictions: Sequence[Collection[str]], labels: Sequence[str], *, seed: int = 0
) -> dict[str, Score]:
    """Scores of several labels an example, 0 to 1: `exact_match` (the share of examples whose labels are all right and
    none too many), `micro_f1` (over all decisions), `macro_f1` (mean over the labels that occur in gold or predicted).
    An F1 of nothing to find and nothing found is 0.

    Raises:
        UsageError: no examples, not as many predictions as gold sets, or a label that is not among `labels`.
    """
    n = _check_lengths(targets, predictions)
    label_to_id = {label: i for i, label in enumerate(labels)}
    true, predicted_mask = _multi_hot(targets, label_to_id), _multi_hot(predictions, label_to_id)  # [n, K]
    exact = (true == predicted_mask).all(1, keepdims=True)
    columns = np.hstack([exact, true & predicted_mask, true, predicted_mask]).astype(np.float64)
    sums = _resampled_sums(columns, seed)
    hits, t, p = np.split(sums[:, 1:], 3, axis=1)
    return {
        "exact_match": _score_from_resamples(sums[:, 0] / n, n),
        "micro_f1": _score_from_resamples(_safe_divide(2 * hits.sum(1), (t + p).sum(1)), n),
        "macro_f1": _score_from_resamples(_macro_f1(hits, t + p), n),
    }


def similarity(targets: Sequence[float], predictions: Sequence[float], *, seed: int = 0) -> dict[str, Score]:
    """`pearson` and `spearman` (average ranks for ties, ranked anew in each resample), −1 to 1.

    Constant predictions (or gold scores, or a single example) correlate with nothing: 0.0, never NaN.

    Raises:
        UsageError: no examples, not as many predictions as gold scores, or a number that is not finite.
    """
    n = _check_lengths(targets, predictions)
    a, b = _RankedValues(targets, "gold score"), _RankedValues(predictions, "prediction")
    pearson, spearman = [], []
    for weights in _resample_weights(n, seed):
        varied = a.has_variance(weights) & b.has_variance(weights)
        pearson.append(np.where(varied, _weighted_correlation(weights, a.values[None], b.values[None]), 0.0))
        spearman.append(np.where(varied, _weighted_correlation(weights, a.ranks(weights), b.ranks(weights)), 0.0))
    return {
        "pearson": _score_from_resamples(np.concatenate(pearson), n),
        "spearman": _score_from_resamples(np.concatenate(spearman), n),
    }


def multiple_choice(targets: Sequence[int], predictions: Sequence[int], *, seed: int = 0) -> dict[str, Score]:
    """`accuracy` of multiple choice, 0 to 1.

    Raises:
        UsageError: no examples, or not as many predictions as answers.
    """
    _check_lengths(targets, predictions)
    return {"accuracy": _resampled_mean(np.array([g == p for g, p in zip(targets, predictions, strict=True)]), seed)}


def generation_metrics(
    references: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    metric_names: Sequence[str] = GENERATION_METRICS,
    *,
    seed: int = 0,
) -> dict[str, Score]:
    """Scores of written text against its reference, or several references of one source; all 0 to 100.

    `chrf` (Popović 2015) and `bleu` (Papineni et al. 2002) are sacrebleu's corpus scores with its defaults; what is
    resampled are the counts of each text. `rouge1`, `rouge2` and `rougeL` (Lin 2004) are the means of rouge_score's
    F-measures with its stemmer, of the best reference. rouge_score reads the letters a to z and digits only: for other
    scripts its value is 0, and chrF the score to go by.

    Raises:
        UsageError: no examples, not as many texts as references, a text without reference, or an unknown name.
        MissingExtra: sacrebleu or rouge_score is not installed.
    """
    _check_lengths(references, predictions)
    if unknown := [name for name in metric_names if name not in GENERATION_METRICS]:
        raise UsageError(f"there is no score called {unknown[0]!r}: choose from {', '.join(GENERATION_METRICS)}")
    reference_lists = [[one] if isinstance(one, str) else list(one) for one in references]
    if empty := [i for i, one in enumerate(reference_lists, 1) if not one]:
        raise UsageError(f"text {empty[0]} has no reference: give it one or leave the text out")
    scores = {
        name: _score_from_resamples(_sacrebleu_scores(name, reference_lists, predictions, seed), len(predictions))
        for name in metric_names
        if not name.startswith("rouge")
    }
    if rouges := [name for name in metric_names if name.startswith("rouge")]:
        scores |= {
            name: _resampled_mean(100 * each, seed)
            for name, each in _rouge_scores(rouges, reference_lists, predictions).items()
        }
    return {name: scores[name] for name in metric_names}


def generation_metric_difference(
    references: Sequence[str | Sequence[str]], a: Sequence[str], b: Sequence[str], metric_name: str, *, seed: int = 0
) -> Score:
    """How much the texts a score above the texts b of the same sources by one of `writing`'s scores, the same resamples
    drawn of both. Raises as `writing`."""
    _check_lengths(references, a, b)
    reference_lists = [[one] if isinstance(one, str) else list(one) for one in references]
    first, second = (
        100
        * _resampled_sums(_rouge_scores([metric_name], reference_lists, texts)[metric_name][:, None], seed)[:, 0]
        / len(texts)
        if metric_name.startswith("rouge")
        else _sacrebleu_scores(metric_name, reference_lists, texts, seed)
        for texts in (a, b)
    )
    return _score_from_resamples(first - second, len(a))


def preference(margins: Sequence[float], *, seed: int = 0) -> dict[str, Score]:
    """`preferred`: the share of pairs whose chosen answer is ahead of the rejected one, that is whose margin is above
    zero; 0 to 1, and a tie is not ahead.

    Raises:
        UsageError: no pairs, or a margin that is not finite.
    """
    _check_lengths(margins)
    return {"preferred": _resampled_mean(_require_finite(margins, "margin") > 0, seed)}


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Score:
    """The mean of a − b with its paired interval: a[i] and b[i] are two systems' scores of the same example.

    Raises:
        UsageError: no examples, not as many of one as of the other, or a number that is not finite.
    """
    _check_lengths(a, b)
    return _resampled_mean(_require_finite(a, "first score") - _require_finite(b, "second score"), seed)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Score:
    """The mean of one number an example, with its interval.

    Raises:
        UsageError: no examples, or a number that is not finite.
    """
    _check_lengths(values)
    return _resampled_mean(_require_finite(values, "score"), seed)


def proportion(values: Sequence[float], *, seed: int = 0) -> Score:
    """The mean of what is right (1) and wrong (0), with its interval. Where all are 0, or all 1, resamples cannot vary, and
    the interval is the exact one of a share of n, from 0 to 1 − 0.025^(1/n) or its mirror (Clopper and Pearson 1934).

    Raises:
        UsageError: no examples, or a number that is not finite.
    """
    mean_score, n = bootstrap_mean(values, seed=seed), len(values)
    tail = ((1 - CONFIDENCE_LEVEL) / 2) ** (1 / n)
    if set(values) == {0.0}:
        return Score(0.0, 0.0, 1 - tail, n)
    return Score(1.0, tail, 1.0, n) if set(values) == {1.0} else mean_score


def bootstrap_ratio(columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0) -> Score:
    """A score [R] that is computed from the sums [R, columns] of some numbers an example [n, columns], with its interval.

    Raises:
        UsageError: no examples.
    """
    _check_lengths(columns)
    return _score_from_resamples(statistic(_resampled_sums(columns.astype(np.float64), seed)), len(columns))


def mcnemar_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """How likely two systems that are equally often right differ as much as these do, in either direction; 0 to 1.

    McNemar's exact test: of the examples on which one alone is right, those of either are binomial with 1/2 (McNemar 1947;
    Dietterich 1998, section 3.1). a[i] and b[i] are 1 where a system is right on an example, and 0 where not.

    Raises:
        UsageError: no examples, or not as many of one as of the other.
    """
    _check_lengths(a, b)
    only_first_right = sum(x > y for x, y in zip(a, b, strict=True))
    num_discordant = only_first_right + sum(x < y for x, y in zip(a, b, strict=True))
    fewer = min(only_first_right, num_discordant - only_first_right)
    if 2 * fewer == num_discordant:
        return 1.0
    whole = math.lgamma(num_discordant + 1) - num_discordant * math.log(2)
    tail = sum(math.exp(whole - math.lgamma(k + 1) - math.lgamma(num_discordant - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def noise_floor(values: Sequence[float]) -> float:
    """Below what the difference of two runs stays, 95 times of 100, where nothing but the seed tells them apart: t s √2, with
    Student's t of n − 1 degrees of freedom and s of the scores of n runs.

    Raises:
        UsageError: fewer than two runs, or a score that is not finite.
    """
    n = _check_lengths(values)
    if n < 2:
        raise UsageError("one run has no noise floor: give another of another seed")
    spread = float(_require_finite(values, "score").std(ddof=1))
    return student_t_quantile((1 + CONFIDENCE_LEVEL) / 2, n - 1) * spread * math.sqrt(2)


def seed_interval(values: Sequence[float]) -> Score:
    """The mean of runs with different seeds, and Student's interval mean ± t s/√n, with n − 1 degrees of freedom.
    n is the number of runs; a single run has no interval: low = high = value.

    Raises:
        UsageError: no runs, or a value that is not finite.
    """
    n = _check_lengths(values)
    numbers = _require_finite(values, "value")
    mean = float(numbers.mean())
    half = (
        student_t_quantile((1 + CONFIDENCE_LEVEL) / 2, n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n)
        if n > 1
        else 0.0
    )
    return Score(mean, mean - half, mean + half, n)


def student_t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """The t that a Student variable stays below with a probability of 0.5 or more, for whole degrees of freedom.

    P(|T| < t) is the finite sum of Abramowitz and Stegun (1964), equations 26.7.3 and 26.7.4; halving finds its t.
    """
    if degrees_of_freedom < 1 or not 0.5 <= probability < 1:
        raise UsageError(f"no quantile for probability {probability} and {degrees_of_freedom} degrees of freedom")

    def inside(angle: float) -> float:  # P(|T| < √degrees · tan(angle))
        cosine, odd = math.cos(angle), degrees_of_freedom % 2
        term, total = (cosine if odd else 1.0), 0.0
        for k in range(1 + odd, degrees_of_freedom, 2):
            total += term
            term *= cosine**2 * k / (k + 1)
        return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _sacrebleu_scores(metric_name: str, references: list[list[str]], texts: Sequence[str], seed: int) -> np.ndarray:
    """[1 + R]: sacrebleu's score of the whole, and of resamples of what it counts for each text."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise MissingDependencyError("chrF and BLEU", "scores") from error
    metric: Any = CHRF() if metric_name == "chrf" else BLEU(force=True)  # force: no remark on spaces before full stops
    most = max(map(len, references))
    streams = [[one[i] if i < len(one) else None for one in references] for i in range(most)]
    # sacrebleu's own bootstrap starts from these two methods as well; its public one is slow and tells no ends.
    counts = np.array(metric._extract_corpus_statistics(list(texts), streams), dtype=np.float64)
    sums = _resampled_sums(counts, seed).tolist()
    return np.array([metric._compute_score_from_stats(one).score for one in sums])


def _rouge_scores(metric_names: list[str], references: list[list[str]], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Each text's F-measures [n], 0 to 1."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependencyError("ROUGE", "scores") from error
    scorer = RougeScorer(metric_names, use_stemmer=True)
    each = [scorer.score_multi(one, text) for one, text in zip(references, texts, strict=True)]
    return {name: np.array([one[name].fmeasure for one in each]) for name in metric_names}


class _RankedValues:
    """Numbers that can be ranked again in every resample, without sorting them again."""

    def __init__(self, numbers: Sequence[float], value_name: str):
        values = _require_finite(numbers, value_name)
        values = values / max(float(np.abs(values).max()), 1e-300)  # no sum of squares runs over
        values = values - values.mean()
        self.values = values / max(float(np.abs(values).max()), 1e-300)  # [n]
        distinct, self.value_ids = np.unique(np.asarray(numbers, dtype=np.float64), return_inverse=True)  # [n]
        self.order = np.argsort(self.value_ids, kind="stable")
        self.group_offsets = np.searchsorted(self.value_ids[self.order], np.arange(len(distinct)))

    def _value_counts(self, weights: np.ndarray) -> np.ndarray:
        """[R, distinct values]: how often each value was drawn."""
        return np.add.reduceat(weights[:, self.order], self.group_offsets, axis=1)

    def has_variance(self, weights: np.ndarray) -> np.ndarray:
        """[R]: whether two different values were drawn."""
        return (self._value_counts(weights) > 0).sum(1) > 1

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """[R, n]: the average rank of each value among those drawn."""
        held = self._value_counts(weights)
        return (np.cumsum(held, axis=1) - held + (held + 1) / 2)[:, self.value_ids]


def _weighted_correlation(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[R]: the correlation of a and b, [R or 1, n], with each example counted as often as weights, [R, n], say."""
    n = weights.sum(1, keepdims=True)
    a = a - (weights * a).sum(1, keepdims=True) / n
    b = b - (weights * b).sum(1, keepdims=True) / n
    product, first, second = ((weights * x * y).sum(1) for x, y in ((a, b), (a, a), (b, b)))
    return np.clip(_safe_divide(product, np.sqrt(first) * np.sqrt(second)), -1.0, 1.0)


def _macro_f1(hits: np.ndarray, support_sums: np.ndarray) -> np.ndarray:
    """[R] from [R, K]: hits, and gold plus predicted; a label that does not occur in a resample is not averaged."""
    return _safe_divide(_safe_divide(2 * hits, support_sums).sum(1), (support_sums > 0).sum(1))


def _matthews(correct: np.ndarray, target_counts: np.ndarray, predicted_counts: np.ndarray, n: int) -> np.ndarray:
    """[R]: (c n − Σ p t) / √((n² − Σ p²)(n² − Σ t²)), Gorodkin (2004) as counts."""
    spread = np.sqrt(n**2 - (predicted_counts * predicted_counts).sum(1)) * np.sqrt(
        n**2 - (target_counts * target_counts).sum(1)
    )
    return _safe_divide(correct * n - (predicted_counts * target_counts).sum(1), spread)


def _safe_divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """above / below, and 0 where below is 0."""
    return np.divide(
        numerator,
        denominator,
        out=np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape)),
        where=denominator > 0,
    )


def _resampled_mean(values: np.ndarray, seed: int) -> Score:
    values = values.astype(np.float64)
    return _score_from_resamples(_resampled_sums(values[:, None], seed)[:, 0] / len(values), len(values))


def _resampled_sums(columns: np.ndarray, seed: int) -> np.ndarray:
    """[1 + R, columns] from [n, columns]: the sums over all examples, then over each resample."""
    return np.concatenate([weights @ columns for weights in _resample_weights(len(columns), seed)])


def _resample_weights(n: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of [rows, n], 1 + R rows in all: how often each example counts; all once in the first row."""
    yield np.ones((1, n))
    random = np.random.default_rng(seed)
    block = max(1, MAX_DRAWS_IN_MEMORY // n)
    for start in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - start)
        drawn = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _score_from_resamples(values: np.ndarray, n: int) -> Score:
    """From [1 + R]: the score itself, then that of each resample."""
    low, high = np.quantile(values[1:], [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return Score(float(values[0]), float(low), float(high), n)


def _check_lengths(first: Sequence[object] | np.ndarray, *others: Sequence[object]) -> int:
    if len(first) == 0:
        raise UsageError("there is nothing to score: give one example or more")
    for other in others:
        if len(other) != len(first):
            raise UsageError(f"{len(first)} against {len(other)}: give one prediction for each example")
    return len(first)


def _label_id(label_to_id: dict[str, int], label: str, example_index: int) -> int:
    if label not in label_to_id:
        raise UsageError(
            f"example {example_index + 1} has the label {label!r}, which is none of: {_label_preview(label_to_id)}"
        )
    return label_to_id[label]


def _label_preview(labels: Collection[str]) -> str:
    return ", ".join([*labels][:10]) + (", …" if len(labels) > 10 else "")


def _multi_hot(label_sets: Sequence[Collection[str]], label_to_id: dict[str, int]) -> np.ndarray:
    table = np.zeros((len(label_sets), len(label_to_id)), dtype=bool)
    for i, several in enumerate(label_sets):
        for label in several:
            table[i, _label_id(label_to_id, label, i)] = True
    return table


def _require_finite(numbers: Sequence[float], value_name: str) -> np.ndarray:
    values = np.asarray(numbers, dtype=np.float64)
    if not np.isfinite(values).all():
        i = int(np.argmin(np.isfinite(values)))
        raise UsageError(f"{value_name} {i + 1} is {values[i]}, not a finite number: leave it out or mend it")
    return values
