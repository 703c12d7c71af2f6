"""Starts, resumes and finishes training runs, in one process or in the ranks of a distributed run.

The main rank holds the run directory and decides. Worker ranks wait until it broadcasts the metadata of the run, then build the
same run from that.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.energy import EnergyMeter
from nextword.common.errors import NextwordError, UsageError
from nextword.common.run_dir import ROUNDING_NOTE, RunDir, diff_settings, open_run
from nextword.training import checkpoint
from nextword.training.config import DEPRECATED_PARALLEL
from nextword.training.distributed import DistContext, init_distributed
from nextword.training.remote_sync import CheckpointUploader

PARALLELISM_FIELDS = ("parallel", "tensor")  # settings that a resume may change


@dataclass
class RunContext:
    """A run in progress, as one of its ranks sees it.

    Attributes:
        run_dir: The files of the run. Only the main rank writes them.
        request: The options of the command that started the run.
        console: Output of the main rank.
        dist: The process group.
        device: The device of this rank.
        start_time: When this process started, in seconds since the epoch.
        energy_meter: Measures the energy of this process.
        metadata: run.json; None in the main rank of a new run, which chooses it.
        checkpoint: The checkpoint to resume from.
        uploader: Copies checkpoints to remote storage.
        tensorboard: Whether to write TensorBoard events.
        seconds_before_resume: Time that earlier processes have used, up to the checkpoint.
        workers_started: Whether the worker ranks have received the metadata.
    """

    run_dir: RunDir
    request: dict[str, Any]
    console: Console
    dist: DistContext
    device: torch.device
    start_time: float
    energy_meter: EnergyMeter
    metadata: dict[str, Any] | None = None
    checkpoint: Path | None = None
    uploader: CheckpointUploader | None = None
    tensorboard: bool = False
    seconds_before_resume: float = 0.0
    workers_started: bool = False

    now = staticmethod(time.time)

    def elapsed_seconds(self) -> float:
        """Wall time of the run, earlier processes included."""
        return self.now() - self.start_time + self.seconds_before_resume

    def info(self, text: str) -> None:
        """Print a line, on the main rank."""
        if self.dist.is_main:
            self.console.info(text)

    def warn(self, text: str) -> None:
        """Print a warning, on the main rank."""
        if self.dist.is_main:
            self.console.warn(text)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, on the main rank."""
        if self.dist.is_main:
            self.run_dir.append_metrics(record)

    def log_event(self, step: int, text: str, warning: bool = False) -> None:
        """Print a message and append it to metrics.jsonl, on the main rank."""
        self.log({"step": step, "message": text})
        (self.warn if warning else self.info)(text)

    def start_workers(self, metadata: dict[str, Any]) -> None:
        """On the main rank: let the worker ranks build the run that `metadata` describes."""
        self.workers_started = True
        self.dist.broadcast_object(
            {"facts": metadata, "checkpoint": None if self.checkpoint is None else str(self.checkpoint)}
        )


class TrainFn(Protocol):
    """Builds a run, trains and evaluates it. Returns the result on the main rank, and an empty dictionary elsewhere."""

    def __call__(self, run: RunContext) -> dict[str, Any]: ...


def run_training(
    train: TrainFn,
    out: Path,
    request: dict[str, Any],
    *,
    device: torch.device,
    start_time: float,
    resume: bool,
    tensorboard: bool,
    console: Console | None,
    mirror_url: str | None = None,
    strict: bool = False,
    write_reports: Callable[[Path], None],
) -> dict[str, Any]:
    """Start or resume a run and finish it.

    Args:
        train: Builds, trains and evaluates the run.
        out: The run directory.
        request: The options of the command; None for those not given. A resume uses the options that the run started with.
        device: The device of this rank.
        start_time: When the process started, in seconds since the epoch.
        resume: Continue a run that exists.
        tensorboard: Whether to write TensorBoard events.
        console: Output; None for no output.
        mirror_url: Remote storage for copies of the checkpoints, from which a missing run directory is restored.
        strict: Fail if the newest checkpoint is corrupt, instead of using the one before it.
        write_reports: Writes the report and the model card of a complete run, if they are missing.

    Returns:
        The result of the run; empty on worker ranks.

    Raises:
        UsageError: the run exists and `resume` is false, or the options differ from those of the run.
        RunInterruptedError: a signal stopped the run after a checkpoint.
        TrainingDivergedError: the loss stayed non-finite or kept spiking.
    """
    with console or Console(quiet=True) as console, init_distributed() as dist:
        run = RunContext(RunDir(out), request, console, dist, device, start_time, EnergyMeter(device))
        run.tensorboard = tensorboard and dist.is_main
        if not dist.is_main:
            return run_worker_rank(train, run)
        try:
            run.uploader = None if mirror_url is None else CheckpointUploader(mirror_url, console)
            if run.uploader is not None:
                run.uploader.restore(out, resume or dist.restarted)
            with open_run(out, resume=resume or dist.restarted):
                return run_main_rank(train, run, strict, write_reports)
        except NextwordError as error:
            if not run.workers_started:
                dist.broadcast_object({"failed": str(error).splitlines()[0]})
            raise


