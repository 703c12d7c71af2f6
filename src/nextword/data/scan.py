"""Reading a corpus: deduplication, the choice of the validation and the test set, and progress.

The first reading finds out what there is. What it keeps of a document is on disk, so that a corpus may be larger than
memory. Later readings go through the same documents and know the split of each.
"""

import contextlib
import hashlib
import math
import shutil
import sqlite3
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from nextword.common.errors import DiskFullError, NextwordError
from nextword.common.fs import sha256_file
from nextword.data.corpus import SPLITS, DocumentSource, Split, SplitText
from nextword.data.issues import IssueLog, replace_surrogates
from nextword.data.readers import Document, SourceFile

ProgressCallback = Callable[[str, int, int], None]  # stage, bytes done, total bytes

MIN_DOCUMENTS_TO_SPLIT = 20  # with fewer, the end of each document is held out
TEST_BYTES = 5_000_000  # of text, from which on a test set is held out besides the validation set
MAX_TEST_FRACTION = 0.05

Part = Literal["neither", "train", "validation", "test", "cut"]  # of a document: a duplicate is in neither set
PARTS: tuple[Part, ...] = ("neither", "train", "validation", "test", "cut")


def file_size_and_mtime(path: Path) -> tuple[int, int] | tuple[None, None]:
    """Size in bytes and modification time in ns; None if the file cannot be accessed (its reader records that)."""
    try:
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    except OSError:
        return None, None


def are_unchanged(sources: Sequence[SourceFile], recorded: Sequence[dict[str, Any]]) -> bool:
    """Whether files are those that a scan has recorded: by name, size, and modification time or SHA-256."""

    def is_unchanged(source: SourceFile, recorded: dict[str, Any]) -> bool:
        size, mtime_ns = file_size_and_mtime(source.path)
        if size is None or (source.name, size) != (recorded["name"], recorded["bytes"]):
            return False
        sha256 = recorded["sha256"]
        return recorded["mtime_ns"] == mtime_ns or (sha256 is not None and sha256 == sha256_file(source.path))

    return len(sources) == len(recorded) and all(map(is_unchanged, sources, recorded))


class DocumentTable:
    """The unique documents of a corpus by the hash of their text, on disk.

    Args:
        connection: an empty database.
    """

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        connection.execute("CREATE TABLE documents (key BLOB PRIMARY KEY, bytes INTEGER) WITHOUT ROWID")
        connection.execute("BEGIN")

    def add(self, key: bytes, num_bytes: int) -> bool:
        """Add a document, with 0 bytes if its split is given, and return whether it is new."""
        statement = "INSERT OR IGNORE INTO documents VALUES (?, ?)"
        return self._connection.execute(statement, (key, num_bytes)).rowcount == 1

    def is_own(self, key: bytes) -> bool:
        """Whether the split of a document is given."""
        query = "SELECT count(*) FROM documents WHERE key = ? AND bytes = 0"
        return bool(self._connection.execute(query, (key,)).fetchone()[0])

    def in_hash_order(self, min_bytes: float, max_bytes: float) -> Iterator[tuple[bytes, int]]:
        """Hash and bytes of the documents with more than `min_bytes`, and at most `max_bytes`."""
        query = "SELECT * FROM documents WHERE bytes > ? AND bytes <= ? ORDER BY key"
        return self._connection.execute(query, (min_bytes, max_bytes))


@dataclass
class HeldOutDocuments:
    """Which documents of a text are the validation and the test set of a corpus. Hashes are hexadecimal.

    Attributes:
        fractions: the shares of the validation and the test set that were asked for; 0 for a set of the user's own.
        ends: the last hash in the validation set, and the last one in the test set; "" if it has no whole document.
        skipped: hashes up to these ends of documents that were too long to be held out.
        cut: hashes of documents whose end is held out.
        repeated: hashes of documents that are in a set of the user's own, too, and are therefore not trained on.
    """

    fractions: tuple[float, float] = (0.0, 0.0)
    ends: tuple[str, str] = ("", "")
    skipped: list[str] = field(default_factory=list[str])
    cut: list[str] = field(default_factory=list[str])
    repeated: list[str] = field(default_factory=list[str])

    def part_of(self, key: str) -> Part:
        """The part of the corpus that a document belongs to by its hash, whichever of its copies it is."""
        by_order: Part = "validation" if key <= self.ends[0] else "test" if key <= self.ends[1] else "train"
        return self._exceptions.get(key, by_order)

    @cached_property
    def _exceptions(self) -> dict[str, Part]:
        lists: list[tuple[list[str], Part]] = [(self.skipped, "train"), (self.cut, "cut"), (self.repeated, "neither")]
        return {key: part for keys, part in lists for key in keys}

    def cut_points(self, num_characters: int) -> tuple[int, int, int, int]:
        """Where the training, the validation and the test part of a cut document begin, and its end, in characters."""
        shares = [Fraction(str(fraction)) for fraction in self.fractions]
        validation, test = (math.floor(num_characters * (1 - share)) for share in (sum(shares), shares[1]))
        return 0, validation, test, num_characters

    @classmethod
    def of_version_1(cls, keys: Sequence[str], size: int) -> "HeldOutDocuments":
        """Those of a corpus that was prepared before they were recorded: a share of the hashes.

        Args:
            keys: the sorted hashes of all unique documents.
            size: the bytes of their text.
        """
        if len(keys) < MIN_DOCUMENTS_TO_SPLIT:
            return cls((0.1, 0.0), cut=list(keys))
        threshold = 2**128 * percentage_held_out(size) // 100
        return cls(ends=(max(f"{threshold:032x}", keys[0]), ""))


