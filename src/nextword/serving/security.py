"""Access control, request limits and security headers: everything that is checked before a request is parsed.

Any web page can make a browser send requests to this machine. The Host header must therefore name this server, which
prevents DNS rebinding, and so must the Origin header of cross-site requests.
"""

import asyncio
import contextlib
import errno
import hashlib
import hmac
import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nextword.common.errors import NextwordError, UsageError
from nextword.serving.config import ServerConfig
from nextword.serving.engine_worker import Metrics
from nextword.serving.protocol import MAX_BODY_BYTES, MAX_TOTAL_BODY_BYTES, APIError, ClientDisconnected

MAX_HEADERS, MAX_HEADER_BYTES = 100, 2**14
MAX_PROBE_HEADERS = 20
MAX_PATH_BYTES = 2**13  # path and query
SEND_BUFFER_BYTES = 2**17  # per connection; the operating system's default of several MB hides clients that do not read
CONNECTION_QUEUE = 1024  # connections that wait to be accepted
BODY_TIMEOUT = 60.0  # seconds for receiving a body
SMALL_BODY_BYTES = 2**16  # bodies up to this size are accepted regardless of MAX_TOTAL_BODY_BYTES
# The rest of a rejected body is read and discarded, because many clients read the response only after sending everything.
MAX_DISCARD_BYTES, DISCARD_TIMEOUT = 2**25, 10.0
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
SECURITY_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
HOST_PATTERN = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::[0-9]{1,5})?")


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is given by, if it is."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    address = parse_address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


