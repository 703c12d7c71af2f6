"""From one long row of tokens to the batch of a step: a pure function of (seed, step).

Nothing is drawn and nothing is remembered, so that a resume, another number of machines, or a question about the order of the
data needs no state at all.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

IGNORE = -100  # a target that is not counted; the value that torch's cross entropy skips


class TokenSource(Protocol):
    """A long row of token ids, read by place."""

    def __len__(self) -> int: ...
    def read(self, start: int, count: int) -> np.ndarray: ...


class TokenRow:
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

    ends: np.ndarray
    example: np.ndarray
    gold: np.ndarray
    weight: np.ndarray
    reference: np.ndarray | None = None

    def of_rows(self, rows: slice) -> "Labels":
        """Those of whole examples, their rows cut out of the batch's."""
        first, last = self.example[rows][0], self.example[rows][-1]
        examples = slice(first, last + 1)
        reference = None if self.reference is None else self.reference[rows]
        return Labels(
            self.ends[rows], self.example[rows] - first, self.gold[examples], self.weight[examples], reference
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
    rows: list[int]
    counts: dict[str, float]
    n_tokens: int
    segments: np.ndarray | None = None
    labels: Labels | None = None

    def split(self, size: int) -> "list[Batch]":
        """The same rows in micro-batches of at most `size` rows; the rows of one example are never parted."""
        borders, end = [0], len(self.rows)
        starts = list(range(end)) if self.labels is None else np.flatnonzero(np.diff(self.labels.example, prepend=-1))
        for start, after in zip(starts, [*starts[1:], end], strict=True):
            if after - borders[-1] > size and start > borders[-1]:
                borders.append(int(start))
        return [self._part(slice(i, j)) for i, j in zip(borders, [*borders[1:], end], strict=True)]

    def _part(self, rows: slice) -> "Batch":
        return replace(
            self,
            tokens=self.tokens[rows],
            targets=self.targets[rows],
            rows=self.rows[rows],
            segments=None if self.segments is None else self.segments[rows],
            labels=None if self.labels is None else self.labels.of_rows(rows),
        )


def seed_for(seed: int, *what: int) -> int:
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
    keys = [np.uint64(seed_for(key, r)) for r in range(4)]
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


def places(segments: np.ndarray) -> np.ndarray:
    """The place of each token in its own text: segments [B, T] → [B, T], counted from 0 where a segment begins."""
    place = np.arange(segments.shape[1])
    begins = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)


class TokenDataset:
    """Windows of `context_length` tokens, shuffled anew each epoch.

    The tokens are taken as a ring, cut into windows from another place in every epoch; each token is the target of exactly
    one position an epoch, and the last window may be short.
    """

    def __init__(self, tokens: TokenSource, context_length: int, rows_per_batch: int, seed: int):
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens are too few to predict one from another")
        self.tokens = tokens
        self.context_length = context_length
        self.rows_per_batch = rows_per_batch
        self.seed = seed
        self.windows = -(-len(tokens) // context_length)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.context_length

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of step `step` (from 0) that process `rank` of `world` works on: an equal part, in order.

        Raises:
            ValueError: the rows of a step are no multiple of `world`.
        """
        share, rest = divmod(self.rows_per_batch, world)
        if rest:
            raise ValueError(f"{self.rows_per_batch} rows cannot be shared equally by {world} processes")
        every = np.arange(step * self.rows_per_batch, (step + 1) * self.rows_per_batch)
        count = int(sum(self.length_of(window) for window in self.windows_of(every)))
        rows = every[rank * share : (rank + 1) * share]
        tokens = np.zeros((share, self.context_length), dtype=np.int64)
        targets = np.full((share, self.context_length), IGNORE, dtype=np.int64)
        for i, (row, window) in enumerate(zip(rows.tolist(), self.windows_of(rows).tolist(), strict=True)):
            ids = self.ring(self.start_of(row, window), self.length_of(window) + 1)
            tokens[i, : len(ids) - 1] = ids[:-1]
            targets[i, : len(ids) - 1] = ids[1:]
        return Batch(tokens, targets, rows.tolist(), {"next_word": count}, count)

    def spans(self, step: int) -> list[tuple[int, int]]:
        """Which tokens step `step` reads, the last targets included: the first and the number of each window, in two where it
        goes round the ring."""
        every, found = np.arange(step * self.rows_per_batch, (step + 1) * self.rows_per_batch), []
        for row, window in zip(every.tolist(), self.windows_of(every).tolist(), strict=True):
            start, count = self.start_of(row, window) % len(self.tokens), self.length_of(window) + 1
            inside = min(count, len(self.tokens) - start)
            found += [(start, inside)] if inside == count else [(start, inside), (0, count - inside)]
        return found

    def start_of(self, row: int, window: int) -> int:
        """Where on the ring a window begins, which every epoch cuts from another place."""
        return seed_for(self.seed, 0, row // self.windows) % len(self.tokens) + window * self.context_length

    def windows_of(self, rows: np.ndarray) -> np.ndarray:
        """Which window each row of the run is, the rows given in order: each epoch in an order of its own."""
        parts = []
        for epoch in range(rows[0] // self.windows, rows[-1] // self.windows + 1):
            here = rows[rows // self.windows == epoch]
            parts.append(permute(here % self.windows, self.windows, seed_for(self.seed, 1, epoch)))
        return np.concatenate(parts)

    def length_of(self, window: int) -> int:
        return min(self.context_length, len(self.tokens) - window * self.context_length)

    def ring(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, where the first token follows the last."""
        start %= len(self.tokens)
        parts = []
        while count > 0:
            part = self.tokens.read(start, min(count, len(self.tokens) - start))
            parts.append(part)
            count -= len(part)
            start = 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
