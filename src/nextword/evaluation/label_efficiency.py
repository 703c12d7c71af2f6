"""Label efficiency: how many labels pre-training saves, from a model fine-tuned and trained from scratch on growing samples."""

import importlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.environment import library_versions
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunDir, RunInterruptedError, catch_signals, open_run
from nextword.common.statistics import CONFIDENCE_LEVEL, ScoreWithCI, mean_of_runs, t_quantile
from nextword.tasks.dataset import TASK_KINDS
from nextword.tasks.metrics import LOWER_IS_BETTER_METRICS
from nextword.training.launch import check_resume_config

DEFAULT_EXAMPLE_COUNTS = (32, 128, 512, 2048)  # all examples are added
NUM_DRAWS = 1000  # of both curves, for the interval of the label ratio

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
        error: Standard error of the score from the sample of validation examples; 0 if it is not known.
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
    error: float = 0.0

    def __str__(self) -> str:
        kind = "pre-trained" if self.pretrained else "from scratch"
        return f"{self.examples:,} examples, seed {self.seed}, {kind}: {self.metric} {self.score:.3f}"


def run_study(
    finetune: FinetuneFunction, out: Path, request: dict[str, Any], command: str, *, resume: bool, console: Console
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
    metric = result["metric"] if metadata["request"].get("metric") else TASK_KINDS[metadata["task"]["kind"]].metric
    metric = metric if metric in result else "bits_per_byte"
    if result.get(metric) is None:
        raise UsageError("transfer needs a validation set: add one with --validation")
    scores: dict[str, dict[str, Any]] = result.get("scores") or {}
    low, high = (scores.get(metric, {}).get(bound) for bound in ("low", "high"))
    width = 0.0 if low is None or high is None else high - low
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
        error=width / (2 * t_quantile(math.inf)),
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
    label_ratio = equivalent_label_ratio(runs, sign=1 if higher_is_better else -1)
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


def equivalent_label_ratio(runs: Sequence[StudyRun], sign: int = 1) -> dict[str, Any]:
    """How many times the labels training from scratch needs to match pre-training.

    For each number of examples n, m is the number of examples at which the curve from scratch reaches the pre-trained score.
    Both curves are means over seeds, made monotone by isotonic regression (Barlow et al. 1972), and linear between their points
    on a logarithmic axis. Where m is beyond the largest or below the smallest number of examples, m / n is only bounded. The
    ratio is the median of m / n; with bounds it is known to lie between the medians of their two ends.

    The 95 % interval is that of curves drawn around the means: by Student's t with the variance over seeds, pooled over both
    curves, and by the standard error from the validation examples, which all runs of a curve share.

    Args:
        runs: The runs of both curves.
        sign: 1 if a higher score is better, −1 if a lower one is.

    Returns:
        "ratio": the ratio; or its lower bound, with "at_least" true; or its upper bound, with "at_most" true. "low" and "high":
        its interval, None where it is open, or if there is only one seed. "gain": whether the interval lies above 1 (true),
        below 1 (false) or neither (None). "ratios": the bounds of m / n by n.
    """
    counts = sorted({run.examples for run in runs})
    cells = [
        [[run for run in runs if (run.examples, run.pretrained) == (n, arm)] for n in counts] for arm in (True, False)
    ]
    means = sign * np.array([[np.mean([run.score for run in cell]) for cell in arm] for arm in cells])  # [2, counts]
    low, high = _log_ratio_bounds(np.log(counts), *means)
    ratios = [[n, *_ratios(*pair)] for n, *pair in zip(counts, low, high, strict=True)]
    lowest, highest = _ratios(float(np.median(low)), float(np.median(high)))
    result: dict[str, Any] = {"ratio": highest if lowest is None else lowest, "low": None, "high": None, "gain": None}
    result |= {
        "at_least": lowest is not None and (highest or math.inf) > lowest * (1 + 1e-9),
        "at_most": lowest is None,
        "ratios": ratios,
    }
    num_seeds = min(len(cell) for arm in cells for cell in arm)
    if num_seeds < 2:
        return result
    rng, degrees_of_freedom = np.random.default_rng(0), 2 * (num_seeds - 1)
    variances = [[np.var([run.score for run in cell], ddof=1) for cell in arm] for arm in cells]
    seed_errors = np.sqrt(np.mean(variances, axis=0) / num_seeds)
    row_errors = np.array([[np.mean([run.error for run in cell]) for cell in arm] for arm in cells])
    noise = seed_errors * rng.standard_t(degrees_of_freedom, (NUM_DRAWS, *means.shape))
    noise += row_errors * rng.normal(size=(NUM_DRAWS, 2, 1))
    draws = [np.median(_log_ratio_bounds(np.log(counts), *curves), axis=1) for curves in means + noise]
    low, high = (np.sort(column) for column in np.transpose(draws))
    outside = round(NUM_DRAWS * (1 - CONFIDENCE_LEVEL) / 2)
    log_low, log_high = float(low[outside]), float(high[-1 - outside])
    result |= dict(zip(("low", "high"), _ratios(log_low, log_high), strict=True))
    return result | {"gain": True if log_low > 0 else False if log_high < 0 else None}


def _log_ratio_bounds(
    log_counts: np.ndarray, pretrained: np.ndarray, scratch: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper bound of log(m / n) at each number of examples n, from scores of which higher is better."""
    isotonic: Any = importlib.import_module("scipy.optimize").isotonic_regression
    curve, goals = np.asarray(isotonic(scratch).x), np.asarray(isotonic(pretrained).x)
    position = np.searchsorted(curve, goals)  # of the first point that reaches the goal
    inside = (position > 0) & (position < len(curve))
    after = np.clip(position, 1, len(curve) - 1)
    rise = np.where(inside, curve[after] - curve[after - 1], 1)
    step = np.diff(log_counts, append=np.inf)[after - 1]
    reached = log_counts[after - 1] + np.where(inside, step * (goals - curve[after - 1]) / rise, 0) - log_counts
    low = np.where(inside, reached, np.where(position > 0, log_counts[-1] - log_counts, -np.inf))
    high = np.where(inside, reached, np.where(position > 0, np.inf, log_counts[0] - log_counts))
    return low, high


def _ratios(log_low: float, log_high: float) -> tuple[float | None, float | None]:
    """Bounds of a ratio from those of its logarithm; None: open."""
    low, high = math.exp(log_low), math.exp(log_high) if log_high < math.inf else math.inf
    return low or None, high if high < math.inf else None


def headline(label_ratio: dict[str, Any]) -> str:
    """The result of a study in one sentence."""

    def number(value: float) -> str:
        return f"{value:.{1 if value < 10 else 0}f}"

    ratio, low, high, gain = (label_ratio[name] for name in ("ratio", "low", "high", "gain"))
    bound = "more than " if label_ratio["at_least"] else "less than " if label_ratio["at_most"] else ""
    value = "not known" if ratio is None else bound + number(ratio)
    if low is None and high is None:
        interval = "no interval is known: give several seeds, and numbers of examples at which the scores differ"
    elif high is None and low is not None:
        interval = f"95 % CI: more than {number(low)}"
    else:
        interval = f"95 % CI {number(low or 0.0)} to {number(high or math.inf)}"
    if gain is None:
        return f"No evidence that pre-training saves labels here: the ratio of labels is {value} ({interval})."
    if gain:
        return f"Pre-training is worth {value} times the labels here ({interval})."
    return f"Pre-training costs labels here: it is worth {value} times the labels ({interval})."
