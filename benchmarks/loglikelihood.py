"""Judging, measured: that likelihoods are the stock class's, how fast they are, and what a model scores.

    python -m benchmarks.loglikelihood [NAME …] [--model RUN]

Names: agree, rate, peers, scores. RUN is one that is there; by default it is that of the fine-tuning benchmarks, which takes
most of an hour to train. Each measurement is kept under build/bench; remove judging-*.json there to measure anew. The data are
those of `NEXTWORD_DATA` (where that is not set: ../shared/data). `peers` is for a Python that has lm-eval, transformers and
accelerate beside what nextword needs. With NEXTWORD_BENCH_QUICK=1 a few items are measured, and nothing is kept.

Rates are told in turn with a matrix product of 1,024³ before and after each batch, since a shared machine's rate changes from
one second to the next, and in the processor time of one thread.
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

from benchmarks import fine_tuning_data
from benchmarks.fine_tuning_data import QUICK
from benchmarks.run import DATA, cell, nextword, spread
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
ITEMS = 12 if QUICK else 200  # of each suite, where its likelihoods are compared and timed


def kept(run: Path, name: str, measure: Callable[[], Any]) -> Any:
    return measure() if QUICK else cell(f"judging-{run.resolve().name}-{name}", measure)


def questions(name: str) -> list[LoglikelihoodItem]:
    suite = find_benchmark(f"{name}={DATA / FILES[name]}")
    items = load_rows(suite, IssueLog())
    return [loglikelihood_item(suite, items[i]) for i in sample_indices(items, ITEMS)]


def trees_of(scorer: LoglikelihoodScorer, asked: Sequence[LoglikelihoodItem]) -> list[PrefixTree]:
    texts = iter(scorer.encode_pairs([pair for one in asked for pair in one.requests]))
    return scorer.build_trees([[next(texts) for _ in one.requests] for one in asked])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- agree


def stock_likelihoods(model: LanguageModel, asked: Sequence[LoglikelihoodItem]) -> list[list[float]]:
    """log P by the stock class of the same directory, one text at a time."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model.path).eval()
    scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer)
    found = []
    with torch.no_grad():
        for question in asked:
            likely = []
            for text in scorer.encode_pairs(question.requests):
                log_p = (
                    stock(torch.tensor([text.token_ids[:-1]])).logits[0, -text.num_targets :].double().log_softmax(-1)
                )
                likely.append(float(log_p.gather(1, torch.tensor(text.token_ids[-text.num_targets :])[:, None]).sum()))
            found.append(likely)
    return found


def agree(run: Path) -> None:
    def measure(name: str) -> dict[str, Any]:
        model, asked = load(run), questions(name)
        found = LoglikelihoodScorer(model.dequantized, model.tokenizer).score_pairs([one.requests for one in asked])
        ours, theirs = [[one.logprob for one in likely] for likely in found], stock_likelihoods(model, asked)
        apart = max(
            abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)
        )
        other_order = sum(
            np.argsort(one, kind="stable").tolist() != np.argsort(other, kind="stable").tolist()
            for one, other in zip(ours, theirs, strict=True)
        )
        return {"items": len(asked), "apart": apart, "other_order": other_order}

    print("\n| suite | items | largest difference, nats | items ranked otherwise |\n|---|---|---|---|")
    for name in FILES:
        one = kept(run, f"agree-{name}", lambda name=name: measure(name))
        print(f"| {name} | {one['items']} | {one['apart']:.1e} | {one['other_order']} |")


# ---------------------------------------------------------------- rate


def product() -> float:
    """The rate of a matrix product of 1,024³ on one thread, in FLOP/s."""
    a = torch.randn(1024, 1024)
    start = time.process_time()
    torch.mm(a, a)
    return 2 * 1024**3 / (time.process_time() - start)


def work(model: LanguageModel, batch: Sequence[Sequence[PrefixTree]]) -> float:
    """The FLOPs that a batch cannot do without: each token that is read once through the matrices (through the last block only
    as far as its keys and values, where no word is asked for after it), each pair of tokens of which one sees the other, and
    the logits of each place that a word is asked for."""
    config, trees = model.gpt.config, [tree for row in batch for tree in row]
    sizes = {name: p.numel() for name, p in model.gpt.named_parameters() if p.ndim == 2 and name.startswith("blocks")}
    last = sum(size for name, size in sizes.items() if name.startswith(f"blocks.{config.n_layers - 1}."))
    kept = 2 * config.d_model * config.n_kv_heads * config.head_dim
    tokens, asked = (
        sum(len(tree.tokens) for tree in trees),
        sum(len(np.unique(tree.predictor_positions)) for tree in trees),
    )
    seen = sum(int((tree.positions + 1).sum()) for tree in trees) * (config.n_layers - 1)
    seen += sum(int((tree.positions[np.unique(tree.predictor_positions)] + 1).sum()) for tree in trees)
    return (
        2.0 * (sum(sizes.values()) - last + kept) * tokens
        + 2.0 * (last - kept + config.d_model * config.vocab_size) * asked
        + 4.0 * config.n_heads * config.head_dim * seen
    )


