"""The server under load: `python -m benchmarks.serving NAME MODEL [options]`.

    soak        64 streaming clients for five minutes, a fifth of them leaving early: every finished text is its solo run's,
                nothing is a 5xx, memory stays flat, and no slot is lost
    crowd       100 slow readers and 100 half-open connections: the others' 95th percentile less than doubles
    throughput  tokens a second at 1, 4, 16 and 32 clients, time to the first token and between tokens, beside the servers of
                llama.cpp and transformers; MODEL has learned to converse or has a chat template

Each prints what it found, and leaves with 1 where it is not so. Requests that nobody would think of are `make soak`'s. Peers
have environments of their own under build/bench/peers, made where they are not there; another one is --peer "NAME=COMMAND",
where {model}, {gguf}, {port}, {threads}, {context} and {contexts} (of as many texts as there are clients at most) stand for
themselves.
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

from benchmarks.run import KEPT
from benchmarks.serving_client import Body, Running, Seen, Served, free_port, send, status_of, talk
from benchmarks.speed import THREADS, interpreter
from nextword.pipeline.language_model import resolve_model_dir

WORDS = " ".join(path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*.md"))).split()
ENDLESS = {"logit_bias": {"0": -100}, "temperature": 1.0}  # does not end by itself, as far as our own tokenizers go


def requests(count: int, draw: random.Random, context: int) -> list[Body]:
    """Requests of mixed lengths, greedy and sampled. Their texts run over the context's end, too."""
    found = []
    for number in range(count):
        begin = draw.randrange(len(WORDS) - 100)
        prompt = " ".join(WORDS[begin : begin + draw.choice((1, 5, 20, 60))])
        length = draw.choice((5, 20, 60, context // 2, context))
        found.append({"prompt": prompt[: context // 2], "max_tokens": length, "seed": number,
                      "temperature": draw.choice((0, 0.7, 1.0))})  # fmt: skip
    return found


def percentile(values: list[float], share: float = 0.95) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# ---------------------------------------------------------------- soak


@dataclass
class Soak:
    """Clients that ask again and again, and what they found.

    Attributes:
        alone: what each of the requests gives while nothing else is asked.
    """

    server: Served
    asked: list[Body]
    alone: list[Seen]
    statuses: Counter[int] = field(default_factory=Counter)
    finished: int = 0
    left: int = 0
    different: int = 0

    async def client(self, draw: random.Random, until: float) -> None:
        while time.monotonic() < until:
            number = draw.randrange(len(self.asked))
            leaves = draw.random() < 0.2
            seen = await talk(self.server.port, self.asked[number], draw.randint(1, 10) if leaves else None)
            self.statuses[seen.status] += 1
            if seen.status == 429:
                await asyncio.sleep(draw.random())
            elif seen.finish_reason is None:
                self.left += 1
            elif seen.status == 200:
                expected = self.alone[number]
                self.finished += 1
                self.different += (seen.text, seen.finish_reason) != (expected.text, expected.finish_reason)

    async def run(self, clients: int, seconds: float) -> list[int]:
        """Bytes in memory, second by second."""
        until, memory = time.monotonic() + seconds, []
        tasks = [asyncio.create_task(self.client(random.Random(i), until)) for i in range(clients)]
        while not all(task.done() for task in tasks):
            memory.append(self.server.memory())
            await asyncio.sleep(1)
        await asyncio.gather(*tasks)
        return memory


async def soak(given: argparse.Namespace) -> bool:
    with Served(given.model, "--deterministic", "--max-batch", "8", "--queue", str(given.clients)) as server:
        asked = requests(40, random.Random(0), server.metadata["context_length"])
        alone = [await talk(server.port, body) for body in asked]
        work = Soak(server, asked, alone)
        memory = await work.run(given.clients, 60 * given.minutes)
        end = time.monotonic() + 10
        while (metrics := server.metrics())["nextword_requests_open"] and time.monotonic() < end:
            await asyncio.sleep(0.1)
        slots = server.metadata["slots"]
        again = await asyncio.gather(*(talk(server.port, asked[i % len(asked)]) for i in range(slots)))
        warm, rest = memory[len(memory) // 5 : len(memory) // 3 + 1], memory[len(memory) // 3 :]
        growth = max(rest) / statistics.median(warm) - 1
        result = {
            "finished": work.finished, "different": work.different, "left": work.left, "statuses": dict(work.statuses),
            "memory_mb": round(statistics.median(warm) / 2**20), "growth": round(growth, 4),
            "texts_held": metrics["nextword_texts_held"], "running": metrics["nextword_texts_running"],
            "slots": metrics["nextword_slots"], "left_as_the_server_saw": metrics["nextword_clients_left_total"],
        }  # fmt: skip
    print(json.dumps(result))
    whole = all(seen.finish_reason for seen in (*alone, *again))
    kept = result["texts_held"] == result["running"] == 0 and result["slots"] == slots
    return whole and kept and not work.different and not any(s >= 500 for s in work.statuses) and growth < 0.05


# ---------------------------------------------------------------- crowd


async def slow_reader(port: int, reading: Counter[str]) -> None:
    """Read 2 KB a second of an answer that is larger than what the system keeps of it."""
    reader, writer = await send(port, {"prompt": "The", "max_tokens": 1200, "logprobs": 5, **ENDLESS}, room=4096)
    try:
        if (status := await status_of(reader)) != 200:
            raise SystemExit(f"a slow reader was answered {status}")
        reading["now"] += 1
        while await reader.read(1024):
            await asyncio.sleep(0.5)
        reading["now"] -= 1
    finally:
        writer.close()


async def half_open(port: int) -> None:
    """Begin a request and never end it; again when the server has had enough."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
        await reader.read()
        writer.close()


async def latencies(port: int, clients: int, seconds: float) -> list[float]:
    """Seconds that short requests take, asked for by some clients, each again and again."""
    until, found = time.monotonic() + seconds, []

    async def client(number: int) -> None:
        while time.monotonic() < until:
            seen = await talk(port, {"prompt": WORDS[number], "max_tokens": 16, "seed": 1, **ENDLESS})
            assert seen.status == 200, seen.status
            found.append(time.monotonic() - seen.asked)

    await asyncio.gather(*map(client, range(clients)))
    return found


async def crowd(given: argparse.Namespace) -> bool:
    with Served(given.model, "--queue", "256") as server:
        await latencies(server.port, given.clients, 3)  # warm
        before = await latencies(server.port, given.clients, given.seconds)
        reading: Counter[str] = Counter()
        made = [asyncio.create_task(slow_reader(server.port, reading)) for _ in range(given.slow)]
        made += [asyncio.create_task(half_open(server.port)) for _ in range(given.half_open)]
        end = time.monotonic() + 600
        while reading["now"] < given.slow or server.metrics()["nextword_texts_held"]:  # until they wait to be read
            await asyncio.sleep(0.5)
            if time.monotonic() > end:
                raise SystemExit("the slow readers' texts were not written in ten minutes")
        during = await latencies(server.port, given.clients, given.seconds)
        open_ = server.metrics()["nextword_requests_open"]
        for task in made:
            task.cancel()
        for outcome in await asyncio.gather(*made, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
    p95 = [percentile(found) for found in (before, during)]
    print(json.dumps({"p95_alone": p95[0], "p95_in_the_crowd": p95[1], "ratio": p95[1] / p95[0],
                      "still_reading": reading["now"], "of_them_open_in_the_server": open_}))  # fmt: skip
    return p95[1] < 2 * p95[0] and reading["now"] == given.slow


# ---------------------------------------------------------------- throughput


@contextlib.contextmanager
def peer(command: str, given: argparse.Namespace, gguf: Path, context: int) -> Iterator[Running]:
    port = free_port()
    words = {"model": resolve_model_dir(given.model).resolve(), "gguf": gguf, "threads": THREADS}
    program = [
        word.format(**words, port=port, context=context, contexts=context * max(given.at))
        for word in shlex.split(command)
    ]
    with Running(program, port, OMP_NUM_THREADS=str(THREADS)) as running:
        running.until_it_answers()
        yield running


def known_peers() -> dict[str, str]:
    """Each as its own documentation starts it, in float32."""
    transformers = shlex.quote(str(Path(sys.executable).with_name("transformers")))
    transformers += " serve {model} --port {port} --device cpu --dtype float32"
    llama = f"{shlex.quote(interpreter('llama-server'))} -m llama_cpp.server"
    llama += " --model {gguf} --port {port} --n_ctx {context} --n_threads {threads} --interrupt_requests false"
    return {
        "llama_cpp.server": llama, "transformers serve": transformers,
        "transformers serve, continuous batching": transformers + " --continuous-batching",
    }  # fmt: skip


async def at(port: int, model: str, clients: int, given: argparse.Namespace) -> dict[str, Any]:
    """What so many clients see who ask one request after the other."""
    draw = random.Random(clients)
    begins = [draw.randrange(len(WORDS) - 100) for _ in range(clients * given.rounds)]
    prompts = [" ".join(WORDS[i : i + 20])[: given.characters] for i in begins]
    bodies = [{"model": model, "prompt": prompt, "max_tokens": given.tokens, "temperature": 0} for prompt in prompts]

    async def client(number: int) -> list[Seen]:
        return [await talk(port, body) for body in bodies[number::clients]]

    began = time.monotonic()
    seen = [one for some in await asyncio.gather(*map(client, range(clients))) for one in some]
    seconds = time.monotonic() - began
    if wrong := [one.status for one in seen if one.status != 200 or not one.finish_reason]:
        raise SystemExit(f"{len(wrong)} of {len(seen)} requests were not answered: {Counter(wrong)}")
    # Of a text that ends at once there is nothing to wait for.
    return {"texts": [one.text for one in seen], "seconds": seconds, "first": [one.first for one in seen if one.came],
            "between": [gap for one in seen for gap in one.between]}  # fmt: skip


async def throughput(given: argparse.Namespace) -> bool:
    from nextword.data.tokenizer import Tokenizer
    from nextword.export.formats import write_gguf

    directory = resolve_model_dir(given.model).resolve()
    tokenizer = Tokenizer.open(directory)
    context = json.loads((directory / "config.json").read_text()).get("max_position_embeddings", given.context)
    gguf = KEPT / "serving.gguf"
    KEPT.mkdir(parents=True, exist_ok=True)
    commands = dict(one.split("=", 1) for one in given.peer)
    if not given.only_given:
        commands |= known_peers()
    if any("{gguf}" in command for command in commands.values()):
        write_gguf(directory, gguf)
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(given.turns):  # by turns, so that a change of the machine's speed meets them all
        for name in ("nextword", *commands):
            made = (
                Served(given.model, "--max-batch", "32", "--model-name", str(directory)) if name == "nextword"
                else peer(commands[name], given, gguf, context)
            )  # fmt: skip
            with made as server:
                await at(server.port, str(directory), 1, given)  # warm
                for clients in given.at:
                    found.setdefault((name, clients), []).append(await at(server.port, str(directory), clients, given))
    print("| | clients | tokens a second | first token, ms: median, 95 % | between tokens, ms: median, 95 % |")
    print("|---|---|---|---|---|")
    rates = {}
    for (name, clients), turns in found.items():
        # Counted by one tokenizer, since a server may put several tokens into one part.
        per_turn = [sum(len(tokenizer.encode(text)) for text in turn["texts"]) / turn["seconds"] for turn in turns]
        rates[name, clients] = statistics.median(per_turn)
        first, between = ([1000 * v for turn in turns for v in turn[key]] for key in ("first", "between"))
        print(f"| {name} | {clients} | {rates[name, clients]:,.0f} ({min(per_turn):,.0f} to {max(per_turn):,.0f}) | "
              f"{statistics.median(first):,.1f}, {percentile(first):,.1f} | "
              f"{statistics.median(between):,.1f}, {percentile(between):,.1f} |")  # fmt: skip
    behind = [
        (name, clients) for (name, clients), rate in rates.items()
        if rate > rates["nextword", clients] and (clients >= 4 or name.startswith("transformers"))
    ]  # fmt: skip
    print(f"ahead of nextword: {behind or 'none'}")
    return not behind


def main() -> None:
    parser = argparse.ArgumentParser(description="The server under load", allow_abbrev=False)
    parser.add_argument("name", choices=("soak", "crowd", "throughput"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=None, help="soak: 64; crowd: 8")
    parser.add_argument("--minutes", type=float, default=5, help="soak")
    parser.add_argument("--seconds", type=float, default=30, help="crowd: of each of the two measurements")
    parser.add_argument("--slow", type=int, default=100, help="crowd: slow readers")
    parser.add_argument("--half-open", type=int, default=100, help="crowd: connections")
    parser.add_argument("--at", type=int, nargs="+", default=[1, 4, 16, 32], help="throughput: numbers of clients")
    parser.add_argument("--rounds", type=int, default=4, help="throughput: requests of each client")
    parser.add_argument("--turns", type=int, default=3, help="throughput")
    parser.add_argument("--tokens", type=int, default=64, help="throughput: of each text")
    parser.add_argument("--characters", type=int, default=120, help="throughput: of each prompt, at most")
    parser.add_argument("--context", type=int, default=1024, help="throughput: where config.json does not say")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="throughput: one more")
    parser.add_argument("--only-given", action="store_true", help="throughput: only the peers of --peer")
    given = parser.parse_args()
    given.clients = given.clients or {"soak": 64}.get(given.name, 8)
    work = {"soak": soak, "crowd": crowd, "throughput": throughput}[given.name]
    sys.exit(not asyncio.run(work(given)))


if __name__ == "__main__":
    main()
