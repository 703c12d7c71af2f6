"""Files that survive a crash: written aside, flushed to disk, moved into place, and listed with their SHA-256.

Nothing here knows what the bytes mean. A directory is whole when `nextword.json` is in it and every file it lists has the
size and the hash it says; that file is written last, and ends with a hash of its own.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nextword.common.errors import CorruptFileError, DiskFullError, NextwordError

MANIFEST = "nextword.json"


@contextlib.contextmanager
def map_disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into a `DiskFull` that says how much room there is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        error_number = error.errno if isinstance(error, OSError) else parse_errno(str(error))
        if error_number not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            reason = getattr(error, "strerror", None) or error
            raise NextwordError(f"{path}: cannot write: {reason}") from error
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        raise DiskFullError(
            f"{path}: the disk is full ({free:,} bytes free). What was saved before is whole: "
            "make room and run the same command again with --resume."
        ) from error


@contextlib.contextmanager
def require_free_space(path: Path, required_bytes: int, check_now: bool = True) -> Iterator[None]:
    """Refuse at once what the disk of `path` has no room for, unless somebody else does; and say how much was wanted where it
    fills up meanwhile.

    Args:
        needed: bytes, besides those that are used already.
    """
    free = shutil.disk_usage(path).free
    if check_now and free < required_bytes:
        raise DiskFullError(
            f"{path}: this needs up to {required_bytes:,} bytes, and the disk has {free:,} free. Nothing was written over: make room, "
            "or name another place"
        )
    try:
        yield
    except DiskFullError as error:
        raise DiskFullError(f"{error} (of up to {required_bytes:,} bytes that this needed at its start)") from error


def directory_size(*directories: Path) -> int:
    """Bytes of all files below some directories, as far as they are there."""
    paths = (path for directory in directories for path in directory.rglob("*"))
    return sum(path.stat().st_size for path in paths if path.is_file())


def parse_errno(message: str) -> int | None:
    """The system's error number in what safetensors says of it: "No space left on device (os error 28)"."""
    match = re.search(r"os error (\d+)", message)
    return int(match[1]) if match else None


