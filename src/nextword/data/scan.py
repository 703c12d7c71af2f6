"""Reading a corpus: deduplication, the split into training and validation, and progress.

The first reading finds out what there is. It keeps one byte for each document, and some metadata for each source file,
so that a corpus may be larger than memory. Later readings go through the same documents and know the split of each.
"""

import bisect
import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nextword.common.errors import DiskFullError, NextwordError
from nextword.common.fs import sha256_file
from nextword.data.corpus import DocumentSource, Split, SplitText
from nextword.data.issues import IssueLog, replace_surrogates
from nextword.data.readers import Document, SourceFile

ProgressCallback = Callable[[str, int, int], None]  # stage, bytes done, total bytes

MIN_DOCUMENTS_TO_SPLIT = 20  # with fewer, the validation set is the last tenth of each document

# The level of a document: by its hash it is among the last 10 %, 5 % and 1 %, or none of them. The sets are nested, so
# that a growing corpus only moves documents from validation to training.
DUPLICATE, TRAIN, HASH_10_PERCENT, HASH_5_PERCENT, HASH_1_PERCENT = range(5)


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


@dataclass
class CorpusScan:
    """What the first reading of a corpus has found.

    Attributes:
        sources: for each source file its name, size, modification time, SHA-256, and a hash over the hashes of its
            texts.
        levels: a byte for each document.
        lengths: the length in characters of each of the first unique documents.
        unique: the number of unique documents.
        duplicates: the number of documents that repeat an earlier one.
        size: the bytes of text of the unique documents.
        smallest: the smallest hash of a document, and the index of that document.
        shard_starts: where each shard of a preparation begins: its first document, and its first training chunk.
    """

    sources: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    levels: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list[int])
    unique: int = 0
    duplicates: int = 0
    size: int = 0
    smallest: tuple[int, int] = (2**64, 0)
    shard_starts: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def add(self, key: bytes, is_new: bool, num_characters: int, num_bytes: int) -> None:
        """Add the next document, given by the hash of its text."""
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

    def report(self, issues: IssueLog, log: Callable[[str], None]) -> None:
        """Log the issues of the corpus. Raises `NextwordError` if there is no text."""
        lines = issues.summary_lines()
        for line in lines:
            log(line)
        if not self.unique:
            heading = "no text was found." + (" Problems:" if lines else "")
            formats = "Name files or folders of .txt, .md, .jsonl, .csv, .tsv or .parquet, plain, .gz or .zst"
            raise NextwordError("\n".join([heading, *lines, formats]))

    def split_for_index(self, index: int) -> Split | Literal["both", "neither"]:
        """The split of a document, by its index. A document that is cut belongs to both, a duplicate to neither."""
        level = self.levels[index]
        return "neither" if level == DUPLICATE else self._split(level, index == self.smallest[1])

    def split_for_key(self, key: bytes) -> Split | Literal["both"]:
        """The split of a text by its hash, whichever of its copies it is."""
        return self._split(_split_level(key), _key_to_int(key) == self.smallest[0])

    def _split(self, level: int, is_smallest: bool) -> Split | Literal["both"]:
        if self.unique < MIN_DOCUMENTS_TO_SPLIT:
            return "both"
        validation_level = HASH_10_PERCENT + (self.size >= 10_000_000) + (self.size >= 100_000_000)
        # The document with the smallest hash makes sure that the validation set is not empty.
        return "validation" if level >= validation_level or is_smallest else "train"


