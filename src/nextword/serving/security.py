"""Access control, request limits and security headers: everything that is checked before a request is parsed.

Any web page can make a browser send requests to this machine. The Host header must therefore name this server, which
prevents DNS rebinding, and so must the Origin header of cross-site requests.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nextword.serving.protocol import MAX_BODY_BYTES, MAX_TOTAL_BODY_BYTES, APIError, error_response

MAX_HEADERS, MAX_HEADER_BYTES = 100, 2**14
MAX_PATH_BYTES = 2**13  # path and query
BODY_TIMEOUT = 60.0  # seconds for receiving a body
SMALL_BODY_BYTES = 2**16  # bodies up to this size are accepted regardless of MAX_TOTAL_BODY_BYTES
# The rest of a rejected body is read and discarded, because many clients read the response only after sending everything.
MAX_DISCARD_BYTES, DISCARD_TIMEOUT = 2**30, 10.0
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
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

# Called with the route, the status code and the duration in seconds.
RequestObserver = Callable[[str, int, float], None]


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class AccessPolicy:
    """Conditions for accepting a request.

    Attributes:
        allowed_hosts: Host names of the server besides the loopback names. "*" allows any.
        api_key: Key that clients send as `Authorization: Bearer KEY`. None accepts requests without a key.
        public_paths: Paths that need no key.
        binds_all_addresses: The server listens on all addresses of the machine, so each of them is a valid host name.
    """

    allowed_hosts: frozenset[str] = frozenset()
    api_key: str | None = None
    public_paths: Collection[str] = ()
    binds_all_addresses: bool = False

    def check(self, scope: Scope) -> None:
        """Raises `APIError` if a request is not accepted. Only reads the headers."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise APIError(431, f"too many headers: at most {MAX_HEADERS} with {MAX_HEADER_BYTES:,} bytes in total")
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_PATH_BYTES:
            raise APIError(414, f"path and query are too long: at most {MAX_PATH_BYTES:,} bytes")
        self._check_host(scope)
        if self.api_key is not None and scope["path"] not in self.public_paths:
            self._check_api_key(scope)

    def _check_host(self, scope: Scope) -> None:
        host_headers = header_values(scope, b"host")
        match = HOST_PATTERN.fullmatch(host_headers[0].lower()) if len(host_headers) == 1 else None
        if match is None:
            raise APIError(400, "exactly one Host header is required")
        name = match[1].rstrip(".")
        allowed_names = self.allowed_hosts | LOOPBACK_HOSTS
        if self.binds_all_addresses and scope.get("server"):
            address = scope["server"][0]
            allowed_names |= {f"[{address}]" if ":" in address else address}
        if "*" not in allowed_names and name not in allowed_names:
            message = f"host {name[:100]!r} is not allowed: add it with --allowed-host"
            raise APIError(403, message, code="host_not_allowed")
        # Browsers send the Origin of cross-site requests that are not plain reads.
        for origin in header_values(scope, b"origin"):
            if origin.lower().partition("://")[2] != host_headers[0].lower():
                raise APIError(403, "cross-origin requests are not allowed", code="origin_not_allowed")

    def _check_api_key(self, scope: Scope) -> None:
        auth_headers = header_values(scope, b"authorization")
        scheme, _, key = auth_headers[0].partition(" ") if len(auth_headers) == 1 else ("", "", "")
        # Comparing hashes of equal length does not leak the length of the key through timing.
        hashes = [hashlib.sha256(value.encode()).digest() for value in (key.strip(), self.api_key or "")]
        if not (hmac.compare_digest(*hashes) and scheme.lower() == "bearer"):
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(
                401,
                "missing or invalid API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=headers,
            )


class SecurityMiddleware:
    """Outermost ASGI middleware: access policy, body limits, security headers and request metrics."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy, observer: RequestObserver):
        self.app, self.policy, self.observer = app, policy, observer
        self.buffered_body_bytes = 0  # of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start_time, status, body = time.monotonic(), 0, None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
            await send(message)

        try:
            try:
                try:
                    self.policy.check(scope)
                except APIError:
                    await discard_body(scope, receive)
                    raise
                body = await self.read_body(scope, receive)
            except APIError as error:
                error.headers["Connection"] = "close"
                await error_response(error)(scope, receive, send_with_headers)
                return
            if body is not None:
                await self.app(scope, replay_receive(body, receive), send_with_headers)
        finally:
            self.buffered_body_bytes -= len(body or b"")
            route = getattr(scope.get("route"), "path", "other")
            if status:
                self.observer(route, status, time.monotonic() - start_time)

    async def read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Read the whole body and count it in `buffered_body_bytes`. None if the client disconnects.

        Raises:
            APIError: The body is too large or arrives too slowly, or too many large bodies are buffered.
        """
        too_large = APIError(413, f"the body is too large: at most {MAX_BODY_BYTES:,} bytes", code="body_too_large")
        if any(
            length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES
            for length in header_values(scope, b"content-length")
        ):
            await discard_body(scope, receive)
            raise too_large
        body, more, complete = bytearray(), True, False

        def fits() -> bool:
            return len(body) <= MAX_BODY_BYTES and (
                len(body) <= SMALL_BODY_BYTES or self.buffered_body_bytes <= MAX_TOTAL_BODY_BYTES
            )

        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                while more and fits():
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    body += chunk
                    self.buffered_body_bytes += len(chunk)
                    more = message.get("more_body", False)
            complete = not more and fits()
        except TimeoutError as error:
            raise APIError(408, f"the body was not received within {BODY_TIMEOUT:.0f} s") from error
        finally:
            if not complete:
                self.buffered_body_bytes -= len(body)
        if complete:
            return bytes(body)
        if more:
            await discard_body(scope, receive)
        if len(body) > MAX_BODY_BYTES:
            raise too_large
        raise APIError(429, "too many large requests: try again later", headers={"Retry-After": "1"})


def header_values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def discard_body(scope: Scope, receive: Receive) -> None:
    """Read and discard the rest of a body within limits; nothing if the client waits for 100 Continue."""
    if "100-continue" in [value.lower() for value in header_values(scope, b"expect")]:
        return
    size = 0
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT):
            while size < MAX_DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def replay_receive(body: bytes, receive: Receive) -> Receive:
    """An ASGI receive callable that returns the body once, then the messages of the connection."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
