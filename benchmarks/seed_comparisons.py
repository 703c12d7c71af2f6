"""False differences between models of one recipe: `python -m benchmarks.seed_comparisons`, a table of docs/evaluation.md.

Five pairs of runs that differ by their seed alone are compared with `nextword evaluate --compare-to` on 200 samples of held-out
books, of 1.5 to 100 kB each: as one document, or as passages of several books. Training is cached under
build/bench/seed-comparisons. The length of a run is a number of tokens, so that machine load has no effect.
"""

import itertools
import random
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nextword
from benchmarks.run import CACHE_DIR, books, cached
from benchmarks.run import nextword as run_nextword

NUM_PAIRS, NUM_SAMPLES, NUM_DOCUMENTS = 5, 40, (1, 5, 10, 30)
MIN_BYTES, MAX_BYTES = 1_500, 100_000
WORK_DIR = CACHE_DIR / "seed-comparisons"


def texts(held_out: bool) -> list[Path]:
    """Every sixth book is held out."""
    return [path for i, path in enumerate(sorted(books().rglob("*.md"))) if (i % 6 == 0) == held_out]


def train(seed: int, shards: Path) -> Path:
    """A micro model of a million tokens."""
    run = WORK_DIR / f"run-{seed}"
    length = ("--size", "micro", "--tokens", "1M", "--training.compile", "no")
    run_nextword("pretrain", shards, "--out", run, "--seed", seed, *length, "--resume", "--quiet", "--json", threads=1)
    return run


def sample(rng: random.Random, num_documents: int, directory: Path) -> None:
    """Write passages of different held-out books, of 1.5 to 100 kB together."""
    size = int(MIN_BYTES * (MAX_BYTES / MIN_BYTES) ** rng.random())
    for i, path in enumerate(rng.sample(texts(True), min(num_documents, len(texts(True))))):
        text = path.read_text(encoding="utf-8")
        length = size // num_documents
        start = rng.randrange(max(1, len(text) - length))
        (directory / f"{i}.txt").write_text(text[start : start + length], encoding="utf-8")


def compare(pair: int, shards: Path) -> list[tuple[int, bool, bool]]:
    """For each sample of a pair of runs the number of documents, whether it has an interval, and whether one model is ahead."""
    runs = [train(seed, shards) for seed in (2 * pair, 2 * pair + 1)]
    rng, results = random.Random(pair), list[tuple[int, bool, bool]]()
    for num_documents in itertools.islice(itertools.cycle(NUM_DOCUMENTS), NUM_SAMPLES):
        with tempfile.TemporaryDirectory() as directory:
            sample(rng, num_documents, Path(directory))
            result = nextword.evaluate(runs[0] / "model", directory, compare_to=runs[1] / "model").to_dict()
        against = result["against"]
        results.append((num_documents, against["difference"]["low"] is not None, against["ahead"] is not None))
    return results


def main() -> None:
    """Train, compare, and print the table."""
    shards = WORK_DIR / "shards"
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    run_nextword("prepare", *texts(False), "--out", shards, "--quiet", "--json")
    with ThreadPoolExecutor(2) as pool:
        pairs = pool.map(
            lambda pair: cached(f"seed-comparisons-{pair}", lambda: compare(pair, shards)), range(NUM_PAIRS)
        )
    counts = defaultdict[int, list[tuple[bool, bool]]](list)
    for num_documents, has_interval, is_ahead in itertools.chain.from_iterable(pairs):
        counts[num_documents].append((has_interval, is_ahead))
    print("| documents | samples | with an interval | a model is called better |\n|---|---|---|---|")
    for num_documents, rows in sorted(counts.items()):
        print(f"| {num_documents} | {len(rows)} | {sum(a for a, _ in rows)} | {sum(b for _, b in rows)} |")


if __name__ == "__main__":
    main()
