"""Every suffix of a text in alphabetical order, on disk: sorted in bounded memory, searched by many places at once.

The table holds where each suffix begins (Manber and Myers 1993, section 2), ordered by its first `DEPTH` bytes; suffixes
that agree in so many keep their order in the text. Bytes are compared eight at a time, as big-endian numbers.
Shapes: N suffixes, m places that are looked up, C candidates.
"""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nextword.common.fs import map_disk_errors

SORT_DEPTH = 64  # bytes by which suffixes are ordered
PADDING = SORT_DEPTH + 1024  # bytes that must follow a text, so that every comparison stays inside
MAX_SUFFIXES_IN_MEMORY = 2**19  # suffixes that are sorted in memory at once: some hundred bytes each
COPY_CHUNK = 2**18  # suffixes read at once where they are only passed on
PIVOT_SAMPLE_SIZE = 128  # stretches of as many suffixes each, by which a region is parted
SPARSE_INDEX_STRIDE = 64  # every so many suffixes, the first eight bytes are kept apart
COMPARE_BLOCK_BYTES = 64  # bytes by which a match is followed
MIN_PERIODIC_CANDIDATES = (
    256  # suffixes that agree in `DEPTH` bytes, from which on it is asked whether they lie in runs
)

DOCUMENT_END, QUERY_END = 0xFF, 0xFE  # bytes that no UTF-8 has: the end of a document, and what stands in no text

ProgressCallback = Callable[[int, int], None]


