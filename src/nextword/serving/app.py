"""The HTTP server: application, listening socket, startup and shutdown.

    serve_model(ServiceConfig(Path("runs/mine")), ListenConfig(port=8000), Console())

It listens at once and answers 503 until the model is loaded. After SIGTERM or Ctrl-C it rejects new requests, finishes the
running ones and stops; a second signal stops it immediately.
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

from nextword._version import __version__
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.format import format_bytes
from nextword.serving.engine_worker import ClientDisconnected
from nextword.serving.protocol import APIError, UTF8JSONResponse, encode_json, error_response, validation_api_error
from nextword.serving.routes import router
from nextword.serving.security import AccessPolicy, SecurityMiddleware, is_loopback
from nextword.serving.service import Service, ServiceConfig

PAGE_DIR = Path(__file__).with_name("page")
MIME_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MAX_CONNECTIONS = 512
SEND_BUFFER_BYTES = 2**17  # per connection; the operating system's default of several MB hides clients that do not read
HEADER_TIMEOUT = 10.0  # seconds for receiving request headers
SHUTDOWN_TIMEOUT = 5  # seconds for clients to read the rest of their responses

ReadyCallback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ListenConfig:
    """Listening address and access.

    Attributes:
        host: Address to listen on.
        port: Port to listen on. 0 takes a free one.
        api_key: Key that clients send. Required if other machines can connect, unless `insecure` is set.
        insecure: Accept other machines without a key.
        allowed_hosts: Host names of the server besides the loopback names and the address.
        shutdown_grace: Seconds that running requests have to finish at shutdown.

    Raises:
        UsageError: Other machines could connect without a key, or the port is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    shutdown_grace: float = 30.0

    def __post_init__(self) -> None:
        if self.api_key is not None and (
            len(self.api_key) < 1 or self.api_key != self.api_key.strip() or not self.api_key.isascii()
        ):
            raise UsageError("an API key is ASCII text, not empty, without spaces at its ends")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be between 0 and 65535, not {self.port}")
        if not (is_loopback(self.host) or self.api_key or self.insecure):
            raise UsageError(
                f"--host {self.host} lets other machines connect: set --api-key (or NEXTWORD_API_KEY), or --insecure to accept "
                "everyone"
            )

    def access_policy(self) -> AccessPolicy:
        host = self.host.strip("[]").lower()
        host_name = f"[{host}]" if ":" in host else host
        try:
            binds_all_addresses = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            binds_all_addresses = False
        return AccessPolicy(
            frozenset({host_name, *map(str.lower, self.allowed_hosts)}),
            self.api_key,
            {"/health", *load_page_files()},
            binds_all_addresses,
        )

    def listen(self) -> socket.socket:
        """A listening socket. Raises `NextwordError` if the address is not available."""
        host = self.host.strip("[]")
        try:
            addresses = socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = min(addresses, key=lambda info: info[0] != socket.AF_INET)
            listen_socket = socket.socket(family, kind, protocol)
            if os.name != "nt":  # Windows would share the port with another program
                listen_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listen_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # inherited by connections
            listen_socket.bind(address)
            listen_socket.listen()
        except OSError as error:
            raise NextwordError(
                f"cannot listen on {self.host}, port {self.port}: {error.strerror or error}. Try another --port"
            ) from error
        return listen_socket


def load_page_files() -> dict[str, tuple[bytes, str]]:
    """Content and media type of the web page's files by URL path; "/" is index.html."""
    files = {f"/{file.name}": file for file in sorted(PAGE_DIR.glob("*")) if file.is_file()}
    if "/index.html" in files:
        files["/"] = files["/index.html"]
    types = {path: MIME_TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] for path, file in files.items()}
    return {path: (file.read_bytes(), types[path] or "application/octet-stream") for path, file in files.items()}


# ---------------------------------------------------------------- the application


