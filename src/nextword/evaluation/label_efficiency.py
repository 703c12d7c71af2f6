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
from nextword.common.environment import library_versions
from nextword.common.errors import UsageError
from nextword.common.results import short_path_name
from nextword.common.run_dir import RunDir, RunInterruptedError, catch_signals, open_run
from nextword.pipeline.predictor import SELECTION_METRIC
from nextword.reporting.label_efficiency_page import write_label_efficiency_page
from nextword.tasks.metrics import seed_interval
from nextword.training.launch import check_resume_config

DEFAULT_EXAMPLE_COUNTS = (32, 128, 512, 2048)  # examples to learn from, and then all of them
LOWER_IS_BETTER = ("bits_per_byte", "loss")

FinetuneFunction = Callable[..., dict[str, Any]]


def run_study(
    finetune: FinetuneFunction,
    out: Path,
    request: dict[str, Any],
    command: list[str],
    *,
    resume: bool,
    console: Console,
) -> dict[str, Any]:
    """Fill the grid of (examples, seed, pre-trained or not), cell by cell, and say what it shows.

    A cell is a whole fine-tuning run in a folder of its own, which is cleared away once its score is on disk; so a grid
    that was stopped goes on where it stood, inside a cell too.

    Args:
        tune: runs one cell; takes `out`, `limit`, `seed`, `scratch`, `resume` and `console`, and gives the run's result.
        request: what the person said: `model`, `data`, `counts`, `seeds` and the settings of the runs.
    """
    started = time.time()
    with open_run(out, resume=resume) as run, catch_signals() as caught:
        if run.exists:
            check_resume_config(run, request)
            request = run.metadata()["request"]
            if run.is_complete:
                return fs.read_json(run.result_path)
        else:
            metadata = {
                "recipe": {},
                "task": "transfer",
                "request": request,
                "command": " ".join(command),
                "versions": library_versions(),
            }
            run.write_metadata(metadata)
            fs.atomic_write(run.metrics_path, "")
        runs: list[dict[str, Any]] = fs.read_jsonl(run.metrics_path)
        grid = [
            (count, seed, pretrained)
            for count in [*(request["counts"] or DEFAULT_EXAMPLE_COUNTS), None]
            for seed in range(request["seeds"])
            for pretrained in (True, False)
        ]
        done = {(cell["asked"], cell["seed"], cell["pretrained"]) for cell in runs}
        for number, cell in enumerate(grid):
            if cell in done or (runs and cell[0] is not None and cell[0] >= runs[0]["available"]):
                continue
            console.progress("transfer", number, len(grid))
            runs.append(run_cell(finetune, run, *cell))
            console.info(format_cell(runs[-1]))
            if caught:
                raise RunInterruptedError(
                    f"stopped after {len(runs)} of {len(grid)} cells, and kept. Go on with --resume", caught[0]
                )
        result = summarize(runs) | {
            "run": str(out), "model": request["model"], "data": request["data"], "seconds": round(time.time() - started, 3),
        }  # fmt: skip
        page = {**result, "model": short_path_name(request["model"]), "data": short_path_name(request["data"][0])}
        write_label_efficiency_page(out, {**page, "command": run.metadata()["command"]})
        fs.atomic_write(run.result_path, fs.to_json(result))
        return result


def run_cell(finetune: FinetuneFunction, run: RunDir, limit: int | None, seed: int, pretrained: bool) -> dict[str, Any]:
    """One cell: its run, its score, on disk."""
    folder = run.path / "cells" / f"{limit or 'all'}-{seed}-{'pretrained' if pretrained else 'scratch'}"
    folder.parent.mkdir(exist_ok=True)
    result = finetune(
        out=folder, limit=limit, seed=seed, scratch=not pretrained, resume=True, console=Console(quiet=True)
    )
    metadata = RunDir(folder).metadata()
    metric = SELECTION_METRIC[metadata["task"]["kind"]]
    metric = metric if metric in result else "bits_per_byte"
    if result.get(metric) is None:
        raise UsageError("transfer needs held-out examples to be scored on: give some by --validation")
    train = metadata["data"]["train"]["examples"]
    cell = {
        "asked": limit, "examples": train, "available": metadata["data"]["available"], "seed": seed, "pretrained": pretrained,
        "task": metadata["task"]["task"], "metric": metric, "score": result[metric], "seconds": result["seconds"],
        "baselines": {name: scores[metric] for name, scores in result.get("baselines", {}).items() if metric in scores},
    }  # fmt: skip
    fs.append_line_durably(run.metrics_path, json.dumps(cell))
    shutil.rmtree(folder)
    return cell


def format_cell(cell: dict[str, Any]) -> str:
    kind = "pre-trained" if cell["pretrained"] else "from scratch"
    return f"{cell['examples']:,} examples, seed {cell['seed']}, {kind}: {cell['metric']} {cell['score']:.3f}"


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The two curves with their intervals over seeds, and the sentence."""
    metric = runs[0]["metric"]
    points = []
    for count in sorted({cell["examples"] for cell in runs}):
        by_kind = {
            kind: seed_interval(
                [c["score"] for c in runs if c["examples"] == count and c["pretrained"] == pretrained]
            ).to_dict()
            for kind, pretrained in (("pretrained", True), ("scratch", False))
        }
        points.append({"examples": count, **by_kind})
    higher = metric not in LOWER_IS_BETTER
    label_ratio = equivalent_label_ratio(
        [(p["examples"], p["pretrained"]["value"], p["scratch"]["value"]) for p in points], 1 if higher else -1
    )
    return {
        "task": runs[0]["task"], "metric": metric, "higher_is_better": higher, "points": points,
        "baselines": max(runs, key=lambda cell: cell["examples"])["baselines"], "worth": label_ratio,
        "sentence": headline(label_ratio), "cells": [{k: v for k, v in cell.items() if k != "baselines"} for cell in runs],
    }  # fmt: skip


def equivalent_label_ratio(points: list[tuple[int, float, float]], sign: int = 1) -> dict[str, Any]:
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


def headline(label_ratio: dict[str, Any]) -> str:
    ratio, n = label_ratio["ratio"], label_ratio["examples"]
    if ratio is None:
        return "Pre-training is not worth any labels here: from scratch the fewest do as well."
    if label_ratio["at_least"]:
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
