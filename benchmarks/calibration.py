"""Coverage of every confidence interval, and error rates of every decision, by simulation: ``make calibration``.

    python -m benchmarks.calibration [--draws 5000] [--books FOLDER] [--only NAME] [--cases]

For each interval, samples are drawn from populations whose score is known: small, medium and large, with scores near 0 and 1,
skewed values, rare labels, and dependent units. Coverage is the share of the intervals that contain the score of the
population; it should be 0.95. The printed table is that of docs/evaluation.md. `--books` adds a folder of texts, whose
documents are resampled. `tests/test_calibration.py` checks that no interval in the source is missing here.
"""

import argparse
import bz2
import importlib
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nextword.common import statistics
from nextword.common.statistics import ScoreWithCI
from nextword.evaluation import label_efficiency
from nextword.evaluation.evaluate import compare_models
from nextword.inference.perplexity import MIN_DOCUMENTS
from nextword.pipeline.item_scores import ItemScores
from nextword.tasks import metrics

stats: Any = importlib.import_module("scipy.stats")  # has no type annotations
DRAWS = 5000
MIN_COVERAGE, MAX_COVERAGE, MAX_FALSE = 0.93, 0.98, 0.06
MIN_GIVEN = 0.1  # the share of samples with an interval, below which they are not typical, and coverage is not reported
Interval = tuple[float, float]
BOOKS = ""  # the folder of --books


@dataclass(frozen=True)
class Case:
    """A population and a sample size.

    Attributes:
        name: The population and the sample size.
        truth: The score of the population.
        sample: Draws a sample.
        interval: The program's score of a sample.
        standard: The interval of the method that is usual for such a score.
        continuous: Whether the coverage should not exceed `MAX_COVERAGE` either.
        draws: How many samples, relative to the number asked for.
    """

    name: str
    truth: float
    sample: Callable[[np.random.Generator], Any]
    interval: Callable[[Any], ScoreWithCI]
    standard: Callable[[Any], Interval] | None = None
    continuous: bool = False
    draws: float = 1.0


