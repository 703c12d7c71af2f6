"""Server security and limits: API keys, host names, request sizes, a full queue, disconnects and slow clients."""

import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nextword.commands import cli
from nextword.common.errors import NextwordError
from nextword.serving import app as server_module
from nextword.serving import security
from nextword.serving.config import ServerConfig
from nextword.serving.engine_worker import EngineWorker, Metrics
from processes import PATIENCE, wait_until
from served import ServerClient, ServerProcess, ThreadedServer, running_server

ON = {"logit_bias": {"0": -100}, "temperature": 1.0}  # a text that does not end by itself
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@pytest.fixture(scope="module")
def locked(base: Path) -> Iterator[ThreadedServer]:
    """All of the machine's addresses, with a key."""
    with running_server(base, host="0.0.0.0", api_key="a secret", allowed_hosts="model.example") as server:
        yield server


@pytest.fixture(scope="module")
def open_(base: Path) -> Iterator[ThreadedServer]:
    with running_server(base) as server:
        yield server


# ---------------------------------------------------------------- keys


def test_every_route_but_health_and_the_page_needs_the_key(locked: ThreadedServer) -> None:
    local = ServerClient(f"http://127.0.0.1:{locked.port}")
    paths = local.get("/openapi.json", Authorization="Bearer a secret").json["paths"]
    assert len(paths) >= 10
    for path, methods in paths.items():
        for method in methods:
            answer = local.request(method.upper(), path.replace("{name}", "x"))
            assert answer.status == (200 if path == "/health" else 401), path
            if path != "/health":
                assert answer.error["code"] == "invalid_api_key" and answer.headers["WWW-Authenticate"] == "Bearer"
    assert local.get("/openapi.json").status == 401
    assert local.get("/").status != 401
    wrong = (
        "a secret",
        "Bearer",
        "Bearer a secre",
        "Bearer a secret2",
        "Basic a secret",
        "Bearer é",
        "Bearer " + "x" * 9000,
    )
    for key in wrong:
        assert local.get("/v1/models", Authorization=key.encode().decode("latin-1")).status == 401, key
    assert local.get("/v1/models", Authorization="bearer a secret").status == 200


def test_the_key_can_be_an_environment_variable(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    configs: list[ServerConfig] = []
    monkeypatch.setattr("nextword.serving.app.serve_model", lambda config, *_: configs.append(config))
    monkeypatch.setenv("NEXTWORD_API_KEY", "a secret")
    for arguments, key in (([], "a secret"), (["--api-key", "other"], "other")):
        hosts = ["--allowed-host", "a", "--allowed-host", "b"]
        assert cli.run(["serve", str(base), "--host", "0.0.0.0", *hosts, *arguments]) == 0
        address = configs[-1]
        assert (address.api_key, address.allowed_hosts, address.host) == (key, ("a", "b"), "0.0.0.0")


def test_the_key_is_printed_once(locked: ThreadedServer) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", locked.port)) as connection:
        connection.putrequest("GET", "/v1/models")
        for key in ("a secret", "other"):
            connection.putheader("Authorization", f"Bearer {key}")
        connection.endheaders()
        assert connection.getresponse().status == 401


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.8.9.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("model.example", False),
        ("localhost.evil.example", False),
    ],
)
def test_another_address_requires_a_key_or_insecure(monkeypatch: pytest.MonkeyPatch, host: str, fine: bool) -> None:
    resolved = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [resolved])
    with contextlib.nullcontext() if fine else pytest.raises(NextwordError, match="lets other machines connect"):
        security.listen(ServerConfig("model", host=host)).close()
    security.listen(ServerConfig("model", host=host, api_key="k")).close()
    security.listen(ServerConfig("model", host=host, insecure=True)).close()
    for key in ("", " k", "k ", "ключ"):
        with pytest.raises(NextwordError, match="API key"):
            security.listen(ServerConfig("model", host=host, api_key=key, insecure=True))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "",
        "a b",
        "localhost@evil",
        "169.254.169.254",
        "model.example.evil.example:{port}",
        "localhost:x",
    ],
)
def test_a_request_for_another_host_name_is_rejected(locked: ThreadedServer, host: str) -> None:
    for path in ("/", "/health", "/v1/models"):
        answer = ServerClient(f"http://127.0.0.1:{locked.port}").get(path, Host=host.format(port=locked.port))
        assert answer.status in (400, 403), path
        answer.error  # noqa: B018  # it has OpenAI's form