def run_main_rank(
    train: TrainFn, run: RunContext, strict: bool, write_reports: Callable[[Path], None]
) -> dict[str, Any]:
    """Start or resume a run in the rank that holds the run directory."""
    run_dir = run.run_dir
    if run_dir.exists:
        check_resume_config(run_dir, run.request, mutable_fields=PARALLELISM_FIELDS)
        if run_dir.is_complete:
            run.info(f"{run_dir.path}: the run is complete")
            run.dist.broadcast_object({"facts": None})
            run.workers_started = True
            write_reports(run_dir.path)  # missing after a kill between the result and the report
            result: dict[str, Any] = fs.read_json(run_dir.result_path)
        else:
            update_parallelism(run)
            resume_environment(run, strict)
            result = train(run)
    else:
        result = train(run)
    if run.uploader is not None:
        run.uploader.close(run_dir)
    return result


def run_worker_rank(train: TrainFn, run: RunContext) -> dict[str, Any]:
    """Take part in a run that the main rank starts.

    Raises:
        NextwordError: the main rank failed before it started the run.
    """
    start: dict[str, Any] = run.dist.broadcast_object()
    if "failed" in start:
        raise NextwordError(f"process {run.dist.rank}: {start['failed']}")
    if start["facts"] is None:
        return {}
    run.metadata = start["facts"]
    run.request = start["facts"]["request"]
    run.checkpoint = start["checkpoint"] and Path(start["checkpoint"])
    set_num_threads(run)
    return train(run)


def resume_environment(run: RunContext, strict: bool) -> None:
    """Read the metadata of a run, choose its checkpoint, and warn if this environment differs from the original one."""
    run.metadata = metadata = run.run_dir.metadata()
    run.request = metadata["request"]
    fixed = metadata["fixed"]
    for name, before, now in (
        ("device", fixed["device"], run.device.type),
        ("torch", metadata["versions"]["torch"], torch.__version__),
        ("world size", fixed["world_size"], run.dist.world_size),
    ):
        if before != now:
            run.warn(f"the run started with {name} {before} and continues with {now}: {ROUNDING_NOTE}")
    set_num_threads(run)
    run.checkpoint = checkpoint.latest_valid(run.run_dir.path, run.warn, strict)


def set_num_threads(run: RunContext) -> None:
    """Use as many threads as the run started with, unless the world size has changed."""
    assert run.metadata is not None
    fixed = run.metadata["fixed"]
    if fixed["world_size"] == run.dist.world_size:
        torch.set_num_threads(fixed["threads"])


def check_resume_config(run_dir: RunDir, request: dict[str, Any], mutable_fields: tuple[str, ...] = ()) -> None:
    """Check that the options of a resume equal those of the run. Options that are not given are not compared.

    Args:
        mutable_fields: Training settings that may differ.

    Raises:
        UsageError: with the options that differ.
    """
    original: dict[str, Any] = run_dir.metadata()["request"]
    mismatches: list[str] = []
    for name, value in request.items():
        previous: Any = original.get(name)
        if isinstance(value, dict) and isinstance(previous, dict | None):
            given = cast(dict[str, Any], value)
            value = {key: given[key] for key in given if name != "training" or key not in mutable_fields}
            previous = {key: (previous or {}).get(key) for key in value}
        if value not in (None, [], {}):
            mismatches += diff_settings(previous, value, name)
    if mismatches:
        raise UsageError(
            f"{run_dir.path}: the run started with other settings, and a resume cannot change them:\n  "
            + "\n  ".join(mismatches)
            + "\nOmit them to continue, or start a new run with another --out"
        )


def update_parallelism(run: RunContext) -> None:
    """Apply the parallelism settings of a resume to run.json. They change the result by rounding only."""
    metadata = run.run_dir.metadata()
    requested: dict[str, Any] = run.request.get("training") or {}
    original: dict[str, Any] = metadata["recipe"].get("training", {})
    current = {name: original[name] for name in PARALLELISM_FIELDS if name in original}
    if "parallel" in current:
        current["parallel"] = DEPRECATED_PARALLEL.get(current["parallel"], current["parallel"])
    updates = {name: requested[name] for name in current if requested.get(name) not in (None, current[name])}
    if updates:
        changes = ", ".join(f"--training.{name} {current[name]} → {value}" for name, value in updates.items())
        run.warn(f"{changes}: {ROUNDING_NOTE} from here on")
        original.update(updates)
        run.run_dir.write_metadata(metadata)
