"""Just-in-time compilation: each library is compiled once, and without a compiler the reason is returned."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nextword.common import native_build

SOURCE = '#include "vectors.h"\nextern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source file, and an empty cache directory."""
    monkeypatch.delenv(native_build.NATIVE_ENV_VAR, raising=False)
    monkeypatch.setattr(native_build, "cache_dir", lambda: tmp_path / "cache")
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="this processor has no AVX2")
def test_a_library_is_built_once_for_each_source(source: Path, tmp_path: Path) -> None:
    loaded, reason = native_build.load_native_library(source)
    assert loaded is not None, reason
    assert loaded.answer() == 42
    assert native_build.load_native_library(source)[0] is loaded
    (built,) = (tmp_path / "cache").glob("*.so")
    before = built.stat().st_mtime_ns
    native_build.load_native_library.__wrapped__(source)  # as another process would ask
    assert built.stat().st_mtime_ns == before
    source.write_text(SOURCE.replace("42", "43"))
    again, _ = native_build.load_native_library.__wrapped__(source)
    assert again is not None
    assert again.answer() == 43
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="this processor has no AVX2")
def test_a_damaged_or_foreign_library_is_built_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a damaged library ends the process with SIGBUS or SIGSEGV, so it must not get that far."""
    load, cache, compiled = native_build.load_native_library.__wrapped__, tmp_path / "cache", tmp_path / "compiled.so"
    compiler = tmp_path / "bin" / "g++"  # takes its time only once
    compiler.parent.mkdir()
    compiler.write_text(
        f'#!/bin/sh\nfor out; do :; done\n[ -f {compiled} ] && exec cp {compiled} "$out"\n'
        f'{shutil.which("g++") or shutil.which("clang++")} "$@" && cp "$out" {compiled}\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", str(compiler.parent), prepend=os.pathsep)
    assert load(source)[0] is not None
    (library,), (checksum,) = cache.glob("*.so"), cache.glob("*.sha256")
    whole = library.read_bytes()

    def link(path: Path) -> None:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")

    damages: list[Callable[[], object]] = [
        lambda: library.write_bytes(b""),
        lambda: library.write_bytes(whole[: len(whole) // 2]),
        lambda: library.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]),
        lambda: checksum.write_bytes(b"\0" * 64),
        checksum.unlink,
        lambda: library.chmod(0o777),
        lambda: checksum.chmod(0o666),
        lambda: link(library),
        lambda: (library.unlink(), library.mkdir()),
    ]
    for damage in damages:
        before = library.stat().st_mtime_ns, library.stat().st_ino
        damage()
        loaded, reason = load(source)
        assert loaded is not None, reason
        assert not library.is_symlink()
        assert native_build.is_intact(library, checksum)
        assert (library.stat().st_mtime_ns, library.stat().st_ino) != before
    cache.chmod(0o777)
    assert load(source) == (
        None,
        f"{cache}: other users can write to it. Remove it, or set XDG_CACHE_HOME to another directory",
    )
    if os.getuid() == 0:
        cache.chmod(0o700)
        os.chown(cache, 12345, -1)
        assert load(source)[0] is None


@pytest.mark.parametrize("compiler", ["#!/bin/sh\necho 'no such header' >&2; exit 1\n", None], ids=["broken", "none"])
def test_without_a_working_compiler_the_reason_is_returned(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    if compiler is not None:
        (folder / "g++").write_text(compiler)
        (folder / "g++").chmod(0o755)
    loaded, reason = native_build.load_native_library(source)
    assert loaded is None
    assert ("no such header" if compiler else "no C++ compiler was found") in reason


def test_an_unwritable_cache_directory_is_not_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(native_build.shutil, "which", lambda name: "/usr/bin/c++")
    (tmp_path / "cache").write_text("a file, not a folder")
    loaded, reason = native_build.load_native_library(source)
    assert loaded is None
    assert "cache" in reason


def test_other_processors_and_the_environment_variable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NEON")
    assert native_build.load_native_library(source) == (None, "this processor has no AVX2 (NEON)")
    native_build.load_native_library.cache_clear()
    monkeypatch.setenv(native_build.NATIVE_ENV_VAR, "0")
    assert native_build.load_native_library(source) == (None, "NEXTWORD_NATIVE=0 is set")
