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

from conftest import command
from nextword.console import Console
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.stock import save_model
from nextword.serving.guard import Guard
from nextword.serving.server import Place, configured, run
from nextword.serving.service import Service, Settings
from nextword.text.tokenizer import Tokenizer
from processes import PATIENCE, kill, launch


class Answer:
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
    def events(self) -> list[Any]:
        """What a stream has said, without its last word."""
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Server:
    """What can be asked of a server by hand."""

    def __init__(self, url: str):
        self.url = url
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 0

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        with contextlib.closing(self.connect()) as connection:
            data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            return Answer(connection.getresponse())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, headers)

    def complete(self, prompt: Any = "The", **settings: Any) -> Any:
        """The answer of /v1/completions, which is expected to be one."""
        answer = self.post("/v1/completions", {"prompt": prompt, **settings})
        assert answer.status == 200, answer.body
        return answer.json

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").body.decode().splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[1])

    def begin(self, body: Any, room: int | None = None) -> socket.socket:
        """Ask for a completion and read nothing of the answer, for which the connection has so much room."""
        data = json.dumps(body).encode()
        head = f"Host: {self.host}:{self.port}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        made = socket.socket()
        if room is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        made.settimeout(PATIENCE)
        made.connect((self.host, self.port))
        made.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + data)
        return made


class Process(Server):
    """`nextword serve` in a process of its own, on a free port."""

    def __init__(self, *arguments: str | Path, **environment: str):
        self.process = launch(
            command("serve", *arguments, "--port", "0", "--json"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        try:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(self.process.communicate()[1])
            self.facts = json.loads(line)
        except BaseException:
            kill(self.process)
            raise
        super().__init__(self.facts["url"])

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        self.out, self.err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.process)


class Threaded(Server):
    """A server in a thread of this process."""

    def __init__(self, url: str, service: Service, guard: Guard, told: "queue.Queue[Any]"):
        super().__init__(url)
        self.service, self.guard, self.told = service, guard, told

    def failure(self) -> BaseException:
        """The error that the server has ended with."""
        return self.told.get(timeout=PATIENCE)

    @property
    def engine(self) -> Any:
        return self.service.worker.engine


@contextlib.contextmanager
def served(model: Path, place: Place | None = None, **settings: Any) -> Iterator[Threaded]:
    place = place or Place(port=0)
    service, told = Service(Settings(model, **settings), Console(quiet=True)), queue.Queue()
    server = configured(service, place)
    with contextlib.closing(place.listen()) as listening:
        # Connections have little room, so that it shows when somebody does not read.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)

        def work() -> None:
            try:
                asyncio.run(run(service, place, server, listening, Console(quiet=True), told.put))
            except BaseException as error:
                told.put(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            facts = told.get(timeout=PATIENCE)
            if isinstance(facts, BaseException):
                raise facts
            yield Threaded(facts["url"], service, server.config.app, told)  # pyright: ignore[reportArgumentType]
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
    assert not thread.is_alive()


def directory(path: Path, tokenizer: Tokenizer, preset: str = "modern", **sizes: int) -> Path:
    """A model directory with random weights."""
    torch.manual_seed(0)
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 128, **sizes}
    model = GPT(build_config(preset, vocab_size=tokenizer.vocab_size, **sizes))  # pyright: ignore[reportArgumentType]
    path.mkdir(parents=True, exist_ok=True)
    save_model(model, path, end_of_text=tokenizer.end_of_text, pad=tokenizer.pad, ends=sorted(tokenizer.ends))
    tokenizer.save(path, model.config.context_length)
    return path
