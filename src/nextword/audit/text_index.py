"""Full-text index of a corpus: exact longest matches of any passage, and the documents that contain it.

index = build_index(["my-texts/"], Path("runs/mine/index"))
for match in index.find_matches(b"some generated text"):
    print(match.start, match.end, index.document_name(match.document))

DIR/text.bin         the documents as training reads them, in UTF-8, each followed by a byte 0xFF
DIR/documents.npy    start and end of each document, the end of its training part, and its source
DIR/suffixes.bin     the start of every character of the training part, sorted by the suffix that starts there (`suffix_array`)
DIR/signposts.bin    the first eight bytes of every 64th suffix
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nextword.audit.pii import format_excerpt
from nextword.audit.suffix_array import (
    DOCUMENT_END,
    PADDING,
    SORT_DEPTH,
    MappedText,
    Query,
    SuffixArray,
    common_prefix_bytes,
    longest_matches,
    sort_suffixes,
    write_sparse_index,
)
from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.text_units import text_width
from nextword.data.builtin_datasets import find_sources
from nextword.data.corpus import Corpus
from nextword.data.issues import IssueLog
from nextword.data.readers import SourceFile
from nextword.data.scan import HeldOutDocuments, SourceReader, are_unchanged, report_issues

FORMAT_VERSION = 1
MIN_MATCH_WIDTH = 24  # columns (`text_width`) from which on matches are returned by default
CHUNK_BYTES = 2**20  # bytes of a document read at once
EXCERPT_MARGIN = 64  # bytes around an excerpt in which PII is searched
# The bytes begin … learned − 1 of a document are its training part: all, none (held out) or the first nine tenths.
DOCUMENT_DTYPE = np.dtype(
    [("begin", "<u8"), ("end", "<u8"), ("learned", "<u8"), ("key", "S32"), ("source", "<u4"), ("line", "<u4")]
)


class Match(NamedTuple):
    """Bytes start … end − 1 of a query, which a document contains from its byte `offset` on."""

    start: int
    end: int
    document: int
    offset: int


class CorpusIndex:
    """A searchable corpus. `build_index` makes one, `CorpusIndex.open` opens it.

    Attributes:
        documents: one `DOCUMENT_DTYPE` row per document, in the order of the corpus.
        has_held_out: whether documents held out from training are known. Only the training part is searched.
        problems: the number of issues found while reading the files, by kind.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path, self.metadata = path, metadata
        self.text = MappedText(path / "text.bin")
        self.documents = np.asarray(np.load(path / "documents.npy", mmap_mode="r", allow_pickle=False))
        positions = np.asarray(np.memmap(path / "suffixes.bin", dtype=np.dtype(metadata["places"]), mode="r"))
        sparse_index = np.asarray(np.memmap(path / "signposts.bin", dtype="<u8", mode="r"))
        self.suffix_array = SuffixArray(self.text, positions, sparse_index)
        self.has_held_out: bool = metadata["held_out"]
        self.problems: dict[str, int] = metadata["problems"]

    @classmethod
    def open(cls, path: Path) -> "CorpusIndex":
        """Open an index and verify every file against its SHA-256.

        Raises:
            CorruptFileError: a file differs from the manifest.
            NextwordError: the directory is not an index, or one of another version.
        """
        if fs.read_manifest(path).get("kind") != "index":
            raise NextwordError(f"{path}: not a corpus index; choose another directory")
        metadata = fs.verify_manifest(path)
        if metadata.get("version") != FORMAT_VERSION:
            raise NextwordError(f"{path}: written by another version of nextword; remove it to rebuild it")
        try:
            return cls(path, metadata)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise CorruptFileError(f"{path}: not a readable corpus index ({error})") from error

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def num_text_bytes(self) -> int:
        """The bytes of all documents."""
        return len(self.text) - len(self)

    # ------------------------------------------------------------ documents

    def document_name(self, document: int) -> str:
        """The file of a document, with PII masked, and its line for a row of a table."""
        row = self.documents[document]
        name = format_excerpt(self.metadata["sources"][row["source"]]["name"])
        return f"{name} line {row['line']:,}" if row["line"] else name

    def byte_range(self, document: int) -> tuple[int, int]:
        """The first byte of a document in the text, and the one after its last."""
        row = self.documents[document]
        return int(row["begin"]), int(row["end"])

    def read_bytes(self, document: int, start: int = 0, count: int | None = None) -> bytes:
        """Bytes of a document from `start` on, by default to its end."""
        begin, end = self.byte_range(document)
        stop = end if count is None else min(end, begin + start + count)
        return self.text.bytes[begin + start : stop].tobytes()

    def excerpt(self, document: int, start: int, end: int) -> str:
        """Bytes start … end − 1 of a document as `format_excerpt` prints them."""
        before = min(start, EXCERPT_MARGIN)
        parts = ((start - before, before), (start, end - start), (end, EXCERPT_MARGIN))
        texts = [self.read_bytes(document, *part).decode("utf-8", "ignore") for part in parts]
        return format_excerpt(texts[1], before=texts[0], after=texts[2])

    def iter_chunks(self, document: int, trained: bool = False) -> Iterator[tuple[int, str]]:
        """Chunks of a document, or of its training part, of at most `CHUNK_BYTES` with their byte offsets, split after a line
        or word where possible."""
        begin, end = self.byte_range(document)
        end = int(self.documents["learned"][document]) if trained else end
        offset = 0
        while offset < end - begin:
            data = self.read_bytes(document, offset, min(CHUNK_BYTES, end - begin - offset))
            cuts = [cut for mark in (b"\n", b" ") if (cut := data.rfind(mark) + 1) > len(data) // 2]
            if offset + len(data) < end - begin and cuts:
                data = data[: cuts[0]]
            text = data.decode("utf-8", "ignore")  # without the first bytes of a character that the cut splits
            yield offset, text
            offset += len(text.encode())

    def first_copies(self) -> np.ndarray:
        """For each document, the first document with the same text: itself, unless it is an exact duplicate [D]."""
        _, first, group = np.unique(self.documents["key"], return_index=True, return_inverse=True)
        return first[group]

    def percentages(self, documents: Iterable[int]) -> tuple[float, float]:
        """The percentage of all documents and of all bytes in some documents."""
        sizes = [end - begin for begin, end in map(self.byte_range, documents)]
        return 100 * len(sizes) / max(1, len(self)), 100 * sum(sizes) / max(1, self.num_text_bytes)

    # ------------------------------------------------------------ look-ups

    def find_matches(self, text: bytes | str, min_bytes: int | None = None) -> list[Match]:
        """All maximal matches of a text: passages in the corpus that no longer passage in it covers.

        Every character that is in some match of `min_bytes` (default: `MIN_MATCH_WIDTH` columns) or more is covered by its
        longest one. A passage with several occurrences is returned once. Matches start and end between characters.
        """
        query = Query(text)
        starts = np.flatnonzero(is_character_start(np.frombuffer(query.data, np.uint8)))
        if not len(starts) or not len(self.suffix_array):
            return []
        lengths, positions = longest_matches(self.suffix_array, query, starts)
        for _ in range(3):  # drop the first bytes of a character that continues differently in the corpus
            lengths -= (lengths > 0) & ~is_character_start(self.text.bytes[positions + lengths])
        ends = starts + lengths
        is_maximal = ends > np.maximum.accumulate(np.append(-1, ends[:-1]))
        kept = np.flatnonzero(is_maximal & (lengths >= (MIN_MATCH_WIDTH if min_bytes is None else max(1, min_bytes))))
        if min_bytes is None:  # no character has more columns than bytes
            parts = (query.data[starts[i] : ends[i]].decode("utf-8", "replace") for i in kept)
            kept = kept[np.fromiter((text_width(part) >= MIN_MATCH_WIDTH for part in parts), bool, len(kept))]
        documents = self._document_ids_at(positions[kept])
        offsets = positions[kept] - self.documents["begin"][documents].astype(np.int64)
        return [Match(*row) for row in np.stack([starts[kept], ends[kept], documents, offsets], axis=1).tolist()]

    def longest_match(self, text: bytes | str) -> Match | None:
        """The longest passage of a text that is in the corpus; None if no character is."""
        return max(self.find_matches(text, 1), key=lambda match: match.end - match.start, default=None)

    def find_documents(self, passage: bytes | str) -> list[int]:
        """The documents that contain a whole passage verbatim, in their order."""
        query = Query(passage)
        if not query.data:
            return []
        low, high = self.suffix_array.prefix_range(query.data)
        found: set[int] = set()
        for start in range(low, high, 2**16):
            positions = self.suffix_array.positions_at(slice(start, min(high, start + 2**16)))
            if len(query.data) > SORT_DEPTH:
                positions = positions[common_prefix_bytes(self.text, query, positions, 0) >= len(query.data)]
            found.update(np.unique(self._document_ids_at(positions)).tolist())
        return sorted(found)

    def _document_ids_at(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.documents["begin"], positions.astype(np.uint64), side="right") - 1


def is_character_start(data: np.ndarray) -> np.ndarray:
    """Whether each byte starts a character of UTF-8: continuation bytes are 10xxxxxx."""
    return (data & 0xC0) != 0x80


# ---------------------------------------------------------------- building


def build_index(
    corpora: Sequence[str | Path],
    out: Path,
    *,
    training_corpus: Corpus | None = None,
    text_column: str | None = None,
    console: Console,
) -> CorpusIndex:
    """Index files, directories and built-in corpora in the directory `out`, or reuse its index if the texts are unchanged.

    Memory does not grow with the corpus. On disk, an index takes about five times the bytes of an English text, three times
    those of a Russian one.

    Args:
        corpora: the files, directories and names of built-in corpora.
        out: the directory of the index.
        training_corpus: the shards that a model was trained on. If they were prepared from the same text, documents held out
            from training are known and not searched.
        text_column: the column of tables that holds the text.
        console: receives progress and messages.

    Raises:
        UsageError: a path does not exist, or `out` holds something else.
        NextwordError: the corpora contain no text.
    """
    out, issues = Path(out), IssueLog()
    # Every run on the same text can share an index.
    prepared = None if training_corpus is None else _texts_digest(_training_sources(training_corpus))
    settings = {"text_column": text_column, "prepared": prepared}
    with fs.output_lock(out):
        sources = find_sources(corpora, issues, text_column, exclude=out)
        index = _open_if_unchanged(out, settings, sources, console)
        if index is not None:
            return index
        fs.build_directory(
            out, lambda directory: _write_index(directory, sources, settings, training_corpus, issues, console)
        )
    return CorpusIndex.open(out)


def _open_if_unchanged(
    out: Path, settings: dict[str, Any], sources: list[SourceFile], console: Console
) -> CorpusIndex | None:
    """The index at `out` if it was built from the same text with the same settings.

    Raises:
        UsageError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = fs.read_manifest(out) if (out / fs.MANIFEST).is_file() else {}
    if manifest.get("kind") != "index":
        raise UsageError(f"{out}: exists and is not an index; choose another directory for it")
    if manifest.get("version") != FORMAT_VERSION or manifest.get("asked") != settings:
        return None
    if not are_unchanged(sources, manifest["sources"]):
        console.info(f"{out}: the text has changed; rebuilding the index")
        return None
    try:
        return CorpusIndex.open(out)
    except CorruptFileError as error:
        console.info(f"{error}\nThe index is damaged; rebuilding it")
        return None


def _training_sources(corpus: Corpus) -> list[dict[str, Any]]:
    """The source files of a corpus, without those of a user's own validation and test set."""
    _, *num_own = corpus.manifest["settings"].get("held_out", (None, 0, 0))
    return corpus.manifest["sources"][sum(num_own) :]


def _texts_digest(sources: list[dict[str, Any]]) -> str:
    """A hash of all texts of a corpus."""
    return sha256(json.dumps([source["texts"] for source in sources]).encode()).hexdigest()


def _write_index(
    directory: Path,
    sources: list[SourceFile],
    settings: dict[str, Any],
    training_corpus: Corpus | None,
    issues: IssueLog,
    console: Console,
) -> None:
    """Write the files of an index into an empty directory."""
    spooled = directory / "rows.bin"
    normalize = training_corpus is not None and training_corpus.tokenizer.normalization == "nfc"
    with (
        fs.map_disk_errors(directory),
        (directory / "text.bin").open("wb") as text_file,
        spooled.open("wb") as row_file,
    ):
        reader = SourceReader(sources, "reading", console.progress, normalize)
        for source, hashed in reader.documents(issues):
            begin = text_file.tell()
            for chunk in hashed:
                text_file.write(chunk.encode())
            end = text_file.tell()
            row = (begin, end, end, hashed.finalize().hex(), source, hashed.document.line or 0)
            row_file.write(np.array([row], DOCUMENT_DTYPE).tobytes())
            text_file.write(bytes([DOCUMENT_END]))
        report_issues(issues, not row_file.tell(), console.info)
        text_file.write(bytes([DOCUMENT_END]) * PADDING)
    has_held_out = settings["prepared"] == _texts_digest(reader.found)
    if settings["prepared"] and not has_held_out:
        console.info("the corpus is not the training text of the model: all of it is searched as training text")
    text = MappedText(directory / "text.bin")
    dtype = np.dtype("<u4" if len(text) < 2**32 else "<u8")
    suffixes = directory / "suffixes.bin"
    with fs.map_disk_errors(directory):
        rows = np.memmap(spooled, DOCUMENT_DTYPE, "r+")
        if has_held_out and training_corpus is not None:
            _mark_held_out(rows, text, training_corpus)
        np.save(directory / "documents.npy", rows)
        count, num_documents = _write_suffix_starts(suffixes, text, rows, dtype), len(rows)
        del rows  # Windows removes no file that is mapped
        spooled.unlink()
        sort_suffixes(text, suffixes, count, dtype, partial(console.progress, "indexing"))
        write_sparse_index(text, suffixes, directory / "signposts.bin", dtype)
        manifest = {
            "kind": "index",
            "version": FORMAT_VERSION,
            "asked": settings,
            "held_out": has_held_out,
            "documents": num_documents,
            "places": dtype.str,
            "problems": dict(issues.counts_by_kind),
            "sources": reader.found,
        }
        fs.write_manifest(directory, manifest)


def _mark_held_out(rows: np.ndarray, text: MappedText, corpus: Corpus) -> None:
    """Set where the training part of each document ends."""
    keys, (begins, ends) = [row["key"].decode() for row in rows], (rows["begin"], rows["end"])
    sizes = dict(zip(keys, (ends - begins).tolist(), strict=True))
    recorded = corpus.manifest.get("held_out")
    version_1 = HeldOutDocuments.of_version_1(sorted(sizes), sum(sizes.values()))
    held_out = version_1 if recorded is None else HeldOutDocuments(**recorded)
    for row, key in zip(rows, keys, strict=True):
        part = held_out.part_of(key)
        if part == "cut":
            row["learned"] = _training_end(text, int(row["begin"]), int(row["end"]), held_out)
        elif part != "train":
            row["learned"] = row["begin"]


def _iter_character_starts(text: MappedText, start: int, end: int) -> Iterator[np.ndarray]:
    """Positions of the characters in a part of the text, in chunks, without document ends."""
    for offset in range(start, end, CHUNK_BYTES):
        chunk = text.bytes[offset : min(end, offset + CHUNK_BYTES)]
        yield offset + np.flatnonzero(is_character_start(chunk) & (chunk != DOCUMENT_END))


def _training_end(text: MappedText, begin: int, end: int, held_out: HeldOutDocuments) -> int:
    """Where the training part of a document ends that is cut."""
    _, remaining, *_ = held_out.cut_points(sum(map(len, _iter_character_starts(text, begin, end))))
    for starts in _iter_character_starts(text, begin, end):
        if remaining < len(starts):
            return int(starts[remaining])
        remaining -= len(starts)
    return end


def _write_suffix_starts(path: Path, text: MappedText, rows: np.ndarray, dtype: np.dtype[Any]) -> int:
    """Write the start of every character of the training part, in the order of the text; return their number."""
    held_out = rows[rows["learned"] < rows["end"]]
    begins, ends = [0, *held_out["end"].tolist()], [*held_out["learned"].tolist(), len(text)]
    with path.open("wb") as file:
        for begin, end in zip(begins, ends, strict=True):
            for starts in _iter_character_starts(text, begin, end):
                file.write(starts.astype(dtype).tobytes())
        return file.tell() // dtype.itemsize
