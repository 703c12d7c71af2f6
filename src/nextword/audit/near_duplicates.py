"""Documents that are there twice, exactly or nearly.

Nearly: of the runs of five words of both documents together, 80 % are in both (the resemblance of Broder 1997). Candidates
come from MinHash signatures cut into bands (Leskovec, Rajaraman and Ullman 2014, section 3.4); each is then compared itself.
Shapes: S signature numbers, n runs of words of a piece, D documents.
"""

from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np

from nextword.audit.findings import Finding
from nextword.audit.text_index import Index
from nextword.common.fs import writing

ALIKE = 0.8
WORDS = 5  # of a run
BANDS, ROWS = 20, 6  # a pair that is just alike enough shares a band with a probability of 1 − (1 − 0.8⁶)²⁰ = 0.998
RUNS = 2048  # hashed at once; and documents whose bands are written at once
SHOWN = 5
NONE = np.uint64(2**64 - 1)  # the band of a document that has no run


def exact_copies(index: Index) -> Finding:
    """Documents whose text is that of an earlier one."""
    rows = index.documents
    _, first, kind = np.unique(rows["key"], return_index=True, return_inverse=True)
    again = np.flatnonzero(first[kind] != np.arange(len(rows)))
    share = 100 * len(again) / max(1, len(rows))
    size = 100 * int((rows["end"] - rows["begin"])[again].sum()) / max(1, index.size)
    return Finding(
        "corpus", "documents that are exact copies", share, unit="%", n=len(rows), reference=0.0,
        note=f"{len(again):,} documents, {size:.1f} % of the bytes; training leaves them out",
        examples=tuple({"document": index.name(int(one)), "copy of": index.name(int(first[kind[one]]))}
                       for one in again[:SHOWN]),
    )  # fmt: skip


class NearCopies:
    """Documents that are nearly an earlier one. Exact copies are not told once more."""

    def __init__(self, index: Index, folder: Path):
        self._index, self._path = index, folder / "bands.bin"
        self._waiting: list[np.ndarray] = []  # bands of documents that are not on disk yet
        draws = np.random.default_rng(0)
        # Multiply and shift (Dietzfelbinger et al. 1997): the upper half of an odd number's multiples.
        self._factors = draws.integers(2**63, size=(BANDS * ROWS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._signature = np.full(BANDS * ROWS, NONE)
        self._left: np.ndarray | None = None  # hashes of the last words of a piece, whose runs go on in the next
        self._copies = _copies(index)

    def add(self, document: int, at: int, text: str) -> None:
        if document in self._copies:
            return
        found = words(text)
        found = found if self._left is None else np.concatenate([self._left, found])
        self._left = found[-(WORDS - 1) :]
        hashes = runs(found)
        for start in range(0, len(hashes), RUNS):
            each = (self._factors * hashes[start : start + RUNS]) >> np.uint64(32)  # [S, n]
            self._signature = np.minimum(self._signature, each.min(1))

    def end(self, document: int) -> None:
        bands = np.full(BANDS, NONE)
        if self._signature[0] != NONE:
            for row in self._signature.reshape(BANDS, ROWS).T:
                bands = (bands * np.uint64(0x9E3779B97F4A7C15)) ^ row
        self._waiting.append(bands)
        if len(self._waiting) == RUNS:
            self._write()
        self._signature[:] = NONE
        self._left = None

    def _write(self) -> None:
        with writing(self._path), self._path.open("ab") as file:
            file.write(b"".join(bands.tobytes() for bands in self._waiting))
        self._waiting.clear()

    def findings(self) -> list[Finding]:
        self._write()
        alike: dict[int, tuple[int, float]] = {}
        for earlier, later in sorted(self._candidates()):
            if later not in alike and (share := resemblance(self._index, earlier, later)) >= ALIKE:
                alike[later] = earlier, share
        rows = self._index.documents
        size = sum(int(rows["end"][one] - rows["begin"][one]) for one in alike)
        return [
            Finding(
                "corpus", "documents that are nearly copies", 100 * len(alike) / max(1, len(rows)), unit="%", n=len(rows),
                reference=0.0, notable=bool(alike),
                note=f"{len(alike):,} documents, {100 * size / max(1, self._index.size):.1f} % of the bytes, of whose runs of "
                f"{WORDS} words and those of an earlier document {ALIKE:.0%} or more are in both",
                examples=tuple(
                    {"document": self._index.name(one), "copy of": self._index.name(other), "alike": f"{share:.0%}"}
                    for one, (other, share) in sorted(alike.items())[:SHOWN]
                ),
            )
        ]  # fmt: skip

    def _candidates(self) -> set[tuple[int, int]]:
        """Pairs that share a band: each document with the first that has it, and with the one before."""
        pairs: set[tuple[int, int]] = set()
        if not len(self._index):
            return pairs
        table = np.memmap(self._path, dtype=np.uint64, mode="r").reshape(-1, BANDS)  # [D, BANDS]
        for band in range(BANDS):
            column = np.array(table[:, band])
            order = np.argsort(column, kind="stable")
            column = column[order]
            begins = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
            for start, end in pairwise([*begins.tolist(), len(column)]):
                if end - start > 1 and column[start] != NONE:
                    group = order[start:end].tolist()
                    pairs.update((group[0], other) for other in group[1:])
                    pairs.update(pairwise(group))
        return pairs


def _copies(index: Index) -> frozenset[int]:
    """The documents that are exactly an earlier one."""
    _, first = np.unique(index.documents["key"], return_index=True)
    return frozenset(np.setdiff1d(np.arange(len(index)), first).tolist())


def words(text: str) -> np.ndarray:
    """A hash of each word of a text; of a text that has next to no spaces, of each character."""
    parts = text.encode().split()
    if 20 * len(parts) > len(text):
        return np.fromiter(map(crc32, parts), np.uint64, len(parts))
    return np.frombuffer("".join(text.split()).encode("utf-32-le"), np.uint32).astype(np.uint64)


def runs(found: np.ndarray) -> np.ndarray:
    """A hash of each run of `WORDS` of them."""
    length = max(0, len(found) - WORDS + 1)
    hashes = np.zeros(length, np.uint64)
    for i in range(WORDS):
        hashes = (hashes ^ found[i : i + length]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def resemblance(index: Index, one: int, other: int) -> float:
    """The runs that two documents share, over those that either has (Broder 1997, section 2)."""
    a, b = (_runs_of(index, document) for document in (one, other))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)


def _runs_of(index: Index, document: int) -> np.ndarray:
    return np.unique(runs(np.concatenate([words(text) for _, text in index.pieces(document)])))
