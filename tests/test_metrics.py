"""Metrics and statistics: equal to the reference libraries, on the examples and on every resample."""

import importlib
import math
import sys
from itertools import chain
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from nextword.common.errors import MissingDependencyError, UsageError
from nextword.common.statistics import (
    ScoreWithCI,
    clustered_ratio,
    mcnemar_p_value,
    mean,
    mean_of_runs,
    noise_floor,
    paired_difference,
    proportion,
    proportion_difference,
    statistic_of_sums,
)
from nextword.common.text_units import split_words
from nextword.tasks.metrics import (
    MAX_KURTOSIS,
    MIN_CORRELATED,
    bleu_tokenizer,
    classification,
    distinct_n,
    generation_metric_difference,
    generation_metrics,
    label_metric_difference,
    multilabel,
    multiple_choice,
    preference,
    repeated_ngram_fraction,
    similarity,
)

# The reference libraries, which have no type annotations.
sklearn_metrics: Any = importlib.import_module("sklearn.metrics")
stats: Any = importlib.import_module("scipy.stats")

LABELS = ["a", "b", "c", "d"]
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40)
LABEL_SETS = st.frozensets(st.sampled_from(LABELS))
TEXT = st.text("abcde éß.,1日", max_size=30)
TIED_VALUES = st.integers(-4, 4).map(lambda x: x / 2)

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
            assert name != "accuracy", "rare labels leave the others without an interval"
        else:
            assert -1 <= score.low <= score.value <= score.high <= 1


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
def test_intervals_of_classification_contain_the_metric_of_the_population(n, accuracy, rare):
    rng, num_draws = np.random.default_rng(n), 150
    targets = np.array([0.12, 0.44, 0.44]) if rare else np.full(3, 1 / 3)
    population = targets[:, None] * ((1 - accuracy) / 2 + (accuracy - (1 - accuracy) / 2) * np.eye(3))
    f1 = 2 * np.diag(population) / (population.sum(0) + population.sum(1))
    missed: dict[str, int] = dict.fromkeys(("accuracy", "macro_f1", "matthews"), 0)
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
            missed[name] += scores[name].is_above(value) or scores[name].is_below(value)
            assert scores[name].low is not None or n == 40
    assert all(count <= 0.1 * num_draws for count in missed.values()), missed  # 0.05 and three standard errors


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


def test_the_intervals_of_correlations_contain_fishers():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 6, 50) / 1.0, rng.normal(size=50).round(1)
    predictions += targets / 3
    scores = similarity(targets.tolist(), predictions.tolist())
    for name, reference in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        r = reference(targets, predictions).statistic
        margin = stats.norm.ppf(0.975) * math.sqrt((1 + (r**2 / 2 if name == "spearman" else 0)) / 47)
        score = scores[name]
        assert score.low is not None and score.high is not None
        assert score.low <= math.tanh(math.atanh(r) - margin) + 1e-9
        assert score.high >= math.tanh(math.atanh(r) + margin) - 1e-9


def test_extreme_scores_leave_pearsons_correlation_without_an_interval():
    x = np.random.default_rng(0).normal(size=60)
    extreme = np.append(x, 40.0)
    assert stats.kurtosis(extreme, fisher=False) > MAX_KURTOSIS > stats.kurtosis(x, fisher=False)
    scores = similarity(extreme.tolist(), extreme.tolist())
    assert scores["pearson"].low is None and scores["spearman"].low is not None
    assert similarity(x.tolist(), x.tolist())["pearson"].low is not None


# ---------------------------------------------------------------- statistics


def test_multiple_choice_and_preference_are_proportions():
    assert multiple_choice([0, 1, 2, 3], [0, 1, 2, 0])["accuracy"] == proportion([1, 1, 1, 0])
    assert preference([0.5, -1.0, 0.0, 2.0, 1e-9])["preferred"] == proportion([1, 0, 0, 1, 1])


