"""The evaluation of a model on benchmarks, compared with chance, shuffled words, other seeds and another model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nextword.common.console import Console
from nextword.common.statistics import ScoreWithCI, mcnemar_p_value, noise_floor, paired_difference
from nextword.data.issues import IssueLog
from nextword.pipeline.item_scores import ItemScores, evaluate_free_text, score_items
from nextword.pipeline.language_model import LanguageModel
from nextword.tasks.benchmark_items import DEFAULT_ITEM_LIMIT, BenchmarkRow, load_rows, sample_indices
from nextword.tasks.benchmark_spec import Benchmark
from nextword.tasks.metrics import GENERATION_METRICS, generation_metric_difference

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class EvalModels:
    """The models of an evaluation.

    Attributes:
        model: The evaluated model.
        compare_to: Another model to compare it with.
        seed_runs: Models of the same kind that differ by their seed.
        judge: A stronger model that scores generated text.
    """

    model: LanguageModel
    compare_to: LanguageModel | None = None
    seed_runs: Sequence[LanguageModel] = ()
    judge: LanguageModel | None = None


def evaluate_benchmark(
    eval_models: EvalModels,
    benchmark: Benchmark,
    *,
    limit: int | None = DEFAULT_ITEM_LIMIT,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a benchmark.

    Args:
        eval_models: The model, and those it is compared with.
        benchmark: The benchmark.
        limit: Number of items, sampled in proportion to the groups; None: all. The control with shuffled words has at most
            `DEFAULT_ITEM_LIMIT`.
        seed: Seed of sampling, for generated text.
        console: Where progress and warnings go.

    Returns:
        The result as in `nextword evaluate --json`.

    Raises:
        UsageError: The files of the benchmark do not exist.
        NextwordError: The benchmark has no valid item.
    """
    console = console or Console(quiet=True)
    issues = IssueLog()
    all_rows = load_rows(benchmark, issues)
    for line in issues.summary_lines():
        console.warn(line)
    rows = [all_rows[i] for i in sample_indices(all_rows, limit)]

    def progress(suffix: str) -> Callable[[int, int], None]:
        return lambda done, total: console.progress(f"{benchmark.name}{suffix}", done, total)

    def score(model: LanguageModel) -> ItemScores:
        return score_items(model, benchmark, rows, progress=progress(f", {model.path}"))

    started = time.monotonic()
    if benchmark.kind == "free text":
        result = evaluate_free_text(
            eval_models.model, benchmark, rows, seed=seed, judge=eval_models.judge, progress=progress("")
        )
        return {**result, "seconds": round(time.monotonic() - started, 3)}
    metric = benchmark.metrics[0]
    item_scores = score_items(eval_models.model, benchmark, rows, progress=progress(""))
    seconds = round(time.monotonic() - started, 3)
    result = summarize_item_scores(benchmark, item_scores, rows) | {"of": len(all_rows), "seconds": seconds}
    sampled = sample_indices(rows, DEFAULT_ITEM_LIMIT)
    sampled_rows = [rows[i] for i in sampled]
    shuffled_scores = score_items(
        eval_models.model, benchmark, sampled_rows, shuffled=True, progress=progress(", shuffled")
    )
    result["scrambled"] = shuffled_control(metric, item_scores.select(sampled), shuffled_scores)
    if eval_models.seed_runs:
        seed_scores = [item_scores, *map(score, eval_models.seed_runs)]
        result["noise"] = seed_variance([scores.aggregate(metric).value for scores in seed_scores])
    if (other := eval_models.compare_to) is not None:
        result["against"] = compare_models(metric, item_scores, score(other), str(other.path))
        if eval_models.seed_runs:
            difference = abs(result["against"]["difference"]["value"])
            result["against"]["beyond_noise"] = difference > result["noise"]["floor"]
    return result


