"""Untrusted or fragile work in a process of its own, whose time and memory the operating system limits.

The process runs the function `answer` of a Python file: `python -P limited_process.py FILE SECONDS BYTES`. It reads the keyword
arguments of a call as one line of JSON, and writes the result as another, until its input ends. It imports nothing from
nextword, is replaced rather than interrupted, and ends with its parent.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def worker_command(file: str | Path, seconds: float = 0, memory_bytes: int = 0) -> list[str]:
    """The command line of a process that answers calls.

    Args:
        file: Python file with the function `answer`.
        seconds: Limit of the processor time of a call. 0 is no limit.
        memory_bytes: Limit of the address space. 0 is no limit.
    """
    return [sys.executable, "-P", __file__, str(file), str(seconds), str(memory_bytes)]


def worker_environment() -> dict[str, str]:
    """The environment of such a process, without keys."""
    return {name: value for name, value in os.environ.items() if not name.startswith("NEXTWORD_")}


def call_in_process(
    file: str | Path,
    request: dict[str, Any],
    *,
    seconds: float = 0,
    memory_bytes: int = 0,
    timeout: float | None = None,
) -> Any:
    """The result of one call of `answer` in a new process.

    Args:
        file: See `worker_command`, as the limits.
        request: Keyword arguments of the call.
        seconds: Limit of processor time.
        memory_bytes: Limit of memory.
        timeout: Limit of wall-clock time, for a process that waits for itself. Default: none.

    Raises:
        subprocess.CalledProcessError: The process failed. Its return code is negative if a signal ended it, as beyond a limit.
        subprocess.TimeoutExpired: It exceeded the timeout.
    """
    command, data = worker_command(file, seconds, memory_bytes), json.dumps(request).encode()
    options: dict[str, Any] = {"capture_output": True, "check": True, "env": worker_environment()}
    process = subprocess.run(command, input=data, timeout=timeout, **options)
    return json.loads(process.stdout.splitlines()[-1])


def main(file: str, seconds: float, memory_bytes: int) -> None:
    """Answer calls until the input ends."""
    os.environ["RUST_BACKTRACE"] = "0"  # it needs memory, for which a process without any waits
    if sys.platform != "win32" and memory_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = runpy.run_path(file)["answer"]
    for line in sys.stdin:
        if seconds and sys.platform != "win32":  # which has no such timer
            signal.setitimer(signal.ITIMER_PROF, seconds)
        result = json.dumps(answer(**json.loads(line)))
        print(result, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
