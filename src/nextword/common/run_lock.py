"""One process at a time works on a run folder, and says who it is. Nothing heavy is imported here, so that whoever comes second
leaves at once."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from nextword.common import fs
from nextword.common.errors import RunLocked

WAIT = 0.5  # seconds, in which one who only looked is gone again


@contextmanager
def holding(path: Path) -> Iterator[None]:
    """Hold a folder's lock. What a killed process held is free.

    Raises:
        RunLocked: another process holds it; the message names that one.
    """
    lock, holder = filelock.FileLock(path / "lock"), path / "holder.json"
    try:
        lock.acquire(timeout=WAIT)
    except filelock.Timeout as error:
        who = fs.read_json(holder) if holder.is_file() else {"process": "unknown", "host": "an unknown host"}
        raise RunLocked(f"{path}: process {who['process']} on {who['host']} is at work on this run") from error
    try:
        fs.write_durably(holder, fs.to_json({"process": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def refuse_held(path: Path) -> None:
    """Raise `RunLocked` where another process works on a run, before anything is imported for it. Of several processes of one
    run the leader looks."""
    if os.environ.get("RANK", "0") != "0" or not (path / "holder.json").is_file():
        return
    with holding(path):
        pass
