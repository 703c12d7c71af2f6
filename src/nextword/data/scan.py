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
from nextword.data.documents import Document, SourceFile
from nextword.data.issues import IssueLog, replace_surrogates
from nextword.data.provenance import DocumentSource
from nextword.data.shards import Split

ProgressCallback = Callable[[str, int, int], None]  # stage, bytes done, total bytes
SplitText = tuple[Split, str | DocumentSource]  # a chunk of a document, or its source where it ends

MIN_DOCUMENTS_TO_SPLIT = 20  # with fewer, the validation set is the last tenth of each document

# The level of a document: by its hash it is among the last 10 %, 5 % and 1 %, or none of them. The sets are nested, so
# that a growing corpus only moves documents from validation to training.
DUPLICATE, TRAIN, HASH_10_PERCENT, HASH_5_PERCENT, HASH_1_PERCENT = range(5)


def file_size_and_mtime(path: Path) -> tuple[int, int] | None:
    """Size in bytes and modification time in ns; None if the file cannot be accessed (its reader records that)."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def is_unchanged(source: SourceFile, recorded: dict[str, Any]) -> bool:
    """Whether a file is the one that a scan has recorded: by its name, size, and modification time or SHA-256."""
    current = file_size_and_mtime(source.path)
    if current is None or source.name != recorded["name"] or current[0] != recorded["bytes"]:
        return False
    if current[1] == recorded["mtime_ns"]:
        return True
    return recorded["sha256"] is not None and sha256_file(source.path) == recorded["sha256"]


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
    """

    sources: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    levels: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list[int])
    unique: int = 0
    duplicates: int = 0
    size: int = 0
    smallest: tuple[int, int] = (2**64, 0)

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
        for line in issues.summary_lines():
            log(line)
        if not self.unique:
            lines = ["no text was found."]
            if issues.issues:
                lines = ["no text was found. What was there:", *issues.summary_lines()]
            formats = "Name files or folders of .txt, .md, .jsonl, .csv, .tsv or .parquet, plain, .gz or .zst"
            raise NextwordError("\n".join([*lines, formats]))

    def split_for_index(self, index: int) -> Split | Literal["both", "neither"]:
        """The split of a document, by its index. A document that is cut belongs to both, a duplicate to neither."""
        level = self.levels[index]
        if level == DUPLICATE:
            return "neither"
        return self._split(level, is_smallest=index == self.smallest[1])

    def split_for_key(self, key: bytes) -> Split | Literal["both"]:
        """The split of a text by its hash, whichever of its copies it is."""
        return self._split(_split_level(key), is_smallest=_key_to_int(key) == self.smallest[0])

    def _split(self, level: int, is_smallest: bool) -> Split | Literal["both"]:
        if self.unique < MIN_DOCUMENTS_TO_SPLIT:
            return "both"
        # The document with the smallest hash makes sure that the validation set is not empty.
        return "validation" if level >= self.validation_level or is_smallest else "train"

    @property
    def validation_level(self) -> int:
        """The lowest level of the validation set, which depends on the size of the corpus."""
        if self.size < 10_000_000:
            return HASH_10_PERCENT
        return HASH_5_PERCENT if self.size < 100_000_000 else HASH_1_PERCENT


