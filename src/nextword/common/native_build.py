"""Just-in-time compilation of C++ libraries. Without a compiler, PyTorch's operators do the same work.

A library is compiled in some seconds, on first use, and kept in the user's cache directory under a hash of its source, with its
SHA-256 beside it. It is built again if it is damaged, or if another user could have written it.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nextword.common.fs import cache_dir, fsync_path, sha256_file

VECTOR_HEADER = Path(__file__).with_name("vectors.h")
COMPILER_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", f"-I{VECTOR_HEADER.parent}")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
NATIVE_ENV_VAR = "NEXTWORD_NATIVE"  # 0 disables compilation


@cache
def load_native_library(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """Load the library of a C++ file, and compile it if it is not cached.

    The instruction set is PyTorch's choice, which the environment variable ATEN_CPU_CAPABILITY can restrict.

    Args:
        source: The C++ file. It may include vectors.h and headers beside it.

    Returns:
        The library and an empty string, or None and the reason why there is none.
    """
    if os.environ.get(NATIVE_ENV_VAR) == "0":
        return None, f"{NATIVE_ENV_VAR}=0 is set"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return None, f"this processor has no AVX2 ({capability})"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler was found (g++ or clang++)"
    has_vnni = capability == "AVX512" and torch.cpu._is_vnni_supported()  # pyright: ignore[reportPrivateUsage] -- no public one
    flags = (*COMPILER_FLAGS, *AVX2_FLAGS, *(AVX512_FLAGS if has_vnni else ()))
    files = [source, VECTOR_HEADER, *sorted(source.parent.glob("*.h"))]
    content = b"".join(path.read_bytes() for path in files) + " ".join((compiler, *flags)).encode()
    try:
        library = cache_dir() / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_private(library.parent):
            return (
                None,
                f"{library.parent}: other users can write to it. Remove it, or set XDG_CACHE_HOME to another directory",
            )
        checksum = library.with_suffix(".sha256")
        if not is_intact(library, checksum):
            with tempfile.TemporaryDirectory(dir=library.parent) as build_dir:
                built = Path(build_dir) / library.name
                command = [compiler, *flags, str(source), "-o", str(built)]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    return None, f"{' '.join(command)} failed:\n{result.stderr.strip()[-2000:]}"
                built.chmod(0o700)
                fsync_path(built)
                new_checksum = built.with_suffix(".sha256")
                new_checksum.write_text(sha256_file(built), encoding="utf-8")
                fsync_path(new_checksum)
                for path in (library, checksum):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                built.replace(library)
                new_checksum.replace(checksum)
        return ctypes.CDLL(str(library)), ""
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return None, str(error)


def is_private(path: Path) -> bool:
    """Whether a file or directory belongs to this user, and no other one can write to it."""
    if not hasattr(os, "getuid"):
        return True
    status = path.lstat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def is_intact(library: Path, checksum: Path) -> bool:
    """Whether a library is a private file with the SHA-256 beside it. A link is not followed."""
    if not all(path.is_file() and not path.is_symlink() and is_private(path) for path in (library, checksum)):
        return False
    return checksum.read_bytes() == sha256_file(library).encode()


def call_native(source: Path, name: str, *arguments: Any) -> None:
    """Call the function `nextword_NAME` of a library that `load_native_library` has loaded.

    Args:
        source: The C++ file.
        name: Name of the function. Its first argument is the number of threads: PyTorch's.
        *arguments: The other arguments. int is passed as int64_t, float as float, a tensor as the pointer to its data, None as
            a null pointer; pointers to structures (`ctypes.byref`) as they are.
    """
    function = getattr(load_native_library(source)[0], f"nextword_{name}")
    function(ctypes.c_int64(torch.get_num_threads()), *map(_to_c, arguments))


def _to_c(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_float(value) if isinstance(value, float) else value
