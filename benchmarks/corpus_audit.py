"""Benchmark of the corpus audit: cost of the index, latency of queries, and findings on real books.

    python -m benchmarks.corpus_audit [NAME …]

Names: index, corpus, contamination. Each measurement is cached under build/bench; remove corpus-audit-*.json there to measure
again. The environment variable `NEXTWORD_DATA` names the directory of the data (default: ../shared/data). Wall times are given
with CPU times, which other programs do not affect. torch is imported only where it is used, so that it does not count as memory
of the index.
"""

import json
import random
import shutil
import statistics
import sys
import time
from functools import partial
from typing import Any

from benchmarks.run import CACHE_DIR, DATA, books, cached, process
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.common.console import Console

QUIET = Console(quiet=True)
INDEX = CACHE_DIR / "index"
LENGTHS = (50, 100, 200, 500, 1000, 2000)
PASSAGES = 200
BENCHMARKS = ("blimp", "hellaswag", "arc")


def run_in_subprocess(function: str) -> dict[str, Any]:
    """The result of one of the functions below in a separate process, with its wall time and peak memory."""
    done = process([sys.executable, "-m", "benchmarks.corpus_audit", function], threads=1)
    if done["code"]:
        raise SystemExit(done["err"])
    return {**json.loads(done["out"].splitlines()[-1]), "wall": done["wall"], "peak_mb": done["peak_mb"]}


def build(every: int = 1) -> dict[str, Any]:
    """Build the index from every `every`-th book."""
    directory = INDEX if every == 1 else INDEX.with_name("index-part")
    shutil.rmtree(directory, ignore_errors=True)
    start, used = time.perf_counter(), time.process_time()
    index = build_index([books()] if every == 1 else sorted(books().rglob("*.md"))[::every], directory, console=QUIET)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    disk = sum(path.stat().st_size for path in directory.iterdir())
    return {"seconds": seconds, "cpu": cpu, "documents": len(index), "text": index.num_text_bytes, "disk": disk}


def reopen() -> dict[str, Any]:
    """The cost of opening an existing index, and of the first query."""
    start = time.perf_counter()
    index = CorpusIndex.open(INDEX)
    opened = time.perf_counter()
    index.find_matches("It was the best of times, it was the worst of times")
    return {"open": opened - start, "first": time.perf_counter() - opened}


def sample_passages(index: CorpusIndex, length: int, *, inside: bool) -> list[bytes]:
    """Passages of `length` bytes from the corpus, optionally with shuffled words."""
    generator = random.Random(length)
    passages: list[bytes] = []
    while len(passages) < PASSAGES:
        document = generator.randrange(len(index))
        size = int(index.documents[document]["end"] - index.documents[document]["begin"])
        data = index.read_bytes(document, generator.randrange(max(1, size - length)), length)
        if len(data) == length and not inside:
            words = data.split(b" ")
            generator.shuffle(words)
            data = b" ".join(words)
        if len(data) == length:
            passages.append(data)
    return passages


def run_queries() -> dict[str, Any]:
    index = CorpusIndex.open(INDEX)
    index.find_matches("warm")
    rows = []
    for inside in (True, False):
        for length in LENGTHS:
            wall, cpu, longest = [], [], []
            for passage in sample_passages(index, length, inside=inside):
                start, used = time.perf_counter(), time.process_time()
                matches = index.find_matches(passage)
                cpu.append(time.process_time() - used)
                wall.append(time.perf_counter() - start)
                longest.append(max((match.end - match.start for match in matches), default=0))
            rows.append({"inside": inside, "length": length, "wall": wall, "cpu": cpu, "longest": longest})
    return {"rows": rows}


