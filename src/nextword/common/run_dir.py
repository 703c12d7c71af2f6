"""Run directories.

RUN/run.json           settings and environment
    metrics.jsonl      one record per step, validation, sample or message
    decisions.jsonl    step budgets chosen from the time budget
    detours.jsonl      batches skipped after loss spikes
    checkpoints/       the last checkpoints
    model/ adapter/    the best weights, as a Hugging Face directory
    data/              the prepared corpus, if the run prepared it
    result.json        present once the run is complete
    report.html README.md
"""

import json
import os
import re
import signal
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import filelock

from nextword.common import fs
from nextword.common.errors import CorruptFileError, NextwordError, RunLockedError, UsageError

# Files that may exist before run.json is written, and the leftovers of a killed process.
KNOWN_FILES = re.compile(
    r"run\.json|data|\.data\.partial|\.data\.lock|checkpoints|lock|holder\.json|\.(run|holder)\.json\.\d+\.partial"
)
LOCK_TIMEOUT_SECONDS = 0.5  # longer than `fail_if_locked` of another process holds the lock
ROUNDING_NOTE = "equal within rounding, not bit for bit"


class RunDir:
    """The files of a run. `open_run` locks it for writing.

    Args:
        path: The run directory.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data_dir = path / "data"
        self.model_dir = path / "model"
        self.adapter_dir = path / "adapter"
        self.metrics_path = path / "metrics.jsonl"
        self.decisions_path = path / "decisions.jsonl"
        self.skipped_ranges_path = path / "detours.jsonl"
        self.result_path = path / "result.json"

    @property
    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return (self.path / "run.json").is_file()

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended and stored its result."""
        return self.result_path.is_file()

    def metadata(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            CorruptFileError: the file is not the run.json of a run.
        """
        metadata = fs.read_json(self.path / "run.json")
        if not fs.is_json_object(metadata) or "recipe" not in metadata:
            raise CorruptFileError(f"{self.path / 'run.json'}: not a nextword run")
        return metadata

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Write run.json."""
        fs.atomic_write(self.path / "run.json", fs.to_json(metadata))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, without fsync: a resume truncates the file to its checkpoint."""
        with fs.map_disk_errors(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_metrics(self, step: int) -> float:
        """Remove the records after a step.

        Returns:
            The seconds that the run had used at that step. The time of the removed steps does not count.
        """
        records = [record for record in fs.read_jsonl(self.metrics_path) if record["step"] <= step]
        fs.atomic_write(self.metrics_path, "".join(json.dumps(record) + "\n" for record in records))
        return max((record.get("seconds", 0.0) for record in records), default=0.0)


@contextmanager
def run_lock(path: Path) -> Generator[None, None, None]:
    """Hold the lock of a run directory. The lock of a killed process is free.

    Raises:
        RunLockedError: another process holds the lock; the message names it.
    """
    lock, holder_path = filelock.FileLock(path / "lock"), path / "holder.json"
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
    except filelock.Timeout as error:
        holder = {"process": "unknown", "host": "an unknown host"}
        if holder_path.is_file():
            holder = fs.read_json(holder_path)
        raise RunLockedError(f"{path}: the run is in use by process {holder['process']} on {holder['host']}") from error
    try:
        fs.atomic_write(holder_path, fs.to_json({"process": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder_path.unlink(missing_ok=True)
        lock.release()


def fail_if_locked(path: Path) -> None:
    """Raise `RunLockedError` if another process uses the run. In a distributed run only rank 0 checks."""
    if os.environ.get("RANK", "0") == "0" and (path / "holder.json").is_file():
        with run_lock(path):
            pass


@contextmanager
def open_run(path: Path, *, resume: bool) -> Generator[RunDir, None, None]:
    """Create a run directory if needed, and lock it.

    Raises:
        UsageError: the directory holds a run and `resume` is false, or it holds other files.
        RunLockedError: another process uses the run.
    """
    run_dir = RunDir(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: exists and is not a directory")
    if run_dir.exists and not resume:
        raise UsageError(f"{path}: already holds a run. Add --resume to continue it, or choose another --out")
    if path.is_dir() and not run_dir.exists:
        foreign = [file.name for file in path.iterdir() if not KNOWN_FILES.fullmatch(file.name)]
        if foreign:
            raise UsageError(f"{path}: not empty ({foreign[0]}) and not a run directory. Choose another --out")
    with fs.map_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with run_lock(path):
        for directory in (run_dir.model_dir, run_dir.adapter_dir, run_dir.data_dir):
            fs.recover_interrupted_swap(directory)
        yield run_dir


class RunInterruptedError(NextwordError):
    """The run was stopped by SIGINT (exit code 130) or SIGTERM (143), after a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def catch_signals() -> Generator[list[int], None, None]:
    """Catch the first SIGINT or SIGTERM and append it to the yielded list. A second signal exits at once.

    Outside the main thread, where Python does not allow signal handlers, nothing is caught.
    """
    caught: list[int] = []

    def handle(signal_number: int, frame: FrameType | None) -> None:
        if caught:
            os._exit(128 + signal_number)
        caught.append(signal_number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def diff_settings(before: object, now: object, name: str = "") -> list[str]:
    """Return the differences of two nested settings, as lines "name: before → now"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        old, new = cast(Mapping[str, object], before), cast(Mapping[str, object], now)
        pairs = [(f"{name}.{key}".strip("."), old.get(key), new.get(key)) for key in sorted({*old, *new})]
        return [line for key, old_value, new_value in pairs for line in diff_settings(old_value, new_value, key)]
    return [] if before == now else [f"{name}: {before} → {now}"]
