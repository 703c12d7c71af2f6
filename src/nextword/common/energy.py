"""The electric energy of a run: measured where the machine tells, estimated where it does not, and always said which."""

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

CORE_WATTS = 10.0  # of a busy core of a server or a desktop with its share of the memory; a laptop's takes about half
GPU_WATTS = 300.0  # of a busy data-centre GPU; its limit is between 250 and 700
COUNTERS = Path("/sys/class/powercap")  # Linux: the processor's own counters (RAPL), where the person may read them


@dataclass(frozen=True)
class Power:
    """Watts on the average, and whether they were measured."""

    watts: float
    measured: bool

    def to_dict(self, seconds: float) -> dict[str, float | bool]:
        """What run.json and result.json say of so many seconds at this power."""
        return {"watt_hours": round(self.watts * seconds / 3600, 4), "measured": self.measured}


class Meter:
    """Counts from when it is made: the processor's packages, and the GPU that is used."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began, self.first = time.monotonic(), self._counts()

    def power(self) -> Power:
        """The mean since the meter was made. What the machine does not tell is estimated: ten watts a thread that works,
        three hundred a GPU."""
        seconds, now = time.monotonic() - self.began, self._counts()
        estimated = GPU_WATTS if self.device.type == "cuda" else CORE_WATTS * torch.get_num_threads()
        needed = "gpu" if self.device.type == "cuda" else "package"
        if seconds < 0.1 or not any(name.startswith(needed) for name in now):
            return Power(estimated, measured=False)
        joules = 0.0
        for name, (count, turn) in now.items():
            before = self.first.get(name, (count, turn))[0]
            joules += count - before if count >= before else count - before + turn  # the counter began anew
        return Power(joules / seconds, measured=True)

    def _counts(self) -> dict[str, tuple[float, float]]:
        """Joules by counter, and at how many joules it begins anew."""
        found: dict[str, tuple[float, float]] = {}
        for folder in sorted(COUNTERS.glob("intel-rapl:*")):
            if folder.name.count(":") > 1:  # a part of a package, counted in it already
                continue
            try:
                count, turn = (int((folder / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj"))
            except (OSError, ValueError):  # most systems let nobody but root read them
                continue
            found[f"package {folder.name}"] = count, turn
        if self.device.type == "cuda" and (joules := gpu_joules(self.device)) is not None:
            found["gpu"] = joules, 0.0
        return found


def gpu_joules(device: torch.device) -> float | None:
    """What a GPU has taken since its driver was loaded, by NVIDIA's management library; None where it does not say."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        calls = (
            library.nvmlInit_v2(),
            library.nvmlDeviceGetHandleByUUID(identity.encode(), ctypes.byref(handle)),
            library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)),
        )
    except (OSError, AttributeError):  # no such library, or one of another maker or age
        return None
    return millijoules.value / 1e3 if not any(calls) else None
