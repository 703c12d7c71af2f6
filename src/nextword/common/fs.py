"""Durable files: atomic writes, and directories with a SHA-256 manifest.

A file is written under a temporary name, flushed to disk and renamed. A finished directory holds `nextword.json`, its
manifest: metadata, and the size and SHA-256 of every file. The manifest is written last and ends with a digest of
itself.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

from filelock import FileLock
from safetensors import SafetensorError

from nextword.common.errors import CorruptFileError, DiskFullError, NextwordError

MANIFEST = "nextword.json"
MAX_MANIFEST_BYTES = 2**25
# Files of a model or a checkpoint that are read where they exist.
MODEL_FILES = (
    r"(generation_|tokenizer_)?config\.json|tokenizer\.json|chat_template\.jinja|.*\.safetensors(\.index\.json)?"
)

# ---------------------------------------------------------------- disk space


@contextlib.contextmanager
def map_disk_errors(path: Path) -> Generator[None]:
    """Raise `DiskFullError`, with the free space, where a write inside finds none; `NextwordError` for other failures."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors gives the number in its message: "No space left on device (os error 28)".
        match = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else match and int(match[1])
        if number not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            reason = getattr(error, "strerror", None) or error
            raise NextwordError(f"{path}: cannot write: {reason}") from error
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        raise DiskFullError(
            f"{path}: the disk is full ({free:,} bytes free). What was saved before is intact: "
            "free some space and run the same command again with --resume."
        ) from error


@contextlib.contextmanager
def require_free_space(path: Path, required_bytes: int, check_now: bool = True) -> Generator[None]:
    """Check the free space of a disk, and name the requirement if the disk fills up inside.

    Args:
        path: an existing path on the disk.
        required_bytes: how much the operation inside writes at most, besides what is used already.
        check_now: False where another process has checked it.

    Raises:
        DiskFullError: the disk has less free space.
    """
    free = shutil.disk_usage(path).free
    if check_now and free < required_bytes:
        raise DiskFullError(
            f"{path}: this needs up to {required_bytes:,} bytes, and the disk has {free:,} free. Nothing was overwritten: free "
            "some space, or name another directory"
        )
    try:
        yield
    except DiskFullError as error:
        raise DiskFullError(f"{error} (this needed up to {required_bytes:,} bytes at its start)") from error


def directory_size(*directories: Path) -> int:
    """The size of all files in some directories, in bytes. A missing directory has 0."""
    paths = (path for directory in directories for path in directory.rglob("*"))
    return sum(path.stat().st_size for path in paths if path.is_file())


# ---------------------------------------------------------------- files