class MappedText:
    """Bytes in a file, mapped into memory, and as eight-byte words at every byte."""

    def __init__(self, path: Path):
        """`path` holds the text and `PADDING` bytes of `END`."""
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes = np.frombuffer(self.map, np.uint8)
        self._words = np.ndarray(len(self.bytes) - 7, ">u8", buffer=self.map, strides=(1,))

    def __len__(self) -> int:
        return len(self.bytes) - PADDING

    def words_at(self, positions: np.ndarray) -> np.ndarray:
        """The eight bytes at each place as a number whose order is theirs."""
        return self._words[positions].astype(np.uint64)

    def release_pages(self) -> None:
        """Give back the memory of what was read; it is read again where it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


# ---------------------------------------------------------------- sorting


def sort_suffixes(
    text: MappedText, path: Path, count: int, position_dtype: np.dtype, progress: ProgressCallback
) -> None:
    """Bring a file of `count` places in a text into the order of the suffixes that begin there.

    Regions too large for memory are parted, by words that a sample of them has, into smaller ones (a quicksort of strings:
    Bentley and Sedgewick 1997); their places go back and forth between the file and another beside it.
    """
    scratch_path = path.with_name(path.name + ".aside")
    with map_disk_errors(path), path.open("r+b") as main_file, scratch_path.open("w+b") as scratch_file:
        files = _PositionFiles(main_file, scratch_file, position_dtype)
        pending_regions, finished = (
            [(0, count, 0, 0)],
            0,
        )  # begin, count, the depth to which all agree, which file they are in
        while pending_regions:
            begin, size, depth, file_index = pending_regions.pop()
            if size > MAX_SUFFIXES_IN_MEMORY and depth < SORT_DEPTH:
                pending_regions += _partition_region(text, files, begin, size, depth, file_index)
                continue
            for start in range(
                begin, begin + size, MAX_SUFFIXES_IN_MEMORY
            ):  # more than one only where nothing is left to be compared
                positions = files.read(file_index, start, min(MAX_SUFFIXES_IN_MEMORY, begin + size - start))
                files.write(0, start, _sort_positions(text, positions, depth))
            text.release_pages()
            finished += size
            progress(finished, count)
    scratch_path.unlink()


def write_sparse_index(text: MappedText, path: Path, out: Path, position_dtype: np.dtype) -> None:
    """The first eight bytes of every so-manieth suffix of a sorted file."""
    with map_disk_errors(out), path.open("rb") as file, out.open("wb") as index_file:
        while data := file.read(COPY_CHUNK * SPARSE_INDEX_STRIDE * position_dtype.itemsize // 16):
            index_file.write(
                text.words_at(np.frombuffer(data, position_dtype)[::SPARSE_INDEX_STRIDE].astype(np.int64))
                .astype("<u8")
                .tobytes()
            )
        text.release_pages()


class _PositionFiles:
    """Two files of places, read and written by where in them."""

    def __init__(self, main_file: BinaryIO, scratch_file: BinaryIO, position_dtype: np.dtype):
        self._files, self._position_dtype = (main_file, scratch_file), position_dtype

    def read(self, file_index: int, begin: int, count: int) -> np.ndarray:
        file = self._files[file_index]
        file.seek(begin * self._position_dtype.itemsize)
        return np.frombuffer(file.read(count * self._position_dtype.itemsize), self._position_dtype).astype(np.int64)

    def write(self, file_index: int, begin: int, positions: np.ndarray) -> None:
        file = self._files[file_index]
        file.seek(begin * self._position_dtype.itemsize)
        file.write(positions.astype(self._position_dtype).tobytes())


def _partition_region(
    text: MappedText, files: _PositionFiles, begin: int, size: int, depth: int, file_index: int
) -> list[tuple[int, int, int, int]]:
    """Part a region by the words at a depth: those between two chosen words, and those equal to one, each by themselves and
    in the order in which they came. The regions that it makes."""
    count = min(PIVOT_SAMPLE_SIZE, size)
    sample_starts = np.linspace(begin, begin + size - count, PIVOT_SAMPLE_SIZE).astype(np.int64)
    sample = np.sort(
        np.concatenate([text.words_at(files.read(file_index, int(at), count) + depth) for at in sample_starts])
    )
    num_partitions = min(256, 2 * -(-size // MAX_SUFFIXES_IN_MEMORY))
    pivots = np.unique(sample[np.arange(1, num_partitions) * len(sample) // num_partitions])

    def iter_partitioned() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places and the part that each belongs to: 2 i those before the chosen word i, 2 i + 1 those that have it."""
        for start in range(begin, begin + size, COPY_CHUNK):
            places = files.read(file_index, start, min(COPY_CHUNK, begin + size - start))
            words = text.words_at(places + depth)
            at = np.searchsorted(pivots, words)
            yield places, (2 * at + (pivots[np.minimum(at, len(pivots) - 1)] == words)).astype(np.uint16)

    counts = np.zeros(2 * len(pivots) + 1, np.int64)
    for _, part in iter_partitioned():
        counts += np.bincount(part, minlength=len(counts))
    partition_starts = begin + np.cumsum(counts) - counts
    cursors = partition_starts.copy()
    for places, part in iter_partitioned():
        sizes = np.bincount(part, minlength=len(counts))
        ends = np.cumsum(sizes)
        places = places[np.argsort(part, kind="stable")]
        for number in np.flatnonzero(sizes).tolist():
            files.write(1 - file_index, int(cursors[number]), places[ends[number] - sizes[number] : ends[number]])
        cursors += sizes
    return [
        (int(start), int(inside), depth + 8 * (number % 2), 1 - file_index)
        for number, (start, inside) in enumerate(zip(partition_starts, counts, strict=True))
        if inside
    ]


def _sort_positions(text: MappedText, positions: np.ndarray, depth: int) -> np.ndarray:
    """Places [C] in the order of their suffixes, of which the first `depth` bytes are the same."""
    is_tied = np.ones(max(0, len(positions) - 1), dtype=bool)  # with the one before
    while depth < SORT_DEPTH and is_tied.any():
        unresolved = np.flatnonzero(np.append(is_tied, False) | np.append(False, is_tied))
        group = np.cumsum(~np.append(False, is_tied)[unresolved])
        words = text.words_at(positions[unresolved] + depth)
        order = np.lexsort((words, group)) if group[-1] > 1 else np.argsort(words, kind="stable")
        positions[unresolved], words = positions[unresolved][order], words[order]
        # Groups lie one after the other, so two neighbours of `open_` that are tied now were tied before.
        is_tied[unresolved[1:] - 1] = is_tied[unresolved[1:] - 1] & (words[1:] == words[:-1])
        depth += 8
    return positions


# ---------------------------------------------------------------- searching


