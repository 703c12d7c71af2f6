"""lm-eval (EleutherAI's evaluation harness) through the server, beside its own `hf` model on the same directory.

    python -m benchmarks.lm_eval_agreement MODEL [--pairs 1000] [--python PYTHON]

The task is made here, from BLiMP (67 files of minimal pairs): which of two sentences does a model find likelier? Both runs are
the harness's own command, unmodified; the server is asked by its `local-completions`. Printed is one JSON object: both
accuracies, how many decisions differ, and the largest difference of a log-likelihood. Exit code 1 where an accuracy or a
decision differs. PYTHON is one that has lm-eval; without it, an environment is made under build/bench/peers.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.run import DATA
from benchmarks.serving_client import Served
from benchmarks.speed import interpreter
from nextword.data.tokenizer import Tokenizer

TASK = {
    "task": "minimal_pairs", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "", "doc_to_target": 0, "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def write_task(folder: Path, pairs: int, fits: Callable[[str], bool]) -> tuple[int, int]:
    """The first pairs of each of BLiMP's files as a task of the harness; how many there are altogether, and how many besides
    that do not fit."""
    rows: list[str] = []
    with tarfile.open(DATA / "blimp.tar.xz") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if file := archive.extractfile(member):
                rows += file.read().decode().splitlines()[:pairs]
    said = [{name: json.loads(row)[name] for name in ("sentence_good", "sentence_bad")} for row in rows]
    said, all_of_them = [one for one in said if all(map(fits, one.values()))], len(said)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said), encoding="utf-8")
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "pairs.jsonl")}}}
    (folder / "minimal_pairs.yaml").write_text(json.dumps(task))  # JSON is YAML
    return len(said), all_of_them - len(said)


def evaluate(python: str, folder: Path, name: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One run of the harness: its accuracy, and for each pair both log-likelihoods."""
    out = folder / name
    arguments = ",".join(f"{key}={value}" for key, value in settings.items())
    command = [python, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", TASK["task"]]
    command += [
        "--include_path",
        str(folder),
        "--output_path",
        str(out),
        "--log_samples",
        "--batch_size",
        "16",
        "--device",
        "cpu",
    ]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "OPENAI_API_KEY": "none",
    }
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"][TASK["task"]]
    samples = [json.loads(line) for line in next(out.rglob("samples_*.jsonl")).read_text(encoding="utf-8").splitlines()]
    found = {sample["doc_id"]: [float(one[0]) for one in sample["filtered_resps"]] for sample in samples}
    return {"accuracy": results["acc,none"], "likelihoods": [found[i] for i in range(len(found))]}


def compare(model: Path, python: str, pairs: int) -> dict[str, Any]:
    """Both runs on the same pairs, and how far they are apart."""
    with tempfile.TemporaryDirectory() as made, Served(model) as server:
        folder = Path(made)
        length, tokenizer = server.metadata["context_length"], Tokenizer.open(server.directory)
        # Of a sentence that fills what it takes for the context, the harness's client finds nothing to be left before it.
        count, too_long = write_task(folder, pairs, lambda text: len(tokenizer.encode(text)) <= length - 2)
        asked = {"base_url": f"{server.url}/v1/completions", "model": server.metadata["model"],
                 "tokenizer": str(server.directory),
                 "num_concurrent": 4, "max_length": length, "max_retries": 1}  # fmt: skip
        ours = evaluate(python, folder, "served", "local-completions", asked)
        given = {"pretrained": str(server.directory), "dtype": "float32", "max_length": length}
        theirs = evaluate(python, folder, "hf", "hf", given)
    both = list(zip(ours["likelihoods"], theirs["likelihoods"], strict=True))
    return {
        "pairs": count, "too_long": too_long, "served": ours["accuracy"], "hf": theirs["accuracy"],
        "decisions_that_differ": sum((a[0] > a[1]) != (b[0] > b[1]) for a, b in both),
        "largest_difference": max(abs(x - y) for a, b in both for x, y in zip(a, b, strict=True)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="lm-eval through the server, beside its own hf model")
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=1000, help="of each of BLiMP's 67 files")
    parser.add_argument("--python", help="a Python that has lm-eval")
    given = parser.parse_args()
    result = compare(given.model, given.python or interpreter("lm-eval"), given.pairs)
    print(json.dumps(result))
    sys.exit(result["served"] != result["hf"] or result["decisions_that_differ"] > 0)


if __name__ == "__main__":
    main()
