"""C++ that is built on first use, where a compiler is found; where none is, PyTorch's own operations do the same.

A library is built in some seconds and kept in the person's cache folder, under a name made of its source.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

VECTOR_HEADER = Path(__file__).with_name("vectors.h")
COMPILER_FLAGS = (
    "-O3",
    "-std=c++17",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-fopenmp",
    "-fPIC",
    "-shared",
    f"-I{VECTOR_HEADER.parent}",
)
AVX512_FLAGS = (
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
)  # where the processor has all of them
NATIVE_ENV_VAR = "NEXTWORD_NATIVE"  # set to 0 in the environment, nothing is compiled


def cache_dir() -> Path:
    """Where compiled code is kept: the system's folder for what a program can make again."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nextword"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextword"


@cache
def load_native_library(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The compiled code of a file, built where it is not there yet; or None and why not, in words for the person."""
    if os.environ.get(NATIVE_ENV_VAR) == "0":
        return None, f"{NATIVE_ENV_VAR}=0 is set"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return None, f"this processor has no AVX2 ({capability})"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler was found (g++ or clang++)"
    # torch's own functions know the processor, and what a person asks of them (ATEN_CPU_CAPABILITY) goes here as well.
    has_avx512 = capability == "AVX512" and torch.cpu._is_vnni_supported()
    flags = (*COMPILER_FLAGS, *AVX512_FLAGS) if has_avx512 else COMPILER_FLAGS
    files = [source, VECTOR_HEADER, *sorted(source.parent.glob("*.h"))]
    content = b"".join(path.read_bytes() for path in files) + " ".join((compiler, *flags)).encode()
    try:
        path = cache_dir() / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=path.parent) as build_dir:
                built_path = Path(build_dir) / path.name
                command = [compiler, *flags, str(source), "-o", str(built_path)]
                completed = subprocess.run(command, capture_output=True, text=True)
                if completed.returncode:
                    return None, f"{' '.join(command)} failed:\n{completed.stderr.strip()[-2000:]}"
                built_path.replace(path)
        return ctypes.CDLL(str(path)), ""
    except (OSError, RuntimeError) as error:  # RuntimeError: the system names no home folder
        return None, str(error)


def num_threads() -> int:
    """How many threads compiled code uses: as many as PyTorch."""
    return torch.get_num_threads()