def fsync_path(path: Path) -> None:
    """fsync a file, or a directory where the system lets one be opened (Windows does not)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a whole file so that a crash leaves either the old content or the new one."""
    data = content.encode() if isinstance(content, str) else content
    temp_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with map_disk_errors(path):
        try:
            with temp_path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temp_path.replace(path)
        except OSError:  # what is left takes room, where there may be none
            temp_path.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def append_line_durably(path: Path, line: str) -> None:
    """Append one line and return when it is on the disk."""
    with map_disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path, max_bytes: int | None = None) -> Any:
    """Parse a JSON file. Raises `CorruptFile` with path and line where it is not JSON.

    Args:
        most: bytes that a file which is not ours may have; a larger one is refused before it is read.
    """
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise CorruptFileError(
                f"{path}: {path.stat().st_size:,} bytes, where no file of this kind needs {max_bytes:,}"
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NextwordError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        where = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CorruptFileError(f"{path}{where}: not valid JSON ({error})") from error


def read_jsonl(path: Path) -> list[Any]:
    """The records of a line-per-record file of ours; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was never finished
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{path} line {number}: not valid JSON ({error})") from error
    return records


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    directory: Path, metadata: dict[str, Any], known_hashes: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Write the manifest of a finished directory: `facts`, and the size and SHA-256 of every file in it.

    Args:
        known: by name, size and SHA-256 of files that were hashed while they were written, and are on the disk already.
    """
    known_hashes = known_hashes or {}
    paths = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    files = {
        name: known_hashes.get(name) or {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in paths.items()
        if path.name != MANIFEST
    }
    with map_disk_errors(directory):
        for name in files:
            if name not in known_hashes:
                fsync_path(directory / name)
    manifest = {**metadata, "files": files}
    atomic_write(directory / MANIFEST, to_json({**manifest, "sha256": manifest_digest(manifest)}))


def manifest_digest(manifest: dict[str, Any]) -> str:
    """What a manifest ends with: the SHA-256 of all that it says before."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The facts a directory was sealed with. Raises `CorruptFile` where the manifest is missing or not one."""
    return split_manifest(directory)[0]


def split_manifest(directory: Path) -> tuple[dict[str, Any], str | None]:
    """A manifest's facts, and the hash of them that it says; None where it was written without one."""
    if not (directory / MANIFEST).is_file():
        raise CorruptFileError(
            f"{directory}: no {MANIFEST}, so this was never finished or is no directory of nextword's"
        )
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptFileError(f"{directory / MANIFEST}: not a manifest")
    # What follows the files is the hash of the rest, whatever damage has made of its name.
    recorded_digest = None if next(reversed(manifest)) == "files" else str(manifest.popitem()[1])
    for name, file in manifest["files"].items():
        is_valid = isinstance(file, dict) and type(file.get("bytes")) is int and isinstance(file.get("sha256"), str)
        if "\0" in name or not is_valid:
            raise CorruptFileError(
                f"{directory / MANIFEST}: not a manifest (what it says of {name[:80]!r} is no size and hash)"
            )
    return manifest, recorded_digest


def is_inside(path: Path, directory: Path) -> bool:
    """Whether a path, its links followed, lies in a directory; a loop of links lies nowhere, nor does too long a name."""
    try:
        return path.resolve(strict=path.exists()).is_relative_to(directory.resolve())
    except (OSError, RuntimeError):
        return False


def iter_integrity_errors(directory: Path) -> Iterable[str]:
    """Every way in which a sealed directory differs from its manifest, one sentence a file."""
    manifest, recorded_digest = split_manifest(directory)
    if recorded_digest not in (None, manifest_digest(manifest)):
        yield f"{directory / MANIFEST}: the content does not match its SHA-256"
    for name, expected in manifest["files"].items():
        path = directory / name
        if not is_inside(path, directory):
            yield f"{path}: the manifest names a file outside of its directory"
        elif not path.is_file():
            yield f"{path}: missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{path}: {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        elif sha256_file(path) != expected["sha256"]:
            yield f"{path}: the content does not match its SHA-256"


def verify_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest and check every file against it; the facts it holds. Raises `CorruptFile` naming each file."""
    problems = list(iter_integrity_errors(directory))
    if problems:
        raise CorruptFileError("\n".join(problems))
    return read_manifest(directory)


def verify_tree(path: Path) -> dict[str, str]:
    """Check every sealed directory below a path, or the path itself; each that is whole, and what it is.

    Raises:
        CorruptFile: with every damaged file by name.
    """
    if not path.is_dir():
        raise NextwordError(f"{path}: no such directory")
    manifest_paths = path.rglob(MANIFEST)
    directories = sorted(one.parent for one in manifest_paths if ".partial" not in str(one.relative_to(path)))
    if not directories:
        raise CorruptFileError(f"{path}: no {MANIFEST} in it, so there is nothing to check it against")
    problems = [line for directory in directories for line in iter_integrity_errors(directory)]
    if problems:
        raise CorruptFileError("\n".join(problems))
    kinds = {"state": "checkpoint", "model": "model", "settings": "shards", "places": "index"}
    return {
        str(directory): next((kind for key, kind in kinds.items() if key in read_manifest(directory)), "directory")
        for directory in directories
    }


def atomic_replace_dir(staging_dir: Path, target: Path) -> None:
    """Put a finished directory where another one may stand. A crash in between leaves one of the two whole.

    `settle` completes a move that a crash interrupted.
    """
    retired = target.with_name(f".{target.name}.old")
    with map_disk_errors(target):
        if retired.exists():
            shutil.rmtree(retired)
        if target.exists():
            target.rename(retired)
        staging_dir.rename(target)
        fsync_path(target.parent)
        if retired.exists():
            shutil.rmtree(retired)


def recover_interrupted_swap(target: Path) -> None:
    """After a crash inside `move_into_place`: bring the old directory back, or clear it away."""
    retired = target.with_name(f".{target.name}.old")
    if retired.exists() and not target.exists():
        retired.rename(target)
    elif retired.exists():
        shutil.rmtree(retired)