@given(st.integers(1, 500), st.data())
def test_the_interval_of_a_proportion_is_that_of_agresti_and_coull(n, data):
    """It has the center of Wilson's and contains it."""
    k, z = data.draw(st.integers(0, n)), stats.norm.ppf(0.975)
    wilson = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    score = proportion([1.0] * k + [0.0] * (n - k))
    assert (score.value, score.n) == (approx(k / n), n)
    center = (k + z**2 / 2) / (n + z**2)
    spread = z * math.sqrt(center * (1 - center) / (n + z**2))
    assert (score.low, score.high) == pytest.approx((max(0, center - spread), min(1, center + spread)), abs=1e-9)
    assert score.low is not None and score.high is not None
    assert score.low <= wilson.low + 1e-9 and score.high >= wilson.high - 1e-9


def test_the_interval_of_a_difference_is_newcombes():
    """Newcombe 1998, table II, method 10, within the width that Agresti and Coull's intervals add to Wilson's."""
    for (x1, n1), (x2, n2), low, high in (
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ):
        score = proportion_difference(*([1.0] * x + [0.0] * (n - x) for x, n in ((x1, n1), (x2, n2))))
        assert (score.low, score.high) == pytest.approx((low, high), abs=0.06)
        assert score.low is not None and score.high is not None
        assert score.low <= low + 1e-4 and score.high >= high - 1e-4


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


def column_ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def test_the_interval_of_a_ratio_is_that_of_its_bootstrap():
    rng = np.random.default_rng(1)
    sizes = rng.lognormal(size=300)
    columns = np.stack([sizes * rng.normal(2, 0.5, size=300), sizes], axis=1)
    resamples = [columns[rng.integers(300, size=300)].sum(0) for _ in range(2000)]
    score = statistic_of_sums(columns, column_ratio)
    assert score.value == pytest.approx(columns[:, 0].sum() / columns[:, 1].sum())
    low, high = np.quantile(column_ratio(np.array(resamples)), [0.025, 0.975])
    assert (score.low, score.high) == pytest.approx((low, high), abs=0.2 * (high - low))


def test_repeated_rows_count_as_examples():
    rng = np.random.default_rng(3)
    rows, counts = np.stack([rng.random(10), np.ones(10)], axis=1), rng.integers(1, 9, size=10)
    repeated = statistic_of_sums(np.repeat(rows, counts, axis=0), column_ratio)
    score = statistic_of_sums(rows, column_ratio, counts=counts)
    assert score.n == counts.sum() == repeated.n and repeated.low is not None
    assert (score.value, score.low, score.high) == pytest.approx((repeated.value, repeated.low, repeated.high))


def test_there_is_no_interval_where_no_method_holds():
    """Too few examples, or no variation that tells how much the score varies."""
    rng = np.random.default_rng(4)
    assert mean(rng.normal(size=19)).low is None and mean(rng.normal(size=20)).low is not None
    assert mean([0.3] * 50).low is None and mean([0.1] * 49 + [0.2]).low is not None
    assert paired_difference([2.5] * 30, [2.5] * 30).low is None
    for values in ([1.0] * 30, [0.5] * 30, [0.0] * 29 + [0.7], [1.0], [0.25, 0.5]):
        score = proportion(values)
        assert score.low is not None and score.high is not None
        assert score.high - score.low > 1 / len(values) / 2


def test_skewed_values_have_a_longer_side():
    score = mean(np.random.default_rng(0).lognormal(size=50))
    assert score.low is not None and score.high is not None
    assert score.high - score.value > 1.2 * (score.value - score.low)


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


