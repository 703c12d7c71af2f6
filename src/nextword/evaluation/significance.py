"""From marks to a verdict: scores with their intervals, beside chance, a scrambled input, other seeds and another model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nextword.common.console import Console
from nextword.data.issues import IssueLog
from nextword.pipeline.item_scores import GENERATION_METRICS, ItemScores, evaluate_free_text, score_items
from nextword.pipeline.language_model import Model
from nextword.tasks import metrics
from nextword.tasks.benchmark_items import BenchmarkRow, load_rows, sample_indices
from nextword.tasks.benchmark_spec import Benchmark
from nextword.tasks.metrics import Score

DEFAULT_ITEM_LIMIT = 1000  # items of a suite, where not all are asked for
SIGNIFICANCE_LEVEL = 0.05  # what chance alone does less often than this is taken for real


@dataclass(frozen=True)
class EvalModels:
    """The models that are looked at together: the one that is judged; another that it is compared with; others of its kind that
    the seed alone tells apart; and a stronger one that reads what it writes."""

    model: Model
    compare_to: Model | None = None
    seed_runs: Sequence[Model] = ()
    judge: Model | None = None


def evaluate_benchmark(
    eval_models: EvalModels,
    benchmark: Benchmark,
    *,
    limit: int | None = DEFAULT_ITEM_LIMIT,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """A suite's result, as `nextword evaluate --json` prints it.

    Args:
        limit: judge by so many of the items, of each group its share; None: by all of them. The scrambled ones are never more
            than `LIMIT`.

    Raises:
        UsageError: the suite's files are not there.
        NextwordError: not one item can be used.
    """
    console = console or Console(quiet=True)
    problems = IssueLog()
    all_items = load_rows(benchmark, problems)
    for line in problems.summary_lines():
        console.warn(line)
    items = [all_items[i] for i in sample_indices(all_items, limit)]

    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, total: console.progress(f"{benchmark.name}{what}", done, total)

    started = time.monotonic()
    if benchmark.kind == "free text":
        result = evaluate_free_text(
            eval_models.model, benchmark, items, seed=seed, judge=eval_models.judge, progress=progress("")
        )
        return {**result, "seconds": round(time.monotonic() - started, 3)}
    item_scores = score_items(eval_models.model, benchmark, items, progress=progress(""))
    seconds = time.monotonic() - started
    result = summarize_item_scores(benchmark, item_scores, items) | {"of": len(all_items), "seconds": round(seconds, 3)}
    sampled = sample_indices(items, DEFAULT_ITEM_LIMIT)
    shuffled_scores = score_items(
        eval_models.model, benchmark, [items[i] for i in sampled], shuffled=True, progress=progress(", scrambled")
    )
    result["scrambled"] = shuffled_control(benchmark.metrics[0], item_scores.select(sampled), shuffled_scores)
    if eval_models.seed_runs:
        others = [
            score_items(model, benchmark, items, progress=progress(f", {model.path}"))
            for model in eval_models.seed_runs
        ]
        result["noise"] = seed_variance([each.aggregate(benchmark.metrics[0]).value for each in (item_scores, *others)])
    if eval_models.compare_to is not None:
        other = score_items(
            eval_models.compare_to, benchmark, items, progress=progress(f", {eval_models.compare_to.path}")
        )
        result["against"] = compare_models(benchmark.metrics[0], item_scores, other, str(eval_models.compare_to.path))
        if eval_models.seed_runs:
            apart = abs(result["against"]["difference"]["value"])
            result["against"]["beyond_noise"] = apart > result["noise"]["floor"]
    return result


def summarize_item_scores(
    benchmark: Benchmark, item_scores: ItemScores, items: Sequence[BenchmarkRow]
) -> dict[str, Any]:
    """A model's scores on a suite: the one that counts, of all items and of each group, and the others."""
    metric = benchmark.metrics[0]
    names = sorted({item.group for item in items})
    group_indices = {
        name: [i for i, item in enumerate(items) if item.group == name] for name in names if len(names) > 1
    }
    return {
        "metric": metric, **_score_against_chance(metric, item_scores), "ties": item_scores.ties,
        "others": {name: to_dict(item_scores.aggregate(name)) for name in item_scores.secondary_metrics(benchmark)},
        "groups": {name: _score_against_chance(metric, item_scores.select(chosen)) for name, chosen in group_indices.items()},
    }  # fmt: skip


def _score_against_chance(metric: str, item_scores: ItemScores) -> dict[str, Any]:
    """A score, and on which side of chance its whole interval lies, if on any."""
    score, chance = item_scores.aggregate(metric), item_scores.chance
    sides = (None, None) if chance is None else (score.low > chance, score.high < chance)
    return {**to_dict(score), "chance": chance, "above_chance": sides[0], "below_chance": sides[1]}


def shuffled_control(metric: str, original: ItemScores, shuffled: ItemScores) -> dict[str, Any]:
    """The score with the words in another order, and how much less it is: what their order is worth to the model."""
    score_drop = score_difference(metric, original, shuffled)
    # Of what is right, order can only be worth something; a leaning it can change either way.
    matters = score_drop.low > 0 or (metric == "stereotyped" and score_drop.high < 0)
    return {**to_dict(shuffled.aggregate(metric)), "lost": interval_to_dict(score_drop), "order_matters": matters}


def score_difference(metric: str, a: ItemScores, b: ItemScores) -> Score:
    """How much a is above b by a score, with its paired interval."""
    if metric in GENERATION_METRICS:
        return metrics.generation_metric_difference(a.references, a.predictions, b.predictions, metric)
    return metrics.paired_difference(a.item_values[metric].tolist(), b.item_values[metric].tolist())


def compare_models(metric: str, item_scores: ItemScores, other_scores: ItemScores, model_name: str) -> dict[str, Any]:
    """Another model on the same items: whether the two differ, and only then which is ahead.

    A difference is real where its paired interval leaves out 0 and, of scores that count what is right, McNemar's exact
    test says so as well.
    """
    result: dict[str, Any] = {"model": model_name, **to_dict(other_scores.aggregate(metric))}
    result["difference"] = interval_to_dict(score_difference(metric, item_scores, other_scores))
    if metric not in GENERATION_METRICS:
        a, b = item_scores.item_values[metric], other_scores.item_values[metric]
        result["p"] = metrics.mcnemar_p_value(a.tolist(), b.tolist())
        result["only_this"], result["only_other"] = int((a > b).sum()), int((a < b).sum())
    better = result["difference"]["value"] > 0
    if metric == "stereotyped":  # of which a half is best
        better = abs(item_scores.aggregate(metric).value - 0.5) < abs(result["score"] - 0.5)
    return compare_significance(result, better)


def compare_significance(result: dict[str, Any], better: bool) -> dict[str, Any]:
    """Whether a difference is real, and then which of the two is ahead: "this" (where it is the better one) or "other"."""
    difference_interval = result["difference"]
    result["real"] = (difference_interval["low"] > 0 or difference_interval["high"] < 0) and result.get(
        "p", 0.0
    ) < SIGNIFICANCE_LEVEL
    result["ahead"] = ("this" if better else "other") if result["real"] else None
    return result


def seed_variance(values: Sequence[float]) -> dict[str, Any]:
    """What the seed alone does to a score."""
    return {"models": len(values), "scores": list(values), "floor": metrics.noise_floor(values)}


def interval_to_dict(score: Score) -> dict[str, float]:
    return {"value": score.value, "low": score.low, "high": score.high}


def to_dict(score: Score) -> dict[str, Any]:
    return {"score": score.value, "low": score.low, "high": score.high, "n": score.n}
