"""The HTTP server: application, listening socket, startup and shutdown.

    serve_model(ServerConfig("runs/mine", port=8000), Console())

It listens at once and answers 503 until the model is loaded. After SIGTERM or Ctrl-C it rejects new requests, finishes the
running ones and stops; a second signal stops it immediately.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from nextword._version import __version__
from nextword.common.console import Console
from nextword.common.errors import NextwordError
from nextword.common.format import format_bytes
from nextword.serving.config import ServerConfig
from nextword.serving.protocol import APIError, ClientDisconnected, encode_json
from nextword.serving.routes import router
from nextword.serving.security import ListenSocket, SecurityMiddleware, bracketed, is_loopback, listen
from nextword.serving.service import Service

PAGE_DIR = Path(__file__).with_name("page")
MIME_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MAX_CONNECTIONS = 512
BACKLOG = 64  # connections accepted in one turn of the event loop
HEADER_TIMEOUT = 10.0  # seconds for receiving request headers
TEXT_THREADS = 2  # for tokenizing texts and building long responses, which must not take all cores from the engine
WRITE_TIMEOUT = 30.0  # seconds that a client may read nothing of what is there for it
MAX_SMALL_CHUNKS, MIN_CHUNK_BYTES = 256, 64  # chunks of a body that may be smaller than this, on average
SHUTDOWN_TIMEOUT = 5  # seconds for clients to read the rest of their responses

ReadyCallback = Callable[[dict[str, Any]], None]


def load_page_files() -> dict[str, tuple[bytes, str]]:
    """Content and media type of the web page's files by URL path; "/" is index.html."""
    files = {f"/{file.name}": (file.read_bytes(), MIME_TYPES[file.suffix]) for file in PAGE_DIR.iterdir()}
    return {**files, "/": files["/index.html"]}


# ---------------------------------------------------------------- the application


def create_app(service: Service) -> SecurityMiddleware:
    """The ASGI application behind its security middleware."""
    # FastAPI's documentation pages load scripts from a CDN, so they are disabled.
    app = FastAPI(title="nextword", version=__version__, docs_url=None, redoc_url=None)
    for error in (APIError, RequestValidationError, HTTPException, ClientDisconnected, Exception):
        app.add_exception_handler(error, handle_error)
    app.state.service = service
    app.include_router(router)
    page_files = load_page_files()
    for path, (content, kind) in page_files.items():
        app.add_api_route(path, static_file_handler(content, kind), methods=["GET", "HEAD"], include_in_schema=False)
    return SecurityMiddleware(app, service.config, {"/health", *page_files}, service.metrics)


