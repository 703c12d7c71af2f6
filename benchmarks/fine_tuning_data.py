"""What the benchmarks of fine-tuning share: the data sets and their parts, measurements that are kept, the base model."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import DATA, books, nextword, process

QUICK = os.environ.get("NEXTWORD_BENCH_QUICK") == "1"
WORK = Path("build/bench-quick" if QUICK else "build/bench") / "tuning"
PRETRAINED = Path("build/bench/pretrained")
SEEDS = (0,) if QUICK else (0, 1, 2)
PARTS = ("train", "validation", "test")
CAP = 180  # seconds of a run of the ablation, on one thread
METHODS = ("full", "lora")
WORDS = ("english_french", "scitldr", "instructions", "dialogues")  # sets whose answers are written


@dataclass(frozen=True)
class DataSet:
    """A set of examples, and how much of it a run of the ablation learns from so that it stays below `CAP`.

    Attributes:
        sources: files, and which shares of each go to training, validation and test, by a hash of the input.
        limit: how many examples are learned from; None for all.
    """

    task: str
    metric: str
    sources: dict[str, tuple[float, float, float]]
    limit: int | None
    epochs: float

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.metric == "bits_per_byte"

    @property
    def scale(self) -> float:
        """From the program's unit to the table's: per cent, or bits."""
        return 1.0 if self.metric in ("bits_per_byte", "chrf", "rougeL") else 100.0


TRAIN, VALIDATION, TEST = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
THIRDS = (0.8, 0.1, 0.1)
HALVES = (0.0, 0.5, 0.5)
SETS = {
    "trec": DataSet("classify", "accuracy", {"trec/train.csv": (0.9, 0.1, 0.0), "trec/test.csv": TEST}, None, 3),
    "movie_reviews": DataSet(
        "classify", "accuracy",
        {"movie_reviews/train.csv": TRAIN, "movie_reviews/validation.csv": VALIDATION, "movie_reviews/test.csv": TEST},
        4500, 2,
    ),
    # Its own two parts share premises, so both are cut anew.
    "mnli": DataSet("entail", "accuracy", {"mnli/train.jsonl": THIRDS, "mnli/validation.jsonl": THIRDS}, 2900, 2),
    "stsb": DataSet(
        "similarity", "pearson",
        {"stsb/train.csv": TRAIN, "stsb/validation.csv": VALIDATION, "stsb/test.csv": TEST}, 3000, 2,
    ),
    "arc_easy": DataSet(
        "choose", "accuracy",
        {"arc_easy/train.jsonl": TRAIN, "arc_easy/validation.jsonl": VALIDATION, "arc_easy/test.jsonl": TEST}, 1000, 2,
    ),
    "english_french": DataSet(
        "rewrite", "chrf",
        {"english_french/train.tsv": TRAIN, "english_french/validation.tsv": VALIDATION, "english_french/test.tsv": TEST},
        2500, 3,
    ),
    "scitldr": DataSet(
        "rewrite", "rougeL",
        {"scitldr/train.jsonl": TRAIN, "scitldr/validation.jsonl": VALIDATION, "scitldr/test.jsonl": TEST}, 300, 2,
    ),
    "instructions": DataSet("chat", "bits_per_byte", {"instructions/instructions.json": THIRDS}, None, 8),
    "dialogues": DataSet(
        "chat", "bits_per_byte", {"dialogues/train.jsonl": TRAIN, "dialogues/validation.jsonl": HALVES}, 600, 2
    ),
    # Cut by the same hash as the instructions, so that no held-out pair asks what a chat model has learned.
    "preferences": DataSet("prefer", "preferred", {"instructions/preferences.json": THIRDS}, None, 3),
}  # fmt: skip
VARIANTS = {
    "full": ("full method", ()),
    "plain": ("without the auxiliary loss", ("--tuning.auxiliary", "0")),
    "scratch": ("without pre-training", ("--scratch",)),
    "lora": ("LoRA", ("--lora",)),
}

# ---------------------------------------------------------------- measurements, kept


def cell(name: str, measure: Callable[[], Any]) -> Any:
    """A measurement by name: as it is kept, or made now and kept."""
    path = WORK / "cells" / f"{name}.json"
    if not path.exists():
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        save(path, measure())
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, value: Any) -> Path:
    """Write JSON, or a list's items as JSON Lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one, ensure_ascii=False) for one in value] if path.suffix == ".jsonl" else []
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text("".join(f"{line}\n" for line in lines) or json.dumps(value, indent=1), encoding="utf-8")
    return aside.replace(path)


def stock(*arguments: str | Path, threads: int | None = None) -> dict[str, Any]:
    """One run of `benchmarks.transformers_worker`: what it printed, a line an object, and its wall time and peak memory."""
    return python("benchmarks.transformers_worker", *arguments, threads=threads)