@dataclass(frozen=True)
class Decision:
    """A statement about a sample, such as "this model is better".

    Attributes:
        name: The population and the sample size.
        true: Whether the statement is true of the population: its frequency is the power, and else the false-positive rate.
        sample: Draws a sample.
        decide: Whether the program makes the statement.
        draws: How many samples, relative to the number asked for.
    """

    name: str
    true: bool
    sample: Callable[[np.random.Generator], Any]
    decide: Callable[[Any], bool]
    draws: float = 1.0


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: What is scored.
        method: The method, and the source of it.
        standard: The usual method, with which the width is compared.
        cases: Its populations.
        functions: The functions of `nextword.common.statistics` that it covers.
    """

    name: str
    method: str
    standard: str
    cases: Callable[[], Iterator[Case | Decision]]
    functions: tuple[str, ...] = ()


# ---------------------------------------------------------------- the usual methods


def wilson(values: np.ndarray) -> Interval:
    result = stats.binomtest(round(float(values.sum())), len(values)).proportion_ci(0.95, "wilson")
    return float(result.low), float(result.high)


def newcombe(groups: tuple[np.ndarray, np.ndarray]) -> Interval:
    (p1, l1, h1), (p2, l2, h2) = ((float(values.mean()), *wilson(values)) for values in groups)
    return p1 - p2 - math.hypot(p1 - l1, h2 - p2), p1 - p2 + math.hypot(h1 - p1, p2 - l2)


def student(values: np.ndarray) -> Interval:
    margin = statistics.t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - margin), float(values.mean() + margin)


def bca(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = 500) -> Interval:
    """The bias-corrected and accelerated bootstrap of a statistic of sums (Efron 1987)."""
    n, total = len(rows), rows.sum(0)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    values, value, left_out = statistic(counts @ rows), statistic(total[None])[0], statistic(total - rows)
    below = np.clip((np.sum(values < value) + 0.5 * np.sum(values == value)) / resamples, 1e-3, 1 - 1e-3)
    bias, deviations = stats.norm.ppf(below), left_out.mean() - left_out
    acceleration = np.sum(deviations**3) / (6 * max(float(np.sum(deviations**2)) ** 1.5, 1e-300))
    z = bias + stats.norm.ppf([0.025, 0.975])
    low, high = np.quantile(values, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


# ---------------------------------------------------------------- populations


def skewed_values() -> dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]]:
    """Distributions of values, and their means."""
    return {
        "normal": (lambda rng, n: rng.normal(size=n), 0.0),
        "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
        "lognormal σ = 1": (lambda rng, n: rng.lognormal(size=n), math.exp(0.5)),
        "t with 3 df": (lambda rng, n: rng.standard_t(3, size=n), 0.0),
    }


def fractions() -> dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]]:
    """Distributions of fractions per example, and their means."""
    return {
        "beta(2, 2)": (lambda rng, n: rng.beta(2, 2, size=n), 0.5),
        "beta(0.5, 5)": (lambda rng, n: rng.beta(0.5, 5, size=n), 0.5 / 5.5),
        "beta(5, 50)": (lambda rng, n: rng.beta(5, 50, size=n), 5 / 55),
        "90 % zeros": (lambda rng, n: np.where(rng.random(n) < 0.9, 0, rng.beta(1, 3, size=n)), 0.025),
    }


def confusion(num_labels: int, accuracy: float, kind: str) -> np.ndarray:
    """Probabilities of target and prediction [K, K]: labels equally frequent, by Zipf's law, or half of them rare."""
    k = np.arange(num_labels)
    accuracies = np.full(num_labels, accuracy)
    frequencies = np.ones(num_labels)
    if kind == "Zipf":
        frequencies = 1 / (1 + k)
        accuracies = np.clip(accuracy + 0.1 * np.linspace(1, -1, num_labels), 0.02, 0.995)
    elif kind == "half rare":
        frequencies = np.where(k < num_labels // 2, 9, 1) / num_labels
        accuracies = np.where(k < num_labels // 2, accuracy, accuracy / 2)
    frequencies = frequencies / frequencies.sum()
    errors = np.tile(frequencies, (num_labels, 1)) * (1 - np.eye(num_labels))
    errors *= ((1 - accuracies) / errors.sum(1))[:, None]
    return frequencies[:, None] * (errors + np.diag(accuracies))


def draw_labels(rng: np.random.Generator, n: int, population: np.ndarray) -> tuple[list[str], list[str]]:
    """n targets and predictions."""
    cells = rng.choice(population.size, size=n, p=population.ravel())
    targets, predictions = np.divmod(cells, len(population))
    return list(map(str, targets)), list(map(str, predictions))


@cache
def generated_texts() -> tuple[list[str], list[str], list[str]]:
    """References of lognormal length, and two systems whose texts keep a share of the words that differs by text."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnoprstuvw"), rng.integers(2, 9))) for _ in range(2000)]
    weights = 1 / np.arange(1, 2001)
    weights /= weights.sum()

    def corrupt(reference: list[str]) -> str:
        keep = rng.beta(4, 2)
        return " ".join(word if rng.random() < keep else str(rng.choice(words, p=weights)) for word in reference)

    references = [list(rng.choice(words, int(rng.lognormal(2.5, 0.5)) + 2, p=weights)) for _ in range(300)]
    return [" ".join(r) for r in references], [corrupt(r) for r in references], [corrupt(r) for r in references]


# ---------------------------------------------------------------- the intervals of scores


def proportions() -> Iterator[Case]:
    for n in (10, 20, 100, 1000):
        for p in (0.02, 0.1, 0.5, 0.9, 0.95, 0.98, 0.99):

            def sample(rng: np.random.Generator, n: int = n, p: float = p) -> np.ndarray:
                return (rng.random(n) < p).astype(float)

            yield Case(f"n = {n}, p = {p}", p, sample, statistics.proportion, wilson)
        yield Case(
            f"n = {n}, half of them ties",
            0.6,
            lambda rng, n=n: np.where(rng.random(n) < 0.5, 0.5, rng.random(n) < 0.7),
            statistics.proportion,
        )


def mean_fractions() -> Iterator[Case]:
    for n in (20, 50, 1000):
        for name, (draw, truth) in fractions().items():
            interval, continuous = statistics.proportion, name != "90 % zeros"
            yield Case(
                f"n = {n}, {name}", truth, lambda rng, n=n, draw=draw: draw(rng, n), interval, student, continuous
            )


def proportion_differences() -> Iterator[Case]:
    for n, m in ((10, 10), (6, 400), (20, 400), (50, 50), (500, 500)):
        for p, q in ((0.5, 0.5), (0.9, 0.9), (0.98, 0.98), (0.9, 0.7)):
            yield Case(
                f"n = {n} and {m}, p = {p} and {q}",
                p - q,
                lambda rng, n=n, m=m, p=p, q=q: ((rng.random(n) < p) * 1.0, (rng.random(m) < q) * 1.0),
                lambda groups: statistics.proportion_difference(*groups),
                newcombe,
            )


def paired_outcomes(rng: np.random.Generator, n: int, p: float, gain: float, agreement: float) -> tuple[Any, Any]:
    """Two systems of accuracies p + gain and p, which share a part of their items' randomness."""
    common = rng.random(n) < agreement
    first, second = rng.random(n), rng.random(n)
    return (np.where(common, second, first) < p + gain) * 1.0, (second < p) * 1.0


def paired_differences() -> Iterator[Case]:
    for n in (10, 20, 100, 1000):
        for p, gain in ((0.5, 0.0), (0.9, 0.05), (0.98, 0.0)):
            for agreement in (0.0, 0.8):
                yield Case(
                    f"n = {n}, p = {p + gain:.2f} and {p}, {agreement:.0%} shared",
                    gain,
                    lambda rng, n=n, p=p, g=gain, a=agreement: paired_outcomes(rng, n, p, g, a),
                    lambda pair: statistics.paired_difference(*pair),
                    lambda pair: student(pair[0] - pair[1]),
                )


def means() -> Iterator[Case]:
    for n in (5, 20, 50, 1000):
        for name, (draw, truth) in skewed_values().items():

            def sample(rng: np.random.Generator, n: int = n, draw: Any = draw) -> np.ndarray:
                return draw(rng, n)

            yield Case(f"n = {n}, {name}", truth, sample, statistics.mean, student, continuous=True)


def means_of_runs() -> Iterator[Case]:
    for n in (2, 3, 5, 10):
        sample = lambda rng, n=n: rng.normal(size=n)  # noqa: E731
        yield Case(f"{n} runs, normal", 0.0, sample, statistics.mean_of_runs, student, continuous=True)


def column_ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def document_bits(rng: np.random.Generator, n: int, spread: float = 0.1, mean: float = 1.5) -> np.ndarray:
    """Bits and bytes of documents of lognormal length [n, 2]: a loss of its own for each, and correlated losses inside it."""
    size = np.ceil(rng.lognormal(8, 0.8, size=n))
    inside = rng.normal(size=n) * np.sqrt(size * 40)  # the sum of an AR(1) sequence over the bytes
    return np.stack([size * mean * (1 + spread * rng.normal(size=n)) + inside, size], axis=1)


def documents() -> Iterator[Case | Decision]:
    def interval(rows: np.ndarray) -> ScoreWithCI:
        score = statistics.ratio_of_sums(rows[:, 0], rows[:, 1])
        return score if len(rows) >= MIN_DOCUMENTS else ScoreWithCI(score.value, n=score.n)

    for n in (MIN_DOCUMENTS, 10, 30, 300):
        yield Case(
            f"n = {n}",
            1.5,
            lambda rng, n=n: document_bits(rng, n),
            interval,
            lambda rows: bca(rows, column_ratio),
            continuous=True,
        )
        if BOOKS:
            rows = books(BOOKS)
            truth, sample = (
                rows[:, 0].sum() / rows[:, 1].sum(),
                lambda rng, n=n, rows=rows: rows[rng.integers(len(rows), size=n)],
            )
            yield Case(
                f"n = {n} real documents",
                truth,
                sample,
                interval,
                lambda rows: bca(rows, column_ratio),
                continuous=True,
            )
    for n, gain in ((MIN_DOCUMENTS, 0.0), (30, 0.0), (30, 0.02), (300, 0.0)):

        def difference(rng: np.random.Generator, n: int = n, gain: float = gain) -> np.ndarray:
            rows = document_bits(rng, n)
            change = rows[:, 1] * 1.5 * (gain + 0.03 * rng.normal(size=n))  # differs by document: 3 % of the loss
            return np.stack([change, rows[:, 1]], axis=1)

        yield Decision(
            f"models differ by {gain:.0%}, n = {n}", gain > 0, difference, lambda rows: excludes(interval(rows), 0)
        )


@cache
def books(folder: str) -> np.ndarray:
    """Bits and bytes of each file of a folder: the size that bzip2 compresses it to stands for the loss of a model."""
    texts = [path.read_bytes() for path in sorted(Path(folder).rglob("*.txt"))]
    return np.array([[8 * len(bz2.compress(text)), len(text)] for text in texts if text], dtype=np.float64)


def excludes(score: ScoreWithCI, value: float) -> bool:
    return score.is_above(value) or score.is_below(value)


def other_sums() -> Iterator[Case]:
    """StereoSet's combined score, and the perplexity of the last words, with values of gamma distribution."""
    for n in (20, 100, 1000):
        for p, q in ((0.6, 0.9), (0.5, 0.98)):
            yield Case(
                f"icat, n = {n}, {p} stereotyped, {q} meaningful",
                true_icat(p, q),
                lambda rng, n=n, p=p, q=q: (rng.random((2, n)) < [[p], [q]]).astype(float),
                lambda pair: ItemScores(dict(zip(("stereotyped", "meaningful"), pair, strict=True))).aggregate("icat"),
                draws=0.4,
            )
        yield Case(
            f"perplexity, n = {n}",
            math.exp(4),
            lambda rng, n=n: rng.gamma(2, 2, size=n),
            lambda nats: ItemScores({"nats": nats}).aggregate("perplexity"),
            continuous=True,
            draws=0.4,
        )


def clusters() -> Iterator[Case]:
    """Log ratios of sentences that share templates and words."""
    for num_templates, num_words in ((6, 1), (20, 1), (6, 6), (8, 12), (30, 6), (50, 20)):
        templates, words = (grid.ravel() for grid in np.mgrid[:num_templates, :num_words])

        def sample(rng: np.random.Generator, templates: Any = templates, words: Any = words) -> np.ndarray:
            by_word = rng.normal(size=words.max() + 1) if words.max() else np.zeros(1)
            gaps = rng.normal(size=templates.max() + 1)[templates] + by_word[words] + 0.5 * rng.normal(size=len(words))
            return np.stack([gaps, np.ones_like(gaps)], axis=1)

        yield Case(
            f"{num_templates} templates × {num_words} words",
            0.0,
            sample,
            lambda rows, t=templates, w=words: statistics.clustered_ratio(rows, column_ratio, t.tolist(), w.tolist()),
            lambda rows: student(rows[:, 0]),
            draws=0.5,
        )


def label_metric(name: str, truth: Callable[[np.ndarray], float]) -> Iterator[Case]:
    for n, num_labels in ((20, 2), (50, 2), (200, 2), (200, 5), (1000, 5), (200, 20), (1000, 20)):
        for kind in ("equal", "Zipf", "half rare"):
            for accuracy in (0.7, 0.97):
                population = confusion(num_labels, accuracy, kind)
                labels = list(map(str, range(num_labels)))
                yield Case(
                    f"n = {n}, {num_labels} labels, {kind}, accuracy {accuracy}",
                    truth(population),
                    lambda rng, n=n, p=population: draw_labels(rng, n, p),
                    lambda pair, labels=labels: metrics.classification(pair[0], pair[1], labels)[name],
                    draws=0.1,
                )


def label_differences() -> Iterator[Case]:
    """Two systems of one quality, whose errors are independent given the label, and one that is better than another."""
    for n, num_labels, accuracies in (
        (50, 2, (0.7, 0.7)),
        (200, 5, (0.7, 0.7)),
        (200, 5, (0.9, 0.8)),
        (1000, 20, (0.7, 0.7)),
    ):
        for name, truth in (("macro_f1", true_macro_f1), ("matthews", true_matthews)):
            first, second = (confusion(num_labels, accuracy, "equal") for accuracy in accuracies)
            labels = list(map(str, range(num_labels)))

            def sample(rng: np.random.Generator, n: int = n, a: Any = first, b: Any = second) -> Any:
                targets, predicted = draw_labels(rng, n, a)
                shares = b / b.sum(1, keepdims=True)
                other = [str(rng.choice(len(b), p=shares[int(target)])) for target in targets]
                return [[[label] for label in values] for values in (targets, predicted, other)]

            yield Case(
                f"{name}, n = {n}, {num_labels} labels, accuracy {accuracies[0]} and {accuracies[1]}",
                truth(first) - truth(second),
                sample,
                lambda sets, labels=labels, name=name: metrics.label_metric_difference(*sets, labels, name),
                continuous=n > 200,
                draws=0.1,
            )


def true_macro_f1(population: np.ndarray) -> float:
    return float((2 * np.diag(population) / (population.sum(0) + population.sum(1))).mean())


def true_matthews(population: np.ndarray) -> float:
    targets, predicted = population.sum(1), population.sum(0)
    spread = math.sqrt((1 - float(targets @ targets)) * (1 - float(predicted @ predicted)))
    return float((np.trace(population) - targets @ predicted) / spread)


def multilabel_scores(name: str) -> Iterator[Case]:
    """Labels of their own rates; a label is found with a rate, and added where it does not belong with another."""
    for n in (20, 100, 1000):
        for recall, false_rate in ((0.6, 0.05), (0.97, 0.002)):
            for rates in (np.full(4, 0.4), np.array([0.5, 0.3, 0.1, 0.05])):
                both, predicted = recall * rates, recall * rates + false_rate * (1 - rates)
                f1 = 2 * both / (rates + predicted)
                micro = 2 * both.sum() / (rates + predicted).sum()
                exact = float(np.prod(rates * recall + (1 - rates) * (1 - false_rate)))
                truth = {"macro_f1": float(f1.mean()), "micro_f1": float(micro), "exact_match": exact}[name]

                def sample(
                    rng: np.random.Generator, n: int = n, rates: Any = rates, r: float = recall, f: float = false_rate
                ) -> tuple[list[set[str]], list[set[str]]]:
                    is_target = rng.random((n, 4)) < rates
                    is_predicted = rng.random((n, 4)) < np.where(is_target, r, f)
                    first, second = (
                        [{"abcd"[j] for j in np.flatnonzero(row)} for row in table]
                        for table in (is_target, is_predicted)
                    )
                    return first, second

                yield Case(
                    f"n = {n}, recall {recall}, {'rare labels' if rates[3] < 0.1 else 'frequent labels'}",
                    truth,
                    sample,
                    lambda pair: metrics.multilabel(pair[0], pair[1], "abcd")[name],
                    draws=0.2,
                )


def correlated(rng: np.random.Generator, n: int, rho: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = rng.normal(size=(2, n))
    y = rho * x + math.sqrt(1 - rho**2) * y
    if kind == "t with 5 df":
        scale = np.sqrt(rng.chisquare(5, size=n) / 5)
        return x / scale, y / scale
    return (np.clip(np.round(1.2 * x + 2.5), 0, 5), y) if kind == "scores 0 to 5" else (x, y)


@cache
def true_correlations(rho: float, kind: str) -> dict[str, float]:
    x, y = correlated(np.random.default_rng(0), 400_000, rho, kind)
    ranks = stats.rankdata(x), stats.rankdata(y)
    return {"pearson": float(np.corrcoef(x, y)[0, 1]), "spearman": float(np.corrcoef(*ranks)[0, 1])}


def correlations(name: str) -> Iterator[Case]:
    for n in (10, 20, 50, 200):
        for kind in ("normal", "t with 5 df", "scores 0 to 5"):
            for rho in (0.0, 0.6, 0.9, 0.98):
                yield Case(
                    f"n = {n}, {kind}, ρ = {rho}",
                    true_correlations(rho, kind)[name],
                    lambda rng, n=n, rho=rho, kind=kind: correlated(rng, n, rho, kind),
                    lambda pair: metrics.similarity(*pair)[name],
                    lambda pair: fisher(pair, name),
                    continuous=True,
                    draws=0.4,
                )


def fisher(pair: tuple[np.ndarray, np.ndarray], name: str) -> Interval:
    x, y = pair if name == "pearson" else map(stats.rankdata, pair)
    z, margin = math.atanh(float(np.clip(np.corrcoef(x, y)[0, 1], -0.999999, 0.999999))), 1.96 / math.sqrt(len(x) - 3)
    return math.tanh(z - margin), math.tanh(z + margin)


def generation_scores(difference: bool) -> Iterator[Case]:
    references, *systems = generated_texts()
    for name in metrics.GENERATION_METRICS:
        columns, statistic = metrics._generation_statistic(name, references, systems[0])
        bounds = None if name.startswith("rouge") or difference else (0, 100)
        if difference:
            other, _ = metrics._generation_statistic(name, references, systems[1])
            columns = np.hstack([columns, other])
            function = lambda sums, f=statistic, c=other.shape[1]: f(sums[:, :c]) - f(sums[:, c:])  # noqa: E731
        else:
            function = statistic
        for n in (20, 100):
            yield Case(
                f"{name}, n = {n}",
                float(function(columns.sum(0, keepdims=True))[0]),
                lambda rng, n=n, columns=columns: columns[rng.integers(len(columns), size=n)],
                lambda rows, f=function, b=bounds: statistics.statistic_of_sums(rows, f, bounds=b),
                continuous=True,
                draws=0.2 if n > 20 else 1,
            )


def true_icat(p: float, q: float) -> float:
    return q * min(p, 1 - p) / 0.5


# ---------------------------------------------------------------- decisions


def chance() -> Iterator[Decision]:
    for n in (20, 150, 1000):
        for p, gain in ((0.25, 0.0), (0.5, 0.0), (0.5, 0.1)):
            yield Decision(
                f"n = {n}, chance {p}, accuracy {p + gain}",
                gain > 0,
                lambda rng, n=n, p=p + gain: (rng.random(n) < p) * 1.0,
                lambda values, p=p: excludes(statistics.proportion(values), p),
            )


def model_comparisons() -> Iterator[Decision]:
    for n in (20, 100, 1000):
        for p, gain in ((0.5, 0.0), (0.95, 0.0), (0.5, 0.1)):
            for agreement in (0.0, 0.8):
                yield Decision(
                    f"n = {n}, accuracies {p + gain} and {p}, {agreement:.0%} shared",
                    gain > 0,
                    lambda rng, n=n, p=p, g=gain, a=agreement: paired_outcomes(rng, n, p, g, a),
                    lambda pair: compare_models(
                        "acc", ItemScores({"acc": pair[0]}), ItemScores({"acc": pair[1]}), "other"
                    )["real"],
                    draws=0.2,
                )


def seed_differences() -> Iterator[Decision]:
    for n in (2, 3, 5):
        for gain in (0.0, 5.0):
            yield Decision(
                f"{n} runs, difference of {gain:.0f} standard deviations",
                gain > 0,
                lambda rng, n=n, gain=gain: rng.normal(size=n + 1) + gain * (np.arange(n + 1) == n),
                lambda scores: abs(scores[0] - scores[-1]) > statistics.noise_floor(scores[:-1]),
            )


def group_differences() -> Iterator[Decision]:
    for n, m in ((6, 400), (20, 400), (50, 400), (100, 100)):
        for p, q in ((0.9, 0.9), (0.95, 0.95), (0.98, 0.98), (0.9, 0.7)):
            yield Decision(
                f"n = {n} and {m}, rates {p} and {q}",
                p != q,
                lambda rng, n=n, m=m, p=p, q=q: ((rng.random(n) < p) * 1.0, (rng.random(m) < q) * 1.0),
                lambda groups: excludes(statistics.proportion_difference(*groups), 0),
            )


def template_gaps() -> Iterator[Decision]:
    for case in clusters():
        decide = lambda rows, interval=case.interval: excludes(interval(rows), 0)  # noqa: E731
        yield Decision(case.name, False, case.sample, decide, draws=0.5)


def label_ratios() -> Iterator[Decision]:
    for counts in ((32, 128, 512), (32, 128, 512, 2048, 5000)):
        for seeds in (2, 3, 5):
            for slope, shift in ((0.0, 1), (0.05, 1), (0.05, 4)):

                def sample(
                    rng: np.random.Generator,
                    counts: Any = counts,
                    seeds: int = seeds,
                    slope: float = slope,
                    shift: int = shift,
                ) -> list[label_efficiency.StudyRun]:
                    def score(n: int, pretrained: bool) -> float:
                        return (
                            slope * math.log((shift if pretrained else 1) * n) + 0.02 * (n / 32) ** -0.25 * rng.normal()
                        )

                    return [
                        label_efficiency.StudyRun(n, n, counts[-1], seed, arm, "", "", score(n, arm), 0.0, {})
                        for n in counts
                        for arm in (True, False)
                        for seed in range(seeds)
                    ]

                yield Decision(
                    f"{len(counts)} numbers of labels, {seeds} seeds, {'flat' if not slope else f'ratio {shift}'}",
                    shift > 1,
                    sample,
                    lambda runs: label_efficiency.equivalent_label_ratio(runs)["gain"] is not None,
                    draws=0.02,
                )


LINEARIZED = "infinitesimal jackknife (Efron 1982)"
EFFECTIVE = f"{LINEARIZED}, effective sample size (Dean and Pagano 2015)"
HALL = "Student's t joined with Hall (1992)"
ROWS = [
    Row("accuracy and other proportions", "Agresti and Coull (1998)", "Wilson", proportions, ("proportion",)),
    Row("means of fractions per example", HALL, "Student's t", mean_fractions, ("proportion",)),
    Row(
        "difference of two groups",
        "Newcombe (1998), method 10, of two Agresti–Coull intervals",
        "Newcombe",
        proportion_differences,
        ("proportion_difference",),
    ),
    Row(
        "paired difference of outcomes",
        "Agresti and Min (2005)",
        "Student's t",
        paired_differences,
        ("paired_difference",),
    ),
    Row("means of examples", f"{HALL}, from 20 examples on", "Student's t", means, ("mean", "statistic_of_sums")),
    Row("means of runs of several seeds", "Student's t", "Student's t", means_of_runs, ("mean_of_runs", "t_quantile")),
    Row(
        "ratios over documents",
        "jackknife (Cochran 1977), degrees of freedom of Bell and McCaffrey (2002), from 5 documents on",
        "BCa",
        documents,
        ("ratio_of_sums",),
    ),
    Row(
        "templates and words",
        "jackknife, two-way clusters (Cameron, Gelbach and Miller 2011)",
        "Student's t",
        clusters,
        ("clustered_ratio",),
    ),
    Row("macro-F1", EFFECTIVE, "", lambda: label_metric("macro_f1", true_macro_f1), ("statistic_of_sums",)),
    Row("Matthews correlation", EFFECTIVE, "", lambda: label_metric("matthews", true_matthews), ("statistic_of_sums",)),
    Row(
        "difference of macro-F1 and Matthews correlation",
        f"{LINEARIZED}; {HALL}",
        "",
        label_differences,
        ("statistic_of_sums",),
    ),
    Row("multi-label micro-F1", EFFECTIVE, "", lambda: multilabel_scores("micro_f1")),
    Row("multi-label macro-F1", EFFECTIVE, "", lambda: multilabel_scores("macro_f1")),
    Row("multi-label exact match", "Agresti and Coull (1998)", "", lambda: multilabel_scores("exact_match")),
    Row(
        "Pearson correlation", "Fisher's z, the larger of two variances", "Fisher's z", lambda: correlations("pearson")
    ),
    Row(
        "Spearman correlation",
        "Bonett and Wright (2000), the larger of two variances",
        "Fisher's z",
        lambda: correlations("spearman"),
    ),
    Row("chrF, BLEU, ROUGE", f"{EFFECTIVE}; ROUGE: {HALL}", "", lambda: generation_scores(False)),
    Row("difference of chrF, BLEU, ROUGE", f"{LINEARIZED}; {HALL}", "", lambda: generation_scores(True)),
    Row("icat and perplexity", f"{LINEARIZED}; {HALL}", "", other_sums),
    Row("decision: above or below chance", "Agresti and Coull (1998)", "", chance),
    Row(
        "decision: better than another model",
        "Agresti and Min (2005) and McNemar's exact test",
        "",
        model_comparisons,
        ("mcnemar_p_value",),
    ),
    Row("decision: more than the seed explains", "Student's t", "", seed_differences, ("noise_floor",)),
    Row("decision: groups differ", "Newcombe (1998), method 10, of two Agresti–Coull intervals", "", group_differences),
    Row("decision: gap between words of groups", "Cameron, Gelbach and Miller (2011)", "", template_gaps),
    Row(
        "decision: pre-training saves labels", "isotonic regression, interval over seeds and examples", "", label_ratios
    ),
]
# The functions outside `nextword.common.statistics` that make an interval or a decision, and the rows that it belongs to. Those
# without a row only read or pass on an interval that was made elsewhere.
DECISION_FUNCTIONS = {"mcnemar_p_value", "noise_floor", "t_quantile"}
LABEL_DIFFERENCE = "difference of macro-F1 and Matthews correlation"
PROPORTION, RATIO = ("accuracy and other proportions",), ("ratios over documents",)
CALLERS: dict[str, tuple[str, ...]] = {
    "audit.bias._audit_winobias": PROPORTION,
    "audit.bias._audit_winogender": ("paired difference of outcomes",),
    "audit.bias.clustered_score": ("templates and words", "decision: gap between words of groups"),
    "audit.bias._occupation_findings": ("means of examples", "Pearson correlation", "Spearman correlation"),
    "audit.corpus.contamination": PROPORTION,
    "audit.fairness._flip_finding": PROPORTION,
    "audit.fairness._rate_findings": (*PROPORTION, "difference of two groups", "decision: groups differ"),
    "audit.fairness.audit_template_flips": ("paired difference of outcomes",),
    "audit.memorization._copied_share": (*PROPORTION, "means of fractions per example"),
    "audit.memorization.extractable_passages": PROPORTION,
    "common.results.bits_per_byte": (),
    "common.results.score": (),
    "evaluation.evaluate._compare": ("decision: more than the seed explains",),
    "evaluation.evaluate.compare_models": ("decision: better than another model",),
    "evaluation.evaluate.score_difference": ("paired difference of outcomes", "difference of chrF, BLEU, ROUGE"),
    "evaluation.label_efficiency.equivalent_label_ratio": ("decision: pre-training saves labels",),
    "evaluation.label_efficiency.interval": ("means of runs of several seeds",),
    "evaluation.label_efficiency.run_cell": ("decision: pre-training saves labels",),
    "evaluation.label_efficiency.summarize": ("means of runs of several seeds",),
    "evaluation.lm_eval_adapter._summarize_task": PROPORTION,
    "inference.perplexity._sampling_margin": RATIO,
    "inference.perplexity.bits_per_byte": RATIO,
    "pipeline.evaluators._standard_error": (),
    "pipeline.item_scores._bits_per_byte": RATIO,
    "pipeline.item_scores._repetition_scores": ("means of fractions per example",),
    "pipeline.item_scores.aggregate": (*PROPORTION, "icat and perplexity", "decision: above or below chance"),
    "reporting.run_data.parse_score": (),
    "tasks.metrics._correlation": ("Pearson correlation", "Spearman correlation"),
    "tasks.metrics._label_scores": ("macro-F1", "Matthews correlation"),
    "tasks.metrics.classification": (*PROPORTION, "macro-F1", "Matthews correlation"),
    "tasks.metrics.generation_metric_difference": ("difference of chrF, BLEU, ROUGE",),
    "tasks.metrics.generation_metrics": ("chrF, BLEU, ROUGE",),
    "tasks.metrics.label_metric_difference": ("paired difference of outcomes", LABEL_DIFFERENCE),
    "tasks.metrics.multilabel": ("multi-label micro-F1", "multi-label macro-F1", "multi-label exact match"),
    "tasks.metrics.multiple_choice": PROPORTION,
    "tasks.metrics.preference": PROPORTION,
    "tasks.metrics.score": ("macro-F1", "Matthews correlation", "multi-label micro-F1"),
}


# ---------------------------------------------------------------- the simulation


@dataclass(frozen=True)
class Result:
    """The frequencies of a case: of intervals that contain the truth, or of statements; and the relative width."""

    case: str
    rate: float
    draws: int
    given: float = 1.0
    width: float | None = None
    continuous: bool = False
    true: bool | None = None

    @property
    def error(self) -> float:
        """The standard error of the rate."""
        return math.sqrt(self.rate * (1 - self.rate) / max(1, round(self.draws * self.given)))

    @property
    def fails(self) -> bool:
        """Whether the rate is outside of the limits by more than two standard errors."""
        if self.true is not None:
            return not self.true and self.rate - 2 * self.error > MAX_FALSE
        too_high = self.continuous and self.rate - 2 * self.error > MAX_COVERAGE
        return self.given >= MIN_GIVEN and (too_high or self.rate + 2 * self.error < MIN_COVERAGE)


def simulate(row: Row, case: Case | Decision, draws: int) -> Result:
    rng = np.random.default_rng(zlib.crc32(f"{row.name} {case.name}".encode()))
    draws = max(20, round(draws * case.draws))
    if isinstance(case, Decision):
        return Result(
            case.name, float(np.mean([case.decide(case.sample(rng)) for _ in range(draws)])), draws, true=case.true
        )
    covered = given = 0
    widths, standard_widths = [], []
    for i in range(draws):
        sample = case.sample(rng)
        score = case.interval(sample)
        if score.low is None or score.high is None:
            continue
        given += 1
        covered += score.low <= case.truth <= score.high
        if case.standard is not None and i < 100:
            low, high = case.standard(sample)
            widths.append(score.high - score.low)
            standard_widths.append(high - low)
    width = float(np.sum(widths) / np.sum(standard_widths)) if np.sum(standard_widths) > 0 else None
    return Result(case.name, covered / max(1, given), draws, given / draws, width, case.continuous)


@cache
def cases_of(row: int, folder: str) -> list[Case | Decision]:
    globals()["BOOKS"] = folder
    return list(ROWS[row].cases())


def simulate_case(job: tuple[int, int, int, str]) -> tuple[int, Result]:
    row, case, draws, folder = job
    return row, simulate(ROWS[row], cases_of(row, folder)[case], draws)


def table(results: dict[int, list[Result]]) -> Iterator[str]:
    """The table of docs/evaluation.md."""
    yield "| figure | method | cases | lowest and highest coverage | lowest in | no interval in | width |"
    yield "|---|---|---|---|---|---|---|"
    for i, row_results in results.items():
        given = [r for r in row_results if r.true is None and r.given >= MIN_GIVEN]
        if not given:
            continue
        low, high = min(given, key=lambda r: r.rate), max(given, key=lambda r: r.rate)
        widths = [r.width for r in given if r.width is not None]
        width = f"{np.median(widths):.2f} × {ROWS[i].standard}" if widths else ""
        without = sum(r.true is None and r.given < MIN_GIVEN for r in row_results)
        yield (
            f"| {ROWS[i].name} | {ROWS[i].method} | {len(given) + without} "
            f"| {low.rate:.3f} (± {low.error:.3f}) to {high.rate:.3f} | {low.case} | {without or ''} | {width} |"
        )
    yield ""
    yield "| decision | method | cases | highest false-positive rate | in | power |"
    yield "|---|---|---|---|---|---|"
    for i, row_results in results.items():
        false, true = ([r for r in row_results if r.true is truth] for truth in (False, True))
        if false:
            worst, power = max(false, key=lambda r: r.rate), "; ".join(f"{r.rate:.2f}: {r.case}" for r in true[-1:])
            name = ROWS[i].name.removeprefix("decision: ")
            yield (
                f"| {name} | {ROWS[i].method} | {len(false)} "
                f"| {worst.rate:.3f} (± {worst.error:.3f}) | {worst.case} | {power} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="samples of each case; fewer of those that take long")
    parser.add_argument("--books", default="", help="a folder of texts, whose files are resampled as documents")
    parser.add_argument("--only", default="", help="part of the name of the rows to simulate")
    parser.add_argument("--cases", action="store_true", help="print every case")
    arguments = parser.parse_args()
    chosen = [i for i, row in enumerate(ROWS) if arguments.only in row.name]
    jobs = [(i, j, arguments.draws, arguments.books) for i in chosen for j in range(len(cases_of(i, arguments.books)))]
    results: dict[int, list[Result]] = {i: [] for i in chosen}
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for i, result in pool.map(simulate_case, jobs, chunksize=4):
            results[i].append(result)
            if arguments.cases or result.fails:
                flag = "OUTSIDE " if result.fails else ""
                print(f"{flag}{ROWS[i].name}: {result}", file=sys.stderr, flush=True)
    print("\n".join(table(results)))
    sys.exit(any(result.fails for row_results in results.values() for result in row_results))


if __name__ == "__main__":
    main()
