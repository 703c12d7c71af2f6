"""Compare the speed of two checkouts: ``python -m benchmarks.compare_checkouts OTHER_CHECKOUT [NAME ...] [--rounds 12]``.

Names: train, train-tiny, decode, decode-small, serve, first-token, help. Both checkouts run the same work in processes of their
own that take turns, round by round, and start again every four rounds. The table shows the median of the ratios of the pairs,
this checkout over the other, with their range: above 1, this checkout is faster.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
PRECISIONS = ("float32", "int8", "int4")
SHAPES: dict[str, dict[str, Any]] = {
    "train": {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": 256},
    "train-tiny": {"n_layers": 4, "n_heads": 4, "d_model": 128, "context_length": 128},
    "decode": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257},
    "decode-small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 1024, "vocab_size": 8192},
}
STEPS = {"train": 8, "train-tiny": 60}
TOKENS = {"decode": 64, "decode-small": 800}
ROUNDS_PER_PROCESS = 4
NAMES = (*SHAPES, "serve", "first-token", "help")
Rates = dict[str, float]


# ---------------------------------------------------------------- one checkout: rates of a round, by what is measured


def train(name: str, directory: Path) -> Iterator[Rates]:
    """Optimizer steps a second of a short run, without its start."""
    import nextword

    batch = {"batch_tokens": 4096 if name == "train" else 2048, "evaluations": 1}
    while True:
        with tempfile.TemporaryDirectory() as out:
            run = Path(out) / "run"
            nextword.pretrain(directory / "shards", run, steps=STEPS[name], model=SHAPES[name], training=batch)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            seconds = [line["seconds"] for line in lines if "lr" in line]
            yield {name: 1 / statistics.median(b - a for a, b in itertools.pairwise(seconds))}


def decode(name: str, directory: Path) -> Iterator[Rates]:
    """Generated tokens a second of one text, by precision."""
    import nextword

    models = {precision: nextword.load(directory / name, precision=precision) for precision in PRECISIONS}
    while True:
        rates = {}
        for precision, model in models.items():
            started = time.perf_counter()
            completion = model.generate("The", max_tokens=TOKENS[name], temperature=0)[0]
            rates[f"{name}, {precision}"] = len(completion.tokens) / (time.perf_counter() - started)
        yield rates


def serve(_: str, directory: Path) -> Iterator[Rates]:
    """Generated tokens a second of 16 clients."""
    command = [sys.executable, "-m", "nextword", "serve", str(directory / "run"), "--port", "0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]

    def complete(number: int) -> int:
        body = {"prompt": f"The {number}", "max_tokens": 48, "temperature": 1.0, "seed": number}
        request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=300) as response:
            return json.load(response)["usage"]["completion_tokens"]

    try:
        with ThreadPoolExecutor(16) as clients:
            while True:
                started = time.perf_counter()
                tokens = sum(clients.map(complete, range(96)))
                yield {"serve, 16 clients": tokens / (time.perf_counter() - started)}
    finally:
        server.terminate()
        server.wait()


def command(name: str, directory: Path) -> Iterator[Rates]:
    """Whole processes a second: the help, or a first token."""
    words = (
        ["--help"] if name == "help" else ["generate", str(directory / "run"), "The", "--max-tokens", "1", "--quiet"]
    )
    while True:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nextword", *words], check=True, stdout=subprocess.DEVNULL)
        yield {name: 1 / (time.perf_counter() - started)}


WORK: dict[str, Callable[[str, Path], Iterator[Rates]]] = {
    "train": train,
    "train-tiny": train,
    "decode": decode,
    "decode-small": decode,
    "serve": serve,
    "first-token": command,
    "help": command,
}


def work(name: str, directory: Path) -> None:
    """Measure a round for each line of standard input."""
    rounds = WORK[name](name, directory)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the work prints does not get among the results
    for _ in sys.stdin:
        print(json.dumps(next(rounds)), file=results, flush=True)
    rounds.close()  # type: ignore[attr-defined]  # a generator


# ---------------------------------------------------------------- both checkouts


def make_models(directory: Path) -> None:
    """A corpus, a small trained model, and models of random weights."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    import nextword

    nextword.prepare("python-docs", directory / "shards", vocab_size=2048)
    model = {"n_layers": 4, "n_heads": 4, "d_model": 128, "context_length": 128}
    nextword.pretrain(directory / "shards", directory / "run", steps=20, model=model)
    for name in ("decode", "decode-small"):
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**SHAPES[name], bos_token_id=None, eos_token_id=None)).save_pretrained(
            directory / name
        )
        AutoTokenizer.from_pretrained(directory / "run" / "model").save_pretrained(directory / name)


@contextmanager
def worker(checkout: Path, name: str, directory: Path) -> Iterator[Callable[[], Rates]]:
    """A process that measures a round at each call."""
    threads = str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else str(os.cpu_count())
    environment = {**os.environ, "PYTHONPATH": f"{checkout / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": threads}
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.compare_checkouts", "--work", name, str(directory)]
    process = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=directory
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def measure() -> Rates:
        print(file=stdin, flush=True)
        return json.loads(stdout.readline())

    try:
        measure()  # a warm-up
        yield measure
    finally:
        stdin.close()
        process.wait()


def compare(other: Path, name: str, rounds: int, directory: Path) -> dict[str, list[tuple[float, float]]]:
    """The rates of this checkout and of the other, by what is measured, in pairs."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for first in range(0, rounds, ROUNDS_PER_PROCESS):
        with worker(ROOT, name, directory) as this_round, worker(other, name, directory) as other_round:
            for number in range(first, min(first + ROUNDS_PER_PROCESS, rounds)):
                if number % 2:
                    theirs, ours = other_round(), this_round()
                else:
                    ours, theirs = this_round(), other_round()
                for key, rate in ours.items():
                    pairs.setdefault(key, []).append((rate, theirs[key]))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of another version")
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], default=[], help="what to measure. Default: all")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of rounds. Default: 12")
    given: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_models(directory)
        print("| work | this, per second | other, per second | ratio of a pair, median (range) |\n|---|---|---|---|")
        for name in given.names or NAMES:
            for key, pairs in compare(given.other.resolve(), name, given.rounds, directory).items():
                ours, theirs = (statistics.median(rates) for rates in zip(*pairs, strict=True))
                ratios = sorted(a / b for a, b in pairs)
                spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})"
                print(f"| {key} | {ours:.4g} | {theirs:.4g} | {spread} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
