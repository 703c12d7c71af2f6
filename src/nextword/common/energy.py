"""The electric energy of a run: measured where the machine tells, estimated where it does not, and always said which."""

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

CPU_CORE_WATTS = (
    10.0  # of a busy core of a server or a desktop with its share of the memory; a laptop's takes about half
)
GPU_WATTS = 300.0  # of a busy data-centre GPU; its limit is between 250 and 700
RAPL_ROOT = Path("/sys/class/powercap")  # Linux: the processor's own counters (RAPL), where the person may read them


@dataclass(frozen=True)
class PowerReading:
    """Watts on the average, and whether they were measured."""

    watts: float
    measured: bool

    def to_dict(self, seconds: float) -> dict[str, float | bool]:
        """What run.json and result.json say of so many seconds at this power."""
        return {"watt_hours": round(self.watts * seconds / 3600, 4), "measured": self.measured}


class EnergyMeter:
    """Counts from when it is made: the processor's packages, and the GPU that is used."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start_time, self.start_counters = time.monotonic(), self._read_counters()

    def mean_power(self) -> PowerReading:
        """The mean since the meter was made. What the machine does not tell is estimated: ten watts a thread that works,
        three hundred a GPU."""
        seconds, now = time.monotonic() - self.start_time, self._read_counters()
        estimated = GPU_WATTS if self.device.type == "cuda" else CPU_CORE_WATTS * torch.get_num_threads()
        required_counter = "gpu" if self.device.type == "cuda" else "package"
        if seconds < 0.1 or not any(name.startswith(required_counter) for name in now):
            return PowerReading(estimated, measured=False)
        joules = 0.0
        for name, (count, wrap_at) in now.items():
            before = self.start_counters.get(name, (count, wrap_at))[0]
            joules += count - before if count >= before else count - before + wrap_at  # the counter began anew
        return PowerReading(joules / seconds, measured=True)

    def _read_counters(self) -> dict[str, tuple[float, float]]:
        """Joules by counter, and at how many joules it begins anew."""
        counters: dict[str, tuple[float, float]] = {}
        for folder in sorted(RAPL_ROOT.glob("intel-rapl:*")):
            if folder.name.count(":") > 1:  # a part of a package, counted in it already
                continue
            try:
                count, wrap_at = (
                    int((folder / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")
                )
            except (OSError, ValueError):  # most systems let nobody but root read them
                continue
            counters[f"package {folder.name}"] = count, wrap_at
        if self.device.type == "cuda" and (joules := gpu_energy_joules(self.device)) is not None:
            counters["gpu"] = joules, 0.0
        return counters


def gpu_energy_joules(device: torch.device) -> float | None:
    """What a GPU has taken since its driver was loaded, by NVIDIA's management library; None where it does not say."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        gpu_uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        return_codes = (
            library.nvmlInit_v2(),
            library.nvmlDeviceGetHandleByUUID(gpu_uuid.encode(), ctypes.byref(handle)),
            library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)),
        )
    except (OSError, AttributeError):  # no such library, or one of another maker or age
        return None
    return millijoules.value / 1e3 if not any(return_codes) else None
