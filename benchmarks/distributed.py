"""Several processes beside one: `python -m benchmarks.distributed`, on a machine that does nothing else.

The same run, in turn: one process with two threads, two processes with one thread each (torchrun), and two such that work on
each matrix together. A step's seconds are the middle of a run's, looks at held-out text and checkpoints left out.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.run import DATA, KEPT, cell, spread

TIMES = 3
STEPS = 60
SIZES = ("tiny", "mini")
WAYS = ((1, 1), (2, 1), (2, 2))  # processes, and how many of them work on each matrix together


def step_seconds(run: Path, shards: Path, size: str, processes: int, tensor: int) -> float:
    """Train anew in `run`; the middle of its steps' seconds."""
    shutil.rmtree(run, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    program = [sys.executable, *launcher, "-m", "nextword", "pretrain", str(shards), "--out", str(run), "--quiet"]
    settings = {
        "steps": STEPS,
        "size": size,
        "training.batch-tokens": 8192,
        "training.evaluations": 1,
        "training.compile": "no",
        "training.tensor": tensor,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
    words = [*program, *(f"--{name}={value}" for name, value in settings.items())]
    subprocess.run(words, check=True, capture_output=True, env=environment)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["tokens_per_second"] for record in records if "lr" in record][10:]
    return 8192 / statistics.median(rates)


def measure(size: str) -> list[list[float]]:
    shards, run = KEPT / "scaling" / "shards", KEPT / "scaling" / "run"
    if not shards.exists():
        text = DATA / "small_languages" / "swahili"
        subprocess.run([sys.executable, "-m", "nextword", "prepare", str(text), "--out", str(shards)], check=True)
    return [[step_seconds(run, shards, size, *way) for way in WAYS] for _ in range(TIMES)]


def main() -> None:
    print("\n| size | one process: seconds a step | two | rate | two to a matrix | rate |\n|---|---|---|---|---|---|")
    for size in sys.argv[1:] or SIZES:
        times = cell(f"sharing-{size}", lambda size=size: measure(size))
        one, *others = zip(*times, strict=True)
        columns = [f"{spread(o)} | {spread([a / b for a, b in zip(one, o, strict=True)], 2)}" for o in others]
        print(f"| {size} | {spread(one)} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
