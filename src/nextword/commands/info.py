"""``nextword info``: the installation and this machine."""

from dataclasses import dataclass
from typing import Any, cast

from nextword._version import __version__
from nextword.commands.command import Context, command
from nextword.common.command_result import Result
from nextword.common.options import options


@options
class InfoConfig:
    """Show the version, devices, kernels, extras and cache."""


@dataclass(frozen=True)
class InfoResult(Result):
    """The installation and this machine.

    Attributes:
        version: Version of nextword.
        python: Version of Python.
        torch: Version of PyTorch.
        system: Operating system and processor architecture.
        threads: CPU threads that PyTorch uses.
        devices: Available devices with their names and memory.
        kernels: For each C++ source file "available", or why it is not.
        extras: Missing packages of each optional extra; none if it is installed.
        cache: Directory of compiled kernels.
    """

    version: str
    python: str
    torch: str
    system: str
    threads: int
    devices: dict[str, str]
    kernels: dict[str, str]
    extras: dict[str, list[str]]
    cache: str

    def __str__(self) -> str:
        rows = {
            "nextword": self.version,
            "Python": self.python,
            "PyTorch": self.torch,
            "system": f"{self.system}, {self.threads} threads",
            **{f"device {name}": description for name, description in self.devices.items()},
            **{f"kernels {name}": state.splitlines()[0] for name, state in self.kernels.items()},
            "cache": self.cache,
        }
        rows |= {
            f"extra {name}": f"missing {', '.join(missing)}: pip install 'nextword[{name}]'" if missing else "installed"
            for name, missing in self.extras.items()
        }
        width = max(map(len, rows)) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


def missing_packages() -> dict[str, list[str]]:
    """The packages of each extra that are not installed."""
    import re
    from importlib.metadata import Distribution, requires

    extras: dict[str, list[str]] = {}
    for requirement in requires("nextword") or []:
        match = re.fullmatch(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]\)?", requirement)
        if match and match[1] != "nextword":
            missing = extras.setdefault(match[2], [])
            missing += [] if any(Distribution.discover(name=match[1])) else [match[1]]
    return dict(sorted(extras.items()))


@command(InfoConfig, example="nextword info")
def info(config: InfoConfig, context: Context) -> InfoResult:
    """Ask PyTorch, the packages and the C++ sources."""
    import platform
    from pathlib import Path

    import torch

    from nextword.common.native_build import cache_dir, load_native_library

    package = Path(__file__).parents[1]
    devices = {"cpu": torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count()):
        properties = cast(Any, torch.cuda.get_device_properties(index))  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    kernels = {
        str(source.relative_to(package)): load_native_library(source)[1] or "available"
        for source in sorted(package.rglob("*.cpp"))
    }
    return InfoResult(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}",
        threads=torch.get_num_threads(),
        devices=devices,
        kernels=kernels,
        extras=missing_packages(),
        cache=str(cache_dir()),
    )
