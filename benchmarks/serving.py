"""The server under load: `python -m benchmarks.serving NAME MODEL [options]`.

    soak        64 streaming clients for five minutes, a fifth of which disconnect early: every completion equals that of a
                single request, no response is a 5xx, memory does not grow, and no slot is lost
    crowd       100 slow readers and 100 half-open connections: the 95th percentile of other clients less than doubles
    throughput  tokens per second with 1, 4, 16 and 32 clients, time to first token and inter-token latency, compared with the
                servers of llama.cpp and transformers; MODEL is fine-tuned on conversations or has a chat template

Each prints its results, and exits with 1 if a condition does not hold. Fuzzing is part of `make soak`. Other servers are
installed in their own environments under build/bench/peers on first use. --peer "NAME=COMMAND" adds one; {model}, {gguf},
{port}, {threads}, {context} and {contexts} (the context length times the largest number of clients) are substituted.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.run import CACHE_DIR
from benchmarks.serving_client import (
    Body,
    NextwordServer,
    ServerProcess,
    StreamResult,
    free_port,
    read_status,
    send,
    stream_completion,
)
from benchmarks.speed import THREADS, interpreter
from nextword.pipeline.language_model import resolve_model_dir

WORDS = " ".join(path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*.md"))).split()
ENDLESS = {"logit_bias": {"0": -100}, "temperature": 1.0}  # token 0 ends a text in our tokenizers


def make_requests(count: int, generator: random.Random, context: int) -> list[Body]:
    """Requests of mixed lengths, greedy and sampled, some of them longer than the context."""
    bodies = []
    for number in range(count):
        start = generator.randrange(len(WORDS) - 100)
        prompt = " ".join(WORDS[start : start + generator.choice((1, 5, 20, 60))])
        length = generator.choice((5, 20, 60, context // 2, context))
        bodies.append(
            {
                "prompt": prompt[: context // 2],
                "max_tokens": length,
                "seed": number,
                "temperature": generator.choice((0, 0.7, 1.0)),
            }
        )
    return bodies


def percentile(values: list[float], share: float = 0.95) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# ---------------------------------------------------------------- soak


@dataclass
class Soak:
    """Clients that send requests in a loop, and their results.

    Attributes:
        expected: The result of each request while the server is otherwise idle.
    """

    server: NextwordServer
    requests: list[Body]
    expected: list[StreamResult]
    statuses: Counter[int] = field(default_factory=Counter)
    finished: int = 0
    disconnected: int = 0
    different: int = 0

    async def client(self, generator: random.Random, until: float) -> None:
        while time.monotonic() < until:
            number = generator.randrange(len(self.requests))
            disconnects = generator.random() < 0.2
            stream = await stream_completion(
                self.server.port, self.requests[number], generator.randint(1, 10) if disconnects else None
            )
            self.statuses[stream.status] += 1
            if stream.status == 429:
                await asyncio.sleep(generator.random())
            elif stream.finish_reason is None:
                self.disconnected += 1
            elif stream.status == 200:
                expected = self.expected[number]
                self.finished += 1
                self.different += (stream.text, stream.finish_reason) != (expected.text, expected.finish_reason)

    async def run(self, clients: int, seconds: float) -> list[int]:
        """Resident memory in bytes, once a second."""
        until, memory = time.monotonic() + seconds, []
        tasks = [asyncio.create_task(self.client(random.Random(i), until)) for i in range(clients)]
        while not all(task.done() for task in tasks):
            memory.append(self.server.memory())
            await asyncio.sleep(1)
        await asyncio.gather(*tasks)
        return memory


async def soak(args: argparse.Namespace) -> bool:
    with NextwordServer(args.model, "--deterministic", "--max-batch", "8", "--queue", str(args.clients)) as server:
        requests = make_requests(40, random.Random(0), server.metadata["context_length"])
        expected = [await stream_completion(server.port, body) for body in requests]
        work = Soak(server, requests, expected)
        memory = await work.run(args.clients, 60 * args.minutes)
        end = time.monotonic() + 10
        while (metrics := server.metrics())["nextword_requests_open"] and time.monotonic() < end:
            await asyncio.sleep(0.1)
        slots = server.metadata["slots"]
        repeated = await asyncio.gather(
            *(stream_completion(server.port, requests[i % len(requests)]) for i in range(slots))
        )
        warmup, rest = memory[len(memory) // 5 : len(memory) // 3 + 1], memory[len(memory) // 3 :]
        growth = max(rest) / statistics.median(warmup) - 1
        result = {
            "finished": work.finished,
            "different": work.different,
            "disconnected": work.disconnected,
            "statuses": dict(work.statuses),
            "memory_mb": round(statistics.median(warmup) / 2**20),
            "growth": round(growth, 4),
            "texts_held": metrics["nextword_texts_held"],
            "running": metrics["nextword_texts_running"],
            "slots": metrics["nextword_slots"],
            "disconnects_counted_by_server": metrics["nextword_clients_left_total"],
        }
    print(json.dumps(result))
    complete = all(stream.finish_reason for stream in (*expected, *repeated))
    slots_freed = result["texts_held"] == result["running"] == 0 and result["slots"] == slots
    return (
        complete and slots_freed and not work.different and not any(s >= 500 for s in work.statuses) and growth < 0.05
    )


# ---------------------------------------------------------------- crowd


async def read_slowly(port: int, reading: Counter[str]) -> None:
    """Read 2 KB per second of a response that is larger than the socket buffers."""
    reader, writer = await send(
        port, {"prompt": "The", "max_tokens": 1200, "logprobs": 5, **ENDLESS}, receive_buffer=4096
    )
    try:
        if (status := await read_status(reader)) != 200:
            raise SystemExit(f"a slow reader received status {status}")
        reading["now"] += 1
        while await reader.read(1024):
            await asyncio.sleep(0.5)
        reading["now"] -= 1
    finally:
        writer.close()


async def half_open(port: int) -> None:
    """Send half of a request; reconnect when the server closes the connection."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
        await reader.read()
        writer.close()


