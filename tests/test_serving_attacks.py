"""Clients that mean harm: none of them, and no 512 of them, keep the server from answering others.

The attacks by many clients take time and a clock, so `make soak` runs them.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from attackers import ATTACKS
from nextword.data.tokenizer import Tokenizer, train_bpe
from nextword.serving import app as server_module
from nextword.serving import engine_worker, protocol
from nextword.serving.chat_templates import JinjaChatEncoder
from nextword.serving.security import SecurityMiddleware
from processes import PATIENCE, kill, start_process, wait_until
from served import ServerProcess, ThreadedServer, running_server
from test_serving_guard import ON

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[ThreadedServer]:
    with running_server(base) as server:
        yield server


def connect(server: Any) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionError):
        return b"".join(iter(lambda: connection.recv(2**16), b""))
    return b""


def healthy(server: Any) -> bool:
    """Whether the server answers."""
    try:
        return server.get("/health").status == 200
    except ConnectionError:
        return False


# ---------------------------------------------------------------- connections


@pytest.mark.parametrize("path", [b"/page.js", b"/v1/models", b"/openapi.json"])
def test_a_client_that_never_reads_is_closed(monkeypatch: pytest.MonkeyPatch, base: Path, path: bytes) -> None:
    monkeypatch.setattr(server_module, "WRITE_TIMEOUT", 0.2)
    with running_server(base) as server, contextlib.closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((server.host, server.port))
        connection.settimeout(PATIENCE)
        with pytest.raises(ConnectionError):  # and does not read: the requests are answered until there is no room
            for _ in range(100_000):
                connection.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
        wait_until(lambda: server.get("/health").status == 200)


def test_a_client_that_reads_slowly_gets_everything(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr(server_module, "WRITE_TIMEOUT", 1.0)
    with running_server(base) as server, contextlib.closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((server.host, server.port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        while piece := connection.recv(1024):
            received += piece
            time.sleep(0.01)
        assert json.loads(received.partition(b"\r\n\r\n")[2])["openapi"]


def test_one_connection_too_many_replaces_the_one_that_waits_longest(
    monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 4)
    with running_server(base) as server, contextlib.ExitStack() as stack:
        working = stack.enter_context(
            server.start_completion({"prompt": "The", "max_tokens": 30000, "stream": True, **ON})
        )
        assert b"200 OK" in working.recv(100)
        for _ in range(20):
            stack.enter_context(connect(server))
            assert server.get("/health").status == 200
        assert server.service.worker.num_active == 1
        while len(working.recv(2**16)) < 1000:
            pass  # the answer goes on


def test_requests_in_progress_are_all_kept(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    with running_server(base) as server, contextlib.ExitStack() as stack:
        body = {"prompt": "The", "max_tokens": 30000, "stream": True, **ON}
        for _ in range(2):
            assert b"200 OK" in stack.enter_context(server.start_completion(body)).recv(100)
        third = stack.enter_context(connect(server))
        assert read_all(third) == b"" and server.service.worker.num_active == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of another process is set on Linux only")
def test_connections_beyond_the_file_descriptors_are_closed_without_a_word(base: Path) -> None:
    """Whether most of them are free or nearly none."""
    import resource

    with ServerProcess(base) as server:
        used = len(list(Path(f"/proc/{server.renderer_process.pid}/fd").iterdir()))
        for limit in (2 * used + 60, used + 5):
            resource.prlimit(server.renderer_process.pid, resource.RLIMIT_NOFILE, (limit, limit))
            with contextlib.ExitStack() as stack:
                for _ in range(300):
                    with contextlib.suppress(OSError):
                        stack.enter_context(connect(server))
                assert limit < 2 * used or healthy(server)
            wait_until(lambda: healthy(server))
        server.send_signal()
        assert server.wait() == 0
        assert server.stderr.count("\n") < 10, server.stderr[:2000]


def test_a_body_that_is_awaited_at_the_end_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "SHUTDOWN_TIMEOUT", 0.2)
    with contextlib.ExitStack() as stack:
        with running_server(base) as server:
            half = stack.enter_context(connect(server))
            half.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            wait_until(lambda: server.middleware.buffered_body_bytes == 1)
        answer = read_all(half)
    assert answer.startswith(b"HTTP/1.1 503 ") and b'"code":"stopped"' in answer
    assert not [record for record in caplog.records if record.exc_info or "without" in record.message]


def test_health_is_answered_before_all_requests_that_wait_for_their_turn(
    monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    """A request whose turn has not come costs its headers only: of its body nothing is parsed."""
    go_on = threading.Event()

    async def wait(middleware: SecurityMiddleware) -> None:
        while not go_on.is_set():
            await asyncio.sleep(0.01)

    monkeypatch.setattr(SecurityMiddleware, "take_turn", wait)
    requests = {b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n": b"200", chunked([1] * 1000): b"413"}
    requests[b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 50 + b"\r\n"] = b"200"
    requests[b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx"] = b"405"
    with running_server(base) as server, contextlib.ExitStack() as stack:
        waiting = {stack.enter_context(connect(server)): status for status in requests.values() for _ in range(5)}
        for connection, request in zip(waiting, [request for request in requests for _ in range(5)], strict=True):
            connection.sendall(request)
        assert server.get("/health").status == 200
        for connection in waiting:
            connection.settimeout(0.01)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(PATIENCE)
        go_on.set()
        for connection, status in waiting.items():
            assert connection.recv(1000).startswith(b"HTTP/1.1 %b " % status)


# ---------------------------------------------------------------- bodies


def chunked(sizes: list[int]) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (size, b" " * size) for size in sizes)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"2\r\n{}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("sizes", "status"),
    [([1] * 1000, 413), ([1] * 100, 200), ([1000, *[1] * 250], 200), ([100] * 3000, 200), ([10] * 1000, 413)],
)
def test_small_chunks_are_limited(server: ThreadedServer, sizes: list[int], status: int) -> None:
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(chunked(sizes))
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert server.get("/health").status == 200


FLOODS: dict[str, Any] = {
    "parts": {"messages": [{"role": "user", "content": [{}] * 1000}] * 1000},
    "part texts": {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}] * 30_000}]},
    "messages": {"messages": [{}] * 100_000},
    "numbers": {"messages": [1] * 1_000_000},
    "stop": {"messages": [{"role": "user", "content": "x"}], "stop": [1] * 1_000_000},
    "biases": {"messages": [{"role": "user", "content": "x"}], "logit_bias": {str(i): "x" for i in range(200_000)}},
    "prompt": {"prompt": [[""] * 10] * 100_000},
    "prompts": {"prompt": [{}] * 100_000},
    "input": {"input": [[1.5]] * 100_000},
    "tokens": {"tokens": [-1] * 100_000},
}


@pytest.mark.parametrize("name", FLOODS)
def test_errors_are_not_amplified(name: str) -> None:
    models = (
        protocol.ChatRequest, protocol.CompletionRequest, protocol.EmbeddingRequest, protocol.ClassifyRequest,
        protocol.TokenizeRequest, protocol.DetokenizeRequest,
    )  # fmt: skip
    for model in models:
        try:
            model.model_validate(FLOODS[name])
        except ValidationError as error:
            assert error.error_count() < 20, model.__name__


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"prompt": "café"}'.encode("latin-1"), "UTF-8"), (b'{"prompt": "\x80"}', "UTF-8"), (b"\x1f\x8b\x08\x00", "UTF-8"),
        ("{}".encode("utf-16-le")[:3], "the body is not JSON"), (b"[" * 100_000, "recursion"),
        (b"\xef\xbb\xbf[", "the body is not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "number out of range"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_is_refused_with_the_reason(server: ThreadedServer, body: bytes, words: str) -> None:
    answer = server.post("/v1/completions", body)
    assert answer.status == 400 and words in answer.error["message"], answer.body


def test_an_encoded_body_is_refused_by_its_encoding(server: ThreadedServer) -> None:
    for encoding in ("gzip", "br", "Deflate", "gzip, identity", "x" * 200):
        answer = server.post("/v1/completions", b"x", **{"Content-Encoding": encoding})
        assert answer.status == 415 and encoding.lower()[:40] in answer.error["message"]
    assert (
        server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, **{"Content-Encoding": "identity"}).status
        == 200
    )


def test_head_is_answered_as_get_without_a_body(server: ThreadedServer) -> None:
    paths = server.get("/openapi.json").json["paths"]
    readable = [path.replace("{name}", server.service.name) for path in paths if "get" in paths[path]]
    assert "/health" in readable and "/metrics" in readable
    for path in (*readable, "/", "/page.js", "/openapi.json", "/nothing"):
        head, get = server.request("HEAD", path), server.get(path)
        assert (head.status, head.body) == (get.status, b""), path
        assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert server.request("HEAD", "/v1/completions").status == 405
    assert server.get("/v1/models/").json == server.get("/v1/models").json


# ---------------------------------------------------------------- work


def test_the_log_probabilities_of_a_request_and_of_all_are_limited(
    monkeypatch: pytest.MonkeyPatch, server: ThreadedServer
) -> None:
    monkeypatch.setattr(engine_worker, "MAX_REQUEST_LOGPROBS", 100)
    for body in (
        {"prompt": "x", "max_tokens": 101, "logprobs": 0}, {"prompt": "x", "max_tokens": 10, "logprobs": 10},
        {"prompt": "x", "max_tokens": 10, "n": 6, "best_of": 11},
        {"prompt": [5] * 60, "max_tokens": 0, "logprobs": 1, "echo": True},
    ):  # fmt: skip
        for stream in (False, True):
            answer = server.post("/v1/completions", {**body, "stream": stream and "best_of" not in body})
            assert answer.status == 400 and answer.error["param"] == "logprobs", body
    assert server.complete("x", max_tokens=100, logprobs=0)["choices"]
    monkeypatch.setattr(engine_worker, "MAX_LOGPROBS", 150)
    answers: list[Any] = []
    with server.start_completion({"prompt": "x", "max_tokens": 100, "logprobs": 0, "stream": True, **ON}) as first:
        wait_until(lambda: server.service.worker.num_active == 1)
        answers.append(server.post("/v1/completions", {"prompt": "x", "max_tokens": 99, "logprobs": 0}))
        read_until = b""
        while b"[DONE]" not in read_until:
            read_until += first.recv(2**16)
    assert answers[0].status in (200, 429)  # refused, unless the first had ended
    wait_until(lambda: not server.service.worker.handles)
    assert server.complete("x", max_tokens=99, logprobs=0)["choices"]


def test_spaces_beside_a_token_that_takes_them_are_no_work() -> None:
    """A quadratic search would take an hour for so many."""
    tokenizer = train_bpe(["The house"] * 3, 300).with_special_tokens(["<x>"])
    content = json.loads(tokenizer.backend.to_str())
    for token in content["added_tokens"]:
        token["rstrip"] = token["lstrip"] = token["content"] == "<x>"
    made = Tokenizer(type(tokenizer.backend).from_str(json.dumps(content)), tokenizer.config)

    async def look() -> list[int]:
        chat = JinjaChatEncoder(made, "a {{ messages[0].content }}<x>  {{ messages[0].role }}")
        try:
            return await chat.encode([{"role": "user", "content": " " * 1_000_000 + "b" + " " * 1_000_000}])
        finally:
            await chat.close()

    ids = asyncio.run(look())
    assert ids[-1 - len(made.encode("user")) :] == [made.special_tokens["<x>"], *made.encode("user")]
    assert made.decode(ids).rstrip().endswith("b" + "user")


# ---------------------------------------------------------------- many clients, with a clock

ATTACK_SECONDS = float(os.environ.get("NEXTWORD_ATTACK_SECONDS", "5"))


def resident_bytes(processes: Iterable[int]) -> int:
    """The resident memory of processes."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            status = Path(f"/proc/{process}/status").read_text()
            total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    return total


