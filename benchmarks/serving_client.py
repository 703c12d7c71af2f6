"""A server in a process of its own, and a client that notes when each part of an answer came.

The client speaks HTTP by hand, so that many of them on the machine that is measured cost little of its time, and so that one of
them can read as slowly as it wants to.
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

from benchmarks.run import KEPT
from nextword.pipeline.language_model import resolve_model_dir

Body = dict[str, Any]
COMPLETIONS = "/v1/completions"


# ---------------------------------------------------------------- a server in a process of its own


class Running:
    """A program that serves at a port of this machine, until the end of the block."""

    def __init__(self, command: list[str], port: int, **environment: str):
        print(shlex.join(command), file=sys.stderr, flush=True)
        self.log = (KEPT / "serving.log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, env={**os.environ, **environment}, start_new_session=True
        )
        self.url, self.port = f"http://127.0.0.1:{port}", port

    def until_it_answers(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except urllib.error.HTTPError as error:
                if error.code != 503:  # it listens, and has no such path
                    return
                time.sleep(0.2)  # it is loading
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"nothing answers at {self.url}; see {self.log.name}")

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


class Served(Running):
    """`nextword serve MODEL`."""

    def __init__(self, model: Path, *arguments: str):
        KEPT.mkdir(parents=True, exist_ok=True)
        self.directory = resolve_model_dir(model).resolve()
        command = [sys.executable, "-m", "nextword", "serve", str(model), "--port", "0", "--json", *arguments]
        super().__init__(command, 0)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"it did not start; see {self.log.name}")
        self.metadata = json.loads(line)
        self.url = self.metadata["url"]
        self.port = int(self.url.rpartition(":")[2])

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            pairs = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def memory(self) -> int:
        """Bytes that it has in memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


# ---------------------------------------------------------------- a client


@dataclass
class Seen:
    """What a client saw of a streamed text: when it asked, when each part came (seconds), why it ended."""

    asked: float
    status: int = 0
    text: str = ""
    came: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def first(self) -> float:
        return self.came[0] - self.asked

    @property
    def between(self) -> list[float]:
        return [b - a for a, b in zip(self.came, self.came[1:], strict=False)]


async def send(port: int, body: Body, room: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a streamed completion; the connection then keeps so many bytes that are not read."""
    made = socket.socket()
    if room is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=made, limit=2**20 if room is None else room)
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


async def status_of(reader: asyncio.StreamReader) -> int:
    """The answer's status; its headers have been read then."""
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1])


async def events(reader: asyncio.StreamReader) -> AsyncGenerator[Body]:
    """The objects of a stream that comes in HTTP's chunks."""
    held = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        held += (await reader.readexactly(size + 2))[:-2]
        *whole, held = held.replace(b"\r\n", b"\n").split(b"\n\n")
        for one in whole:
            if one.startswith(b"data: ") and one != b"data: [DONE]":
                yield json.loads(one.removeprefix(b"data: "))


async def talk(port: int, body: Body, leave_after: int | None = None) -> Seen:
    """One request to its end, or until so many parts have come."""
    seen = Seen(time.monotonic())
    reader, writer = await send(port, body)
    try:
        seen.status = await status_of(reader)
        if seen.status != 200:
            return seen
        async for event in events(reader):
            if "error" in event:
                seen.status = 500
                return seen
            for choice in event.get("choices", ()):
                if choice.get("text"):
                    seen.came.append(time.monotonic())
                    seen.text += choice["text"]
                seen.finish_reason = choice.get("finish_reason") or seen.finish_reason
            if leave_after is not None and len(seen.came) >= leave_after:
                return seen
        return seen
    finally:
        writer.close()
