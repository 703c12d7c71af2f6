"""Suffix array on disk: sorted in bounded memory, searched for many positions of a query at once.

The array holds the start of every suffix of a text (Manber and Myers 1993, section 2), ordered by its first `SORT_DEPTH` bytes;
suffixes that agree in all of them keep the order of the text. Bytes are compared eight at a time, as big-endian words.
Shapes: N suffixes, m query positions, C candidates (text positions).
"""

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal

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
    """Bytes, also readable as an eight-byte word or a key at every position.

    Attributes:
        bytes: the bytes.
        keys: the `SORT_DEPTH` bytes from each position on, which sort as suffixes do.
    """

    def __init__(self, buffer: bytes | mmap.mmap):
        self.bytes = np.frombuffer(buffer, np.uint8)
        self.keys = np.ndarray(len(buffer) - SORT_DEPTH + 1, f"S{SORT_DEPTH}", buffer=buffer, strides=(1,))
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

    def __init__(self, text: bytes | str):
        data = text.encode("utf-8", "replace") if isinstance(text, str) else text
        self.data = data.replace(b"\xff", b"\xfd").replace(b"\xfe", b"\xfd")
        super().__init__(self.data + bytes([QUERY_END]) * PADDING)


# ---------------------------------------------------------------- sorting


class _PositionFile:
    """Text positions in a file, addressed by rank."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]):
        self._file, self._dtype = file, dtype

    def chunks(self, start: int, count: int, chunk_size: int) -> Iterator[tuple[int, np.ndarray]]:
        """The positions of `count` ranks from `start` on, in chunks with their first rank."""
        for rank in range(start, start + count, chunk_size):
            self._file.seek(rank * self._dtype.itemsize)
            data = self._file.read(min(chunk_size, start + count - rank) * self._dtype.itemsize)
            yield rank, np.frombuffer(data, self._dtype).astype(np.int64)

    def write(self, rank: int, positions: np.ndarray) -> None:
        """Write positions from a rank on."""
        self._file.seek(rank * self._dtype.itemsize)
        self._file.write(positions.astype(self._dtype).tobytes())


def sort_suffixes(text: MappedText, path: Path, count: int, dtype: np.dtype[Any], progress: ProgressCallback) -> None:
    """Sort a file of `count` positions by the suffixes that start there, in place.

    A region too large for memory is partitioned by the words of sampled pivots (multikey quicksort, Bentley and Sedgewick
    1997); its positions alternate between the file and a scratch file beside it.
    """
    scratch_path = path.with_name(f"{path.name}.scratch")
    with map_disk_errors(path), path.open("r+b") as main_file, scratch_path.open("w+b") as scratch_file:
        main, scratch = _PositionFile(main_file, dtype), _PositionFile(scratch_file, dtype)
        # Regions of ranks whose suffixes agree in their first `depth` bytes, and the file that holds them.
        regions, finished = [(0, count, 0, main)], 0
        while regions:
            start, size, depth, source = regions.pop()
            if size > MAX_SUFFIXES_IN_MEMORY and depth < SORT_DEPTH:
                target = scratch if source is main else main
                parts = _partition_region(text, start, size, depth, source, target)
                regions += [(*part, target) for part in parts]
                continue
            # There are several chunks only if all suffixes agree.
            for rank, positions in source.chunks(start, size, MAX_SUFFIXES_IN_MEMORY):
                main.write(rank, _sort_positions(text, positions, depth))
            text.release_pages()
            finished += size
            progress(finished, count)
    scratch_path.unlink()


def write_sparse_index(text: MappedText, path: Path, out: Path, dtype: np.dtype[Any]) -> None:
    """Write the first eight bytes of every `SPARSE_INDEX_STRIDE`-th suffix of a sorted file."""
    with map_disk_errors(out), path.open("rb") as file, out.open("wb") as sparse:
        while data := file.read(COPY_CHUNK * SPARSE_INDEX_STRIDE * dtype.itemsize // 16):
            positions = np.frombuffer(data, dtype)[::SPARSE_INDEX_STRIDE].astype(np.int64)
            sparse.write(text.words_at(positions).astype("<u8").tobytes())
        text.release_pages()


def _partition_region(
    text: MappedText, start: int, size: int, depth: int, source: _PositionFile, target: _PositionFile
) -> list[tuple[int, int, int]]:
    """Split a region by its words at its depth into suffixes between two pivots and suffixes equal to one, each in the order of
    the text. Returns the start, size and depth of each part."""
    count = min(PIVOT_SAMPLE_SIZE, size)
    sampled = np.linspace(start, start + size - count, PIVOT_SAMPLES).astype(np.int64).tolist()
    positions = np.concatenate([chunk for rank in sampled for _, chunk in source.chunks(rank, count, count)])
    words = np.sort(text.words_at(positions + depth))
    num_parts = min(256, 2 * -(-size // MAX_SUFFIXES_IN_MEMORY))
    pivots = np.unique(words[np.arange(1, num_parts) * len(words) // num_parts])
    num_buckets = 2 * len(pivots) + 1

    def iter_buckets() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Positions, their buckets, and the bucket sizes. Bucket 2 i has words below pivot i, 2 i + 1 words equal to it."""
        for _, positions in source.chunks(start, size, COPY_CHUNK):
            words = text.words_at(positions + depth)
            pivot = np.searchsorted(pivots, words)
            is_equal = pivots[np.minimum(pivot, len(pivots) - 1)] == words
            buckets = (2 * pivot + is_equal).astype(np.uint16)
            yield positions, buckets, np.bincount(buckets, minlength=num_buckets)

    sizes = sum((counts for *_, counts in iter_buckets()), np.zeros(num_buckets, np.int64))
    starts = start + np.cumsum(sizes) - sizes
    cursors = starts.copy()
    for positions, buckets, counts in iter_buckets():
        grouped = np.split(positions[np.argsort(buckets, kind="stable")], np.cumsum(counts)[:-1])
        for bucket in np.flatnonzero(counts).tolist():
            target.write(int(cursors[bucket]), grouped[bucket])
        cursors += counts
    return [(int(starts[i]), int(sizes[i]), depth + 8 * (i % 2)) for i in np.flatnonzero(sizes).tolist()]


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

    def positions_at(self, ranks: np.ndarray | slice) -> np.ndarray:
        """The text positions of ranks."""
        return self.positions[ranks].astype(np.int64)

    def search(self, keys: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
        """The number of suffixes below each key [m] ("left"), or not above it ("right")."""
        words = keys.view(">u8")[:: SORT_DEPTH // 8]
        low = np.maximum(0, (np.searchsorted(self.sparse_index, words) - 1) * SPARSE_INDEX_STRIDE)
        high = np.searchsorted(self.sparse_index, words, side="right") * SPARSE_INDEX_STRIDE
        high = np.minimum(high, len(self))
        while len(pending := np.flatnonzero(low < high)):
            middle = (low[pending] + high[pending]) // 2
            found = self.text.keys[self.positions_at(middle)]
            below = found <= keys[pending] if side == "right" else found < keys[pending]
            low[pending] = np.where(below, middle + 1, low[pending])
            high[pending] = np.where(below, high[pending], middle)
        return low

    def prefix_range(self, passage: bytes) -> tuple[int, int]:
        """The ranks of the suffixes that start with a passage, compared to `SORT_DEPTH` bytes."""
        first, last = (
            np.array([passage[:SORT_DEPTH].ljust(SORT_DEPTH, fill)], self.text.keys.dtype) for fill in (b"\0", b"\xff")
        )
        return int(self.search(first, "left")[0]), int(self.search(last, "right")[0])


def longest_matches(array: SuffixArray, query: Query, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The longest match from each of m rising positions of a query.

    Returns:
        Lengths [m] in bytes, 0 without a match, and text positions [m].
    """
    keys = query.keys[starts]
    low, high = array.search(keys, "left"), array.search(keys, "right")
    lengths, positions = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    whole = low < high  # the whole key is in the text
    lengths[whole], positions[whole] = _extend_matches(array, query, starts[whole], low[whole], high[whole])
    for ranks in (low - 1, low):  # the neighbors of the place where a key that is not there would be inserted
        neighbors = array.positions_at(np.clip(ranks[~whole], 0, len(array) - 1))
        shared = common_prefix_bytes(array.text, query, neighbors, starts[~whole])
        positions[~whole] = np.where(shared > lengths[~whole], neighbors, positions[~whole])
        lengths[~whole] = np.maximum(shared, lengths[~whole])
    return lengths, positions


def _extend_matches(
    array: SuffixArray, query: Query, starts: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and positions of matches that agree in `SORT_DEPTH` bytes with the suffixes of rank low … high − 1."""
    lengths, positions = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)

    @cache
    def longest(i: int) -> tuple[int, int]:
        """The end in the query and the text position of the longest match."""
        candidates = array.positions_at(slice(low[i], high[i]))
        return _longest_extension(array.text, query, int(starts[i]), candidates)

    i = 0
    while i < len(starts):
        end, position = longest(i)
        # A part of a match is a match: ends never fall, and all up to the first later end are parts of this one.
        following = bisect_right(range(len(starts)), end, lo=i + 1, key=lambda k: longest(k)[0])
        lengths[i:following] = end - starts[i:following]
        positions[i:following] = position + starts[i:following] - starts[i]
        i = following
    return lengths, positions


def _longest_extension(text: MappedText, query: Query, start: int, candidates: np.ndarray) -> tuple[int, int]:
    """The end in the query of the longest match from `start` on, and the first candidate [C] that has it; all candidates agree
    in `SORT_DEPTH` bytes."""
    if len(candidates) > MIN_PERIODIC_CANDIDATES:
        candidates = _reduce_periodic(text, query, start, candidates)

    def longest_in_chunks() -> Iterator[tuple[int, int]]:
        for first in range(0, len(candidates), COPY_CHUNK // 8):
            chunk = candidates[first : first + COPY_CHUNK // 8]
            ends = start + SORT_DEPTH + common_prefix_bytes(text, query, chunk + SORT_DEPTH, start + SORT_DEPTH)
            yield int(ends.max()), int(chunk[ends.argmax()])

    return max(longest_in_chunks(), key=itemgetter(0))


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
        differences = xor[ended, first].astype(">u8").view(np.uint8).reshape(-1, 8)
        shared[pending[ended]] = depth + 8 * first + (differences != 0).argmax(1)
        pending, depth, block = pending[~ended], depth + block, COMPARE_BLOCK_BYTES
    return shared
