"""How well a model predicts texts, with an interval, beside another model and other seeds, and what it makes of its context."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunFolder
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenSource
from nextword.data.tokenizer import Tokenizer
from nextword.evaluation.significance import Panel, decided, interval, noise
from nextword.inference.perplexity import Likelihood, context_use
from nextword.pipeline.language_model import Model, Paths, as_list
from nextword.tasks import metrics

BLOCK, MOST = 1024, 1000  # bytes of a block of text at least, and blocks at most: what is resampled


def judge_text(
    panel: Panel, read: Sequence[tuple[TokenSource, int]], *, stride: int | None, use: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A text's result, as `nextword evaluate --json` prints it.

    Args:
        read: the text as the tokens of each of the models (the judged one, `against`, `seeds`), and its bytes.
        stride: see `likelihood`; half a window where None.
        use: also tell the loss at each position of the window, on the text and on its tokens shuffled.
    """
    console = console or Console(quiet=True)
    models = [panel.model, *([] if panel.against is None else [panel.against]), *panel.seeds]
    found = [_blocks(model, *text, stride, console) for model, text in zip(models, read, strict=True)]
    own, bits = found[0]
    spread = metrics.average(bits.tolist())
    result: dict[str, Any] = {
        **{name: getattr(own, name) for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "stride")},
        "interval": {"low": spread.low, "high": spread.high, "blocks": spread.n},
    }
    if use:
        seen = context_use(panel.model.weights, read[0][0])
        result["context_use"] = {"true": seen.true, "shuffled": seen.shuffled}
    if panel.seeds:
        others = found[len(found) - len(panel.seeds) :]
        result["noise"] = noise([each.bits_per_byte for each, _ in (found[0], *others)])
    if panel.against is not None:
        other, theirs = found[1]
        apart = interval(metrics.difference(bits.tolist(), theirs.tolist()))
        against = {"model": str(panel.against.path), "bits_per_byte": other.bits_per_byte, "difference": apart}
        result["against"] = decided(against, better=apart["value"] < 0)
        if panel.seeds:
            result["against"]["beyond_noise"] = abs(apart["value"]) > result["noise"]["floor"]
    return result


def _blocks(
    model: Model, tokens: TokenSource, n_bytes: int, stride: int | None, console: Console
) -> tuple[Likelihood, np.ndarray]:
    """A text's likelihood, and bits per byte of each of its blocks: parts of as many bytes each, the same ones for every
    tokenizer. A token belongs to the block it begins in."""
    nats = np.zeros(max(0, len(tokens) - 1))
    own = model.likelihood(tokens, n_bytes, console, stride, nats)
    count = min(MOST, max(2, n_bytes // BLOCK))
    sizes = _sizes(model.tokenizer, model.gpt.config.vocab_size)[tokens.read(0, len(tokens)).astype(np.int64)]
    begins = (np.cumsum(sizes) - sizes)[1:] / max(1.0, float(sizes.sum()))  # of each predicted token, 0 to 1
    block = np.minimum((begins * count).astype(np.int64), count - 1)
    return own, np.bincount(block, nats, minlength=count) / math.log(2) / (n_bytes / count)


def _sizes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """How many bytes each token of the vocabulary stands for; of a foreign tokenizer about so many."""
    return np.array([float(len(tokenizer.decode_bytes([id]))) for id in range(vocab_size)])


def text_for(
    panel: Panel, path: str | Path, texts: Paths, text_column: str | None, stride: int | None, console: Console
) -> tuple[list[tuple[TokenSource, int]], int | None]:
    """The text that the panel's models are judged on, as each of them reads it with its bytes, and the stride over it.

    Raises:
        UsageError: no text is named and `path` is no run, or one whose tokens are not the other models' too.
    """
    models = [one for one in (panel.model, panel.against, *panel.seeds) if one is not None]
    if as_list(texts):
        return [one.read(texts, text_column, console) for one in models], stride
    run = RunFolder(Path(path))
    if not run.begun:
        raise UsageError(f"{path}: say on which text: nextword evaluate {path} TEXT…")
    for model in models[1:]:
        if model.tokenizer.backend.to_str() != panel.model.tokenizer.backend.to_str():
            raise UsageError(f"{model.path}: has another tokenizer than {path}; name a text to compare them on")
    corpus = Corpus.open(run.path / run.facts()["shards"])
    held_out = corpus.tokens("validation")
    return [(held_out, corpus.validation.bytes)] * len(models), stride or panel.model.gpt.config.context_length