def test_allowed_host_names(locked: ThreadedServer, open_: ThreadedServer) -> None:
    local = ServerClient(f"http://127.0.0.1:{locked.port}")
    for host in ("127.0.0.1", "LocalHost:1", "[::1]:8000", "model.example", "MODEL.example.:443", "0.0.0.0"):
        assert local.get("/health", Host=host).status == 200, host
    assert open_.get("/health", Host="model.example").status == 403
    assert open_.get("/health", Host="0.0.0.0").status == 403
    scope = {"headers": [(b"host", b"10.1.2.3:80")], "server": ("10.1.2.3", 80), "raw_path": b"/", "query_string": b""}

    def check(**options: Any) -> None:
        security.SecurityMiddleware(open_.middleware, ServerConfig("model", **options), (), Metrics()).check(scope)

    check(host="0.0.0.0", insecure=True)  # the address that it was reached at
    with pytest.raises(security.APIError, match="--allowed-host"):
        check()


def test_cross_origin_requests_are_rejected(open_: ThreadedServer) -> None:
    own = f"http://127.0.0.1:{open_.port}"
    assert open_.get("/v1/models", Origin=own).status == 200
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{open_.port + 1}", "http://127.0.0.1"):
        assert open_.get("/v1/models", Origin=origin).status == 403, origin
    answer = open_.request(
        "OPTIONS", "/v1/completions", headers={"Origin": own, "Access-Control-Request-Method": "POST"}
    )
    assert answer.status == 405 and not any("access-control" in name.lower() for name in answer.headers)
    plain = open_.request("POST", "/v1/completions", b'{"prompt": "x"}', {"Content-Type": "text/plain"})
    assert plain.status == 400  # what a page may send unasked is not taken


def test_every_answer_has_strict_headers(open_: ThreadedServer) -> None:
    for path in ("/", "/health", "/nothing", "/v1/models", "/page.js"):
        answer = open_.get(path)
        assert answer.headers["Content-Security-Policy"] == POLICY, path
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "Server" not in answer.headers


def test_the_page_is_served_unchanged(open_: ThreadedServer) -> None:
    files = [file for file in server_module.PAGE_DIR.glob("*") if file.is_file()]
    if not files:
        pytest.skip("the page is not there yet")
    for file in files:
        answer = open_.get(f"/{file.name}")
        assert answer.status == 200 and answer.body == file.read_bytes()
        kinds = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
        assert answer.headers["Content-Type"].startswith(kinds[file.suffix])
    assert open_.get("/").body == (server_module.PAGE_DIR / "index.html").read_bytes()
    assert open_.request("HEAD", "/").body == b""
    for path in ("/../service.py", "/%2e%2e/service.py", "/page/index.html", "//index.html"):
        assert open_.get(path).status == 404


# ---------------------------------------------------------------- sizes


