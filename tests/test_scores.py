"""The scores: each equals the reference library's, on the examples and on every resample."""

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
from rouge_score.rouge_scorer import RougeScorer

from nextword.common.errors import MissingDependencyError, UsageError
from nextword.tasks import metrics as task_metrics
from nextword.tasks.metrics import (
    Score,
    classification,
    generation_metrics,
    multilabel,
    multiple_choice,
    paired_difference,
    preference,
    seed_interval,
    similarity,
    student_t_quantile,
)

# The libraries compared with, whose own types do not say what they give.
metrics: Any = importlib.import_module("sklearn.metrics")
stats: Any = importlib.import_module("scipy.stats")

LABELS = ["a", "b", "c", "d"]
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40)
SETS = st.frozensets(st.sampled_from(LABELS))
TEXT = st.text("abcde éß.,1日", max_size=30)
STEPS = st.integers(-4, 4).map(lambda x: x / 2)  # few values, so that many are equal
FEW = 20

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


def few_resamples(n: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Makes the resamples few, and tells which examples each one holds."""
    monkeypatch.setattr(task_metrics, "RESAMPLES", FEW)
    drawn = np.concatenate([*task_metrics._resample_weights(n, seed)])[1:].astype(int)
    assert drawn.shape == (FEW, n)
    assert (drawn.sum(1) == n).all()
    return [np.repeat(np.arange(n), one) for one in drawn]


def check_resamples(score: Score, resamples: list[np.ndarray], of: Callable[[np.ndarray], float]) -> None:
    """The value is that of all examples, the interval that of the resamples, each by the reference's own hand."""
    assert score.value == approx(of(np.arange(score.n)))
    low, high = np.quantile([of(one) for one in resamples], [0.025, 0.975])
    assert (score.low, score.high) == (approx(float(low)), approx(float(high)))


@settings(deadline=None)
@given(PAIRS)
def test_classification_is_sklearns(pairs):
    gold, validation_tokens = [g for g, _ in pairs], [p for _, p in pairs]
    found = classification(gold, predicted, LABELS)
    assert found["accuracy"].value == approx(metrics.accuracy_score(gold, predicted))
    assert found["macro_f1"].value == approx(metrics.f1_score(gold, predicted, average="macro"))
    if len({*gold, *predicted}) > 1:  # sklearn warns of a single label
        assert found["matthews"].value == approx(metrics.matthews_corrcoef(gold, predicted))
    else:
        assert found["matthews"].value == 0.0
    for score in found.values():
        assert math.isfinite(score.low)
        assert score.low <= score.high
        assert score.n == len(pairs)


def test_classification_intervals_are_those_of_drawn_examples():
    """A draw over the confusion matrix is a draw of examples: the ends agree but for the chance of 1,000 draws."""
    random = np.random.default_rng(1)
    gold = random.choice(LABELS, 200, p=[0.5, 0.3, 0.15, 0.05])
    predicted = np.where(random.random(200) < 0.7, gold, random.choice(LABELS, 200))
    found = classification(gold.tolist(), predicted.tolist(), LABELS)
    drawn = [random.integers(200, size=200) for _ in range(400)]
    by_hand: dict[str, Callable[[np.ndarray], float]] = {
        "accuracy": lambda i: float(metrics.accuracy_score(gold[i], predicted[i])),
        "macro_f1": lambda i: float(metrics.f1_score(gold[i], predicted[i], average="macro")),
        "matthews": lambda i: float(metrics.matthews_corrcoef(gold[i], predicted[i])),
    }
    for name, of in by_hand.items():
        values = np.array([of(i) for i in drawn])
        assert found[name].low == pytest.approx(np.quantile(values, 0.025), abs=0.6 * values.std())
        assert found[name].high == pytest.approx(np.quantile(values, 0.975), abs=0.6 * values.std())
        assert found[name].low < found[name].value < found[name].high


@settings(deadline=None)
@given(st.lists(st.tuples(SETS, SETS), min_size=1, max_size=20))
def test_several_labels_are_sklearns(pairs):
    gold, validation_tokens = [g for g, _ in pairs], [p for _, p in pairs]
    found = multilabel(gold, predicted, LABELS)
    true, predicted_mask = (
        np.array([[name in one for name in LABELS] for one in sets], dtype=int) for sets in (gold, predicted)
    )
    occurring = [i for i in range(len(LABELS)) if true[:, i].any() or said[:, i].any()]
    assert found["exact_match"].value == approx(metrics.accuracy_score(true, said))
    assert found["micro_f1"].value == approx(metrics.f1_score(true, said, average="micro", zero_division=0))
    macro = metrics.f1_score(true, said, labels=occurring, average="macro", zero_division=0) if occurring else 0.0
    assert found["macro_f1"].value == approx(macro)


def test_several_labels_are_resampled_by_example(monkeypatch):
    gold = [{"a"}, {"a", "b"}, set(), {"c"}, {"b"}, {"a", "c"}]
    predicted = [{"a"}, {"b"}, {"c"}, {"c"}, {"b"}, {"a"}]
    resamples = few_resamples(6, 3, monkeypatch)
    found = multilabel(gold, predicted, LABELS, seed=3)
    true, predicted_mask = (
        np.array([[name in one for name in LABELS] for one in sets], dtype=int) for sets in (gold, predicted)
    )
    check_resamples(found["exact_match"], resamples, lambda i: float((true[i] == said[i]).all(1).mean()))
    check_resamples(found["micro_f1"], resamples, lambda i: float(metrics.f1_score(true[i], said[i], average="micro")))


@settings(deadline=None)
@given(st.lists(st.tuples(STEPS, STEPS), min_size=2, max_size=30))
def test_similarity_is_scipys(pairs):
    gold, validation_tokens = [g for g, _ in pairs], [p for _, p in pairs]
    found = similarity(gold, predicted)
    if len(set(gold)) == 1 or len(set(predicted)) == 1:
        assert found["pearson"].value == found["spearman"].value == 0.0
    else:
        assert found["pearson"].value == approx(stats.pearsonr(gold, predicted).statistic)
        assert found["spearman"].value == approx(stats.spearmanr(gold, predicted).statistic)
    assert all(-1 <= score.low <= score.high <= 1 for score in found.values())


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2), min_size=1, max_size=10))
def test_similarity_is_a_number_whatever_the_numbers(pairs):
    found = similarity([g for g, _ in pairs], [p for _, p in pairs])
    assert all(-1 <= score.low <= score.high <= 1 and -1 <= score.value <= 1 for score in found.values())


