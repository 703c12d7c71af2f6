"""Metrics and statistics: equal to the reference libraries, on the examples and on every resample."""

import importlib
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from nextword.common import statistics
from nextword.common.errors import MissingDependencyError, UsageError
from nextword.common.statistics import (
    ScoreWithCI,
    bootstrap_ratio,
    clustered_ratio,
    mcnemar_p_value,
    mean,
    noise_floor,
    paired_difference,
    proportion,
    proportion_difference,
    resample_indices,
)
from nextword.tasks.metrics import (
    MIN_CORRELATED,
    classification,
    distinct_n,
    generation_metric_difference,
    generation_metrics,
    multilabel,
    multiple_choice,
    preference,
    repeated_ngram_fraction,
    similarity,
    split_words,
)

# The reference libraries, which have no type annotations.
sklearn_metrics: Any = importlib.import_module("sklearn.metrics")
stats: Any = importlib.import_module("scipy.stats")

LABELS = ["a", "b", "c", "d"]
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40)
LABEL_SETS = st.frozensets(st.sampled_from(LABELS))
TEXT = st.text("abcde éß.,1日", max_size=30)
TIED_VALUES = st.integers(-4, 4).map(lambda x: x / 2)
NUM_RESAMPLES = 20

REFERENCES = [
    "The cat sat on the mat.",
    ["A dog runs home.", "The dog is running home."],
    "It is raining in Dakar, again!",
    ["Nothing of it is shared", "Two", "Three references are here"],
    "Je ne suis pas là.",
]
TEXTS = ["A cat sat on a mat.", "The dog runs home.", "", "Three references are here", "Je ne suis pas la ."]


