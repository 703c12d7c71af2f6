"""Perplexity of a model on a text: loss, bits per byte, and the loss at each position of the window.

Shapes: B windows of a batch, T predicted positions (at most the context length), V vocabulary.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError
from nextword.common.statistics import t_quantile
from nextword.data.dataset import TokenSource
from nextword.model.cross_entropy import token_nll
from nextword.model.gpt import GPT

BATCH_TOKENS = 8192  # tokens of a forward pass
MAX_LOGITS = 2**24  # logits held at once: 64 MB of float32


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        loss: Cross-entropy in nats per predicted token, −(1/N) Σ log P(x_t | x_<t; θ).
        perplexity: exp(loss).
        bits_per_byte: The same sum in bits per byte of the text; comparable between tokenizers.
        tokens: Number of predicted tokens.
        bytes: Bytes of text that those tokens stand for.
        by_position: Mean loss at each position of the window, [T].
        stride: Tokens between the starts of two windows.
        margin: Half the width of the 95 % confidence interval of the loss on the whole text, in nats per token; 0 if the whole
            text was evaluated.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    by_position: list[float]
    stride: int
    margin: float = 0.0


class DistContext(Protocol):
    """The processes that share an evaluation, as seen from one of them (see `training.distributed.DistContext`)."""

    @property
    def dp_rank(self) -> int:
        """Index of this process's share of the data."""
        ...

    @property
    def dp_size(self) -> int:
        """Number of shares."""
        ...

    @property
    def forward_is_collective(self) -> bool:
        """Whether processes must run forward passes together, because weights are gathered in them."""
        ...

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The maximum of each number over all processes."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all shares, in place."""
        ...


