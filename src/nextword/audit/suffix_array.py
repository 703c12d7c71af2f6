"""Suffix array on disk: sorted in bounded memory, searched for many positions of a query at once.

The array holds the start of every suffix of a text (Manber and Myers 1993, section 2), ordered by its first `SORT_DEPTH` bytes;
suffixes that agree in all of them keep the order of the text. Bytes are compared eight at a time, as big-endian words.
Shapes: N suffixes, m query positions, C candidates (text positions).
"""

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nextword.common.fs import map_disk_errors

SORT_DEPTH = 64  # bytes by which suffixes are ordered
PADDING = SORT_DEPTH + 1024  # bytes after a text, so that no comparison reads beyond its end
MAX_SUFFIXES_IN_MEMORY = 2**19  # suffixes sorted at once, at about 100 bytes each
COPY_CHUNK = 2**18  # suffixes read at once where they are only copied
PIVOT_SAMPLES, PIVOT_SAMPLE_SIZE = 128, 128  # stretches of suffixes from which pivots are chosen, and suffixes in each
SPARSE_INDEX_STRIDE = 64  # the sparse index holds the first eight bytes of every 64th suffix
COMPARE_BLOCK_BYTES = 64
MIN_PERIODIC_CANDIDATES = 256  # candidates from which on a periodic query is handled by runs

DOCUMENT_END, QUERY_END = 0xFF, 0xFE  # bytes that valid UTF-8 never contains

ProgressCallback = Callable[[int, int], None]


class ByteSequence:
    """Bytes, also readable as an eight-byte word at every position."""

    def __init__(self, buffer: bytes | mmap.mmap):
        self.bytes = np.frombuffer(buffer, np.uint8)
        self._words = np.ndarray(len(buffer) - 7, ">u8", buffer=buffer, strides=(1,))

    def words_at(self, positions: np.ndarray) -> np.ndarray:
        """The eight bytes at each position as a number that sorts as they do."""
        return self._words[positions].astype(np.uint64)


class MappedText(ByteSequence):
    """A file of text followed by `PADDING` bytes of `DOCUMENT_END`, mapped into memory."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        super().__init__(self.map)

    def __len__(self) -> int:
        return len(self.bytes) - PADDING

    def release_pages(self) -> None:
        """Return the pages read so far to the system."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


class Query(ByteSequence):
    """A text to look up, in `data`. Bytes that are reserved as end markers are replaced by 0xFD, which matches nothing."""

    def __init__(self, data: bytes):
        self.data = data.replace(b"\xff", b"\xfd").replace(b"\xfe", b"\xfd")
        super().__init__(self.data + bytes([QUERY_END]) * PADDING)


# ---------------------------------------------------------------- sorting