def fsync_path(path: Path) -> None:
    """Flush a file to disk; a directory too, where the system can open one (Windows cannot)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new one. A device or a pipe is written directly."""
    data = content.encode(errors="replace") if isinstance(content, str) else content  # lone surrogates of a path
    temp_path = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    with map_disk_errors(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_bytes(data)
            return
        try:
            temp_path.write_bytes(data)
            fsync_path(temp_path)
            temp_path.replace(path)
        except OSError:  # the disk may be full: leave nothing behind
            temp_path.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def append_line_durably(path: Path, line: str) -> None:
    """Append a line, and return when it is on the disk."""
    with map_disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def to_json(value: Any) -> str:
    """Indented JSON with a final newline. Lone surrogates, which a path has for bytes that are not UTF-8, are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def is_json_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value that was read from JSON is an object."""
    return isinstance(value, dict)


def is_json_array(value: object) -> TypeGuard[list[Any]]:
    """Whether a value that was read from JSON is an array."""
    return isinstance(value, list)


def read_text(path: Path, max_bytes: int | None = None) -> str:
    """The text of a file in UTF-8, without its byte order mark.

    Args:
        path: the file.
        max_bytes: refuse a larger file before it is read. For files that nextword has not written.

    Raises:
        CorruptFileError: the file is larger.
    """
    if max_bytes is not None and (size := path.stat().st_size) > max_bytes:
        raise CorruptFileError(f"{path}: {size:,} bytes, where no file of this kind needs {max_bytes:,}")
    return path.read_text(encoding="utf-8-sig")


def read_json(path: Path, max_bytes: int | None = None) -> Any:
    """Parse a JSON file.

    Args:
        path: the file.
        max_bytes: as in `read_text`.

    Raises:
        CorruptFileError: not valid JSON, with path and line; or too large.
        NextwordError: there is no such file.
    """
    try:
        return json.loads(read_text(path, max_bytes))
    except FileNotFoundError as error:
        raise NextwordError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CorruptFileError(f"{path}{line}: not valid JSON ({error})") from error


def read_json_object(path: Path, max_bytes: int | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises as `read_json`, and `CorruptFileError` for any other value."""
    content = read_json(path, max_bytes)
    if not is_json_object(content):
        raise CorruptFileError(f"{path}: not a JSON object")
    return content


def read_jsonl(path: Path) -> list[Any]:
    """The records of a JSON Lines file of nextword; [] if there is no file. A last line without a newline is dropped.

    Raises:
        CorruptFileError: a line is not valid JSON.
    """
    records: list[Any] = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], start=1):  # a crash may have cut off what follows the last newline
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{path} line {number}: not valid JSON ({error})") from error
    return records


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_inside(path: Path, directory: Path) -> bool:
    """Whether a path lies in a directory once links are followed. False for a loop of links and for a name that is too long."""
    try:
        return path.resolve(strict=path.exists()).is_relative_to(directory.resolve())
    except (OSError, RuntimeError):
        return False


def cache_dir() -> Path:
    """The user's directory for what can be made again, such as compiled libraries."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nextword"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextword"


# ---------------------------------------------------------------- manifests


def write_manifest(
    directory: Path, metadata: dict[str, Any], known_hashes: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Write the manifest of a finished directory, after its files are flushed to disk.

    Args:
        directory: the directory.
        metadata: what else the manifest holds.
        known_hashes: by name, `{"bytes", "sha256"}` of files that were hashed and flushed while they were written.
    """
    known_hashes = known_hashes or {}
    files: dict[str, dict[str, Any]] = {}
    with map_disk_errors(directory):
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if name in known_hashes:
                files[name] = known_hashes[name]
            elif path.is_file() and path.name != MANIFEST:
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                fsync_path(path)
    manifest = {**metadata, "files": files}
    atomic_write(directory / MANIFEST, to_json({**manifest, "sha256": manifest_digest(manifest)}))


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's content, which is its last entry."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory: its metadata and `files`. Raises `CorruptFileError` if it is missing or malformed."""
    return _split_manifest(directory)[0]


def _split_manifest(directory: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest of a directory, and the digest it ends with (None if it was written without one)."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CorruptFileError(f"{directory}: no {MANIFEST}: it was never finished, or nextword did not make it")
    manifest = read_json(path, MAX_MANIFEST_BYTES)
    files = manifest.get("files") if is_json_object(manifest) else None
    if not is_json_object(manifest) or not is_json_object(files):
        raise CorruptFileError(f"{path}: not a manifest")
    # The last entry is the digest of the others, even if its name is damaged.
    recorded_digest = None if next(reversed(manifest)) == "files" else str(manifest.popitem()[1])
    for name, file in files.items():
        is_valid = is_json_object(file) and type(file.get("bytes")) is int and isinstance(file.get("sha256"), str)
        if "\0" in name or not is_valid:
            raise CorruptFileError(f"{path}: not a manifest (no size and SHA-256 for the file {name[:80]!r})")
    return manifest, recorded_digest


def _integrity_errors(directory: Path) -> list[str]:
    """Every difference between a directory and its manifest, as a message with the path of the file."""
    manifest, recorded_digest = _split_manifest(directory)
    errors: list[str] = []
    if recorded_digest not in (None, manifest_digest(manifest)):
        errors.append(f"{directory / MANIFEST}: the content does not match its SHA-256")
    seen: set[Path] = set()
    for name, expected in manifest["files"].items():
        path = directory / name
        if not is_inside(path, directory):
            errors.append(f"{path}: the manifest names a file outside of its directory")
            continue
        if path.resolve() in seen:
            errors.append(f"{path}: the manifest names this file twice")
        elif not path.is_file():
            errors.append(f"{path}: missing")
        elif path.stat().st_size != expected["bytes"]:
            errors.append(f"{path}: {path.stat().st_size:,} bytes instead of {expected['bytes']:,}")
        elif sha256_file(path) != expected["sha256"]:
            errors.append(f"{path}: the content does not match its SHA-256")
        seen.add(path.resolve())
    for path in sorted(directory.iterdir()):
        if path.name not in manifest["files"] and re.fullmatch(MODEL_FILES, path.name):
            errors.append(f"{path}: not listed in the manifest {MANIFEST}, so it was added later: remove it")
    if errors and "model" in manifest:
        errors.append(
            f"{directory}: if this was changed on purpose, for example saved again with transformers, the manifest is stale: "
            f"delete {directory / MANIFEST}, and the directory opens as any other, without the manifest's record of a task"
        )
    return errors


def verify_manifest(*directories: Path, max_bytes: int | None = None) -> dict[str, Any]:
    """Check every file of some directories against their manifests, and return the manifest of the last.

    Args:
        directories: the directories.
        max_bytes: refuse more bytes before they are hashed. For directories that nextword may not have written.

    Raises:
        CorruptFileError: with a line for every file that differs.
    """
    sizes = [file["bytes"] for directory in directories for file in read_manifest(directory)["files"].values()]
    if max_bytes is not None and sum(sizes) > max_bytes:
        message = f"{sum(sizes):,} bytes, where no directory of this kind needs {max_bytes:,}"
        raise CorruptFileError(f"{directories[-1] / MANIFEST}: {message}")
    if errors := list(chain.from_iterable(map(_integrity_errors, directories))):
        raise CorruptFileError("\n".join(errors))
    return read_manifest(directories[-1])


def verify_tree(path: Path) -> dict[str, str]:
    """Check every directory with a manifest at or below a path.

    Returns:
        The kind of each directory by its path: "checkpoint", "model", "shards", "index" or "directory".

    Raises:
        CorruptFileError: with a line for every file that differs.
        NextwordError: the path is no directory, or there is no manifest at all.
    """
    if not path.is_dir():
        raise NextwordError(f"{path}: no such directory")
    manifests = (file for file in path.rglob(MANIFEST) if ".partial" not in str(file.relative_to(path)))
    directories = sorted(file.parent for file in manifests)
    if not directories:
        message = f"no manifest ({MANIFEST}), so there is nothing to check its files against"
        raise NextwordError(f"{path}: {message}: nextword did not make this directory, or did not finish it")
    verify_manifest(*directories)
    kinds = {"state": "checkpoint", "model": "model", "settings": "shards", "places": "index"}
    return {
        str(directory): next((kind for key, kind in kinds.items() if key in read_manifest(directory)), "directory")
        for directory in directories
    }


# ---------------------------------------------------------------- directories


def atomic_replace_dir(staging_dir: Path, target: Path) -> None:
    """Move a finished directory to `target`, which may exist. A crash leaves the old one or the new one intact.

    After a crash, `recover_interrupted_swap` completes the move.
    """
    old = target.with_name(f".{target.name}.old")
    with map_disk_errors(target):
        recover_interrupted_swap(target)
        if target.exists():
            target.rename(old)
        staging_dir.rename(target)
        fsync_path(target.parent)
        recover_interrupted_swap(target)


def recover_interrupted_swap(target: Path) -> None:
    """After a crash in `atomic_replace_dir`: restore the old directory, or remove it."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    elif old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def output_lock(target: Path) -> Generator[None]:
    """Wait until no other process changes `target`, and hold its lock inside. Its parent directory is made."""
    with map_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock")).acquire()
    with lock:
        recover_interrupted_swap(target)
        yield


def build_directory(target: Path, build: Callable[[Path], None]) -> None:
    """Make a directory in one step: `build` fills and seals an empty one, which then replaces `target`.

    The temporary directory `.NAME.partial` beside the target is removed in any case.
    """
    staging_dir = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(staging_dir, ignore_errors=True)
        with map_disk_errors(staging_dir):
            staging_dir.mkdir()
        build(staging_dir)
        atomic_replace_dir(staging_dir, target)
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)