def test_similarity_is_ranked_anew_in_each_resample(monkeypatch):
    random = np.random.default_rng(0)
    gold, validation_tokens = random.integers(0, 6, 50) / 1.0, random.normal(size=50).round(1)
    predicted += gold / 3
    resamples = few_resamples(50, 0, monkeypatch)
    found = similarity(gold.tolist(), predicted.tolist())
    check_resamples(found["pearson"], resamples, lambda i: float(stats.pearsonr(gold[i], predicted[i]).statistic))
    check_resamples(found["spearman"], resamples, lambda i: float(stats.spearmanr(gold[i], predicted[i]).statistic))


def test_resamples_do_not_depend_on_the_block(monkeypatch):
    whole = np.concatenate([*task_metrics._resample_weights(300, 5)])
    monkeypatch.setattr(task_metrics, "DRAWS", 300 * 7)
    blocks = [*task_metrics._resample_weights(300, 5)]
    assert max(len(block) for block in blocks) == 7
    assert np.array_equal(np.concatenate(blocks), whole)


def test_choices_and_preference_are_shares(monkeypatch):
    assert multiple_choice([0, 1, 2, 3], [0, 1, 2, 0])["accuracy"].value == 0.75
    margins = np.array([0.5, -1.0, 0.0, 2.0, 1e-9])
    resamples = few_resamples(5, 0, monkeypatch)
    check_resamples(preference(margins.tolist())["preferred"], resamples, lambda i: float((margins[i] > 0).mean()))


def test_the_interval_of_a_share_is_the_binomials():
    gold = [0] * 1000
    score = multiple_choice(gold, [0] * 700 + [1] * 300)["accuracy"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert (score.low, score.high) == (pytest.approx(0.7 - half, abs=0.004), pytest.approx(0.7 + half, abs=0.004))
    assert score.to_dict() == {"value": 0.7, "low": score.low, "high": score.high, "n": 1000}
    assert score == multiple_choice(gold, [0] * 700 + [1] * 300)["accuracy"]
    assert score != multiple_choice(gold, [0] * 700 + [1] * 300, seed=1)["accuracy"]


def test_a_paired_difference_is_narrower_than_two_intervals():
    random = np.random.default_rng(2)
    hard = random.normal(size=500)  # what both find hard
    a, b = hard + 0.3 + 0.1 * random.normal(size=500), hard
    score = paired_difference(a.tolist(), b.tolist())
    assert score.value == approx(float(np.mean(a - b)))
    assert score.low < 0.3 < score.high
    assert score.high - score.low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(500), rel=0.15)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 30, 101, 1000])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.9995])
