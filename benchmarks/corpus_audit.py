"""Auditing, measured: what the index of a corpus costs, how fast it answers, and what the corpus audit says of real books.

    python -m benchmarks.corpus_audit [NAME …]

Names: index, corpus, suites. Each measurement is kept under build/bench; remove auditing-*.json there to measure anew. The
data are those of `NEXTWORD_DATA` (where that is not set: ../shared/data). Times are wall times, and beside them those of the
processor, which another program on the machine does not change. What needs torch is imported where it is used, so that the
memory of an index is its own.
"""

import json
import random
import shutil
import statistics
import sys
import time
from functools import partial
from typing import Any

from benchmarks.run import DATA, KEPT, books, cell, process
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.common.console import Console

QUIET = Console(quiet=True)
INDEX = KEPT / "index"
LENGTHS = (50, 100, 200, 500, 1000, 2000)
PASSAGES = 200
SUITES = ("blimp", "hellaswag", "arc")


def in_a_process(what: str) -> dict[str, Any]:
    """The result of one of the functions below in a process of its own, with its wall time and its peak memory."""
    done = process([sys.executable, "-m", "benchmarks.corpus_audit", what], threads=1)
    if done["code"]:
        raise SystemExit(done["err"])
    return {**json.loads(done["out"].splitlines()[-1]), "wall": done["wall"], "peak_mb": done["peak_mb"]}


def build(every: int = 1) -> dict[str, Any]:
    """The index of every so-manieth book."""
    place = INDEX if every == 1 else INDEX.with_name("index-part")
    shutil.rmtree(place, ignore_errors=True)
    start, used = time.perf_counter(), time.process_time()
    index = build_index([books()] if every == 1 else sorted(books().rglob("*.md"))[::every], place, console=QUIET)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    disk = sum(path.stat().st_size for path in place.iterdir())
    return {"seconds": seconds, "cpu": cpu, "documents": len(index), "text": index.num_text_bytes, "disk": disk}


def reopen() -> dict[str, Any]:
    """What a program pays that finds the index there: the first look-up, and the opening before it."""
    start = time.perf_counter()
    index = CorpusIndex.open(INDEX)
    opened = time.perf_counter()
    index.find_matches("It was the best of times, it was the worst of times")
    return {"open": opened - start, "first": time.perf_counter() - opened}


def passages(index: CorpusIndex, length: int, *, inside: bool) -> list[bytes]:
    """Passages of so many bytes out of the corpus, or the same with their words in another order."""
    draws = random.Random(length)
    found: list[bytes] = []
    while len(found) < PASSAGES:
        document = draws.randrange(len(index))
        size = int(index.documents[document]["end"] - index.documents[document]["begin"])
        data = index.read_bytes(document, draws.randrange(max(1, size - length)), length)
        if len(data) == length and not inside:
            words = data.split(b" ")
            draws.shuffle(words)
            data = b" ".join(words)
        if len(data) == length:
            found.append(data)
    return found


def look_up() -> dict[str, Any]:
    index = CorpusIndex.open(INDEX)
    index.find_matches("warm")
    rows = []
    for inside in (True, False):
        for length in LENGTHS:
            wall, cpu, longest = [], [], []
            for passage in passages(index, length, inside=inside):
                start, used = time.perf_counter(), time.process_time()
                matches = index.find_matches(passage)
                cpu.append(time.process_time() - used)
                wall.append(time.perf_counter() - start)
                longest.append(max((match.end - match.start for match in matches), default=0))
            rows.append({"inside": inside, "length": length, "wall": wall, "cpu": cpu, "longest": longest})
    return {"rows": rows}


def index() -> None:
    made = [cell(f"auditing-{name}", lambda name=name: in_a_process(name)) for name in ("build-part", "build")]
    opened = cell("auditing-open", lambda: in_a_process("reopen"))
    bare = cell("auditing-bare", lambda: process([sys.executable, "-c", "pass"]))
    loaded = cell("auditing-loaded", lambda: process([sys.executable, "-c", "import nextword.audit.text_index"]))
    print("\n| documents | text, MB | seconds | of the processor | index on disk, MB | peak MB above the interpreter |")
    print("|---|---|---|---|---|---|")
    for one in made:
        print(
            f"| {one['documents']} | {one['text'] / 1e6:.1f} | {one['seconds']:.1f} | {one['cpu']:.1f} "
            f"| {one['disk'] / 1e6:.0f} | {one['peak_mb'] - bare['peak_mb']:.0f} |"
        )
    print(f"\nof the memory {loaded['peak_mb'] - bare['peak_mb']:.0f} MB are what is imported")
    print(f"\nopened, every byte checked: {opened['open']:.2f} s; the first look-up: {1e3 * opened['first']:.0f} ms")
    print("\n| passages | bytes | ms: middle | most | of the processor: middle | most | longest match, middle |")
    print("|---|---|---|---|---|---|---|")
    for row in cell("auditing-look-up", lambda: in_a_process("look_up"))["rows"]:
        times = [one for kind in ("wall", "cpu") for one in (statistics.median(row[kind]), max(row[kind]))]
        shown = " | ".join(f"{1e3 * one:.1f}" for one in times)
        where = "in the corpus" if row["inside"] else "of its words"
        print(f"| {PASSAGES} {where} | {row['length']} | {shown} | {statistics.median(row['longest']):.0f} |")


def audit() -> dict[str, Any]:
    from nextword.audit.corpus import audit_corpus

    start, used = time.perf_counter(), time.process_time()
    found = audit_corpus(build_index([books()], INDEX, console=QUIET), (), QUIET)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"seconds": seconds, "cpu": cpu, "findings": [one.to_dict() for one in found]}


def corpus() -> None:
    found = cell("auditing-corpus", lambda: in_a_process("audit"))
    print(f"\n{found['seconds']:.0f} s, {found['cpu']:.0f} of the processor")
    print("\n| finding | value | | examples |\n|---|---|---|---|")
    for one in found["findings"]:
        examples = "; ".join(" · ".join(map(str, example.values())) for example in one["examples"][:3])
        print(f"| {one['name']} | {one['value']:.4g} {one['unit']} | {one['note']} | {examples.replace('|', '/')} |")


def overlaps() -> dict[str, Any]:
    from benchmarks.loglikelihood import FILES
    from nextword.audit.corpus import contamination
    from nextword.tasks.benchmark_spec import find_benchmark

    index = build_index([books()], INDEX, console=QUIET)
    found = [contamination(index, find_benchmark(f"{name}={DATA / FILES[name]}"), QUIET) for name in SUITES]
    return {"findings": [one.to_dict() for one in found]}


def suites() -> None:
    print("\n| suite | % of its items | n | examples |\n|---|---|---|---|")
    for one in cell("auditing-suites", lambda: in_a_process("overlaps"))["findings"]:
        low_high = f"{one['value']:.1f} ({one['low']:.1f} to {one['high']:.1f})"
        print(f"| {one['name']} | {low_high} | {one['n']:,} | {'; '.join(e['passage'] for e in one['examples'][:2])} |")


def main() -> None:
    sections = {"index": index, "corpus": corpus, "suites": suites}
    alone = {
        "build": build,
        "build-part": partial(build, 4),
        "reopen": reopen,
        "look_up": look_up,
        "audit": audit,
        "overlaps": overlaps,
    }
    for name in sys.argv[1:] or list(sections):
        if name in alone:
            print(json.dumps(alone[name]()))
        else:
            print(f"\n## {name}", flush=True)
            sections[name]()


if __name__ == "__main__":
    main()