def _key_to_int(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def _split_level(key: bytes) -> int:
    return TRAIN + sum(_key_to_int(key) < 2**64 * percent // 100 for percent in (10, 5, 1))


class ByteProgress:
    """Reports the progress of one reading of some source files, in bytes."""

    def __init__(self, stage: str, sources: Sequence[SourceFile], progress: ProgressCallback):
        self._stage, self._progress = stage, progress
        self._file_sizes = [(file_size_and_mtime(source.path) or (0, 0))[0] for source in sources]
        self._total_bytes = sum(self._file_sizes)
        self._file_index = self._finished_bytes = self._file_bytes = self._reported_bytes = 0

    def advance(self, num_bytes: int) -> None:
        """Count bytes of text. Those of a compressed file are counted up to its size."""
        self._file_bytes = min(self._file_bytes + num_bytes, self._file_sizes[self._file_index])
        if self._finished_bytes + self._file_bytes >= self._reported_bytes + 2**20:
            self._report()

    def end_file(self) -> None:
        """Go on to the next file."""
        self._finished_bytes += self._file_sizes[self._file_index]
        self._file_bytes, self._file_index = 0, self._file_index + 1
        if self._file_index == len(self._file_sizes):
            self._report()

    def _report(self) -> None:
        self._reported_bytes = self._finished_bytes + self._file_bytes
        self._progress(self._stage, self._reported_bytes, self._total_bytes)


class HashedDocument:
    """The chunks of a document, which are hashed and measured while they are read.

    Attributes:
        document: the document.
        num_characters, num_bytes: the length of the chunks read so far.
    """

    def __init__(self, document: Document, byte_progress: ByteProgress):
        self.document, self._byte_progress = document, byte_progress
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
            self._byte_progress.advance(len(data))
            yield chunk

    def finalize(self) -> bytes:
        """Read the remaining chunks, and return the hash of the whole text."""
        for _ in self:
            pass
        return self._hash.digest()

    def chunk_counts(self) -> tuple[int, int]:
        """The number of chunks, and the number of those that begin in the first nine tenths of the text."""
        return len(self._chunk_starts), bisect.bisect_left(self._chunk_starts, self.num_characters * 9 // 10)


class SourceReading:
    """One reading of a source file: its documents, and a hash over the hashes of their texts."""

    def __init__(self, source: SourceFile, byte_progress: ByteProgress):
        self._source, self._byte_progress = source, byte_progress
        self._size, self._mtime_ns = file_size_and_mtime(source.path) or (None, None)
        self._texts_hash = hashlib.blake2b(digest_size=16)

    def documents(self, issues: IssueLog) -> Iterator[HashedDocument]:
        """The documents, each valid until the next one is requested."""
        for document in self._source.read(issues):
            hashed = HashedDocument(document, self._byte_progress)
            yield hashed
            self._texts_hash.update(hashed.finalize())
        self._byte_progress.end_file()

    @property
    def texts_hash(self) -> str:
        """The hash of all documents, once they are read."""
        return self._texts_hash.hexdigest()

    def source_info(self) -> dict[str, Any]:
        """The file's entry in `CorpusScan.sources`, once its documents are read."""
        try:
            file_hash = sha256_file(self._source.path)
        except OSError:  # recorded by the file's reader
            file_hash = None
        name = replace_surrogates(self._source.name)
        file_info = {"name": name, "bytes": self._size, "mtime_ns": self._mtime_ns, "sha256": file_hash}
        return {**file_info, "texts": self.texts_hash}


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
    scan, byte_progress = CorpusScan(), ByteProgress("reading", sources, progress)
    with dedup_index(directory / "seen.sqlite") as is_new:
        for index, source in enumerate(sources):
            reading = SourceReading(source, byte_progress)
            for hashed in reading.documents(issues):
                observe(index, hashed)
                key = hashed.finalize()
                scan.add(key, is_new(key), hashed.num_characters, hashed.num_bytes)
            scan.sources.append(reading.source_info())
    scan.report(issues, log)
    return scan


def iter_split_texts(
    sources: Sequence[SourceFile],
    scan: CorpusScan,
    stage: str,
    progress: ProgressCallback,
    first_source: int = 0,
    document_index: int = 0,
) -> Iterator[SplitText]:
    """Read the unique documents of a scanned corpus, or of a range of its source files, once more.

    Args:
        sources: source files of the scan.
        scan: the result of the first reading.
        stage: the name of this reading for `progress`.
        progress: called with the number of bytes read.
        first_source: the index of the first source file in the corpus.
        document_index: the index of its first document in the corpus.

    Yields:
        The chunks of each document with their split, and at the end of the document its source. Each of the two parts
        of a document that is cut ends with its source.

    Raises:
        NextwordError: a file has changed since the scan.
    """
    byte_progress = ByteProgress(stage, sources, progress)
    lengths = iter(scan.lengths[document_index - scan.levels.count(DUPLICATE, 0, document_index) :])
    recorded_sources = scan.sources[first_source : first_source + len(sources)]
    for source_index, (source, recorded) in enumerate(zip(sources, recorded_sources, strict=True), start=first_source):
        reading = SourceReading(source, byte_progress)
        for hashed in reading.documents(IssueLog()):  # its issues were reported at the first reading
            split = scan.split_for_index(document_index) if document_index < len(scan.levels) else "neither"
            document_source = DocumentSource(source_index, hashed.document.line)
            if split == "both":
                yield from _hold_out_last_tenth(hashed, next(lengths), document_source)
            elif split != "neither":
                for chunk in hashed:
                    yield split, chunk
                yield split, document_source
            document_index += 1
        if reading.texts_hash != recorded["texts"]:
            raise NextwordError(
                f"{source.path}: changed while it was read; run the same command again when it is complete"
            )


def _hold_out_last_tenth(
    chunks: Iterable[str], num_characters: int, document_source: DocumentSource
) -> Iterator[SplitText]:
    """The chunks of a document, cut after nine tenths of its characters."""
    train_remaining = num_characters * 9 // 10
    for chunk in chunks:
        if train_remaining > 0:
            yield "train", chunk[:train_remaining]
            if train_remaining <= len(chunk):
                yield "train", document_source
        if train_remaining < len(chunk):
            yield "validation", chunk[max(train_remaining, 0) :]
        train_remaining -= len(chunk)
    yield "validation", document_source
