"""Processes that a test starts. Each is ended after its test, with all of its descendants, whatever the test's outcome."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds: how long a test waits for what must happen; a busy machine needs a small part of it
MARK = "NEXTWORD_TEST_PROCESS"  # an environment variable that the descendants of a process inherit

_marks: dict[int, str] = {}  # by process number
_of_this_test: list["subprocess.Popen[Any]"] = []


def launch(arguments: Sequence[str | Path], env: Mapping[str, str] | None = None, **options: Any) -> Any:
    """Start a process in a group of its own. The caller ends it with `kill`."""
    mark = uuid.uuid4().hex
    environment = {**(os.environ if env is None else env), MARK: mark}
    group = {} if os.name == "nt" else {"start_new_session": True}
    process = subprocess.Popen([*map(str, arguments)], env=environment, **group, **options)
    _marks[process.pid] = mark
    return process


def start_process(arguments: Sequence[str | Path], **options: Any) -> Any:
    """Start a process that is ended after the test at the latest."""
    process = launch(arguments, **options)
    _of_this_test.append(process)
    return process


def kill(process: "subprocess.Popen[Any]") -> None:
    """End a process and all that it has started. torchrun gives its workers process groups of their own."""
    mark = _marks.pop(process.pid, None)
    if process.poll() is None:
        process.kill()
    if os.name != "nt":
        _kill_group(process.pid)
        while mark and (left := _marked(mark)):
            for pid in left:
                _kill_group(pid)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None and not stream.closed:
            stream.close()


def kill_all() -> None:
    """End what `start_process` has started since the last call."""
    while _of_this_test:
        kill(_of_this_test.pop())


def _kill_group(leader: int) -> None:
    for send in (os.killpg, os.kill):
        try:
            send(leader, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone, or leader of no group
            continue


def _marked(mark: str) -> list[int]:
    """Running processes with this mark, where the system tells."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except (OSError, ValueError):  # it has just ended, or belongs to somebody else
            continue
    return found


def happens(condition: Callable[[], bool], process: "subprocess.Popen[Any]", interval: float = 0.002) -> bool:
    """Wait for a condition: true when it holds, false when the process ended before."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, f"it did not happen within {PATIENCE:.0f} s"
        time.sleep(interval)
    return False


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[Any] | None" = None) -> None:
    """Wait for a condition, while the process, where one is given, must go on."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"it did not happen within {PATIENCE:.0f} s"
        time.sleep(0.002 if process else 0.01)
