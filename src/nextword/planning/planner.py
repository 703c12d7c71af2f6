"""Plans of a run on this machine: `plan_corpus` for a prepared corpus, `plan_run` for text that is not prepared yet.

The speed of the machine is measured by real training steps of a few model sizes.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextword.common.console import Console
from nextword.common.environment import EnergyMeter, peak_memory_bytes, total_memory
from nextword.common.errors import NextwordError, UsageError
from nextword.common.format import format_bytes, format_duration
from nextword.common.fs import MANIFEST
from nextword.data.builtin_datasets import find_sources
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenDataset, TokenSource
from nextword.data.issues import IssueLog
from nextword.data.prepare import prepare
from nextword.data.readers import SourceFile
from nextword.data.tokenizer import vocab_size_for
from nextword.model.config import SIZES, ConfigError, ModelConfig, build_config
from nextword.model.gpt import GPT
from nextword.planning.cluster_estimate import TYPICAL_MFU
from nextword.planning.scaling_law import corpus_difficulty
from nextword.planning.size_selection import BenchmarkResult, CorpusStats, RunLength, TrainingPlan, select_size
from nextword.training.config import Recipe, TrainingConfig
from nextword.training.losses import LossModule, causal_lm_loss
from nextword.training.optimizer import Optimizer
from nextword.training.step import (
    StepSettings,
    TrainState,
    activation_bytes_per_row,
    available_memory,
    fastest_seconds,
    fit_micro_batch_rows,
    time_step,
    training_state_bytes,
)
from nextword.training.trainer import FINALIZE_SECONDS

SAMPLE_BYTES = 2**25  # of a large corpus; prepared in about ten seconds
MIN_VOCAB_SIZE = 256  # of a tokenizer that is not trained yet
MIN_BYTES_PER_PARAMETER = 12  # weight, gradient and Muon's momentum in float32
COMPRESSION_RATIO = 3  # bytes of text per byte of a compressed file, roughly
BENCHMARK_BATCH_TOKENS = 2048  # of a benchmarked step on a CPU
DEFAULT_BATCH_TOKENS = 4096  # of a run whose length is given in steps


# ---------------------------------------------------------------- the speed of this machine


class ThroughputBenchmark:
    """Measures training steps from fresh weights on the real text. A `ThroughputEstimator` for `select_size`.

    Args:
        tokens: the training set.
        training: the recipe's training options.
        device: the device to measure.
        bf16: whether matrix products are in bfloat16.
        num_processes: the processes of the run, which divide each step; all are taken to be as fast as this one.

    Attributes:
        matmul_flops: floating-point operations per second in matrix products.
        measure: measures a model with batches of a number of tokens, once.
    """

    def __init__(
        self, tokens: TokenSource, training: TrainingConfig, device: torch.device, bf16: bool, num_processes: int = 1
    ):
        self.tokens, self.training, self.device, self.bf16 = tokens, training, device, bf16
        self.num_processes = num_processes
        self.matmul_flops = measure_matmul_flops(device)
        self.baseline_memory = peak_memory_bytes(device)  # of the imports
        self.measure = cache(self._measure)

    def _measure(self, config: ModelConfig, batch_tokens: int) -> BenchmarkResult:
        if self.num_processes > 1 and 16 * config.parameters > 0.5 * available_memory(self.device):
            # Does not fit in the memory of one process: a typical utilization, and this process's shards.
            seconds_per_token = config.flops_per_token / (TYPICAL_MFU * self.matmul_flops) / self.num_processes
            memory = self.baseline_memory + 16 * config.parameters // self.num_processes
            return BenchmarkResult(seconds_per_token, memory)
        model, checkpointing = GPT(config).to(self.device), self.training.checkpoint_activations
        model.set_activation_checkpointing(checkpointing)
        loss_module = LossModule(model, causal_lm_loss, kernels=model.supports_kernels() and not checkpointing)
        dataset, settings = self._dataset(config, batch_tokens), StepSettings(self.training, bf16=self.bf16)
        rows = self.training.micro_batch_rows or fit_micro_batch_rows(loss_module, dataset, settings)
        memory = self.baseline_memory + training_state_bytes(model)
        memory += rows * activation_bytes_per_row(loss_module, dataset, settings)
        state = TrainState(model, Optimizer(model, replace(self.training, lr=1.0)))  # any rate takes the same time
        few_tokens = min(batch_tokens, BENCHMARK_BATCH_TOKENS) if self.device.type == "cpu" else batch_tokens
        timed = self._dataset(config, few_tokens)
        step_seconds = time_step(state, loss_module, timed, replace(settings, micro_batch_rows=rows))
        seconds_per_token = step_seconds / (timed.batch_size * timed.context_length)
        seconds_per_token += time_optimizer_step(state) / (dataset.batch_size * dataset.context_length)
        return BenchmarkResult(seconds_per_token / self.num_processes, memory)

    def _dataset(self, config: ModelConfig, batch_tokens: int) -> TokenDataset:
        rows = max(1, round(batch_tokens / config.context_length))
        return TokenDataset(self.tokens, config.context_length, rows, seed=0)


def time_optimizer_step(state: TrainState) -> float:
    """Seconds of one optimizer step, the faster of two. The weights stay as they are."""
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    return fastest_seconds(lambda: state.optimizer.step(0.0), state.model.unembedding.device, repeats=2)


def measure_matmul_flops(device: torch.device) -> float:
    """Floating-point operations per second in matrix products of the data type that training uses."""
    n = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(4):
            torch.mm(a, b)

    return 4 * 2 * n**3 / fastest_seconds(multiply, device, repeats=5)


# ---------------------------------------------------------------- a prepared corpus


def candidate_configs(recipe: Recipe, vocab_size: int, device: torch.device) -> dict[str, ModelConfig]:
    """The model configurations to choose from, by size: the recipe's, or all that fit in memory.

    Raises:
        UsageError: the recipe's settings are no valid model.
    """
    configs: dict[str, ModelConfig] = {}
    first_error: ConfigError | None = None
    memory_limit = 0.5 * available_memory(device)
    for size in [recipe.size] if recipe.size else SIZES:
        try:
            config = build_config(recipe.preset, size, vocab_size=vocab_size, **recipe.model)
        except ConfigError as error:
            first_error = first_error or error
            continue
        if configs and 16 * config.parameters > memory_limit:
            break
        configs[size] = config
    if not configs:
        raise UsageError(str(first_error)) from first_error
    return configs


def check_memory(recipe: Recipe, device: torch.device, num_processes: int = 1) -> None:
    """Raise `UsageError`, before any text is read, if no model of a recipe can be trained in the memory of this machine."""
    config = next(iter(candidate_configs(recipe, recipe.vocab_size or MIN_VOCAB_SIZE, device).values()))
    needed, total = MIN_BYTES_PER_PARAMETER * config.parameters // num_processes, total_memory(device)
    if needed > total:
        raise UsageError(
            f"a model of {config.parameters:,} parameters needs at least {format_bytes(needed)} of memory to be trained, and "
            f"{format_bytes(total)} can be used here: choose a smaller --size, or a larger machine"
        )


def plan_corpus(
    corpus: Corpus,
    recipe: Recipe,
    device: torch.device,
    *,
    remaining: Callable[[], float] | None = None,
    scale: float = 1.0,
    num_processes: int = 1,
) -> TrainingPlan:
    """Plan a run on a prepared corpus.

    Args:
        corpus: the corpus, or a sample of it.
        recipe: the recipe; what it leaves open is chosen.
        device: the device to train on.
        remaining: returns the remaining seconds of a budget. The time that the benchmarks here take is no longer left.
        scale: the size of the whole text relative to `corpus`.
        num_processes: the processes that divide each step.
    """
    training = recipe.training
    if recipe.steps and training.batch_tokens is None:
        training = replace(training, batch_tokens=DEFAULT_BATCH_TOKENS)

    def run_length() -> RunLength:
        if remaining is not None:
            return RunLength(seconds=max(1.0, remaining() - FINALIZE_SECONDS))
        if recipe.flops is not None:
            return RunLength(flops=recipe.flops)
        return RunLength(tokens=recipe.tokens or (recipe.steps or 0) * (training.batch_tokens or 0))

    difficulty = corpus_difficulty(corpus)
    corpus_stats = CorpusStats(
        tokens=round(scale * corpus.train.tokens),
        bytes=round(scale * corpus.train.seen_bytes),
        difficulty=difficulty.bits,
        validation_tokens=round(scale * (corpus.validation.tokens + corpus.test.tokens)),
        uncertainty=difficulty.uncertainty,
    )
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    candidates = candidate_configs(recipe, corpus.tokenizer.vocab_size, device)
    benchmark = ThroughputBenchmark(corpus.tokens("train"), training, device, bf16, num_processes)
    plan = select_size(corpus_stats, run_length(), candidates, benchmark, training=training)
    if remaining is not None:  # without the time that the benchmarks took
        plan = select_size(corpus_stats, run_length(), candidates, benchmark, training=training)
    context_length = plan.model["context_length"]
    share = corpus.share_of_documents_beyond(context_length)
    context = f"context of {context_length:,} tokens: {share:.0%} of the documents are longer (--model.context-length sets it)"
    why = [*plan.why, context]
    if recipe.members > 1:
        why.append(
            f"{recipe.members} members, each with {recipe.member_share:.0%} of the time, distilled into one model"
        )
    return replace(plan, why=why)


# ---------------------------------------------------------------- text that is not prepared


def sample_corpus(
    corpora: Sequence[str],
    work_dir: Path,
    recipe: Recipe,
    text_column: str | None,
    strict: bool,
    console: Console,
    held_out: Mapping[str, Any],
) -> tuple[Corpus, float, float]:
    """Prepare a text, or the same share of the beginning of each file, in `work_dir`. Opens a prepared corpus as it is.

    Returns:
        The prepared corpus, the size of the whole text relative to it, and the expected seconds to prepare the whole text.

    Raises:
        NextwordError: there is no text.
        UsageError: a path does not exist.
    """
    if any((Path(path) / MANIFEST).is_file() for path in corpora):
        return Corpus.open(Path(corpora[0])), 1.0, 0.0
    sources = find_sources(corpora, IssueLog(strict), text_column)
    total_bytes, started, scale = sum(map(estimate_text_bytes, sources)), time.monotonic(), 1.0
    vocab_size, texts = recipe.vocab_size, list(corpora)
    if total_bytes > SAMPLE_BYTES:
        sample = work_dir / "sample.jsonl"
        scale = total_bytes / write_sample(sources, total_bytes, sample)
        texts, text_column = [str(sample)], None
        if recipe.tokenizer == "bpe" and vocab_size is None:
            with sample.open(encoding="utf-8") as lines:
                vocab_size = vocab_size_for(total_bytes, (json.loads(line)["text"] for line in lines))
    corpus = prepare(
        texts,
        work_dir / "shards",
        tokenizer=recipe.tokenizer,
        vocab_size=vocab_size,
        text_column=text_column,
        **held_out,
        strict=strict,
        progress=console.progress,
        log=console.info,
    )
    return corpus, scale, scale * (time.monotonic() - started)


def estimate_text_bytes(source: SourceFile) -> int:
    """The approximate number of bytes of text in a file."""
    is_compressed = source.path.suffix in (".gz", ".zst", ".parquet")
    try:
        return source.path.stat().st_size * (COMPRESSION_RATIO if is_compressed else 1)
    except OSError:  # reported when the file is read
        return 0


def write_sample(sources: Iterable[SourceFile], total_bytes: int, path: Path) -> int:
    """Write the same share of the beginning of every file as JSON Lines; the number of bytes of text written."""
    written = target_bytes = 0.0
    with path.open("w", encoding="utf-8") as file:
        for source in sources:
            target_bytes += SAMPLE_BYTES * estimate_text_bytes(source) / total_bytes
            for document in source.read(IssueLog()):
                if written >= target_bytes:
                    break
                text = "".join(_truncate(document.chunks, int(target_bytes - written)))
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
    if not written:
        raise NextwordError("no text was found at the beginning of the files")
    return int(written)


def _truncate(chunks: Iterable[str], max_characters: int) -> Iterator[str]:
    for chunk in chunks:
        yield chunk[:max_characters]
        max_characters -= len(chunk)
        if max_characters <= 0:
            return


@dataclass(frozen=True)
class PlanResult(TrainingPlan):
    """The prediction of a run on this machine.

    Attributes:
        preparation_seconds: Part of `seconds` that tokenization takes.
        text: tokens, bytes, documents, vocab_size and whether they are extrapolated from a sample.
        energy: watt_hours and whether they are measured.
    """

    preparation_seconds: float
    text: dict[str, Any]
    energy: dict[str, Any]

    def __str__(self) -> str:
        """The prediction for a person."""
        text, energy = self.text, self.energy
        preparation = (
            f", {format_duration(self.preparation_seconds)} of it for preparation"
            if self.preparation_seconds >= 1
            else ""
        )
        measured = "measured" if energy["measured"] else "estimated"
        rows = {
            "text": f"{text['bytes'] / 1e6:,.2f} MB of training text, {text['documents']:,} documents, "
            f"{text['tokens']:,} tokens{' (estimated from a sample)' if text['sampled'] else ''}",
            "model": f"{self.parameters:,} parameters, vocabulary {text['vocab_size']:,}, "
            f"context length {self.model['context_length']:,}",
            "training": f"{self.tokens:,} tokens ({self.epochs:.1f} epochs), {self.steps:,} steps of {self.batch_tokens:,}",
            "time": format_duration(self.seconds) + preparation,
            "memory": f"{self.memory_bytes / 1e9:.1f} GB",
            "energy": f"{energy['watt_hours']:.3g} Wh, {measured}",
            "compute": f"{self.flops:.2g} floating-point operations",
            "bits/byte": f"{self.bits_per_byte:.2f} on the validation set (80 % interval {self.low:.2f}–{self.high:.2f})",
        }
        return "\n".join([*self.why, "", *(f"{name:<11}{value}" for name, value in rows.items())])


def plan_run(
    corpora: Sequence[str],
    recipe: Recipe,
    device: torch.device,
    *,
    text_column: str | None,
    strict: bool,
    console: Console,
    held_out: Mapping[str, Any] | None = None,
) -> PlanResult:
    """Plan a run of a recipe on texts.

    Args:
        corpora: files, directories, or a prepared corpus.
        recipe: the recipe.
        device: the device to train on.
        text_column: the column of the text in tables.
        strict: whether a problem in a text is an error.
        held_out: what is held out, as arguments of `prepare`.
        console: for progress and messages.

    Raises:
        UsageError: the budget is shorter than the preparation of the text.
    """
    check_memory(recipe, device)
    with TemporaryDirectory(prefix="nextword-plan-") as work_dir:
        corpus, scale, preparation = sample_corpus(
            corpora, Path(work_dir), recipe, text_column, strict, console, held_out or {}
        )
        console.info("benchmarking model sizes on this machine …")
        meter = EnergyMeter(device)
        remaining_seconds = None if recipe.budget is None else recipe.budget - preparation
        if remaining_seconds is not None and remaining_seconds < FINALIZE_SECONDS:
            raise UsageError(
                f"a budget of {recipe.budget:.0f} s is too short: the preparation of this text takes about "
                f"{preparation:.0f} s"
            )
        plan = plan_corpus(
            corpus,
            recipe,
            device,
            remaining=None if remaining_seconds is None else lambda: recipe.member_share * remaining_seconds,
            scale=scale,
        )
        total_seconds = recipe.budget or plan.seconds / recipe.member_share + preparation
        text = {
            "tokens": round(scale * corpus.train.tokens),
            "bytes": round(scale * corpus.train.seen_bytes),
            "documents": round(scale * corpus.documents),
            "vocab_size": corpus.tokenizer.vocab_size,
            "sampled": scale > 1,
        }
        energy = meter.energy(total_seconds)
        values: dict[str, Any] = {**vars(plan), "seconds": total_seconds}
        return PlanResult(**values, preparation_seconds=preparation, text=text, energy=energy)
