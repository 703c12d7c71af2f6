"""The metrics of each task, with confidence intervals, and measures of repetition in generated text.

Accuracy, F1 and Matthews correlation equal scikit-learn's. They are computed here from counts, because their intervals need
the derivative with respect to each example.
Shapes: n examples, R rows of sums, K labels.
"""

import importlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np

from nextword.common.errors import UsageError, import_optional
from nextword.common.statistics import (
    MIN_UNITS,
    ScoreWithCI,
    check_lengths,
    paired_difference,
    proportion,
    require_finite,
    statistic_of_sums,
    t_quantile,
)
from nextword.common.text_units import nfc, script_of, uses_spaces, words
from nextword.data.issues import join_names

LOWER_IS_BETTER_METRICS = ("bits_per_byte", "loss")
ANSWER_METRICS = ("exact_match", "final_number")  # of short generated answers, 0 to 1
METRIC_ALIASES = {
    "mcc": "matthews",
    "f1_macro": "macro_f1",
    "f1_micro": "micro_f1",
    "rouge": "rougeL",
    "em": "exact_match",
}
LABEL_F1 = "f1:"  # followed by a label: its F1
GENERATION_METRICS = ("chrf", "bleu", "rouge1", "rouge2", "rougeL")  # 0 to 100; all other scores are 0 to 1 or −1 to 1
TEXT_METRICS = (*GENERATION_METRICS, *ANSWER_METRICS)
MIN_EXAMPLES_PER_LABEL = 8  # of nine labels in ten, for an interval of macro-F1
MIN_CORRELATED = 10  # examples, for an interval of a correlation
MAX_KURTOSIS = 6.0  # of the scores, for an interval of Pearson's correlation; 3 for a normal distribution


def interval_method(metric: str) -> str:
    """The method of the confidence interval of a metric, and its source."""
    if metric.startswith(LABEL_F1) or metric in ("macro_f1", "micro_f1", "matthews", "icat"):
        return "linearized (Efron 1982)"
    if metric in ("pearson", "spearman"):
        return "by Fisher's transformation (Bonett and Wright 2000)"
    if metric in (*GENERATION_METRICS, "perplexity"):
        return "linearized (Efron 1982), for skewed scores (Hall 1992)"
    return "by Agresti and Coull (1998)"


def missing_interval_reason(metric: str, n: int | None) -> str:
    """Why a score on n examples has no confidence interval."""
    if metric.startswith(LABEL_F1) or metric in ("macro_f1", "micro_f1", "matthews"):
        return f"fewer than {MIN_EXAMPLES_PER_LABEL} examples of a label, or no example differs"
    if metric in ("pearson", "spearman") and (n or 0) < MIN_CORRELATED:
        return f"fewer than {MIN_CORRELATED} examples"
    if metric == "pearson":
        return "a few extreme scores decide it"
    if n is not None and n < MIN_UNITS:
        return f"fewer than {MIN_UNITS} examples"
    return "no example differs from the others"


def classification(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str], metric_names: Sequence[str] = ()
) -> dict[str, ScoreWithCI]:
    """Metrics of single-label classification: `accuracy` and `macro_f1` (0 to 1) and `matthews` (−1 to 1).

    `metric_names` adds the F1 of single labels, as `f1:LABEL` (0 to 1).

    `macro_f1` is the mean F1 of the labels that occur in targets or predictions. `matthews` is Gorodkin (2004)'s R_K, which
    is the Matthews correlation for two labels; it is 0 if targets or predictions hold one label only.

    Raises:
        UsageError: There are no examples, the lengths differ, or a label is not in `labels`.
    """
    check_lengths(targets, predictions)
    is_target, is_predicted = (_multi_hot([[label] for label in names], labels) for names in (targets, predictions))
    score, counts = _label_scores(is_target, is_predicted)
    scores = {
        "accuracy": proportion(np.any(is_target & is_predicted, axis=1)),
        "macro_f1": score(_macro_f1, (0, 1), np.quantile(counts, 0.1, method="lower")),
        "matthews": score(_matthews, (-1, 1), len(targets) - counts.max()),
    }
    for name in metric_names:
        if name.startswith(LABEL_F1):
            i = labels.index(name.removeprefix(LABEL_F1))
            scores[name] = score(partial(_label_f1, label=i), (0, 1), float(is_target[:, i].sum()))
    return scores