def create_app(service: Service, policy: AccessPolicy) -> SecurityMiddleware:
    """The ASGI application behind its security middleware."""
    # FastAPI's documentation pages load scripts from a CDN, so they are disabled.
    app = FastAPI(title="nextword", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    for path, (content, kind) in load_page_files().items():
        app.add_api_route(path, _static_file_handler(content, kind), methods=["GET", "HEAD"], include_in_schema=False)

    async def handle_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return error_response(error)

    async def handle_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(validation_api_error(error.errors()))

    async def handle_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"{request.url.path[:200]} does not exist",
            405: f"{request.method} is not allowed for this path",
        }
        message = messages.get(error.status_code, str(error.detail))
        return error_response(APIError(error.status_code, message, headers=error.headers))

    async def handle_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # never sent; counted in the metrics

    async def handle_internal_error(request: Request, error: Exception) -> Response:
        return error_response(APIError(500, f"internal server error ({type(error).__name__})"))

    app.add_exception_handler(APIError, handle_api_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(ClientDisconnected, handle_disconnect)
    app.add_exception_handler(Exception, handle_internal_error)

    def record_request(route: str, status: int, seconds: float) -> None:
        service.metrics.requests.labels(route, str(status)).inc()
        service.metrics.request_seconds.observe(seconds)

    return SecurityMiddleware(app, policy, record_request)


def _static_file_handler(content: bytes, media_type: str) -> Callable[[], Any]:
    async def serve_file() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return serve_file


class LimitedHTTPProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a connection limit, a timeout for headers, and JSON errors for malformed requests."""

    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._update_header_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.header_timer is not None:
            self.header_timer.cancel()

    def _update_header_timer(self) -> None:
        """Close the connection unless complete headers arrive in time."""
        expected = self.conn.their_state is h11.IDLE
        if expected and self.header_timer is None:
            self.header_timer = self.loop.call_later(HEADER_TIMEOUT, self.transport.close)
        elif not expected and self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = getattr(sys.exc_info()[1], "error_status_hint", 400)  # h11 sets 431 for oversized headers
            message = "the headers are too large" if status == 431 else "this is not a valid HTTP request"
            body = encode_json(APIError(status, message).body)
            headers = {
                "Content-Type": UTF8JSONResponse.media_type,
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
            head = h11.Response(status_code=status, headers=list(headers.items()), reason=HTTPStatus(status).phrase)
            answer = [self.conn.send(event) for event in (head, h11.Data(data=body), h11.EndOfMessage())]
            self.transport.write(b"".join(data for data in answer if data))
        self.transport.close()


# ---------------------------------------------------------------- startup and shutdown


class UvicornServer(uvicorn.Server):
    """A uvicorn server that leaves signals to `handle_signals`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_model(
    settings: ServiceConfig, listen_config: ListenConfig, console: Console, on_ready: ReadyCallback | None = None
) -> None:
    """Serve a model until a signal arrives.

    Args:
        settings: The model and its limits.
        listen_config: Address and access.
        console: Where messages are printed.
        on_ready: Called with the address and the model's limits once requests are accepted.

    Raises:
        NextwordError: The model cannot be opened, or the address is not available.
    """
    service = Service(settings, console)
    with contextlib.closing(listen_config.listen()) as listen_socket:
        asyncio.run(
            run_server(service, listen_config, build_uvicorn(service, listen_config), listen_socket, console, on_ready)
        )


def build_uvicorn(service: Service, listen_config: ListenConfig) -> UvicornServer:
    """A uvicorn server with this module's protocol and signal handling."""
    return UvicornServer(
        uvicorn.Config(
            create_app(service, listen_config.access_policy()),
            http=LimitedHTTPProtocol,
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


async def run_server(
    service: Service,
    listen_config: ListenConfig,
    server: UvicornServer,
    listen_socket: socket.socket,
    console: Console,
    on_ready: ReadyCallback | None,
) -> None:
    """Load the model, accept requests, and shut down after a signal or an engine failure."""
    worker, stop = service.worker, asyncio.Event()
    with handle_signals(asyncio.get_running_loop(), stop):
        serve_task = asyncio.create_task(server.serve(sockets=[listen_socket]))
        worker.start()
        wait_tasks = [asyncio.create_task(wait()) for wait in (stop.wait, worker.stopped.wait, worker.loaded.wait)]
        try:
            await asyncio.wait([serve_task, *wait_tasks], return_when=asyncio.FIRST_COMPLETED)
            if worker.state == "ready":
                server_info = log_startup(service, listen_config, listen_socket, console)
                if on_ready is not None:
                    on_ready(server_info)
                await asyncio.wait([serve_task, *wait_tasks[:2]], return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                console.info(
                    f"stopping: finishing {len(worker.handles)} requests, within {listen_config.shutdown_grace:.0f} s"
                )
            await worker.drain(listen_config.shutdown_grace)
        finally:
            for wait in wait_tasks:
                wait.cancel()
            server.should_exit = True
            await serve_task
            await worker.stop()
            await service.close()
    if isinstance(worker.error, NextwordError):
        raise worker.error
    if worker.error is not None:
        raise NextwordError(f"the engine failed: {worker.error!r}") from worker.error


def log_startup(
    service: Service, listen_config: ListenConfig, listen_socket: socket.socket, console: Console
) -> dict[str, Any]:
    """Print the address and the model's limits; the same as a JSON object."""
    host, port = listen_socket.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    slots, queue = service.worker.num_slots, service.config.queue
    console.info(f"{service.name}: {url}", style="bold")
    console.info(
        f"{slots} sequences at once, queue of {queue} · context length {service.context_length:,} · "
        f"KV cache {format_bytes(service.kv_cache_bytes)} · chat template: {service.chat_encoder.name}"
    )
    if not is_loopback(listen_config.host):
        console.warn(
            f"other machines can connect to {listen_config.host}"
            + (", with the API key" if listen_config.api_key else " without a key (--insecure)")
            + ". Traffic is not encrypted: put a reverse proxy with TLS in front"
        )
    return {
        "url": url,
        "model": service.name,
        "slots": slots,
        "queue": queue,
        "context_length": service.context_length,
        "key_value_bytes": service.kv_cache_bytes,
        "chat_template": service.chat_encoder.name,
    }


@contextlib.contextmanager
def handle_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Iterator[None]:
    """Inside this context the first SIGINT or SIGTERM sets `stop`, and the second one exits immediately."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        loop.call_soon_threadsafe(stop.set)

    previous_handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
