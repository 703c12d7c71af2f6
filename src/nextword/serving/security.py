"""Who is let in, and with how much: everything that is checked before a request is looked at, and the headers of every answer.

A page somewhere in the web can make a browser send requests to this machine. So the name that a request was sent to must be
one of this server's (a name can be made to point here: DNS rebinding), and so must the page that sends it.
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
MAX_PATH_BYTES = 2**13  # bytes of path and query
BODY_TIMEOUT = 60.0  # for sending it
SMALL_BODY_BYTES = 2**16  # bytes of a body that is taken however many others there are
# What is refused for its size is read to its end and thrown away, since many clients read an answer only after that; so far:
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

# A route, the status that was answered, and the seconds that it took.
RequestObserver = Callable[[str, int, float], None]


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class AccessPolicy:
    """Who is let in.

    Attributes:
        hosts: the names that the server goes by, beside those of the loopback; "*" allows any.
        key: what is to be sent as `Authorization: Bearer KEY`; None lets everybody in.
        open: the paths that need no key.
        any_address: the server listens on all of the machine's addresses, so each of them is a name of it.
    """

    allowed_hosts: frozenset[str] = frozenset()
    api_key: str | None = None
    public_paths: Collection[str] = ()
    binds_all_addresses: bool = False

    def check(self, scope: Scope) -> None:
        """Raises `Refusal` for a request that is not let in. Nothing of its body has been read."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise APIError(431, f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES:,} bytes together")
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_PATH_BYTES:
            raise APIError(414, f"at most {MAX_PATH_BYTES:,} bytes of path and query")
        self._check_host(scope)
        if self.api_key is not None and scope["path"] not in self.public_paths:
            self._check_api_key(scope)

    def _check_host(self, scope: Scope) -> None:
        host_headers = header_values(scope, b"host")
        match = HOST_PATTERN.fullmatch(host_headers[0].lower()) if len(host_headers) == 1 else None
        if match is None:
            raise APIError(400, "a request needs one Host header")
        name = match[1].rstrip(".")
        allowed_names = self.allowed_hosts | LOOPBACK_HOSTS
        if self.binds_all_addresses and scope.get("server"):
            address = scope["server"][0]
            allowed_names |= {f"[{address}]" if ":" in address else address}
        if "*" not in allowed_names and name not in allowed_names:
            message = f"this server does not go by the name {name[:100]!r}: allow it by --allowed-host"
            raise APIError(403, message, code="host_not_allowed")
        # Browsers say which page sends a request, unless it only reads; a page of another place has no business here.
        for origin in header_values(scope, b"origin"):
            if origin.lower().partition("://")[2] != host_headers[0].lower():
                raise APIError(403, "requests of other pages are refused", code="origin_not_allowed")

    def _check_api_key(self, scope: Scope) -> None:
        auth_headers = header_values(scope, b"authorization")
        scheme, _, key = auth_headers[0].partition(" ") if len(auth_headers) == 1 else ("", "", "")
        # Hashes have one length, so that the time tells nothing of the key's.
        hashes = [hashlib.sha256(one.encode()).digest() for one in (key.strip(), self.api_key or "")]
        if not (hmac.compare_digest(*hashes) and scheme.lower() == "bearer"):
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(
                401, "no valid API key: send it as Authorization: Bearer KEY", code="invalid_api_key", headers=headers
            )


class SecurityMiddleware:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy, observer: RequestObserver):
        self.app, self.policy, self.observer = app, policy, observer
        self.buffered_body_bytes = 0  # bytes of bodies

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
            except APIError as refusal:
                refusal.headers["Connection"] = "close"
                await error_response(refusal)(scope, receive, send_with_headers)
                return
            if body is not None:
                await self.app(scope, replay_receive(body, receive), send_with_headers)
        finally:
            self.buffered_body_bytes -= len(body or b"")
            route = getattr(scope.get("route"), "path", "other")
            if status:
                self.observer(route, status, time.monotonic() - start_time)

    async def read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, which then counts as held; None where the client leaves before its end.

        Raises:
            Refusal: it is too large, or comes too slowly, or there are too many large ones at once.
        """
        too_large = APIError(413, f"a body has at most {MAX_BODY_BYTES:,} bytes", code="body_too_large")
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
                    piece = message.get("body", b"")
                    body += piece
                    self.buffered_body_bytes += len(piece)
                    more = message.get("more_body", False)
            complete = not more and fits()
        except TimeoutError as error:
            raise APIError(408, f"the body did not come within {BODY_TIMEOUT:.0f} s") from error
        finally:
            if not complete:
                self.buffered_body_bytes -= len(body)
        if complete:
            return bytes(body)
        if more:
            await discard_body(scope, receive)
        if len(body) > MAX_BODY_BYTES:
            raise too_large
        raise APIError(429, "too many large requests at once: try again later", headers={"Retry-After": "1"})


def header_values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def discard_body(scope: Scope, receive: Receive) -> None:
    """Read what the client still sends, to its end or as far as one is willing to; nothing of one that waits to be told."""
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
    """What gives the body once, and after that what the connection says."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