@pytest.mark.needs("more time")
@pytest.mark.skipif(
    sys.platform != "linux", reason="the memory and the limits of another process are known on Linux only"
)
@pytest.mark.parametrize(
    ("name", "reads", "descriptors"),
    [
        *((name, reads, 1024) for name in ATTACKS for reads in ("reads", "ignores")),
        *((name, "ignores", 100) for name in ("silence", "pipelined files", "wrong keys", "giant JSON")),
    ],
)
def test_many_clients_without_a_key_do_not_keep_others_from_the_server(
    base: Path, name: str, reads: str, descriptors: int
) -> None:
    import resource

    with ServerProcess(base, "--api-key", "a secret") as server:
        process = server.renderer_process.pid
        resource.prlimit(process, resource.RLIMIT_NOFILE, (descriptors, descriptors))
        children = Path(f"/proc/{process}/task/{process}/children")
        before, slowest, most, answers = resident_bytes([process]), 0.0, 0, 0
        script = Path(__file__).with_name("attackers.py")
        attackers = start_process(
            [sys.executable, script, server.host, str(server.port), name, reads, str(ATTACK_SECONDS)]
        )
        while attackers.poll() is None:
            start = time.monotonic()
            while not healthy(server):
                pass  # a newer connection has replaced this one before its request was read: clients try again
            slowest = max(slowest, time.monotonic() - start)
            most = max(most, resident_bytes([process, *map(int, children.read_text().split())]))
            answers += 1
            time.sleep(0.02)
        assert attackers.returncode == 0
        attackers = start_process([sys.executable, script, server.host, str(server.port), name, reads, "30"])
        time.sleep(1)
        server.send_signal()
        assert server.wait() == 0
        kill(attackers)
        print(
            f"\n{name}, {reads}: /health within {slowest:.2f} s ({answers} times), {(most - before) / 1e6:.0f} MB more"
        )
        assert slowest < 2 and most - before < 1e9 and answers > 5
        assert "Traceback" not in server.stderr and server.stderr.count("\n") < 10, server.stderr[:2000]
