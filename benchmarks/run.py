"""`make bench`: the tables of docs/benchmarks.md, measured on this machine and printed as Markdown.

    python -m benchmarks.run [NAME …]

Names: help, books, reference, languages, demo. The benchmarks of fine-tuning are in benchmarks/fine_tuning.py. Each measurement
is cached under build/bench, so that an interrupted benchmark resumes; remove that directory to measure again. The environment
variable `NEXTWORD_DATA` names the directory of the texts (default: ../shared/data).
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nextword.common.statistics import mean

DATA = Path(os.environ.get("NEXTWORD_DATA", "../shared/data"))
CACHE_DIR = Path("build/bench")
COMMANDS = (
    "",
    "demo",
    "plan",
    "prepare",
    "pretrain",
    "finetune",
    "transfer",
    "predict",
    "chat",
    "generate",
    "evaluate",
    "export",
    "report",
    "verify",
)


def cached(name: str, measure: Callable[[], Any]) -> Any:
    """A measurement by name: from the cache, or measured now and cached."""
    path = CACHE_DIR / f"{name}.json"
    if not path.exists():
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        value = measure()
        CACHE_DIR.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1))
    return json.loads(path.read_text())


def books() -> Path:
    """The directory of the text of the books, unpacked once."""
    folder = CACHE_DIR / "books" / "text"
    if not folder.is_dir():
        partial = folder.with_name("text.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(DATA / "books.tar.xz") as archive:
            safely: dict[str, Any] = (
                {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            )  # from Python 3.11.4 on
            archive.extractall(partial, **safely)
        partial.rename(folder)
    return folder


def process(program: list[str], threads: int | None = None) -> dict[str, Any]:
    """Run a program to its end: exit code, output, wall time, peak memory.

    A small process starts it: the peak memory of a child includes the memory of the process that it was forked from, and
    this one has imported torch.
    """
    code = (
        "import json, resource, subprocess, sys, time\n"
        "t = time.time(); p = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)\n"
        "print(json.dumps({'code': p.returncode, 'out': p.stdout, 'err': p.stderr[-2000:], 'wall': time.time() - t,\n"
        "  'peak_mb': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}))"
    )
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    return json.loads(subprocess.check_output([sys.executable, "-c", code, *program], env=environment))


def nextword(*arguments: str | Path, threads: int | None = None) -> dict[str, Any]:
    """Run nextword with --json: its result, and the wall time and peak memory of the whole process."""
    program = [sys.executable, "-m", "nextword", *map(str, arguments)]
    done = process(program, threads)
    if done["code"]:
        raise SystemExit(f"{' '.join(program)}\n{done['err']}")
    return {**json.loads(done["out"]), "wall": done["wall"], "peak_mb": done["peak_mb"]}


def median_with_range(values: Sequence[float], digits: int = 3) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def mean_with_margin(values: Sequence[float], format_spec: str) -> str:
    """The mean of runs with different seeds ± half of its 95 % confidence interval; without it if it is zero."""
    score = mean(values)
    margin = 0.0 if score.high is None else score.high - score.value
    return f"{score.value:{format_spec}}" + (f" ± {margin:{format_spec.lstrip('+')}}" if margin else "")


def help_times() -> None:
    def measure() -> dict[str, list[float]]:
        # Compiled to bytecode, as after an installation by pip.
        installed = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        times: dict[str, list[float]] = {}
        for _ in range(7):
            for command in COMMANDS:
                begin = time.perf_counter()
                program = [sys.executable, "-m", "nextword", *command.split(), "--help"]
                subprocess.run(program, check=True, capture_output=True, env=installed)
                times.setdefault(command, []).append(time.perf_counter() - begin)
        return times

    print("\n| command | seconds: median of seven (range) |\n|---|---|")
    for command, times in cached("help", measure).items():
        print(f"| `nextword {command + ' ' if command else ''}--help` | {median_with_range(times, 2)} |")


def book_preparation() -> None:
    folder = CACHE_DIR / "books"

    def measure() -> list[dict[str, Any]]:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        runs = [nextword("prepare", books(), "--out", folder / "shards", "--json", "--quiet") for _ in range(2)]
        keep = ("wall", "peak_mb", "documents", "train", "validation", "vocab_size")
        interpreter_mb = process([sys.executable, "-c", "pass"])["peak_mb"]
        return [{"interpreter_mb": interpreter_mb, **{k: run[k] for k in keep}} for run in runs]

    print("\n| run | seconds | peak MB above the interpreter |\n|---|---|---|")
    for name, run in zip(("first", "second"), cached("books", measure), strict=True):
        print(f"| {name} | {run['wall']:.1f} | {run['peak_mb'] - run['interpreter_mb']:.0f} |")


def reference_run() -> None:
    text = DATA / "tinyshakespeare"

    def run_nextword(seed: int) -> dict[str, Any]:
        out = CACHE_DIR / f"reference-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        return nextword(
            "pretrain", text, "--recipe", "reference-char", "--out", out, "--seed", str(seed), "--json", "--quiet"
        )

    def plain_loop(seed: int) -> dict[str, Any]:
        arguments = [str(text / "input.txt"), str(CACHE_DIR / f"plain-loop-{seed}"), str(seed)]
        begin = time.time()
        out = subprocess.check_output([sys.executable, "-W", "ignore", "-m", "benchmarks.reference_loop", *arguments])
        return {**json.loads(out), "wall": time.time() - begin}

    rows = []
    for seed in (1, 2, 3):  # interleaved, so that changes in machine speed affect both alike
        ours, theirs = (
            cached(f"reference-{seed}", lambda s=seed: run_nextword(s)),
            cached(f"plain-loop-{seed}", lambda s=seed: plain_loop(s)),
        )
        rows.append((seed, ours, theirs))
    print("\n| seed | nextword: loss | seconds | plain loop: loss | seconds | ratio of times |")
    print("|---|---|---|---|---|---|")
    for seed, ours, theirs in rows:
        print(
            f"| {seed} | {ours['loss']:.4f} | {ours['wall']:.0f} | {theirs['loss']:.4f} | {theirs['wall']:.0f} "
            f"| {ours['wall'] / theirs['wall']:.2f} |"
        )
    losses, ratios = [m["loss"] for _, m, _ in rows], [m["wall"] / t["wall"] for _, m, t in rows]
    print(f"\nmedian loss {statistics.median(losses):.4f}; ratio of times {median_with_range(ratios, 2)}")


def languages() -> None:
    names = ("swahili", "wolof")

    def measure(language: str) -> dict[str, Any]:
        out = CACHE_DIR / language
        shutil.rmtree(out, ignore_errors=True)
        result = nextword("pretrain", DATA / "small_languages" / language, "--out", out, "--json", "--quiet", threads=1)
        sample = nextword("generate", out, "", "--seed", "1", "--max-tokens", "120", "--json", threads=1)
        return {**result, "sample": sample["completions"][0]["text"]}

    with ThreadPoolExecutor() as pool:  # in parallel, on one core each
        runs = list(pool.map(lambda name: cached(name, lambda: measure(name)), names))
    for language, run in zip(names, runs, strict=True):
        print(
            f"\n{language}: {run['steps']:,} steps, {run['wall']:.0f} s, {run['bits_per_byte']:.3f} bits per byte, "
            f"{run['parameters'] / 1e6:.2f} M parameters\n\n> " + run["sample"].strip().replace("\n", "\n> ")
        )


def demo() -> None:
    def measure() -> dict[str, Any]:
        out = CACHE_DIR / "demo"
        shutil.rmtree(out, ignore_errors=True)
        return nextword("demo", "--out", out, "--json", "--quiet")

    run = cached("demo", measure)
    print(f"\ndemo: {run['wall']:.0f} s, {run['steps']:,} steps, {run['bits_per_byte']:.3f} bits per byte")
    for completion in run["completions"]:
        print("\n> " + (completion["prompt"] + completion["text"]).replace("\n", "\n> "))
    packages, assistant = run["packages"], run["assistant"]
    print(f"\npackages: {packages['metric']} {packages['scores']}, baselines {packages['baselines']}")
    print(f"\nassistant: {assistant['bits_per_byte']:.3f} bits per byte of the validation answers")
    for answer in run["answers"]:
        print(f"\n> {answer['asked']} → {answer['answered'].get('label') or answer['answered']['text']}")


def main() -> None:
    import torch

    sections = {
        "help": help_times,
        "books": book_preparation,
        "reference": reference_run,
        "languages": languages,
        "demo": demo,
    }
    names = sys.argv[1:] or list(sections)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, {platform.system()}")
    for name in names:
        print(f"\n## {name}")
        sections[name]()


if __name__ == "__main__":
    main()
