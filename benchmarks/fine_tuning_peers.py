"""Sections `agree` and `peers` of `benchmarks.fine_tuning`: this program beside the stock library, which has its own process."""

import json
import shutil
import statistics
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.fine_tuning_data import (
    METHODS,
    QUICK,
    SEEDS,
    SETS,
    WORDS,
    WORK,
    base,
    cell,
    few,
    gathered,
    parts,
    read,
    run_of,
    save,
    stock,
    tuned,
)  # fmt: skip
from benchmarks.run import mean_with_margin, nextword, spread

# Of the comparison with the stock Trainer: examples to learn from, and times over them.
PEERS = {"trec": (None, 2), "movie_reviews": (1500, 2), "stsb": (1000, 2), "english_french": (1000, 2)}
WRITTEN = 300  # of the test part's items, where answers are written
RATE = {"full": 3.75e-4, "lora": 3.75e-3}
BATCH = 32


def agree() -> None:
    title = ("", "weights", "predictions", "equal", "the others: by how much the stock model prefers its own answer")
    print(f"\n| {' | '.join(title)} |\n|{'---|' * len(title)}")
    for name in SETS:
        for variant in METHODS:
            found = cell(f"agree-{name}-{variant}", lambda n=name, v=variant: compare(n, v))
            others = ", ".join(f"{x['lead']:.1e}{' (a tie)' if x['lead'] < 1e-3 else ''}" for x in found["others"][:8])
            print(f"| {name} | {variant} | {found['n']:,} | {found['n'] - len(found['others']):,} | {others or '–'} |")


def compare(name: str, variant: str) -> dict[str, Any]:
    """Our answers to the test part (of written ones the first 200, of conversations 50) beside the stock model's."""
    tuned(name, variant, 0)
    run, items = run_of(name, variant, 0), read(parts(name)["test"])
    items = items[: {"rewrite": 200, "chat": 50}.get(SETS[name].task, len(items))]
    asked = save(WORK / "asked" / f"{name}.jsonl", items)
    ours = nextword("predict", run, asked, "--json", "--quiet")["predictions"]
    theirs = stock("answer", run / "model", questions(name, run, items))["lines"]
    others = []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if SETS[name].metric == "pearson":
            if abs(a["score"] - b["score"]) > 1e-4 * max(1.0, abs(a["score"])):
                others.append({"item": i, "lead": abs(a["score"] - b["score"])})
        elif "text" in b and a["text"] != b["text"].strip():
            others.append({"item": i, "lead": lead(a["text"], b), "ours": a["text"], "theirs": b["text"]})
        elif "label" in b and a["label"] != b["label"]:
            others.append({"item": i, "lead": b["margin"]})
    return {"n": len(ours), "others": others}


def questions(name: str, run: Path, items: list[dict[str, Any]]) -> Path:
    """What `tuning_peers answer` is asked."""
    room = json.loads((run / "run.json").read_text(encoding="utf-8"))["task"]["answer_tokens"]
    return save(WORK / "asked" / f"{run.name}.json", {"task": SETS[name].task, "room": room, "items": items})


def lead(ours: str, theirs: dict[str, Any]) -> float:
    """How far the stock model's token was ahead of the next likely one where the two texts part."""
    text = theirs["text"]
    begun = len(text) - len(text.lstrip())
    shared = begun + sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(ours, text[begun:], strict=False)))
    return next(
        (x for x, end in zip(theirs["leads"], theirs["ends"], strict=True) if end > shared), theirs["leads"][-1]
    )


def peers() -> None:
    title = ("", "weights", "beside", "score", "its score", "difference", "seconds", "its seconds", "ratio")
    title += ("ratio of training alone", "MB", "its MB", "ratio")
    print(f"\n| {' | '.join(title)} |\n|{'---|' * len(title)}")
    for name in PEERS:
        for method in METHODS:
            others = ("Trainer", "Trainer by length") if method == "full" else ("Trainer, PEFT",)
            found: dict[str, list[dict[str, Any]]] = {program: [] for program in ("nextword", *others)}
            for seed in SEEDS:  # in turn, so that a change of the machine's speed meets all
                for program in found:
                    key = f"peers-{name}-{method}-{program.replace(', ', '-').replace(' ', '-')}-{seed}"
                    found[program].append(cell(key, lambda a=(name, method, program, seed): timed(*a)))
            for other in others:
                print("| " + " | ".join([name, method, other, *beside(found["nextword"], found[other])]) + " |")
    print(
        f"\nDifferences of scores are over {len(SEEDS)} seeds, in pairs; ratios: the middle, and from where to where."
    )


