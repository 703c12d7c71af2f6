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

from nextword.common.fs import writing

DEPTH = 64  # bytes by which suffixes are ordered
PADDING = DEPTH + 1024  # bytes that must follow a text, so that every comparison stays inside
LIMIT = 2**19  # suffixes that are sorted in memory at once: some hundred bytes each
CHUNK = 2**18  # suffixes read at once where they are only passed on
SAMPLE = 128  # stretches of as many suffixes each, by which a region is parted
SIGNPOST = 64  # every so many suffixes, the first eight bytes are kept apart
BLOCK = 64  # bytes by which a match is followed
MANY = 256  # suffixes that agree in `DEPTH` bytes, from which on it is asked whether they lie in runs

END, NOWHERE = 0xFF, 0xFE  # bytes that no UTF-8 has: the end of a document, and what stands in no text

Done = Callable[[int, int], None]


class Text:
    """Bytes in a file, mapped into memory, and as eight-byte words at every byte."""

    def __init__(self, path: Path):
        """`path` holds the text and `PADDING` bytes of `END`."""
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes = np.frombuffer(self.map, np.uint8)
        self._words = np.ndarray(len(self.bytes) - 7, ">u8", buffer=self.map, strides=(1,))

    def __len__(self) -> int:
        return len(self.bytes) - PADDING

    def words(self, places: np.ndarray) -> np.ndarray:
        """The eight bytes at each place as a number whose order is theirs."""
        return self._words[places].astype(np.uint64)

    def let_go(self) -> None:
        """Give back the memory of what was read; it is read again where it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


# ---------------------------------------------------------------- sorting


def sort_suffixes(text: Text, path: Path, count: int, kind: np.dtype, done: Done) -> None:
    """Bring a file of `count` places in a text into the order of the suffixes that begin there.

    Regions too large for memory are parted, by words that a sample of them has, into smaller ones (a quicksort of strings:
    Bentley and Sedgewick 1997); their places go back and forth between the file and another beside it.
    """
    aside = path.with_name(path.name + ".aside")
    with writing(path), path.open("r+b") as own, aside.open("w+b") as other:
        files = _Files(own, other, kind)
        waiting, finished = [(0, count, 0, 0)], 0  # begin, count, the depth to which all agree, which file they are in
        while waiting:
            begin, size, depth, which = waiting.pop()
            if size > LIMIT and depth < DEPTH:
                waiting += _part(text, files, begin, size, depth, which)
                continue
            for start in range(begin, begin + size, LIMIT):  # more than one only where nothing is left to be compared
                places = files.read(which, start, min(LIMIT, begin + size - start))
                files.write(0, start, _sorted(text, places, depth))
            text.let_go()
            finished += size
            done(finished, count)
    aside.unlink()


def write_signposts(text: Text, path: Path, out: Path, kind: np.dtype) -> None:
    """The first eight bytes of every so-manieth suffix of a sorted file."""
    with writing(out), path.open("rb") as file, out.open("wb") as posts:
        while data := file.read(CHUNK * SIGNPOST * kind.itemsize // 16):
            posts.write(text.words(np.frombuffer(data, kind)[::SIGNPOST].astype(np.int64)).astype("<u8").tobytes())
        text.let_go()


class _Files:
    """Two files of places, read and written by where in them."""

    def __init__(self, own: BinaryIO, other: BinaryIO, kind: np.dtype):
        self._files, self._kind = (own, other), kind

    def read(self, which: int, begin: int, count: int) -> np.ndarray:
        file = self._files[which]
        file.seek(begin * self._kind.itemsize)
        return np.frombuffer(file.read(count * self._kind.itemsize), self._kind).astype(np.int64)

    def write(self, which: int, begin: int, places: np.ndarray) -> None:
        file = self._files[which]
        file.seek(begin * self._kind.itemsize)
        file.write(places.astype(self._kind).tobytes())


def _part(text: Text, files: _Files, begin: int, size: int, depth: int, which: int) -> list[tuple[int, int, int, int]]:
    """Part a region by the words at a depth: those between two chosen words, and those equal to one, each by themselves and
    in the order in which they came. The regions that it makes."""
    count = min(SAMPLE, size)
    spread = np.linspace(begin, begin + size - count, SAMPLE).astype(np.int64)
    sample = np.sort(np.concatenate([text.words(files.read(which, int(at), count) + depth) for at in spread]))
    parts = min(256, 2 * -(-size // LIMIT))
    chosen = np.unique(sample[np.arange(1, parts) * len(sample) // parts])

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places and the part that each belongs to: 2 i those before the chosen word i, 2 i + 1 those that have it."""
        for start in range(begin, begin + size, CHUNK):
            places = files.read(which, start, min(CHUNK, begin + size - start))
            words = text.words(places + depth)
            at = np.searchsorted(chosen, words)
            yield places, (2 * at + (chosen[np.minimum(at, len(chosen) - 1)] == words)).astype(np.uint16)

    counts = np.zeros(2 * len(chosen) + 1, np.int64)
    for _, part in pieces():
        counts += np.bincount(part, minlength=len(counts))
    begins = begin + np.cumsum(counts) - counts
    cursors = begins.copy()
    for places, part in pieces():
        sizes = np.bincount(part, minlength=len(counts))
        ends = np.cumsum(sizes)
        places = places[np.argsort(part, kind="stable")]
        for number in np.flatnonzero(sizes).tolist():
            files.write(1 - which, int(cursors[number]), places[ends[number] - sizes[number] : ends[number]])
        cursors += sizes
    return [
        (int(start), int(inside), depth + 8 * (number % 2), 1 - which)
        for number, (start, inside) in enumerate(zip(begins, counts, strict=True))
        if inside
    ]