def multilabel(
    targets: Sequence[Collection[str]], predictions: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, ScoreWithCI]:
    """Metrics of multi-label classification, 0 to 1.

    `exact_match` is the proportion of examples with exactly the right labels, `micro_f1` the F1 over all decisions, `macro_f1`
    the mean F1 of the labels that occur in targets or predictions. F1 is 0 if there is nothing to find and nothing found.

    Raises:
        UsageError: There are no examples, the lengths differ, or a label is not in `labels`.
    """
    check_lengths(targets, predictions)
    is_target, is_predicted = _multi_hot(targets, labels), _multi_hot(predictions, labels)  # [n, K]
    score, counts = _label_scores(is_target, is_predicted)
    return {
        "exact_match": proportion(np.all(is_target == is_predicted, axis=1)),
        "micro_f1": score(_micro_f1, (0, 1), counts.sum()),
        "macro_f1": score(_macro_f1, (0, 1), np.quantile(counts, 0.1, method="lower")),
    }


def _label_scores(is_target: np.ndarray, is_predicted: np.ndarray) -> tuple[Callable[..., ScoreWithCI], np.ndarray]:
    """Scores of hits, targets and predictions of each label.

    The interval is that of a bounded statistic, with half an example that is right and half of one that is wrong as
    pseudo-observations, in equal parts of each label: it has a width where nothing is wrong.

    Args:
        is_target: Whether each example has each label, [n, K].
        is_predicted: Whether each label was predicted.

    Returns:
        A function of a statistic of the sums [R, 3 K], its bounds, and the number of examples that the interval rests on:
        without an interval below `MIN_EXAMPLES_PER_LABEL`. And the number of targets of each label that occurs, at least one.
    """
    rows, counts = np.unique(np.hstack([is_target & is_predicted, is_target, is_predicted]), axis=0, return_counts=True)
    occurs = is_target.any(0) | is_predicted.any(0)
    label = np.eye(is_target.shape[1])[occurs]
    none, weights = np.zeros_like(label), np.full(3 * len(label), 0.5 / max(1, len(label)))
    prior = np.vstack([np.hstack(parts) for parts in ([label] * 3, (none, label, none), (none, none, label))])

    def score(
        statistic: Callable[[np.ndarray], np.ndarray], bounds: tuple[float, float], num_examples: float
    ) -> ScoreWithCI:
        result = statistic_of_sums(rows, statistic, counts=counts, bounds=bounds, prior=(prior, weights))
        return result if num_examples >= MIN_EXAMPLES_PER_LABEL else ScoreWithCI(result.value, n=result.n)

    return score, is_target.sum(0)[occurs] if len(label) else np.zeros(1)


def label_metric_difference(
    targets: Sequence[Collection[str]],
    a: Sequence[Collection[str]],
    b: Sequence[Collection[str]],
    labels: Sequence[str],
    metric_name: str,
) -> ScoreWithCI:
    """By how much the label sets a score above the label sets b of the same examples, with a paired interval.

    Args:
        targets: The labels of each example; a set of one in single-label classification.
        a: The predictions of one system.
        b: The predictions of another one.
        labels: All labels.
        metric_name: `accuracy` and `exact_match`, which are the same here, `micro_f1`, `macro_f1`, `matthews` or `f1:LABEL`.

    Raises:
        UsageError: As in `classification`.
    """
    check_lengths(targets, a, b)
    is_target, *systems = (_multi_hot(label_sets, labels) for label_sets in (targets, a, b))
    if metric_name in ("accuracy", "exact_match"):
        return paired_difference(*(np.all(is_target == predicted, axis=1).tolist() for predicted in systems))
    index = labels.index(metric_name.removeprefix(LABEL_F1)) if metric_name.startswith(LABEL_F1) else 0
    statistics = {"micro_f1": _micro_f1, "macro_f1": _macro_f1, "matthews": _matthews}
    statistic = statistics.get(metric_name, partial(_label_f1, label=index))
    columns = [part for predicted in systems for part in (is_target & predicted, is_target, predicted)]
    width = 3 * len(labels)
    difference = statistic_of_sums(
        np.hstack(columns), lambda sums: statistic(sums[:, :width]) - statistic(sums[:, width:])
    )
    supports = is_target.sum(0)
    least = (
        supports[index]
        if metric_name.startswith(LABEL_F1)
        else np.quantile(supports[supports > 0], 0.1, method="lower")
    )
    return difference if least >= MIN_EXAMPLES_PER_LABEL else ScoreWithCI(difference.value, n=difference.n)


