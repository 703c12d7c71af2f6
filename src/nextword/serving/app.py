"""The server: where it listens, how it begins, and how it ends.

    serve_model(Settings(Path("runs/mine")), Place(port=8000), Console())

It listens at once and answers 503 until the model is loaded. SIGTERM or Ctrl-C lets nobody in any more, waits for the texts
that are being written, and ends; a second one ends at once.
"""

import asyncio
import contextlib
import ipaddress
import mimetypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from nextword import __version__
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.serving.engine_worker import Left
from nextword.serving.protocol import JSON, Refusal, refusal_of, refused, to_bytes
from nextword.serving.routes import router
from nextword.serving.security import Guard, Rules, is_loopback
from nextword.serving.service import Service, Settings

PAGE = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MAX_CONNECTIONS = 512
SEND_BUFFER = 2**17  # bytes that the system keeps for a client that does not read; left to itself, some megabytes
HEADER_SECONDS = 10.0  # for sending a request's headers
CLOSING_SECONDS = 5  # for clients to read the end of their answers, after the texts have been written

Ready = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """Where the server listens, and to whom.

    Attributes:
        port: 0 takes a free one.
        key: what clients have to send; needed where others than this machine can connect, unless `insecure`.
        hosts: names that the server goes by, beside those of the loopback and its address.
        grace: seconds that texts are given to be finished when the server is to end.

    Raises:
        UsageError: anybody could connect, or there is no such port.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    insecure: bool = False
    hosts: tuple[str, ...] = ()
    grace: float = 30.0

    def __post_init__(self) -> None:
        if self.key is not None and (len(self.key) < 1 or self.key != self.key.strip() or not self.key.isascii()):
            raise UsageError("an API key is ASCII text that is not empty, without spaces around it")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be between 0 and 65535, not {self.port}")
        if not (is_loopback(self.host) or self.key or self.insecure):
            raise UsageError(
                f"--host {self.host} lets other machines connect: give an --api-key that they have to know (or set "
                "NEXTWORD_API_KEY), or say --insecure to let everybody in"
            )

    def rules(self) -> Rules:
        bare = self.host.strip("[]").lower()
        named = f"[{bare}]" if ":" in bare else bare
        try:
            any_address = ipaddress.ip_address(bare).is_unspecified
        except ValueError:
            any_address = False
        return Rules(frozenset({named, *map(str.lower, self.hosts)}), self.key, {"/health", *pages()}, any_address)

    def listen(self) -> socket.socket:
        """A socket at the place. Raises `NextwordError` where that cannot be had."""
        host = self.host.strip("[]")
        try:
            found = socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
            made = socket.socket(family, kind, protocol)
            if os.name != "nt":  # there it would share the port with another program
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections take it over
            made.bind(address)
            made.listen()
        except OSError as error:
            raise NextwordError(
                f"cannot listen at {self.host}, port {self.port}: {error.strerror or error}. Another --port may be free"
            ) from error
        return made


def pages() -> dict[str, tuple[bytes, str]]:
    """The page's files by their paths, with their types; "/" is index.html."""
    files = {f"/{file.name}": file for file in sorted(PAGE.glob("*")) if file.is_file()}
    if "/index.html" in files:
        files["/"] = files["/index.html"]
    types = {path: TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] for path, file in files.items()}
    return {path: (file.read_bytes(), types[path] or "application/octet-stream") for path, file in files.items()}


# ---------------------------------------------------------------- the application


