"""How well a model predicts a text: the loss, perplexity, bits per byte, and where in its window it predicts better.

Shapes: B windows in a batch, T predicted positions (at most the context length), D model width, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError
from nextword.data.dataset import TokenSource
from nextword.model import fused
from nextword.model.fused import FusedGPT
from nextword.model.gpt import GPT
from nextword.training.losses import dense_token_nll

BATCH_TOKENS = 8192  # tokens that go through the model at once
MAX_LOGITS = 2**24  # logits that are held at once: 64 MB of float32


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts a text.

    Attributes:
        loss: nats per predicted token, −(1/N) Σ log P(x_t | x_<t; θ).
        perplexity: exp(loss).
        bits_per_byte: the same sum in bits, per byte of the text; compares models with different tokenizers.
        tokens: how many tokens were predicted.
        bytes: how many bytes of text they stand for.
        by_position: [T], the mean loss at each position of the window.
        stride: how many tokens a window stands after the one before.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    by_position: list[float]
    stride: int


class DistContext(Protocol):
    """Processes that do something together, as one of them sees them: which equal part of the work is its, of how many; and
    `in_step` where the model's forward pass takes several of them at the same time."""

    @property
    def dp_rank(self) -> int: ...
    @property
    def dp_size(self) -> int: ...
    @property
    def forward_is_collective(self) -> bool: ...

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """Of each number the greatest that any of them has."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all parts of the work, in the tensor itself."""
        ...


