"""From marks to a verdict: scores with their intervals, beside chance, a scrambled input, other seeds and another model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nextword.common.console import Console
from nextword.data.decoding import Problems
from nextword.pipeline.item_scores import WRITTEN, Marks, free_text, marks
from nextword.pipeline.language_model import Model
from nextword.tasks import metrics
from nextword.tasks.benchmark_items import Item, read_items, sample
from nextword.tasks.benchmark_spec import Suite
from nextword.tasks.metrics import Score

LIMIT = 1000  # items of a suite, where not all are asked for
SURE = 0.05  # what chance alone does less often than this is taken for real


@dataclass(frozen=True)
class Panel:
    """The models that are looked at together: the one that is judged; another that it is compared with; others of its kind that
    the seed alone tells apart; and a stronger one that reads what it writes."""

    model: Model
    against: Model | None = None
    seeds: Sequence[Model] = ()
    judge: Model | None = None


def judge_suite(
    panel: Panel, suite: Suite, *, limit: int | None = LIMIT, seed: int = 0, console: Console | None = None
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
    problems = Problems()
    everything = read_items(suite, problems)
    for line in problems.lines():
        console.warn(line)
    items = [everything[i] for i in sample(everything, limit)]

    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, total: console.progress(f"{suite.name}{what}", done, total)

    started = time.monotonic()
    if suite.kind == "free text":
        result = free_text(panel.model, suite, items, seed=seed, judge=panel.judge, progress=progress(""))
        return {**result, "seconds": round(time.monotonic() - started, 3)}
    own = marks(panel.model, suite, items, progress=progress(""))
    seconds = time.monotonic() - started
    result = described(suite, own, items) | {"of": len(everything), "seconds": round(seconds, 3)}
    some = sample(items, LIMIT)
    mixed = marks(panel.model, suite, [items[i] for i in some], scrambled=True, progress=progress(", scrambled"))
    result["scrambled"] = scrambled(suite.metrics[0], own.part(some), mixed)
    if panel.seeds:
        others = [marks(model, suite, items, progress=progress(f", {model.path}")) for model in panel.seeds]
        result["noise"] = noise([each.score(suite.metrics[0]).value for each in (own, *others)])
    if panel.against is not None:
        other = marks(panel.against, suite, items, progress=progress(f", {panel.against.path}"))
        result["against"] = compared(suite.metrics[0], own, other, str(panel.against.path))
        if panel.seeds:
            apart = abs(result["against"]["difference"]["value"])
            result["against"]["beyond_noise"] = apart > result["noise"]["floor"]
    return result


def described(suite: Suite, own: Marks, items: Sequence[Item]) -> dict[str, Any]:
    """A model's scores on a suite: the one that counts, of all items and of each group, and the others."""
    metric = suite.metrics[0]
    names = sorted({item.group for item in items})
    places = {name: [i for i, item in enumerate(items) if item.group == name] for name in names if len(names) > 1}
    return {
        "metric": metric, **_beside_chance(metric, own), "ties": own.ties,
        "others": {name: told(own.score(name)) for name in own.others(suite)},
        "groups": {name: _beside_chance(metric, own.part(chosen)) for name, chosen in places.items()},
    }  # fmt: skip


def _beside_chance(metric: str, own: Marks) -> dict[str, Any]:
    """A score, and on which side of chance its whole interval lies, if on any."""
    score, chance = own.score(metric), own.chance
    sides = (None, None) if chance is None else (score.low > chance, score.high < chance)
    return {**told(score), "chance": chance, "above_chance": sides[0], "below_chance": sides[1]}


def scrambled(metric: str, own: Marks, mixed: Marks) -> dict[str, Any]:
    """The score with the words in another order, and how much less it is: what their order is worth to the model."""
    lost = difference(metric, own, mixed)
    # Of what is right, order can only be worth something; a leaning it can change either way.
    matters = lost.low > 0 or (metric == "stereotyped" and lost.high < 0)
    return {**told(mixed.score(metric)), "lost": interval(lost), "order_matters": matters}


def difference(metric: str, a: Marks, b: Marks) -> Score:
    """How much a is above b by a score, with its paired interval."""
    if metric in WRITTEN:
        return metrics.writing_difference(a.references, a.texts, b.texts, metric)
    return metrics.difference(a.values[metric].tolist(), b.values[metric].tolist())


def compared(metric: str, own: Marks, other: Marks, name: str) -> dict[str, Any]:
    """Another model on the same items: whether the two differ, and only then which is ahead.

    A difference is real where its paired interval leaves out 0 and, of scores that count what is right, McNemar's exact
    test says so as well.
    """
    result: dict[str, Any] = {"model": name, **told(other.score(metric))}
    result["difference"] = interval(difference(metric, own, other))
    if metric not in WRITTEN:
        a, b = own.values[metric], other.values[metric]
        result["p"] = metrics.mcnemar(a.tolist(), b.tolist())
        result["only_this"], result["only_other"] = int((a > b).sum()), int((a < b).sum())
    better = result["difference"]["value"] > 0
    if metric == "stereotyped":  # of which a half is best
        better = abs(own.score(metric).value - 0.5) < abs(result["score"] - 0.5)
    return decided(result, better)


def decided(result: dict[str, Any], better: bool) -> dict[str, Any]:
    """Whether a difference is real, and then which of the two is ahead: "this" (where it is the better one) or "other"."""
    apart = result["difference"]
    result["real"] = (apart["low"] > 0 or apart["high"] < 0) and result.get("p", 0.0) < SURE
    result["ahead"] = ("this" if better else "other") if result["real"] else None
    return result


def noise(values: Sequence[float]) -> dict[str, Any]:
    """What the seed alone does to a score."""
    return {"models": len(values), "scores": list(values), "floor": metrics.noise_floor(values)}


def interval(score: Score) -> dict[str, float]:
    return {"value": score.value, "low": score.low, "high": score.high}


def told(score: Score) -> dict[str, Any]:
    return {"score": score.value, "low": score.low, "high": score.high, "n": score.n}
