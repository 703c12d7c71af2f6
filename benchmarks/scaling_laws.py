"""The runs to which the constants of `nextword.planning.scaling_law` are fitted, the fit, and its validation.

    python -m benchmarks.scaling_laws [runs] [fit] [validate]

`runs` trains models of several sizes on several corpora, two in parallel with one thread each. The results are stored in
scaling_laws.jsonl; a run is repeated if its line is removed. `fit` prints the constants, and the prediction errors for each
corpus of a fit to the others. `validate` trains with several time budgets on corpora that were not used for the fit, and
compares the predictions with the results, which are stored in scaling_laws_validation.jsonl.
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
from benchmarks.run import CACHE_DIR, DATA, nextword
from nextword.training.config import TrainingConfig

WORK_DIR = CACHE_DIR / "scaling-laws"
RUNS = Path(__file__).with_suffix(".jsonl")
VALIDATION_RUNS = Path(__file__).with_name("scaling_laws_validation.jsonl")
# Sizes and tokens: from too few tokens for the size to more than enough, at most twenty minutes per run.
POINTS = [("micro", 150_000), ("micro", 600_000), ("tiny", 300_000), ("tiny", 1_200_000)]
# Additional points for some corpora: many tokens, few tokens, and many epochs over small texts.
LONGER = {
    ("books", "shakespeare"): [("micro", 2_400_000), ("mini", 300_000), ("mini", 1_200_000), ("tiny", 4_800_000)],
    ("swahili", "reviews"): [("micro", 2_400_000), ("tiny", 4_800_000)],
    # Parts of texts that are too small for all of these sizes:
    ("reviews-part", "swahili-part", "french-part"): [
        ("mini", 600_000),
        ("mini", 300_000),
        ("tiny", 600_000),
        ("tiny", 300_000),
        ("micro", 600_000),
    ],
}
# Log-normal priors of the constants, (median, factor). Some thirty runs of small models determine some of them poorly. The
# medians are those of larger models (Hoffmann et al. 2022, exponents of table A3; Muennighoff et al. 2023, R* = 15.4). The
# scales and the difficulty exponent are nearly unconstrained.
PRIORS = {
    "irreducible_loss": (0.85, 2.7),
    "parameters_scale": (900, 20),
    "alpha": (0.34, 1.3),
    "bytes_scale": (1.5e5, 7.4),
}
PRIORS |= {
    "beta": (0.36, 1.3),
    "repeat_half_life": (15.4, 2.0),
    "difficulty_exponent": (0.6, 2.7),
    "memorization_coefficient": (0.005, 4.0),
}
PRIORS |= {"memorization_exponent": (0.4, 1.6)}
NOISE = 0.04  # relative standard deviation of a run around the law


def read_records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def write_texts(name: str, texts: list[str]) -> Path:
    """Write the texts of labeled data as JSON Lines."""
    path = WORK_DIR / "texts" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def texts() -> dict[str, tuple[Path | str, tuple[str, ...]]]:
    """Corpora by name: the path, and the options of `prepare`."""
    dialogues = [
        "\n".join(f"{turn['role']}: {turn['content']}" for turn in conversation["messages"])
        for conversation in read_records(DATA / "dialogues" / "train.jsonl")
    ]
    instructions = [
        "\n".join(part for part in (record["instruction"], record["input"], record["output"]) if part)
        for record in read_records(DATA / "instructions" / "instructions.json")
    ]
    questions = [
        "\n".join((record["question"], record["choices"][record["answer"]]))
        for record in read_records(DATA / "arc_easy" / "train.jsonl")
    ]
    pairs = DATA / "english_french" / "train.tsv"
    with (DATA / "movie_reviews" / "train.csv").open(encoding="utf-8", newline="") as file:
        reviews = [row["text"] for row in csv.DictReader(file)]
    books = sorted((DATA / "small_languages" / "swahili").iterdir())
    french = [line.split("\t")[1] for line in pairs.read_text(encoding="utf-8").splitlines()[1:]]
    return {
        "reviews-part": (write_texts("reviews-part", reviews[::5]), ()),
        "swahili-part": (write_texts("swahili-part", [book.read_text(encoding="utf-8") for book in books[::5]]), ()),
        "french-part": (write_texts("french-part", french[::10]), ()),
        "python-docs": ("python-docs", ()),
        "swahili": (DATA / "small_languages" / "swahili", ()),
        "reviews": (DATA / "movie_reviews" / "train.csv", ()),
        "french": (pairs, ("--text-column", "french")),
        # Not used for the fit:
        "wolof": (DATA / "small_languages" / "wolof", ()),
        "dialogues": (write_texts("dialogues", dialogues), ()),
        "abstracts": (DATA / "scitldr" / "train.jsonl", ()),
        "english": (pairs, ("--text-column", "english")),
        "instructions": (write_texts("instructions", instructions), ()),
        "questions": (write_texts("questions", questions), ()),
        "premises": (
            write_texts("premises", [record["premise"] for record in read_records(DATA / "mnli" / "train.jsonl")]),
            (),
        ),
    }


FITTED = ("books", "shakespeare", "python-docs", "swahili", "reviews", "french")
PARTS = ("reviews-part", "swahili-part", "french-part")
VALIDATION_CORPORA = ("wolof", "dialogues", "abstracts", "english", "instructions")
BUDGETS = ("1m", "3m", "10m")
# Two more that were not used for the last changes of the law, with the shorter budgets.
NEW_CORPORA, NEW_BUDGETS = ("questions", "premises"), ("1m", "3m")


def prepare_shards(names: tuple[str, ...]) -> dict[str, Path]:
    sources, shards = texts(), recipe_corpora()
    for name in names:
        if name not in shards:
            path, options = sources[name]
            shards[name] = WORK_DIR / "shards" / name
            nextword("prepare", path, *options, "--out", shards[name], "--json", "--quiet")
    return {name: shards[name] for name in names}


def features(result: dict[str, Any], path: Path) -> dict[str, float]:
    """The variables of the law: parameters, training data in bytes, unique bytes, and difficulty; and the bits per byte."""
    from nextword.data.corpus import Corpus
    from nextword.planning.scaling_law import corpus_difficulty

    corpus = Corpus.open(path)
    per_token = corpus.train.bytes / corpus.train.tokens
    return {
        "parameters": result["parameters"],
        "bytes": result["tokens"] * per_token,
        "unique": corpus.train.bytes,
        "difficulty": corpus_difficulty(corpus).bits,
        "bits": result["bits_per_byte"],
    }


def known_runs() -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(run["corpus"], run["size"], run["asked"]): run for run in read_records(RUNS)} if RUNS.exists() else {}


def run(path: Path, corpus: str, size: str, tokens: int, lock: Lock) -> None:
    settings = {
        "size": size,
        "tokens": tokens,
        "batch_tokens": batch_tokens(tokens),
        "momentum": TrainingConfig().momentum,
        "beta2": TrainingConfig().beta2,
    }
    program = [sys.executable, "-m", "benchmarks.pretraining_worker", str(path), json.dumps(settings)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{' '.join(program)}\n{done.stderr}")
    line = {"corpus": corpus, "size": size, "asked": tokens, **features(json.loads(done.stdout), path)}
    with lock, RUNS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(line, file=sys.stderr, flush=True)


def batch_tokens(tokens: int) -> int:
    """The default batch size of nextword."""
    from nextword.planning.size_selection import default_batch_tokens

    return default_batch_tokens(tokens)


def runs() -> None:
    points = [(corpus, *point) for point in POINTS for corpus in FITTED]
    points += [(corpus, *point) for corpora, longer in LONGER.items() for point in longer for corpus in corpora]
    known, lock = known_runs(), Lock()
    missing = [point for point in points if point not in known]
    shards = prepare_shards(FITTED + PARTS) if missing else {}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda point: run(shards[point[0]], point[0], point[1], point[2], lock), missing))


# ---------------------------------------------------------------- the fit


def fit() -> None:
    from scipy.optimize import least_squares

    from nextword.planning.scaling_law import ScalingLaw

    data = [(corpus, run) for (corpus, _, _), run in known_runs().items()]

    prior_mean, prior_std = np.log(
        [PRIORS[name] for name in ScalingLaw.fitted_fields()]
    ).T  # all constants are positive

    def residuals(logarithms: np.ndarray, chosen: list[dict[str, float]]) -> np.ndarray:
        law = ScalingLaw(*np.exp(logarithms))
        return np.array(
            [
                math.log(law.bits_per_byte(f["parameters"], f["bytes"], f["unique"], f["difficulty"]) / f["bits"])
                for f in chosen
            ]
        )

    def fitted(chosen: list[dict[str, float]]) -> np.ndarray:
        def weighted_residuals(logarithms: np.ndarray) -> np.ndarray:
            return np.concatenate([residuals(logarithms, chosen) / NOISE, (logarithms - prior_mean) / prior_std])

        return least_squares(weighted_residuals, prior_mean, loss="soft_l1").x

    everything = [f for _, f in data]
    constants = fitted(everything)
    print("\nconstants:", ", ".join(f"{value:.4g}" for value in np.exp(constants)))
    print(f"residual: {100 * residuals(constants, everything).std():.2f} %")
    print("\n| corpus left out | mean error, % | standard deviation, % |\n|---|---|---|")
    left_out_errors = []
    for name in FITTED:  # together with its part
        others = fitted([f for corpus, f in data if corpus.split("-part")[0] != name])
        errors = residuals(others, [f for corpus, f in data if corpus.split("-part")[0] == name])
        left_out_errors += errors.tolist()
        print(f"| {name} | {100 * errors.mean():+.1f} | {100 * errors.std():.1f} |")
    print(f"\ncorpora left out: 80 % of the errors are below {100 * np.quantile(np.abs(left_out_errors), 0.8):.1f} %")


# ---------------------------------------------------------------- validation


def plan_variables(run: Path) -> dict[str, Any]:
    """The variables of the law for the plan of a run."""
    from nextword.data.corpus import Corpus
    from nextword.planning.scaling_law import corpus_difficulty

    metadata = json.loads((run / "run.json").read_text(encoding="utf-8"))
    plan, unique = metadata["plan"], metadata["data"]["train"]["bytes"]
    choices = {key: plan[key] for key in ("size", "parameters", "epochs")}
    difficulty = corpus_difficulty(Corpus.open(run / "data"))
    return {**choices, "unique": unique, "difficulty": difficulty.bits, "doubt": difficulty.uncertainty}


def validation_run(corpus: str, budget: str, lock: Lock) -> None:
    """A run with a budget that includes the preparation of its text."""
    path, options = texts()[corpus]
    out = WORK_DIR / "validation" / f"{corpus}-{budget}"
    shutil.rmtree(out, ignore_errors=True)
    result = nextword("pretrain", path, *options, "--out", out, "--budget", budget, "--json", "--quiet", threads=1)
    line = {"corpus": corpus, "budget": budget, "seconds": result["wall"], "reached": result["bits_per_byte"]}
    line |= plan_variables(out)
    with lock, VALIDATION_RUNS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(line, file=sys.stderr, flush=True)


def validate() -> None:
    from nextword.common.numbers import parse_duration
    from nextword.planning.size_selection import DEFAULT_LAW as law  # noqa: N811

    jobs, lock = [(corpus, budget) for budget in BUDGETS for corpus in VALIDATION_CORPORA], Lock()
    jobs += [(corpus, budget) for budget in NEW_BUDGETS for corpus in NEW_CORPORA]
    known = {
        (run["corpus"], run["budget"]) for run in (read_records(VALIDATION_RUNS) if VALIDATION_RUNS.exists() else [])
    }
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: validation_run(job[0], job[1], lock), [job for job in jobs if job not in known]))
    results = {(result["corpus"], result["budget"]): result for result in read_records(VALIDATION_RUNS)}
    print(
        "\n| text | budget | seconds | share of the budget | size | epochs | planned bits per byte | actual | inside |"
    )
    print("|---" * 9 + "|")
    in_time = within = 0
    for corpus, budget in jobs:
        run = results[corpus, budget]
        bits = law.bits_per_byte(run["parameters"], run["epochs"] * run["unique"], run["unique"], run["difficulty"])
        is_fitted = law.is_fitted(run["parameters"], run["unique"], run["difficulty"])
        low, high = law.prediction_interval(bits, run["doubt"], is_fitted)
        share, inside = run["seconds"] / parse_duration(budget), low <= run["reached"] <= high
        in_time, within = in_time + (abs(share - 1) <= 0.05), within + inside
        print(
            f"| {corpus} | {budget} | {run['seconds']:.1f} | {100 * share:.1f} % | {run['size']} | {run['epochs']:.1f} "
            f"| {bits:.3f} ({low:.3f}–{high:.3f}) | {run['reached']:.3f} "
            f"| {'yes' if inside else 'no'} |"
        )
    print(f"\nwithin 5 % of the budget: {in_time} of {len(jobs)}; within the interval: {within} of {len(jobs)}")


def main() -> None:
    sections = {"runs": runs, "fit": fit, "validate": validate}
    for name in sys.argv[1:] or list(sections):
        sections[name]()


if __name__ == "__main__":
    main()
