"""What a run reaches by its size, its tokens and its text: the runs that the constants of `training/laws.py` are fitted to.

    python -m benchmarks.scaling_laws [runs] [fit] [hold]

Two runs side by side, one thread each; what came of every run stands in scaling_laws.jsonl beside this, and is not run again until its
line is taken out. `fit` prints the constants, what each corpus would have been predicted to reach by a fit to the others, and
how far that was off. `hold` gives the program itself three budgets on five corpora that nothing was fitted to, and two on two
more, and sets what the law said of the plan beside what came of it, in scaling_laws_validation.jsonl.
"""

import csv
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from benchmarks.pretraining_ablation import corpora as recipe_corpora
from benchmarks.pretraining_ablation import environment
from benchmarks.run import DATA, KEPT, nextword
from nextword.training.config import TrainingConfig

WORK = KEPT / "laws"
RUNS = Path(__file__).with_suffix(".jsonl")
HELD = Path(__file__).with_name("scaling_laws_validation.jsonl")
# Sizes and tokens: each size from too few tokens for it to more than enough, as far as that takes twenty minutes at most.
POINTS = [("micro", 150_000), ("micro", 600_000), ("tiny", 300_000), ("tiny", 1_200_000)]
# For some corpora alone: many tokens, and few; and of small texts, many times over them.
LONGER = {
    ("books", "shakespeare"): [("micro", 2_400_000), ("mini", 300_000), ("mini", 1_200_000), ("tiny", 4_800_000)],
    ("swahili", "reviews"): [("micro", 2_400_000), ("tiny", 4_800_000)],
    # Parts of texts, too small for any of these sizes:
    ("reviews-part", "swahili-part", "french-part"): [
        ("mini", 600_000), ("mini", 300_000), ("tiny", 600_000), ("tiny", 300_000), ("micro", 600_000),
    ],
}  # fmt: skip
# Where some thirty runs of small models on six texts say little of a constant, the literature does: what it found at a hundred
# times the size (Hoffmann et al. 2022, table A3's exponents; Muennighoff et al. 2023, R* = 15.4), and by what factor that may
# be off here. The scales and the taste for difficulty are as good as free.
EXPECTED = {
    "irreducible_loss": (0.85, 2.7),
    "parameters_scale": (900, 20),
    "alpha": (0.34, 1.3),
    "bytes_scale": (1.5e5, 7.4),
}
EXPECTED |= {
    "beta": (0.36, 1.3),
    "repeat_half_life": (15.4, 2.0),
    "difficulty_exponent": (0.6, 2.7),
    "memorization_coefficient": (0.005, 4.0),
}
EXPECTED |= {"memorization_exponent": (0.4, 1.6)}
NOISE = 0.04  # of a run about the law, as a share


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def flattened(name: str, texts: list[str]) -> Path:
    """Texts of labeled data as JSON Lines."""
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
    questions = [
        "\n".join((one["question"], one["choices"][one["answer"]]))
        for one in records(DATA / "arc_easy" / "train.jsonl")
    ]
    pairs = DATA / "english_french" / "train.tsv"
    with (DATA / "movie_reviews" / "train.csv").open(encoding="utf-8", newline="") as file:
        reviewed = [row["text"] for row in csv.DictReader(file)]
    books = sorted((DATA / "small_languages" / "swahili").iterdir())
    spoken = [line.split("\t")[1] for line in pairs.read_text(encoding="utf-8").splitlines()[1:]]
    return {
        "reviews-part": (flattened("reviews-part", reviewed[::5]), ()),
        "swahili-part": (flattened("swahili-part", [book.read_text(encoding="utf-8") for book in books[::5]]), ()),
        "french-part": (flattened("french-part", spoken[::10]), ()),
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
        "questions": (flattened("questions", questions), ()),
        "premises": (flattened("premises", [one["premise"] for one in records(DATA / "mnli" / "train.jsonl")]), ()),
    }


