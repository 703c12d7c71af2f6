"""Duplicate and near-duplicate documents of a corpus.

Near duplicates share 80 % of the shingles of five words that either has (Jaccard similarity, the "resemblance" of Broder
1997). Candidates come from MinHash signatures cut into bands (Leskovec, Rajaraman and Ullman 2014, section 3.4); the
similarity of each pair is then computed exactly. Bands are kept on disk, 160 bytes per document. Shapes: S signature
values, n shingles of a chunk, D documents, B bands.
"""

from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np

from nextword.audit.findings import MAX_EXAMPLES, Finding
from nextword.audit.text_index import CorpusIndex
from nextword.common.fs import map_disk_errors

SIMILARITY_THRESHOLD = 0.8
SHINGLE_SIZE = 5  # words
NUM_BANDS, ROWS_PER_BAND = 20, 6  # a pair of similarity 0.8 shares a band with probability 1 − (1 − 0.8⁶)²⁰ = 0.998
BATCH_SIZE = 2048  # shingles hashed at once
WRITE_SIZE = 2048  # documents whose bands are written at once
EMPTY_HASH = np.uint64(2**64 - 1)  # the band of a document without shingles
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def exact_duplicates_finding(index: CorpusIndex) -> Finding:
    """The share of documents whose text is that of an earlier one."""
    original = index.first_copies()
    duplicates = np.flatnonzero(original != np.arange(len(index)))
    share, byte_share = index.percentages(duplicates.tolist())
    note = f"{len(duplicates):,} documents, {byte_share:.1f} % of the bytes; preparation removes exact duplicates"
    examples = tuple(
        {"document": index.document_name(i), "duplicate of": index.document_name(int(original[i]))}
        for i in duplicates[:MAX_EXAMPLES].tolist()
    )
    return Finding(
        "corpus", "exact duplicates", share, unit="%", n=len(index), reference=0.0, note=note, examples=examples
    )


class NearDuplicates:
    """Documents that nearly equal an earlier one, without exact duplicates. A `DocumentVisitor`.

    Args:
        directory: an existing directory for the file of bands.
    """

    def __init__(self, index: CorpusIndex, directory: Path):
        self._index, self._path = index, directory / "bands.bin"
        self._is_exact_duplicate = index.first_copies() != np.arange(len(index))
        # Multiply-shift hashing (Dietzfelbinger et al. 1997): the upper half of the product with a random odd number.
        draws = np.random.default_rng(0).integers(2**63, size=(NUM_BANDS * ROWS_PER_BAND, 1), dtype=np.uint64)
        self._multipliers = draws * np.uint64(2) + np.uint64(1)
        self._signature = np.full(NUM_BANDS * ROWS_PER_BAND, EMPTY_HASH)
        self._carried_words = np.zeros(0, np.uint64)  # the last words of a chunk, whose shingles end in the next
        self._unwritten = bytearray()  # bands of the last documents

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        if self._is_exact_duplicate[document]:
            return
        words = np.concatenate([self._carried_words, hash_words(text)])
        self._carried_words = words[-(SHINGLE_SIZE - 1) :]
        shingles = hash_shingles(words)
        for start in range(0, len(shingles), BATCH_SIZE):
            hashes = (self._multipliers * shingles[start : start + BATCH_SIZE]) >> np.uint64(32)  # [S, n]
            self._signature = np.minimum(self._signature, hashes.min(1))

    def end_document(self, document: int) -> None:
        bands = np.full(NUM_BANDS, EMPTY_HASH)
        if self._signature[0] != EMPTY_HASH:
            for row in self._signature.reshape(NUM_BANDS, ROWS_PER_BAND).T:
                bands = (bands * HASH_FACTOR) ^ row
        self._unwritten += bands.tobytes()
        if len(self._unwritten) >= WRITE_SIZE * bands.nbytes:
            self._write_bands()
        self._signature[:] = EMPTY_HASH
        self._carried_words = np.zeros(0, np.uint64)

    def _write_bands(self) -> None:
        with map_disk_errors(self._path), self._path.open("ab") as file:
            file.write(self._unwritten)
        self._unwritten.clear()

    def findings(self) -> list[Finding]:
        index = self._index
        originals: dict[int, tuple[int, float]] = {}
        for earlier, later in sorted(self._candidate_pairs()):
            similarity = 0.0 if later in originals else jaccard_similarity(index, earlier, later)
            if similarity >= SIMILARITY_THRESHOLD:
                originals[later] = earlier, similarity
        share, byte_share = index.percentages(originals)
        note = (
            f"{len(originals):,} documents, {byte_share:.1f} % of the bytes, with a Jaccard similarity of "
            f"{SIMILARITY_THRESHOLD} or more to an earlier document, over shingles of {SHINGLE_SIZE} words"
        )
        examples = tuple(
            {
                "document": index.document_name(document),
                "near duplicate of": index.document_name(original),
                "similarity": f"{similarity:.0%}",
            }
            for document, (original, similarity) in sorted(originals.items())[:MAX_EXAMPLES]
        )
        flagged = bool(originals)
        return [Finding("corpus", "near duplicates", share, None, None, "%", len(index), 0.0, flagged, note, examples)]

    def _candidate_pairs(self) -> set[tuple[int, int]]:
        """Pairs that share a band: each document with the first that has the band and with the one before it."""
        pairs: set[tuple[int, int]] = set()
        if not len(self._index):
            return pairs
        self._write_bands()
        bands = np.memmap(self._path, np.uint64, mode="r").reshape(-1, NUM_BANDS)  # [D, B]
        for band in range(NUM_BANDS):
            column = np.array(bands[:, band])
            order = np.argsort(column, kind="stable")
            column = column[order]
            group_starts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
            for start, end in pairwise([*group_starts.tolist(), len(column)]):
                if end - start > 1 and column[start] != EMPTY_HASH:
                    group = order[start:end].tolist()
                    pairs.update((group[0], other) for other in group[1:])
                    pairs.update(pairwise(group))
        return pairs


def hash_words(text: str) -> np.ndarray:
    """A hash per word; per character where a text has hardly any spaces (Chinese, Thai)."""
    words = text.encode().split()
    if 20 * len(words) > len(text):
        return np.fromiter(map(crc32, words), np.uint64, len(words))
    return np.frombuffer("".join(text.split()).encode("utf-32-le"), np.uint32).astype(np.uint64)


def hash_shingles(word_hashes: np.ndarray) -> np.ndarray:
    """A hash per run of `SHINGLE_SIZE` words."""
    length = max(0, len(word_hashes) - SHINGLE_SIZE + 1)
    hashes = np.zeros(length, np.uint64)
    for i in range(SHINGLE_SIZE):
        hashes = (hashes ^ word_hashes[i : i + length]) * HASH_FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes


def jaccard_similarity(index: CorpusIndex, first: int, second: int) -> float:
    """The number of shingles that two documents share, over the number that either has."""
    a, b = (
        np.unique(hash_shingles(np.concatenate([hash_words(text) for _, text in index.iter_chunks(document)])))
        for document in (first, second)
    )
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)