async def latencies(port: int, clients: int, seconds: float) -> list[float]:
    """Latencies of short requests of closed-loop clients, in seconds."""
    until, results = time.monotonic() + seconds, []

    async def client(number: int) -> None:
        while time.monotonic() < until:
            stream = await stream_completion(port, {"prompt": WORDS[number], "max_tokens": 16, "seed": 1, **ENDLESS})
            assert stream.status == 200, stream.status
            results.append(time.monotonic() - stream.requested)

    await asyncio.gather(*map(client, range(clients)))
    return results


async def crowd(args: argparse.Namespace) -> bool:
    with NextwordServer(args.model, "--queue", "256") as server:
        await latencies(server.port, args.clients, 3)  # warmup
        before = await latencies(server.port, args.clients, args.seconds)
        reading: Counter[str] = Counter()
        tasks = [asyncio.create_task(read_slowly(server.port, reading)) for _ in range(args.slow)]
        tasks += [asyncio.create_task(half_open(server.port)) for _ in range(args.half_open)]
        end = time.monotonic() + 600
        while (
            reading["now"] < args.slow or server.metrics()["nextword_texts_held"]
        ):  # until all sequences are generated and wait for their readers
            await asyncio.sleep(0.5)
            if time.monotonic() > end:
                raise SystemExit("the sequences of the slow readers were not generated in ten minutes")
        during = await latencies(server.port, args.clients, args.seconds)
        open_requests = server.metrics()["nextword_requests_open"]
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
    p95 = [percentile(results) for results in (before, during)]
    print(
        json.dumps(
            {
                "p95_before": p95[0],
                "p95_during": p95[1],
                "ratio": p95[1] / p95[0],
                "still_reading": reading["now"],
                "open_in_the_server": open_requests,
            }
        )
    )
    return p95[1] < 2 * p95[0] and reading["now"] == args.slow


# ---------------------------------------------------------------- throughput


@contextlib.contextmanager
def peer(command: str, args: argparse.Namespace, gguf: Path, context: int) -> Iterator[ServerProcess]:
    port = free_port()
    values = {"model": resolve_model_dir(args.model).resolve(), "gguf": gguf, "threads": THREADS}
    program = [
        word.format(**values, port=port, context=context, contexts=context * max(args.num_clients))
        for word in shlex.split(command)
    ]
    with ServerProcess(program, port, OMP_NUM_THREADS=str(THREADS)) as server:
        server.wait_until_ready()
        yield server


def known_peers() -> dict[str, str]:
    """Other servers, started as their documentation describes, in float32."""
    transformers = shlex.quote(str(Path(sys.executable).with_name("transformers")))
    transformers += " serve {model} --port {port} --device cpu --dtype float32"
    llama = f"{shlex.quote(interpreter('llama-server'))} -m llama_cpp.server"
    llama += " --model {gguf} --port {port} --n_ctx {context} --n_threads {threads} --interrupt_requests false"
    return {
        "llama_cpp.server": llama,
        "transformers serve": transformers,
        "transformers serve, continuous batching": transformers + " --continuous-batching",
    }


