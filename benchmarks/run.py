"""`make bench`: every figure of docs/benchmarks.md, measured on this machine and printed as Markdown.

    python -m benchmarks.run [NAME …]

Names: help, books, reference, languages, demo; those of fine-tuning are in benchmarks/fine_tuning.py. Each measurement is kept
under build/bench, so that a bench that was cut off goes on where it stood; remove that folder to measure anew. The texts are
those of `NEXTWORD_DATA` (where that is not set: ../shared/data).
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
KEPT = Path("build/bench")
VERBS = (
    "", "demo", "plan", "prepare", "pretrain", "finetune", "transfer", "predict", "chat", "generate", "evaluate", "export",
    "report", "verify",
)  # fmt: skip


def cell(name: str, measure: Callable[[], Any]) -> Any:
    """A measurement by name: as it is kept, or made now and kept."""
    path = KEPT / f"{name}.json"
    if not path.exists():
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        value = measure()
        KEPT.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1))
    return json.loads(path.read_text())


def books() -> Path:
    """The folder of the books' text, unpacked once."""
    folder = KEPT / "books" / "text"
    if not folder.is_dir():
        aside = folder.with_name("text.partial")
        shutil.rmtree(aside, ignore_errors=True)
        with tarfile.open(DATA / "books.tar.xz") as archive:
            safely: dict[str, Any] = (
                {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            )  # from Python 3.11.4 on
            archive.extractall(aside, **safely)
        aside.rename(folder)
    return folder


def process(program: list[str], threads: int | None = None) -> dict[str, Any]:
    """Run a program to its end: exit code, output, wall time, peak memory.

    A small process stands between, since a child's peak begins with the memory of the process that it was forked from, and
    this one holds torch.
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
    """One run of the program with --json: its result, and the wall time and peak memory of the whole process."""
    program = [sys.executable, "-m", "nextword", *map(str, arguments)]
    done = process(program, threads)
    if done["code"]:
        raise SystemExit(f"{' '.join(program)}\n{done['err']}")
    return {**json.loads(done["out"]), "wall": done["wall"], "peak_mb": done["peak_mb"]}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The middle, and from where to where."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def mean_with_margin(values: Sequence[float], format_spec: str) -> str:
    """The mean of runs with different seeds ± half of its 95 % confidence interval; without it if it is zero."""
    score = mean(values)
    margin = 0.0 if score.high is None else score.high - score.value
    return f"{score.value:{format_spec}}" + (f" ± {margin:{format_spec.lstrip('+')}}" if margin else "")


def help_times() -> None:
    def measure() -> dict[str, list[float]]:
        # As pip leaves a package: compiled.
        installed = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        times: dict[str, list[float]] = {}
        for _ in range(7):
            for verb in VERBS:
                begin = time.perf_counter()
                program = [sys.executable, "-m", "nextword", *verb.split(), "--help"]
                subprocess.run(program, check=True, capture_output=True, env=installed)
                times.setdefault(verb, []).append(time.perf_counter() - begin)
        return times

    print("\n| command | seconds: middle of seven (from to) |\n|---|---|")
    for verb, times in cell("help", measure).items():
        print(f"| `nextword {verb + ' ' if verb else ''}--help` | {spread(times, 2)} |")


def prepared() -> None:
    folder = KEPT / "books"

    def measure() -> list[dict[str, Any]]:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        runs = [nextword("prepare", books(), "--out", folder / "shards", "--json", "--quiet") for _ in range(2)]
        keep = ("wall", "peak_mb", "documents", "train", "validation", "vocab_size")
        interpreter = process([sys.executable, "-c", "pass"])["peak_mb"]
        return [{"interpreter_mb": interpreter, **{k: run[k] for k in keep}} for run in runs]

    print("\n| run | seconds | peak MB above the interpreter |\n|---|---|---|")
    for name, run in zip(("first", "second"), cell("books", measure), strict=True):
        print(f"| {name} | {run['wall']:.1f} | {run['peak_mb'] - run['interpreter_mb']:.0f} |")


def reference() -> None:
    text = DATA / "tinyshakespeare"

    def ours(seed: int) -> dict[str, Any]:
        out = KEPT / f"reference-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        return nextword(
            "pretrain", text, "--recipe", "reference-char", "--out", out, "--seed", str(seed), "--json", "--quiet"
        )

    def stock(seed: int) -> dict[str, Any]:
        arguments = [str(text / "input.txt"), str(KEPT / f"stock-{seed}"), str(seed)]
        begin = time.time()
        out = subprocess.check_output([sys.executable, "-W", "ignore", "-m", "benchmarks.reference_loop", *arguments])
        return {**json.loads(out), "wall": time.time() - begin}

    rows = []
    for seed in (1, 2, 3):  # in turn, so that a change of the machine's speed meets both
        mine, theirs = (
            cell(f"reference-{seed}", lambda s=seed: ours(s)),
            cell(f"stock-{seed}", lambda s=seed: stock(s)),
        )
        rows.append((seed, mine, theirs))
    print("\n| seed | nextword: loss | seconds | plain loop, stock class: loss | seconds | ratio of times |")
    print("|---|---|---|---|---|---|")
    for seed, mine, theirs in rows:
        print(
            f"| {seed} | {mine['loss']:.4f} | {mine['wall']:.0f} | {theirs['loss']:.4f} | {theirs['wall']:.0f} "
            f"| {mine['wall'] / theirs['wall']:.2f} |"
        )
    losses, ratios = [m["loss"] for _, m, _ in rows], [m["wall"] / t["wall"] for _, m, t in rows]
    print(f"\nmiddle loss {statistics.median(losses):.4f}; ratio of times {spread(ratios, 2)}")


def languages() -> None:
    names = ("swahili", "wolof")

    def measure(language: str) -> dict[str, Any]:
        out = KEPT / language
        shutil.rmtree(out, ignore_errors=True)
        result = nextword("pretrain", DATA / "small_languages" / language, "--out", out, "--json", "--quiet", threads=1)
        sample = nextword("generate", out, "", "--seed", "1", "--max-tokens", "120", "--json", threads=1)
        return {**result, "sample": sample["completions"][0]["text"]}

    with ThreadPoolExecutor() as pool:  # side by side, a core each
        runs = list(pool.map(lambda name: cell(name, lambda: measure(name)), names))
    for language, run in zip(names, runs, strict=True):
        print(
            f"\n{language}: {run['steps']:,} steps, {run['wall']:.0f} s, {run['bits_per_byte']:.3f} bits per byte, "
            f"{run['parameters'] / 1e6:.2f} M parameters\n\n> " + run["sample"].strip().replace("\n", "\n> ")
        )


def demo() -> None:
    def measure() -> dict[str, Any]:
        out = KEPT / "demo"
        shutil.rmtree(out, ignore_errors=True)
        return nextword("demo", "--out", out, "--json", "--quiet")

    run = cell("demo", measure)
    print(f"\ndemo: {run['wall']:.0f} s, {run['steps']:,} steps, {run['bits_per_byte']:.3f} bits per byte")
    for completion in run["completions"]:
        print("\n> " + (completion["prompt"] + completion["text"]).replace("\n", "\n> "))
    packages, assistant = run["packages"], run["assistant"]
    print(f"\npackages: {packages['metric']} {packages['scores']}, without a model {packages['baselines']}")
    print(f"\nassistant: {assistant['bits_per_byte']:.3f} bits per byte of held-out answers")
    for one in run["answers"]:
        print(f"\n> {one['asked']} → {one['answered'].get('label') or one['answered']['text']}")


def main() -> None:
    import torch

    parts = {"help": help_times, "books": prepared, "reference": reference, "languages": languages, "demo": demo}
    wanted = sys.argv[1:] or list(parts)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, {platform.system()}")
    for name in wanted:
        print(f"\n## {name}")
        parts[name]()


if __name__ == "__main__":
    main()
