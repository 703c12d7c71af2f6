"""Training runs for tests: nextword under torchrun, and what a run wrote."""

import contextlib
import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nextword.common.console import Console, TrainingProgress
from nextword.training.checkpoint import list_checkpoints
from processes import PATIENCE, start_process


class InterruptingConsole(Console):
    """Sends a signal to its process at a step of the training."""

    def __init__(self, step: int, number: int):
        super().__init__(quiet=True)
        self.step, self.number = step, number

    def training_progress(self, progress: TrainingProgress) -> None:
        if progress.step == self.step:
            signal.raise_signal(self.number)


def free_port() -> int:
    """A port that nothing listens on, below the range from which the system picks ports for outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as opened, contextlib.suppress(OSError):
            opened.bind(("127.0.0.1", port))
            return port


def start(
    num_processes: int,
    *arguments: str | Path,
    max_restarts: int = 0,
    program: Sequence[str | Path] = ("-m", "nextword"),
    torchrun_options: Sequence[str] = (),
) -> "subprocess.Popen[str]":
    """Start a Python program under torchrun, or directly as a single process."""
    launcher: list[str] = []
    if num_processes > 1 or torchrun_options:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), "--monitor-interval", "0.1"]
        launcher += ["--max-restarts", str(max_restarts), "--master-addr", "127.0.0.1"]
        launcher += torchrun_options or ["--master-port", str(free_port())]
    command = [sys.executable, *launcher, *program, *arguments]
    return start_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def finish(process: "subprocess.Popen[str]", exit_code: int = 0) -> tuple[str, str]:
    """Wait for the end of a process and check its exit code; standard output and standard error."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == exit_code, err
    return out, err


def metrics(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl, also of a run in progress."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run: Path) -> list[float]:
    """The training loss of every step."""
    return [record["loss"] for record in metrics(run) if "loss" in record]


def steps_of(run: Path) -> int:
    """The number of finished steps."""
    return len(losses(run))


def state_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of weights and optimizer of the last checkpoint, the final model, and all losses: equal for equal runs."""
    paths = [*list_checkpoints(run)[-1].glob("*.safetensors"), run / "model" / "model.safetensors"]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    validation = [record["validation"]["loss"] for record in metrics(run) if "validation" in record]
    return hashes | {"losses": str(losses(run)), "validation": str(validation)}
