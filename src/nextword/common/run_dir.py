"""Run directories.

RUN/run.json           settings and environment
    metrics.jsonl      one record per step, validation, sample or message
    decisions.jsonl    step budgets chosen from the time budget
    detours.jsonl      batches skipped after loss spikes
    checkpoints/       the last checkpoints
    linear/            the linear classifier of a fine-tuning, for `predict --ensemble`
    model/ adapter/    the best weights, as a Hugging Face directory
    data/              the prepared corpus, if the run prepared it
    result.json        present once the run is complete
    report.html README.md
"""

import os
import re
import signal
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, cast

import filelock
import msgspec

from nextword.common import fs
from nextword.common.errors import CorruptFileError, NextwordError, RunLockedError, UsageError

# Files that may exist before run.json is written, and the leftovers of a killed process.
KNOWN_FILES = re.compile(
    r"run\.json|data|members|\.data\.partial|\.data\.lock|checkpoints|lock|holder\.json|\.(run|holder)\.json\.\w+\.partial"
)
LOCK_TIMEOUT_SECONDS = 0.5  # longer than `fail_if_locked` of another process holds the lock
ROUNDING_NOTE = "equal within rounding, not bit for bit"
LOG_FILES = ("metrics.jsonl", "decisions.jsonl", "detours.jsonl")
LOCATION_OPTIONS = ("corpora", "model", "data", "validation", "test")  # inputs, which are identified by their content


class _Environment(msgspec.Struct):
    threads: Annotated[int, msgspec.Meta(ge=1)]
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    device: str


class _Versions(msgspec.Struct):
    torch: str


class _Metadata(msgspec.Struct):
    """The part of run.json that every reader relies on."""

    recipe: dict[str, Any]
    request: dict[str, Any]
    seed: int = 0
    model: dict[str, Any] | None = None
    fixed: _Environment | None = None
    versions: _Versions | None = None
    directory: str = ""


class _Result(msgspec.Struct):
    run: str
    seconds: float


class _MetricsRecord(msgspec.Struct):
    step: fs.Count
    seconds: float = 0.0
    loss: float | None = None


@dataclass(frozen=True)
class LockHolder:
    """The process that holds the lock of a run: the content of holder.json."""

    process: int
    host: str


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
        self.linear_dir = path / "linear"
        self.metrics_path = path / "metrics.jsonl"
        self.decisions_path = path / "decisions.jsonl"
        self.skipped_ranges_path = path / "detours.jsonl"
        self.result_path = path / "result.json"

    @property
    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return os.path.lexists(self.path / "run.json")

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended and stored its result."""
        return os.path.lexists(self.result_path)

    def metadata(self) -> dict[str, Any]:
        """Read run.json. Inputs that were moved together with the run have their present path.

        Raises:
            CorruptFileError: the file is not the run.json of a run, or is damaged.
        """
        metadata = fs.read_sealed_json(self.path / "run.json")
        known = fs.convert(metadata, _Metadata, f"{self.path / 'run.json'}: not a nextword run")

        def present(value: Any) -> Any:
            if fs.is_json_array(value):
                return [present(path) for path in value]
            if not isinstance(value, str) or not Path(value).is_absolute() or Path(value).exists():
                return value
            moved = os.path.normpath(self.path.resolve() / os.path.relpath(value, known.directory))
            return moved if Path(moved).exists() else value

        groups = {"request": LOCATION_OPTIONS, "base": ("model",), "": ("shards", "old_text")}
        for group, names in groups.items() if known.directory else ():
            values: dict[str, Any] = metadata.get(group, {}) if group else metadata
            values.update({name: present(values[name]) for name in names if name in values})
        return metadata

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Write run.json."""
        fs.write_sealed_json(self.path / "run.json", metadata)

    def result(self) -> dict[str, Any]:
        """Read result.json. Raises `CorruptFileError` if it is damaged or not the result of a run."""
        result = fs.read_sealed_json(self.result_path)
        fs.convert(result, _Result, self.result_path)
        return result

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, without fsync: a resume truncates the file to its checkpoint."""
        fs.append_line(self.metrics_path, fs.to_json_line(record))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl. Raises `CorruptFileError` if it is damaged."""
        fs.read_records(self.metrics_path, _MetricsRecord)
        return fs.read_jsonl(self.metrics_path)

    def losses(self) -> list[float]:
        """The finite losses in metrics.jsonl. Raises `CorruptFileError` if it is damaged."""
        return [record.loss for record in fs.read_records(self.metrics_path, _MetricsRecord) if record.loss is not None]

    def truncate_metrics(self, step: int) -> float | None:
        """Remove the records after a step.

        Returns:
            The seconds that the run had used at that step; None if there is no record of it. The time of the removed steps
            does not count.

        Raises:
            CorruptFileError: metrics.jsonl is damaged.
        """
        records = [record for record in self.read_metrics() if record["step"] <= step]
        fs.write_records(self.metrics_path, records)
        seconds = [record["seconds"] for record in records if "seconds" in record]
        is_complete = step == 0 or any(record["step"] == step and "loss" in record for record in records)
        return max(seconds, default=0.0) if is_complete else None

    def identity(self) -> str:
        """A digest of what no resume changes in run.json, wherever the run and its inputs are."""
        metadata = self.metadata()
        return fs.sha256_of_json([metadata.get(name) for name in ("created", "seed", "model", "data", "task")])


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
        try:
            holder = fs.convert(fs.read_json(holder_path), LockHolder, holder_path)
            name = f"process {holder.process} on {holder.host}"
        except NextwordError:  # not written yet, or damaged
            name = "another process"
        raise RunLockedError(f"{path}: the run is in use by {name}") from error
    except OSError as error:
        raise NextwordError(f"{lock.lock_file}: cannot lock the run: {error.strerror or error}") from error
    try:
        fs.atomic_write(holder_path, fs.to_json(asdict(LockHolder(os.getpid(), socket.gethostname()))))
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


