"""Durable files: atomic writes, and directories with a SHA-256 manifest.

A file is written under a temporary name, flushed to disk and renamed. A finished directory holds `nextword.json`, its
manifest: metadata, and the size and SHA-256 of every file. The manifest is written last. A manifest, and every other JSON
object that is read again, ends with its own SHA-256; a line of a log ends with its CRC-32.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeGuard, TypeVar, cast

import msgspec
from filelock import FileLock
from safetensors import SafetensorError

from nextword.common.errors import CorruptFileError, DiskFullError, NextwordError

MANIFEST = "nextword.json"
MAX_MANIFEST_BYTES = 2**25
# Files of a model or a checkpoint that are read where they exist.
MODEL_FILES = (
    r"(generation_|tokenizer_)?config\.json|tokenizer\.json|chat_template\.jinja|.*\.safetensors(\.index\.json)?"
)
# Never follow a link that is planted at the path of an output, and never wait for the other end of a pipe.
NOFOLLOW, NONBLOCK = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0)]  # in the records of a log

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


def open_new(path: Path) -> int:
    """Create a file and return its descriptor. Whatever lies at the path is neither followed nor overwritten."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW | getattr(os, "O_BINARY", 0), 0o666)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new one. A device or a pipe is written directly."""
    data = content.encode(errors="replace") if isinstance(content, str) else content  # lone surrogates of a path
    temp_path = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")
    with map_disk_errors(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            descriptor = os.open(path, os.O_WRONLY | NONBLOCK)  # fails for a pipe that nobody reads
            os.set_blocking(descriptor, True)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            return
        try:
            with os.fdopen(open_new(temp_path), "wb") as file:
                file.write(data)
            fsync_path(temp_path)
            temp_path.replace(path)
        except OSError:  # the disk may be full: leave nothing behind
            temp_path.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def append_line(path: Path, line: str, durable: bool = False) -> None:
    """Append a line to a file, which may not be a link.

    Args:
        path: the file.
        line: the line, without its end.
        durable: return when the line is on the disk.
    """
    with map_disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOFOLLOW | NONBLOCK, 0o666)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in cast(Sequence[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    """Indented JSON with a final newline. Lone surrogates, which a path has for bytes that are not UTF-8, are escaped."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def to_json_line(record: Mapping[str, Any]) -> str:
    """A record of a log as a line of JSON, which ends with its CRC-32."""
    record = finite(record)
    return json.dumps({**record, "crc32": _crc32(record)}, allow_nan=False)


def _crc32(value: object) -> str:
    return f"{zlib.crc32(json.dumps(value).encode()):08x}"


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object that ends with its SHA-256, for `read_sealed_json`."""
    value = finite(value)
    atomic_write(path, to_json({**value, "sha256": sha256_of_json(value)}))


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
    if max_bytes is not None and path.is_file() and (size := path.stat().st_size) > max_bytes:
        raise CorruptFileError(f"{path}: {size:,} bytes, where no file of this kind needs {max_bytes:,}")
    return read_bytes(path).decode("utf-8-sig")


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        CorruptFileError: there is a directory, a pipe or a device in its place.
        NextwordError: there is no such file, or it cannot be read.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | NONBLOCK | getattr(os, "O_BINARY", 0)), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
    except FileNotFoundError as error:
        raise NextwordError(f"{path}: no such file") from error
    except OSError as error:
        if not path.is_dir():
            raise NextwordError(f"{path}: cannot read: {error.strerror}") from error
    raise CorruptFileError(f"{path}: not a regular file")


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
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CorruptFileError(f"{path}{line}: not valid JSON ({error})") from error


def read_json_object(path: Path, max_bytes: int | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises as `read_json`, and `CorruptFileError` for any other value."""
    content = read_json(path, max_bytes)
    if not is_json_object(content):
        raise CorruptFileError(f"{path}: not a JSON object")
    return content


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The JSON object that `write_sealed_json` wrote. One without a SHA-256, of an earlier version, is not checked.

    Raises:
        CorruptFileError: not a JSON object, or its content does not match its SHA-256.
        NextwordError: there is no such file.
    """
    value = read_json_object(path)
    if _pop_digest(value, "sha256", 64) not in (None, sha256_of_json(value)):
        raise CorruptFileError(
            f"{path}: the content does not match its SHA-256: restore the file. (If you edited it on purpose, remove its last "
            'entry, "sha256".)'
        )
    return value


def _pop_digest(value: dict[str, Any], name: str, length: int) -> str | None:
    """Remove the digest at the end of an object and return it, even if its name or its value is damaged."""
    last = next(reversed(value), "")
    digest = value.get(last)
    looks_alike = len(last) == len(name) and isinstance(digest, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", digest)
    return str(value.pop(last)) if last == name or looks_alike else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a log in JSON Lines; [] if there is no file. A last line that a crash has cut off is dropped.

    Raises:
        CorruptFileError: a line is not a JSON object, or does not match its CRC-32.
    """
    records: list[dict[str, Any]] = []
    *lines, rest = read_bytes(path).split(b"\n") if os.path.lexists(path) else [b""]
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(rest[:-1])
        lines.append(rest)  # not cut off: its newline is damaged
    for number, line in enumerate(lines, start=1):
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{path} line {number}: not valid JSON ({error})") from error
        if not is_json_object(record):
            raise CorruptFileError(f"{path} line {number}: not a JSON object")
        if _pop_digest(record, "crc32", 8) not in (None, _crc32(record)):
            raise CorruptFileError(f"{path} line {number}: the content does not match its CRC-32: restore the file")
        records.append(record)
    return records


def read_records(path: Path, record_type: type[T]) -> list[T]:
    """The records of a log as instances of a dataclass or `msgspec.Struct`; [] if there is no file.

    Raises:
        CorruptFileError: a line is damaged, or is not such a record.
    """
    return [convert(record, record_type, f"{path} line {n}") for n, record in enumerate(read_jsonl(path), start=1)]


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace the records of a log atomically."""
    atomic_write(path, "".join(to_json_line(record) + "\n" for record in records))


def convert(value: object, to: type[T], source: object) -> T:
    """Validate a JSON value as a dataclass or `msgspec.Struct`. Raises `CorruptFileError` with the source and the field."""
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        raise CorruptFileError(f"{source}: {error}") from error


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
    write_sealed_json(directory / MANIFEST, {**metadata, "files": files})


def sha256_of_json(value: object) -> str:
    """The SHA-256 of a JSON value, whatever its white space."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


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
    if recorded_digest not in (None, sha256_of_json(manifest)):
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


def recover_interrupted_swap(target: Path) -> None:
    """After a crash in `build_directory`: restore the old directory, or remove it."""
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

    A crash leaves the old directory or the new one intact, which `recover_interrupted_swap` finds. The temporary directory
    `.NAME.partial` beside the target is removed in any case.
    """
    staging_dir = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(staging_dir, ignore_errors=True)
        with map_disk_errors(target):
            staging_dir.mkdir()
            build(staging_dir)
            recover_interrupted_swap(target)
            if target.exists():
                target.rename(target.with_name(f".{target.name}.old"))
            staging_dir.rename(target)
            fsync_path(target.parent)
            recover_interrupted_swap(target)
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)
