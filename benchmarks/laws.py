"""What a run reaches by its size, its tokens and its text: the runs that the constants of `training/laws.py` are fitted to.

    python -m benchmarks.laws [runs] [fit]

Two runs side by side, one thread each; every run is kept under build/bench/laws. `fit` prints the constants, what each corpus
would have been predicted to reach by a fit to the others, and how far that was off.
"""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recipe import corpora as recipe_corpora
from benchmarks.recipe import environment
from benchmarks.run import DATA, KEPT, nextword

WORK = KEPT / "laws"
LADDER = {64: (2, 2), 128: (4, 4), 192: (6, 6), 256: (6, 8), 384: (8, 6)}  # width: layers, heads
# Widths and tokens: each width from far too few tokens for it to more than enough.
POINTS = [
    (64, 150_000), (64, 600_000), (64, 2_400_000), (128, 300_000), (128, 1_200_000), (128, 4_800_000), (192, 600_000),
    (192, 2_400_000), (256, 1_200_000), (256, 4_800_000), (384, 2_400_000),
]  # fmt: skip


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def flattened(name: str, texts: list[str]) -> Path:
    """Texts of labelled data as JSON Lines."""
    path = WORK / "texts" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def texts() -> dict[str, tuple[Path | str, tuple[str, ...]]]:
    """Corpora by name: the path, and the options of `prepare`."""
    said = [
        "\n".join(f"{turn['role']}: {turn['content']}" for turn in one["messages"])
        for one in records(DATA / "dialogues" / "train.jsonl")
    ]
    asked = [
        "\n".join(part for part in (one["instruction"], one["input"], one["output"]) if part)
        for one in records(DATA / "instructions" / "instructions.json")
    ]
    pairs = DATA / "english_french" / "train.tsv"
    return {
        "python-docs": ("python-docs", ()),
        "swahili": (DATA / "small_languages" / "swahili", ()),
        "reviews": (DATA / "movie_reviews" / "train.csv", ()),
        "french": (pairs, ("--text-column", "french")),
        # Those that nothing is fitted to:
        "wolof": (DATA / "small_languages" / "wolof", ()),
        "dialogues": (flattened("dialogues", said), ()),
        "abstracts": (DATA / "scitldr" / "train.jsonl", ()),
        "english": (pairs, ("--text-column", "english")),
        "instructions": (flattened("instructions", asked), ()),
    }


FITTED = ("books", "shakespeare", "python-docs", "swahili", "reviews", "french")
HELD_OUT = ("wolof", "dialogues", "abstracts", "english", "instructions")


def shards(names: tuple[str, ...]) -> dict[str, Path]:
    known, found = texts(), recipe_corpora()
    for name in names:
        if name not in found:
            path, options = known[name]
            found[name] = WORK / "shards" / name
            nextword("prepare", path, *options, "--out", found[name], "--json", "--quiet")
    return {name: found[name] for name in names}


def run(path: Path, corpus: str, width: int, tokens: int) -> dict[str, Any]:
    kept = WORK / "cells" / f"{corpus}-{width}-{tokens}.json"
    if not kept.exists():
        layers, heads = LADDER[width]
        settings = {
            "tokens": tokens, "batch_tokens": batch_tokens(tokens),
            "model": {"n_layers": layers, "n_heads": heads, "d_model": width, "context_length": 256},
        }  # fmt: skip
        program = [sys.executable, "-m", "benchmarks.recipe_work", str(path), json.dumps(settings)]
        done = subprocess.run(program, capture_output=True, text=True, env=environment())
        if done.returncode:
            raise SystemExit(f"{' '.join(program)}\n{done.stderr}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"corpus": corpus, "width": width, "asked": tokens, **json.loads(done.stdout)}))
        print(corpus, width, tokens, json.loads(done.stdout)["bits_per_byte"], file=sys.stderr, flush=True)
    return json.loads(kept.read_text())


def batch_tokens(tokens: int) -> int:
    """As the program chooses it."""
    from nextword.training.plan import batch_tokens as chosen

    return chosen(tokens)


def runs() -> list[dict[str, Any]]:
    found = shards(FITTED)
    jobs = [(found[corpus], corpus, width, tokens) for width, tokens in POINTS for corpus in FITTED]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: run(*job), jobs))


# ---------------------------------------------------------------- the fit


def features(one: dict[str, Any], path: Path) -> dict[str, float]:
    """What the law knows of a run: parameters of the blocks, tokens in bytes, the text's bytes and its difficulty."""
    from nextword.text.corpus import Corpus
    from nextword.training.laws import difficulty

    corpus = Corpus.open(path)
    per_token = corpus.train.bytes / corpus.train.tokens
    return {
        "parameters": one["parameters"], "bytes": one["tokens"] * per_token, "unique": corpus.train.bytes,
        "difficulty": difficulty(corpus), "bits": one["bits_per_byte"],
    }  # fmt: skip


def fit() -> None:
    from scipy.optimize import least_squares

    from nextword.training.laws import Law

    found = shards(FITTED)
    data = [(one["corpus"], features(one, found[one["corpus"]])) for one in runs()]

    def residuals(logarithms: np.ndarray, chosen: list[dict[str, float]]) -> np.ndarray:
        law = Law(*np.exp(logarithms))  # all constants are positive
        return np.array(
            [math.log(law.bits(f["parameters"], f["bytes"], f["unique"], f["difficulty"]) / f["bits"]) for f in chosen]
        )

    def fitted(chosen: list[dict[str, float]]) -> np.ndarray:
        begin = np.log(Law().constants())
        return least_squares(residuals, begin, args=(chosen,), loss="soft_l1", f_scale=0.03).x

    everything = [f for _, f in data]
    constants = fitted(everything)
    print("\nconstants:", ", ".join(f"{value:.4g}" for value in np.exp(constants)))
    print(f"residual: {100 * residuals(constants, everything).std():.2f} %")
    print("\n| corpus left out | off by, mean % | spread % |\n|---|---|---|")
    outside = []
    for name in FITTED:
        others = fitted([f for corpus, f in data if corpus != name])
        off = residuals(others, [f for corpus, f in data if corpus == name])
        outside += off.tolist()
        print(f"| {name} | {100 * off.mean():+.1f} | {100 * off.std():.1f} |")
    print(f"\nleft out: 80 % of the runs are within {100 * np.quantile(np.abs(outside), 0.8):.1f} %")


def main() -> None:
    sections = {"runs": runs, "fit": fit}
    for name in sys.argv[1:] or list(sections):
        sections[name]()


if __name__ == "__main__":
    main()