def verify_path(path: Path) -> dict[str, str]:
    """Check a run directory, a model directory or shards.

    Of a run: what `fs.verify_tree` checks, run.json and result.json, the logs, and the name of the latest checkpoint.

    Returns:
        The kind of each directory with a manifest, and "run" for the run, by path.

    Raises:
        CorruptFileError: with a line for every file that differs; or there is nothing to check.
        NextwordError: the path is no directory.
    """
    from nextword.common.results import StoredResults  # imports numpy, which a refused command does not wait for

    run, errors, kinds = RunDir(path), list[str](), dict[str, str]()
    if not run.exists:
        return fs.verify_tree(path)
    checkpoints = sorted(path.glob("checkpoints/step-*"))
    sealed = [
        *checkpoints,
        *(d for d in (run.data_dir, run.model_dir, run.adapter_dir, run.linear_dir) if os.path.lexists(d)),
    ]

    def check_latest() -> None:
        latest, name = path / "checkpoints" / "latest", checkpoints[-1].name
        if fs.read_bytes(latest) != f"{name}\n".encode():
            raise CorruptFileError(f"{latest}: does not name the latest checkpoint, {name} (a resume corrects it)")

    def check_metrics() -> None:
        step = int(fs.read_manifest(checkpoints[-1]).get("step", 0))
        if step > max((record.step for record in fs.read_records(run.metrics_path, _MetricsRecord)), default=0):
            raise CorruptFileError(f"{run.metrics_path}: ends before the latest checkpoint, which is of step {step}")

    checks: list[tuple[Any, ...]] = [(run.metadata,), (StoredResults.load, path)]
    checks += [(run.result,)] if run.is_complete else []
    checks += [(fs.read_jsonl, path / name) for name in LOG_FILES]
    checks += [(check_latest,), (check_metrics,)] if checkpoints else []
    checks += [(fs.read_manifest, directory) for directory in sealed]
    checks += [(lambda: kinds.update(fs.verify_tree(path)),)] if sealed else []
    for check, *arguments in checks:
        try:
            check(*arguments)
        except NextwordError as error:
            errors += str(error).splitlines()
    if errors:
        raise CorruptFileError("\n".join(dict.fromkeys(errors)))
    return {str(path): "run", **kinds}