def test_a_large_body_is_rejected(open_: ThreadedServer) -> None:
    large = b'{"prompt": "' + b"x" * 20_000_000 + b'"}'
    assert open_.post("/v1/completions", large).status == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 100_000

    with contextlib.closing(open_.connect()) as connection:  # without a length, in chunks
        connection.request("POST", "/v1/completions", pieces(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 413 and answer.headers["Connection"] == "close"
        assert json.loads(answer.read())["error"]["code"] == "body_too_large"
    # A client that waits for 100-continue gets the refusal at once.
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection((open_.host, open_.port), timeout=PATIENCE) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert open_.get("/health").status == 200


def test_the_total_size_of_bodies_is_limited(monkeypatch: pytest.MonkeyPatch, open_: ThreadedServer) -> None:
    monkeypatch.setattr(security, "MAX_TOTAL_BODY_BYTES", 5_000_000)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
    with socket.create_connection((open_.host, open_.port), timeout=PATIENCE) as half:
        half.sendall(head + b"x" * 3_000_000)
        wait_until(lambda: open_.middleware.buffered_body_bytes == 3_000_000)
        answer = open_.post("/v1/completions", b"x" * 3_000_000)
        assert answer.status == 429 and answer.headers["Retry-After"]
        monkeypatch.setattr(security, "MAX_TOTAL_BODY_BYTES", 1)
        assert open_.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status == 200  # small ones are let in
        monkeypatch.setattr(security, "MAX_TOTAL_BODY_BYTES", 5_000_000)
    wait_until(lambda: open_.middleware.buffered_body_bytes == 0)
    assert open_.post("/v1/completions", b"x" * 3_000_000).status == 400
    wait_until(lambda: open_.middleware.buffered_body_bytes == 0)


def test_large_headers_are_rejected(open_: ThreadedServer) -> None:
    many = open_.get("/health", **{f"X-{i}": "y" for i in range(200)})
    assert many.status == 431 and many.error
    for size in (17_000, 60_000, 1_000_000):
        with socket.create_connection((open_.host, open_.port), timeout=PATIENCE) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * size + b"\r\n\r\n")
            if size < 1_000_000:  # beyond, the connection may be gone before the client has read the answer
                assert connection.recv(1000).startswith(b"HTTP/1.1 431 "), size
    assert open_.get("/v1/models/" + "x" * 9000).status == 414
    with socket.create_connection((open_.host, open_.port), timeout=PATIENCE) as connection:
        connection.sendall(b"\x00\x01 this is no HTTP\r\n\r\n")
        said = b"".join(iter(lambda: connection.recv(1000), b""))
        assert said.startswith(b"HTTP/1.1 400 ") and b'"invalid_request_error"' in said
    assert open_.get("/health").status == 200


def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch, open_: ThreadedServer) -> None:
    monkeypatch.setattr(server_module, "HEADER_TIMEOUT", 2)
    monkeypatch.setattr(security, "BODY_TIMEOUT", 2)
    monkeypatch.setattr(security, "DISCARD_TIMEOUT", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    silent, slow, half = (socket.create_connection((open_.host, open_.port), timeout=PATIENCE) for _ in range(3))
    slow.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
    half.sendall(head)
    assert silent.recv(10) == b"" and slow.recv(10) == b""
    assert half.recv(100).startswith(b"HTTP/1.1 408 ")
    for connection in (silent, slow, half):
        connection.close()


def closed(connection: socket.socket) -> bool:
    """Whether the server has closed an idle connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_the_number_of_connections_is_limited(monkeypatch: pytest.MonkeyPatch, open_: ThreadedServer) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 5)
    with contextlib.ExitStack() as stack:
        made = [
            stack.enter_context(socket.create_connection((open_.host, open_.port), timeout=PATIENCE)) for _ in range(12)
        ]
        wait_until(lambda: sum(map(closed, made)) >= 7)
    wait_until(lambda: open_.get("/health").status == 200)


# ---------------------------------------------------------------- the queue


def slowly(monkeypatch: pytest.MonkeyPatch, server: ThreadedServer, seconds: float) -> None:
    """Make every step of the engine take so long."""
    read = server.engine.runner.forward

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return read(*arguments)

    monkeypatch.setattr(server.engine.runner, "forward", slow)


class Gate:
    """Steps of the engine begin only when the test lets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: ThreadedServer):
        self.permits, self.waiting, self.is_open = threading.Semaphore(0), threading.Event(), False
        read = server.engine.runner.forward

        def gated(*arguments: Any) -> Any:
            if not self.is_open:
                self.waiting.set()
                assert self.permits.acquire(timeout=PATIENCE)
            return read(*arguments)

        monkeypatch.setattr(server.engine.runner, "forward", gated)

    def let_through(self, steps: int) -> None:
        """Let the engine run `steps` steps; it then waits before the next one."""
        for _ in range(steps):
            assert self.waiting.wait(PATIENCE)
            self.waiting.clear()
            self.permits.release()
        assert self.waiting.wait(PATIENCE)

    def open(self) -> None:
        self.is_open = True
        self.permits.release()

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        self.open()


