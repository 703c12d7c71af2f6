"""Benchmark of log-likelihood evaluation: agreement with transformers, efficiency, comparison with lm-eval, and scores.

    python -m benchmarks.loglikelihood [NAME …] [--model RUN]

Names: agreement, efficiency, peers, scores. RUN is a run or a model directory; default: the base model of the fine-tuning
benchmarks, which takes most of an hour to train. Each measurement is cached under build/bench; remove loglikelihood-*.json
there to measure again. The environment variable `NEXTWORD_DATA` names the directory of the data (default: ../shared/data).
`peers` requires lm-eval, transformers and accelerate. With NEXTWORD_BENCH_QUICK=1 a few items are measured, and nothing is
cached.

Rates are relative to a matrix multiplication of 1,024³ before and after each batch, because the speed of a shared machine
changes from one second to the next. Times are CPU times of one thread.
"""

import argparse
import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.fine_tuning_data import QUICK, base_model
from benchmarks.run import DATA, cached, median_with_range, nextword
from nextword.data.issues import IssueLog
from nextword.inference.loglikelihood import DEVICE_BATCH_TOKENS, LoglikelihoodScorer, PrefixTree, pack_batches
from nextword.inference.perplexity import evaluation_mode
from nextword.pipeline.language_model import LanguageModel, load
from nextword.tasks.benchmark_items import LoglikelihoodItem, load_rows, loglikelihood_item, sample_indices
from nextword.tasks.benchmark_spec import find_benchmark

FILES = {
    "blimp": "blimp.tar.xz",
    "hellaswag": "hellaswag.tar.xz",
    "arc": "arc_easy/test.jsonl",
    "crows-pairs": "crows_pairs",
    "winogender": "winogender/all_sentences.tsv",
}
ITEMS = 12 if QUICK else 200  # of each benchmark, for agreement and timing


def cached_for(run: Path, name: str, measure: Callable[[], Any]) -> Any:
    return measure() if QUICK else cached(f"loglikelihood-{run.resolve().name}-{name}", measure)


def load_items(name: str) -> list[LoglikelihoodItem]:
    benchmark = find_benchmark(f"{name}={DATA / FILES[name]}")
    rows = load_rows(benchmark, IssueLog())
    return [loglikelihood_item(benchmark, rows[i]) for i in sample_indices(rows, ITEMS)]


def build_trees(scorer: LoglikelihoodScorer, items: Sequence[LoglikelihoodItem]) -> list[PrefixTree]:
    encoded = iter(scorer.encode_pairs([pair for item in items for pair in item.requests]))
    return scorer.build_trees([[next(encoded) for _ in item.requests] for item in items])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- agreement