def index() -> None:
    builds = [
        cached(f"corpus-audit-{name}", lambda name=name: run_in_subprocess(name)) for name in ("build-part", "build")
    ]
    reopened = cached("corpus-audit-open", lambda: run_in_subprocess("reopen"))
    bare = cached("corpus-audit-bare", lambda: process([sys.executable, "-c", "pass"]))
    loaded = cached("corpus-audit-loaded", lambda: process([sys.executable, "-c", "import nextword.audit.text_index"]))
    print("\n| documents | text, MB | build, s | CPU, s | index on disk, MB | peak MB above the interpreter |")
    print("|---|---|---|---|---|---|")
    for result in builds:
        print(
            f"| {result['documents']} | {result['text'] / 1e6:.1f} | {result['seconds']:.1f} | {result['cpu']:.1f} "
            f"| {result['disk'] / 1e6:.0f} | {result['peak_mb'] - bare['peak_mb']:.0f} |"
        )
    print(f"\nmemory of the imports: {loaded['peak_mb'] - bare['peak_mb']:.0f} MB")
    print(f"\nopening with all checksums: {reopened['open']:.2f} s; first query: {1e3 * reopened['first']:.0f} ms")
    print("\n| passages | bytes | wall ms: median | maximum | CPU ms: median | maximum | longest match, median |")
    print("|---|---|---|---|---|---|---|")
    for row in cached("corpus-audit-queries", lambda: run_in_subprocess("run_queries"))["rows"]:
        times = [seconds for kind in ("wall", "cpu") for seconds in (statistics.median(row[kind]), max(row[kind]))]
        columns = " | ".join(f"{1e3 * seconds:.1f}" for seconds in times)
        origin = "from the corpus" if row["inside"] else "with shuffled words"
        print(f"| {PASSAGES} {origin} | {row['length']} | {columns} | {statistics.median(row['longest']):.0f} |")


def audit() -> dict[str, Any]:
    from nextword.audit.corpus import audit_corpus

    start, used = time.perf_counter(), time.process_time()
    findings = audit_corpus(build_index([books()], INDEX, console=QUIET), (), QUIET)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"seconds": seconds, "cpu": cpu, "findings": [finding.to_dict() for finding in findings]}


def corpus() -> None:
    result = cached("corpus-audit-corpus", lambda: run_in_subprocess("audit"))
    print(f"\n{result['seconds']:.0f} s, {result['cpu']:.0f} s of CPU time")
    print("\n| finding | value | | examples |\n|---|---|---|---|")
    for finding in result["findings"]:
        examples = "; ".join(" · ".join(map(str, example.values())) for example in finding["examples"][:3])
        print(
            f"| {finding['name']} | {finding['value']:.4g} {finding['unit']} | {finding['note']} "
            f"| {examples.replace('|', '/')} |"
        )


def measure_contamination() -> dict[str, Any]:
    from benchmarks.loglikelihood import FILES
    from nextword.audit.corpus import contamination
    from nextword.tasks.benchmark_spec import find_benchmark

    index = build_index([books()], INDEX, console=QUIET)
    findings = [contamination(index, find_benchmark(f"{name}={DATA / FILES[name]}"), QUIET) for name in BENCHMARKS]
    return {"findings": [finding.to_dict() for finding in findings]}


def contamination_of_benchmarks() -> None:
    print("\n| benchmark | contaminated items, % | n | examples |\n|---|---|---|---|")
    result = cached("corpus-audit-contamination", lambda: run_in_subprocess("measure_contamination"))
    for finding in result["findings"]:
        share = f"{finding['value']:.1f} ({finding['low']:.1f}–{finding['high']:.1f})"
        examples = "; ".join(example["passage"] for example in finding["examples"][:2])
        print(f"| {finding['name']} | {share} | {finding['n']:,} | {examples} |")


def main() -> None:
    sections = {"index": index, "corpus": corpus, "contamination": contamination_of_benchmarks}
    subprocess_functions = {
        "build": build,
        "build-part": partial(build, 4),
        "reopen": reopen,
        "run_queries": run_queries,
        "audit": audit,
        "measure_contamination": measure_contamination,
    }
    for name in sys.argv[1:] or list(sections):
        if name in subprocess_functions:
            print(json.dumps(subprocess_functions[name]()))
        else:
            print(f"\n## {name}", flush=True)
            sections[name]()


if __name__ == "__main__":
    main()
