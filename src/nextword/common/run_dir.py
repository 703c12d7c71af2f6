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

from nextword import __version__
from nextword.common import fs
from nextword.common.errors import CorruptFile, MissingExtra, NextwordError, UsageError
from nextword.common.run_lock import holding
from nextword.data.tokenizer import Tokenizer
from nextword.model.gpt import GPT
from nextword.model.hf import save_model, stock_tensors

OWN = ("run.json", "data", ".data.partial", ".data.lock", "checkpoints", "lock", "holder.json")
ROUNDING = "equal within rounding, not bit for bit"  # of a run that goes on otherwise than it began


class RunFolder:
    """The paths of a run and what is written to them. Made by `open_run`, which holds the lock."""

    def __init__(self, path: Path):
        self.path = path
        self.data = path / "data"
        self.model = path / "model"
        self.adapter = path / "adapter"
        self.metrics = path / "metrics.jsonl"
        self.decisions = path / "decisions.jsonl"
        self.detours = path / "detours.jsonl"
        self.result = path / "result.json"

    @property
    def begun(self) -> bool:
        return (self.path / "run.json").is_file()

    @property
    def finished(self) -> bool:
        return self.result.is_file()

    def facts(self) -> dict[str, Any]:
        """What run.json says. Raises `CorruptFile` where it is not a run's."""
        facts = fs.read_json(self.path / "run.json")
        if not isinstance(facts, dict) or "recipe" not in facts:
            raise CorruptFile(f"{self.path / 'run.json'}: not a run of nextword's")
        return facts

    def write_facts(self, facts: dict[str, Any]) -> None:
        fs.write_durably(self.path / "run.json", fs.to_json(facts))

    def append(self, record: dict[str, Any]) -> None:
        """One more line of metrics. Not flushed to disk each time: a resume cuts back to its checkpoint anyway."""
        with fs.writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cut_back(self, step: int) -> float:
        """Drop the lines after `step`, which will be made again; the seconds that the run had used by then.

        What was lost does not count on the clock: it is done once more.
        """
        kept = [record for record in fs.read_json_lines(self.metrics) if record["step"] <= step]
        fs.write_durably(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return max((record.get("seconds", 0.0) for record in kept), default=0.0)

    def save_model(
        self, model: GPT, tokenizer: Tokenizer, facts: dict[str, Any], *, labels: Sequence[str] | None = None,
        problem_type: str | None = None, more: Callable[[Path], None] | None = None,
        gather: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> None:  # fmt: skip
        """Put the model in place as RUN/model, a sealed stock directory; `more` writes other files into it. `gather` as in
        `model.stock.save_model`."""

        def write(aside: Path) -> None:
            save_model(
                model, aside, end_of_text=tokenizer.end_of_text, pad=tokenizer.pad, labels=labels,
                problem_type=problem_type, ends=sorted(tokenizer.ends), gather=gather,
            )  # fmt: skip
            tokenizer.save(aside, model.config.context_length)
            if more is not None:
                more(aside)

        self.save_folder(self.model, {**facts, "model": model.config.to_dict()}, write)

    def save_folder(self, final: Path, facts: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, seal it, and put it in place of the one that may be there."""
        aside = final.with_name(f".{final.name}.partial")
        with fs.writing(final):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            write(aside)
        fs.seal(aside, facts)
        fs.move_into_place(aside, final)


class Onlooker(RunFolder):
    """A run as the processes see it that do not lead it: what the leader says it is, and nothing is written."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        super().__init__(path)
        self.said = facts

    @property
    def begun(self) -> bool:
        return True

    def facts(self) -> dict[str, Any]:
        return self.said

    def append(self, record: dict[str, Any]) -> None:
        pass

    def cut_back(self, step: int) -> float:
        return 0.0

    def write_facts(self, facts: dict[str, Any]) -> None:
        pass

    def save_model(self, model: GPT, *_: Any, gather: Callable[[Tensor], Tensor] = Tensor.detach, **__: Any) -> None:
        for _tensor in stock_tensors(model.config, model.state_dict(), gather):  # the leader gathers it from all
            pass


@contextmanager
def open_run(path: Path, *, resume: bool) -> Iterator[RunFolder]:
    """The run folder, made where it is not there, and locked while it is open.

    Raises:
        UsageError: it holds a run already and `resume` was not said, or it holds something else.
        RunLocked: another process works on it; the message names it.
    """
    run = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: a file is in the way of the run folder")
    if run.begun and not resume:
        raise UsageError(f"{path}: holds a run already. Go on with it by --resume, or choose another --out")
    strangers = [p.name for p in path.iterdir() if p.name not in OWN] if path.is_dir() and not run.begun else []
    strangers = [
        name for name in strangers if not re.fullmatch(r"\.(run|holder)\.json\.\d+\.partial", name)
    ]  # of a kill
    if strangers:
        raise UsageError(f"{path}: is not empty ({strangers[0]} is in it) and no run folder. Choose another --out")
    with fs.writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with holding(path):
        fs.settle(run.model)
        fs.settle(run.adapter)
        fs.settle(run.data)
        yield run


class Interrupted(NextwordError):
    """Stopped by Ctrl-C (exit code 130) or SIGTERM (143), after a checkpoint."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """While this is open, the first Ctrl-C or SIGTERM is put on the list that it gives; a second one leaves at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where Python lets nobody set handlers: the caller's own stay
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Where two settings differ, one "name: before → now" each, for a person to read."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if before == now else [f"{name}: {before} → {now}"]


def open_tensorboard(run: Path) -> Any:
    """A writer of TensorBoard's event files. Raises `MissingExtra` where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("--tensorboard", "tensorboard") from error
    return SummaryWriter(run / "tensorboard")


# ---------------------------------------------------------------- where and how a run was made


def versions() -> dict[str, str]:
    return {
        "nextword": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the run ran on, as far as it matters for its speed. No name of a host or a person."""
    facts: dict[str, Any] = {
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had at most: of the GPU where it uses one; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def choose_device(name: str) -> torch.device:
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
