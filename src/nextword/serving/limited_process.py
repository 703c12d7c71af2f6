"""The process that renders chat templates and compiles grammars (`limited_worker`), as the server sees it."""

import asyncio
import json
from typing import Any

from nextword.common.limited_process import worker_command, worker_environment
from nextword.serving import limited_worker
from nextword.serving.protocol import APIError

CPU_TIMEOUT = 2.0  # seconds of one request
MAX_MEMORY_BYTES = 256 * 2**20  # address space
WALL_FACTOR = 5  # wall time limit of a request, as a multiple of its CPU time limit
QUEUE_TIMEOUT = 10.0  # seconds that a request may wait for the process


class LimitedProcess:
    """Runs one request at a time under limits of time and memory. Beyond them the process is replaced."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.lock = asyncio.Lock()

    async def call(self, **arguments: Any) -> dict[str, str] | None:
        """The result of a call of `limited_worker.answer`, or None if it exceeded a limit.

        Raises:
            APIError: Other requests keep the process busy.
        """
        try:
            await asyncio.wait_for(self.lock.acquire(), QUEUE_TIMEOUT)
        except TimeoutError as error:
            message = "too many templates or schemas are being processed: try again later"
            raise APIError(503, message, code="queue_full", headers={"Retry-After": "5"}) from error
        answer = b""
        try:
            if self.process is None or self.process.returncode is not None:
                self.process = await asyncio.create_subprocess_exec(
                    *worker_command(limited_worker.__file__, CPU_TIMEOUT, MAX_MEMORY_BYTES),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    limit=8 * limited_worker.MAX_OUTPUT_CHARS,
                    start_new_session=True,
                    env=worker_environment(),
                )
            stdin, stdout = self.process.stdin, self.process.stdout
            assert stdin is not None and stdout is not None
            async with asyncio.timeout(CPU_TIMEOUT * WALL_FACTOR):
                stdin.write(json.dumps(arguments).encode() + b"\n")
                await stdin.drain()
                answer = await stdout.readline()
        except (TimeoutError, ConnectionError):
            pass  # no answer
        finally:
            if not answer.endswith(b"\n"):
                await self.close()
            self.lock.release()
        return json.loads(answer) if answer.endswith(b"\n") else None

    async def close(self) -> None:
        """Terminate the process."""
        process, self.process = self.process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
