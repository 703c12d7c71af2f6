"""Label efficiency: how many labels pre-training saves, from a model fine-tuned and trained from scratch on growing samples."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path
from statistics import median_high
from typing import Any

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.environment import library_versions
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunDir, RunInterruptedError, catch_signals, open_run
from nextword.common.statistics import ScoreWithCI, mean_of_runs
from nextword.tasks.dataset import TASK_KINDS
from nextword.training.launch import check_resume_config

DEFAULT_EXAMPLE_COUNTS = (32, 128, 512, 2048)  # all examples are added
LOWER_IS_BETTER_METRICS = ("bits_per_byte", "loss")

FinetuneFunction = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class StudyRun:
    """One run of the study, a line of its metrics.jsonl.

    Attributes:
        asked: Requested number of examples; None: all.
        examples: Number of training examples.
        available: Number of training examples in the data.
        seed: Seed of the sample and of the training.
        pretrained: Whether the run started from the pre-trained model, and not from scratch.
        task: Name of the task.
        metric: Name of the metric.
        score: The metric on the validation set.
        seconds: Duration of the run.
        baselines: The metric of each baseline.
    """

    asked: int | None
    examples: int
    available: int
    seed: int
    pretrained: bool
    task: str
    metric: str
    score: float
    seconds: float
    baselines: dict[str, Any]

    def __str__(self) -> str:
        kind = "pre-trained" if self.pretrained else "from scratch"
        return f"{self.examples:,} examples, seed {self.seed}, {kind}: {self.metric} {self.score:.3f}"


def run_study(
    finetune: FinetuneFunction,
    out: Path,
    request: dict[str, Any],
    command: str,
    *,
    resume: bool,
    console: Console,
) -> dict[str, Any]:
    """Fine-tune and train from scratch for each number of examples and seed, and compare.

    Each run is a fine-tuning run in a directory of its own, removed once its score is stored. An interrupted study resumes with
    the run that was interrupted, from its last checkpoint.

    Args:
        finetune: Performs one run; takes `out`, `limit`, `seed`, `scratch`, `resume` and `console`, and returns its result.
        out: The directory of the study.
        request: `model`, `data`, `counts`, `seeds` and the settings of the runs.
        command: The command line or the call from Python.
        resume: Whether to resume the study in `out`.
        console: Where progress goes.

    Returns:
        The result, also stored as result.json.
    """
    start_time = time.time()
    with open_run(out, resume=resume) as run_dir, catch_signals() as signals:
        if run_dir.exists:
            original = run_dir.metadata()["request"]
            check_resume_config(run_dir, original, request)
            request = original
            if run_dir.is_complete:
                return run_dir.result()
        else:
            metadata = {"recipe": {}, "task": "transfer", "request": request, "command": command}
            run_dir.write_metadata({**metadata, "versions": library_versions()})
            fs.atomic_write(run_dir.metrics_path, "")
        runs = fs.read_records(run_dir.metrics_path, StudyRun)
        counts = [*(request["counts"] or DEFAULT_EXAMPLE_COUNTS), None]
        grid = list(product(counts, range(request["seeds"]), (True, False)))
        done = {(run.asked, run.seed, run.pretrained) for run in runs}
        for number, (count, seed, pretrained) in enumerate(grid):
            exceeds_data = bool(runs) and count is not None and count >= runs[0].available
            if exceeds_data or (count, seed, pretrained) in done:
                continue
            console.progress("transfer", number, len(grid))
            runs.append(run_cell(finetune, run_dir, count, seed, pretrained))
            console.info(str(runs[-1]))
            if signals:
                message = f"interrupted after {len(runs)} of {len(grid)} runs, which are stored. Continue with --resume"
                raise RunInterruptedError(message, signals[0])
        result = summarize(runs) | {
            "run": str(out),
            "model": request["model"],
            "data": request["data"],
            "seconds": round(time.time() - start_time, 3),
        }
        fs.write_sealed_json(run_dir.result_path, result)
        return result


def run_cell(finetune: FinetuneFunction, run_dir: RunDir, count: int | None, seed: int, pretrained: bool) -> StudyRun:
    """Perform one run and store its score.

    Raises:
        UsageError: The run has no validation set.
    """
    out = run_dir.path / "cells" / f"{count or 'all'}-{seed}-{'pretrained' if pretrained else 'scratch'}"
    out.parent.mkdir(exist_ok=True)
    result = finetune(out=out, limit=count, seed=seed, scratch=not pretrained, resume=True, console=Console(quiet=True))
    metadata = RunDir(out).metadata()
    metric = TASK_KINDS[metadata["task"]["kind"]].metric
    metric = metric if metric in result else "bits_per_byte"
    if result.get(metric) is None:
        raise UsageError("transfer needs a validation set: add one with --validation")
    run = StudyRun(
        asked=count,
        examples=metadata["data"]["train"]["examples"],
        available=metadata["data"]["available"],
        seed=seed,
        pretrained=pretrained,
        task=metadata["task"]["task"],
        metric=metric,
        score=result[metric],
        seconds=result["seconds"],
        baselines={name: scores[metric] for name, scores in result.get("baselines", {}).items() if metric in scores},
    )
    fs.append_line(run_dir.metrics_path, fs.to_json_line(asdict(run)), durable=True)
    shutil.rmtree(out)
    return run


def summarize(runs: Sequence[StudyRun]) -> dict[str, Any]:
    """The result of a study: both curves with confidence intervals over seeds, and the equivalent label ratio."""
    metric = runs[0].metric
    higher_is_better = metric not in LOWER_IS_BETTER_METRICS

    def interval(count: int, pretrained: bool) -> ScoreWithCI:
        return mean_of_runs([run.score for run in runs if (run.examples, run.pretrained) == (count, pretrained)])

    counts = sorted({run.examples for run in runs})
    curves = [(count, interval(count, True), interval(count, False)) for count in counts]
    label_ratio = equivalent_label_ratio(
        [(count, pretrained.value, scratch.value) for count, pretrained, scratch in curves],
        sign=1 if higher_is_better else -1,
    )
    return {
        "task": runs[0].task,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "points": [{"examples": n, "pretrained": a.to_dict(), "scratch": b.to_dict()} for n, a, b in curves],
        "baselines": max(runs, key=lambda run: run.examples).baselines,
        "worth": label_ratio,
        "sentence": headline(label_ratio),
        "cells": [{key: value for key, value in asdict(run).items() if key != "baselines"} for run in runs],
    }


def equivalent_label_ratio(points: Sequence[tuple[int, float, float]], sign: int = 1) -> dict[str, Any]:
    """How many times the labels training from scratch needs to match pre-training.

    For each number of examples n, m is the number of examples at which the curve from scratch (made monotone, linear between
    its points on a logarithmic axis) reaches the pre-trained score.

    Args:
        points: (examples, pre-trained score, score from scratch), in ascending order.
        sign: 1 if a higher score is better, −1 if a lower one is.

    Returns:
        "ratio": the median of m / n; if no m is within the data, the greatest lower bound, with "at_least" true; None if the
        smallest number of examples is enough from scratch. "examples": its n. "ratios": all pairs [m / n, n].
    """
    best_scores = accumulate((sign * scratch for _, _, scratch in points), max)
    curve = [(math.log(n), best) for (n, _, _), best in zip(points, best_scores, strict=True)]
    ratios: list[tuple[float, int]] = []
    bounds: list[tuple[float, int]] = []
    for n, pretrained, _ in points:
        goal = sign * pretrained
        if goal > curve[-1][1]:
            bounds.append((points[-1][0] / n, n))
        elif goal > curve[0][1]:  # otherwise the smallest number of examples reaches it, and no ratio is known
            (x0, y0), (x1, y1) = next((a, b) for a, b in pairwise(curve) if b[1] >= goal)
            ratios.append((math.exp(x0 + (x1 - x0) * (goal - y0) / (y1 - y0)) / n, n))
    ratio, n = median_high(ratios) if ratios else max(bounds, default=(None, None))
    at_least = not ratios and bool(bounds)
    return {"ratio": ratio, "examples": n, "at_least": at_least, "ratios": [list(pair) for pair in ratios]}


def headline(label_ratio: dict[str, Any]) -> str:
    """The result of a study in one sentence."""
    ratio, n = label_ratio["ratio"], label_ratio["examples"]
    if ratio is None:
        return "Pre-training saves no labels here: training from scratch does as well with the fewest examples."
    if label_ratio["at_least"] and ratio <= 1:
        return f"With all {n:,} labels pre-training is better; how many labels it saves is beyond the data."
    scratch = f"training from scratch with {round(ratio * n):,}."
    if label_ratio["at_least"]:
        start = f"Pre-training is worth more than {ratio:.0f} times the labels here:"
        return f"{start} with {n:,} labels it is better than {scratch}"
    worth = "costs labels here" if ratio < 1 else f"is worth {ratio:.{1 if ratio < 10 else 0}f} times the labels here"
    return f"Pre-training {worth}: with {n:,} labels it matches {scratch}"
