"""From one long row of tokens to the batch of a step: a pure function of (seed, step).

Nothing is drawn and nothing is remembered, so that a resume, another number of machines, or a question about the order of the
data needs no state at all.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

IGNORE_INDEX = -100  # a target that is not counted; the value that torch's cross entropy skips


class TokenSource(Protocol):
    """A long row of token ids, read by place."""

    def __len__(self) -> int: ...
    def read(self, start: int, count: int) -> np.ndarray: ...


class InMemoryTokens:
    """Tokens in memory, read like those of a corpus."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]


@dataclass(frozen=True)
class Labels:
    """What a batch of labelled examples has beside its tokens. R rows, E examples; an example's rows stand together.

    ends [R], the place in the row that a head reads; example [R], which of the batch's examples a row belongs to; gold
    [E] or [E, n_labels]; weight [E], how much each example counts; reference [R], log-probabilities under a frozen model.
    """

    pool_positions: np.ndarray
    example_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    reference_logprobs: np.ndarray | None = None

    def slice_rows(self, rows: slice) -> "Labels":
        """Those of whole examples, their rows cut out of the batch's."""
        first, last = self.example_ids[rows][0], self.example_ids[rows][-1]
        examples = slice(first, last + 1)
        reference = None if self.reference_logprobs is None else self.reference_logprobs[rows]
        return Labels(
            self.pool_positions[rows],
            self.example_ids[rows] - first,
            self.targets[examples],
            self.weights[examples],
            reference,
        )


@dataclass(frozen=True)
class Batch:
    """The rows of one step (or of one machine's share of it), in order.

    tokens [B, T] int64; targets [B, T] int64, the token after each, `IGNORE` where there is none; rows, a number for each
    row that no other row of the run has, from which dropout is seeded; counts, what each term of the loss is divided by,
    over the whole batch of the step and the same in each micro-batch of it; segments [B, T], where several texts share a
    row, the text that each token belongs to; n_tokens, how many tokens the step learns from.
    """

    tokens: np.ndarray
    targets: np.ndarray
    row_ids: list[int]
    loss_denominators: dict[str, float]
    n_tokens: int
    segment_ids: np.ndarray | None = None
    labels: Labels | None = None

    def split_micro_batches(self, max_rows: int) -> "list[Batch]":
        """The same rows in micro-batches of at most `size` rows; the rows of one example are never parted."""
        borders, end = [0], len(self.row_ids)
        starts = (
            list(range(end)) if self.labels is None else np.flatnonzero(np.diff(self.labels.example_ids, prepend=-1))
        )
        for start, after in zip(starts, [*starts[1:], end], strict=True):
            if after - borders[-1] > max_rows and start > borders[-1]:
                borders.append(int(start))
        return [self._slice_rows(slice(i, j)) for i, j in zip(borders, [*borders[1:], end], strict=True)]

    def _slice_rows(self, rows: slice) -> "Batch":
        return replace(
            self,
            tokens=self.tokens[rows],
            targets=self.targets[rows],
            rows=self.row_ids[rows],
            segments=None if self.segment_ids is None else self.segment_ids[rows],
            labels=None if self.labels is None else self.labels.slice_rows(rows),
        )


def derive_seed(seed: int, *purpose: int) -> int:
    """A seed of 63 bits for one purpose, from the run's seed and the numbers that name the purpose."""
    digest = hashlib.blake2b(",".join(map(str, (seed, *what))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each of `index` (all of them in 0..size-1) goes in a shuffle of 0..size-1 that is named by `key`.

    A Feistel network (Luby and Rackoff 1988) on the next even power of two, walked on until it lands inside (Black and
    Rogaway 2002): a permutation of any size, computed where it is asked, without a table.
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


def segment_positions(segment_ids: np.ndarray) -> np.ndarray:
    """The place of each token in its own text: segments [B, T] → [B, T], counted from 0 where a segment begins."""
    positions = np.arange(segment_ids.shape[1])
    is_segment_start = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return positions - np.maximum.accumulate(np.where(is_segment_start, positions, 0), axis=1)


class TokenDataset:
    """Windows of `context_length` tokens, shuffled anew each epoch.

    The tokens are taken as a ring, cut into windows from another place in every epoch; each token is the target of exactly
    one position an epoch, and the last window may be short.
    """

    def __init__(self, tokens: TokenSource, context_length: int, batch_size: int, seed: int):
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens are too few to predict one from another")
        self.tokens = tokens
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.num_windows = -(-len(tokens) // context_length)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return self.context_length

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of step `step` (from 0) that process `rank` of `world` works on: an equal part, in order.

        Raises:
            ValueError: the rows of a step are no multiple of `world`.
        """
        local_batch_size, rest = divmod(self.batch_size, world_size)
        if rest:
            raise ValueError(f"{self.batch_size} rows cannot be shared equally by {world_size} processes")
        global_rows = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        num_tokens = int(sum(self.window_length(window) for window in self.permuted_windows(global_rows)))
        rows = global_rows[rank * local_batch_size : (rank + 1) * local_batch_size]
        tokens = np.zeros((local_batch_size, self.context_length), dtype=np.int64)
        targets = np.full((local_batch_size, self.context_length), IGNORE_INDEX, dtype=np.int64)
        for i, (row, window) in enumerate(zip(rows.tolist(), self.permuted_windows(rows).tolist(), strict=True)):
            ids = self.read_wrapping(self.window_start(row, window), self.window_length(window) + 1)
            tokens[i, : len(ids) - 1] = ids[:-1]
            targets[i, : len(ids) - 1] = ids[1:]
        return Batch(tokens, targets, rows.tolist(), {"next_word": num_tokens}, num_tokens)

    def token_spans(self, step: int) -> list[tuple[int, int]]:
        """Which tokens step `step` reads, the last targets included: the first and the number of each window, in two where it
        goes round the ring."""
        global_rows, ranges = np.arange(step * self.batch_size, (step + 1) * self.batch_size), []
        for row, window in zip(global_rows.tolist(), self.permuted_windows(global_rows).tolist(), strict=True):
            start, count = self.window_start(row, window) % len(self.tokens), self.window_length(window) + 1
            count_before_wrap = min(count, len(self.tokens) - start)
            ranges += (
                [(start, count_before_wrap)]
                if count_before_wrap == count
                else [(start, count_before_wrap), (0, count - count_before_wrap)]
            )
        return ranges

    def window_start(self, row: int, window: int) -> int:
        """Where on the ring a window begins, which every epoch cuts from another place."""
        return derive_seed(self.seed, 0, row // self.num_windows) % len(self.tokens) + window * self.context_length

    def permuted_windows(self, rows: np.ndarray) -> np.ndarray:
        """Which window each row of the run is, the rows given in order: each epoch in an order of its own."""
        parts = []
        for epoch in range(rows[0] // self.num_windows, rows[-1] // self.num_windows + 1):
            epoch_rows = rows[rows // self.num_windows == epoch]
            parts.append(permute(epoch_rows % self.num_windows, self.num_windows, derive_seed(self.seed, 1, epoch)))
        return np.concatenate(parts)

    def window_length(self, window: int) -> int:
        return min(self.context_length, len(self.tokens) - window * self.context_length)

    def read_wrapping(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, where the first token follows the last."""
        start %= len(self.tokens)
        parts = []
        while count > 0:
            part = self.tokens.read(start, min(count, len(self.tokens) - start))
            parts.append(part)
            count -= len(part)
            start = 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
