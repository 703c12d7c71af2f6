"""A plan for real: the text is read, the machine tried at the sizes that come into question, the choice made."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextword.common.console import Console
from nextword.common.energy import EnergyMeter
from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import MANIFEST
from nextword.common.run_dir import peak_memory_bytes
from nextword.data.builtin_datasets import find_sources
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenDataset, TokenSource
from nextword.data.documents import SourceFile
from nextword.data.issues import IssueLog
from nextword.data.prepare import prepare
from nextword.data.tokenizer import vocab_size_for
from nextword.model import fused
from nextword.model.config import SIZES, ConfigError, ModelConfig, build_config
from nextword.model.gpt import GPT
from nextword.planning.cluster_estimate import (
    GPU_SPECS,
    TOKENS_PER_PARAMETER,
    TYPICAL_MFU,
    Cluster,
    estimate,
    model_shape_for,
)
from nextword.planning.scaling_law import corpus_difficulty
from nextword.planning.size_selection import (
    BenchmarkResult,
    CorpusStats,
    RunLength,
    TrainingPlan,
    flops_per_token,
    select_size,
)
from nextword.training.config import Recipe, parse_count
from nextword.training.losses import causal_lm_loss
from nextword.training.optimizer import Optimizer
from nextword.training.step import (
    StepSettings,
    TrainState,
    activation_bytes_per_row,
    available_memory,
    build_loss_module,
    fit_micro_batch_rows,
    time_step,
    training_state_bytes,
)
from nextword.training.trainer import FINALIZE_SECONDS

SAMPLE_BYTES = 2**25  # bytes of a large corpus that are looked at: some ten seconds' work
COMPRESSION_RATIO = 3  # bytes of text in a byte of a packed file, about
BENCHMARK_BATCH_TOKENS = 2048  # of the steps by which a CPU's speed is measured
DEFAULT_VOCAB_SIZE = 50_000  # of a model that is planned without its text
DEFAULT_BATCH_TOKENS = 4096  # of a run whose length is said in steps, where nothing else is said


# ---------------------------------------------------------------- the machine


class ThroughputBenchmark:
    """This machine, which is asked how fast it trains a size: with real steps on the real text, from fresh weights."""

    def __init__(self, tokens: TokenSource, recipe: Recipe, device: torch.device, bf16: bool, processes: int = 1):
        self.tokens, self.recipe, self.device, self.bf16, self.processes = tokens, recipe, device, bf16, processes
        self.matmul_flops = measure_matmul_flops(device)
        self.baseline_memory = peak_memory_bytes(device)  # with all that is imported

    def measure(self, config: ModelConfig, batch_tokens: int) -> BenchmarkResult:
        if self.processes > 1 and 16 * config.parameters > 0.5 * available_memory(self.device):
            return self._estimate(config)
        model = GPT(config).to(self.device)
        recompute = self.recipe.training.checkpoint_activations
        kind = "fused" if fused.is_available(model) and not recompute else "plain"
        loss_module, _ = build_loss_module(model, causal_lm_loss, kind, recompute)
        dataset = self._dataset(config, batch_tokens)
        settings = StepSettings(bf16=self.bf16)
        rows = self.recipe.training.micro_batch_rows or fit_micro_batch_rows(loss_module, dataset, settings)
        memory = (
            self.baseline_memory
            + training_state_bytes(model)
            + rows * activation_bytes_per_row(loss_module, dataset, settings)
        )
        benchmark_dataset = (
            self._dataset(config, min(batch_tokens, BENCHMARK_BATCH_TOKENS)) if self.device.type == "cpu" else dataset
        )
        state = TrainState(model, build_optimizer(model, self.recipe))
        seconds = time_step(state, loss_module, benchmark_dataset, replace(settings, micro_batch_rows=rows))
        seconds = seconds / tokens_per_batch(benchmark_dataset) + time_optimizer_step(state) / tokens_per_batch(dataset)
        return BenchmarkResult(seconds / self.processes, memory)

    def _estimate(self, config: ModelConfig) -> BenchmarkResult:
        """Of a model that one process alone has no memory to try: what the matrix products would take at the usual share of
        their rate, and its part of the weights, the gradients and the averages."""
        seconds = flops_per_token(config) / (TYPICAL_MFU * self.matmul_flops)
        return BenchmarkResult(
            seconds / self.processes, self.baseline_memory + 16 * config.parameters // self.processes
        )

    def _dataset(self, config: ModelConfig, batch_tokens: int) -> TokenDataset:
        rows = max(1, round(batch_tokens / config.context_length))
        return TokenDataset(self.tokens, config.context_length, rows, seed=0)


def tokens_per_batch(dataset: TokenDataset) -> int:
    """Tokens of a batch."""
    return dataset.batch_size * dataset.context_length


def build_optimizer(model: GPT, recipe: Recipe) -> Optimizer:
    t = recipe.training
    return Optimizer(model, kind=t.optimizer, lr=t.lr or 1.0, weight_decay=t.weight_decay, momentum=t.momentum)


def time_optimizer_step(state: TrainState) -> float:
    """Of one step of the optimizer, by the faster of two."""
    seconds, device = [], state.model.unembedding.device
    for _ in range(2):
        for p in state.model.parameters():
            p.grad = torch.zeros_like(p)
        start = time.perf_counter()
        state.optimizer.step(0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_matmul_flops(device: torch.device) -> float:
    """Floating-point operations a second that this device does in a matrix product of the kind that training is made of."""
    n = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):  # the best of five, since others may use the machine as well
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 4 * 2 * n**3 / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------- the choice


def candidate_configs(recipe: Recipe, vocab_size: int, device: torch.device) -> dict[str, ModelConfig]:
    """The models that come into question, by size: of a recipe that names one, that one; else all that memory holds.

    Raises:
        UsageError: the recipe's settings make no model.
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