async def measure_clients(port: int, model: str, clients: int, args: argparse.Namespace) -> dict[str, Any]:
    """Latencies and completions of closed-loop clients."""
    generator = random.Random(clients)
    starts = [generator.randrange(len(WORDS) - 100) for _ in range(clients * args.rounds)]
    prompts = [" ".join(WORDS[i : i + 20])[: args.characters] for i in starts]
    bodies = [{"model": model, "prompt": prompt, "max_tokens": args.tokens, "temperature": 0} for prompt in prompts]

    async def client(number: int) -> list[StreamResult]:
        return [await stream_completion(port, body) for body in bodies[number::clients]]

    start = time.monotonic()
    streams = [stream for group in await asyncio.gather(*map(client, range(clients))) for stream in group]
    seconds = time.monotonic() - start
    if failed := [stream.status for stream in streams if stream.status != 200 or not stream.finish_reason]:
        raise SystemExit(f"{len(failed)} of {len(streams)} requests failed: {Counter(failed)}")
    # A text that ends immediately has no first token.
    return {
        "texts": [stream.text for stream in streams],
        "seconds": seconds,
        "first_token": [stream.time_to_first_token for stream in streams if stream.arrivals],
        "inter_token": [gap for stream in streams for gap in stream.inter_token_latencies],
    }


async def throughput(args: argparse.Namespace) -> bool:
    from nextword.data.tokenizer import Tokenizer
    from nextword.export.formats import write_gguf

    directory = resolve_model_dir(args.model).resolve()
    tokenizer = Tokenizer.open(directory)
    context = json.loads((directory / "config.json").read_text()).get("max_position_embeddings", args.context)
    gguf = CACHE_DIR / "serving.gguf"
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    commands = dict(peer.split("=", 1) for peer in args.peer)
    if not args.only_peers:
        commands |= known_peers()
    if any("{gguf}" in command for command in commands.values()):
        write_gguf(directory, gguf)
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):  # interleaved, so that changes in machine speed affect all alike
        for name in ("nextword", *commands):
            server_process = (
                NextwordServer(args.model, "--max-batch", "32", "--model-name", str(directory))
                if name == "nextword"
                else peer(commands[name], args, gguf, context)
            )
            with server_process as server:
                await measure_clients(server.port, str(directory), 1, args)  # warmup
                for clients in args.num_clients:
                    results.setdefault((name, clients), []).append(
                        await measure_clients(server.port, str(directory), clients, args)
                    )
    print(
        "| server | clients | tokens per second | time to first token, ms: median, 95th percentile | time between tokens, ms: "
        "median, 95th percentile |"
    )
    print("|---|---|---|---|---|")
    rates = {}
    for (name, clients), measurements in results.items():
        # Counted by one tokenizer, because a server may send several tokens in one event.
        rates_measured = [sum(len(tokenizer.encode(text)) for text in m["texts"]) / m["seconds"] for m in measurements]
        rates[name, clients] = statistics.median(rates_measured)
        first, between = ([1000 * v for m in measurements for v in m[key]] for key in ("first_token", "inter_token"))
        print(
            f"| {name} | {clients} | {rates[name, clients]:,.0f} ({min(rates_measured):,.0f}–{max(rates_measured):,.0f}) | "
            f"{statistics.median(first):,.1f}, {percentile(first):,.1f} | "
            f"{statistics.median(between):,.1f}, {percentile(between):,.1f} |"
        )
    faster = [
        (name, clients)
        for (name, clients), rate in rates.items()
        if rate > rates["nextword", clients] and (clients >= 4 or name.startswith("transformers"))
    ]
    print(f"faster than nextword: {faster or 'none'}")
    return not faster


def main() -> None:
    parser = argparse.ArgumentParser(description="The server under load", allow_abbrev=False)
    parser.add_argument("name", choices=("soak", "crowd", "throughput"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=None, help="soak: 64; crowd: 8")
    parser.add_argument("--minutes", type=float, default=5, help="soak")
    parser.add_argument("--seconds", type=float, default=30, help="crowd: duration of each of the two measurements")
    parser.add_argument("--slow", type=int, default=100, help="crowd: slow readers")
    parser.add_argument("--half-open", type=int, default=100, help="crowd: connections")
    parser.add_argument(
        "--num-clients", type=int, nargs="+", default=[1, 4, 16, 32], help="throughput: numbers of clients"
    )
    parser.add_argument("--rounds", type=int, default=4, help="throughput: requests per client")
    parser.add_argument("--repeats", type=int, default=3, help="throughput: interleaved measurements of each server")
    parser.add_argument("--tokens", type=int, default=64, help="throughput: tokens per completion")
    parser.add_argument("--characters", type=int, default=120, help="throughput: maximum length of a prompt")
    parser.add_argument("--context", type=int, default=1024, help="throughput: context length, if config.json has none")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=COMMAND", help="throughput: another server"
    )
    parser.add_argument("--only-peers", action="store_true", help="throughput: only the servers of --peer")
    args = parser.parse_args()
    args.clients = args.clients or {"soak": 64}.get(args.name, 8)
    function = {"soak": soak, "crowd": crowd, "throughput": throughput}[args.name]
    sys.exit(not asyncio.run(function(args)))


if __name__ == "__main__":
    main()
