"""The process that renders chat templates and compiles grammars (`limited_worker`), as the server sees it."""

import asyncio
import json
import os
import sys

from nextword.serving import limited_worker
from nextword.serving.protocol import APIError

WALL_FACTOR = 5  # wall time limit of a request, as a multiple of its CPU time limit
QUEUE_TIMEOUT = 10.0  # seconds that a request may wait for the process


class LimitedProcess:
    """Runs one request at a time under limits of time and memory. Beyond them the process is replaced."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.lock = asyncio.Lock()

    async def call(self, **request: object) -> dict[str, str] | None:
        """The response to a request of `limited_worker`, or None if it exceeded a limit.

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
                    *(sys.executable, "-P", limited_worker.__file__),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    limit=8 * limited_worker.MAX_OUTPUT_CHARS,
                    start_new_session=True,
                    env={name: value for name, value in os.environ.items() if not name.startswith("NEXTWORD_")},
                )
            stdin, stdout = self.process.stdin, self.process.stdout
            assert stdin is not None and stdout is not None
            async with asyncio.timeout(limited_worker.CPU_TIMEOUT * WALL_FACTOR):
                stdin.write(json.dumps({**request, "seconds": limited_worker.CPU_TIMEOUT}).encode() + b"\n")
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