def test_a_full_queue_returns_429(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    with running_server(base, max_batch=1, queue=1) as server:
        slowly(monkeypatch, server, 0.02)
        body = {"prompt": "The", "max_tokens": 30000, **ON}
        with server.start_completion(body), server.start_completion(body):
            wait_until(lambda: server.metric("nextword_texts_waiting") == 1)
            assert (server.metric("nextword_texts_running"), server.metric("nextword_texts_held")) == (1, 2)
            answer = server.post("/v1/completions", body)
            assert answer.status == 429 and answer.error["code"] == "queue_full"
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert server.post("/v1/embeddings", {"input": "x"}).status == 429
            assert server.post("/v1/completions", {**body, "n": 3}).status == 400  # never possible
            assert server.get("/health").status == 200
        wait_until(lambda: server.metric("nextword_texts_held") == 0)  # both have left
        assert server.complete("The", max_tokens=2)["choices"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_stops_generation_within_two_tokens(
    monkeypatch: pytest.MonkeyPatch, base: Path, stream: bool
) -> None:
    with running_server(base) as server, Gate(monkeypatch, server) as gate:
        with server.start_completion({"prompt": "The", "max_tokens": 30000, "stream": stream, **ON}):
            gate.let_through(5)
            tokens_at_disconnect = server.metric("nextword_generated_tokens_total")
        wait_until(lambda: server.metric("nextword_clients_left_total") == 1)  # noticed while the engine is in a step
        gate.open()
        wait_until(lambda: not server.engine.has_unfinished_requests and not server.service.worker.handles)
        assert 0 < tokens_at_disconnect <= server.metric("nextword_generated_tokens_total") <= tokens_at_disconnect + 2


def test_a_disconnect_is_noticed_with_a_fast_model(base: Path) -> None:
    """The loop has its turns, however quickly steps follow each other."""
    with running_server(base) as server:
        for stream in (True, False):
            before = server.metric("nextword_generated_tokens_total")
            with server.start_completion({"prompt": "The", "max_tokens": 30000, "stream": stream, **ON}):
                wait_until(lambda start=before: server.metric("nextword_generated_tokens_total") >= start + 20)
            wait_until(lambda: not server.service.worker.handles)
            wait_until(lambda: not server.engine.has_unfinished_requests)
            assert server.metric("nextword_generated_tokens_total") < before + 30000, "the sequence was not cancelled"


def test_a_disconnect_in_the_queue_does_not_affect_others(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    with running_server(base, max_batch=1) as server:
        alone = server.complete("The", max_tokens=40, seed=1)["choices"][0]["text"]
        slowly(monkeypatch, server, 0.01)
        made: list[Any] = []
        thread = threading.Thread(target=lambda: made.append(server.complete("The", max_tokens=40, seed=1)))
        thread.start()
        wait_until(lambda: server.service.worker.num_running == 1)
        with server.start_completion({"prompt": "x", "max_tokens": 3000, **ON}):
            wait_until(lambda: server.service.worker.num_waiting == 1)
        wait_until(lambda: server.service.worker.num_waiting == 0)
        thread.join()
        assert made[0]["choices"][0]["text"] == alone


def test_a_slow_reader_does_not_delay_others(base: Path) -> None:
    with running_server(base, max_batch=1, queue=0) as server:  # one place in all
        body = {"prompt": "The", "max_tokens": 1500, "logprobs": 20, "stream": True, **ON}
        with server.start_completion(body, receive_buffer=4096) as unread:  # some 2 MB
            wait_until(lambda: server.service.worker.num_active == 1)
            wait_until(lambda: server.service.worker.num_active == 0)  # it was written to its end, though nobody reads
            assert server.service.worker.num_unread_events > 500
            quick = server.complete("A", max_tokens=50, **ON)
            assert quick["usage"]["completion_tokens"] == 50
            unread.settimeout(PATIENCE)
            read = b""
            while b"data: [DONE]" not in read[-100:]:
                read += unread.recv(2**20)
            assert len(read) > 1_000_000
        wait_until(lambda: not server.service.worker.handles)


def test_unread_events_are_limited(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """The slowest of all loses its answer, and the others' go on."""
    monkeypatch.setattr("nextword.serving.engine_worker.MAX_UNREAD_EVENTS", 700)
    with running_server(base) as server:
        body = {"prompt": "The", "max_tokens": 1500, "logprobs": 20, "stream": True, **ON}
        with server.start_completion(body, receive_buffer=4096) as unread:
            read = server.post("/v1/completions", {**body, "seed": 1}).sse_events
            assert read[-1]["choices"][0]["finish_reason"] == "length"
            wait_until(lambda: not server.service.worker.handles or server.service.worker.num_unread_events == 0)
            said = b""
            while piece := unread.recv(2**20):
                said += piece
            assert b'"code":"read_too_slowly"' in said and b"[DONE]" not in said


def test_a_client_that_never_reads_is_disconnected(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr("nextword.serving.app.WRITE_TIMEOUT", 0.3)
    with running_server(base) as server:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        with server.start_completion(
            {"prompt": "The", "max_tokens": 1500, "logprobs": 20, "stream": True, **ON}, receive_buffer=4096
        ):
            wait_until(lambda: bool(server.service.worker.handles))
            wait_until(lambda: not server.service.worker.handles)


# ---------------------------------------------------------------- schemas

ENDLESS = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{9 + i}}}"} for i in range(20)]}


def test_an_expensive_schema_is_stopped_without_delaying_others(base: Path) -> None:
    """Its work is in a process that ends, and JSON of any form needs no turn there."""
    with running_server(base) as server:
        form = {"type": "json_schema", "json_schema": {"schema": ENDLESS}}
        answers: list[Any] = []

        def ask() -> None:
            answers.append(server.post("/v1/completions", {"prompt": "x", "response_format": form}))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.service.schema_process.process is not None)
        server.complete("x", response_format={"type": "json_object"}, max_tokens=3)
        for thread in threads:
            thread.join()
        for answer in answers:
            assert answer.status == 400 and "too much time or memory" in answer.error["message"]
        assert server.service.schema_process.process is None and server.service.worker.num_active == 0
        fine = {"type": "json_schema", "json_schema": {"schema": {"const": "a"}}}
        for _ in range(2):  # compiled, and kept
            assert server.complete("x", response_format=fine, max_tokens=30)["choices"][0]["text"] == '"a"'


# ---------------------------------------------------------------- faults


def test_an_exception_in_a_step_ends_only_affected_requests(
    monkeypatch: pytest.MonkeyPatch, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server(base, max_batch=1) as server:
        expected = server.complete("The", max_tokens=20, seed=1)["choices"][0]["text"]
        slowly(monkeypatch, server, 0.005)
        calls, forward = itertools.count(), server.engine.runner.forward

        def failing(*arguments: Any) -> Any:
            if next(calls) == 10:
                raise RuntimeError("the memory is gone")
            return forward(*arguments)

        monkeypatch.setattr(server.engine.runner, "forward", failing)
        answers: dict[str, Any] = {}

        def ask(name: str, **settings: Any) -> None:
            answers[name] = server.post("/v1/completions", {"prompt": "The", "max_tokens": 20, "seed": 1, **settings})

        first = threading.Thread(target=ask, args=("touched",), kwargs={"max_tokens": 100, **ON})
        first.start()
        wait_until(lambda: server.service.worker.num_running == 1)
        second = threading.Thread(target=ask, args=("waiting",))
        second.start()
        for thread in (first, second):
            thread.join()
        assert answers["touched"].status == 500 and answers["touched"].error["type"] == "server_error"
        assert "memory is gone" not in answers["touched"].error["message"]  # that is for the log
        assert answers["waiting"].status == 200
        assert answers["waiting"].json["choices"][0]["text"] == expected
        assert "the memory is gone" in caplog.text
        assert server.get("/health").status == 200


def test_an_error_is_the_last_event_of_a_stream(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    with running_server(base) as server:
        calls, forward = itertools.count(), server.engine.runner.forward

        def failing(*arguments: Any) -> Any:
            rows = forward(*arguments)
            return rows if next(calls) < 5 else [row * float("nan") for row in rows]

        monkeypatch.setattr(server.engine.runner, "forward", failing)
        with contextlib.closing(server.connect()) as connection:
            body = json.dumps({"prompt": "The", "max_tokens": 50, "stream": True, **ON})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            lines = connection.getresponse().read().decode().split("\n\n")
        assert "not finite" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        assert "[DONE]" not in "".join(lines) and len(lines) > 2


def test_the_server_exits_if_the_engine_fails(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    def broken(worker: EngineWorker, engine: Any) -> Any:
        raise SystemError("the thread is lost")

    monkeypatch.setattr(EngineWorker, "_step", broken)
    with running_server(base) as server:
        with contextlib.suppress(http.client.HTTPException, OSError):
            assert server.post("/v1/completions", {"prompt": "x"}).status == 503
        failure = server.exit_error()
        assert isinstance(failure, NextwordError) and "the thread is lost" in str(failure)


def test_the_kv_cache_is_allocated_for_max_batch_sequences(
    monkeypatch: pytest.MonkeyPatch, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = 2 * 2 * 64 * 32 * 4  # keys and values, layers, context, width, bytes
    monkeypatch.setattr("nextword.serving.service.free_memory", lambda device: 7 * one)
    with running_server(base, max_batch=16) as server:
        assert len(server.engine.free_slots) == 3 and server.service.kv_cache_bytes == 3 * one
        kept = server.engine.cache.keys.data_ptr()
        server.complete("The", n=3, max_tokens=100, **ON)
        assert server.engine.cache.keys.data_ptr() == kept  # it never grows
    assert "running 3 sequences at once instead of 16" in capsys.readouterr().err
    monkeypatch.setattr("nextword.serving.service.free_memory", lambda device: one)
    with pytest.raises(NextwordError, match="free some memory"), running_server(base):
        pass


# ---------------------------------------------------------------- the end


def test_requests_while_loading_return_503(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    go_on, real = threading.Event(), EngineWorker._run

    def later(worker: EngineWorker) -> None:
        go_on.wait(10)
        real(worker)

    monkeypatch.setattr(EngineWorker, "_run", later)
    ports: list[int] = []

    def noted(config: ServerConfig) -> socket.socket:
        ports.append((made := security.listen(config)).getsockname()[1])
        return made

    monkeypatch.setattr("served.listen", noted)

    def look() -> None:
        wait_until(lambda: bool(ports))
        server = ServerClient(f"http://127.0.0.1:{ports[0]}")
        try:
            found.extend(
                [server.get("/health"), server.post("/v1/completions", {"prompt": "x"}), server.get("/v1/models")]
            )
        finally:
            go_on.set()

    found: list[Any] = []
    thread = threading.Thread(target=look)
    thread.start()
    with running_server(base) as server:
        thread.join()
        assert [answer.status for answer in found] == [503] * 3
        assert found[1].error["code"] == "loading" and found[1].headers["Retry-After"]
        assert server.get("/health").status == 200


def test_sigterm_finishes_requests_and_a_second_one_does_not(base: Path) -> None:
    with ServerProcess(base, "--shutdown-timeout", "1000") as server:
        with server.start_completion({"prompt": "The", "max_tokens": 2000, "stream": True, **ON}) as stream:
            assert b"200 OK" in stream.recv(100)
            kept = server.connect()  # a connection from before
            kept.connect()
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: server.get("/health").status == 503)
            kept.request("POST", "/v1/completions", b'{"prompt": "x"}', {"Content-Type": "application/json"})
            refused = kept.getresponse()
            assert refused.status == 503 and json.loads(refused.read())["error"]["code"] == "draining"
            kept.close()
            read = b""
            while piece := stream.recv(2**20):
                read += piece
            assert b'"finish_reason":"length"' in read and b"data: [DONE]" in read
        assert server.wait() == 0
        assert server.stdout == "" and "stopping: finishing 1 request, within" in server.stderr
    with (
        ServerProcess(base, "--shutdown-timeout", "1000") as server,
        server.start_completion({"prompt": "The", "max_tokens": 30000, **ON}),
    ):
        wait_until(lambda: server.metric("nextword_texts_running") == 1)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/health").status == 503)
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 143


def test_the_shutdown_timeout_ends_requests(base: Path) -> None:
    with (
        running_server(base) as server,
        server.start_completion({"prompt": "The", "max_tokens": 30000, "stream": True, **ON}) as stream,
    ):
        assert b"200 OK" in stream.recv(100)
        worker = server.service.worker
        asyncio.run_coroutine_threadsafe(worker.drain(0.3), worker.loop).result()
        read = b""
        while b"stopped" not in read:
            read += stream.recv(2**20)
        assert b'"code":"stopped"' in read and b"[DONE]" not in read
        assert not worker.handles