def test_student_quantile_is_scipys(degrees: int, probability: float) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(
        stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9
    )


def test_over_seeds_is_students_interval():
    values = [0.71, 0.74, 0.69]
    low, high = stats.t.format_interval(0.95, 2, np.mean(values), stats.sem(values))
    assert seed_interval(values) == Score(approx(float(np.mean(values))), approx(low), approx(high), 3)  # pyright: ignore[reportArgumentType]
    assert seed_interval([0.5]) == Score(0.5, 0.5, 0.5, 1)


def streams(references: list[list[str]]) -> Any:  # sacrebleu takes None for a reference that is not there
    return [
        [one[i] if i < len(one) else None for one in references] for i in range(max(len(one) for one in references))
    ]


@settings(deadline=None)
@given(st.lists(st.tuples(st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=3)), TEXT), min_size=1, max_size=8))
def test_chrf_and_bleu_are_sacrebleus(pairs):
    references, texts = [r for r, _ in pairs], [t for _, t in pairs]
    several = [[one] if isinstance(one, str) else one for one in references]
    found = generation_metrics(references, texts, ["bleu", "chrf"])
    assert [*found] == ["bleu", "chrf"]
    assert found["chrf"].value == sacrebleu.CHRF().corpus_score(texts, streams(several)).score
    assert found["bleu"].value == sacrebleu.BLEU().corpus_score(texts, streams(several)).score


def test_written_text_is_resampled_as_the_references_would(monkeypatch):
    several = [[one] if isinstance(one, str) else one for one in REFERENCES]
    resamples = few_resamples(5, 0, monkeypatch)
    found = generation_metrics(REFERENCES, TEXTS)
    assert [*found] == ["chrf", "bleu", "rouge1", "rouge2", "rougeL"]
    metric = {"chrf": sacrebleu.CHRF(), "bleu": sacrebleu.BLEU()}
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)

    def corpus(name: str) -> Callable[[np.ndarray], float]:
        def of(i: np.ndarray) -> float:
            return metric[name].corpus_score([TEXTS[k] for k in i], streams([several[k] for k in i])).score

        return of

    def rouge(name: str) -> Callable[[np.ndarray], float]:
        best = [max(scorer.score(r, t)[name].fmeasure for r in one) for one, t in zip(several, TEXTS, strict=True)]
        return lambda i: 100 * float(np.mean(np.array(best)[i]))

    for name, score in found.items():
        check_resamples(score, resamples, (rouge if name.startswith("rouge") else corpus)(name))
    assert found["rouge1"].value > found["rouge2"].value > 0
    assert generation_metrics(REFERENCES, TEXTS, ["rougeL"]) == {"rougeL": found["rougeL"]}


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("sacrebleu.metrics.bleu", "chrf", r"chrF and BLEU needs .*nextword\[scores\]"),
        ("rouge_score.rouge_scorer", "rouge1", r"ROUGE needs .*nextword\[scores\]"),
    ],
)
def test_a_missing_package_says_how_to_install_it(monkeypatch, module, name, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=message):
        generation_metrics(["a"], ["a"], [name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification([], [], LABELS), "nothing to score"),
        (lambda: classification(["a"], ["a", "b"], LABELS), "1 against 2"),
        (lambda: classification(["a", "b"], ["a", "x"], LABELS), "example 2 has the label 'x'"),
        (lambda: multilabel([{"a"}], [{"x"}], LABELS), "example 1 has the label 'x'"),
        (lambda: similarity([1.0, 2.0], [1.0, math.nan]), "prediction 2 is nan"),
        (lambda: similarity([math.inf], [1.0]), "gold score 1 is inf"),
        (lambda: multiple_choice([1], []), "1 against 0"),
        (lambda: preference([0.0, math.nan]), "margin 2 is nan"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "1 against 2"),
        (lambda: seed_interval([]), "nothing to score"),
        (lambda: generation_metrics(["a"], ["a"], ["meteor"]), "no score called 'meteor'"),
        (lambda: generation_metrics(["a", []], ["a", "b"]), "text 2 has no reference"),
        (lambda: student_t_quantile(0.975, 0), "0 degrees of freedom"),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_what_cannot_be_scored_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
