"""A server to be tested: a real process of its own, or one in a thread whose engine the test can reach."""

import asyncio
import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from conftest import nextword_command
from nextword.common.console import Console
from nextword.data.tokenizer import Tokenizer
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import save_model
from nextword.serving.app import ModelServer
from nextword.serving.config import ServerConfig
from nextword.serving.security import SecurityMiddleware, listen
from nextword.serving.service import Service
from processes import PATIENCE, kill, launch


class HTTPResult:
    """A response, read whole."""

    def __init__(self, response: http.client.HTTPResponse):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error

    @property
    def sse_events(self) -> list[Any]:
        """The events of a stream, without [DONE]."""
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class ServerClient:
    """What can be asked of a server by hand."""

    def __init__(self, url: str):
        self.url = url
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 0

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPResult:
        with contextlib.closing(self.connect()) as connection:
            data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            return HTTPResult(connection.getresponse())

    def get(self, path: str, **headers: str) -> HTTPResult:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> HTTPResult:
        return self.request("POST", path, body, headers)

    def complete(self, prompt: Any = "The", **settings: Any) -> Any:
        """The answer of /v1/completions, which is expected to be one."""
        answer = self.post("/v1/completions", {"prompt": prompt, **settings})
        assert answer.status == 200, answer.body
        return answer.json

    def metric(self, name: str, **headers: str) -> float:
        body = self.get("/metrics", **headers).body.decode()
        lines = [line for line in body.splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[1])

    def start_completion(self, body: Any, receive_buffer: int | None = None) -> socket.socket:
        """Ask for a completion and read nothing of the answer, for which the connection has so much room."""
        data = json.dumps(body).encode()
        head = f"Host: {self.host}:{self.port}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE)
        connection.connect((self.host, self.port))
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + data)
        return connection


class ServerProcess(ServerClient):
    """`nextword serve` in a process of its own, on a free port."""

    def __init__(self, *arguments: str | Path, **environment: str):
        self.renderer_process = launch(
            nextword_command("serve", *arguments, "--port", "0", "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            line = self.renderer_process.stdout.readline()
            if not line:
                raise RuntimeError(self.renderer_process.communicate()[1])
            self.server_info = json.loads(line)
        except BaseException:
            kill(self.renderer_process)
            raise
        super().__init__(self.server_info["url"])

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        self.renderer_process.send_signal(number)

    def wait(self) -> int:
        self.stdout, self.stderr = self.renderer_process.communicate(timeout=PATIENCE)
        return self.renderer_process.returncode

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.renderer_process)


class ThreadedServer(ServerClient):
    """A server in a thread of this process."""

    def __init__(self, url: str, service: Service, middleware: SecurityMiddleware, outcomes: "queue.Queue[Any]"):
        super().__init__(url)
        self.service, self.middleware, self.outcomes = service, middleware, outcomes

    def exit_error(self) -> BaseException:
        """The error that the server has ended with."""
        return self.outcomes.get(timeout=PATIENCE)

    @property
    def engine(self) -> Any:
        return self.service.worker.engine


@contextlib.contextmanager
def running_server(model: Path, **options: Any) -> Iterator[ThreadedServer]:
    config, outcomes = ServerConfig(model, port=0, **options), queue.Queue()
    service = Service(config, Console(quiet=True))
    server = ModelServer(service)
    with contextlib.closing(listen(config)) as listen_socket:
        # Connections have little room, so that it shows when somebody does not read.
        listen_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)

        def run_in_thread() -> None:
            try:
                asyncio.run(server.serve_model(listen_socket, outcomes.put))
            except BaseException as error:
                outcomes.put(error)

        thread = threading.Thread(target=run_in_thread)
        thread.start()
        try:
            server_info = outcomes.get(timeout=PATIENCE)
            if isinstance(server_info, BaseException):
                raise server_info
            yield ThreadedServer(server_info["url"], service, server.config.app, outcomes)  # pyright: ignore[reportArgumentType]
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
    assert not thread.is_alive()


def make_model_dir(path: Path, tokenizer: Tokenizer, preset: str = "modern", **sizes: int) -> Path:
    """A model directory with random weights."""
    torch.manual_seed(0)
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 128, **sizes}
    model = GPT(build_config(preset, vocab_size=tokenizer.vocab_size, **sizes))  # pyright: ignore[reportArgumentType]
    path.mkdir(parents=True, exist_ok=True)
    save_model(
        model,
        path,
        end_of_text_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        eos_token_ids=sorted(tokenizer.eos_ids),
    )
    tokenizer.save(path, model.config.context_length)
    return path