def evaluate_perplexity(
    model: GPT,
    tokens: TokenSource,
    num_bytes: int,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    token_nll_out: np.ndarray | None = None,
    dist_context: DistContext | None = None,
) -> Likelihood:
    """Predict a text in windows of context_length + 1 tokens, of each what no window before it has predicted: every token but
    the first is predicted exactly once.

    Args:
        n_bytes: how many bytes of text the tokens stand for.
        stride: how many tokens a window stands after the one before; the context length where not given, so that windows
            overlap by one. With fewer, each token but the first window's sees at least context_length − stride before it.
        batch_rows: windows that go through the model at once; about 8,192 tokens where not given.
        limit_windows: predict only so many windows, evenly spread over the text and the same ones every time.
        progress: called with the windows that are done and those that there are.
        each: [len(tokens) − 1], filled with the nats of each token that is predicted.
        company: processes that share the work and all get the same answer.

    Raises:
        UsageError: fewer than two tokens, no bytes, a stride that is none, or a token that the model does not have.
        NextwordError: the model's loss is not a finite number.
    """
    if len(tokens) < 2 or num_bytes < 1:
        raise UsageError(
            f"there is nothing to predict in {len(tokens)} tokens of {num_bytes} bytes: give a longer text"
        )
    context_length = model.config.context_length
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UsageError(f"the stride must be between 1 and the context length of {context_length}, not {stride}")
    num_windows = 1 + max(0, -(-(len(tokens) - 1 - context_length) // stride))
    window_indices = _evenly_spaced(num_windows, max_windows)
    if dist_context is not None:
        window_indices = window_indices[dist_context.dp_rank :: dist_context.dp_size]
    nll_sums, token_counts = (
        torch.zeros(context_length, dtype=torch.float64),
        torch.zeros(context_length, dtype=torch.int64),
    )
    singleton_windows = (num_windows - 1,) if stride == context_length else (0, num_windows - 1)
    batches = list(
        _batch_windows(window_indices, batch_size or max(1, BATCH_TOKENS // context_length), singleton_windows)
    )
    windows_done = padding_batches = 0
    if dist_context is not None and dist_context.forward_is_collective:
        padding_batches = int(dist_context.all_reduce_max([len(batches)])[0]) - len(batches)
    with evaluation_mode(model, inference_mode=dist_context is None or not dist_context.forward_is_collective):
        for batch in batches:
            token_nll = compute_token_nll(model, _read_windows(tokens, batch, context_length, stride))  # [B, T]
            scored = slice(context_length - stride if batch[0] else 0, token_nll.shape[1])
            nll_sums[scored] += token_nll[:, scored].sum(0)
            token_counts[scored] += token_nll.shape[0]
            if token_nll_out is not None:
                for window, row in zip(batch, token_nll[:, scored].numpy(), strict=True):
                    token_nll_out[window * stride + scored.start : window * stride + scored.stop] = row
            windows_done += len(batch)
            if progress is not None:
                progress(windows_done, len(window_indices))
        for _ in range(padding_batches):  # those who have more to do need this one in each pass
            compute_token_nll(model, _read_windows(tokens, [0], context_length, stride))
    if dist_context is not None:
        nll_sums, token_counts = dist_context.all_reduce_sum(nll_sums), dist_context.all_reduce_sum(token_counts)
    return _perplexity_result(nll_sums, token_counts, num_bytes, len(tokens) - 1, stride)


def _perplexity_result(
    nll_sums: Tensor, token_counts: Tensor, num_bytes: int, total_tokens: int, stride: int
) -> Likelihood:
    """From the nats and the number of tokens at each position [T]; `whole` tokens could have been predicted."""
    scored_tokens, total_nll = int(token_counts.sum()), float(nll_sums.sum())
    if not math.isfinite(total_nll):
        raise NextwordError("the loss is not a finite number: the model's weights are damaged, or it diverged")
    coverage = scored_tokens / total_tokens  # of the text, where only some of its windows are predicted
    return Likelihood(
        loss=total_nll / scored_tokens,
        perplexity=math.exp(min(total_nll / scored_tokens, 700.0)),  # what is more is no number of Python's
        bits_per_byte=total_nll / math.log(2) / (num_bytes * coverage),
        tokens=scored_tokens,
        bytes=round(num_bytes * coverage),
        by_position=(nll_sums / token_counts)[token_counts > 0].tolist(),
        stride=stride,
    )


@dataclass(frozen=True)
class ContextUsage:
    """The mean loss at each position [T] of the window, on the text as it is and with each window's tokens shuffled."""

    original: list[float]
    shuffled: list[float]


def measure_context_usage(model: GPT, tokens: TokenSource, *, max_windows: int = 64, seed: int = 0) -> ContextUsage:
    """Show whether a model uses its context: the loss then falls with the position, and more so than with the tokens
    shuffled, where what came before tells which tokens there are but not what follows what.

    Args:
        windows: how many windows of context_length + 1 tokens, evenly spread over the text and the same every time.
        seed: of the shuffling.

    Raises:
        UsageError: the text is shorter than one window, or has a token that the model does not have.
    """
    context_length = model.config.context_length
    num_windows = (len(tokens) - 1) // context_length
    if num_windows < 1:
        raise UsageError(f"{len(tokens)} tokens are less than one window of {context_length + 1}: give a longer text")
    original, shuffled = torch.zeros(2, context_length, dtype=torch.float64)
    window_indices, generator = _evenly_spaced(num_windows, max_windows), np.random.default_rng(seed)
    with evaluation_mode(model):
        for batch in _batch_windows(window_indices, max(1, BATCH_TOKENS // context_length), singleton_windows=()):
            windows_batch = _read_windows(tokens, batch, context_length, context_length)
            original += compute_token_nll(model, windows_batch).sum(0)
            shuffled += compute_token_nll(model, generator.permuted(windows_batch, axis=1)).sum(0)
    return ContextUsage((original / len(window_indices)).tolist(), (shuffled / len(window_indices)).tolist())


def compute_token_nll(model: GPT, windows: np.ndarray) -> Tensor:
    """−log P(x_t | x_<t; θ) of every token but the first of windows [B, T + 1]; [B, T] in float64, on the CPU.

    Logits are made in slices, so that memory does not grow with the vocabulary.

    Raises:
        UsageError: the model has no such token.
    """
    if windows.max() >= model.config.vocab_size:
        raise UsageError(
            f"the text has a token {windows.max()} and the model knows {model.config.vocab_size}: "
            "it was prepared with another tokenizer than the model's"
        )
    ids = torch.from_numpy(windows.astype(np.int64)).to(model.unembedding.device)
    # With compiled parts where all weights are here, and not each process has a part of them.
    is_unsharded = not any(hasattr(p, "placements") for p in model.parameters())
    forward = FusedGPT(model) if is_unsharded and fused.is_available(model) else model
    hidden = forward(ids[:, :-1]).flatten(0, 1)  # [B·T, D]
    rows = max(1, MAX_LOGITS // model.config.vocab_size)
    token_nll = [
        dense_token_nll(part, model.unembedding, target)
        for part, target in zip(hidden.split(rows), ids[:, 1:].flatten().split(rows), strict=True)
    ]
    return torch.cat(token_nll).cpu().double().view(ids.shape[0], -1)


@contextlib.contextmanager
def evaluation_mode(model: GPT, inference_mode: bool = True) -> Iterator[None]:
    """The model without gradients and in evaluation mode, and afterwards as it was; what is made in it is not `for_good` where
    training may use it again, as it does the memory that shared weights are gathered in."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode() if inference_mode else torch.no_grad():
            yield
    finally:
        model.train(training)


def _evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Which of `count` windows are taken: all, or the middle one of each of `limit` equal parts."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * limit) for i in range(max(1, limit))]


def _batch_windows(
    window_indices: Sequence[int], batch_size: int, singleton_windows: Collection[int]
) -> Iterator[Sequence[int]]:
    """Groups of at most `rows` windows; by themselves the first, of which more is predicted, and the last, which may be
    shorter than the others."""
    batch: list[int] = []
    for window in window_indices:
        if batch and (len(batch) == batch_size or window in singleton_windows or batch[-1] in singleton_windows):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _read_windows(tokens: TokenSource, indices: Sequence[int], context_length: int, stride: int) -> np.ndarray:
    """Windows by number; [B, T + 1] ids."""
    starts = (index * stride for index in indices)
    return np.stack([tokens.read(start, min(context_length + 1, len(tokens) - start)) for start in starts])
