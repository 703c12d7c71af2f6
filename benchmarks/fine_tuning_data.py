"""Shared by the fine-tuning benchmarks: data sets and their splits, the cache of measurements, and the base model."""

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
WORK_DIR = Path("build/bench-quick" if QUICK else "build/bench") / "fine-tuning"
PRETRAINED = Path("build/bench/pretrained")
SEEDS = (0,) if QUICK else (0, 1, 2)
SPLITS = ("train", "validation", "test")
MAX_SECONDS = 180  # of a run of the ablation, on one thread
METHODS = ("full", "lora")
GENERATIVE_SETS = ("english_french", "scitldr", "instructions", "dialogues")  # the answers are generated


@dataclass(frozen=True)
class DataSet:
    """A data set, and the number of examples on which a run of the ablation is trained so that it stays below `MAX_SECONDS`.

    Attributes:
        sources: Files, with their fractions for training, validation and test, assigned by a hash of the input.
        limit: Number of training examples; None for all.
    """

    task: str
    metric: str
    sources: dict[str, tuple[float, float, float]]
    limit: int | None
    epochs: float

    @property
    def lower(self) -> bool:
        """Whether lower is better."""
        return self.metric == "bits_per_byte"

    @property
    def scale(self) -> float:
        """Factor from a score to the unit of the table: per cent, or bits."""
        return 1.0 if self.metric in ("bits_per_byte", "chrf", "rougeL") else 100.0


TRAIN, VALIDATION, TEST = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
SPLIT_80_10_10 = (0.8, 0.1, 0.1)
SPLIT_0_50_50 = (0.0, 0.5, 0.5)
SETS = {
    "trec": DataSet("classify", "accuracy", {"trec/train.csv": (0.9, 0.1, 0.0), "trec/test.csv": TEST}, None, 3),
    "movie_reviews": DataSet(
        "classify",
        "accuracy",
        {"movie_reviews/train.csv": TRAIN, "movie_reviews/validation.csv": VALIDATION, "movie_reviews/test.csv": TEST},
        4500,
        2,
    ),
    # The two published parts share premises, so both are split again.
    "mnli": DataSet(
        "entail", "accuracy", {"mnli/train.jsonl": SPLIT_80_10_10, "mnli/validation.jsonl": SPLIT_80_10_10}, 2900, 2
    ),
    "stsb": DataSet(
        "similarity",
        "pearson",
        {"stsb/train.csv": TRAIN, "stsb/validation.csv": VALIDATION, "stsb/test.csv": TEST},
        3000,
        2,
    ),
    "arc_easy": DataSet(
        "choose",
        "accuracy",
        {"arc_easy/train.jsonl": TRAIN, "arc_easy/validation.jsonl": VALIDATION, "arc_easy/test.jsonl": TEST},
        1000,
        2,
    ),
    "english_french": DataSet(
        "rewrite",
        "chrf",
        {
            "english_french/train.tsv": TRAIN,
            "english_french/validation.tsv": VALIDATION,
            "english_french/test.tsv": TEST,
        },
        2500,
        3,
    ),
    "scitldr": DataSet(
        "rewrite",
        "rougeL",
        {"scitldr/train.jsonl": TRAIN, "scitldr/validation.jsonl": VALIDATION, "scitldr/test.jsonl": TEST},
        300,
        2,
    ),
    "instructions": DataSet("chat", "bits_per_byte", {"instructions/instructions.json": SPLIT_80_10_10}, None, 8),
    "dialogues": DataSet(
        "chat", "bits_per_byte", {"dialogues/train.jsonl": TRAIN, "dialogues/validation.jsonl": SPLIT_0_50_50}, 600, 2
    ),
    # Split by the same hash as the instructions, so that no validation pair has a question of the chat model's training.
    "preferences": DataSet("prefer", "preferred", {"instructions/preferences.json": SPLIT_80_10_10}, None, 3),
}
VARIANTS = {
    "full": ("full method", ()),
    "plain": ("without the auxiliary loss", ("--tuning.auxiliary", "0")),
    "scratch": ("without pre-training", ("--from-scratch",)),
    "lora": ("LoRA", ("--lora",)),
}

# ---------------------------------------------------------------- cached measurements


