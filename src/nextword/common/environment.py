"""The machine and the libraries that a run uses, and its energy: measured where counters are readable, else estimated."""

import ctypes
import os
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nextword.common.errors import UsageError

try:
    import resource
except ImportError:  # Windows
    resource = None


CPU_CORE_WATTS = 10.0  # a busy server or desktop core with its share of the memory; a laptop core takes about half
GPU_WATTS = 300.0  # a busy data-centre GPU; power limits are 250 to 700 W
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
RAPL_ROOT = Path("/sys/class/powercap")  # Linux: processor energy counters, often readable by root only


def library_versions() -> dict[str, str]:
    """Versions that run.json records."""
    packages = {name: version(name) for name in ("nextword", "numpy", "tokenizers")}
    # That of PyTorch with its build, as 2.13.0+cpu.
    return {**packages, "python": platform.python_version(), "torch": torch.__version__}


def machine_info(device: torch.device) -> dict[str, Any]:
    """The hardware that run.json records. Contains no host or user name."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"system": platform.system(), "processor": platform.machine(), "threads": torch.get_num_threads(), **gpu}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process in bytes: GPU memory on CUDA, else resident memory; 0 if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes; 0 if the system does not report it."""
    status = Path("/proc/self/status")  # on Linux, `ru_maxrss` begins with that of the parent process
    if status.is_file() and (match := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return 1024 * int(match[1])
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def total_memory(device: torch.device) -> int:
    """The memory in bytes that this process can have: that of the GPU, or what machine, container and `ulimit` allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits: list[int] = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if resource is not None and (address_space := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(address_space)
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdecimal():
        limits.append(int(limit))
    return min(limits, default=sys.maxsize)


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
        if device.type == "cuda" and ":" in name:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


# ---------------------------------------------------------------- energy


class EnergyMeter:
    """Measures energy from its creation on: of the processor packages, and of the GPU in use.

    Args:
        device: The device that the run uses.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.start_time, self.start_counters = time.monotonic(), self._read_counters()

    def energy(self, seconds: float) -> dict[str, float | bool]:
        """The energy of `seconds` at the mean power since the meter was created, as run.json and result.json store it.

        Without readable counters the power is estimated as 10 W per thread, or 300 W for a GPU.

        Returns:
            "watt_hours", and "measured": whether hardware counters were read.
        """
        elapsed, counters = time.monotonic() - self.start_time, self._read_counters()
        is_cuda = self.device.type == "cuda"
        required = "gpu" if is_cuda else "package"
        measured = elapsed >= 0.1 and any(name.startswith(required) for name in counters)
        watts = GPU_WATTS if is_cuda else CPU_CORE_WATTS * torch.get_num_threads()
        if measured:
            joules = 0.0
            for name, (count, maximum) in counters.items():
                start = self.start_counters.get(name, (count, maximum))[0]
                joules += count - start if count >= start else count - start + maximum  # the counter wrapped around
            watts = joules / elapsed
        return {"watt_hours": round(watts * seconds / 3600, 4), "measured": measured}

    def _read_counters(self) -> dict[str, tuple[float, float]]:
        """Joules by counter name, and the value at which each counter wraps around."""
        counters: dict[str, tuple[float, float]] = {}
        for directory in sorted(RAPL_ROOT.glob("intel-rapl:*")):
            if directory.name.count(":") > 1:  # a part of a package, which is counted already
                continue
            try:
                count, maximum = (
                    int((directory / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")
                )
            except (OSError, ValueError):  # most systems let only root read them
                continue
            counters[f"package {directory.name}"] = count, maximum
        if self.device.type == "cuda" and (joules := gpu_energy_joules(self.device)) is not None:
            counters["gpu"] = joules, 0.0
        return counters


def gpu_energy_joules(device: torch.device) -> float | None:
    """Energy that a GPU has used since its driver was loaded, from NVML; None if NVML does not report it."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        cuda: Any = torch.cuda  # its device properties have no types
        identity = f"GPU-{cuda.get_device_properties(device).uuid}"
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        status_codes = (
            library.nvmlInit_v2(),
            library.nvmlDeviceGetHandleByUUID(identity.encode(), ctypes.byref(handle)),
            library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)),
        )
    except (OSError, AttributeError):  # no NVML, or one without these functions
        return None
    return None if any(status_codes) else millijoules.value / 1e3
