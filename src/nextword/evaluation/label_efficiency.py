"""What pre-training is worth on a task of one's own: a model fine-tuned and trained from scratch, by number of labels."""

import json
import math
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import Interrupted, RunFolder, catching_signals, open_run, versions
from nextword.pipeline.predictor import METRIC
from nextword.reporting.label_efficiency_page import transfer_page
from nextword.reporting.task_results import name_of
from nextword.tasks.metrics import over_seeds
from nextword.training.launch import refuse_changes

COUNTS = (32, 128, 512, 2048)  # examples to learn from, and then all of them
LOWER_IS_BETTER = ("bits_per_byte", "loss")

Tune = Callable[..., dict[str, Any]]


def run_transfer(
    tune: Tune, out: Path, request: dict[str, Any], command: list[str], *, resume: bool, console: Console
) -> dict[str, Any]:
    """Fill the grid of (examples, seed, pre-trained or not), cell by cell, and say what it shows.

    A cell is a whole fine-tuning run in a folder of its own, which is cleared away once its score is on disk; so a grid
    that was stopped goes on where it stood, inside a cell too.

    Args:
        tune: runs one cell; takes `out`, `limit`, `seed`, `scratch`, `resume` and `console`, and gives the run's result.
        request: what the person said: `model`, `data`, `counts`, `seeds` and the settings of the runs.
    """
    started = time.time()
    with open_run(out, resume=resume) as run, catching_signals() as caught:
        if run.begun:
            refuse_changes(run, request)
            request = run.facts()["request"]
            if run.finished:
                return fs.read_json(run.result)
        else:
            facts = {
                "recipe": {},
                "task": "transfer",
                "request": request,
                "command": " ".join(command),
                "versions": versions(),
            }
            run.write_facts(facts)
            fs.write_durably(run.metrics, "")
        cells: list[dict[str, Any]] = fs.read_json_lines(run.metrics)
        grid = [
            (count, seed, pretrained)
            for count in [*(request["counts"] or COUNTS), None]
            for seed in range(request["seeds"])
            for pretrained in (True, False)
        ]
        done = {(cell["asked"], cell["seed"], cell["pretrained"]) for cell in cells}
        for number, cell in enumerate(grid):
            if cell in done or (cells and cell[0] is not None and cell[0] >= cells[0]["available"]):
                continue
            console.progress("transfer", number, len(grid))
            cells.append(fill(tune, run, *cell))
            console.say(in_words(cells[-1]))
            if caught:
                raise Interrupted(
                    f"stopped after {len(cells)} of {len(grid)} cells, and kept. Go on with --resume", caught[0]
                )
        result = conclude(cells) | {
            "run": str(out), "model": request["model"], "data": request["data"], "seconds": round(time.time() - started, 3),
        }  # fmt: skip
        page = {**result, "model": name_of(request["model"]), "data": name_of(request["data"][0])}
        transfer_page(out, {**page, "command": run.facts()["command"]})
        fs.write_durably(run.result, fs.to_json(result))
        return result


def fill(tune: Tune, run: RunFolder, asked: int | None, seed: int, pretrained: bool) -> dict[str, Any]:
    """One cell: its run, its score, on disk."""
    folder = run.path / "cells" / f"{asked or 'all'}-{seed}-{'pretrained' if pretrained else 'scratch'}"
    folder.parent.mkdir(exist_ok=True)
    result = tune(out=folder, limit=asked, seed=seed, scratch=not pretrained, resume=True, console=Console(quiet=True))
    facts = RunFolder(folder).facts()
    metric = METRIC[facts["task"]["kind"]]
    metric = metric if metric in result else "bits_per_byte"
    if result.get(metric) is None:
        raise UsageError("transfer needs held-out examples to be scored on: give some by --validation")
    train = facts["data"]["train"]["examples"]
    cell = {
        "asked": asked, "examples": train, "available": facts["data"]["available"], "seed": seed, "pretrained": pretrained,
        "task": facts["task"]["task"], "metric": metric, "score": result[metric], "seconds": result["seconds"],
        "baselines": {name: scores[metric] for name, scores in result.get("baselines", {}).items() if metric in scores},
    }  # fmt: skip
    fs.append_durably(run.metrics, json.dumps(cell))
    shutil.rmtree(folder)
    return cell


