"""The lock of a run directory. Imports nothing heavy, so that a second process fails at once."""

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import filelock

from nextword.common import fs
from nextword.common.errors import RunLockedError

LOCK_TIMEOUT_SECONDS = 0.5  # longer than `fail_if_locked` of another process holds the lock


@contextmanager
def run_lock(path: Path) -> Generator[None, None, None]:
    """Hold the lock of a run directory. The lock of a killed process is free.

    Raises:
        RunLockedError: another process holds the lock; the message names it.
    """
    lock, holder_path = filelock.FileLock(path / "lock"), path / "holder.json"
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
    except filelock.Timeout as error:
        holder = {"process": "unknown", "host": "an unknown host"}
        if holder_path.is_file():
            holder = fs.read_json(holder_path)
        raise RunLockedError(f"{path}: the run is in use by process {holder['process']} on {holder['host']}") from error
    try:
        fs.atomic_write(holder_path, fs.to_json({"process": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder_path.unlink(missing_ok=True)
        lock.release()


def fail_if_locked(path: Path) -> None:
    """Raise `RunLockedError` if another process uses the run. In a distributed run only rank 0 checks."""
    if os.environ.get("RANK", "0") == "0" and (path / "holder.json").is_file():
        with run_lock(path):
            pass
