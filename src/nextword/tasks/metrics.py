"""The metrics of each task, with bootstrap confidence intervals, and measures of repetition in generated text.

Accuracy, F1 and Matthews correlation equal scikit-learn's. They are computed here from counts, because scikit-learn scores one
sample per call: its calls for 1,000 resamples take seconds for each metric.
Shapes: n examples, R resamples, K labels.
"""

import importlib
import math
import warnings
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

import numpy as np

from nextword.common.errors import UsageError, import_optional
from nextword.common.statistics import (
    NUM_RESAMPLES,
    ScoreWithCI,
    check_lengths,
    posterior_sums,
    proportion,
    require_finite,
    resample_indices,
    resampled_sums,
    score_from_resamples,
    t_quantile,
)

GENERATION_METRICS = ("chrf", "bleu", "rouge1", "rouge2", "rougeL")  # 0 to 100; all other scores are 0 to 1 or −1 to 1
MIN_EXAMPLES_PER_LABEL = 8  # of at least half of the labels, for an interval of macro-F1
MIN_CORRELATED = 10  # examples, for an interval of a correlation


def classification(targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> dict[str, ScoreWithCI]:
    """Metrics of single-label classification: `accuracy` and `macro_f1` (0 to 1) and `matthews` (−1 to 1).

    `macro_f1` is the mean F1 of the labels that occur in targets or predictions. `matthews` is Gorodkin (2004)'s R_K, which
    is the Matthews correlation for two labels; it is 0 if targets or predictions hold one label only. For their intervals see
    `_resampled_sums`; resamples are multinomial draws over the confusion matrix, which is equivalent to drawing examples.

    Raises:
        UsageError: There are no examples, the lengths differ, or a label is not in `labels`.
    """
    n = check_lengths(targets, predictions)
    is_target, is_predicted = (_multi_hot([[label] for label in names], labels) for names in (targets, predictions))
    hits, num_targets, num_predicted, posterior = _resampled_sums(is_target, is_predicted)
    matthews = _matthews(hits.sum(1), num_targets, num_predicted, n)
    posterior_matthews = _matthews(posterior[0].sum(1), *posterior[1:], n)
    return {
        "accuracy": proportion(np.any(is_target & is_predicted, axis=1)),
        "macro_f1": _macro_f1_score(hits, num_targets + num_predicted, posterior, n),
        "matthews": score_from_resamples(matthews, n, posterior_matthews),
    }


def multilabel(
    targets: Sequence[Collection[str]], predictions: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, ScoreWithCI]:
    """Metrics of multi-label classification, 0 to 1.

    `exact_match` is the proportion of examples with exactly the right labels, `micro_f1` the F1 over all decisions, `macro_f1`
    the mean F1 of the labels that occur in targets or predictions. F1 is 0 if there is nothing to find and nothing found.

    Raises:
        UsageError: There are no examples, the lengths differ, or a label is not in `labels`.
    """
    n = check_lengths(targets, predictions)
    is_target, is_predicted = _multi_hot(targets, labels), _multi_hot(predictions, labels)  # [n, K]
    hits, num_targets, num_predicted, posterior = _resampled_sums(is_target, is_predicted)
    micro_f1, posterior_micro_f1 = (
        _safe_divide(2 * hits.sum(1), (targets + predicted).sum(1))
        for hits, targets, predicted in ((hits, num_targets, num_predicted), posterior)
    )
    return {
        "exact_match": proportion(np.all(is_target == is_predicted, axis=1)),
        "micro_f1": score_from_resamples(micro_f1, n, posterior_micro_f1),
        "macro_f1": _macro_f1_score(hits, num_targets + num_predicted, posterior, n),
    }


def _resampled_sums(
    is_target: np.ndarray, is_predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers of hits, targets and predictions of each label, in bootstrap resamples and in draws from a posterior.

    A bootstrap has no width where nothing is wrong. The posterior is the Bayesian bootstrap with a prior: for each label that
    occurs, half an example that is right, a quarter of one that is missed and a quarter of a false one. Their union covers
    the F1 scores and the Matthews correlation at 95 % near 1 and with rare labels, too.

    Args:
        is_target: Whether each example has each label, [n, K].
        is_predicted: Whether each label was predicted.

    Returns:
        Hits, targets and predictions, [1 + R, K] each, of all examples first; and the same of the posterior, [R, K] each.
    """
    n, num_labels = is_target.shape
    rows = np.hstack([is_target & is_predicted, is_target, is_predicted])
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=NUM_RESAMPLES)
    sums = np.vstack([counts, draws]).astype(np.float64) @ distinct.astype(np.float64)
    occurring = np.eye(num_labels)[(is_target | is_predicted).any(0)]
    nothing = np.zeros_like(occurring)
    prior = [(occurring, occurring, occurring), (nothing, occurring, nothing), (nothing, nothing, occurring)]
    weights = np.concatenate([counts, np.repeat([0.5, 0.25, 0.25], len(occurring))])
    posterior = posterior_sums(np.vstack([distinct, *map(np.hstack, prior)]).astype(np.float64), weights, n)
    hits, targets, predictions = np.split(sums, 3, axis=1)
    posterior_hits, posterior_targets, posterior_predictions = np.split(posterior, 3, axis=1)
    return hits, targets, predictions, (posterior_hits, posterior_targets, posterior_predictions)


def _macro_f1_score(
    hits: np.ndarray, support_sums: np.ndarray, posterior: tuple[np.ndarray, np.ndarray, np.ndarray], n: int
) -> ScoreWithCI:
    """Macro-F1; without an interval if half of the labels have fewer than `MIN_EXAMPLES_PER_LABEL` examples."""
    values, supports = _macro_f1(hits, support_sums), support_sums[0][support_sums[0] > 0] / 2
    if not supports.size or np.median(supports) < MIN_EXAMPLES_PER_LABEL:
        return ScoreWithCI(float(values[0]), n=n)
    return score_from_resamples(values, n, _macro_f1(posterior[0], posterior[1] + posterior[2]))


def similarity(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, ScoreWithCI]:
    """`pearson` and `spearman` correlation, −1 to 1; 0 (never NaN) for constant values or a single example.

    The interval is the union of the bootstrap's and of Fisher's transformation (Bonett and Wright 2000, equations 3 and 5):
    the first accounts for outliers, the second for small samples. Fewer than `MIN_CORRELATED` examples have no interval.

    Raises:
        UsageError: There are no examples, the lengths differ, or a value is not finite.
    """
    stats: Any = importlib.import_module("scipy.stats")
    n = check_lengths(targets, predictions)
    x, y = require_finite(targets, "target score"), require_finite(predictions, "prediction")
    scores: dict[str, list[np.ndarray]] = {"pearson": [], "spearman": []}
    for indices in chain([np.arange(n)[None]], resample_indices(n)):
        scores["pearson"].append(_pearson(_rescale(x)[indices], _rescale(y)[indices]))
        scores["spearman"].append(_pearson(stats.rankdata(x[indices], axis=1), stats.rankdata(y[indices], axis=1)))
    return {name: _correlation_score(name, np.concatenate(values), n) for name, values in scores.items()}


def _correlation_score(name: str, values: np.ndarray, n: int) -> ScoreWithCI:
    score = score_from_resamples(values, n)
    if n < MIN_CORRELATED:
        return ScoreWithCI(score.value, n=n)
    assert score.low is not None and score.high is not None
    r = float(np.clip(score.value, -1 + 1e-12, 1 - 1e-12))
    variance = (1 + r**2 / 2 if name == "spearman" else 1) / (n - 3)
    margin = t_quantile(math.inf) * math.sqrt(variance)
    low, high = (math.tanh(math.atanh(r) + side * margin) for side in (-1, 1))
    return ScoreWithCI(score.value, min(score.low, low), max(score.high, high), n)


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

    `chrf` (Popović 2015) and `bleu` (Papineni et al. 2002) are sacrebleu's corpus scores with its defaults; the sufficient
    statistics of each text are resampled. `rouge1`, `rouge2` and `rougeL` (Lin 2004) are means of rouge_score's F-measure
    with stemming and the best reference. rouge_score only knows the letters a to z and digits: use chrF for other scripts.

    Args:
        references: The reference, or references, of each text.
        predictions: The generated texts.
        metric_names: Which of `GENERATION_METRICS` to compute.

    Raises:
        UsageError: There are no examples, the lengths differ, a text has no reference, or a metric is unknown.
        MissingDependencyError: sacrebleu or rouge_score is not installed.
    """
    n = check_lengths(references, predictions)
    resampled = _resampled_generation_metrics(references, predictions, metric_names)
    return {name: score_from_resamples(values, n) for name, values in resampled.items()}


def generation_metric_difference(
    references: Sequence[str | Sequence[str]], a: Sequence[str], b: Sequence[str], metric_name: str
) -> ScoreWithCI:
    """By how much the texts a score above the texts b of the same sources, with a paired bootstrap interval.

    Raises:
        UsageError, MissingDependencyError: As in `generation_metrics`.
    """
    n = check_lengths(references, a, b)
    first, second = (_resampled_generation_metrics(references, texts, [metric_name])[metric_name] for texts in (a, b))
    return score_from_resamples(first - second, n)


def split_words(text: str) -> list[str]:
    """The words between white space; the characters of a text that has almost no spaces, such as Chinese or Japanese."""
    words = text.split()
    return words if 20 * len(words) > len(text) else [character for character in text if not character.isspace()]


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


def _resampled_generation_metrics(
    references: Sequence[str | Sequence[str]], predictions: Sequence[str], metric_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Each metric [1 + R]: of all texts, then of each resample."""
    if unknown := [name for name in metric_names if name not in GENERATION_METRICS]:
        raise UsageError(f"unknown metric {unknown[0]!r}: choose from {', '.join(GENERATION_METRICS)}")
    reference_lists = [[entry] if isinstance(entry, str) else list(entry) for entry in references]
    if missing := [i for i, entry in enumerate(reference_lists, 1) if not entry]:
        raise UsageError(f"text {missing[0]} has no reference: add one or leave the text out")
    rouge_names = [name for name in metric_names if name.startswith("rouge")]
    rouge = _rouge_scores(rouge_names, reference_lists, predictions) if rouge_names else {}
    return {
        name: 100 * resampled_sums(rouge[name][:, None])[:, 0] / len(predictions)
        if name in rouge
        else _sacrebleu_scores(name, reference_lists, predictions)
        for name in metric_names
    }


def _sacrebleu_scores(metric_name: str, references: list[list[str]], predictions: Sequence[str]) -> np.ndarray:
    """[1 + R]: sacrebleu's corpus score of all texts, then of resamples of the statistics of each text."""
    chrf, bleu = (import_optional(f"sacrebleu.metrics.{name}", "chrF and BLEU", "scores") for name in ("chrf", "bleu"))
    metric = chrf.CHRF() if metric_name == "chrf" else bleu.BLEU(force=True)  # force: no warning about tokenized input
    num_streams = max(map(len, references))
    streams = [[entry[i] if i < len(entry) else None for entry in references] for i in range(num_streams)]
    # sacrebleu's bootstrap calls these two methods as well; its public one is slow and does not return the bounds.
    statistics = np.array(metric._extract_corpus_statistics(list(predictions), streams), dtype=np.float64)
    sums = resampled_sums(statistics).tolist()
    return np.array([metric._compute_score_from_stats(row).score for row in sums])


def _rouge_scores(
    metric_names: list[str], references: list[list[str]], predictions: Sequence[str]
) -> dict[str, np.ndarray]:
    """The F-measure of each text [n], 0 to 1."""
    scorer = import_optional("rouge_score.rouge_scorer", "ROUGE", "scores").RougeScorer(metric_names, use_stemmer=True)
    scores = [scorer.score_multi(entry, text) for entry, text in zip(references, predictions, strict=True)]
    return {name: np.array([score[name].fmeasure for score in scores]) for name in metric_names}


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[R]: the correlation of each row of x and y, both [R, n]; 0 for a constant row."""
    stats: Any = importlib.import_module("scipy.stats")
    if x.shape[1] < 2:
        return np.zeros(len(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant rows, whose correlation is NaN
        return np.nan_to_num(stats.pearsonr(x, y, axis=1).statistic)


def _rescale(values: np.ndarray) -> np.ndarray:
    """Values with magnitude at most 1, so that sums of squares do not overflow; a correlation stays the same."""
    values = values / max(float(np.abs(values).max()), 1e-300)
    values = values - values.mean()
    return values / max(float(np.abs(values).max()), 1e-300)


def _macro_f1(hits: np.ndarray, support_sums: np.ndarray) -> np.ndarray:
    """[R]: the mean F1 of hits and targets plus predictions, both [R, K], over the labels that occur in a resample."""
    return _safe_divide(_safe_divide(2 * hits, support_sums).sum(1), (support_sums > 0).sum(1))


def _matthews(correct: np.ndarray, target_counts: np.ndarray, predicted_counts: np.ndarray, n: int) -> np.ndarray:
    """[R]: (c n − Σ p t) / √((n² − Σ p²)(n² − Σ t²)), Gorodkin (2004) in counts."""
    predicted_spread = np.sqrt(n**2 - (predicted_counts**2).sum(1))
    target_spread = np.sqrt(n**2 - (target_counts**2).sum(1))
    return _safe_divide(correct * n - (predicted_counts * target_counts).sum(1), predicted_spread * target_spread)


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
            known = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
            raise UsageError(f"example {i + 1} has the unknown label {unknown[0]!r}; known labels: {known}")
        table[i, [label_to_id[name] for name in names]] = True
    return table