def in_words(cell: dict[str, Any]) -> str:
    kind = "pre-trained" if cell["pretrained"] else "from scratch"
    return f"{cell['examples']:,} examples, seed {cell['seed']}, {kind}: {cell['metric']} {cell['score']:.3f}"


def conclude(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The two curves with their intervals over seeds, and the sentence."""
    metric = cells[0]["metric"]
    points = []
    for count in sorted({cell["examples"] for cell in cells}):
        by_kind = {
            kind: over_seeds(
                [c["score"] for c in cells if c["examples"] == count and c["pretrained"] == pretrained]
            ).to_dict()
            for kind, pretrained in (("pretrained", True), ("scratch", False))
        }
        points.append({"examples": count, **by_kind})
    higher = metric not in LOWER_IS_BETTER
    worth = labels_worth(
        [(p["examples"], p["pretrained"]["value"], p["scratch"]["value"]) for p in points], 1 if higher else -1
    )
    return {
        "task": cells[0]["task"], "metric": metric, "higher_is_better": higher, "points": points,
        "baselines": max(cells, key=lambda cell: cell["examples"])["baselines"], "worth": worth,
        "sentence": sentence(worth), "cells": [{k: v for k, v in cell.items() if k != "baselines"} for cell in cells],
    }  # fmt: skip


def labels_worth(points: list[tuple[int, float, float]], sign: int = 1) -> dict[str, Any]:
    """How many labels from scratch it takes to reach what pre-training reaches with fewer.

    points: (examples, score pre-trained, score from scratch), by examples; sign −1 where lower is better. For each number
    of examples n the place m is sought where the curve from scratch (made monotone, straight between its points on a
    logarithmic axis) reaches the pre-trained score: m / n. Told is the middle one of those ratios, or where the curve from
    scratch never gets that far, the largest that is known to be too small.
    """
    best = -math.inf
    curve: list[tuple[float, float]] = []
    for n, _, scratch in points:
        best = max(best, sign * scratch)
        curve.append((math.log(n), best))
    ratios, bounds = [], []
    for n, pretrained, _ in points:
        goal = sign * pretrained
        if goal <= curve[0][1]:  # the smallest number from scratch is enough: no more is known
            continue
        if goal > curve[-1][1]:
            bounds.append((points[-1][0] / n, n))
            continue
        (x0, y0), (x1, y1) = next((a, b) for a, b in pairwise(curve) if b[1] >= goal)
        m = math.exp(x0 + (x1 - x0) * (goal - y0) / (y1 - y0))
        ratios.append((m / n, n))
    if ratios:
        ratio, n = sorted(ratios)[len(ratios) // 2]
        return {"ratio": ratio, "examples": n, "at_least": False, "ratios": [list(one) for one in ratios]}
    if bounds:
        ratio, n = max(bounds)
        return {"ratio": ratio, "examples": n, "at_least": True, "ratios": []}
    return {"ratio": None, "examples": None, "at_least": False, "ratios": []}


def sentence(worth: dict[str, Any]) -> str:
    ratio, n = worth["ratio"], worth["examples"]
    if ratio is None:
        return "Pre-training is not worth any labels here: from scratch the fewest do as well."
    if worth["at_least"]:
        if ratio <= 1:
            return f"With all {n:,} labels pre-training is ahead; what it is worth in labels lies beyond the data."
        return (
            f"Pre-training is worth more than {ratio:.0f} times the labels here: {n:,} with it do better than "
            f"{round(ratio * n):,} without."
        )
    if ratio < 1:
        return f"Pre-training costs labels here: {n:,} with it do as well as {round(ratio * n):,} without."
    shown = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
    return f"Pre-training is worth {shown} times the labels here: {n:,} with it do as well as {round(ratio * n):,} without."