def python(module: str, *arguments: str | Path, threads: int | None = None) -> dict[str, Any]:
    program = [sys.executable, "-m", module, *map(str, arguments)]
    done = process(program, threads)
    if done["code"]:
        raise SystemExit(f"{' '.join(program)}\n{done['err']}")
    lines = [json.loads(line) for line in done["out"].splitlines()]
    return {"lines": lines, "wall": done["wall"], "peak_mb": done["peak_mb"]}


def base() -> Path:
    """The pre-trained model, made where it is not there."""
    if QUICK or (PRETRAINED / "result.json").exists():
        return PRETRAINED
    begin: tuple[str | Path, ...] = ("--resume",)
    if not (PRETRAINED / "run.json").exists():
        begin = (books(), "--budget", "50m", "--size", "tiny", "--model.context-length", "512", "--seed", "0")
    nextword("pretrain", *begin, "--out", PRETRAINED, "--json", "--quiet")
    return PRETRAINED


# ---------------------------------------------------------------- data


def place(fields: dict[str, Any]) -> float:
    """A number from 0 to 1 that an input always has: by its text, its premise, or the first turn."""
    first = next(iter(fields.values()))
    text = first if isinstance(first, str) else first[0]["content"]
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def parts(name: str) -> dict[str, Path]:
    """A set's three parts as files. At most 500 examples (100 where answers are written) choose which weights are kept."""
    folder = WORK / "data" / name
    paths = {part: folder / f"{part}.jsonl" for part in PARTS}
    if all(path.exists() for path in paths.values()):
        return paths
    from nextword.data.issues import IssueLog
    from nextword.tasks.examples import read_examples

    columns = {"prompt": "english", "completion": "french"} if name == "english_french" else None
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for file, (train, validation, _) in SETS[name].sources.items():
        for example in read_examples(DATA / file, SETS[name].task, IssueLog(), columns):
            at = place(example.fields)
            found["train" if at < train else "validation" if at < train + validation else "test"].append(example.fields)
    found["validation"] = few(found["validation"], 100 if name in WORDS else 500)
    for part, items in found.items():
        save(paths[part], few(items, 40) if QUICK and part != "train" else items)
    return paths


def few(items: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    """So many of the items, chosen by a hash, in their order."""
    if count is None or len(items) <= count:
        return items
    digests = [hashlib.blake2b(json.dumps(item).encode(), digest_size=8).digest() for item in items]
    chosen = sorted(range(len(items)), key=lambda i: (digests[i], i))[:count]
    return [items[i] for i in sorted(chosen)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def gathered(name: str, train: Path, test: Path, limit: int | None = None, seed: int = 0) -> Any:
    """What the program reads: the form of the task, and the examples of two files."""
    from nextword.data.issues import IssueLog
    from nextword.data.tokenizer import Tokenizer
    from nextword.tasks.dataset import load_task_data

    options = {"task": SETS[name].task, "validation": [str(test)], "limit": limit, "seed": seed}
    return load_task_data([str(train)], Tokenizer.open(base() / "model"), None, 512, IssueLog(), **options)


# ---------------------------------------------------------------- runs


def tuned(name: str, variant: str, seed: int) -> dict[str, Any]:
    """A run of the ablation and its score on the test part. The folders of seed 0 stay for others to look into."""
    data, out = SETS[name], run_of(name, variant, seed)

    def measure() -> dict[str, Any]:
        files, limit = parts(name), 64 if QUICK else data.limit
        settings = ["--steps", 3] if QUICK else ["--epochs", data.epochs]
        settings += ["--limit", limit] if limit else []
        settings += [*VARIANTS[variant][1], "--seed", seed, "--training.compile", "no"]
        settings += ["--training.evaluations", 3 if name in WORDS else 5]
        begin = (base(), files["train"], "--task", data.task, "--validation", files["validation"], "--out", out)
        result = nextword("finetune", *begin, *map(str, settings), "--resume", "--json", "--quiet", threads=1)
        if data.task == "chat":
            found = judged(out, files["test"], "chat", threads=1)
        else:
            answered = nextword("predict", out, files["test"], "--json", "--quiet", threads=1)
            found = {metric: score["value"] for metric, score in answered["scores"].items()}
        examples = json.loads((out / "run.json").read_text(encoding="utf-8"))["data"]["train"]["examples"]
        shutil.rmtree(out / "checkpoints" if seed == 0 and variant in METHODS else out)
        keep = {key: result[key] for key in ("steps", "best_step", "seconds", "forgetting") if key in result}
        return {"score": found[data.metric] * data.scale, "scores": found, "examples": examples, **keep}

    return cell(f"{name}-{variant}-{seed}", measure)


def run_of(name: str, variant: str, seed: int) -> Path:
    return WORK / "runs" / f"{name}-{variant}-{seed}"


def has(name: str, variant: str) -> bool:
    """Whether a variant is any different from the full method: a task without a head has no auxiliary loss."""
    return variant != "plain" or (name not in WORDS and name != "preferences")


def judged(run: Path, file: Path, task: str, threads: int | None = None) -> dict[str, Any]:
    """`judge` in a process of its own."""
    return python("benchmarks.fine_tuning", "judge", run, file, task, threads=threads)["lines"][0]
