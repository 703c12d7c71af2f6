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
from nextword.audit.text_index import CorpusIndex
from nextword.common.fs import map_disk_errors

SIMILARITY_THRESHOLD = 0.8
SHINGLE_SIZE = 5  # of a run
NUM_BANDS, ROWS_PER_BAND = (
    20,
    6,
)  # a pair that is just alike enough shares a band with a probability of 1 − (1 − 0.8⁶)²⁰ = 0.998
BATCH_SIZE = 2048  # hashed at once; and documents whose bands are written at once
MAX_EXAMPLES = 5
EMPTY_HASH = np.uint64(2**64 - 1)  # the band of a document that has no run


def exact_duplicates_finding(index: CorpusIndex) -> Finding:
    """Documents whose text is that of an earlier one."""
    rows = index.documents
    _, first, document_group = np.unique(rows["key"], return_index=True, return_inverse=True)
    duplicates = np.flatnonzero(first[document_group] != np.arange(len(rows)))
    share = 100 * len(duplicates) / max(1, len(rows))
    byte_share = 100 * int((rows["end"] - rows["begin"])[duplicates].sum()) / max(1, index.num_text_bytes)
    return Finding(
        "corpus", "documents that are exact copies", share, unit="%", n=len(rows), reference=0.0,
        note=f"{len(duplicates):,} documents, {byte_share:.1f} % of the bytes; training leaves them out",
        examples=tuple({"document": index.document_name(int(one)), "copy of": index.document_name(int(first[document_group[one]]))}
                       for one in duplicates[:MAX_EXAMPLES]),
    )  # fmt: skip


class NearDuplicates:
    """Documents that are nearly an earlier one. Exact copies are not told once more."""

    def __init__(self, index: CorpusIndex, folder: Path):
        self._index, self._bands_path = index, folder / "bands.bin"
        self._pending_bands: list[np.ndarray] = []  # bands of documents that are not on disk yet
        draws = np.random.default_rng(0)
        # Multiply and shift (Dietzfelbinger et al. 1997): the upper half of an odd number's multiples.
        self._hash_multipliers = draws.integers(
            2**63, size=(NUM_BANDS * ROWS_PER_BAND, 1), dtype=np.uint64
        ) * np.uint64(2) + np.uint64(1)
        self._signature = np.full(NUM_BANDS * ROWS_PER_BAND, EMPTY_HASH)
        self._carried_words: np.ndarray | None = (
            None  # hashes of the last words of a piece, whose runs go on in the next
        )
        self._exact_duplicates = _exact_duplicate_ids(index)

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        if document in self._exact_duplicates:
            return
        word_ids = hash_words(text)
        word_ids = word_ids if self._carried_words is None else np.concatenate([self._carried_words, word_ids])
        self._carried_words = word_ids[-(SHINGLE_SIZE - 1) :]
        hashes = hash_shingles(word_ids)
        for start in range(0, len(hashes), BATCH_SIZE):
            permuted = (self._hash_multipliers * hashes[start : start + BATCH_SIZE]) >> np.uint64(32)  # [S, n]
            self._signature = np.minimum(self._signature, permuted.min(1))

    def end_document(self, document: int) -> None:
        bands = np.full(NUM_BANDS, EMPTY_HASH)
        if self._signature[0] != EMPTY_HASH:
            for row in self._signature.reshape(NUM_BANDS, ROWS_PER_BAND).T:
                bands = (bands * np.uint64(0x9E3779B97F4A7C15)) ^ row
        self._pending_bands.append(bands)
        if len(self._pending_bands) == BATCH_SIZE:
            self._flush_bands()
        self._signature[:] = EMPTY_HASH
        self._carried_words = None

    def _flush_bands(self) -> None:
        with map_disk_errors(self._bands_path), self._bands_path.open("ab") as file:
            file.write(b"".join(bands.tobytes() for bands in self._pending_bands))
        self._pending_bands.clear()

    def findings(self) -> list[Finding]:
        self._flush_bands()
        near_duplicates: dict[int, tuple[int, float]] = {}
        for earlier, later in sorted(self._candidate_pairs()):
            if (
                later not in near_duplicates
                and (share := jaccard_similarity(self._index, earlier, later)) >= SIMILARITY_THRESHOLD
            ):
                near_duplicates[later] = earlier, share
        rows = self._index.documents
        duplicate_bytes = sum(int(rows["end"][one] - rows["begin"][one]) for one in near_duplicates)
        return [
            Finding(
                "corpus", "documents that are nearly copies", 100 * len(near_duplicates) / max(1, len(rows)), unit="%", n=len(rows),
                reference=0.0, notable=bool(near_duplicates),
                note=f"{len(near_duplicates):,} documents, {100 * duplicate_bytes / max(1, self._index.num_text_bytes):.1f} % of the bytes, of whose runs of "
                f"{SHINGLE_SIZE} words and those of an earlier document {SIMILARITY_THRESHOLD:.0%} or more are in both",
                examples=tuple(
                    {"document": self._index.document_name(one), "copy of": self._index.document_name(other), "alike": f"{share:.0%}"}
                    for one, (other, share) in sorted(near_duplicates.items())[:MAX_EXAMPLES]
                ),
            )
        ]  # fmt: skip

    def _candidate_pairs(self) -> set[tuple[int, int]]:
        """Pairs that share a band: each document with the first that has it, and with the one before."""
        pairs: set[tuple[int, int]] = set()
        if not len(self._index):
            return pairs
        table = np.memmap(self._bands_path, dtype=np.uint64, mode="r").reshape(-1, NUM_BANDS)  # [D, BANDS]
        for band in range(NUM_BANDS):
            column = np.array(table[:, band])
            order = np.argsort(column, kind="stable")
            column = column[order]
            group_starts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
            for start, end in pairwise([*group_starts.tolist(), len(column)]):
                if end - start > 1 and column[start] != EMPTY_HASH:
                    group = order[start:end].tolist()
                    pairs.update((group[0], other) for other in group[1:])
                    pairs.update(pairwise(group))
        return pairs


def _exact_duplicate_ids(index: CorpusIndex) -> frozenset[int]:
    """The documents that are exactly an earlier one."""
    _, first = np.unique(index.documents["key"], return_index=True)
    return frozenset(np.setdiff1d(np.arange(len(index)), first).tolist())


def hash_words(text: str) -> np.ndarray:
    """A hash of each word of a text; of a text that has next to no spaces, of each character."""
    parts = text.encode().split()
    if 20 * len(parts) > len(text):
        return np.fromiter(map(crc32, parts), np.uint64, len(parts))
    return np.frombuffer("".join(text.split()).encode("utf-32-le"), np.uint32).astype(np.uint64)


def hash_shingles(word_hashes: np.ndarray) -> np.ndarray:
    """A hash of each run of `WORDS` of them."""
    length = max(0, len(word_hashes) - SHINGLE_SIZE + 1)
    hashes = np.zeros(length, np.uint64)
    for i in range(SHINGLE_SIZE):
        hashes = (hashes ^ word_hashes[i : i + length]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def jaccard_similarity(index: CorpusIndex, document_a: int, document_b: int) -> float:
    """The runs that two documents share, over those that either has (Broder 1997, section 2)."""
    a, b = (_document_shingles(index, document) for document in (document_a, document_b))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)


def _document_shingles(index: CorpusIndex, document: int) -> np.ndarray:
    return np.unique(hash_shingles(np.concatenate([hash_words(text) for _, text in index.iter_chunks(document)])))