def _sorted(text: Text, places: np.ndarray, depth: int) -> np.ndarray:
    """Places [C] in the order of their suffixes, of which the first `depth` bytes are the same."""
    tied = np.ones(max(0, len(places) - 1), dtype=bool)  # with the one before
    while depth < DEPTH and tied.any():
        open_ = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
        group = np.cumsum(~np.append(False, tied)[open_])
        words = text.words(places[open_] + depth)
        order = np.lexsort((words, group)) if group[-1] > 1 else np.argsort(words, kind="stable")
        places[open_], words = places[open_][order], words[order]
        # Groups lie one after the other, so two neighbours of `open_` that are tied now were tied before.
        tied[open_[1:] - 1] = tied[open_[1:] - 1] & (words[1:] == words[:-1])
        depth += 8
    return places


# ---------------------------------------------------------------- searching


class Suffixes:
    """The table of a text's suffixes [N], as `sort_suffixes` left it, and its signposts."""

    def __init__(self, text: Text, table: np.ndarray, signposts: np.ndarray):
        self.text, self.table, self.signposts = text, table, signposts

    def __len__(self) -> int:
        return len(self.table)

    def words(self, at: np.ndarray, depth: int) -> np.ndarray:
        """The words at a depth of the suffixes at these places of the table."""
        return self.text.words(self.table[at].astype(np.int64) + depth)

    def _search(
        self, low: np.ndarray, high: np.ndarray, depth: int, wanted: np.ndarray, after: np.ndarray
    ) -> np.ndarray:
        """For each of m ranges low … high of the table, in which the words at a depth are in order, where the first stands
        that is not below `wanted`, or with `after` the first above it; `high` where there is none."""
        low, high = low.copy(), high.copy()
        open_ = np.flatnonzero(low < high)
        while len(open_):
            middle = (low[open_] + high[open_]) // 2
            words, sought = self.words(middle, depth), wanted[open_]
            below = (words < sought) | (after[open_] & (words == sought))
            low[open_[below]] = middle[below] + 1
            high[open_[~below]] = middle[~below]
            open_ = open_[low[open_] < high[open_]]
        return low

    def narrow(
        self, low: np.ndarray, high: np.ndarray, depth: int, first: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The parts of m ranges whose words at a depth lie from `first` to `last`."""
        after = np.repeat([False, True], len(low))
        both = [np.concatenate([one, one]) for one in (low, high)]
        wanted = np.concatenate([first, last])
        if depth == 0 and len(self.signposts):  # all ranges are the whole table
            right, left = (np.searchsorted(self.signposts, wanted, side) for side in ("right", "left"))
            at = np.where(after, right, left)
            both = [np.maximum(both[0], (at - 1) * SIGNPOST), np.minimum(both[1], at * SIGNPOST + 1)]
        low, high = np.split(self._search(both[0], both[1], depth, wanted, after), 2)
        return low, high

    def range_of(self, passage: bytes) -> tuple[int, int]:
        """Which part of the table begins with a passage, as far as the table is ordered."""
        low, high = np.array([0]), np.array([len(self)])
        for depth in range(0, min(len(passage), DEPTH), 8):
            part = passage[depth : depth + 8]
            first, last = (
                np.array([int.from_bytes(part.ljust(8, fill), "big")], np.uint64) for fill in (b"\0", b"\xff")
            )
            low, high = self.narrow(low, high, depth, first, last)
        return int(low[0]), int(high[0])


class Query:
    """A text to be looked up, whole words of which can be compared with those of an indexed one."""

    def __init__(self, data: bytes):
        # What could be taken for the end of a document, or for the end of the query, is made a byte that is neither.
        self.data = data.replace(b"\xff", b"\xfd").replace(b"\xfe", b"\xfd")
        self._padded = self.data + bytes([NOWHERE]) * PADDING
        self._words = np.ndarray(len(self._padded) - 7, ">u8", buffer=self._padded, strides=(1,))

    def words(self, places: np.ndarray) -> np.ndarray:
        return self._words[places].astype(np.uint64)


def longest(suffixes: Suffixes, query: Query, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From each of m rising places of a query, how many bytes stand together in the text, and where; 0 of nothing."""
    lengths, where = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    open_, alone = np.arange(len(starts)), np.zeros(len(starts), dtype=bool)
    low, high = np.zeros(len(starts), np.int64), np.full(len(starts), len(suffixes), np.int64)
    for depth in range(0, DEPTH, 8):
        if not len(open_):
            break
        words = query.words(starts[open_] + depth)
        first, last = suffixes.narrow(low, high, depth, words, words)
        ended = first == last
        if ended.any():
            shared, place = _neighbours(suffixes, first[ended], low[ended], high[ended], depth, words[ended])
            lengths[open_[ended]], where[open_[ended]] = depth + shared, place
        one = last - first == 1
        where[open_[one]], alone[open_[one]] = suffixes.table[first[one]], True
        open_, low, high = (array[last - first > 1] for array in (open_, first, last))
    _follow_one(suffixes.text, query, starts, np.flatnonzero(alone), lengths, where)
    _follow_many(suffixes, query, starts, open_, low, high, lengths, where)
    return lengths, where


def _neighbours(
    suffixes: Suffixes, at: np.ndarray, low: np.ndarray, high: np.ndarray, depth: int, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where a word would stand `at` a place between others, the one beside it with which it shares more bytes: how many, and
    where in the text. Words in order share most with their neighbours."""
    best, where = np.full(len(at), -1), np.zeros(len(at), np.int64)
    for beside, there in ((at - 1, at > low), (at, at < high)):
        beside = np.where(there, beside, low)  # low is always one of the range: its words agree so far
        shared = _same_bytes(suffixes.words(beside, depth) ^ words)
        better = shared > best
        best, where = np.where(better, shared, best), np.where(better, suffixes.table[beside].astype(np.int64), where)
    return best, where


def _follow_one(
    text: Text, query: Query, starts: np.ndarray, alone: np.ndarray, lengths: np.ndarray, where: np.ndarray
) -> None:
    """The lengths from those places that can only be one in the text, which `where` has already. What goes on a step further,
    here and there, ends where the place before does."""
    places, begins = where[alone], starts[alone]
    same = (np.diff(alone) == 1) & (np.diff(places) == np.diff(begins))
    heads = np.flatnonzero(np.append(True, ~same))[: len(alone)]
    ends = begins[heads] + shared_bytes(text, query, places[heads], begins[heads])
    lengths[alone] = np.repeat(ends, np.diff(np.append(heads, len(alone)))) - begins


def _follow_many(
    suffixes: Suffixes, query: Query, starts: np.ndarray, open_: np.ndarray, low: np.ndarray, high: np.ndarray,
    lengths: np.ndarray, where: np.ndarray,
) -> None:  # fmt: skip
    """The same for places of which `DEPTH` bytes stand at several in the text: the furthest of all that agree so far.

    Where these are the ones of the place before, a step on, they end where those ended, and nothing has to be read again; nor
    where one reached the query's end.
    """
    before = most = place = 0
    candidates, runs = np.zeros(0, np.int64), dict[tuple[int, int], _Runs]()  # of as many parts as a period has bytes
    for at, first, last in zip(open_.tolist(), low.tolist(), high.tolist(), strict=True):
        start, step = int(starts[at]), int(starts[at] - starts[before])
        places = suffixes.table[first:last].astype(np.int64) if (first, last) not in runs else candidates[:0]
        if most == len(query.data) or (at == before + 1 and len(places) and np.array_equal(candidates + step, places)):
            place += step
        else:
            if len(places) > MANY and (found := _runs(suffixes.text, query, start, places)) is not None:
                runs = {(first, last): found, **(runs if len(runs) < DEPTH else {})}
            found = runs.get((first, last))
            most, place = found.furthest(query, start) if found else _furthest(suffixes.text, query, start, places)
        lengths[at], where[at], before, candidates = most - start, place, at, places


def _furthest(text: Text, query: Query, start: int, places: np.ndarray) -> tuple[int, int]:
    """Where in the query the longest match ends that begins at `start` and at one of places [C], where `DEPTH` bytes agree;
    and at which of them, the first of several."""
    most, place = -1, 0
    for begin in range(0, len(places), CHUNK // 8):
        part = places[begin : begin + CHUNK // 8]
        ends = start + DEPTH + shared_bytes(text, query, part + DEPTH, start + DEPTH)
        if int(ends.max()) > most:
            most, place = int(ends.max()), int(part[ends.argmax()])
        if most == len(query.data):
            break
    return most, place


class _Runs:
    """Where a text repeats a few bytes again and again, of which `DEPTH` bytes begin at rising places: where each such run [R]
    ends, and how much of it is left at its first place and at its last, a period apart from one to the next.

    A query that repeats them too goes along with such a run until the first of the two ends. Only where both have as much
    left of it can more follow, and that is one place a run, however long the run is.
    """

    def __init__(self, text: Text, places: np.ndarray, period: int):
        self.text, self.period = text, period
        apart = np.flatnonzero(np.diff(places) != period)
        first, last = places[np.append(0, apart + 1)], places[np.append(apart, len(places) - 1)]
        self.ends = last + shared_bytes(text, text, last, last + period) + period
        self.most, self.least = self.ends - first, self.ends - last  # what is left of a run at its first and last place
        self.widest = int(self.most.argmax())
        self._seen = (0, 0)  # from where the query repeats them, and to where

    def furthest(self, query: Query, start: int) -> tuple[int, int]:
        """Where in the query the longest match ends that begins at `start`, and where in the text it begins."""
        if not self._seen[0] <= start <= self._seen[1] - DEPTH:
            data = np.frombuffer(query.data, np.uint8)[start:]
            other = np.flatnonzero(data[self.period :] != data[: -self.period])
            self._seen = start, start + (int(other[0]) + self.period if len(other) else len(data))
        left, widest = self._seen[1] - start, self.widest
        most, place = min(int(self.most[widest]), left), int(self.ends[widest] - self.most[widest])
        if left <= self.most[widest]:
            equal = (self.least <= left) & (left <= self.most) & ((left - self.least) % self.period == 0)
            places = self.ends[equal] - left
            if len(places):
                more = shared_bytes(self.text, query, places + left, start + left)
                if left + int(more.max()) > most:
                    most, place = left + int(more.max()), int(places[more.argmax()])
        return start + most, place


def _runs(text: Text, query: Query, start: int, places: np.ndarray) -> _Runs | None:
    """The runs in which rising places lie, where the `DEPTH` bytes in which they agree repeat themselves."""
    data = query.data[start : start + DEPTH]
    period = next((p for p in range(1, DEPTH) if data[p:] == data[:-p]), None)
    return None if period is None else _Runs(text, places, period)


def shared_bytes(text: Text, other: "Text | Query", places: np.ndarray, starts: np.ndarray | int) -> np.ndarray:
    """How many bytes a text from each of places [C] on and another from a start on (one for all, or each its own) have in
    common."""
    starts = np.broadcast_to(starts, places.shape)
    shared, open_, depth, block = np.zeros(len(places), np.int64), np.arange(len(places)), 0, 8
    while len(open_):
        steps = depth + np.arange(0, block, 8)
        different = text.words(places[open_, None] + steps) ^ other.words(starts[open_, None] + steps)  # [C, block / 8]
        ended = (different != 0).any(1)
        first = (different[ended] != 0).argmax(1)
        shared[open_[ended]] = depth + 8 * first + _same_bytes(different[ended, first])
        open_, depth, block = open_[~ended], depth + block, BLOCK  # most end with the first word
    return shared


def _same_bytes(different: np.ndarray) -> np.ndarray:
    """In how many first bytes two words agree, of which this is the exclusive or; 7 at most, for they differ."""
    agree = np.zeros(different.shape, np.int64)
    for k in range(1, 8):
        agree += (different >> np.uint64(64 - 8 * k)) == 0
    return agree