def beside(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """The columns of `peers`: two programs' processes of the same seeds."""

    def both(key: str, digits: int) -> list[str]:
        return [f"{statistics.median(one[key] for one in runs):.{digits}f}" for runs in (ours, theirs)]

    def ratio(key: str) -> str:
        return spread([a[key] / b[key] for a, b in zip(ours, theirs, strict=True)], 2)

    gains = [a["score"] - b["score"] for a, b in zip(ours, theirs, strict=True)]
    return [
        *both("score", 1), mean_with_margin(gains, "+.1f"), *both("wall", 0), ratio("wall"),
        ratio("train_seconds"), *both("peak_mb", 0), ratio("peak_mb"),
    ]  # fmt: skip


def timed(name: str, method: str, program: str, seed: int) -> dict[str, Any]:
    """One whole process that fine-tunes, on two threads: seconds, memory, and the score on the test part."""
    from nextword.pipeline.predictor import compute_labeled_metrics

    count, epochs = PEERS[name]
    files = parts(name)
    train = save(WORK / "peers" / f"{name}.jsonl", few(read(files["train"]), 64 if QUICK else count))
    test = save(WORK / "peers" / f"{name}-test.jsonl", few(read(files["test"]), WRITTEN if name in WORDS else None))
    data = gathered(name, train, test)
    steps = 3 if QUICK else epochs * -(-len(data.train) // BATCH)
    out = WORK / "runs" / "peers"
    shutil.rmtree(out, ignore_errors=True)
    if program == "nextword":
        settings = {
            "steps": steps, "seed": seed, "training.lr": RATE[method], "training.evaluations": 1, "training.compile": "no",
            "training.save-every": steps, "tuning.batch-examples": BATCH, "tuning.auxiliary": 0, "tuning.dropout": 0,
            "tuning.balance": "no",
        }  # fmt: skip
        begin = (base(), train, "--validation", files["validation"], "--task", data.task_spec.task, "--out", out)
        said = [f"--{key}={value}" for key, value in settings.items()] + ["--lora"] * (method == "lora")
        done = nextword("finetune", *begin, *said, "--json", "--quiet", threads=2)
        seconds = [record["seconds"] for record in read(out / "metrics.jsonl") if "lr" in record]
        loop = (seconds[-1] - seconds[0]) * len(seconds) / max(1, len(seconds) - 1)
        answers = nextword("predict", out, test, "--json", "--quiet")["predictions"]
    else:
        settings = {
            "base": str(base() / "model"), "train": str(train), "validation": str(files["validation"]), "out": str(out),
            "task": data.task_spec.task, "labels": list(data.task_spec.labels), "seed": seed,
            "room": data.task_spec.answer_tokens,
            "steps": steps, "batch": BATCH, "lr": RATE[method], "lora": method == "lora", "grouped": "length" in program,
        }  # fmt: skip
        done = stock("train", save(WORK / "peers" / "settings.json", settings), threads=2)
        loop = done["lines"][0]["train_seconds"]
        asked = {"task": data.task_spec.task, "room": data.task_spec.answer_tokens, "items": read(test)}
        answers = stock("answer", out, save(WORK / "asked" / "peers.json", asked))["lines"]
        answers = [{**one, "text": one["text"].strip()} if "text" in one else one for one in answers]
    score = (
        compute_labeled_metrics(data.task_spec, data.validation, answers)[SETS[name].metric].value * SETS[name].scale
    )
    return {"score": score, "wall": done["wall"], "peak_mb": done["peak_mb"], "train_seconds": loop, "steps": steps}
