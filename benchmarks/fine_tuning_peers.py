"""Sections `agreement` and `peers` of `benchmarks.fine_tuning`: comparison with transformers, which runs in its own process."""

import json
import shutil
import statistics
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.fine_tuning_data import (
    GENERATIVE_SETS,
    METHODS,
    QUICK,
    SEEDS,
    SETS,
    WORK_DIR,
    base_model,
    cached,
    load_data,
    read_lines,
    run_dir,
    run_finetuning,
    run_transformers,
    sample,
    save,
    split_files,
)
from benchmarks.run import mean_with_margin, median_with_range, nextword

# For the comparison with the Trainer of transformers: number of training examples (None: all) and epochs.
PEERS = {"trec": (None, 2), "movie_reviews": (1500, 2), "stsb": (1000, 2), "english_french": (1000, 2)}
MAX_GENERATED = 300  # test examples of sets whose answers are generated
LEARNING_RATE = {"full": 3.75e-4, "lora": 3.75e-3}
BATCH = 32


def agreement() -> None:
    title = ("", "weights", "predictions", "equal", "the others: margin of the answer of transformers")
    print(f"\n| {' | '.join(title)} |\n|{'---|' * len(title)}")
    for name in SETS:
        for variant in METHODS:
            result = cached(f"agreement-{name}-{variant}", lambda n=name, v=variant: compare(n, v))
            others = ", ".join(
                f"{x['margin']:.1e}{' (a tie)' if x['margin'] < 1e-3 else ''}" for x in result["others"][:8]
            )
            print(
                f"| {name} | {variant} | {result['n']:,} | {result['n'] - len(result['others']):,} | {others or '–'} |"
            )


def compare(name: str, variant: str) -> dict[str, Any]:
    """Our answers on the test set (the first 200 generated ones, 50 conversations) compared with those of transformers."""
    run_finetuning(name, variant, 0)
    run, items = run_dir(name, variant, 0), read_lines(split_files(name)["test"])
    items = items[: {"rewrite": 200, "chat": 50}.get(SETS[name].task, len(items))]
    inputs = save(WORK_DIR / "inputs" / f"{name}.jsonl", items)
    ours = nextword("predict", run, inputs, "--json", "--quiet")["predictions"]
    theirs = run_transformers("answer", run / "model", write_worker_input(name, run, items))["lines"]
    others = []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if SETS[name].metric == "pearson":
            if abs(a["score"] - b["score"]) > 1e-4 * max(1.0, abs(a["score"])):
                others.append({"item": i, "margin": abs(a["score"] - b["score"])})
        elif "text" in b and a["text"] != b["text"].strip():
            others.append({"item": i, "margin": logit_margin(a["text"], b), "ours": a["text"], "theirs": b["text"]})
        elif "label" in b and a["label"] != b["label"]:
            others.append({"item": i, "margin": b["margin"]})
    return {"n": len(ours), "others": others}


def write_worker_input(name: str, run: Path, items: list[dict[str, Any]]) -> Path:
    """The input file of `transformers_worker answer`."""
    max_new_tokens = json.loads((run / "run.json").read_text(encoding="utf-8"))["task"]["answer_tokens"]
    return save(
        WORK_DIR / "inputs" / f"{run.name}.json",
        {"task": SETS[name].task, "max_new_tokens": max_new_tokens, "items": items},
    )


def logit_margin(ours: str, theirs: dict[str, Any]) -> float:
    """The logit margin of the token of transformers at which the two texts diverge."""
    text = theirs["text"]
    start = len(text) - len(text.lstrip())
    common = start + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, text[start:], strict=False)))
    return next(
        (margin for margin, end in zip(theirs["margins"], theirs["ends"], strict=True) if end > common),
        theirs["margins"][-1],
    )


def peers() -> None:
    title = ("", "weights", "compared with", "nextword: score", "other: score", "difference", "nextword: seconds")
    title += ("other: seconds", "ratio", "ratio, training only", "nextword: MB", "other: MB", "ratio")
    print(f"\n| {' | '.join(title)} |\n|{'---|' * len(title)}")
    for name in PEERS:
        for method in METHODS:
            others = ("Trainer", "Trainer by length") if method == "full" else ("Trainer, PEFT",)
            results: dict[str, list[dict[str, Any]]] = {program: [] for program in ("nextword", *others)}
            for seed in SEEDS:  # interleaved, so that changes in machine speed affect all alike
                for program in results:
                    key = f"peers-{name}-{method}-{program.replace(', ', '-').replace(' ', '-')}-{seed}"
                    results[program].append(cached(key, lambda a=(name, method, program, seed): measure_program(*a)))
            for other in others:
                print(
                    "| "
                    + " | ".join([name, method, other, *comparison_columns(results["nextword"], results[other])])
                    + " |"
                )
    print(f"\nDifferences of scores are paired over {len(SEEDS)} seeds; ratios are the median (range).")


