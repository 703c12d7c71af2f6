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
from nextword.training.losses import cross_entropies

BATCH_TOKENS = 8192  # tokens that go through the model at once
LOGITS = 2**24  # logits that are held at once: 64 MB of float32


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


class Company(Protocol):
    """Processes that do something together, as one of them sees them: which equal part of the work is its, of how many; and
    `in_step` where the model's forward pass takes several of them at the same time."""

    @property
    def data_rank(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    @property
    def in_step(self) -> bool: ...

    def most(self, values: Sequence[float]) -> list[float]:
        """Of each number the greatest that any of them has."""
        ...

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all parts of the work, in the tensor itself."""
        ...


def likelihood(
    model: GPT,
    tokens: TokenSource,
    n_bytes: int,
    *,
    stride: int | None = None,
    batch_rows: int | None = None,
    limit_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    each: np.ndarray | None = None,
    company: Company | None = None,
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
    if len(tokens) < 2 or n_bytes < 1:
        raise UsageError(f"there is nothing to predict in {len(tokens)} tokens of {n_bytes} bytes: give a longer text")
    context_length = model.config.context_length
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UsageError(f"the stride must be between 1 and the context length of {context_length}, not {stride}")
    count = 1 + max(0, -(-(len(tokens) - 1 - context_length) // stride))
    chosen = _spread(count, limit_windows)
    if company is not None:
        chosen = chosen[company.data_rank :: company.data_size]
    sums, counts = torch.zeros(context_length, dtype=torch.float64), torch.zeros(context_length, dtype=torch.int64)
    alone = (count - 1,) if stride == context_length else (0, count - 1)
    groups = list(_batches(chosen, batch_rows or max(1, BATCH_TOKENS // context_length), alone))
    done = spare = 0
    if company is not None and company.in_step:
        spare = int(company.most([len(groups)])[0]) - len(groups)
    with evaluating(model, for_good=company is None or not company.in_step):
        for group in groups:
            losses = token_losses(model, _windows(tokens, group, context_length, stride))  # [B, T]
            new = slice(context_length - stride if group[0] else 0, losses.shape[1])
            sums[new] += losses[:, new].sum(0)
            counts[new] += losses.shape[0]
            if each is not None:
                for window, row in zip(group, losses[:, new].numpy(), strict=True):
                    each[window * stride + new.start : window * stride + new.stop] = row
            done += len(group)
            if progress is not None:
                progress(done, len(chosen))
        for _ in range(spare):  # those who have more to do need this one in each pass
            token_losses(model, _windows(tokens, [0], context_length, stride))
    if company is not None:
        sums, counts = company.summed(sums), company.summed(counts)
    return _likelihood_of(sums, counts, n_bytes, len(tokens) - 1, stride)


def _likelihood_of(sums: Tensor, counts: Tensor, n_bytes: int, whole: int, stride: int) -> Likelihood:
    """From the nats and the number of tokens at each position [T]; `whole` tokens could have been predicted."""
    predicted, nats = int(counts.sum()), float(sums.sum())
    if not math.isfinite(nats):
        raise NextwordError("the loss is not a finite number: the model's weights are damaged, or it diverged")
    share = predicted / whole  # of the text, where only some of its windows are predicted
    return Likelihood(
        loss=nats / predicted,
        perplexity=math.exp(min(nats / predicted, 700.0)),  # what is more is no number of Python's
        bits_per_byte=nats / math.log(2) / (n_bytes * share),
        tokens=predicted,
        bytes=round(n_bytes * share),
        by_position=(sums / counts)[counts > 0].tolist(),
        stride=stride,
    )


@dataclass(frozen=True)
class ContextUse:
    """The mean loss at each position [T] of the window, on the text as it is and with each window's tokens shuffled."""

    true: list[float]
    shuffled: list[float]


def context_use(model: GPT, tokens: TokenSource, *, windows: int = 64, seed: int = 0) -> ContextUse:
    """Show whether a model uses its context: the loss then falls with the position, and more so than with the tokens
    shuffled, where what came before tells which tokens there are but not what follows what.

    Args:
        windows: how many windows of context_length + 1 tokens, evenly spread over the text and the same every time.
        seed: of the shuffling.

    Raises:
        UsageError: the text is shorter than one window, or has a token that the model does not have.
    """
    context_length = model.config.context_length
    count = (len(tokens) - 1) // context_length
    if count < 1:
        raise UsageError(f"{len(tokens)} tokens are less than one window of {context_length + 1}: give a longer text")
    true, shuffled = torch.zeros(2, context_length, dtype=torch.float64)
    chosen, generator = _spread(count, windows), np.random.default_rng(seed)
    with evaluating(model):
        for group in _batches(chosen, max(1, BATCH_TOKENS // context_length), alone=()):
            rows = _windows(tokens, group, context_length, context_length)
            true += token_losses(model, rows).sum(0)
            shuffled += token_losses(model, generator.permuted(rows, axis=1)).sum(0)
    return ContextUse((true / len(chosen)).tolist(), (shuffled / len(chosen)).tolist())


def token_losses(model: GPT, windows: np.ndarray) -> Tensor:
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
    whole = not any(hasattr(p, "placements") for p in model.parameters())
    forward = FusedGPT(model) if whole and fused.available(model) else model
    hidden = forward(ids[:, :-1]).flatten(0, 1)  # [B·T, D]
    rows = max(1, LOGITS // model.config.vocab_size)
    losses = [
        cross_entropies(part, model.unembedding, target)
        for part, target in zip(hidden.split(rows), ids[:, 1:].flatten().split(rows), strict=True)
    ]
    return torch.cat(losses).cpu().double().view(ids.shape[0], -1)


@contextlib.contextmanager
def evaluating(model: GPT, for_good: bool = True) -> Iterator[None]:
    """The model without gradients and in evaluation mode, and afterwards as it was; what is made in it is not `for_good` where
    training may use it again, as it does the memory that shared weights are gathered in."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode() if for_good else torch.no_grad():
            yield
    finally:
        model.train(training)


def _spread(count: int, limit: int | None) -> list[int]:
    """Which of `count` windows are taken: all, or the middle one of each of `limit` equal parts."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * limit) for i in range(max(1, limit))]


def _batches(chosen: Sequence[int], rows: int, alone: Collection[int]) -> Iterator[Sequence[int]]:
    """Groups of at most `rows` windows; by themselves the first, of which more is predicted, and the last, which may be
    shorter than the others."""
    group: list[int] = []
    for window in chosen:
        if group and (len(group) == rows or window in alone or group[-1] in alone):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _windows(tokens: TokenSource, indices: Sequence[int], context_length: int, stride: int) -> np.ndarray:
    """Windows by number; [B, T + 1] ids."""
    starts = (index * stride for index in indices)
    return np.stack([tokens.read(start, min(context_length + 1, len(tokens) - start)) for start in starts])
