"""The machine and the libraries that a run uses."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import torch

from nextword._version import __version__
from nextword.common.errors import UsageError

try:
    import resource
except ImportError:  # Windows
    resource = None


def library_versions() -> dict[str, str]:
    """Versions that run.json records."""
    return {
        "nextword": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
    }


def machine_info(device: torch.device) -> dict[str, Any]:
    """The hardware that run.json records. Contains no host or user name."""
    info: dict[str, Any] = {
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process in bytes: GPU memory on CUDA, else resident memory; 0 if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resolve_device(name: str) -> torch.device:
    """Return a device by name.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the GPU if there is one. Under torchrun, ``cuda`` is the
            GPU of the local rank.

    Raises:
        UsageError: the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and (local_rank := os.environ.get("LOCAL_RANK")):
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def command_line() -> list[str]:
    """The command that started this process, as run.json records it."""
    is_cli = Path(sys.argv[0]).name in ("nextword", "__main__.py")
    return ["nextword", *sys.argv[1:]] if is_cli else ["nextword.pretrain(…)"]
