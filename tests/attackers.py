"""Clients without a key that attack a server, as a process: python attackers.py HOST PORT NAME reads|ignores SECONDS."""

import asyncio
import contextlib
import json
import socket
import sys
import time
from typing import Any

CLIENTS = 512
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PIPELINED = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20


def request(body: Any) -> bytes:
    """A POST request, ready to be sent."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(data), data)


def with_content(content: Any, count: int = 1) -> bytes:
    """A conversation of messages with this content."""
    return request({"messages": [{"role": "user", "content": content}] * count})


# What each client sends once, and what it repeats for as long as the server lets it.
ATTACKS: dict[str, tuple[bytes, bytes]] = {
    "silence": (b"", b""),
    "half a header": (b"GET / HTTP/1.1\r\nX: ", b""),
    "a slow header": (b"GET / HTTP/1.1\r\nX: ", b"y"),
    "pipelined files": (b"", PIPELINED),
    "half a body": (HEAD + b"Content-Length: 4000000\r\n\r\n", b""),
    "slow bodies": (HEAD + b"Content-Length: 4000000\r\n\r\n", b" "),
    "bodies": (HEAD + b"Content-Length: 4000000\r\n\r\n", b"[1]," * 4096),
    "one-byte chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n" * 1000),
    "small chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"40\r\n%b\r\n" % (b" " * 64) * 1000),
    "wrong requests": (b"", b"\x00\r\n\r\n"),
    "wrong keys": (b"", HEAD + b"Authorization: Bearer x\r\nContent-Length: 0\r\n\r\n"),
    "large headers": (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: %b\r\n" % (b"x" * 100) * 90 + b"\r\n"),
    "health": (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "giant JSON": (b"", request(b"[" + b"{}," * 999_999 + b"{}]")),
    "empty message parts": (b"", with_content([{}] * 1000, 900)),
    "spaces": (b"", with_content(" " * 200_000 + "x", 10)),
}


async def attack(address: tuple[str, int], first: bytes, again: bytes, reads: bool, until: float) -> None:
    """One client: it connects anew whenever the server closes its connection."""
    while (left := until - time.monotonic()) > 0:
        writer = None
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(left):
                reader, writer = await asyncio.open_connection(*address, limit=2**14)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
                writer.write(first)
                while again:
                    writer.write(again)
                    await writer.drain()
                    if reads:
                        await reader.read(2**14)
                    elif len(again) < 10:  # a slow sender
                        await asyncio.sleep(0.1)
                await reader.read()
        if writer is not None:
            writer.transport.abort()
        await asyncio.sleep(0.01)


async def attack_all(address: tuple[str, int], name: str, reads: bool, seconds: float) -> None:
    """All clients at once."""
    until = time.monotonic() + seconds
    await asyncio.gather(*(attack(address, *ATTACKS[name], reads, until) for _ in range(CLIENTS)))


if __name__ == "__main__":
    host, port, name, reads, seconds = sys.argv[1:]
    asyncio.run(attack_all((host, int(port)), name, reads == "reads", float(seconds)))