def plan_corpus(
    corpus: Corpus, recipe: Recipe, device: torch.device, *, seconds: float | None = None, scale: float = 1.0,
    processes: int = 1,
) -> TrainingPlan:  # fmt: skip
    """The plan of a run on a prepared corpus.

    Args:
        seconds: what is left of a budget, from now to the end.
        scale: how many times larger the whole text is than this corpus of it.
        processes: how many do the work of one step together, each as fast as this one.
    """
    parts = corpus.train.tokens, corpus.train.bytes, corpus.validation.tokens
    tokens, n_bytes, held_out = (round(scale * count) for count in parts)
    if seconds is not None:
        length = RunLength(seconds=max(1.0, seconds - FINALIZE_SECONDS))
    elif recipe.flops is not None:
        length = RunLength(flops=recipe.flops)
    else:
        requested_tokens = (recipe.steps or 0) * (recipe.training.batch_tokens or DEFAULT_BATCH_TOKENS)
        length = RunLength(tokens=recipe.tokens or requested_tokens)
    batch = recipe.training.batch_tokens or (DEFAULT_BATCH_TOKENS if recipe.steps else None)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    text_difficulty = corpus_difficulty(corpus)
    return select_size(
        CorpusStats(tokens, n_bytes, text_difficulty.bits, held_out, text_difficulty.uncertainty), length,
        candidate_configs(recipe, corpus.tokenizer.vocab_size, device), ThroughputBenchmark(corpus.tokens("train"), recipe, device, bf16, processes),
        batch_tokens=batch, lr=recipe.training.lr, optimizer=recipe.training.optimizer,
    )  # fmt: skip


# ---------------------------------------------------------------- machines that are not here