def _key_to_int(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def _split_level(key: bytes) -> int:
    return TRAIN + sum(_key_to_int(key) < 2**64 * percent // 100 for percent in (10, 5, 1))


class HashedDocument:
    """The chunks of a document, which are hashed and measured while they are read.

    Args:
        document: the document.
        advance: called with the number of bytes of each chunk.

    Attributes:
        num_characters, num_bytes: the length of the chunks read so far.
    """

    def __init__(self, document: Document, advance: Callable[[int], None]):
        self.document, self._advance = document, advance
        self._hash = hashlib.blake2b(digest_size=16)
        self._chunk_starts: list[int] = []  # in characters
        self.num_characters = self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for chunk in self.document.chunks:
            data = chunk.encode()
            self._hash.update(data)
            self._chunk_starts.append(self.num_characters)
            self.num_characters += len(chunk)
            self.num_bytes += len(data)
            self._advance(len(data))
            yield chunk

    def finalize(self) -> bytes:
        """Read the remaining chunks, and return the hash of the whole text."""
        for _ in self:
            pass
        return self._hash.digest()

    def chunk_counts(self) -> tuple[int, int]:
        """The number of chunks, and the number of those that begin in the first nine tenths of the text."""
        return len(self._chunk_starts), bisect.bisect_left(self._chunk_starts, self.num_characters * 9 // 10)


class SourceReader:
    """One reading of some source files, which reports its progress in bytes.

    Args:
        sources: the files.
        stage: the name of this reading for `progress`.
        progress: called with the stage, the bytes done and all bytes.

    Attributes:
        found: for each file read so far what `CorpusScan.sources` holds.
    """

    def __init__(self, sources: Sequence[SourceFile], stage: str, progress: ProgressCallback):
        self._sources, self._stage, self._progress = sources, stage, progress
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
            texts_hash = hashlib.blake2b(digest_size=16)
            for document in source.read(issues):
                hashed = HashedDocument(document, self._advance)
                yield index, hashed
                texts_hash.update(hashed.finalize())
            self._done = self._file_end
            texts = texts_hash.hexdigest()
            if recorded is None:
                file_info = {"name": replace_surrogates(source.name), "bytes": size, "mtime_ns": mtime_ns}
                self.found.append({**file_info, "sha256": _sha256_or_none(source.path), "texts": texts})
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
def dedup_index(path: Path) -> Generator[Callable[[bytes], bool]]:
    """A function that tells whether a key is new. The keys are kept on disk, so that memory use does not grow with them."""
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as table:
            table.execute("PRAGMA journal_mode=OFF")  # after a crash the table is not used again
            table.execute("PRAGMA synchronous=OFF")
            table.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
            table.execute("BEGIN")
            yield lambda key: table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1
        path.unlink()
    except sqlite3.Error as error:
        free = shutil.disk_usage(path.parent).free
        error_type = DiskFullError if "full" in str(error) else NextwordError
        raise error_type(
            f"{path}: {error} ({free:,} bytes free). Free some space, and run the same command again"
        ) from error


def scan_corpus(
    sources: list[SourceFile],
    directory: Path,
    issues: IssueLog,
    progress: ProgressCallback,
    log: Callable[[str], None],
    observe: Callable[[int, HashedDocument], None],
) -> CorpusScan:
    """The first reading of a corpus by one process, which may keep the texts.

    Args:
        sources: the source files.
        directory: for a temporary file.
        issues: where flaws are recorded.
        progress: called with the stage "reading".
        log: called with the issues found.
        observe: called with the index of the source file and each document, whose chunks it may read.

    Raises:
        NextwordError: there is no text.
    """
    reader = SourceReader(sources, "reading", progress)
    scan = CorpusScan(reader.found)
    with dedup_index(directory / "seen.sqlite") as is_new:
        for index, hashed in reader.documents(issues):
            observe(index, hashed)
            key = hashed.finalize()
            scan.add(key, is_new(key), hashed.num_characters, hashed.num_bytes)
    scan.report(issues, log)
    return scan


def hold_out_last_tenth(chunks: Iterable[str], num_characters: int, source: DocumentSource) -> Iterator[SplitText]:
    """The chunks of a document, cut after nine tenths of its characters. Each part ends with its source."""
    train_remaining = num_characters * 9 // 10
    for chunk in chunks:
        if train_remaining > 0:
            yield "train", chunk[:train_remaining]
            if train_remaining <= len(chunk):
                yield "train", source
        if train_remaining < len(chunk):
            yield "validation", chunk[max(train_remaining, 0) :]
        train_remaining -= len(chunk)
    yield "validation", source