def test_the_interval_over_runs_is_students():
    values = [0.71, 0.74, 0.69]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    score = mean_of_runs(values)
    assert (score.value, score.low, score.high, score.n) == (
        approx(float(np.mean(values))),
        approx(low),
        approx(high),
        3,
    )
    assert mean_of_runs([0.5]) == ScoreWithCI(0.5, n=1)


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
    tokenizer = bleu_tokenizer("".join(chain(*reference_lists)))
    assert scores["chrf"].value == sacrebleu.CHRF().corpus_score(texts, streams(reference_lists)).score
    assert (
        scores["bleu"].value
        == sacrebleu.BLEU(tokenize=tokenizer, effective_order=True).corpus_score(texts, streams(reference_lists)).score
    )


def test_rouge_is_the_mean_of_the_best_references():
    reference_lists = [[entry] if isinstance(entry, str) else entry for entry in REFERENCES]
    scores = generation_metrics(REFERENCES, TEXTS)
    assert [*scores] == ["chrf", "bleu", "rouge1", "rouge2", "rougeL"]
    from rouge_score.rouge_scorer import RougeScorer  # takes a second

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        pairs = zip(reference_lists, TEXTS, strict=True)
        best = [max(scorer.score(r, text)[name].fmeasure for r in entry) for entry, text in pairs]
        assert scores[name].value == pytest.approx(100 * float(np.mean(best)))
    assert scores["rouge1"].value > scores["rouge2"].value > 0
    assert generation_metrics(REFERENCES, TEXTS, ["rougeL"]) == {"rougeL": scores["rougeL"]}
    assert all(score.low is None for score in scores.values()), "five texts are too few"
    for score in generation_metrics(REFERENCES * 6, TEXTS * 6).values():
        assert score.low is not None and score.high is not None and 0 <= score.low < score.value < score.high <= 100


def test_the_difference_of_texts_is_the_difference_of_their_scores():
    references = ["the cat sat", "a dog ran off", "birds sing", "it rains"] * 5
    a = ["the cat sat", "a dog ran", "birds", "it rains"] * 5
    b = ["cat", "a dog ran off", "sing", "rain it"] * 5
    for name in ("chrf", "rougeL"):
        first, second = [generation_metrics(references, texts, [name])[name].value for texts in (a, b)]
        score = generation_metric_difference(references, a, b, name)
        assert score.value == pytest.approx(first - second)
        assert not score.is_above(score.value) and not score.is_below(score.value)
        same = generation_metric_difference(references, a, a, name)
        assert (same.value, same.low, same.high) == (0.0, None, None)


def test_the_difference_of_labels_is_the_difference_of_their_scores():
    rng = np.random.default_rng(0)
    targets, a, b = (rng.choice(["x", "y", "z"], 300).tolist() for _ in range(3))
    a = [target if i % 3 else other for i, (target, other) in enumerate(zip(targets, a, strict=True))]
    labels, names = ["x", "y", "z"], ["accuracy", "macro_f1", "matthews", "f1:y"]
    first, second = (classification(targets, predicted, labels, names) for predicted in (a, b))
    sets = [[[label] for label in values] for values in (targets, a, b)]
    for name in names:
        score = label_metric_difference(*sets, labels, name)
        assert score.value == pytest.approx(first[name].value - second[name].value)
        assert score.low is not None and score.high is not None and 0 < score.low < score.value < score.high
        reverse = label_metric_difference(sets[0], sets[2], sets[1], labels, name)
        assert reverse.low is not None and -reverse.low == pytest.approx(score.high)
    rare = [[["x"]] * 297 + [["y"]] * 3, [["x"]] * 300, [["x"]] * 298 + [["y"]] * 2]
    assert label_metric_difference(*rare, labels, "f1:y").low is None, "three examples of a label are too few"
    pairs = [[("x", "y") if i % 2 else ("z",) for i in range(40)], [("x",)] * 40, [("x", "y")] * 40]
    values = [multilabel(pairs[0], predicted, labels) for predicted in pairs[1:]]
    for name in ("exact_match", "micro_f1"):
        expected = values[0][name].value - values[1][name].value
        assert label_metric_difference(*pairs, labels, name).value == pytest.approx(expected)


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