def estimate_cluster_run(
    recipe: Recipe, gpu: str, *, machines: int = 1, gpus_per_machine: int = 8, parameters: str | None = None,
    price_per_gpu_hour: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a recipe would need and give on GPUs that are known by their datasheets, and of which model.

    Args:
        parameters: about how many, as people write it ("7B"); else the recipe's size; else what is best for as many operations.
        price: of a GPU hour.

    Raises:
        UsageError: no such GPU, no model, or none that fits.
    """
    if gpu.lower() not in GPU_SPECS:
        raise UsageError(f"--gpu {gpu}: no datasheet of it here; known are {', '.join(GPU_SPECS)}")
    if machines < 1 or gpus_per_machine < 1:
        raise UsageError("--machines and --gpus-per-machine must be at least 1")
    if parameters is not None and recipe.size is not None:
        raise UsageError("--parameters and --size exclude each other: say one")
    cluster = Cluster(GPU_SPECS[gpu.lower()], machines, gpus_per_machine)
    flops = recipe.flops
    if flops is None and recipe.tokens is None and recipe.budget is not None:
        flops = recipe.budget * cluster.num_gpus * cluster.gpu.peak_flops * TYPICAL_MFU
    target_parameters = None if parameters is None else float(parse_count(parameters))
    if target_parameters is None and recipe.size is None:
        # Best for so many operations C = 6 N D is D = 20 N; for so many tokens, a twentieth of them.
        target_parameters = (
            math.sqrt(flops / 6 / TOKENS_PER_PARAMETER) if flops else (recipe.tokens or 0) / TOKENS_PER_PARAMETER
        )
        if target_parameters < 1e5:
            raise UsageError(
                "say how large the model is to be (--parameters 7B), or how long it is to be trained (--tokens 2T)"
            )
    config = cluster_model_config(recipe, target_parameters)
    tokens = recipe.tokens or (flops / flops_per_token(config) if flops else TOKENS_PER_PARAMETER * config.parameters)
    cluster_estimate = estimate(
        config, tokens, cluster, batch_tokens=recipe.training.batch_tokens, price_per_gpu_hour=price_per_gpu_hour
    )
    return {
        **cluster_estimate.to_dict(),
        "gpu": gpu.lower(),
        "gpus": cluster.num_gpus,
        "machines": machines,
        "model": config.to_dict(),
    }


def cluster_model_config(recipe: Recipe, parameters: float | None) -> ModelConfig:
    """The model of a recipe, at about so many parameters where they are said. Raises `UsageError` where there is none."""
    settings = dict(recipe.model)
    if parameters is not None:
        n_layers, n_heads, d_model = model_shape_for(parameters)
        settings = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "context_length": 4096, **settings}
    try:
        return build_config(
            recipe.preset, recipe.size or "125m", vocab_size=recipe.vocab_size or DEFAULT_VOCAB_SIZE, **settings
        )
    except ConfigError as error:
        raise UsageError(str(error)) from error


# ---------------------------------------------------------------- a text that is not prepared yet


@dataclass(frozen=True)
class CorpusSample:
    """A corpus that was prepared to be looked at: the whole of a small text, a sample of a large one."""

    corpus: Corpus
    scale: float  # how many times larger the text is
    preparation_seconds: float  # that its preparation will take, about


def sample_corpus(
    corpora: Sequence[str], work_dir: Path, recipe: Recipe, text_column: str | None, strict: bool, console: Console
) -> CorpusSample:
    """Prepare a text, or evenly chosen beginnings of its files, in a folder.

    Raises:
        NextwordError: there is no text; UsageError: a path is not there.
    """
    if any((Path(path) / MANIFEST).is_file() for path in corpora):
        return CorpusSample(Corpus.open(Path(corpora[0])), 1.0, 0.0)
    sources = find_sources(corpora, IssueLog(strict), text_column)
    size, started, scale = sum(map(estimate_text_bytes, sources)), time.monotonic(), 1.0
    vocab_size, texts = recipe.vocab_size, list(corpora)
    if size > SAMPLE_BYTES:
        sample = work_dir / "sample.jsonl"
        scale = size / write_sample(sources, size, sample)
        texts, text_column = [str(sample)], None
        vocab_size = vocab_size or (vocab_size_for(size) if recipe.tokenizer == "bpe" else None)
    corpus = prepare(
        texts, work_dir / "shards", tokenizer=recipe.tokenizer, vocab_size=vocab_size, text_column=text_column,
        strict=strict, progress=console.progress, log=console.info,
    )  # fmt: skip
    return CorpusSample(corpus, scale, scale * (time.monotonic() - started))


def estimate_text_bytes(source: SourceFile) -> int:
    """About how many bytes of text a file holds."""
    is_compressed = source.path.suffix in (".gz", ".zst", ".parquet")
    try:
        return source.path.stat().st_size * (COMPRESSION_RATIO if is_compressed else 1)
    except OSError:  # its reader says so
        return 0


def write_sample(sources: Iterable[SourceFile], total_bytes: int, path: Path) -> int:
    """The same share of every file, from its beginning, as JSON Lines; how many bytes of text that is."""
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
        raise NextwordError("no text was found in the beginnings of the files")
    return int(written)


def _truncate(pieces: Iterable[str], max_characters: int) -> Iterable[str]:
    for piece in pieces:
        yield piece[:max_characters]
        max_characters -= len(piece)
        if max_characters <= 0:
            return


def plan_run(
    corpora: Sequence[str], recipe: Recipe, device: torch.device, *, text_column: str | None, strict: bool, console: Console
) -> dict[str, Any]:  # fmt: skip
    """What a run of this recipe on these texts would be: the plan, what was found of the text, energy and preparation."""
    with TemporaryDirectory(prefix="nextword-plan-") as folder:
        sample = sample_corpus(corpora, Path(folder), recipe, text_column, strict, console)
        console.info("trying sizes on this machine …")
        meter = EnergyMeter(device)
        remaining_seconds = None if recipe.budget is None else recipe.budget - sample.preparation_seconds
        if remaining_seconds is not None and remaining_seconds < FINALIZE_SECONDS:
            raise UsageError(
                f"a budget of {recipe.budget:.0f} s is too short: to prepare this text takes about {sample.preparation_seconds:.0f} s"
            )
        plan = plan_corpus(sample.corpus, recipe, device, seconds=remaining_seconds, scale=sample.scale)
        train = sample.corpus.train
        text = {
            "tokens": round(sample.scale * train.tokens), "bytes": round(sample.scale * train.bytes),
            "documents": round(sample.scale * sample.corpus.documents), "vocab_size": sample.corpus.tokenizer.vocab_size,
            "sampled": sample.scale > 1,
        }  # fmt: skip
        total_seconds = (
            plan.seconds + sample.preparation_seconds + (FINALIZE_SECONDS if remaining_seconds is not None else 0.0)
        )
        return {
            **plan.to_dict(), "seconds": recipe.budget or total_seconds, "preparation_seconds": sample.preparation_seconds, "text": text,
            "energy": meter.mean_power().to_dict(recipe.budget or total_seconds),
        }  # fmt: skip