def evaluate_perplexity(
    model: GPT,
    tokens: TokenSource,
    num_bytes: int,
    *,
    bos_id: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    token_nll_out: np.ndarray | None = None,
    dist_context: DistContext | None = None,
) -> PerplexityResult:
    """Evaluate a model on a text with a sliding window.

    Windows have context_length + 1 tokens. Each predicts the tokens that no earlier window has predicted, so that every token
    but the first is predicted exactly once.

    Args:
        model: The model.
        tokens: The text.
        num_bytes: Bytes of text that the tokens stand for.
        bos_id: The token that begins a document: it is given, so that predicting it does not count. Default: none.
        stride: Tokens between the starts of two windows. Default: the context length. With a smaller stride, each token
            after the first window has at least context_length − stride tokens of context.
        batch_size: Windows of a forward pass. Default: about 8,192 tokens.
        max_windows: Evaluate this many windows, evenly spaced and always the same ones. Default: all.
        progress: Called with the number of finished windows and of all windows.
        should_stop: Called after each batch; the evaluation ends when it returns True. Windows are evaluated in random order,
            so that those evaluated so far are a simple random sample. If forward passes are collective, all processes must get
            the same answers.
        token_nll_out: [len(tokens) − 1]; filled with the loss of each predicted token in nats.
        dist_context: Processes that share the evaluation; all of them get the same result.

    Raises:
        UsageError: Fewer than two tokens, no bytes, a stride out of range, or a token outside the model's vocabulary.
        NextwordError: The loss is not finite.
    """
    if len(tokens) < 2 or num_bytes < 1:
        raise UsageError(f"the text is too short to evaluate: {len(tokens)} tokens, {num_bytes} bytes")
    context_length = model.config.context_length
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UsageError(f"the stride must be between 1 and the context length of {context_length}, not {stride}")
    num_windows = 1 + max(0, -(-(len(tokens) - 1 - context_length) // stride))
    windows = _evenly_spaced(num_windows, max_windows)
    if should_stop is not None:
        windows = np.random.default_rng(0).permutation(windows).tolist()
    if dist_context is not None:
        windows = windows[dist_context.dp_rank :: dist_context.dp_size]
    # The first window predicts more tokens than the others if they overlap, and the last one may be shorter.
    singletons = (num_windows - 1,) if stride == context_length else (0, num_windows - 1)
    batches = list(_batch_windows(windows, batch_size or max(1, BATCH_TOKENS // context_length), singletons))
    collective = dist_context is not None and dist_context.forward_is_collective
    padding_batches = 0  # forward passes without a result, for processes that have more batches
    if dist_context is not None and collective:
        padding_batches = int(dist_context.all_reduce_max([len(batches)])[0]) - len(batches)
    sums = torch.zeros(context_length, dtype=torch.float64)
    counts = torch.zeros(context_length, dtype=torch.int64)
    moments = torch.zeros(5, dtype=torch.float64)  # of the windows: 1, nats², nats × tokens, tokens², tokens read
    num_done, stopped = 0, False
    with evaluation_mode(model, inference_mode=not collective):
        for batch in batches:
            rows = _read_windows(tokens, batch, context_length, stride)
            is_counted = torch.as_tensor(rows[:, 1:] != (-1 if bos_id is None else bos_id))
            nll = compute_token_nll(model, rows) * is_counted  # [B, T]
            new = slice(context_length - stride if batch[0] else 0, nll.shape[1])
            sums[new] += nll[:, new].sum(0)
            counts[new] += is_counted[:, new].sum(0)
            nats, num_counted = nll[:, new].sum(1), is_counted[:, new].sum(1).double()
            squares = nats.square().sum(), (nats * num_counted).sum(), num_counted.square().sum()
            moments += torch.tensor([len(nll), *map(float, squares), nll[:, new].numel()], dtype=torch.float64)
            if token_nll_out is not None:
                for window, row in zip(batch, nll[:, new].numpy(), strict=True):
                    token_nll_out[window * stride + new.start : window * stride + new.stop] = row
            num_done += len(batch)
            if progress is not None:
                progress(num_done, len(windows))
            if stopped := should_stop is not None and should_stop():
                break
        for _ in range(0 if stopped else padding_batches):
            compute_token_nll(model, _read_windows(tokens, [0], context_length, stride))
            if should_stop is not None and should_stop():
                break
    if dist_context is not None:
        sums, counts, moments = map(dist_context.all_reduce_sum, (sums, counts, moments))
    num_tokens, nats = int(counts.sum()), float(sums.sum())
    if not math.isfinite(nats):
        raise NextwordError("the loss is not finite: the model's weights are damaged, or its training diverged")
    if not num_tokens:
        raise UsageError("the text is too short to evaluate: it has no token but the one that begins a document")
    evaluated_bytes = num_bytes * (float(moments[4]) / (len(tokens) - 1))
    return PerplexityResult(
        loss=nats / num_tokens,
        perplexity=math.exp(min(nats / num_tokens, 700.0)),  # exp overflows beyond
        bits_per_byte=nats / math.log(2) / evaluated_bytes,
        tokens=num_tokens,
        bytes=round(evaluated_bytes),
        by_position=(sums / counts)[counts > 0].numpy().tolist(),
        stride=stride,
        margin=_sampling_margin(moments[:4].numpy(), nats / num_tokens, num_tokens, num_windows),
    )


def _sampling_margin(moments: np.ndarray, loss: float, num_tokens: int, population: int) -> float:
    """Half the width of the 95 % interval of the loss of all windows, from a simple random sample of them.

    The ratio estimator with the finite population correction, and Student's t (Cochran 1977, section 6.3).
    """
    n, nats_squared, nats_tokens, tokens_squared = map(float, moments)
    if n >= population:
        return 0.0
    if n < 2:
        return math.inf
    residual = max(0.0, nats_squared - 2 * loss * nats_tokens + loss**2 * tokens_squared) / (n - 1)
    return t_quantile(round(n) - 1) * math.sqrt((1 - n / population) * residual * n) / num_tokens


@dataclass(frozen=True)
class ContextUsage:
    """Mean loss at each position of the window.

    Attributes:
        original: On the text, [T].
        shuffled: With the tokens of each window shuffled, [T].
    """

    original: list[float]
    shuffled: list[float]


def measure_context_usage(model: GPT, tokens: TokenSource, *, max_windows: int = 64, seed: int = 0) -> ContextUsage:
    """Measure whether a model uses its context.

    If it does, the loss falls with the position, and it falls more than on shuffled tokens, whose context tells only which
    tokens are frequent.

    Args:
        model: The model.
        tokens: The text.
        max_windows: Number of windows of context_length + 1 tokens, evenly spaced and always the same ones.
        seed: Seed of the shuffling.

    Raises:
        UsageError: The text is shorter than one window, or has a token outside the model's vocabulary.
    """
    context_length = model.config.context_length
    num_windows = (len(tokens) - 1) // context_length
    if num_windows < 1:
        raise UsageError(f"the text is too short: {len(tokens)} tokens, and a window has {context_length + 1}")
    original, shuffled = torch.zeros(2, context_length, dtype=torch.float64)
    windows, generator = _evenly_spaced(num_windows, max_windows), np.random.default_rng(seed)
    with evaluation_mode(model):
        for batch in _batch_windows(windows, max(1, BATCH_TOKENS // context_length), singletons=()):
            rows = _read_windows(tokens, batch, context_length, context_length)
            original += compute_token_nll(model, rows).sum(0)
            shuffled += compute_token_nll(model, generator.permuted(rows, axis=1)).sum(0)
    original, shuffled = ((nll / len(windows)).numpy().tolist() for nll in (original, shuffled))
    return ContextUsage(original, shuffled)


def compute_token_nll(model: GPT, windows: np.ndarray) -> Tensor:
    """−log P(x_t | x_<t; θ) of every token but the first, in nats.

    Args:
        model: The model.
        windows: Token ids, [B, T + 1].

    Returns:
        [B, T] in float64 on the CPU.

    Raises:
        UsageError: A token is outside the model's vocabulary.
    """
    if windows.max() >= model.config.vocab_size:
        raise UsageError(
            f"token {windows.max()} is outside the model's vocabulary of {model.config.vocab_size}: "
            "the text was prepared with another tokenizer"
        )
    ids = torch.as_tensor(windows.astype(np.int64)).to(model.unembedding.device)
    hidden = model(ids[:, :-1], kernels=model.supports_kernels())  # [B, T, D]
    nll = token_nll(hidden.flatten(0, 1), model.unembedding, ids[:, 1:].flatten(), MAX_LOGITS)
    return nll.cpu().double().view(ids.shape[0], -1)


@contextlib.contextmanager
def evaluation_mode(model: GPT, inference_mode: bool = True) -> Generator[None]:
    """The model in evaluation mode and without gradients, and afterwards as it was.

    Args:
        model: The model.
        inference_mode: Use `torch.inference_mode`. With False, `torch.no_grad`: tensors that are made here may be used in
            training later, as the buffers that FSDP gathers weights in.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode() if inference_mode else torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _evenly_spaced(count: int, limit: int | None) -> list[int]:
    """All of `count` windows, or the center of each of `limit` equal parts."""
    limit = count if limit is None else min(count, max(1, limit))
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def _batch_windows(windows: Sequence[int], batch_size: int, singletons: Collection[int]) -> Iterator[Sequence[int]]:
    """Batches of windows; those in `singletons` each have a batch of their own."""
    for is_singleton, group in itertools.groupby(windows, lambda window: window in singletons):
        members, size = list(group), 1 if is_singleton else batch_size
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _read_windows(tokens: TokenSource, indices: Sequence[int], context_length: int, stride: int) -> np.ndarray:
    """Token ids of windows, [B, T + 1]."""
    starts = (index * stride for index in indices)
    return np.stack([tokens.read(start, min(context_length + 1, len(tokens) - start)) for start in starts])