class ListenSocket(socket.socket):
    """A listening socket that makes room when the process has no file descriptor left for a connection.

    asyncio would report each attempt, many thousand times a second.
    """

    make_room: Callable[[], None] | None = None

    def listen(self, backlog: int = 0) -> None:
        """Listen with a queue for many clients at once: beyond it, a client waits a second for its next attempt."""
        super().listen(max(backlog, CONNECTION_QUEUE))

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Raises `BlockingIOError` if there is none, or no room yet."""
        try:
            return super().accept()
        except OSError as error:
            if self.make_room is None or error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self.make_room()
            raise BlockingIOError from error


def listen(config: ServerConfig) -> ListenSocket:
    """A listening socket.

    Raises:
        UsageError: Other machines could connect without a key, or the key cannot be sent in a header.
        NextwordError: The address is not available.
    """
    key, host = config.api_key, config.host.strip("[]")
    if key is not None and not (key and key == key.strip() and key.isascii()):
        raise UsageError("an API key is ASCII text, not empty, without spaces at its ends")
    if not (is_loopback(config.host) or key or config.insecure):
        remedy = "set --api-key (or NEXTWORD_API_KEY), or --insecure to accept everyone"
        raise UsageError(f"--host {config.host} lets other machines connect: {remedy}")
    try:
        addresses = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(addresses, key=lambda info: info[0] != socket.AF_INET)
        listen_socket = ListenSocket(family, kind, protocol)
        if os.name != "nt":  # Windows would share the port with another program
            listen_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listen_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # inherited by connections
        listen_socket.bind(address)
        listen_socket.listen()
    except OSError as error:
        raise NextwordError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror or error}. Try another --port"
        ) from error
    return listen_socket


class SecurityMiddleware:
    """Outermost ASGI middleware: access policy, body limits, security headers and request metrics."""

    def __init__(self, app: ASGIApp, config: ServerConfig, public_paths: Collection[str], metrics: Metrics):
        self.app, self.config, self.public_paths, self.metrics = app, config, public_paths, metrics
        self.buffered_body_bytes = 0  # of all requests
        self.turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, read its body, and let the application answer it."""
        start_time, status, body = time.monotonic(), 0, b""

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
            await send(message)

        async def receive_in_turn() -> Message:
            await self.take_turn()
            return await receive()

        try:
            if not is_probe(scope):
                await self.take_turn()
            scope["state"]["read_body"]()
            body = await self.read_body(scope, receive if is_probe(scope) else receive_in_turn)
            messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay_body() -> Message:
                return messages.pop() if messages else await receive()

            scope["state"]["accepted"] = scope["path"] not in self.public_paths
            if scope["method"] == "HEAD":  # as GET; uvicorn leaves out the body
                scope = {**scope, "method": "GET"}
            await self.app(scope, replay_body, send_with_headers)
        except ClientDisconnected:
            return
        except APIError as error:
            error.headers["Connection"] = "close"
            await error.response()(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # at shutdown, after the time that clients have to send and to read
            if status:
                scope["state"]["abandon"]()
            else:
                error = APIError(503, "the server has stopped", code="stopped", headers={"Connection": "close"})
                await error.response()(scope, receive, send_with_headers)
        finally:
            self.buffered_body_bytes -= len(body)
            if status:
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, str(status)).inc()
                self.metrics.request_seconds.observe(time.monotonic() - start_time)

    async def take_turn(self) -> None:
        """Wait until no other request begins, or reads a part of its body, in this turn of the event loop.

        However many clients send at once, other requests are answered between two of theirs.
        """
        async with self.turn:
            await asyncio.sleep(0)

    async def read_body(self, scope: Scope, receive: Receive) -> bytes:
        """Check the headers, read the whole body, and count it in `buffered_body_bytes`.

        Raises:
            APIError: The headers are not accepted, the body is too large or arrives too slowly, or too many large bodies are
                buffered.
            ClientDisconnected: The client closed the connection.
        """
        body, more = bytearray(), True
        try:
            self.check(scope)
            async with asyncio.timeout(BODY_TIMEOUT):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    chunk = message.get("body", b"")
                    body += chunk
                    self.buffered_body_bytes += len(chunk)
                    more = message.get("more_body", False)
                    if len(body) > MAX_BODY_BYTES:
                        raise body_too_large()
                    if len(body) > SMALL_BODY_BYTES and self.buffered_body_bytes > MAX_TOTAL_BODY_BYTES:
                        raise APIError(429, "too many large requests: try again later", headers={"Retry-After": "1"})
            return bytes(body)
        except BaseException as error:
            self.buffered_body_bytes -= len(body)
            if isinstance(error, TimeoutError):
                raise APIError(408, f"the body was not received within {BODY_TIMEOUT:.0f} s") from error
            if isinstance(error, APIError) and more:
                await discard_body(scope, receive)
            raise

    def check(self, scope: Scope) -> None:
        """Raises `APIError` if a request is not accepted, by its headers."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise APIError(431, f"too many headers: at most {MAX_HEADERS} with {MAX_HEADER_BYTES:,} bytes in total")
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_PATH_BYTES:
            raise APIError(414, f"path and query are too long: at most {MAX_PATH_BYTES:,} bytes")
        self._check_host(scope)
        if self.config.api_key is not None and scope["path"] not in self.public_paths:
            check_api_key(scope, self.config.api_key)
        if encodings := {value.lower() for value in header_values(scope, b"content-encoding")} - {"identity"}:
            message = f"Content-Encoding {min(encodings)[:50]!r} is not supported: send the body as it is"
            raise APIError(415, message, code="unsupported_content_encoding")
        lengths = header_values(scope, b"content-length")
        if any(length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES for length in lengths):
            raise body_too_large()

    def _check_host(self, scope: Scope) -> None:
        host = self.config.host.strip("[]")
        hosts = [value.lower() for value in header_values(scope, b"host")]
        match = HOST_PATTERN.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise APIError(400, "exactly one Host header is required")
        name, address = match[1].rstrip("."), parse_address(host)
        allowed_names = {*LOOPBACK_HOSTS, bracketed(host).lower(), *map(str.lower, self.config.allowed_hosts)}
        if address is not None and address.is_unspecified and scope.get("server"):  # all addresses of the machine
            allowed_names.add(bracketed(scope["server"][0]))
        if "*" not in allowed_names and name not in allowed_names:
            message = f"host {name[:100]!r} is not allowed: add it with --allowed-host"
            raise APIError(403, message, code="host_not_allowed")
        # Browsers send the Origin of cross-site requests that are not plain reads.
        for origin in header_values(scope, b"origin"):
            if origin.lower().partition("://")[2] != hosts[0]:
                raise APIError(403, "cross-origin requests are not allowed", code="origin_not_allowed")


def is_probe(scope: Scope) -> bool:
    """Whether a request is the first of its connection and asks for /health, without much else: it is answered at once."""
    names = [name for name, _ in scope["headers"]]
    has_body = b"content-length" in names or b"transfer-encoding" in names
    is_small = len(names) <= MAX_PROBE_HEADERS and not has_body
    return scope["path"] == "/health" and scope["state"]["is_first"] and is_small


def check_api_key(scope: Scope, api_key: str) -> None:
    """Raises `APIError` unless a request has the key."""
    credentials = header_values(scope, b"authorization")
    scheme, _, key = credentials[0].partition(" ") if len(credentials) == 1 else ("", "", "")
    # Comparing hashes of equal length does not leak the length of the key through timing.
    hashes = [hashlib.sha256(value.encode()).digest() for value in (key.strip(), api_key)]
    if not (hmac.compare_digest(*hashes) and scheme.lower() == "bearer"):
        message = "missing or invalid API key: send it as Authorization: Bearer KEY"
        raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def body_too_large() -> APIError:
    """The error (413) of a body that exceeds the limit."""
    return APIError(413, f"the body is too large: at most {MAX_BODY_BYTES:,} bytes", code="body_too_large")


def bracketed(host: str) -> str:
    """A host name or address as in a URL, with IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def header_values(scope: Scope, name: bytes) -> list[str]:
    """The values of all headers with this lower-case name."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def discard_body(scope: Scope, receive: Receive) -> None:
    """Read and discard the rest of a body within limits; nothing if the client waits for 100 Continue."""
    if "100-continue" in [value.lower() for value in header_values(scope, b"expect")]:
        return
    size, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_TIMEOUT):
            while more and size < MAX_DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)  # False if the client disconnects