FITTED = ("books", "shakespeare", "python-docs", "swahili", "reviews", "french")
PARTS = ("reviews-part", "swahili-part", "french-part")
HELD_OUT = ("wolof", "dialogues", "abstracts", "english", "instructions")
BUDGETS = ("1m", "3m", "10m")
# Two more, which the last changes of the law had not seen either, for the shorter budgets.
FRESH, FRESH_BUDGETS = ("questions", "premises"), ("1m", "3m")


def shards(names: tuple[str, ...]) -> dict[str, Path]:
    known, found = texts(), recipe_corpora()
    for name in names:
        if name not in found:
            path, options = known[name]
            found[name] = WORK / "shards" / name
            nextword("prepare", path, *options, "--out", found[name], "--json", "--quiet")
    return {name: found[name] for name in names}


def features(one: dict[str, Any], path: Path) -> dict[str, float]:
    """What the law knows of a run: parameters of the blocks, tokens in bytes, the text's bytes and its difficulty."""
    from nextword.data.corpus import Corpus
    from nextword.planning.scaling_law import corpus_difficulty

    corpus = Corpus.open(path)
    per_token = corpus.train.bytes / corpus.train.tokens
    return {
        "parameters": one["parameters"], "bytes": one["tokens"] * per_token, "unique": corpus.train.bytes,
        "difficulty": corpus_difficulty(corpus).bits, "bits": one["bits_per_byte"],
    }  # fmt: skip


def known_runs() -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(one["corpus"], one["size"], one["asked"]): one for one in records(RUNS)} if RUNS.exists() else {}


def run(path: Path, corpus: str, size: str, tokens: int, keeping: Lock) -> None:
    settings = {
        "size": size, "tokens": tokens, "batch_tokens": batch_tokens(tokens), "momentum": TrainingConfig().momentum,
        "beta2": TrainingConfig().beta2,
    }  # fmt: skip
    program = [sys.executable, "-m", "benchmarks.pretraining_worker", str(path), json.dumps(settings)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{' '.join(program)}\n{done.stderr}")
    line = {"corpus": corpus, "size": size, "asked": tokens, **features(json.loads(done.stdout), path)}
    with keeping, RUNS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(line, file=sys.stderr, flush=True)


def batch_tokens(tokens: int) -> int:
    """As the program chooses it."""
    from nextword.planning.size_selection import default_batch_tokens as chosen

    return chosen(tokens)


def runs() -> None:
    points = [(corpus, *point) for point in POINTS for corpus in FITTED]
    points += [(corpus, *point) for corpora, longer in LONGER.items() for point in longer for corpus in corpora]
    known, keeping = known_runs(), Lock()
    left = [point for point in points if point not in known]
    found = shards(FITTED + PARTS) if left else {}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda point: run(found[point[0]], point[0], point[1], point[2], keeping), left))


# ---------------------------------------------------------------- the fit


def fit() -> None:
    from scipy.optimize import least_squares

    from nextword.planning.scaling_law import ScalingLaw

    data = [(corpus, one) for (corpus, _, _), one in known_runs().items()]

    begin, doubt = np.log(
        [EXPECTED[name] for name in ScalingLaw.fitted_fields()]
    ).T  # logarithms: all constants are positive

    def residuals(logarithms: np.ndarray, chosen: list[dict[str, float]]) -> np.ndarray:
        law = ScalingLaw(*np.exp(logarithms))
        return np.array(
            [
                math.log(law.bits_per_byte(f["parameters"], f["bytes"], f["unique"], f["difficulty"]) / f["bits"])
                for f in chosen
            ]
        )

    def fitted(chosen: list[dict[str, float]]) -> np.ndarray:
        def off(logarithms: np.ndarray) -> np.ndarray:
            return np.concatenate([residuals(logarithms, chosen) / NOISE, (logarithms - begin) / doubt])

        return least_squares(off, begin, loss="soft_l1").x

    everything = [f for _, f in data]
    constants = fitted(everything)
    print("\nconstants:", ", ".join(f"{value:.4g}" for value in np.exp(constants)))
    print(f"residual: {100 * residuals(constants, everything).std():.2f} %")
    print("\n| corpus left out | off by, mean % | spread % |\n|---|---|---|")
    outside = []
    for name in FITTED:  # with its part
        others = fitted([f for corpus, f in data if corpus.split("-part")[0] != name])
        off = residuals(others, [f for corpus, f in data if corpus.split("-part")[0] == name])
        outside += off.tolist()
        print(f"| {name} | {100 * off.mean():+.1f} | {100 * off.std():.1f} |")
    print(f"\nleft out: 80 % of the runs are within {100 * np.quantile(np.abs(outside), 0.8):.1f} %")