def percentage_held_out(size: int) -> int:
    """The default share of the validation set, in percent, of a text of some bytes."""
    return 10 if size < 10_000_000 else 5 if size < 100_000_000 else 1


def choose_held_out(
    table: DocumentTable, unique: int, size: int, validation: float | None, test: float | None
) -> HeldOutDocuments:
    """Choose the documents of the validation and the test set.

    Documents are taken in the order of their hash until each set has its share of the text. One that would take the share
    beyond its tolerance is skipped. So the choice depends neither on the order of the documents nor on their names, and more
    text changes little of it. Where whole documents cannot make up the shares (there are few, or long ones), the end of
    documents is held out: of those that are too long to be held out whole, or else of all.

    Args:
        table: the documents.
        unique: their number.
        size: the bytes of their text.
        validation: the share of the validation set. Default: 10 %, from 10 MB of text on 5 %, from 100 MB on 1 %.
        test: the share of the test set. Default: none, from 5 MB of text on that of the validation set, at most 5 %.
    """
    if validation is None:
        validation = percentage_held_out(size) / 100
    if test is None:
        test = min(validation, MAX_TEST_FRACTION) if size >= TEST_BYTES else 0.0
    result = HeldOutDocuments((validation, test))
    shares = list(zip((validation, test), (0.2, 0.5), strict=True))  # each with the tolerance for whole documents
    if not validation + test:
        return result
    longest = max(share * (1 + tolerance) for share, tolerance in shares) * size
    for limit in (longest, 0.0) if unique >= MIN_DOCUMENTS_TO_SPLIT else (0.0,):
        cut = list(table.in_hash_order(limit, math.inf))
        result.cut, cut_bytes = [key.hex() for key, _ in cut], sum(num_bytes for _, num_bytes in cut)
        rows, ends, result.skipped, is_met = table.in_hash_order(0, limit), list[str](), list[str](), True
        for share, tolerance in shares:
            end, held_out, skipped, target = "", 0, list[str](), share * (size - cut_bytes)
            for key, num_bytes in rows if target else ():
                if held_out + num_bytes > target * (1 + tolerance):
                    skipped.append(key.hex())
                    continue
                end, held_out = key.hex(), held_out + num_bytes
                if held_out >= target:
                    break
            ends.append(end)
            result.skipped += [key for key in skipped if key < end]
            is_met = is_met and target - held_out <= tolerance * share * size
        result.ends = ends[0], ends[1]
        if is_met:
            break
    return result


@dataclass
class CorpusScan:
    """What the first reading of a corpus has found.

    Attributes:
        sources: for each source file its name, size, modification time, SHA-256, number of documents, and a hash over the
            hashes of its texts.
        unique: the number of unique documents.
        duplicates: the number of documents that repeat an earlier one.
        size: the bytes of text of the unique documents, without those of a user's own validation and test set.
        held_out: which documents are the validation and the test set.
        cut_lengths: the index of each document whose end is held out, and its characters.
        shard_starts: the index of the first document of each shard of a preparation.
    """

    sources: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    unique: int = 0
    duplicates: int = 0
    size: int = 0
    held_out: HeldOutDocuments = field(default_factory=HeldOutDocuments)
    cut_lengths: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    shard_starts: list[int] = field(default_factory=list[int])


def report_issues(issues: IssueLog, is_empty: bool, log: Callable[[str], None]) -> None:
    """Log the issues of a corpus. Raises `NextwordError` if it is empty."""
    lines = issues.summary_lines()
    for line in lines:
        log(line)
    if is_empty:
        heading = "no text was found." + (" Problems:" if lines else "")
        formats = "Name files or folders of .txt, .md, .jsonl, .csv, .tsv or .parquet, plain, .gz or .zst"
        raise NextwordError("\n".join([heading, *lines, formats]))


