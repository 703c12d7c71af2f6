"""A run folder: who works on it, what it is, what happened in it, and its best model.

RUN/run.json (what the run is) · metrics.jsonl (a line a step) · decisions.jsonl (what the clock decided) · detours.jsonl (which
batches were left out) · checkpoints/ · model/ (the best weights, a stock directory) · result.json (once it is finished) ·
report.html and README.md.
"""

import json
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None

from nextword._version import __version__
from nextword.common import fs
from nextword.common.errors import CorruptFileError, MissingDependencyError, NextwordError, UsageError
from nextword.common.run_lock import run_lock
from nextword.data.tokenizer import Tokenizer
from nextword.model.gpt import GPT
from nextword.model.hf import iter_hf_tensors, save_model

KNOWN_FILES = ("run.json", "data", ".data.partial", ".data.lock", "checkpoints", "lock", "holder.json")
ROUNDING_NOTE = "equal within rounding, not bit for bit"  # of a run that goes on otherwise than it began


class RunDir:
    """The paths of a run and what is written to them. Made by `open_run`, which holds the lock."""

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
        return (self.path / "run.json").is_file()

    @property
    def is_complete(self) -> bool:
        return self.result_path.is_file()

    def metadata(self) -> dict[str, Any]:
        """What run.json says. Raises `CorruptFile` where it is not a run's."""
        metadata = fs.read_json(self.path / "run.json")
        if not isinstance(metadata, dict) or "recipe" not in metadata:
            raise CorruptFileError(f"{self.path / 'run.json'}: not a run of nextword's")
        return metadata

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        fs.atomic_write(self.path / "run.json", fs.to_json(metadata))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One more line of metrics. Not flushed to disk each time: a resume cuts back to its checkpoint anyway."""
        with fs.map_disk_errors(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_metrics(self, step: int) -> float:
        """Drop the lines after `step`, which will be made again; the seconds that the run had used by then.

        What was lost does not count on the clock: it is done once more.
        """
        kept = [record for record in fs.read_jsonl(self.metrics_path) if record["step"] <= step]
        fs.atomic_write(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))
        return max((record.get("seconds", 0.0) for record in kept), default=0.0)

    def save_model(
        self, model: GPT, tokenizer: Tokenizer, metadata: dict[str, Any], *, labels: Sequence[str] | None = None,
        problem_type: str | None = None, write_extra_files: Callable[[Path], None] | None = None,
        gather: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> None:  # fmt: skip
        """Put the model in place as RUN/model, a sealed stock directory; `more` writes other files into it. `gather` as in
        `model.stock.save_model`."""

        def write(aside: Path) -> None:
            save_model(
                model, aside, end_of_text_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, labels=labels,
                problem_type=problem_type, eos_token_ids=sorted(tokenizer.eos_ids), gather=gather,
            )  # fmt: skip
            tokenizer.save(aside, model.config.context_length)
            if write_extra_files is not None:
                write_extra_files(aside)

        self.save_dir(self.model_dir, {**metadata, "model": model.config.to_dict()}, write)

    def save_dir(self, target: Path, metadata: dict[str, Any], write_files: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, seal it, and put it in place of the one that may be there."""
        staging_dir = target.with_name(f".{target.name}.partial")
        with fs.map_disk_errors(target):
            shutil.rmtree(staging_dir, ignore_errors=True)
            staging_dir.mkdir()
            write_files(staging_dir)
        fs.write_manifest(staging_dir, metadata)
        fs.atomic_replace_dir(staging_dir, target)


class WorkerRunDir(RunDir):
    """A run as the processes see it that do not lead it: what the leader says it is, and nothing is written."""

    def __init__(self, path: Path, run_metadata: dict[str, Any]):
        super().__init__(path)
        self.run_metadata = run_metadata

    @property
    def exists(self) -> bool:
        return True

    def metadata(self) -> dict[str, Any]:
        return self.run_metadata

    def append_metrics(self, record: dict[str, Any]) -> None:
        pass

    def truncate_metrics(self, step: int) -> float:
        return 0.0

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        pass

    def save_model(self, model: GPT, *_: Any, gather: Callable[[Tensor], Tensor] = Tensor.detach, **__: Any) -> None:
        for _tensor in iter_hf_tensors(model.config, model.state_dict(), gather):  # the leader gathers it from all
            pass


@contextmanager
def open_run(path: Path, *, resume: bool) -> Iterator[RunDir]:
    """The run folder, made where it is not there, and locked while it is open.

    Raises:
        UsageError: it holds a run already and `resume` was not said, or it holds something else.
        RunLocked: another process works on it; the message names it.
    """
    run = RunDir(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: a file is in the way of the run folder")
    if run.exists and not resume:
        raise UsageError(f"{path}: holds a run already. Go on with it by --resume, or choose another --out")
    unexpected_files = (
        [p.name for p in path.iterdir() if p.name not in KNOWN_FILES] if path.is_dir() and not run.exists else []
    )
    unexpected_files = [
        name for name in unexpected_files if not re.fullmatch(r"\.(run|holder)\.json\.\d+\.partial", name)
    ]  # of a kill
    if unexpected_files:
        raise UsageError(
            f"{path}: is not empty ({unexpected_files[0]} is in it) and no run folder. Choose another --out"
        )
    with fs.map_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with run_lock(path):
        fs.recover_interrupted_swap(run.model_dir)
        fs.recover_interrupted_swap(run.adapter_dir)
        fs.recover_interrupted_swap(run.data_dir)
        yield run


class RunInterruptedError(NextwordError):
    """Stopped by Ctrl-C (exit code 130) or SIGTERM (143), after a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """While this is open, the first Ctrl-C or SIGTERM is put on the list that it gives; a second one leaves at once."""
    caught: list[int] = []

    def handle_signal(number: int, frame: Any) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)

    try:
        previous_handlers = {number: signal.signal(number, handle_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where Python lets nobody set handlers: the caller's own stay
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def diff_settings(before: Any, now: Any, name: str = "") -> list[str]:
    """Where two settings differ, one "name: before → now" each, for a person to read."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [
            line for key in keys for line in diff_settings(before.get(key), now.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if before == now else [f"{name}: {before} → {now}"]


def open_tensorboard_writer(run_path: Path) -> Any:
    """A writer of TensorBoard's event files. Raises `MissingExtra` where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("--tensorboard", "tensorboard") from error
    return SummaryWriter(run_path / "tensorboard")


# ---------------------------------------------------------------- where and how a run was made


def library_versions() -> dict[str, str]:
    return {
        "nextword": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
    }


def machine_info(device: torch.device) -> dict[str, Any]:
    """What the run ran on, as far as it matters for its speed. No name of a host or a person."""
    info: dict[str, Any] = {
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes that this process has had at most: of the GPU where it uses one; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * max_rss


def resolve_device(name: str) -> torch.device:
    """The device by name; "auto" is the GPU where there is one. Raises `UsageError` where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and (local := os.environ.get("LOCAL_RANK")):  # torchrun's processes have a GPU each
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def command_line() -> list[str]:
    return (
        ["nextword", *sys.argv[1:]]
        if Path(sys.argv[0]).name in ("nextword", "__main__.py")
        else ["nextword.pretrain(…)"]
    )
