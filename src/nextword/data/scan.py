"""The first reading of a corpus, and the readings after it: what is there, which of it is new, where each document goes.

What is remembered of a document is one byte, and of every source a few facts, so that a corpus may be larger than memory.
"""

import bisect
import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from nextword.common.errors import DiskFullError, NextwordError
from nextword.common.fs import sha256_file
from nextword.data.decoding import replace_surrogates
from nextword.data.documents import Document, IssueLog, SourceFile
from nextword.data.provenance import DocumentSource
from nextword.data.shards import Split

ProgressCallback = Callable[[str, int, int], None]  # stage, bytes done, bytes in all

MIN_DOCUMENTS_TO_SPLIT = 20  # documents; with fewer the validation part is the last tenth of each

# By its hash, a document is in the last 10 %, 5 % and 1 %, or in none of them; the parts are nested, so that a
# growing corpus only ever moves documents from validation to training.
DUPLICATE, TRAIN, HASH_10_PERCENT, HASH_5_PERCENT, HASH_1_PERCENT = range(5)


def file_size_and_mtime(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None where the file cannot be had."""
    try:
        status = path.stat()
    except OSError:  # the reader of the file reports it
        return None
    return status.st_size, status.st_mtime_ns


def is_unchanged(source: SourceFile, recorded: dict[str, Any]) -> bool:
    """Whether a file is the one that a survey wrote these facts of."""
    now = file_size_and_mtime(source.path)
    if now is None or source.name != recorded["name"] or now[0] != recorded["bytes"]:
        return False
    return now[1] == recorded["mtime_ns"] or (
        recorded["sha256"] is not None and sha256_file(source.path) == recorded["sha256"]
    )


@dataclass
class CorpusScan:
    """What the first reading found: `levels` has a byte for every document, `lengths` a number for the first few."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    levels: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    unique: int = 0
    duplicates: int = 0
    size: int = 0  # bytes of text, duplicates left out
    smallest: tuple[int, int] = (2**64, 0)  # the hash of the document that has the smallest, and its place

    def add(self, key: bytes, is_new: bool, num_characters: int, num_bytes: int) -> None:
        if not is_new:
            self.levels.append(DUPLICATE)
            self.duplicates += 1
            return
        self.smallest = min(self.smallest, (_key_to_int(key), len(self.levels)))
        self.levels.append(_split_level(key))
        self.unique += 1
        self.size += num_bytes
        if len(self.lengths) < MIN_DOCUMENTS_TO_SPLIT:
            self.lengths.append(num_characters)

    def report(self, problems: IssueLog, log: Callable[[str], None]) -> None:
        """Say what was wrong with the text. Raises `NextwordError` where there is none at all, with what was there."""
        for line in problems.summary_lines():
            log(line)
        if not self.unique:
            raise NextwordError(
                "no text was found. "
                + "\n".join(["What was there:", *problems.summary_lines()] if problems.issues else [])
                + "\nName files or folders of .txt, .md, .jsonl, .csv, .tsv or .parquet, plain, .gz or .zst"
            )

    def split_for_index(self, index: int) -> Split | Literal["both", "neither"]:
        """Where a document goes, by its place in the corpus."""
        level = self.levels[index]
        if level == DUPLICATE:
            return "neither"
        if self.unique < MIN_DOCUMENTS_TO_SPLIT:
            return "both"
        # The smallest hash is in validation already, unless nothing is.
        return "validation" if level >= self.validation_level or index == self.smallest[1] else "train"

    def split_for_key(self, key: bytes) -> Split | Literal["both"]:
        """Where the text of a hash goes, whichever of its copies it is."""
        if self.unique < MIN_DOCUMENTS_TO_SPLIT:
            return "both"
        return (
            "validation"
            if _split_level(key) >= self.validation_level or _key_to_int(key) == self.smallest[0]
            else "train"
        )

    @property
    def validation_level(self) -> int:
        """From which level on a document is held out."""
        return (
            HASH_10_PERCENT if self.size < 10_000_000 else HASH_5_PERCENT if self.size < 100_000_000 else HASH_1_PERCENT
        )


def _key_to_int(key: bytes) -> int:
    """The hash of a document as a number, by which it is drawn."""
    return int.from_bytes(key[:8], "big")


def _split_level(key: bytes) -> int:
    return TRAIN + sum(_key_to_int(key) < 2**64 * share // 100 for share in (10, 5, 1))


class DocumentObserver(Protocol):
    """Sees the documents go by at the first reading."""

    def begin(self, source: int, document: Document) -> None: ...

    def add(self, piece: str) -> None: ...

    def end(self, key: bytes) -> None: ...


class ByteProgress:
    """Tells how far one reading of the sources has come, in bytes of their files."""

    def __init__(self, stage: str, sources: Sequence[SourceFile], progress: ProgressCallback):
        self._stage, self._progress = stage, progress
        self._file_sizes = [(file_size_and_mtime(source.path) or (0, 0))[0] for source in sources]
        self._total_bytes = sum(self._file_sizes)
        self._file_index = self._finished_bytes = self._file_bytes = self._reported_bytes = 0

    def advance(self, num_bytes: int) -> None:
        """So many bytes of text went by. A compressed file holds more than its size, and is not counted past that."""
        self._file_bytes = min(self._file_bytes + num_bytes, self._file_sizes[self._file_index])
        if self._finished_bytes + self._file_bytes >= self._reported_bytes + 2**20:
            self._report()

    def end_file(self) -> None:
        self._finished_bytes, self._file_bytes, self._file_index = (
            self._finished_bytes + self._file_sizes[self._file_index],
            0,
            self._file_index + 1,
        )
        if self._file_index == len(self._file_sizes):
            self._report()

    def _report(self) -> None:
        self._reported_bytes = self._finished_bytes + self._file_bytes
        self._progress(self._stage, self._reported_bytes, self._total_bytes)


class HashedDocument:
    """A document's pieces, hashed and measured as they go by."""

    def __init__(self, document: Document, byte_progress: ByteProgress):
        self._document, self._byte_progress = document, byte_progress
        self._hash = hashlib.blake2b(digest_size=16)
        self._chunk_starts: list[int] = []  # of each piece, in characters
        self.num_characters = self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for piece in self._document.chunks:
            data = piece.encode()
            self._hash.update(data)
            self._chunk_starts.append(self.num_characters)
            self.num_characters += len(piece)
            self.num_bytes += len(data)
            self._byte_progress.advance(len(data))
            yield piece

    def finalize(self) -> bytes:
        """Read what is left; the hash of the whole text."""
        for _ in self:
            pass
        return self._hash.digest()

    def chunk_counts(self) -> tuple[int, int]:
        """How many pieces the text has, and how many begin in its first nine tenths."""
        return len(self._chunk_starts), bisect.bisect_left(self._chunk_starts, self.num_characters * 9 // 10)


@contextlib.contextmanager
def dedup_index(path: Path) -> Iterator[Callable[[bytes], bool]]:
    """Tells of each key whether it is new. The keys lie on disk, so that memory stays flat however many there are."""
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as table:
            table.execute("PRAGMA journal_mode=OFF")  # a crash throws the table away
            table.execute("PRAGMA synchronous=OFF")
            table.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
            table.execute("BEGIN")
            yield lambda key: table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1
        path.unlink()
    except sqlite3.Error as error:
        free = shutil.disk_usage(path.parent).free
        kind = DiskFullError if "full" in str(error) else NextwordError
        raise kind(f"{path}: {error} ({free:,} bytes free). Make room, and run the same command again") from error


def scan_source(
    source: SourceFile, problems: IssueLog, byte_progress: ByteProgress, on_document: Callable[[bytes, HashedDocument], None], source_index: int = 0,
    observer: DocumentObserver | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Read one source for the first time, and `add` the hash and the measures of each document; the source's facts."""
    size, mtime_ns = file_size_and_mtime(source.path) or (None, None)
    texts_hash = hashlib.blake2b(digest_size=16)
    for document in source.read(problems):
        hashed = HashedDocument(document, byte_progress)
        if observer is not None:
            observer.begin(source_index, document)
            for piece in hashed:
                observer.add(piece)
        key = hashed.finalize()
        if observer is not None:
            observer.end(key)
        texts_hash.update(key)
        on_document(key, hashed)
    byte_progress.end_file()
    try:
        file_hash = sha256_file(source.path)
    except OSError:  # its reader has reported it
        file_hash = None
    source_info = {"name": replace_surrogates(source.name), "bytes": size, "mtime_ns": mtime_ns, "sha256": file_hash}
    return {**source_info, "texts": texts_hash.hexdigest()}


def scan_corpus(
    sources: list[SourceFile], directory: Path, problems: IssueLog, progress: ProgressCallback, log: Callable[[str], None],
    observer: DocumentObserver | None = None,
) -> CorpusScan:  # fmt: skip
    """The first reading: what is there, what of it is new, and which split each document belongs to.

    Raises:
        NextwordError: there is no text at all; with what was there.
    """
    scan, byte_progress = CorpusScan(), ByteProgress("reading", sources, progress)
    with dedup_index(directory / "seen.sqlite") as is_new:
        for source_index, source in enumerate(sources):
            source_info = scan_source(
                source, problems, byte_progress, lambda key, text: scan.add(key, is_new(key), text.num_characters, text.num_bytes), source_index,
                observer,
            )  # fmt: skip
            scan.sources.append(source_info)
    scan.report(problems, log)
    return scan


def iter_split_texts(
    sources: Sequence[SourceFile],
    scan: CorpusScan,
    stage: str,
    progress: ProgressCallback,
    first_source: int = 0,
    document_index: int = 0,
) -> Iterator[tuple[Split, str | DocumentSource]]:
    """A later reading: each new document's pieces with the split they belong to, and its origin where it ends.

    `sources` are those of the survey from the one numbered `first` on, whose first document has the number `place`.
    Raises `NextwordError` where a file no longer holds the texts that the survey found.
    """
    byte_progress = ByteProgress(stage, sources, progress)
    lengths = iter(scan.lengths[document_index - scan.levels.count(DUPLICATE, 0, document_index) :])
    recorded_sources = scan.sources[first_source : first_source + len(sources)]
    for source_index, (source, recorded) in enumerate(zip(sources, recorded_sources, strict=True), start=first_source):
        texts_hash = hashlib.blake2b(digest_size=16)
        for document in source.read(IssueLog()):  # what is wrong was told the first time
            hashed = HashedDocument(document, byte_progress)
            split = scan.split_for_index(document_index) if document_index < len(scan.levels) else "neither"
            document_source = DocumentSource(source_index, document.line)
            if split == "both":
                yield from _hold_out_last_tenth(hashed, next(lengths), document_source)
            elif split != "neither":
                for piece in hashed:
                    yield split, piece
                yield split, document_source
            texts_hash.update(hashed.finalize())
            document_index += 1
        byte_progress.end_file()
        if texts_hash.hexdigest() != recorded["texts"]:
            raise NextwordError(f"{source.path}: changed while it was read; run the same command again when it rests")


def _hold_out_last_tenth(
    chunks: Iterable[str], num_characters: int, document_source: DocumentSource
) -> Iterator[tuple[Split, str | DocumentSource]]:
    """The pieces of a document of so many characters, cut at nine tenths of them."""
    train_remaining = num_characters * 9 // 10
    for piece in chunks:
        if train_remaining > 0:
            yield "train", piece[:train_remaining]
            if train_remaining <= len(piece):
                yield "train", document_source
        if train_remaining < len(piece):
            yield "validation", piece[max(train_remaining, 0) :]
        train_remaining -= len(piece)
    yield "validation", document_source
