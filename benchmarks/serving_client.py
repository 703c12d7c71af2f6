"""Server processes, and a streaming client that records when each part of a response arrives.

The client writes HTTP requests itself, so that many clients on the measured machine take little CPU time, and so that a client
can read slowly.
"""

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.run import CACHE_DIR
from nextword.pipeline.language_model import resolve_model_dir

Body = dict[str, Any]
COMPLETIONS = "/v1/completions"


# ---------------------------------------------------------------- server processes


class ServerProcess:
    """A server program on a local port, as a context manager."""

    def __init__(self, command: list[str], port: int, **environment: str):
        print(shlex.join(command), file=sys.stderr, flush=True)
        self.log = (CACHE_DIR / "serving.log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, env={**os.environ, **environment}, start_new_session=True
        )
        self.url, self.port = f"http://127.0.0.1:{port}", port

    def wait_until_ready(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except urllib.error.HTTPError as error:
                if error.code != 503:  # it listens, but has no such route
                    return
                time.sleep(0.2)  # loading
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"no response from {self.url}; see {self.log.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()


class NextwordServer(ServerProcess):
    """`nextword serve MODEL`."""

    def __init__(self, model: Path, *arguments: str):
        CACHE_DIR.mkdir(parents=True, exist_ok=True)
        self.directory = resolve_model_dir(model).resolve()
        command = [sys.executable, "-m", "nextword", "serve", str(model), "--port", "0", "--json", *arguments]
        super().__init__(command, 0)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start; see {self.log.name}")
        self.metadata = json.loads(line)
        self.url = self.metadata["url"]
        self.port = int(self.url.rpartition(":")[2])

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            pairs = [line.rsplit(" ", 1) for line in response.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def memory(self) -> int:
        """Resident memory in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# ---------------------------------------------------------------- streaming client


@dataclass
class StreamResult:
    """A streamed completion: when it was requested, when each part arrived (seconds), and the finish reason."""

    requested: float
    status: int = 0
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0] - self.requested

    @property
    def inter_token_latencies(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def send(
    port: int, body: Body, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Request a streamed completion, with a receive buffer of this many bytes."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer or 2**20)
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


async def read_status(reader: asyncio.StreamReader) -> int:
    """The status of a response, after reading its headers."""
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1])


async def events(reader: asyncio.StreamReader) -> AsyncGenerator[Body]:
    """The events of a stream in chunked transfer encoding."""
    buffer = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        buffer += (await reader.readexactly(size + 2))[:-2]
        *complete, buffer = buffer.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in complete:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                yield json.loads(event.removeprefix(b"data: "))


async def stream_completion(port: int, body: Body, disconnect_after: int | None = None) -> StreamResult:
    """One request, until its end or until `disconnect_after` parts have arrived."""
    result = StreamResult(time.monotonic())
    reader, writer = await send(port, body)
    try:
        result.status = await read_status(reader)
        if result.status != 200:
            return result
        async for event in events(reader):
            if "error" in event:
                result.status = 500
                return result
            for choice in event.get("choices", ()):
                if choice.get("text"):
                    result.arrivals.append(time.monotonic())
                    result.text += choice["text"]
                result.finish_reason = choice.get("finish_reason") or result.finish_reason
            if disconnect_after is not None and len(result.arrivals) >= disconnect_after:
                return result
        return result
    finally:
        writer.close()