class _PositionFile:
    """Text positions in a file, addressed by rank."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]):
        self._file, self._dtype = file, dtype

    def read(self, start: int, count: int) -> np.ndarray:
        self._file.seek(start * self._dtype.itemsize)
        return np.frombuffer(self._file.read(count * self._dtype.itemsize), self._dtype).astype(np.int64)

    def write(self, start: int, positions: np.ndarray) -> None:
        self._file.seek(start * self._dtype.itemsize)
        self._file.write(positions.astype(self._dtype).tobytes())


@dataclass
class _Region:
    """Ranks start … start + size − 1, whose suffixes agree in their first `depth` bytes, and the file that holds them."""

    start: int
    size: int
    depth: int
    file: _PositionFile

    def chunks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        end = self.start + self.size
        for start in range(self.start, end, size):
            yield start, self.file.read(start, min(size, end - start))


def sort_suffixes(text: MappedText, path: Path, count: int, dtype: np.dtype[Any], progress: ProgressCallback) -> None:
    """Sort a file of `count` positions by the suffixes that start there, in place.

    A region too large for memory is partitioned by the words of sampled pivots (multikey quicksort, Bentley and Sedgewick
    1997); its positions alternate between the file and a scratch file beside it.
    """
    scratch_path = path.with_name(f"{path.name}.scratch")
    with map_disk_errors(path), path.open("r+b") as main_file, scratch_path.open("w+b") as scratch_file:
        main, scratch = _PositionFile(main_file, dtype), _PositionFile(scratch_file, dtype)
        regions, finished = [_Region(0, count, 0, main)], 0
        while regions:
            region = regions.pop()
            if region.size > MAX_SUFFIXES_IN_MEMORY and region.depth < SORT_DEPTH:
                regions += _partition_region(text, region, scratch if region.file is main else main)
                continue
            for start, positions in region.chunks(MAX_SUFFIXES_IN_MEMORY):  # several chunks only if all suffixes agree
                main.write(start, _sort_positions(text, positions, region.depth))
            text.release_pages()
            finished += region.size
            progress(finished, count)
    scratch_path.unlink()


def write_sparse_index(text: MappedText, path: Path, out: Path, dtype: np.dtype[Any]) -> None:
    """Write the first eight bytes of every `SPARSE_INDEX_STRIDE`-th suffix of a sorted file."""
    with map_disk_errors(out), path.open("rb") as file, out.open("wb") as sparse:
        while data := file.read(COPY_CHUNK * SPARSE_INDEX_STRIDE * dtype.itemsize // 16):
            positions = np.frombuffer(data, dtype)[::SPARSE_INDEX_STRIDE].astype(np.int64)
            sparse.write(text.words_at(positions).astype("<u8").tobytes())
        text.release_pages()


def _partition_region(text: MappedText, region: _Region, target: _PositionFile) -> list[_Region]:
    """Split a region by its words at its depth into suffixes between two pivots and suffixes equal to one, each in the order of
    the text."""
    count = min(PIVOT_SAMPLE_SIZE, region.size)
    starts = np.linspace(region.start, region.start + region.size - count, PIVOT_SAMPLES).astype(np.int64).tolist()
    sample = np.sort(np.concatenate([text.words_at(region.file.read(at, count) + region.depth) for at in starts]))
    num_parts = min(256, 2 * -(-region.size // MAX_SUFFIXES_IN_MEMORY))
    pivots = np.unique(sample[np.arange(1, num_parts) * len(sample) // num_parts])

    def bucketed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and their buckets: 2 i for words below pivot i, 2 i + 1 for words equal to it."""
        for _, positions in region.chunks(COPY_CHUNK):
            words = text.words_at(positions + region.depth)
            pivot = np.searchsorted(pivots, words)
            is_equal = pivots[np.minimum(pivot, len(pivots) - 1)] == words
            yield positions, (2 * pivot + is_equal).astype(np.uint16)

    num_buckets = 2 * len(pivots) + 1
    sizes = np.zeros(num_buckets, np.int64)
    for _, buckets in bucketed():
        sizes += np.bincount(buckets, minlength=num_buckets)
    starts = region.start + np.cumsum(sizes) - sizes
    cursors = starts.copy()
    for positions, buckets in bucketed():
        counts = np.bincount(buckets, minlength=num_buckets)
        grouped = np.split(positions[np.argsort(buckets, kind="stable")], np.cumsum(counts)[:-1])
        for bucket in np.flatnonzero(counts).tolist():
            target.write(int(cursors[bucket]), grouped[bucket])
        cursors += counts
    return [
        _Region(int(starts[bucket]), int(sizes[bucket]), region.depth + 8 * (bucket % 2), target)
        for bucket in np.flatnonzero(sizes).tolist()
    ]


def _sort_positions(text: MappedText, positions: np.ndarray, depth: int) -> np.ndarray:
    """Sort positions [C] by their suffixes, which agree in their first `depth` bytes."""
    tied = np.ones(max(0, len(positions) - 1), dtype=bool)  # each suffix with the one before it
    while depth < SORT_DEPTH and tied.any():
        pending = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
        group = np.cumsum(~np.append(False, tied)[pending])
        words = text.words_at(positions[pending] + depth)
        order = np.lexsort((words, group)) if group[-1] > 1 else np.argsort(words, kind="stable")
        positions[pending], words = positions[pending][order], words[order]
        # Groups are contiguous, so neighbors in `pending` that are tied now were tied before.
        tied[pending[1:] - 1] &= words[1:] == words[:-1]
        depth += 8
    return positions


