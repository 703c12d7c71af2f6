"""Perplexity of texts with a confidence interval, compared with other models and seeds, and the use of context."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunDir
from nextword.common.statistics import bootstrap_mean, paired_difference
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenSource
from nextword.data.tokenizer import Tokenizer
from nextword.evaluation.benchmarks import EvalModels, compare_significance, interval_to_dict, seed_variance
from nextword.inference.perplexity import PerplexityResult, measure_context_usage
from nextword.pipeline.language_model import LanguageModel, Paths, as_list

MIN_BLOCK_BYTES, MAX_BLOCKS = 1024, 1000  # the bootstrap resamples blocks of text


def evaluate_text(
    eval_models: EvalModels,
    token_sources: Sequence[tuple[TokenSource, int]],
    *,
    stride: int | None,
    with_context_use: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the perplexity of a text.

    Args:
        eval_models: The model, and those it is compared with.
        token_sources: The text in the tokens of each model (the evaluated one, `compare_to`, `seed_runs`), and its bytes.
        stride: Stride of the window in tokens; see `evaluate_perplexity`. None: half a window.
        with_context_use: Add the loss at each position of the window, for the text and for its shuffled tokens.
        console: Where progress goes.

    Returns:
        The result as in `nextword evaluate --json`.
    """
    console = console or Console(quiet=True)
    other = eval_models.compare_to
    models = [eval_models.model, *([] if other is None else [other]), *eval_models.seed_runs]
    evaluations = [_evaluate_blocks(*pair, stride, console) for pair in zip(models, token_sources, strict=True)]
    perplexity, block_bits = evaluations[0]
    interval = bootstrap_mean(block_bits.tolist())
    result: dict[str, Any] = {
        "loss": perplexity.loss,
        "perplexity": perplexity.perplexity,
        "bits_per_byte": perplexity.bits_per_byte,
        "tokens": perplexity.tokens,
        "bytes": perplexity.bytes,
        "stride": perplexity.stride,
        "interval": {"low": interval.low, "high": interval.high, "blocks": interval.n},
    }
    if with_context_use:
        usage = measure_context_usage(eval_models.model.dequantized, token_sources[0][0])
        result["context_use"] = {"true": usage.original, "shuffled": usage.shuffled}
    if eval_models.seed_runs:
        seed_runs = [perplexity, *(run for run, _ in evaluations[-len(eval_models.seed_runs) :])]
        result["noise"] = seed_variance([run.bits_per_byte for run in seed_runs])
    if other is not None:
        other_perplexity, other_block_bits = evaluations[1]
        difference = paired_difference(block_bits.tolist(), other_block_bits.tolist())
        result["against"] = {
            "model": str(other.path),
            "bits_per_byte": other_perplexity.bits_per_byte,
            "difference": interval_to_dict(difference),
            **compare_significance(difference, is_better=difference.value < 0),
        }
        if eval_models.seed_runs:
            result["against"]["beyond_noise"] = abs(difference.value) > result["noise"]["floor"]
    return result


def _evaluate_blocks(
    model: LanguageModel, token_source: tuple[TokenSource, int], stride: int | None, console: Console
) -> tuple[PerplexityResult, np.ndarray]:
    """The perplexity of a text, and the bits per byte of its blocks.

    Blocks have equal numbers of bytes and are the same for every tokenizer. A token belongs to the block that it starts in.
    """
    tokens, num_bytes = token_source
    token_nll = np.zeros(max(0, len(tokens) - 1))
    perplexity = model.evaluate_tokens(tokens, num_bytes, console, stride, token_nll)
    num_blocks = min(MAX_BLOCKS, max(2, num_bytes // MIN_BLOCK_BYTES))
    byte_lengths = _token_byte_lengths(model.tokenizer, model.gpt.config.vocab_size)
    sizes = byte_lengths[tokens.read(0, len(tokens)).astype(np.int64)]
    starts = (np.cumsum(sizes) - sizes)[1:] / max(1.0, float(sizes.sum()))  # of each predicted token, 0 to 1
    block_ids = np.minimum((starts * num_blocks).astype(np.int64), num_blocks - 1)
    block_nll = np.bincount(block_ids, token_nll, minlength=num_blocks)
    return perplexity, block_nll / math.log(2) / (num_bytes / num_blocks)


def _token_byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """The bytes of each token of the vocabulary; approximate for tokenizers that are not byte-level."""
    return np.array([float(len(tokenizer.decode_bytes([id]))) for id in range(vocab_size)])


def load_eval_text(
    eval_models: EvalModels,
    path: str | Path,
    texts: Paths,
    text_column: str | None,
    stride: int | None,
    console: Console,
) -> tuple[list[tuple[TokenSource, int]], int | None]:
    """The text of an evaluation in the tokens of each model with its bytes, and the stride.

    Args:
        eval_models: The models.
        path: The path that the evaluated model was opened from. If it is a run, its validation set is the default text.
        texts: Files, folders or named corpora.
        text_column: The column of the text in tables.
        stride: The requested stride.
        console: Where warnings go.

    Raises:
        UsageError: No text is given, and `path` is not a run or the other models have other tokenizers.
    """
    models = [eval_models.model, eval_models.compare_to, *eval_models.seed_runs]
    models = [model for model in models if model is not None]
    if as_list(texts):
        return [model.read_tokens(texts, text_column, console) for model in models], stride
    run = RunDir(Path(path))
    if not run.exists:
        raise UsageError(f"{path}: not a run directory, so give a text: nextword evaluate {path} TEXT…")
    for model in models[1:]:
        if model.tokenizer.backend.to_str() != eval_models.model.tokenizer.backend.to_str():
            raise UsageError(f"{model.path}: its tokenizer differs from that of {path}; give a text to compare them on")
    corpus = Corpus.open(run.path / run.metadata()["shards"])
    validation = corpus.tokens("validation")
    default_stride = eval_models.model.gpt.config.context_length
    return [(validation, corpus.validation.bytes)] * len(models), stride or default_stride