class SuffixArray:
    """The table of a text's suffixes [N], as `sort_suffixes` left it, and its signposts."""

    def __init__(self, text: MappedText, positions: np.ndarray, sparse_index: np.ndarray):
        self.text, self.positions, self.sparse_index = text, positions, sparse_index

    def __len__(self) -> int:
        return len(self.positions)

    def words_at(self, ranks: np.ndarray, depth: int) -> np.ndarray:
        """The words at a depth of the suffixes at these places of the table."""
        return self.text.words_at(self.positions[ranks].astype(np.int64) + depth)

    def _lower_bound(
        self, low: np.ndarray, high: np.ndarray, depth: int, targets: np.ndarray, upper: np.ndarray
    ) -> np.ndarray:
        """For each of m ranges low … high of the table, in which the words at a depth are in order, where the first stands
        that is not below `wanted`, or with `after` the first above it; `high` where there is none."""
        low, high = low.copy(), high.copy()
        unresolved = np.flatnonzero(low < high)
        while len(unresolved):
            middle = (low[unresolved] + high[unresolved]) // 2
            words, target_words = self.words_at(middle, depth), targets[unresolved]
            below = (words < target_words) | (upper[unresolved] & (words == target_words))
            low[unresolved[below]] = middle[below] + 1
            high[unresolved[~below]] = middle[~below]
            unresolved = unresolved[low[unresolved] < high[unresolved]]
        return low

    def narrow_ranges(
        self, low: np.ndarray, high: np.ndarray, depth: int, first: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The parts of m ranges whose words at a depth lie from `first` to `last`."""
        upper = np.repeat([False, True], len(low))
        bounds = [np.concatenate([one, one]) for one in (low, high)]
        targets = np.concatenate([first, last])
        if depth == 0 and len(self.sparse_index):  # all ranges are the whole table
            right, left = (np.searchsorted(self.sparse_index, targets, side) for side in ("right", "left"))
            index_positions = np.where(upper, right, left)
            bounds = [
                np.maximum(bounds[0], (index_positions - 1) * SPARSE_INDEX_STRIDE),
                np.minimum(bounds[1], index_positions * SPARSE_INDEX_STRIDE + 1),
            ]
        low, high = np.split(self._lower_bound(bounds[0], bounds[1], depth, targets, upper), 2)
        return low, high

    def prefix_range(self, passage: bytes) -> tuple[int, int]:
        """Which part of the table begins with a passage, as far as the table is ordered."""
        low, high = np.array([0]), np.array([len(self)])
        for depth in range(0, min(len(passage), SORT_DEPTH), 8):
            part = passage[depth : depth + 8]
            first, last = (
                np.array([int.from_bytes(part.ljust(8, fill), "big")], np.uint64) for fill in (b"\0", b"\xff")
            )
            low, high = self.narrow_ranges(low, high, depth, first, last)
        return int(low[0]), int(high[0])


class Query:
    """A text to be looked up, whole words of which can be compared with those of an indexed one."""

    def __init__(self, data: bytes):
        # What could be taken for the end of a document, or for the end of the query, is made a byte that is neither.
        self.data = data.replace(b"\xff", b"\xfd").replace(b"\xfe", b"\xfd")
        self._padded = self.data + bytes([QUERY_END]) * PADDING
        self._words = np.ndarray(len(self._padded) - 7, ">u8", buffer=self._padded, strides=(1,))

    def words_at(self, positions: np.ndarray) -> np.ndarray:
        return self._words[positions].astype(np.uint64)


def longest_matches(suffix_array: SuffixArray, query: Query, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From each of m rising places of a query, how many bytes stand together in the text, and where; 0 of nothing."""
    lengths, positions = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    unresolved, is_unique = np.arange(len(starts)), np.zeros(len(starts), dtype=bool)
    low, high = np.zeros(len(starts), np.int64), np.full(len(starts), len(suffix_array), np.int64)
    for depth in range(0, SORT_DEPTH, 8):
        if not len(unresolved):
            break
        words = query.words_at(starts[unresolved] + depth)
        first, last = suffix_array.narrow_ranges(low, high, depth, words, words)
        has_no_match = first == last
        if has_no_match.any():
            shared, neighbor_position = _best_neighbor(
                suffix_array, first[has_no_match], low[has_no_match], high[has_no_match], depth, words[has_no_match]
            )
            lengths[unresolved[has_no_match]], positions[unresolved[has_no_match]] = depth + shared, neighbor_position
        has_single_match = last - first == 1
        positions[unresolved[has_single_match]], is_unique[unresolved[has_single_match]] = (
            suffix_array.positions[first[has_single_match]],
            True,
        )
        unresolved, low, high = (array[last - first > 1] for array in (unresolved, first, last))
    _extend_unique_matches(suffix_array.text, query, starts, np.flatnonzero(is_unique), lengths, positions)
    _extend_multiple_matches(suffix_array, query, starts, unresolved, low, high, lengths, positions)
    return lengths, positions


def _best_neighbor(
    suffix_array: SuffixArray,
    insertion_ranks: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    depth: int,
    words: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Where a word would stand `at` a place between others, the one beside it with which it shares more bytes: how many, and
    where in the text. Words in order share most with their neighbours."""
    best, positions = np.full(len(insertion_ranks), -1), np.zeros(len(insertion_ranks), np.int64)
    for neighbor, exists in ((insertion_ranks - 1, insertion_ranks > low), (insertion_ranks, insertion_ranks < high)):
        neighbor = np.where(exists, neighbor, low)  # low is always one of the range: its words agree so far
        shared = _equal_leading_bytes(suffix_array.words_at(neighbor, depth) ^ words)
        better = shared > best
        best, positions = (
            np.where(better, shared, best),
            np.where(better, suffix_array.positions[neighbor].astype(np.int64), positions),
        )
    return best, positions


def _extend_unique_matches(
    text: MappedText,
    query: Query,
    starts: np.ndarray,
    unique_queries: np.ndarray,
    lengths: np.ndarray,
    positions: np.ndarray,
) -> None:
    """The lengths from those places that can only be one in the text, which `where` has already. What goes on a step further,
    here and there, ends where the place before does."""
    unique_positions, unique_starts = positions[unique_queries], starts[unique_queries]
    continues_previous = (np.diff(unique_queries) == 1) & (np.diff(unique_positions) == np.diff(unique_starts))
    chain_heads = np.flatnonzero(np.append(True, ~continues_previous))[: len(unique_queries)]
    ends = unique_starts[chain_heads] + common_prefix_bytes(
        text, query, unique_positions[chain_heads], unique_starts[chain_heads]
    )
    lengths[unique_queries] = np.repeat(ends, np.diff(np.append(chain_heads, len(unique_queries)))) - unique_starts


def _extend_multiple_matches(
    suffix_array: SuffixArray, query: Query, starts: np.ndarray, unresolved: np.ndarray, low: np.ndarray, high: np.ndarray,
    lengths: np.ndarray, positions: np.ndarray,
) -> None:  # fmt: skip
    """The same for places of which `DEPTH` bytes stand at several in the text: the furthest of all that agree so far.

    Where these are the ones of the place before, a step on, they end where those ended, and nothing has to be read again; nor
    where one reached the query's end.
    """
    previous = furthest_end = best_position = 0
    candidates, periodic_runs = (
        np.zeros(0, np.int64),
        dict[tuple[int, int], _PeriodicRuns](),
    )  # of as many parts as a period has bytes
    for at, first, last in zip(unresolved.tolist(), low.tolist(), high.tolist(), strict=True):
        start, step = int(starts[at]), int(starts[at] - starts[previous])
        candidate_positions = (
            suffix_array.positions[first:last].astype(np.int64)
            if (first, last) not in periodic_runs
            else candidates[:0]
        )
        if furthest_end == len(query.data) or (
            at == previous + 1 and len(candidate_positions) and np.array_equal(candidates + step, candidate_positions)
        ):
            best_position += step
        else:
            if (
                len(candidate_positions) > MIN_PERIODIC_CANDIDATES
                and (found := _find_periodic_runs(suffix_array.text, query, start, candidate_positions)) is not None
            ):
                periodic_runs = {(first, last): found, **(periodic_runs if len(periodic_runs) < SORT_DEPTH else {})}
            found = periodic_runs.get((first, last))
            furthest_end, best_position = (
                found.longest_match(query, start)
                if found
                else _longest_extension(suffix_array.text, query, start, candidate_positions)
            )
        lengths[at], positions[at], previous, candidates = furthest_end - start, best_position, at, candidate_positions


def _longest_extension(text: MappedText, query: Query, start: int, positions: np.ndarray) -> tuple[int, int]:
    """Where in the query the longest match ends that begins at `start` and at one of places [C], where `DEPTH` bytes agree;
    and at which of them, the first of several."""
    furthest_end, best_position = -1, 0
    for begin in range(0, len(positions), COPY_CHUNK // 8):
        part = positions[begin : begin + COPY_CHUNK // 8]
        ends = start + SORT_DEPTH + common_prefix_bytes(text, query, part + SORT_DEPTH, start + SORT_DEPTH)
        if int(ends.max()) > furthest_end:
            furthest_end, best_position = int(ends.max()), int(part[ends.argmax()])
        if furthest_end == len(query.data):
            break
    return furthest_end, best_position


class _PeriodicRuns:
    """Where a text repeats a few bytes again and again, of which `DEPTH` bytes begin at rising places: where each such run [R]
    ends, and how much of it is left at its first place and at its last, a period apart from one to the next.

    A query that repeats them too goes along with such a run until the first of the two ends. Only where both have as much
    left of it can more follow, and that is one place a run, however long the run is.
    """

    def __init__(self, text: MappedText, positions: np.ndarray, period: int):
        self.text, self.period = text, period
        apart = np.flatnonzero(np.diff(positions) != period)
        first, last = positions[np.append(0, apart + 1)], positions[np.append(apart, len(positions) - 1)]
        self.run_ends = last + common_prefix_bytes(text, text, last, last + period) + period
        self.max_remaining, self.min_remaining = (
            self.run_ends - first,
            self.run_ends - last,
        )  # what is left of a run at its first and last place
        self.longest_run = int(self.max_remaining.argmax())
        self._query_run = (0, 0)  # from where the query repeats them, and to where

    def longest_match(self, query: Query, start: int) -> tuple[int, int]:
        """Where in the query the longest match ends that begins at `start`, and where in the text it begins."""
        if not self._query_run[0] <= start <= self._query_run[1] - SORT_DEPTH:
            data = np.frombuffer(query.data, np.uint8)[start:]
            other = np.flatnonzero(data[self.period :] != data[: -self.period])
            self._query_run = start, start + (int(other[0]) + self.period if len(other) else len(data))
        left, widest = self._query_run[1] - start, self.longest_run
        most, place = (
            min(int(self.max_remaining[widest]), left),
            int(self.run_ends[widest] - self.max_remaining[widest]),
        )
        if left <= self.max_remaining[widest]:
            equal = (
                (self.min_remaining <= left)
                & (left <= self.max_remaining)
                & ((left - self.min_remaining) % self.period == 0)
            )
            places = self.run_ends[equal] - left
            if len(places):
                more = common_prefix_bytes(self.text, query, places + left, start + left)
                if left + int(more.max()) > most:
                    most, place = left + int(more.max()), int(places[more.argmax()])
        return start + most, place


def _find_periodic_runs(text: MappedText, query: Query, start: int, positions: np.ndarray) -> _PeriodicRuns | None:
    """The runs in which rising places lie, where the `DEPTH` bytes in which they agree repeat themselves."""
    data = query.data[start : start + SORT_DEPTH]
    period = next((p for p in range(1, SORT_DEPTH) if data[p:] == data[:-p]), None)
    return None if period is None else _PeriodicRuns(text, positions, period)


def common_prefix_bytes(
    text: MappedText, other: "Text | Query", positions: np.ndarray, starts: np.ndarray | int
) -> np.ndarray:
    """How many bytes a text from each of places [C] on and another from a start on (one for all, or each its own) have in
    common."""
    starts = np.broadcast_to(starts, positions.shape)
    shared, unresolved, depth, block = np.zeros(len(positions), np.int64), np.arange(len(positions)), 0, 8
    while len(unresolved):
        steps = depth + np.arange(0, block, 8)
        different = text.words_at(positions[unresolved, None] + steps) ^ other.words_at(
            starts[unresolved, None] + steps
        )  # [C, block / 8]
        ended = (different != 0).any(1)
        first = (different[ended] != 0).argmax(1)
        shared[unresolved[ended]] = depth + 8 * first + _equal_leading_bytes(different[ended, first])
        unresolved, depth, block = (
            unresolved[~ended],
            depth + block,
            COMPARE_BLOCK_BYTES,
        )  # most end with the first word
    return shared


def _equal_leading_bytes(xor: np.ndarray) -> np.ndarray:
    """In how many first bytes two words agree, of which this is the exclusive or; 7 at most, for they differ."""
    agree = np.zeros(xor.shape, np.int64)
    for k in range(1, 8):
        agree += (xor >> np.uint64(64 - 8 * k)) == 0
    return agree
