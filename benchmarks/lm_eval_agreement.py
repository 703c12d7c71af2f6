"""lm-eval (EleutherAI's evaluation harness) through the server, compared with its own `hf` model on the same directory.

    python -m benchmarks.lm_eval_agreement MODEL [--pairs 1000] [--python PYTHON]

The task consists of the minimal pairs of BLiMP (67 files): which sentence is more likely? Both runs use the unmodified lm-eval
command; the server is evaluated through its `local-completions`. Prints one JSON object: both accuracies, the number of pairs
with another answer, and the largest difference of a log-likelihood. The exit code is 1 if an accuracy or an answer differs.
PYTHON is an interpreter that has lm-eval; by default, an environment is created under build/bench/peers.
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
from benchmarks.serving_client import NextwordServer
from benchmarks.speed import interpreter
from nextword.data.tokenizer import Tokenizer

TASK = {
    "task": "minimal_pairs",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


def write_task(folder: Path, pairs: int, fits: Callable[[str], bool]) -> tuple[int, int]:
    """Write the first pairs of each BLiMP file as an lm-eval task. Returns the numbers of pairs and of pairs too long."""
    rows: list[str] = []
    with tarfile.open(DATA / "blimp.tar.xz") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if file := archive.extractfile(member):
                rows += file.read().decode().splitlines()[:pairs]
    pairs_read = [{name: json.loads(row)[name] for name in ("sentence_good", "sentence_bad")} for row in rows]
    fitting = [pair for pair in pairs_read if all(map(fits, pair.values()))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in fitting), encoding="utf-8")
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "pairs.jsonl")}}}
    (folder / "minimal_pairs.yaml").write_text(json.dumps(task))  # JSON is YAML
    return len(fitting), len(pairs_read) - len(fitting)


def evaluate(python: str, folder: Path, name: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run lm-eval: the accuracy, and both log-likelihoods of each pair."""
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
    logprobs = {sample["doc_id"]: [float(response[0]) for response in sample["filtered_resps"]] for sample in samples}
    return {"accuracy": results["acc,none"], "logprobs": [logprobs[i] for i in range(len(logprobs))]}


def compare(model: Path, python: str, pairs: int) -> dict[str, Any]:
    """Compare both runs on the same pairs."""
    with tempfile.TemporaryDirectory() as directory, NextwordServer(model) as server:
        folder = Path(directory)
        length, tokenizer = server.metadata["context_length"], Tokenizer.open(server.directory)
        # lm-eval's client fails on a sentence that fills its context: no context token is left.
        count, too_long = write_task(folder, pairs, lambda text: len(tokenizer.encode(text)) <= length - 2)
        server_args = {
            "base_url": f"{server.url}/v1/completions",
            "model": server.metadata["model"],
            "tokenizer": str(server.directory),
            "num_concurrent": 4,
            "max_length": length,
            "max_retries": 1,
        }
        ours = evaluate(python, folder, "served", "local-completions", server_args)
        hf_args = {"pretrained": str(server.directory), "dtype": "float32", "max_length": length}
        theirs = evaluate(python, folder, "hf", "hf", hf_args)
    both = list(zip(ours["logprobs"], theirs["logprobs"], strict=True))
    return {
        "pairs": count,
        "too_long": too_long,
        "served": ours["accuracy"],
        "hf": theirs["accuracy"],
        "differing_answers": sum((a[0] > a[1]) != (b[0] > b[1]) for a, b in both),
        "largest_difference": max(abs(x - y) for a, b in both for x, y in zip(a, b, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="lm-eval through the server, compared with its own hf model")
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=1000, help="number of pairs from each of the 67 files of BLiMP")
    parser.add_argument("--python", help="a Python that has lm-eval")
    args = parser.parse_args()
    result = compare(args.model, args.python or interpreter("lm-eval"), args.pairs)
    print(json.dumps(result))
    sys.exit(result["served"] != result["hf"] or result["differing_answers"] > 0)


if __name__ == "__main__":
    main()