def similarity(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, ScoreWithCI]:
    """`pearson` and `spearman` correlation, −1 to 1; 0 (never NaN) for constant values or a single example.

    The interval is that of Fisher's transformation (Bonett and Wright 2000, equations 3 and 5), or the wider one with the
    variance of the infinitesimal jackknife, which does not presuppose a normal distribution. There is none for fewer than
    `MIN_CORRELATED` examples, and none of Pearson's correlation if few extreme scores decide it.

    Raises:
        UsageError: There are no examples, the lengths differ, or a value is not finite.
    """
    stats: Any = importlib.import_module("scipy.stats")
    check_lengths(targets, predictions)
    scores = require_finite(targets, "target score"), require_finite(predictions, "prediction")
    standardized = [_standardize(values) for values in scores]
    ranks = [_standardize(stats.rankdata(values)) for values in scores]
    pearson, spearman = _correlation(*standardized, squared_factor=0.0), _correlation(*ranks, squared_factor=0.5)
    if max(float((values**4).mean()) for values in standardized) > MAX_KURTOSIS:
        pearson = ScoreWithCI(pearson.value, n=pearson.n)
    return {"pearson": pearson, "spearman": spearman}


def _correlation(x: np.ndarray, y: np.ndarray, squared_factor: float) -> ScoreWithCI:
    """The correlation of standardized values [n]; the variance of its transform is (1 + factor · r²) / (n − 3)."""
    n, value = len(x), float(np.clip((x * y).mean(), -1, 1))
    if n < MIN_CORRELATED:
        return ScoreWithCI(value, n=n)
    r = float(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    influence = x * y - r * (x**2 + y**2) / 2
    error = math.sqrt(float(influence @ influence) / n / (n - 1)) / (1 - r**2)
    margin = max(t_quantile(n - 1) * error, t_quantile(math.inf) * math.sqrt((1 + squared_factor * r**2) / (n - 3)))
    low, high = (math.tanh(math.atanh(r) + side * margin) for side in (-1, 1))
    return ScoreWithCI(value, min(value, low), max(value, high), n)


def multiple_choice(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, ScoreWithCI]:
    """`accuracy` of multiple choice, 0 to 1.

    Raises:
        UsageError: There are no examples, or the lengths differ.
    """
    check_lengths(targets, predictions)
    return {
        "accuracy": proportion([target == prediction for target, prediction in zip(targets, predictions, strict=True)])
    }


def preference(margins: Sequence[float]) -> dict[str, ScoreWithCI]:
    """`preferred`: the proportion of pairs with a margin (chosen minus rejected) above zero, 0 to 1.

    Raises:
        UsageError: There are no pairs, or a margin is not finite.
    """
    check_lengths(margins)
    return {"preferred": proportion(require_finite(margins, "margin") > 0)}


def generation_metrics(
    references: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    metric_names: Sequence[str] = GENERATION_METRICS,
) -> dict[str, ScoreWithCI]:
    """Metrics of generated text against one or several references for each source, 0 to 100.

    `chrf` (Popović 2015) and `bleu` (Papineni et al. 2002) are sacrebleu's corpus scores with its defaults, BLEU with
    `bleu_tokenizer` and, for texts of fewer than four words, the n-grams that there are. `rouge1`, `rouge2` and `rougeL` (Lin
    2004) are means of rouge_score's F-measure with the best reference, on words of any script, those of ASCII stemmed, and on
    graphemes where a script has no spaces. Texts are compared in NFC.

    `exact_match` and `final_number` are proportions, 0 to 1: of texts that equal a reference up to white space, and of texts
    whose last number equals that of a reference.

    Args:
        references: The reference, or references, of each text.
        predictions: The generated texts.
        metric_names: Which of `GENERATION_METRICS` and `ANSWER_METRICS` to compute.

    Raises:
        UsageError: There are no examples, the lengths differ, a text has no reference, or a metric is unknown.
        MissingDependencyError: sacrebleu or rouge_score is not installed.
    """
    check_lengths(references, predictions)
    scores: dict[str, ScoreWithCI] = {}
    for name in metric_names:
        if name in ANSWER_METRICS:
            normalize = final_number if name == "final_number" else _normalize_space
            answers = [[entry] if isinstance(entry, str) else entry for entry in references]
            pairs = zip(predictions, answers, strict=True)
            scores[name] = proportion(
                [normalize(text) is not None and normalize(text) in map(normalize, entry) for text, entry in pairs]
            )
            continue
        columns, statistic = _generation_statistic(name, references, predictions)
        scores[name] = statistic_of_sums(columns, statistic, bounds=None if name.startswith("rouge") else (0, 100))
    return scores


def generation_metric_difference(
    references: Sequence[str | Sequence[str]], a: Sequence[str], b: Sequence[str], metric_name: str
) -> ScoreWithCI:
    """By how much the texts a score above the texts b of the same sources, with a paired interval.

    Raises:
        UsageError, MissingDependencyError: As in `generation_metrics`.
    """
    check_lengths(references, a, b)
    (first, statistic), (second, _) = (_generation_statistic(metric_name, references, texts) for texts in (a, b))

    def difference(sums: np.ndarray) -> np.ndarray:
        return statistic(sums[:, : first.shape[1]]) - statistic(sums[:, first.shape[1] :])

    return statistic_of_sums(np.hstack([first, second]), difference)


def final_number(text: str) -> float | None:
    """The last number in a text, without thousands separators; None without one."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _normalize_space(text: str) -> str:
    return nfc(" ".join(text.split()))


def repeated_ngram_fraction(words: Sequence[str], n: int = 4) -> float:
    """The proportion of a text's n-grams that occurred before: 1 − |distinct n-grams| / |n-grams|; 0 if there are none.

    Source: Welleck et al. (2020), equation 11.
    """
    return 1 - distinct_n([words], n) if len(words) >= n else 0.0


def distinct_n(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct n-grams of all texts together over all their n-grams; 0 if there are none.

    The value falls with the amount of text: compare equal amounts. Source: Li et al. (2016), section 5.2.
    """
    ngrams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _generation_statistic(
    metric_name: str, references: Sequence[str | Sequence[str]], predictions: Sequence[str]
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """The sufficient statistics of each text [n, columns], and the metric [R] as a function of their sums [R, columns]."""
    if metric_name not in GENERATION_METRICS:
        raise UsageError(f"unknown metric {metric_name!r}: choose from {', '.join(GENERATION_METRICS)}")
    reference_lists = [list(map(nfc, [entry] if isinstance(entry, str) else entry)) for entry in references]
    predictions = list(map(nfc, predictions))
    if missing := [i for i, entry in enumerate(reference_lists, 1) if not entry]:
        raise UsageError(f"text {missing[0]} has no reference: add one or leave the text out")
    if metric_name.startswith("rouge"):
        scorer = import_optional("rouge_score.rouge_scorer", "ROUGE", "scores").RougeScorer(
            [metric_name], tokenizer=_RougeTokenizer()
        )
        scores = [scorer.score_multi(*pair)[metric_name] for pair in zip(reference_lists, predictions, strict=True)]
        return np.array([[score.fmeasure, 1] for score in scores]), lambda sums: 100 * sums[:, 0] / sums[:, 1]
    chrf, bleu = (import_optional(f"sacrebleu.metrics.{name}", "chrF and BLEU", "scores") for name in ("chrf", "bleu"))
    texts = "".join(itertools.chain(*reference_lists))
    # force: no warning about tokenized input; effective_order: short texts have no 4-grams
    bleu_settings = {"tokenize": bleu_tokenizer(texts), "force": True, "effective_order": True}
    metric = chrf.CHRF() if metric_name == "chrf" else bleu.BLEU(**bleu_settings)
    num_streams = max(map(len, reference_lists))
    streams = [[entry[i] if i < len(entry) else None for entry in reference_lists] for i in range(num_streams)]
    # sacrebleu's bootstrap calls these two methods as well.
    columns = np.array(metric._extract_corpus_statistics(list(predictions), streams), dtype=np.float64)
    return columns, lambda sums: np.array([metric._compute_score_from_stats(row).score for row in sums.tolist()])


def bleu_tokenizer(text: str) -> str:
    """The tokenizer of sacrebleu for texts of a script: "zh" for Chinese, "char" for other scripts without spaces, or "13a"."""
    return "13a" if uses_spaces(text) else "zh" if script_of(text) == "Han" else "char"


class _RougeTokenizer:
    """Words of any script; those of ASCII are split and stemmed as by rouge_score itself."""

    def __init__(self):
        self._ascii = import_optional("rouge_score.tokenizers", "ROUGE", "scores").DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        if text.isascii():
            return self._ascii.tokenize(text)
        parts = (self._ascii.tokenize(word) if word.isascii() else [word] for word in words(text.lower()))
        return list(itertools.chain(*parts))


def _standardize(values: np.ndarray) -> np.ndarray:
    """Values [n] with mean 0 and variance 1, without overflow of the squares; zeros if they are constant."""
    values = values / max(float(np.abs(values).max()), 1e-300)
    values = values - values.mean()
    values = values / max(float(np.abs(values).max()), 1e-300)
    return values / max(float(values.std()), 1e-300)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """[R]: the mean F1 of the labels that occur, from hits, targets and predictions of each label [R, 3 K]."""
    hits, targets, predicted = np.split(sums, 3, axis=1)
    supports = targets + predicted
    return _safe_divide(_safe_divide(2 * hits, supports).sum(1), (supports > 0).sum(1))


def _label_f1(sums: np.ndarray, label: int) -> np.ndarray:
    """[R]: the F1 of one label, from hits, targets and predictions of each label [R, 3 K]."""
    hits, targets, predicted = (part[:, label] for part in np.split(sums, 3, axis=1))
    return _safe_divide(2 * hits, targets + predicted)


def _micro_f1(sums: np.ndarray) -> np.ndarray:
    """[R]: the F1 over all labels, from hits, targets and predictions of each label [R, 3 K]."""
    hits, targets, predicted = np.split(sums, 3, axis=1)
    return _safe_divide(2 * hits.sum(1), (targets + predicted).sum(1))


def _matthews(sums: np.ndarray) -> np.ndarray:
    """[R]: (c n − Σ p t) / √((n² − Σ p²)(n² − Σ t²)), Gorodkin (2004), from hits, targets and predictions [R, 3 K]."""
    hits, targets, predicted = np.split(sums, 3, axis=1)
    n = targets.sum(1)
    predicted_spread, target_spread = (np.sqrt(np.maximum(0, n**2 - (x**2).sum(1))) for x in (predicted, targets))
    return _safe_divide(hits.sum(1) * n - (predicted * targets).sum(1), predicted_spread * target_spread)


def _safe_divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, and 0 if the denominator is 0."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.zeros(shape), where=denominator > 0)


def _multi_hot(label_sets: Sequence[Collection[str]], labels: Sequence[str]) -> np.ndarray:
    """[n, K]: whether each example has each label."""
    label_to_id = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(label_sets), len(labels)), dtype=bool)
    for i, names in enumerate(label_sets):
        if unknown := [name for name in names if name not in label_to_id]:
            raise UsageError(
                f"example {i + 1} has the unknown label {unknown[0]!r}; known labels: {join_names(labels)}"
            )
        table[i, [label_to_id[name] for name in names]] = True
    return table
