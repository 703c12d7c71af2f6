"""How well a model predicts texts, with an interval, beside another model and other seeds, and what it makes of its context."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunDir
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenSource
from nextword.data.tokenizer import Tokenizer
from nextword.evaluation.significance import EvalModels, compare_significance, interval_to_dict, seed_variance
from nextword.inference.perplexity import Likelihood, measure_context_usage
from nextword.pipeline.language_model import Model, Paths, as_list
from nextword.tasks import metrics

MIN_BLOCK_BYTES, MAX_BLOCKS = 1024, 1000  # bytes of a block of text at least, and blocks at most: what is resampled


def evaluate_text(
    eval_models: EvalModels, token_sources: Sequence[tuple[TokenSource, int]], *, stride: int | None, with_context_use: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A text's result, as `nextword evaluate --json` prints it.

    Args:
        read: the text as the tokens of each of the models (the judged one, `against`, `seeds`), and its bytes.
        stride: see `likelihood`; half a window where None.
        use: also tell the loss at each position of the window, on the text and on its tokens shuffled.
    """
    console = console or Console(quiet=True)
    models = [
        eval_models.model,
        *([] if eval_models.compare_to is None else [eval_models.compare_to]),
        *eval_models.seed_runs,
    ]
    found = [_evaluate_blocks(model, *text, stride, console) for model, text in zip(models, token_sources, strict=True)]
    perplexity_result, block_bits = found[0]
    block_interval = metrics.bootstrap_mean(block_bits.tolist())
    result: dict[str, Any] = {
        **{
            name: getattr(perplexity_result, name)
            for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "stride")
        },
        "interval": {"low": block_interval.low, "high": block_interval.high, "blocks": block_interval.n},
    }
    if with_context_use:
        seen = measure_context_usage(eval_models.model.dequantized, token_sources[0][0])
        result["context_use"] = {"true": seen.original, "shuffled": seen.shuffled}
    if eval_models.seed_runs:
        others = found[len(found) - len(eval_models.seed_runs) :]
        result["noise"] = seed_variance([each.bits_per_byte for each, _ in (found[0], *others)])
    if eval_models.compare_to is not None:
        other, other_block_bits = found[1]
        difference = interval_to_dict(metrics.paired_difference(block_bits.tolist(), other_block_bits.tolist()))
        against = {
            "model": str(eval_models.compare_to.path),
            "bits_per_byte": other.bits_per_byte,
            "difference": difference,
        }
        result["against"] = compare_significance(against, better=difference["value"] < 0)
        if eval_models.seed_runs:
            result["against"]["beyond_noise"] = abs(difference["value"]) > result["noise"]["floor"]
    return result


def _evaluate_blocks(
    model: Model, tokens: TokenSource, n_bytes: int, stride: int | None, console: Console
) -> tuple[Likelihood, np.ndarray]:
    """A text's likelihood, and bits per byte of each of its blocks: parts of as many bytes each, the same ones for every
    tokenizer. A token belongs to the block it begins in."""
    nats = np.zeros(max(0, len(tokens) - 1))
    perplexity_result = model.evaluate_tokens(tokens, n_bytes, console, stride, nats)
    count = min(MAX_BLOCKS, max(2, n_bytes // MIN_BLOCK_BYTES))
    sizes = _token_byte_lengths(model.tokenizer, model.gpt.config.vocab_size)[
        tokens.read(0, len(tokens)).astype(np.int64)
    ]
    begins = (np.cumsum(sizes) - sizes)[1:] / max(1.0, float(sizes.sum()))  # of each predicted token, 0 to 1
    block = np.minimum((begins * count).astype(np.int64), count - 1)
    return perplexity_result, np.bincount(block, nats, minlength=count) / math.log(2) / (n_bytes / count)


def _token_byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """How many bytes each token of the vocabulary stands for; of a foreign tokenizer about so many."""
    return np.array([float(len(tokenizer.decode_bytes([id]))) for id in range(vocab_size)])


def load_eval_text(
    eval_models: EvalModels,
    path: str | Path,
    texts: Paths,
    text_column: str | None,
    stride: int | None,
    console: Console,
) -> tuple[list[tuple[TokenSource, int]], int | None]:
    """The text that the panel's models are judged on, as each of them reads it with its bytes, and the stride over it.

    Raises:
        UsageError: no text is named and `path` is no run, or one whose tokens are not the other models' too.
    """
    models = [one for one in (eval_models.model, eval_models.compare_to, *eval_models.seed_runs) if one is not None]
    if as_list(texts):
        return [one.read_tokens(texts, text_column, console) for one in models], stride
    run = RunDir(Path(path))
    if not run.exists:
        raise UsageError(f"{path}: say on which text: nextword evaluate {path} TEXT…")
    for model in models[1:]:
        if model.tokenizer.backend.to_str() != eval_models.model.tokenizer.backend.to_str():
            raise UsageError(f"{model.path}: has another tokenizer than {path}; name a text to compare them on")
    corpus = Corpus.open(run.path / run.metadata()["shards"])
    held_out = corpus.tokens("validation")
    return [(held_out, corpus.validation.bytes)] * len(models), stride or eval_models.model.gpt.config.context_length