def application(service: Service, rules: Rules) -> Guard:
    """Everything that answers, behind its guard."""
    # The pages that FastAPI makes of its own load scripts from elsewhere.
    app = FastAPI(title="nextword", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    for path, (content, kind) in pages().items():
        app.add_api_route(path, _file(content, kind), methods=["GET", "HEAD"], include_in_schema=False)

    async def refuse(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        return refused(refusal)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refused(refusal_of(error.errors()))

    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: f"there is no {request.url.path[:200]} here", 405: f"{request.method} is not for this path"}
        return refused(
            Refusal(error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers)
        )

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; for the metrics

    async def failed(request: Request, error: Exception) -> Response:
        return refused(Refusal(500, f"the server failed at this request ({type(error).__name__})"))

    for kind, handler in (
        (Refusal, refuse), (RequestValidationError, invalid), (HTTPException, other), (Left, left), (Exception, failed),
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)

    def observe(route: str, status: int, seconds: float) -> None:
        service.metrics.requests.add(1, route, str(status))
        service.metrics.request_seconds.see(seconds)

    return Guard(app, rules, observe)


def _file(content: bytes, kind: str) -> Callable[[], Any]:
    async def give() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return give


class Connection(H11Protocol):
    """uvicorn's connection, of which there are only so many, which does not wait for headers for ever, and which says in our
    form what is no HTTP."""

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.late is not None:
            self.late.cancel()

    def _expect_headers(self) -> None:
        """Close the connection if headers have begun, or never do, and are not whole in time."""
        expected = self.conn.their_state is h11.IDLE
        if expected and self.late is None:
            self.late = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not expected and self.late is not None:
            self.late.cancel()
            self.late = None

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = getattr(sys.exc_info()[1], "error_status_hint", 400)  # h11 knows headers that are too large
            said = "the headers are too large" if status == 431 else "this is no HTTP request"
            body = to_bytes(Refusal(status, said).body)
            headers = {"Content-Type": JSON.media_type, "Content-Length": str(len(body)), "Connection": "close"}
            head = h11.Response(status_code=status, headers=list(headers.items()), reason=HTTPStatus(status).phrase)
            answer = [self.conn.send(event) for event in (head, h11.Data(data=body), h11.EndOfMessage())]
            self.transport.write(b"".join(data for data in answer if data))
        self.transport.close()


# ---------------------------------------------------------------- from beginning to end


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `signals` has its own way


def serve_model(settings: Settings, place: Place, console: Console, ready: Ready | None = None) -> None:
    """Serve a model until a signal comes.

    Args:
        ready: is told where and what is served, when requests are let in.

    Raises:
        NextwordError: the model cannot be opened, or the place cannot be had.
    """
    service = Service(settings, console)
    with contextlib.closing(place.listen()) as listening:
        asyncio.run(run(service, place, configured(service, place), listening, console, ready))


def configured(service: Service, place: Place) -> Server:
    """uvicorn with our own connections, signals and words."""
    return Server(
        uvicorn.Config(
            application(service, place.rules()), http=Connection, ws="none", lifespan="off", log_config=None,
            log_level="error", access_log=False, proxy_headers=False, server_header=False,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
    )  # fmt: skip


async def run(
    service: Service, place: Place, server: Server, listening: socket.socket, console: Console, ready: Ready | None
) -> None:
    """Load, let in, and when it is time let everything come to its end."""
    worker, stop = service.worker, asyncio.Event()
    with signals(asyncio.get_running_loop(), stop):
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        worker.start()
        waits = [asyncio.create_task(wait()) for wait in (stop.wait, worker.ended.wait, worker.loaded.wait)]
        try:
            await asyncio.wait([serving, *waits], return_when=asyncio.FIRST_COMPLETED)
            if worker.state == "ready":
                facts = announce(service, place, listening, console)
                if ready is not None:
                    ready(facts)
                await asyncio.wait([serving, *waits[:2]], return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                console.say(
                    f"stopping: {len(worker.tickets)} answers are finished first, for {place.grace:.0f} s at most"
                )
            await worker.drain(place.grace)
        finally:
            for wait in waits:
                wait.cancel()
            server.should_exit = True
            await serving
            await worker.stop()
            await service.close()
    if isinstance(worker.error, NextwordError):
        raise worker.error
    if worker.error is not None:
        raise NextwordError(f"the engine has stopped: {worker.error!r}") from worker.error


def announce(service: Service, place: Place, listening: socket.socket, console: Console) -> dict[str, Any]:
    """Say where and what is served; the same as facts."""
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    slots, queue = service.worker.slots, service.settings.queue
    console.say(f"{service.name}: {url}", style="bold")
    console.say(
        f"{slots} texts at once, {queue} more wait · {service.context_length:,} tokens of context · "
        f"{service.cache_bytes / 2**20:,.1f} MiB for keys and values · chat template: {service.chat.name}"
    )
    if not is_loopback(place.host):
        console.warn(
            f"other machines can connect to {place.host}"
            + (", with the API key" if place.key else ", and everybody is let in (--insecure)")
            + ". What is said goes over the network unencrypted: put a proxy with TLS before it"
        )
    return {
        "url": url, "model": service.name, "slots": slots, "queue": queue, "context_length": service.context_length,
        "key_value_bytes": service.cache_bytes, "chat_template": service.chat.name,
    }  # fmt: skip


@contextlib.contextmanager
def signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Iterator[None]:
    """While this is open, the first Ctrl-C or SIGTERM sets `stop`; a second one leaves at once."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody set handlers
        yield
        return
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