# ---------------------------------------------------------------- does it hold?


def planned(run: Path) -> dict[str, Any]:
    """What a plan knew of its run, by which the law can be asked again."""
    from nextword.data.corpus import Corpus
    from nextword.planning.scaling_law import corpus_difficulty

    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    plan, unique = facts["plan"], facts["data"]["train"]["bytes"]
    known = {key: plan[key] for key in ("size", "parameters", "epochs")}
    hard = corpus_difficulty(Corpus.open(run / "data"))
    return {**known, "unique": unique, "difficulty": hard.bits, "doubt": hard.uncertainty}


def held(corpus: str, budget: str, keeping: Lock) -> None:
    """A run as a person would begin it, its text prepared within the budget as well."""
    path, options = texts()[corpus]
    out = WORK / "held" / f"{corpus}-{budget}"
    shutil.rmtree(out, ignore_errors=True)
    result = nextword("pretrain", path, *options, "--out", out, "--budget", budget, "--json", "--quiet", threads=1)
    line = {"corpus": corpus, "budget": budget, "seconds": result["wall"], "reached": result["bits_per_byte"]}
    line |= planned(out)
    with keeping, HELD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(line, file=sys.stderr, flush=True)


def hold() -> None:
    from nextword.common.numbers import parse_duration
    from nextword.planning.size_selection import DEFAULT_LAW as law  # noqa: N811

    jobs, keeping = [(corpus, budget) for budget in BUDGETS for corpus in HELD_OUT], Lock()
    jobs += [(corpus, budget) for budget in FRESH_BUDGETS for corpus in FRESH]
    known = {(one["corpus"], one["budget"]) for one in (records(HELD) if HELD.exists() else [])}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: held(job[0], job[1], keeping), [job for job in jobs if job not in known]))
    found = {(one["corpus"], one["budget"]): one for one in records(HELD)}
    print("\n| text | budget | seconds | of the budget | size | epochs | planned bits per byte | reached | within |")
    print("|---" * 9 + "|")
    in_time = within = 0
    for corpus, budget in jobs:
        one = found[corpus, budget]
        bits = law.bits_per_byte(one["parameters"], one["epochs"] * one["unique"], one["unique"], one["difficulty"])
        low, high = law.prediction_interval(bits, one["doubt"])
        share, inside = one["seconds"] / parse_duration(budget), low <= one["reached"] <= high
        in_time, within = in_time + (abs(share - 1) <= 0.05), within + inside
        print(
            f"| {corpus} | {budget} | {one['seconds']:.1f} | {100 * share:.1f} % | {one['size']} | {one['epochs']:.1f} "
            f"| {bits:.3f} ({low:.3f} to {high:.3f}) | {one['reached']:.3f} "
            f"| {'yes' if inside else 'no'} |"
        )
    print(f"\nwithin 5 % of the time: {in_time} of {len(jobs)}; within the interval: {within} of {len(jobs)}")


def main() -> None:
    sections = {"runs": runs, "fit": fit, "hold": hold}
    for name in sys.argv[1:] or list(sections):
        sections[name]()


if __name__ == "__main__":
    main()