# ---------------------------------------------------------------- searching


class SuffixArray:
    """Sorted positions [N] of a text's suffixes, as `sort_suffixes` leaves them, with their sparse index."""

    def __init__(self, text: MappedText, positions: np.ndarray, sparse_index: np.ndarray):
        self.text, self.positions, self.sparse_index = text, positions, sparse_index

    def __len__(self) -> int:
        return len(self.positions)

    def words_at(self, ranks: np.ndarray, depth: int) -> np.ndarray:
        """The words at a depth of the suffixes with these ranks."""
        return self.text.words_at(self.positions[ranks].astype(np.int64) + depth)

    def narrow_ranges(
        self, low: np.ndarray, high: np.ndarray, depth: int, first: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each of m rank ranges low … high − 1, whose words at a depth are sorted, the part with words first … last
        (below 2⁶⁴ − 1)."""
        targets = np.concatenate([first, last + np.uint64(1)])
        low, high = np.tile(low, 2), np.tile(high, 2)
        if depth == 0 and len(self.sparse_index):  # every range is the whole array
            block = np.searchsorted(self.sparse_index, targets)
            low = np.maximum(low, (block - 1) * SPARSE_INDEX_STRIDE)
            high = np.minimum(high, block * SPARSE_INDEX_STRIDE + 1)
        pending = np.flatnonzero(low < high)
        while len(pending):  # binary search
            middle = (low[pending] + high[pending]) // 2
            below = self.words_at(middle, depth) < targets[pending]
            low[pending[below]] = middle[below] + 1
            high[pending[~below]] = middle[~below]
            pending = pending[low[pending] < high[pending]]
        lower, upper = np.split(low, 2)
        return lower, upper

    def prefix_range(self, passage: bytes) -> tuple[int, int]:
        """The ranks of the suffixes that start with a passage, compared to `SORT_DEPTH` bytes."""
        low, high = np.array([0]), np.array([len(self)])
        for depth in range(0, min(len(passage), SORT_DEPTH), 8):
            part = passage[depth : depth + 8]
            first, last = (np.array([int.from_bytes(part.ljust(8, fill))], np.uint64) for fill in (b"\0", b"\xff"))
            low, high = self.narrow_ranges(low, high, depth, first, last)
        return int(low[0]), int(high[0])


def longest_matches(array: SuffixArray, query: Query, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The longest match from each of m rising positions of a query.

    Returns:
        Lengths [m] in bytes, 0 without a match, and text positions [m].
    """
    lengths, positions = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    pending, low, high = np.arange(len(starts)), np.zeros(len(starts), np.int64), np.full(len(starts), len(array))
    for depth in range(0, SORT_DEPTH, 8):
        words = query.words_at(starts[pending] + depth)
        first, last = array.narrow_ranges(low, high, depth, words, words)
        ended = first == last
        if ended.any():
            shared, nearest = _best_neighbor(array, first[ended], low[ended], high[ended], depth, words[ended])
            lengths[pending[ended]], positions[pending[ended]] = depth + shared, nearest
        pending, low, high = (values[~ended] for values in (pending, first, last))
    lengths[pending], positions[pending] = _extend_matches(array, query, starts[pending], low, high)
    return lengths, positions


def _best_neighbor(
    array: SuffixArray, ranks: np.ndarray, low: np.ndarray, high: np.ndarray, depth: int, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For words that would be inserted at ranks of a sorted range, the number of leading bytes shared with the better of
    the two neighbors, and its text position."""
    best, positions = np.full(len(ranks), -1), np.zeros(len(ranks), np.int64)
    for neighbor, exists in ((ranks - 1, ranks > low), (ranks, ranks < high)):
        neighbor = np.where(exists, neighbor, low)  # `low` is always in the range
        shared = _equal_leading_bytes(array.words_at(neighbor, depth) ^ words)
        better = shared > best
        best = np.where(better, shared, best)
        positions = np.where(better, array.positions[neighbor].astype(np.int64), positions)
    return best, positions


def _extend_matches(
    array: SuffixArray, query: Query, starts: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and positions of matches that agree in `SORT_DEPTH` bytes with the suffixes of rank low … high − 1."""
    lengths, positions = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)

    @cache
    def longest(i: int) -> tuple[int, int]:
        """The end in the query and the text position of the longest match."""
        candidates = array.positions[low[i] : high[i]].astype(np.int64)
        return _longest_extension(array.text, query, int(starts[i]), candidates)

    i = 0
    while i < len(starts):
        end, position = longest(i)
        # A part of a match is a match: ends never fall, and all up to the first later end are parts of this one.
        following = i + 1
        if end == len(query.data):
            following = len(starts)
        elif following < len(starts) and longest(following)[0] == end:
            following = bisect_right(range(len(starts)), end, lo=following + 1, key=lambda k: longest(k)[0])
        lengths[i:following] = end - starts[i:following]
        positions[i:following] = position + starts[i:following] - starts[i]
        i = following
    return lengths, positions


def _longest_extension(text: MappedText, query: Query, start: int, candidates: np.ndarray) -> tuple[int, int]:
    """The end in the query of the longest match from `start` on, and the first candidate [C] that has it; all candidates agree
    in `SORT_DEPTH` bytes."""
    if len(candidates) > MIN_PERIODIC_CANDIDATES:
        candidates = _reduce_periodic(text, query, start, candidates)
    best_end, best = -1, 0
    for first in range(0, len(candidates), COPY_CHUNK // 8):
        chunk = candidates[first : first + COPY_CHUNK // 8]
        ends = start + SORT_DEPTH + common_prefix_bytes(text, query, chunk + SORT_DEPTH, start + SORT_DEPTH)
        if int(ends.max()) > best_end:
            best_end, best = int(ends.max()), int(chunk[ends.argmax()])
        if best_end == len(query.data):
            break
    return best_end, best


def _reduce_periodic(text: MappedText, query: Query, start: int, candidates: np.ndarray) -> np.ndarray:
    """Drop candidates in periodic runs of text (spaces, dashes) that cannot give the longest match.

    A match ends where the run ends, in the text or in the query, unless both have the same number of bytes left. So one
    candidate a run can continue beyond it, and of all others the start of the longest run is the best.
    """
    data = query.data[start : start + SORT_DEPTH]
    period = next((p for p in range(1, SORT_DEPTH) if data[p:] == data[:-p]), None)
    if period is None:
        return candidates
    breaks = np.flatnonzero(np.diff(candidates) != period)
    first, last = candidates[np.append(0, breaks + 1)], candidates[np.append(breaks, len(candidates) - 1)]
    run_ends = last + period + common_prefix_bytes(text, text, last, last + period)
    query_left = period + int(common_prefix_bytes(query, query, np.array([start]), start + period)[0])
    equal = run_ends - query_left
    equal = equal[(first <= equal) & (equal <= last) & ((last - equal) % period == 0)]
    return np.append(first[(run_ends - first).argmax()], equal)


def common_prefix_bytes(
    text: ByteSequence, other: ByteSequence, positions: np.ndarray, starts: np.ndarray | int
) -> np.ndarray:
    """The number of bytes [C] that a text from positions [C] on shares with another from `starts` on (one, or one each)."""
    starts = np.broadcast_to(starts, positions.shape)
    shared, pending = np.zeros(len(positions), np.int64), np.arange(len(positions))
    depth, block = 0, 8  # most comparisons end in the first word
    while len(pending):
        offsets = depth + np.arange(0, block, 8)
        words, others = positions[pending, None] + offsets, starts[pending, None] + offsets
        xor = text.words_at(words) ^ other.words_at(others)  # [C, block / 8]
        ended = (xor != 0).any(1)
        first = (xor[ended] != 0).argmax(1)
        shared[pending[ended]] = depth + 8 * first + _equal_leading_bytes(xor[ended, first])
        pending, depth, block = pending[~ended], depth + block, COMPARE_BLOCK_BYTES
    return shared


def _equal_leading_bytes(xor: np.ndarray) -> np.ndarray:
    """The number of leading bytes in which two different words agree, from their exclusive or [C]."""
    return (xor.astype(">u8").view(np.uint8).reshape(-1, 8) != 0).argmax(1)