def comparison_columns(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """The columns of `peers` for two programs, with the same seeds."""

    def both(key: str, digits: int) -> list[str]:
        return [f"{statistics.median(run[key] for run in runs):.{digits}f}" for runs in (ours, theirs)]

    def ratio(key: str) -> str:
        return median_with_range([a[key] / b[key] for a, b in zip(ours, theirs, strict=True)], 2)

    gains = [a["score"] - b["score"] for a, b in zip(ours, theirs, strict=True)]
    return [
        *both("score", 1),
        mean_with_margin(gains, "+.1f"),
        *both("wall", 0),
        ratio("wall"),
        ratio("train_seconds"),
        *both("peak_mb", 0),
        ratio("peak_mb"),
    ]


def measure_program(name: str, method: str, program: str, seed: int) -> dict[str, Any]:
    """A whole fine-tuning process on two threads: seconds, memory, and the score on the test set."""
    from nextword.pipeline.predictor import compute_labeled_metrics

    count, epochs = PEERS[name]
    files = split_files(name)
    train = save(WORK_DIR / "peers" / f"{name}.jsonl", sample(read_lines(files["train"]), 64 if QUICK else count))
    test = save(
        WORK_DIR / "peers" / f"{name}-test.jsonl",
        sample(read_lines(files["test"]), MAX_GENERATED if name in GENERATIVE_SETS else None),
    )
    data = load_data(name, train, test)
    steps = 3 if QUICK else epochs * -(-len(data.train) // BATCH)
    out = WORK_DIR / "runs" / "peers"
    shutil.rmtree(out, ignore_errors=True)
    if program == "nextword":
        settings = {
            "steps": steps,
            "seed": seed,
            "training.lr": LEARNING_RATE[method],
            "training.evaluations": 1,
            "training.compile": "no",
            "training.save-every": steps,
            "tuning.batch-examples": BATCH,
            "tuning.auxiliary": 0,
            "tuning.dropout": 0,
            "tuning.balance": "no",
        }
        arguments = (
            base_model(),
            train,
            "--validation",
            files["validation"],
            "--task",
            data.task_spec.task,
            "--out",
            out,
        )
        options = [f"--{key}={value}" for key, value in settings.items()] + ["--lora"] * (method == "lora")
        done = nextword("finetune", *arguments, *options, "--json", "--quiet", threads=2)
        seconds = [record["seconds"] for record in read_lines(out / "metrics.jsonl") if "lr" in record]
        loop = (seconds[-1] - seconds[0]) * len(seconds) / max(1, len(seconds) - 1)
        answers = nextword("predict", out, test, "--json", "--quiet")["predictions"]
    else:
        settings = {
            "base": str(base_model() / "model"),
            "train": str(train),
            "validation": str(files["validation"]),
            "out": str(out),
            "task": data.task_spec.task,
            "labels": list(data.task_spec.labels),
            "seed": seed,
            "max_new_tokens": data.task_spec.answer_tokens,
            "steps": steps,
            "batch": BATCH,
            "lr": LEARNING_RATE[method],
            "lora": method == "lora",
            "grouped": "length" in program,
        }
        done = run_transformers("train", save(WORK_DIR / "peers" / "settings.json", settings), threads=2)
        loop = done["lines"][0]["train_seconds"]
        worker_input = {
            "task": data.task_spec.task,
            "max_new_tokens": data.task_spec.answer_tokens,
            "items": read_lines(test),
        }
        answers = run_transformers("answer", out, save(WORK_DIR / "inputs" / "peers.json", worker_input))["lines"]
        answers = [{**answer, "text": answer["text"].strip()} if "text" in answer else answer for answer in answers]
    score = (
        compute_labeled_metrics(data.task_spec, data.validation, answers)[SETS[name].metric].value * SETS[name].scale
    )
    return {"score": score, "wall": done["wall"], "peak_mb": done["peak_mb"], "train_seconds": loop, "steps": steps}