def cached(name: str, measure: Callable[[], Any]) -> Any:
    """A measurement by name: from the cache, or measured now and cached."""
    path = WORK_DIR / "cells" / f"{name}.json"
    if not path.exists():
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        save(path, measure())
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, value: Any) -> Path:
    """Write JSON, or a list as JSON Lines, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) for item in value] if path.suffix == ".jsonl" else []
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in lines) or json.dumps(value, indent=1), encoding="utf-8")
    return partial.replace(path)


def run_transformers(*arguments: str | Path, threads: int | None = None) -> dict[str, Any]:
    """Run `benchmarks.transformers_worker`: the JSON objects that it prints, its wall time and its peak memory."""
    return run_module("benchmarks.transformers_worker", *arguments, threads=threads)


def run_module(module: str, *arguments: str | Path, threads: int | None = None) -> dict[str, Any]:
    program = [sys.executable, "-m", module, *map(str, arguments)]
    done = process(program, threads)
    if done["code"]:
        raise SystemExit(f"{' '.join(program)}\n{done['err']}")
    lines = [json.loads(line) for line in done["out"].splitlines()]
    return {"lines": lines, "wall": done["wall"], "peak_mb": done["peak_mb"]}


def base_model() -> Path:
    """The pre-trained model, trained if it does not exist."""
    if QUICK or (PRETRAINED / "result.json").exists():
        return PRETRAINED
    arguments: tuple[str | Path, ...] = ("--resume",)
    if not (PRETRAINED / "run.json").exists():
        arguments = (books(), "--budget", "50m", "--size", "tiny", "--model.context-length", "512", "--seed", "0")
    nextword("pretrain", *arguments, "--out", PRETRAINED, "--json", "--quiet")
    return PRETRAINED


# ---------------------------------------------------------------- data


def hash_fraction(fields: dict[str, Any]) -> float:
    """A number in [0, 1) by the hash of the input: its text, its premise or the first message."""
    first = next(iter(fields.values()))
    text = first if isinstance(first, str) else first[0]["content"]
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def split_files(name: str) -> dict[str, Path]:
    """The training, validation and test files of a data set.

    Validation sets have at most 500 examples, 100 if answers are generated.
    """
    folder = WORK_DIR / "data" / name
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    if all(path.exists() for path in paths.values()):
        return paths
    from nextword.data.issues import IssueLog
    from nextword.tasks.examples import read_examples

    columns = {"prompt": "english", "completion": "french"} if name == "english_french" else None
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for file, (train, validation, _) in SETS[name].sources.items():
        for example in read_examples(DATA / file, SETS[name].task, IssueLog(), columns):
            fraction = hash_fraction(example.fields)
            split = "train" if fraction < train else "validation" if fraction < train + validation else "test"
            splits[split].append(example.fields)
    splits["validation"] = sample(splits["validation"], 100 if name in GENERATIVE_SETS else 500)
    for split, items in splits.items():
        save(paths[split], sample(items, 40) if QUICK and split != "train" else items)
    return paths


def sample(items: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    """`count` of the items, selected by their hash, in the original order."""
    if count is None or len(items) <= count:
        return items
    digests = [hashlib.blake2b(json.dumps(item).encode(), digest_size=8).digest() for item in items]
    chosen = sorted(range(len(items)), key=lambda i: (digests[i], i))[:count]
    return [items[i] for i in sorted(chosen)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def load_data(name: str, train: Path, test: Path, limit: int | None = None, seed: int = 0) -> Any:
    """The task specification and the examples of two files, as nextword reads them."""
    from nextword.data.issues import IssueLog
    from nextword.data.tokenizer import Tokenizer
    from nextword.tasks.dataset import load_task_data

    options = {"task": SETS[name].task, "validation": [str(test)], "limit": limit, "seed": seed}
    return load_task_data([str(train)], Tokenizer.open(base_model() / "model"), None, 512, IssueLog(), **options)


# ---------------------------------------------------------------- runs


def run_finetuning(name: str, variant: str, seed: int) -> dict[str, Any]:
    """A run of the ablation and its score on the test set. The run directories of seed 0 are kept for other sections."""
    data, out = SETS[name], run_dir(name, variant, seed)

    def measure() -> dict[str, Any]:
        files, limit = split_files(name), 64 if QUICK else data.limit
        settings = ["--steps", 3] if QUICK else ["--epochs", data.epochs]
        settings += ["--max-examples", limit] if limit else []
        settings += [*VARIANTS[variant][1], "--seed", seed, "--training.compile", "no"]
        settings += ["--training.evaluations", 3 if name in GENERATIVE_SETS else 5]
        arguments = (
            base_model(),
            files["train"],
            "--task",
            data.task,
            "--validation",
            files["validation"],
            "--out",
            out,
        )
        result = nextword("finetune", *arguments, *map(str, settings), "--resume", "--json", "--quiet", threads=1)
        if data.task == "chat":
            scores = evaluate_run(out, files["test"], "chat", threads=1)
        else:
            predictions = nextword("predict", out, files["test"], "--json", "--quiet", threads=1)
            scores = {metric: score["value"] for metric, score in predictions["scores"].items()}
        examples = json.loads((out / "run.json").read_text(encoding="utf-8"))["data"]["train"]["examples"]
        shutil.rmtree(out / "checkpoints" if seed == 0 and variant in METHODS else out)
        details = {key: result[key] for key in ("steps", "best_step", "seconds", "forgetting") if key in result}
        return {"score": scores[data.metric] * data.scale, "scores": scores, "examples": examples, **details}

    return cached(f"{name}-{variant}-{seed}", measure)


def run_dir(name: str, variant: str, seed: int) -> Path:
    return WORK_DIR / "runs" / f"{name}-{variant}-{seed}"


def applies(name: str, variant: str) -> bool:
    """Whether a variant differs from the full method: a task without a head has no auxiliary loss."""
    return variant != "plain" or (name not in GENERATIVE_SETS and name != "preferences")


def evaluate_run(run: Path, file: Path, task: str, threads: int | None = None) -> dict[str, Any]:
    """`fine_tuning.evaluate_likelihood` in a separate process."""
    return run_module("benchmarks.fine_tuning", "evaluate-likelihood", run, file, task, threads=threads)["lines"][0]
