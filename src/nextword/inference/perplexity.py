"""Perplexity of a model on a text: loss, bits per byte, and the loss at each position of the window.

Shapes: B windows of a batch, T predicted positions (at most the context length), V vocabulary.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError
from nextword.common.statistics import ScoreWithCI, ratio_of_sums, t_quantile
from nextword.data.dataset import TokenSource
from nextword.data.tokenizer import Tokenizer
from nextword.model.cross_entropy import token_nll
from nextword.model.gpt import GPT

BATCH_TOKENS = 8192  # tokens of a forward pass
MAX_LOGITS = 2**24  # logits held at once: 64 MB of float32
MIN_DOCUMENTS = (
    5  # of an interval or a significance test: the passages of one document depend on each other over any distance
)
READ_TOKENS = 2**20  # tokens searched for the ends of documents at once


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
        by_document: The bits per byte with their interval over documents; see `DocumentLosses`.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    by_position: list[float]
    stride: int
    margin: float = 0.0
    by_document: ScoreWithCI | None = None

    @property
    def interval(self) -> dict[str, Any] | None:
        """The interval of the bits per byte as JSON stores it: "low", "high", "n" (documents) and "basis"."""
        score = self.by_document
        return score and {"low": score.low, "high": score.high, "n": score.n, "basis": describe_interval(score)}


class DocumentLosses:
    """The loss of each document of a text, filled by `evaluate_perplexity`.

    Documents are what varies independently in a text. Inside a book, the loss of one part tells little of the next: an interval
    over blocks of 10 kB contains the loss of the whole book in 0.78 of the cases instead of 0.95.

    Args:
        tokens: The text; each document ends with the end-of-text token.
        tokenizer: Its tokenizer.

    Attributes:
        sums: Nats and bytes of the evaluated tokens of each document, [N, 2].
    """

    def __init__(self, tokens: TokenSource, tokenizer: Tokenizer):
        starts = range(0, len(tokens), READ_TOKENS)
        parts = (tokens.read(start, min(READ_TOKENS, len(tokens) - start)) == tokenizer.eos_id for start in starts)
        ends = [start + np.flatnonzero(is_end) + 1 for start, is_end in zip(starts, parts, strict=True)]
        self.ends = np.union1d(np.concatenate(ends), len(tokens))  # the index after the last token of each document
        self.token_bytes = np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)])
        self.sums = np.zeros((len(self.ends), 2))

    def add(self, positions: np.ndarray, ids: np.ndarray, nats: np.ndarray) -> None:
        """Add the loss of tokens [n] by their positions in the text and their ids."""
        documents = np.searchsorted(self.ends, positions, side="right")
        np.add.at(self.sums[:, 0], documents, nats)
        np.add.at(self.sums[:, 1], documents, self.token_bytes[ids])

    def bits_per_byte(self, other: "DocumentLosses | None" = None) -> ScoreWithCI:
        """Bits per byte with their interval over documents, or their difference from those of another model.

        Args:
            other: The losses of another model on the same documents; subtracted.

        Returns:
            The ratio of all documents. n is their number. There is no interval if they are too few.
        """
        bits = self.sums[:, 0] / math.log(2)
        if other is not None:
            bits = bits - other.sums[:, 0] / math.log(2) * (self.sums[:, 1].sum() / other.sums[:, 1].sum())
        is_evaluated = self.sums.any(1)
        score = ratio_of_sums(bits[is_evaluated], self.sums[is_evaluated, 1])
        return score if len(bits[is_evaluated]) >= MIN_DOCUMENTS else replace(score, low=None, high=None)


def describe_interval(score: ScoreWithCI) -> str:
    """What the interval of a score over documents speaks of, how many they are, and its method; or why there is none."""
    n = score.n or 0
    if score.low is not None:
        return f"for texts like these {n:,} documents; jackknife over documents, Student's t"
    reason = "one document is too few" if n == 1 else f"{n:,} documents are too few"
    reason = reason if n < MIN_DOCUMENTS else f"one of the {n:,} documents is most of the text"
    return f"of this text only, without an interval: {reason} (at least {MIN_DOCUMENTS} of similar size)"


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
    documents: DocumentLosses | None = None,
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
        documents: Filled with the loss of each document; adds their interval to the result.
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
            if documents is not None:
                positions = np.array(batch)[:, None] * stride + np.arange(new.start, new.stop) + 1
                documents.add(positions.ravel(), rows[:, 1:][:, new].ravel(), nll[:, new].numpy().ravel())
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
        if documents is not None:
            documents.sums = dist_context.all_reduce_sum(torch.as_tensor(documents.sums)).numpy()
    num_tokens, nats = int(counts.sum()), float(sums.sum())
    if not math.isfinite(nats):
        raise NextwordError("the loss is not finite: the model's weights are damaged, or its training diverged")
    if not num_tokens:
        raise UsageError("the text is too short to evaluate: it has no token but the one that begins a document")
    evaluated_bytes = num_bytes * (float(moments[4]) / (len(tokens) - 1))
    if documents is not None:  # exact, but for tokenizers that change the text
        documents.sums[:, 1] *= evaluated_bytes / max(1.0, documents.sums[:, 1].sum())
    return PerplexityResult(
        loss=nats / num_tokens,
        perplexity=math.exp(min(nats / num_tokens, 700.0)),  # exp overflows beyond
        bits_per_byte=nats / math.log(2) / evaluated_bytes,
        tokens=num_tokens,
        bytes=round(evaluated_bytes),
        by_position=(sums / counts)[counts > 0].numpy().tolist(),
        stride=stride,
        margin=_sampling_margin(moments[:4].numpy(), nats / num_tokens, num_tokens, num_windows),
        by_document=documents and documents.bits_per_byte(),
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
