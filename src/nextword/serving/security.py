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

from nextword.serving.protocol import MAX_BODIES, MAX_BODY, Refusal, refused

MAX_HEADERS, MAX_HEADER_BYTES = 100, 2**14
MAX_PATH = 2**13  # bytes of path and query
BODY_SECONDS = 60.0  # for sending it
SMALL = 2**16  # bytes of a body that is taken however many others there are
# What is refused for its size is read to its end and thrown away, since many clients read an answer only after that; so far:
DISCARDED, DISCARD_SECONDS = 2**30, 10.0
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::[0-9]{1,5})?")

# A route, the status that was answered, and the seconds that it took.
Observe = Callable[[str, int, float], None]


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class Rules:
    """Who is let in.

    Attributes:
        hosts: the names that the server goes by, beside those of the loopback; "*" allows any.
        key: what is to be sent as `Authorization: Bearer KEY`; None lets everybody in.
        open: the paths that need no key.
        any_address: the server listens on all of the machine's addresses, so each of them is a name of it.
    """

    hosts: frozenset[str] = frozenset()
    key: str | None = None
    open: Collection[str] = ()
    any_address: bool = False

    def check(self, scope: Scope) -> None:
        """Raises `Refusal` for a request that is not let in. Nothing of its body has been read."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise Refusal(431, f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES:,} bytes together")
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_PATH:
            raise Refusal(414, f"at most {MAX_PATH:,} bytes of path and query")
        self._check_host(scope)
        if self.key is not None and scope["path"] not in self.open:
            self._check_key(scope)

    def _check_host(self, scope: Scope) -> None:
        given = values(scope, b"host")
        match = HOST.fullmatch(given[0].lower()) if len(given) == 1 else None
        if match is None:
            raise Refusal(400, "a request needs one Host header")
        name = match[1].rstrip(".")
        known = self.hosts | LOOPBACK
        if self.any_address and scope.get("server"):
            address = scope["server"][0]
            known |= {f"[{address}]" if ":" in address else address}
        if "*" not in known and name not in known:
            message = f"this server does not go by the name {name[:100]!r}: allow it by --allowed-host"
            raise Refusal(403, message, code="host_not_allowed")
        # Browsers say which page sends a request, unless it only reads; a page of another place has no business here.
        for origin in values(scope, b"origin"):
            if origin.lower().partition("://")[2] != given[0].lower():
                raise Refusal(403, "requests of other pages are refused", code="origin_not_allowed")

    def _check_key(self, scope: Scope) -> None:
        given = values(scope, b"authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # Hashes have one length, so that the time tells nothing of the key's.
        hashes = [hashlib.sha256(one.encode()).digest() for one in (key.strip(), self.key or "")]
        if not (hmac.compare_digest(*hashes) and scheme.lower() == "bearer"):
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refusal(
                401, "no valid API key: send it as Authorization: Bearer KEY", code="invalid_api_key", headers=headers
            )


class Guard:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, rules: Rules, observe: Observe):
        self.app, self.rules, self.observe = app, rules, observe
        self.held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, body = time.monotonic(), 0, None

        async def put(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            try:
                try:
                    self.rules.check(scope)
                except Refusal:
                    await discard(scope, receive)
                    raise
                body = await self.read_body(scope, receive)
            except Refusal as refusal:
                refusal.headers["Connection"] = "close"
                await refused(refusal)(scope, receive, put)
                return
            if body is not None:
                await self.app(scope, replaying(body, receive), put)
        finally:
            self.held -= len(body or b"")
            route = getattr(scope.get("route"), "path", "other")
            if status:
                self.observe(route, status, time.monotonic() - began)

    async def read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, which then counts as held; None where the client leaves before its end.

        Raises:
            Refusal: it is too large, or comes too slowly, or there are too many large ones at once.
        """
        too_large = Refusal(413, f"a body has at most {MAX_BODY:,} bytes", code="body_too_large")
        if any(length.isdecimal() and int(length[:20]) > MAX_BODY for length in values(scope, b"content-length")):
            await discard(scope, receive)
            raise too_large
        body, more, whole = bytearray(), True, False

        def fits() -> bool:
            return len(body) <= MAX_BODY and (len(body) <= SMALL or self.held <= MAX_BODIES)

        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more and fits():
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    body += piece
                    self.held += len(piece)
                    more = message.get("more_body", False)
            whole = not more and fits()
        except TimeoutError as error:
            raise Refusal(408, f"the body did not come within {BODY_SECONDS:.0f} s") from error
        finally:
            if not whole:
                self.held -= len(body)
        if whole:
            return bytes(body)
        if more:
            await discard(scope, receive)
        if len(body) > MAX_BODY:
            raise too_large
        raise Refusal(429, "too many large requests at once: try again later", headers={"Retry-After": "1"})


def values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def discard(scope: Scope, receive: Receive) -> None:
    """Read what the client still sends, to its end or as far as one is willing to; nothing of one that waits to be told."""
    if "100-continue" in [value.lower() for value in values(scope, b"expect")]:
        return
    size = 0
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while size < DISCARDED:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def replaying(body: bytes, receive: Receive) -> Receive:
    """What gives the body once, and after that what the connection says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