class HashedDocument:
    """The chunks of a document, which are hashed and measured while they are read.

    Args:
        document: the document.
        advance: called with the number of bytes of each chunk.
        normalize: whether the chunks are normalized to NFC.

    Attributes:
        num_characters, num_bytes: the length of the chunks read so far.
    """

    def __init__(self, document: Document, advance: Callable[[int], None], normalize: bool):
        self.document, self._advance, self._normalize = document, advance, normalize
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_characters = self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for original in self.document.chunks:
            chunk = unicodedata.normalize("NFC", original) if self._normalize else original
            data = chunk.encode()
            self._hash.update(data)
            self.num_characters += len(chunk)
            self.num_bytes += len(data)
            self._advance(len(data))
            yield chunk

    def finalize(self) -> bytes:
        """Read the remaining chunks, and return the hash of the whole text."""
        for _ in self:
            pass
        return self._hash.digest()


class SourceReader:
    """One reading of some source files, which reports its progress in bytes.

    Args:
        sources: the files.
        stage: the name of this reading for `progress`.
        progress: called with the stage, the bytes done and all bytes.
        normalize: whether the text is normalized to NFC.

    Attributes:
        found: for each file read so far what `CorpusScan.sources` holds.
    """

    def __init__(self, sources: Sequence[SourceFile], stage: str, progress: ProgressCallback, normalize: bool):
        self._sources, self._stage, self._progress, self._normalize = sources, stage, progress, normalize
        self._stats = [file_size_and_mtime(source.path) for source in sources]
        self._total_bytes = sum(size or 0 for size, _ in self._stats)
        self._file_end = self._done = self._reported = 0
        self.found: list[dict[str, Any]] = []

    def documents(
        self, issues: IssueLog, recorded: Sequence[dict[str, Any]] | None = None
    ) -> Iterator[tuple[int, HashedDocument]]:
        """The index of the file and each document, valid until the next one is requested.

        Args:
            issues: where flaws are recorded.
            recorded: what an earlier reading has `found`, to compare with; `found` remains empty.

        Raises:
            NextwordError: a file has changed since the earlier reading.
        """
        for index, (source, (size, mtime_ns)) in enumerate(zip(self._sources, self._stats, strict=True)):
            self._file_end += size or 0
            texts_hash, num_documents = hashlib.blake2b(digest_size=16), 0
            for document in source.read(issues):
                hashed = HashedDocument(document, self._advance, self._normalize)
                yield index, hashed
                texts_hash.update(hashed.finalize())
                num_documents += 1
            self._done = self._file_end
            texts = texts_hash.hexdigest()
            if recorded is None:
                file_info = {"name": replace_surrogates(source.name), "bytes": size, "mtime_ns": mtime_ns}
                file_info |= {"sha256": _sha256_or_none(source.path), "texts": texts, "documents": num_documents}
                self.found.append(file_info)
            elif texts != recorded[index]["texts"]:
                raise NextwordError(
                    f"{source.path}: changed while it was read; run the same command again when it is complete"
                )
        if self._sources:
            self._report()

    def _advance(self, num_bytes: int) -> None:
        """Count bytes of text, up to the size of the file, which may be compressed."""
        self._done = min(self._done + num_bytes, self._file_end)
        if self._done >= self._reported + 2**20:
            self._report()

    def _report(self) -> None:
        self._reported = self._done
        self._progress(self._stage, self._done, self._total_bytes)


def _sha256_or_none(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:  # recorded by the file's reader
        return None


@contextlib.contextmanager
def document_table(path: Path) -> Generator[DocumentTable]:
    """A table of documents in a temporary file, so that memory use does not grow with their number."""
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=OFF")  # after a crash the table is not used again
            connection.execute("PRAGMA synchronous=OFF")
            yield DocumentTable(connection)
        path.unlink()
    except sqlite3.Error as error:
        free = shutil.disk_usage(path.parent).free
        error_type = DiskFullError if "full" in str(error) else NextwordError
        raise error_type(
            f"{path}: {error} ({free:,} bytes free). Free some space, and run the same command again"
        ) from error


def cut_chunks(chunks: Iterable[str], bounds: Sequence[int], source: DocumentSource) -> Iterator[SplitText]:
    """The chunks of a document that is cut into a training, a validation and a test part. Each part ends with its source.

    Args:
        chunks: the chunks of the document.
        bounds: where each part begins, and where the last one ends, in characters.
        source: the source of the document.
    """
    parts: list[tuple[Split, int, int]] = [
        (split, begin, end) for split, (begin, end) in zip(SPLITS, pairwise(bounds), strict=True) if begin < end
    ]
    position = 0
    for chunk in chunks:
        start, position = position, position + len(chunk)
        for split, begin, end in parts:
            if begin < position and start < end:
                yield split, chunk[max(0, begin - start) : end - start]
                if end <= position:
                    yield split, source
