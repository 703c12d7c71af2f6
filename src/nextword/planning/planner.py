"""Plans of a run on this machine: `plan_corpus` for a prepared corpus, `plan_run` for text that is not prepared yet."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextword.common.console import Console
from nextword.common.environment import EnergyMeter
from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import MANIFEST
from nextword.data.builtin_datasets import find_sources
from nextword.data.corpus import Corpus
from nextword.data.issues import IssueLog
from nextword.data.prepare import prepare
from nextword.data.readers import SourceFile
from nextword.data.tokenizer import vocab_size_for
from nextword.model.config import SIZES, ConfigError, ModelConfig, build_config
from nextword.planning.scaling_law import corpus_difficulty
from nextword.planning.size_selection import CorpusStats, RunLength, TrainingPlan, select_size
from nextword.planning.throughput import ThroughputBenchmark
from nextword.training.config import Recipe
from nextword.training.step import available_memory
from nextword.training.trainer import FINALIZE_SECONDS

SAMPLE_BYTES = 2**25  # of a large corpus; prepared in about ten seconds
COMPRESSION_RATIO = 3  # bytes of text per byte of a compressed file, roughly
DEFAULT_BATCH_TOKENS = 4096  # of a run whose length is given in steps


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


def plan_corpus(
    corpus: Corpus,
    recipe: Recipe,
    device: torch.device,
    *,
    seconds: float | None = None,
    scale: float = 1.0,
    num_processes: int = 1,
) -> TrainingPlan:
    """Plan a run on a prepared corpus.

    Args:
        corpus: the corpus, or a sample of it.
        recipe: the recipe; what it leaves open is chosen.
        device: the device to train on.
        seconds: the remaining time of a budget.
        scale: the size of the whole text relative to `corpus`.
        num_processes: the processes that divide each step.
    """
    training = recipe.training
    batch_tokens = training.batch_tokens or (DEFAULT_BATCH_TOKENS if recipe.steps else None)
    if seconds is not None:
        run_length = RunLength(seconds=max(1.0, seconds - FINALIZE_SECONDS))
    elif recipe.flops is not None:
        run_length = RunLength(flops=recipe.flops)
    else:
        step_tokens = training.batch_tokens or DEFAULT_BATCH_TOKENS
        run_length = RunLength(tokens=recipe.tokens or (recipe.steps or 0) * step_tokens)
    difficulty = corpus_difficulty(corpus)
    corpus_stats = CorpusStats(
        tokens=round(scale * corpus.train.tokens),
        bytes=round(scale * corpus.train.bytes),
        difficulty=difficulty.bits,
        validation_tokens=round(scale * corpus.validation.tokens),
        uncertainty=difficulty.uncertainty,
    )
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return select_size(
        corpus_stats,
        run_length,
        candidate_configs(recipe, corpus.tokenizer.vocab_size, device),
        ThroughputBenchmark(corpus.tokens("train"), training, device, bf16, num_processes),
        batch_tokens=batch_tokens,
        lr=training.lr,
        optimizer=training.optimizer,
    )


# ---------------------------------------------------------------- text that is not prepared


@dataclass(frozen=True)
class CorpusSample:
    """A corpus prepared for planning: all of a small text, a sample of a large one.

    Attributes:
        corpus: the prepared corpus.
        scale: the size of the whole text relative to it.
        preparation_seconds: the expected time to prepare the whole text.
    """

    corpus: Corpus
    scale: float
    preparation_seconds: float


def sample_corpus(
    corpora: Sequence[str], work_dir: Path, recipe: Recipe, text_column: str | None, strict: bool, console: Console
) -> CorpusSample:
    """Prepare a text, or the same share of the beginning of each file, in `work_dir`. Opens a prepared corpus as it is.

    Raises:
        NextwordError: there is no text.
        UsageError: a path does not exist.
    """
    if any((Path(path) / MANIFEST).is_file() for path in corpora):
        return CorpusSample(Corpus.open(Path(corpora[0])), 1.0, 0.0)
    sources = find_sources(corpora, IssueLog(strict), text_column)
    total_bytes, started, scale = sum(map(estimate_text_bytes, sources)), time.monotonic(), 1.0
    vocab_size, texts = recipe.vocab_size, list(corpora)
    if total_bytes > SAMPLE_BYTES:
        sample = work_dir / "sample.jsonl"
        scale = total_bytes / write_sample(sources, total_bytes, sample)
        texts, text_column = [str(sample)], None
        vocab_size = vocab_size or (vocab_size_for(total_bytes) if recipe.tokenizer == "bpe" else None)
    corpus = prepare(
        texts,
        work_dir / "shards",
        tokenizer=recipe.tokenizer,
        vocab_size=vocab_size,
        text_column=text_column,
        strict=strict,
        progress=console.progress,
        log=console.info,
    )
    return CorpusSample(corpus, scale, scale * (time.monotonic() - started))


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


def plan_run(
    corpora: Sequence[str],
    recipe: Recipe,
    device: torch.device,
    *,
    text_column: str | None,
    strict: bool,
    console: Console,
) -> dict[str, Any]:
    """Plan a run of a recipe on texts.

    Args:
        corpora: files, directories, or a prepared corpus.
        recipe: the recipe.
        device: the device to train on.
        text_column: the column of the text in tables.
        strict: whether a problem in a text is an error.
        console: for progress and messages.

    Returns:
        The plan as JSON, with statistics of the text, the energy and the preparation time.

    Raises:
        UsageError: the budget is shorter than the preparation of the text.
    """
    with TemporaryDirectory(prefix="nextword-plan-") as work_dir:
        sample = sample_corpus(corpora, Path(work_dir), recipe, text_column, strict, console)
        console.info("benchmarking model sizes on this machine …")
        meter = EnergyMeter(device)
        remaining_seconds = None if recipe.budget is None else recipe.budget - sample.preparation_seconds
        if remaining_seconds is not None and remaining_seconds < FINALIZE_SECONDS:
            raise UsageError(
                f"a budget of {recipe.budget:.0f} s is too short: the preparation of this text takes about "
                f"{sample.preparation_seconds:.0f} s"
            )
        plan = plan_corpus(sample.corpus, recipe, device, seconds=remaining_seconds, scale=sample.scale)
        total_seconds = recipe.budget or plan.seconds + sample.preparation_seconds
        text = {
            "tokens": round(sample.scale * sample.corpus.train.tokens),
            "bytes": round(sample.scale * sample.corpus.train.bytes),
            "documents": round(sample.scale * sample.corpus.documents),
            "vocab_size": sample.corpus.tokenizer.vocab_size,
            "sampled": sample.scale > 1,
        }
        return {
            **plan.to_dict(),
            "seconds": total_seconds,
            "preparation_seconds": sample.preparation_seconds,
            "text": text,
            "energy": meter.energy(total_seconds),
        }