def summarize_item_scores(
    benchmark: Benchmark, item_scores: ItemScores, rows: Sequence[BenchmarkRow]
) -> dict[str, Any]:
    """The scores of a benchmark: the primary metric on all items and on each group, and the other metrics."""
    metric = benchmark.metrics[0]
    group_indices: dict[str, list[int]] = {name: [] for name in sorted({row.group for row in rows})}
    for i, row in enumerate(rows):
        group_indices[row.group].append(i)
    groups = group_indices if len(group_indices) > 1 else {}
    return {
        "metric": metric,
        **_score_against_chance(metric, item_scores),
        "ties": item_scores.ties,
        "others": {name: to_dict(item_scores.aggregate(name)) for name in item_scores.secondary_metrics(benchmark)},
        "groups": {
            name: _score_against_chance(metric, item_scores.select(indices)) for name, indices in groups.items()
        },
    }


def _score_against_chance(metric: str, item_scores: ItemScores) -> dict[str, Any]:
    """A score, and whether its whole confidence interval is above or below chance."""
    score, chance = item_scores.aggregate(metric), item_scores.chance
    return {
        **to_dict(score),
        "chance": chance,
        "above_chance": None if chance is None else score.is_above(chance),
        "below_chance": None if chance is None else score.is_below(chance),
    }


def shuffled_control(metric: str, original: ItemScores, shuffled: ItemScores) -> dict[str, Any]:
    """The score with shuffled words, and by how much it drops: what word order is worth to the model."""
    score_drop = score_difference(metric, original, shuffled)
    # Shuffling can lower an accuracy, and move a preference in either direction.
    order_matters = score_drop.is_above(0) or (metric == "stereotyped" and score_drop.is_below(0))
    return {
        **to_dict(shuffled.aggregate(metric)),
        "lost": interval_to_dict(score_drop),
        "order_matters": order_matters,
    }


def score_difference(metric: str, a: ItemScores, b: ItemScores) -> ScoreWithCI:
    """By how much a scores above b, with a paired confidence interval."""
    if metric in GENERATION_METRICS:
        return generation_metric_difference(a.references, a.predictions, b.predictions, metric)
    return paired_difference(a.item_values[metric].tolist(), b.item_values[metric].tolist())


def compare_models(metric: str, item_scores: ItemScores, other_scores: ItemScores, model_name: str) -> dict[str, Any]:
    """Compare with another model on the same items.

    A difference is significant if its paired confidence interval excludes 0 and, for accuracies, McNemar's exact test agrees.
    """
    difference = score_difference(metric, item_scores, other_scores)
    score, other_score = item_scores.aggregate(metric), other_scores.aggregate(metric)
    result = {"model": model_name, **to_dict(other_score), "difference": interval_to_dict(difference)}
    p_value = None
    if metric not in GENERATION_METRICS:
        a, b = item_scores.item_values[metric], other_scores.item_values[metric]
        p_value = mcnemar_p_value(a.tolist(), b.tolist())
        result |= {"p": p_value, "only_this": int((a > b).sum()), "only_other": int((a < b).sum())}
    is_better = difference.value > 0
    if metric == "stereotyped":  # 0.5 is best
        is_better = abs(score.value - 0.5) < abs(other_score.value - 0.5)
    return result | compare_significance(difference, is_better, p_value)


def compare_significance(difference: ScoreWithCI, is_better: bool, p_value: float | None = None) -> dict[str, Any]:
    """Whether a difference is significant, and if so, which model is ahead: "this" or "other"."""
    excludes_zero = difference.is_above(0) or difference.is_below(0)
    significant = excludes_zero and (p_value is None or p_value < SIGNIFICANCE_LEVEL)
    return {"real": significant, "ahead": ("this" if is_better else "other") if significant else None}


def seed_variance(scores: Sequence[float]) -> dict[str, Any]:
    """The scores of runs that differ by their seed, and the largest difference that the seed explains."""
    return {"models": len(scores), "scores": list(scores), "floor": noise_floor(scores)}


def interval_to_dict(score: ScoreWithCI) -> dict[str, Any]:
    return {"value": score.value, "low": score.low, "high": score.high}


def to_dict(score: ScoreWithCI) -> dict[str, Any]:
    """A score in the JSON of benchmark results."""
    return {"score": score.value, "low": score.low, "high": score.high, "n": score.n}