def approx(value: float) -> object:
    return pytest.approx(value, abs=1e-9)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[np.ndarray]]:
    """Reduces the number of resamples; returns the example indices of each."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", NUM_RESAMPLES)

    def indices(n: int, seed: int) -> list[np.ndarray]:
        resamples = np.concatenate([*resample_indices(n, seed)])
        assert resamples.shape == (NUM_RESAMPLES, n)
        return list(resamples)

    return indices


def check_score(score: ScoreWithCI, resamples: list[np.ndarray], metric: Callable[[np.ndarray], float]) -> None:
    """The value is the metric of all examples; the bounds are quantiles of the metric of the resamples."""
    assert score.value == approx(metric(np.arange(len(resamples[0]))))
    low, high = np.quantile([metric(indices) for indices in resamples], [0.025, 0.975])
    assert (score.low, score.high) == (approx(float(low)), approx(float(high)))


# ---------------------------------------------------------------- labels


@settings(deadline=None)
@given(PAIRS)
def test_classification_equals_sklearn(pairs):
    targets, predictions = [t for t, _ in pairs], [p for _, p in pairs]
    scores = classification(targets, predictions, LABELS)
    assert scores["accuracy"].value == approx(sklearn_metrics.accuracy_score(targets, predictions))
    assert scores["macro_f1"].value == approx(sklearn_metrics.f1_score(targets, predictions, average="macro"))
    if len({*targets, *predictions}) > 1:  # scikit-learn warns about a single label
        assert scores["matthews"].value == approx(sklearn_metrics.matthews_corrcoef(targets, predictions))
    else:
        assert scores["matthews"].value == 0.0
    for name, score in scores.items():
        assert score.n == len(pairs)
        if score.low is None or score.high is None:
            assert name == "macro_f1", "its rare labels have no interval"
        else:
            assert -1 <= score.low <= score.value <= score.high <= 1


def test_classification_intervals_equal_those_of_resampled_examples():
    """Draws from the confusion matrix are draws of examples: the bounds agree within the noise of 1,000 draws."""
    rng = np.random.default_rng(1)
    targets = rng.choice(LABELS, 200, p=[0.5, 0.3, 0.15, 0.05])
    predictions = np.where(rng.random(200) < 0.7, targets, rng.choice(LABELS, 200))
    scores = classification(targets.tolist(), predictions.tolist(), LABELS)
    resamples = [rng.integers(200, size=200) for _ in range(400)]
    reference: dict[str, Callable[[np.ndarray], float]] = {
        "accuracy": lambda i: float(sklearn_metrics.accuracy_score(targets[i], predictions[i])),
        "macro_f1": lambda i: float(sklearn_metrics.f1_score(targets[i], predictions[i], average="macro")),
        "matthews": lambda i: float(sklearn_metrics.matthews_corrcoef(targets[i], predictions[i])),
    }
    for name, metric in reference.items():
        values = np.array([metric(i) for i in resamples])
        assert scores[name].low == pytest.approx(np.quantile(values, 0.025), abs=0.6 * values.std())
        assert scores[name].high == pytest.approx(np.quantile(values, 0.975), abs=0.6 * values.std())


def multi_hot(label_sets) -> np.ndarray:
    return np.array([[name in labels for name in LABELS] for labels in label_sets], dtype=int)


@settings(deadline=None)
@given(st.lists(st.tuples(LABEL_SETS, LABEL_SETS), min_size=1, max_size=20))
def test_multilabel_equals_sklearn(pairs):
    targets, predictions = [t for t, _ in pairs], [p for _, p in pairs]
    scores = multilabel(targets, predictions, LABELS)
    true, predicted = multi_hot(targets), multi_hot(predictions)
    occurring = [i for i in range(len(LABELS)) if true[:, i].any() or predicted[:, i].any()]
    assert scores["exact_match"].value == approx(sklearn_metrics.accuracy_score(true, predicted))
    micro = sklearn_metrics.f1_score(true, predicted, average="micro", zero_division=0)
    assert scores["micro_f1"].value == approx(micro)
    settings = {"labels": occurring, "average": "macro", "zero_division": 0}
    macro = sklearn_metrics.f1_score(true, predicted, **settings) if occurring else 0.0
    assert scores["macro_f1"].value == approx(macro)


def test_f1_of_rare_labels_has_no_interval():
    labels = [str(i) for i in range(10)]
    many, few = ([str(i % 10) for i in range(n)] for n in (100, 30))
    assert classification(many, many, labels)["macro_f1"].low is not None
    assert classification(few, few, labels)["macro_f1"].low is None


def draw_labels(rng: np.random.Generator, n: int, probabilities: np.ndarray) -> tuple[list[str], list[str]]:
    """n targets and predictions from a confusion matrix [K, K] of probabilities."""
    cells = rng.choice(probabilities.size, size=n, p=probabilities.ravel())
    targets, predictions = ([LABELS[i] for i in side] for side in np.divmod(cells, len(probabilities)))
    return targets, predictions


@pytest.mark.parametrize(("n", "accuracy"), [(40, 0.7), (40, 0.97), (200, 0.7), (200, 0.97)])
@pytest.mark.parametrize("rare", [False, True])
def test_intervals_of_classification_contain_the_metric_of_the_population(n, accuracy, rare, monkeypatch):
    monkeypatch.setattr("nextword.tasks.metrics.NUM_RESAMPLES", 300)
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 300)
    rng, num_draws = np.random.default_rng(n), 120
    targets = np.array([0.12, 0.44, 0.44]) if rare else np.full(3, 1 / 3)
    population = targets[:, None] * ((1 - accuracy) / 2 + (accuracy - (1 - accuracy) / 2) * np.eye(3))
    f1 = 2 * np.diag(population) / (population.sum(0) + population.sum(1))
    covered: dict[str, int] = dict.fromkeys(("accuracy", "macro_f1", "matthews"), 0)
    correct, predicted = np.trace(population), population.sum(0)
    spread = math.sqrt((1 - (targets**2).sum()) * (1 - (predicted**2).sum()))
    truth: dict[str, float] = {
        "accuracy": accuracy,
        "macro_f1": f1.mean(),
        "matthews": (correct - targets @ predicted) / spread,
    }
    for _ in range(num_draws):
        scores = classification(*draw_labels(rng, n, population), LABELS)
        for name, value in truth.items():
            low, high = scores[name].low, scores[name].high
            covered[name] += low is not None and high is not None and low <= value <= high
    assert all(count >= 0.88 * num_draws for count in covered.values()), covered  # 0.95 less three standard errors


def test_multilabel_intervals_contain_those_of_resampled_examples(few_resamples):
    targets = [{"a"}, {"a", "b"}, set(), {"c"}, {"b"}, {"a", "c"}]
    predictions = [{"a"}, {"b"}, {"c"}, {"c"}, {"b"}, {"a"}]
    targets, predictions = 6 * targets, 6 * predictions
    scores = multilabel(targets, predictions, LABELS)
    true, predicted = multi_hot(targets), multi_hot(predictions)
    values = [
        sklearn_metrics.f1_score(true[i], predicted[i], average="micro", zero_division=0)
        for i in few_resamples(len(targets), 0)
    ]
    low, high = np.quantile(values, [0.1, 0.9])
    score = scores["micro_f1"]
    assert score.low is not None and score.high is not None
    assert score.low < low < score.value < high < score.high
    assert scores["exact_match"] == proportion((true == predicted).all(1))


# ---------------------------------------------------------------- correlations


@settings(deadline=None)
@given(st.lists(st.tuples(TIED_VALUES, TIED_VALUES), min_size=2, max_size=30))
def test_similarity_equals_scipy(pairs):
    targets, predictions = [t for t, _ in pairs], [p for _, p in pairs]
    scores = similarity(targets, predictions)
    if len(set(targets)) == 1 or len(set(predictions)) == 1:
        assert scores["pearson"].value == scores["spearman"].value == 0.0
    else:
        assert scores["pearson"].value == approx(stats.pearsonr(targets, predictions).statistic)
        assert scores["spearman"].value == approx(stats.spearmanr(targets, predictions).statistic)
    for score in scores.values():
        assert (score.low is None) == (len(pairs) < MIN_CORRELATED)
        assert score.low is None or score.high is None or -1 <= score.low <= score.value <= score.high <= 1


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2), min_size=1, max_size=15))
def test_similarity_is_finite_for_all_numbers(pairs):
    for score in similarity([t for t, _ in pairs], [p for _, p in pairs]).values():
        assert -1 <= score.value <= 1
        assert score.low is None or score.high is None or -1 <= score.low <= score.high <= 1


def test_intervals_of_correlations_contain_those_of_resamples_and_of_fisher(few_resamples):
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 6, 50) / 1.0, rng.normal(size=50).round(1)
    predictions += targets / 3
    resamples = few_resamples(50, 0)
    scores = similarity(targets.tolist(), predictions.tolist())
    for name, reference in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        low, high = np.quantile([reference(targets[i], predictions[i]).statistic for i in resamples], [0.025, 0.975])
        score = scores[name]
        assert score.low is not None and score.high is not None
        assert score.low <= low + 1e-9 and score.high >= high - 1e-9
    fisher = stats.pearsonr(targets, predictions).confidence_interval(0.95)
    score = scores["pearson"]
    assert score.low is not None and score.high is not None
    assert score.low <= fisher.low + 1e-9 and score.high >= fisher.high - 1e-9


# ---------------------------------------------------------------- statistics


def test_resamples_do_not_depend_on_the_block_size(monkeypatch):
    all_at_once = np.concatenate([*resample_indices(300, 5)])
    monkeypatch.setattr(statistics, "MAX_DRAWS_IN_MEMORY", 300 * 7)
    blocks = [*resample_indices(300, 5)]
    assert max(len(block) for block in blocks) == 7
    assert np.array_equal(np.concatenate(blocks), all_at_once)


def test_multiple_choice_and_preference_are_proportions():
    assert multiple_choice([0, 1, 2, 3], [0, 1, 2, 0])["accuracy"] == proportion([1, 1, 1, 0])
    assert preference([0.5, -1.0, 0.0, 2.0, 1e-9])["preferred"] == proportion([1, 0, 0, 1, 1])


@given(st.integers(1, 500), st.data())
def test_the_interval_of_a_proportion_is_wilsons(n, data):
    k = data.draw(st.integers(0, n))
    expected = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    score = proportion([1.0] * k + [0.0] * (n - k))
    assert (score.value, score.n) == (approx(k / n), n)
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_of_a_difference_is_newcombes():
    """Newcombe 1998, table II, method 10."""
    for (x1, n1), (x2, n2), low, high in (
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ):
        score = proportion_difference(*([1.0] * x + [0.0] * (n - x) for x, n in ((x1, n1), (x2, n2))))
        assert (score.low, score.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("n", "m", "p"), [(6, 400, 0.9), (20, 400, 0.95), (50, 400, 0.98), (50, 50, 0.5)])
def test_equal_groups_seldom_differ(n, m, p):
    rng, num_draws = np.random.default_rng(n), 1000
    scores = [proportion_difference(rng.random(n) < p, rng.random(m) < p) for _ in range(num_draws)]
    assert sum(score.is_above(0) or score.is_below(0) for score in scores) <= 0.08 * num_draws


@pytest.mark.parametrize(("num_templates", "num_words"), [(6, 1), (20, 1), (6, 6), (8, 12), (30, 6)])
def test_the_interval_of_crossed_factors_contains_the_mean_of_the_population(num_templates, num_words):
    rng, num_draws, covered = np.random.default_rng(num_words), 1000, 0
    templates, words = (grid.ravel() for grid in np.mgrid[:num_templates, :num_words])
    for _ in range(num_draws):
        word_effects = rng.normal(size=num_words) if num_words > 1 else np.zeros(1)
        gaps = rng.normal(size=num_templates)[templates] + word_effects[words] + 0.5 * rng.normal(size=len(words))
        columns = np.stack([gaps, np.ones_like(gaps)], axis=1)
        score = clustered_ratio(columns, lambda sums: sums[:, 0] / sums[:, 1], templates.tolist(), words.tolist())
        assert score.value == approx(float(gaps.mean())) and score.low is not None and score.high is not None
        assert score.n == (num_templates if num_words == 1 else min(num_templates, num_words))
        covered += score.low < 0 < score.high
    assert 0.93 * num_draws <= covered <= 0.99 * num_draws


@pytest.mark.parametrize("n", [6, 20, 100])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_systems_of_equal_accuracy_seldom_differ(n, p):
    rng, num_draws = np.random.default_rng(n), 1000
    scores = [paired_difference(*(rng.random((2, n)) < p).astype(float).tolist()) for _ in range(num_draws)]
    assert sum(score.is_above(0) or score.is_below(0) for score in scores) <= 0.07 * num_draws
    assert all(score.low < score.high for score in scores if score.low is not None and score.high is not None)


def test_the_bootstrap_of_a_ratio_equals_scipys():
    values = np.random.default_rng(1).random(80).round(1)
    bootstrap = stats.bootstrap((values,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(0))
    expected = bootstrap.confidence_interval
    score = bootstrap_ratio(np.stack([values, values**0], 1), lambda sums: sums[:, 0] / sums[:, 1])
    assert score.value == pytest.approx(values.mean())
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high), abs=0.012)


def test_a_paired_interval_is_narrow():
    rng = np.random.default_rng(2)
    difficulty = rng.normal(size=500)  # common to both systems
    a, b = difficulty + 0.3 + 0.1 * rng.normal(size=500), difficulty
    score = paired_difference(a.tolist(), b.tolist())
    assert score.value == approx(float(np.mean(a - b)))
    assert score.low is not None and score.high is not None
    assert score.low < 0.3 < score.high
    assert score.high - score.low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(500), rel=0.15)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, both):
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * both + [0.0]
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * both + [0.0]
    discordant = only_a + only_b
    expected = stats.binomtest(only_a, discordant, 0.5).pvalue if discordant else 1.0
    assert mcnemar_p_value(a, b) == mcnemar_p_value(b, a) == pytest.approx(expected, rel=1e-6)


def test_the_noise_floor_covers_the_difference_of_two_runs():
    values = [0.61, 0.64, 0.60]
    assert noise_floor(values) == pytest.approx(stats.t.ppf(0.975, 2) * np.std(values, ddof=1) * 2**0.5)
    draws = np.random.default_rng(0).normal(size=(2000, 7))
    below = [abs(a - b) < noise_floor(list(rest)) for a, b, *rest in draws]
    assert 0.93 < np.mean(below) < 0.97
    with pytest.raises(UsageError, match="at least two runs"):
        noise_floor([0.5])


def test_the_interval_of_a_mean_is_students():
    values = [0.71, 0.74, 0.69]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    score = mean(values)
    assert (score.value, score.low, score.high, score.n) == (
        approx(float(np.mean(values))),
        approx(low),
        approx(high),
        3,
    )
    assert mean([0.5]) == ScoreWithCI(0.5, n=1)


def test_an_interval_is_compared_with_a_reference():
    score = ScoreWithCI(0.5, 0.4, 0.6, 10)
    assert score.is_above(0.3) and not score.is_above(0.4)
    assert score.is_below(0.7) and not score.is_below(0.6)
    assert not ScoreWithCI(0.5).is_above(0.0) and not ScoreWithCI(0.5).is_below(1.0)


# ---------------------------------------------------------------- generated text


def streams(references: list[list[str]]) -> Any:  # sacrebleu takes None for a missing reference
    num_streams = max(len(entry) for entry in references)
    return [[entry[i] if i < len(entry) else None for entry in references] for i in range(num_streams)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=3)), TEXT), min_size=1, max_size=8))
def test_chrf_and_bleu_equal_sacrebleu(pairs):
    references, texts = [r for r, _ in pairs], [t for _, t in pairs]
    reference_lists = [[entry] if isinstance(entry, str) else entry for entry in references]
    scores = generation_metrics(references, texts, ["bleu", "chrf"])
    assert [*scores] == ["bleu", "chrf"]
    assert scores["chrf"].value == sacrebleu.CHRF().corpus_score(texts, streams(reference_lists)).score
    assert scores["bleu"].value == sacrebleu.BLEU().corpus_score(texts, streams(reference_lists)).score


def test_generation_metrics_resample_texts(few_resamples):
    reference_lists = [[entry] if isinstance(entry, str) else entry for entry in REFERENCES]
    resamples = few_resamples(5, 0)
    scores = generation_metrics(REFERENCES, TEXTS)
    assert [*scores] == ["chrf", "bleu", "rouge1", "rouge2", "rougeL"]
    sacrebleu_metrics = {"chrf": sacrebleu.CHRF(), "bleu": sacrebleu.BLEU()}
    from rouge_score.rouge_scorer import RougeScorer  # takes a second

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)

    def corpus_score(name: str) -> Callable[[np.ndarray], float]:
        def metric(i: np.ndarray) -> float:
            references = streams([reference_lists[k] for k in i])
            return sacrebleu_metrics[name].corpus_score([TEXTS[k] for k in i], references).score

        return metric

    def rouge(name: str) -> Callable[[np.ndarray], float]:
        pairs = zip(reference_lists, TEXTS, strict=True)
        best = np.array([max(scorer.score(r, text)[name].fmeasure for r in entry) for entry, text in pairs])
        return lambda i: 100 * float(np.mean(best[i]))

    for name, score in scores.items():
        check_score(score, resamples, (rouge if name.startswith("rouge") else corpus_score)(name))
    assert scores["rouge1"].value > scores["rouge2"].value > 0
    assert generation_metrics(REFERENCES, TEXTS, ["rougeL"]) == {"rougeL": scores["rougeL"]}


def test_the_difference_of_texts_is_the_difference_of_their_scores():
    references = ["the cat sat", "a dog ran off", "birds sing", "it rains"] * 5
    a = ["the cat sat", "a dog ran", "birds", "it rains"] * 5
    b = ["cat", "a dog ran off", "sing", "rain it"] * 5
    for name in ("chrf", "rougeL"):
        first, second = [generation_metrics(references, texts, [name])[name].value for texts in (a, b)]
        score = generation_metric_difference(references, a, b, name)
        assert score.value == pytest.approx(first - second)
        assert not score.is_above(score.value) and not score.is_below(score.value)
        assert generation_metric_difference(references, a, a, name).high == 0.0


def test_repetition():
    words = list("abcdabcda")
    assert repeated_ngram_fraction(words, 4) == pytest.approx(1 - 4 / 6)
    assert repeated_ngram_fraction(words, 20) == 0.0
    assert distinct_n([words, ["a", "b"]], 1) == pytest.approx(4 / 11)
    assert distinct_n([words, ["a", "b"]], 2) == pytest.approx(4 / 9)
    assert distinct_n([], 1) == 0.0
    assert (
        split_words("one two") == ["one", "two"] and split_words("白日依山尽黄河入海流欲穷千里目更上一层楼")[0] == "白"
    )


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("sacrebleu.metrics.bleu", "chrf", r"chrF and BLEU needs .*nextword\[scores\]"),
        ("rouge_score.rouge_scorer", "rouge1", r"ROUGE needs .*nextword\[scores\]"),
    ],
)
def test_a_missing_package(monkeypatch, module, name, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=message):
        generation_metrics(["a"], ["a"], [name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification([], [], LABELS), "nothing to score"),
        (lambda: classification(["a"], ["a", "b"], LABELS), "1 targets but 2 predictions"),
        (lambda: classification(["a", "b"], ["a", "x"], LABELS), "example 2 has the unknown label 'x'"),
        (lambda: multilabel([{"a"}], [{"x"}], LABELS), "example 1 has the unknown label 'x'"),
        (lambda: similarity([1.0, 2.0], [1.0, math.nan]), "prediction 2 is nan"),
        (lambda: similarity([math.inf], [1.0]), "target score 1 is inf"),
        (lambda: multiple_choice([1], []), "1 targets but 0 predictions"),
        (lambda: preference([0.0, math.nan]), "margin 2 is nan"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "1 targets but 2 predictions"),
        (lambda: mean([]), "nothing to score"),
        (lambda: generation_metrics(["a"], ["a"], ["meteor"]), "unknown metric 'meteor'"),
        (lambda: generation_metrics(["a", []], ["a", "b"]), "text 2 has no reference"),
    ],
    ids=range(12),
)
def test_invalid_input(call, message):
    with pytest.raises(UsageError, match=message):
        call()