def transformers_logprobs(model: LanguageModel, items: Sequence[LoglikelihoodItem]) -> list[list[float]]:
    """Log-likelihoods by the transformers class of the same directory, one text at a time."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model.path).eval()
    scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer)
    results = []
    with torch.no_grad():
        for item in items:
            logprobs = []
            for text in scorer.encode_pairs(item.requests):
                log_p = (
                    reference(torch.tensor([text.token_ids[:-1]]))
                    .logits[0, -text.num_targets :]
                    .double()
                    .log_softmax(-1)
                )
                logprobs.append(
                    float(log_p.gather(1, torch.tensor(text.token_ids[-text.num_targets :])[:, None]).sum())
                )
            results.append(logprobs)
    return results


def agreement(run: Path) -> None:
    def measure(name: str) -> dict[str, Any]:
        model, items = load(run), load_items(name)
        scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer)
        ours = [[score.logprob for score in scores] for scores in scorer.score_pairs([item.requests for item in items])]
        theirs = transformers_logprobs(model, items)
        difference = max(abs(a - b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True))
        differing_rankings = sum(
            np.argsort(a, kind="stable").tolist() != np.argsort(b, kind="stable").tolist()
            for a, b in zip(ours, theirs, strict=True)
        )
        return {"items": len(items), "difference": difference, "differing_rankings": differing_rankings}

    print("\n| benchmark | items | largest difference, nats | rankings that differ |\n|---|---|---|---|")
    for name in FILES:
        result = cached_for(run, f"agreement-{name}", lambda name=name: measure(name))
        print(f"| {name} | {result['items']} | {result['difference']:.1e} | {result['differing_rankings']} |")


# ---------------------------------------------------------------- efficiency


def matmul_rate() -> float:
    """The rate of a matrix multiplication of 1,024³ on one thread, in FLOP/s."""
    a = torch.randn(1024, 1024)
    start = time.process_time()
    torch.mm(a, a)
    return 2 * 1024**3 / (time.process_time() - start)


def min_flops(model: LanguageModel, batch: Sequence[Sequence[PrefixTree]]) -> float:
    """Minimum FLOPs of a batch: the linear layers for each distinct token (in the last block only keys and values, unless the
    token predicts a target), attention for each pair of positions, and the logits of each position that predicts a target."""
    config, trees = model.gpt.config, [tree for row in batch for tree in row]
    sizes = {name: p.numel() for name, p in model.gpt.named_parameters() if p.ndim == 2 and name.startswith("blocks")}
    last = sum(size for name, size in sizes.items() if name.startswith(f"blocks.{config.n_layers - 1}."))
    key_value = 2 * config.d_model * config.n_kv_heads * config.head_dim
    tokens, predictors = (
        sum(len(tree.tokens) for tree in trees),
        sum(len(np.unique(tree.predictor_positions)) for tree in trees),
    )
    attended = sum(int((tree.positions + 1).sum()) for tree in trees) * (config.n_layers - 1)
    attended += sum(int((tree.positions[np.unique(tree.predictor_positions)] + 1).sum()) for tree in trees)
    return (
        2.0 * (sum(sizes.values()) - last + key_value) * tokens
        + 2.0 * (last - key_value + config.d_model * config.vocab_size) * predictors
        + 4.0 * config.n_heads * config.head_dim * attended
    )


@one_thread()
def efficiency(run: Path) -> None:
    def measure(name: str) -> list[float]:
        model = load(run)
        scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer)
        trees = build_trees(scorer, load_items(name))
        shares = []
        with evaluation_mode(model.dequantized):
            for _ in range(1 if QUICK else 5):
                for batch in pack_batches(trees, DEVICE_BATCH_TOKENS["cpu"]):
                    rate_before, start = matmul_rate(), time.process_time()
                    scorer.score_rows(batch)
                    seconds = time.process_time() - start
                    shares.append(min_flops(model, batch) / seconds / max(rate_before, matmul_rate()))
        return shares

    print("\n| benchmark | share of the matrix multiplication rate: median (range) |\n|---|---|")
    for name in FILES:
        print(
            f"| {name} | {median_with_range(cached_for(run, f'efficiency-{name}', lambda name=name: measure(name)), 2)} |"
        )


# ---------------------------------------------------------------- peers


@one_thread()
def peers(run: Path) -> None:
    def measure(name: str) -> dict[str, Any]:
        model, items = load(run), load_items(name)
        scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer, check_greedy=True)  # as lm-eval does
        hf_lm = importlib.import_module("lm_eval.models.huggingface").HFLM
        theirs = {size: hf_lm(pretrained=str(model.path), device="cpu", batch_size=size) for size in (1, 16, 64)}
        requests = [SimpleNamespace(args=pair) for item in items for pair in item.requests]
        runs: dict[str, Callable[[], Any]] = {"nextword": lambda: scorer.score_pairs([item.requests for item in items])}
        for size, peer in theirs.items():
            runs[f"hf, batch {size}"] = lambda peer=peer: peer.loglikelihood(requests, disable_tqdm=True)
        times: dict[str, list[float]] = {program: [] for program in runs}
        for _ in range(1 if QUICK else 5):  # interleaved, so that changes in machine speed affect all alike
            for program, score in runs.items():
                start = time.process_time()
                score()
                times[program].append(time.process_time() - start)
        min_seconds = min_flops(model, [build_trees(scorer, items)]) / max(matmul_rate() for _ in range(10))
        return {"items": len(items), "times": times, "min_seconds": min_seconds}

    print(
        "\n| benchmark | items | nextword, s | hf, fastest batch size, s | hf, batch size 1, s | speedup over the fastest "
        "| limit |\n|---|---|---|---|---|---|---|"
    )
    for name in FILES:
        result = cached_for(run, f"peers-{name}", lambda name=name: measure(name))
        medians = {program: statistics.median(times) for program, times in result["times"].items()}
        fastest = min((program for program in medians if program != "nextword"), key=lambda program: medians[program])
        ours, theirs = medians["nextword"], medians[fastest]
        print(
            f"| {name} | {result['items']} | {ours:.2f} | {theirs:.2f} ({fastest}) | {medians['hf, batch 1']:.1f} "
            f"| {theirs / ours:.1f} | {theirs / result['min_seconds']:.1f} |"
        )


# ---------------------------------------------------------------- scores


def scores(run: Path) -> None:
    def measure(name: str) -> dict[str, Any]:
        suite = f"{name}={DATA / FILES[name]}"
        return nextword(
            "evaluate", run, "--benchmark", suite, *(("--limit", "50") if QUICK else ()), "--json", "--quiet"
        )

    print(
        "\n| benchmark | score | chance | | with shuffled words | items | whole process, s |\n|---|---|---|---|---|---|---|"
    )
    for name in FILES:
        result = cached_for(run, f"scores-{name}", lambda name=name: measure(name))
        score, wall = result["suites"][name], result["wall"]
        side = "above" if score["above_chance"] else "below" if score["below_chance"] else "not above"
        columns = [f"{s['score']:.3f} ({s['low']:.3f}–{s['high']:.3f})" for s in (score, score["scrambled"])]
        print(
            f"| {name}, {score['metric']} | {columns[0]} | {score['chance']:.2f} | {side} | {columns[1]} "
            f"| {score['n']:,} of {score['of']:,} | {wall:.0f} |"
        )


def main() -> None:
    sections = {"agreement": agreement, "efficiency": efficiency, "peers": peers, "scores": scores}
    parser = argparse.ArgumentParser(description="Benchmark of log-likelihood evaluation", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(sections))
    parser.add_argument("--model", type=Path, metavar="RUN", help="a run or a model directory")
    args = parser.parse_args()
    if unknown := set(args.names) - set(sections):
        parser.error(f"unknown benchmark {min(unknown)!r}: choose from {', '.join(sections)}")
    run = args.model or base_model()
    for name in args.names or list(sections):
        print(f"\n## {name}", flush=True)
        sections[name](run)


if __name__ == "__main__":
    main()
