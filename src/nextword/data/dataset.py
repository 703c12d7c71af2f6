"""From a sequence of tokens to the batch of a step, as a pure function of (seed, step).

Nothing is drawn and no state is kept, so that a resume, a changed world size, or a question about the order of the data
needs none.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

IGNORE_INDEX = -100  # a target that has no loss; the default of torch's cross entropy

TokenArray = np.ndarray[Any, np.dtype[Any]]


class TokenSource(Protocol):
    """A sequence of token ids with random access."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens start … start + count − 1 as int64 [count]."""
        ...


class InMemoryTokens:
    """Token ids in an array, read like those of a corpus."""

    def __init__(self, tokens: TokenArray):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens start … start + count − 1."""
        return self.tokens[start : start + count]


@dataclass(frozen=True)
class Labels:
    """The labels of a batch of R rows and E examples. The rows of an example are adjacent.

    Attributes:
        pool_positions: [R], the position in the row whose hidden state a classification head reads.
        example_ids: [R], the example of each row, counted within the batch.
        targets: [E] or [E, num_labels].
        weights: [E], the weight of each example in the loss.
        reference_logprobs: [R], log-probabilities of the rows under the reference model.
    """

    pool_positions: TokenArray
    example_ids: TokenArray
    targets: TokenArray
    weights: TokenArray
    reference_logprobs: TokenArray | None = None

    def slice_rows(self, rows: slice) -> "Labels":
        """The labels of some rows, which hold whole examples."""
        first, last = self.example_ids[rows][0], self.example_ids[rows][-1]
        examples = slice(first, last + 1)
        return Labels(
            self.pool_positions[rows],
            self.example_ids[rows] - first,
            self.targets[examples],
            self.weights[examples],
            None if self.reference_logprobs is None else self.reference_logprobs[rows],
        )


@dataclass(frozen=True)
class Batch:
    """The rows of one step, or of one rank's share of it, in order.

    Attributes:
        tokens: int64 [B, T].
        targets: int64 [B, T], the token after each, or `IGNORE_INDEX`.
        row_ids: a number for each row, unique in the run, from which dropout is seeded.
        loss_denominators: the divisor of each term of the loss, over the whole batch of the step; the same in each
            micro-batch.
        n_tokens: the number of tokens that the step learns from.
        segment_ids: [B, T], the text that each token belongs to, where several share a row.
        labels: the labels of the examples, if they have any.
    """

    tokens: TokenArray
    targets: TokenArray
    row_ids: list[int]
    loss_denominators: dict[str, float]
    n_tokens: int
    segment_ids: TokenArray | None = None
    labels: Labels | None = None

    def split_micro_batches(self, max_rows: int) -> "list[Batch]":
        """The same rows in micro-batches of at most `max_rows` rows; an example is never split."""
        num_rows = len(self.row_ids)
        starts = list(range(num_rows))
        if self.labels is not None:
            starts = np.flatnonzero(np.diff(self.labels.example_ids, prepend=-1)).tolist()
        borders = [0]
        for start, end in zip(starts, [*starts[1:], num_rows], strict=True):
            if end - borders[-1] > max_rows and start > borders[-1]:
                borders.append(start)
        return [self._slice_rows(slice(i, j)) for i, j in zip(borders, [*borders[1:], num_rows], strict=True)]

    def _slice_rows(self, rows: slice) -> "Batch":
        return replace(
            self,
            tokens=self.tokens[rows],
            targets=self.targets[rows],
            row_ids=self.row_ids[rows],
            segment_ids=None if self.segment_ids is None else self.segment_ids[rows],
            labels=None if self.labels is None else self.labels.slice_rows(rows),
        )


def derive_seed(seed: int, *purpose: int) -> int:
    """A 63-bit seed from the run's seed and the numbers that name its purpose."""
    digest = hashlib.blake2b(",".join(map(str, (seed, *purpose))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permute(index: TokenArray, size: int, key: int) -> TokenArray:
    """The images of some indices under a pseudo-random permutation of 0 … size − 1.

    A Feistel network (Luby and Rackoff 1988) on the next even power of two, applied until the result is in range (cycle
    walking, Black and Rogaway 2002): a permutation of any size without a table.

    Args:
        index: [N], each in 0 … size − 1.
        size: the size of the permutation.
        key: selects the permutation.

    Returns:
        int64 [N].
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(derive_seed(key, r)) for r in range(4)]
    result = index.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        value = result[outside]
        left, right = value >> np.uint64(half), value & mask
        for k in keys:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(17)) & mask)
        result[outside] = (left << np.uint64(half)) | right
        outside = result >= size
    return result.astype(np.int64)


def segment_positions(segment_ids: TokenArray) -> TokenArray:
    """The position of each token in its own text, from 0: segment_ids [B, T] → [B, T]."""
    positions: TokenArray = np.arange(int(segment_ids.shape[1]))
    is_segment_start = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return positions - np.maximum.accumulate(np.where(is_segment_start, positions, 0), axis=1)


class TokenDataset:
    """Windows of `context_length` tokens, shuffled in every epoch.

    The tokens are treated as a ring, which every epoch cuts into windows from another position. In an epoch each token
    is the target of exactly one position. The last window may be short.

    Args:
        tokens: the token sequence, at least two tokens.
        context_length: the number of tokens of a window.
        batch_size: rows of a step, over all ranks.
        seed: the seed of the order.

    Raises:
        ValueError: fewer than two tokens.
    """

    def __init__(self, tokens: TokenSource, context_length: int, batch_size: int, seed: int):
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens are too few to predict one from another")
        self.tokens = tokens
        self.context_length = self.max_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.num_windows = -(-len(tokens) // context_length)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of a step that one rank works on: an equal share, in order.

        Args:
            step: the step, from 0.
            rank: the process.
            world_size: the number of processes that share the step.

        Raises:
            ValueError: the batch size is not a multiple of `world_size`.
        """
        local_batch_size, rest = divmod(self.batch_size, world_size)
        if rest:
            raise ValueError(f"{self.batch_size} rows cannot be shared equally by {world_size} processes")
        windows, rows = self._windows(step), range(rank * local_batch_size, (rank + 1) * local_batch_size)
        num_tokens = sum(length for _, length in windows)
        tokens = np.zeros((local_batch_size, self.context_length), dtype=np.int64)
        targets = np.full((local_batch_size, self.context_length), IGNORE_INDEX, dtype=np.int64)
        for i, (start, length) in enumerate(windows[rows.start : rows.stop]):
            ids = np.concatenate([self.tokens.read(*span) for span in self._spans(start, length + 1)])
            tokens[i, :length] = ids[:-1]
            targets[i, :length] = ids[1:]
        row_ids = [step * self.batch_size + row for row in rows]
        return Batch(tokens, targets, row_ids, {"next_word": num_tokens}, num_tokens)

    def token_spans(self, step: int) -> list[tuple[int, int]]:
        """The tokens that a step reads, targets included, as (first token, number of tokens) for each window.

        A window that wraps around the end is two spans.
        """
        return [span for start, length in self._windows(step) for span in self._spans(start, length + 1)]

    def _windows(self, step: int) -> list[tuple[int, int]]:
        """The first token and the length of the window of each row of a step."""
        rows = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, windows = rows // self.num_windows, rows % self.num_windows
        starts = np.empty_like(rows)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            is_in_epoch = epochs == epoch
            order = permute(windows[is_in_epoch], self.num_windows, derive_seed(self.seed, 1, epoch))
            windows[is_in_epoch] = order
            starts[is_in_epoch] = derive_seed(self.seed, 0, epoch) % len(self.tokens) + order * self.context_length
        lengths = np.minimum(self.context_length, len(self.tokens) - windows * self.context_length)
        return list(zip((starts % len(self.tokens)).tolist(), lengths.tolist(), strict=True))

    def _spans(self, start: int, count: int) -> list[tuple[int, int]]:
        """`count` tokens of the ring from `start`, as spans of the sequence, at whose end they continue at its beginning."""
        before_end = min(count, len(self.tokens) - start)
        return [(start, before_end), *([(0, count - before_end)] if count > before_end else [])]
