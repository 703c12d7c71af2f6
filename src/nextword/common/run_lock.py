"""One process at a time works on a run folder, and says who it is. Nothing heavy is imported here, so that whoever comes second
leaves at once."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from nextword.common import fs
from nextword.common.errors import RunLockedError

LOCK_TIMEOUT_SECONDS = 0.5  # seconds, in which one who only looked is gone again


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold a folder's lock. What a killed process held is free.

    Raises:
        RunLocked: another process holds it; the message names that one.
    """
    lock, holder_path = filelock.FileLock(path / "lock"), path / "holder.json"
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
    except filelock.Timeout as error:
        owner = (
            fs.read_json(holder_path) if holder_path.is_file() else {"process": "unknown", "host": "an unknown host"}
        )
        raise RunLockedError(f"{path}: process {owner['process']} on {owner['host']} is at work on this run") from error
    try:
        fs.atomic_write(holder_path, fs.to_json({"process": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder_path.unlink(missing_ok=True)
        lock.release()


def fail_if_locked(path: Path) -> None:
    """Raise `RunLocked` where another process works on a run, before anything is imported for it. Of several processes of one
    run the leader looks."""
    if os.environ.get("RANK", "0") != "0" or not (path / "holder.json").is_file():
        return
    with run_lock(path):
        pass