@one_thread()
def rate(run: Path) -> None:
    def measure(name: str) -> list[float]:
        model = load(run)
        scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer)
        trees = trees_of(scorer, questions(name))
        shares = []
        with evaluation_mode(model.dequantized):
            for _ in range(1 if QUICK else 5):
                for batch in pack_batches(trees, DEVICE_BATCH_TOKENS["cpu"]):
                    before, start = product(), time.process_time()
                    scorer.score_rows(batch)
                    seconds = time.process_time() - start
                    shares.append(work(model, batch) / seconds / max(before, product()))
        return shares

    print("\n| suite | share of the matrix product's rate: middle (from to) |\n|---|---|")
    for name in FILES:
        print(f"| {name} | {spread(kept(run, f'rate-{name}', lambda name=name: measure(name)), 2)} |")


# ---------------------------------------------------------------- peers


@one_thread()
def peers(run: Path) -> None:
    def measure(name: str) -> dict[str, Any]:
        model, asked = load(run), questions(name)
        scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer, check_greedy=True)  # lm-eval finds out as well
        make = importlib.import_module("lm_eval.models.huggingface").HFLM
        theirs = {size: make(pretrained=str(model.path), device="cpu", batch_size=size) for size in (1, 16, 64)}
        requests = [SimpleNamespace(args=pair) for one in asked for pair in one.requests]
        runs: dict[str, Callable[[], Any]] = {"nextword": lambda: scorer.score_pairs([one.requests for one in asked])}
        for size, peer in theirs.items():
            runs[f"hf, batch {size}"] = lambda peer=peer: peer.loglikelihood(requests, disable_tqdm=True)
        times: dict[str, list[float]] = {who: [] for who in runs}
        for _ in range(1 if QUICK else 5):  # in turn, so that a change of the machine's speed meets all
            for who, go in runs.items():
                start = time.process_time()
                go()
                times[who].append(time.process_time() - start)
        least = work(model, [trees_of(scorer, asked)]) / max(product() for _ in range(10))
        return {"items": len(asked), "times": times, "least": least}

    print(
        "\n| suite | items | nextword, s | lm-eval's hf, s: its best batch | one by one | times as fast as the best "
        "| as what has no cost but its products |\n|---|---|---|---|---|---|---|"
    )
    for name in FILES:
        found = kept(run, f"peers-{name}", lambda name=name: measure(name))
        middle = {who: statistics.median(times) for who, times in found["times"].items()}
        best = min((who for who in middle if who != "nextword"), key=lambda who: middle[who])
        ours, theirs = middle["nextword"], middle[best]
        print(
            f"| {name} | {found['items']} | {ours:.2f} | {theirs:.2f} ({best}) | {middle['hf, batch 1']:.1f} "
            f"| {theirs / ours:.1f} | {theirs / found['least']:.1f} |"
        )


# ---------------------------------------------------------------- scores


def scores(run: Path) -> None:
    def measure(name: str) -> dict[str, Any]:
        suite = f"{name}={DATA / FILES[name]}"
        return nextword("evaluate", run, "--benchmark", suite, *(("--limit", "50") if QUICK else ()), "--json", "--quiet")

    print(
        "\n| suite | score | chance | | in scrambled words | items | whole process, s |\n|---|---|---|---|---|---|---|"
    )
    for name in FILES:
        found = kept(run, f"scores-{name}", lambda name=name: measure(name))
        one, wall = found["suites"][name], found["wall"]
        side = "above" if one["above_chance"] else "below" if one["below_chance"] else "not above"
        cells = [f"{s['score']:.3f} ({s['low']:.3f} to {s['high']:.3f})" for s in (one, one["scrambled"])]
        print(
            f"| {name}, {one['metric']} | {cells[0]} | {one['chance']:.2f} | {side} | {cells[1]} "
            f"| {one['n']:,} of {one['of']:,} | {wall:.0f} |"
        )


def main() -> None:
    sections = {"agree": agree, "rate": rate, "peers": peers, "scores": scores}
    parser = argparse.ArgumentParser(description="Judging, measured", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(sections))
    parser.add_argument("--model", type=Path, metavar="RUN", help="a run or a model directory that is there")
    given = parser.parse_args()
    if unknown := set(given.names) - set(sections):
        parser.error(f"there is no {min(unknown)!r}, only {', '.join(sections)}")
    run = given.model or tuning_data.base()
    for name in given.names or list(sections):
        print(f"\n## {name}", flush=True)
        sections[name](run)


if __name__ == "__main__":
    main()
