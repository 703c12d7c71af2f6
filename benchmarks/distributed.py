"""Distributed training on one machine: `python -m benchmarks.distributed`, on an otherwise idle machine.

The same run, interleaved: one process with two threads, two processes with one thread each (torchrun), and two processes with
tensor parallelism. The seconds per step are the median of a run, without validation and checkpoints.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.run import CACHE_DIR, DATA, cached, median_with_range

ROUNDS = 3
STEPS = 60
SIZES = ("tiny", "mini")
LAYOUTS = ((1, 1), (2, 1), (2, 2))  # number of processes, size of tensor parallelism


def step_seconds(run: Path, shards: Path, size: str, processes: int, tensor: int) -> float:
    """Train a new run; the median of the seconds per step."""
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
    command = [*program, *(f"--{name}={value}" for name, value in settings.items())]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["tokens_per_second"] for record in records if "lr" in record][10:]
    return 8192 / statistics.median(rates)


def measure(size: str) -> list[list[float]]:
    shards, run = CACHE_DIR / "distributed" / "shards", CACHE_DIR / "distributed" / "run"
    if not shards.exists():
        text = DATA / "small_languages" / "swahili"
        subprocess.run([sys.executable, "-m", "nextword", "prepare", str(text), "--out", str(shards)], check=True)
    return [[step_seconds(run, shards, size, *layout) for layout in LAYOUTS] for _ in range(ROUNDS)]


def main() -> None:
    print(
        "\n| size | one process: seconds per step | two processes | relative speed | two, tensor parallel | relative speed |\n"
        "|---|---|---|---|---|---|"
    )
    for size in sys.argv[1:] or SIZES:
        times = cached(f"distributed-{size}", lambda size=size: measure(size))
        single, *others = zip(*times, strict=True)
        columns = [
            f"{median_with_range(o)} | {median_with_range([a / b for a, b in zip(single, o, strict=True)], 2)}"
            for o in others
        ]
        print(f"| {size} | {median_with_range(single)} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