def static_file_handler(content: bytes, media_type: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    """A route that returns the content of a file."""

    async def serve_file() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return serve_file


async def handle_error(request: Request, error: Exception) -> Response:
    """The response to an exception, in OpenAI's format."""
    match error:
        case APIError():
            return error.response()
        case RequestValidationError():
            return APIError(400, "the body must be a JSON object with Content-Type: application/json").response()
        case HTTPException(__cause__=APIError() as cause):  # FastAPI wraps what reading a body raises
            return cause.response()
        case HTTPException():
            messages = {
                404: f"{request.url.path[:200]} does not exist",
                405: f"{request.method} is not allowed for this path",
            }
            message = messages.get(error.status_code, str(error.detail))
            return APIError(error.status_code, message, headers=error.headers).response()
        case ClientDisconnected():
            return Response(status_code=499)  # never sent; counted in the metrics
        case _:
            return APIError(500, f"internal server error ({type(error).__name__})").response()


class LimitedConnection(h11.Connection):
    """h11's parser with a limit on small chunks, each of which costs as much as a large one.

    Attributes:
        is_reading_body: Whether the current body is parsed, which the application decides when it begins with the request.
    """

    is_reading_body = False
    num_chunks = num_bytes = 0  # of the current body

    def next_event(self) -> Any:
        """The next event. Raises `RemoteProtocolError` as h11 does."""
        if self.their_state is h11.SEND_BODY and not self.is_reading_body:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.is_reading_body, self.num_chunks, self.num_bytes = False, 0, 0
        elif isinstance(event, h11.Data):
            self.num_chunks += 1
            self.num_bytes += len(event.data)
            if self.num_chunks > MAX_SMALL_CHUNKS + self.num_bytes // MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("chunks are too small", error_status_hint=413)
        return event


class LimitedHTTPProtocol(H11Protocol):
    """uvicorn's HTTP protocol with limits on connections, chunks, and the time for headers and for reading a response, and
    with JSON errors for malformed requests."""

    header_timer: asyncio.TimerHandle | None = None
    write_timer: asyncio.TimerHandle | None = None
    num_responses = 0
    waiting_since: float = 0.0  # since when the server waits for a request, or for the client to read

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn: LimitedConnection = LimitedConnection(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own form
        """Start the timer of a connection. One too many replaces the one that has waited longest."""
        transport.set_write_buffer_limits(0)  # `pause_writing` is called from the first byte that is not read
        super().connection_made(transport)
        self.waiting_since = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS:
            close_longest_waiting(cast("set[LimitedHTTPProtocol]", self.connections))
        self._update_header_timer()

    @property
    def is_working(self) -> bool:
        """Whether the server works on a request that it has accepted. Files that need no key do not count."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None or cycle.response_complete or self.flow.write_paused:
            return False
        return cycle.scope.get("state", {}).get("accepted", False)

    def data_received(self, data: bytes) -> None:
        """Stop the timer once the headers are complete."""
        super().data_received(data)
        self._update_header_timer()

    def handle_events(self) -> None:
        """Parse what has arrived: the body of a request only after the application has called `read_body` of its state."""
        super().handle_events()
        if self.conn.their_state is h11.SEND_BODY and not self.conn.is_reading_body:
            state = self.scope.setdefault("state", {})
            state.update(read_body=self.read_body, abandon=self.abandon, is_first=not self.num_responses)
            self.flow.pause_reading()

    def read_body(self) -> None:
        """Parse the body of the current request."""
        self.conn.is_reading_body = True
        self.handle_events()

    def abandon(self) -> None:
        """Close the connection in the middle of a response."""
        self.cycle.disconnected = True
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        for timer in (self.header_timer, self.write_timer):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.num_responses += 1
        self.waiting_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the timer of a client that does not read."""
        super().pause_writing()
        self.waiting_since = self.loop.time()
        self._check_reading(None)

    def resume_writing(self) -> None:
        """Stop it: everything is sent."""
        super().resume_writing()
        if self.write_timer is not None:
            self.write_timer.cancel()

    def _check_reading(self, unread_before: int | None) -> None:
        """Abort the connection if its client has read nothing since the last call."""
        unread = self.transport.get_write_buffer_size()
        if unread_before is not None and unread >= unread_before:
            self.transport.abort()
        else:
            self.write_timer = self.loop.call_later(WRITE_TIMEOUT, self._check_reading, unread)

    def _update_header_timer(self) -> None:
        """Close the connection unless complete headers arrive in time."""
        expected = self.conn.their_state is h11.IDLE
        if expected and self.header_timer is None:
            self.header_timer = self.loop.call_later(HEADER_TIMEOUT, self.transport.close)
        elif not expected and self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request in OpenAI's format, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = getattr(sys.exc_info()[1], "error_status_hint", 400)  # h11 sets 431 for oversized headers
            messages = {431: "the headers are too large", 413: "the body is sent in chunks that are too small"}
            message = messages.get(status, "this is not a valid HTTP request")
            body = encode_json(APIError(status, message).body)
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            head = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
            answer = [self.conn.send(event) for event in (head, h11.Data(data=body), h11.EndOfMessage())]
            self.transport.write(b"".join(data for data in answer if data))
        self.transport.close()


def close_longest_waiting(connections: set[LimitedHTTPProtocol]) -> None:
    """Close the connection whose client has waited longest, or kept the server waiting. None whose request is in progress."""
    waiting = [connection for connection in connections if not connection.is_working]
    if waiting:
        longest = min(waiting, key=lambda connection: connection.waiting_since)
        connections.discard(longest)
        longest.transport.abort()


# ---------------------------------------------------------------- startup and shutdown


class ModelServer(uvicorn.Server):
    """A uvicorn server for a model. The first SIGINT or SIGTERM sets `stop`, the second one exits immediately.

    Args:
        service: The model.
    """

    def __init__(self, service: Service):
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=LimitedHTTPProtocol,
                backlog=BACKLOG,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
            )
        )
        self.service = service
        self.stop = asyncio.Event()
        self.was_signaled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.was_signaled:
            os._exit(128 + sig)
        self.was_signaled = True
        asyncio.get_running_loop().call_soon_threadsafe(self.stop.set)

    async def serve_model(self, listen_socket: ListenSocket, on_ready: ReadyCallback | None) -> None:
        """Load the model, accept requests, and shut down after a signal or an engine failure.

        Args:
            listen_socket: The listening socket.
            on_ready: Called with the address and the model's limits once requests are accepted.

        Raises:
            NextwordError: The model cannot be opened, or the engine failed.
        """
        connections = cast("set[LimitedHTTPProtocol]", self.server_state.connections)
        listen_socket.make_room = lambda: close_longest_waiting(connections)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(TEXT_THREADS, "text"))
        worker, stop, grace = self.service.worker, self.stop, self.service.config.shutdown_timeout
        with self.capture_signals():
            serve_task = asyncio.create_task(self.serve(sockets=[listen_socket]))
            worker.start()
            wait_tasks = [asyncio.create_task(wait()) for wait in (stop.wait, worker.stopped.wait, worker.loaded.wait)]
            try:
                await asyncio.wait([serve_task, *wait_tasks], return_when=asyncio.FIRST_COMPLETED)
                if worker.state == "ready":
                    server_info = self.log_startup(listen_socket)
                    if on_ready is not None:
                        on_ready(server_info)
                    await asyncio.wait([serve_task, *wait_tasks[:2]], return_when=asyncio.FIRST_COMPLETED)
                if stop.is_set():
                    count = len(worker.handles)
                    requests = "1 request" if count == 1 else f"{count} requests"
                    self.service.console.info(f"stopping: finishing {requests}, within {grace:.0f} s")
                await worker.drain(grace)
            finally:
                for wait in wait_tasks:
                    wait.cancel()
                self.should_exit = True
                await serve_task
                await worker.stop()
                await self.service.close()
        if isinstance(worker.error, NextwordError):
            raise worker.error
        if worker.error is not None:
            raise NextwordError(f"the engine failed: {worker.error!r}") from worker.error

    def log_startup(self, listen_socket: socket.socket) -> dict[str, Any]:
        """Print the address and the model's limits; the same as a JSON object."""
        service = self.service
        host, port = listen_socket.getsockname()[:2]
        info = {
            "url": f"http://{bracketed(host)}:{port}",
            "model": service.name,
            "slots": service.worker.num_slots,
            "queue": service.config.queue,
            "context_length": service.context_length,
            "key_value_bytes": service.kv_cache_bytes,
            "chat_template": service.chat_encoder.name,
        }
        service.console.info(f"{service.name}: {info['url']}", style="bold")
        service.console.info(
            f"{info['slots']} sequences at once, queue of {info['queue']} · context length {service.context_length:,} · "
            f"KV cache {format_bytes(service.kv_cache_bytes)} · chat template: {service.chat_encoder.name}"
        )
        if not is_loopback(service.config.host):
            access = ", with the API key" if service.config.api_key else " without a key (--insecure)"
            service.console.warn(
                f"other machines can connect to {service.config.host}{access}. Traffic is not encrypted: put a reverse "
                "proxy with TLS in front"
            )
        return info


def serve_model(config: ServerConfig, console: Console, on_ready: ReadyCallback | None = None) -> None:
    """Serve a model until a signal arrives.

    Args:
        config: The model, its limits, and who may use it.
        console: Where messages are printed.
        on_ready: Called with the address and the model's limits once requests are accepted.

    Raises:
        NextwordError: The model cannot be opened, or the address is not available.
    """
    service = Service(config, console)
    with contextlib.closing(listen(config)) as listen_socket:
        asyncio.run(ModelServer(service).serve_model(listen_socket, on_ready))
