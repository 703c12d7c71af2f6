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

from nextword.common.errors import DiskFull, NextwordError
from nextword.common.fs import sha256
from nextword.data.documents import Document, Problems, Source, without_surrogates
from nextword.data.provenance import Origin
from nextword.data.shards import Split

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all

FEW = 20  # documents; with fewer the validation part is the last tenth of each

# By its hash, a document is in the last 10 %, 5 % and 1 %, or in none of them; the parts are nested, so that a
# growing corpus only ever moves documents from validation to training.
DUPLICATE, TRAIN, TENTH, TWENTIETH, HUNDREDTH = range(5)


def size_and_time(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None where the file cannot be had."""
    try:
        status = path.stat()
    except OSError:  # the reader of the file reports it
        return None
    return status.st_size, status.st_mtime_ns


def unchanged(source: Source, known: dict[str, Any]) -> bool:
    """Whether a file is the one that a survey wrote these facts of."""
    now = size_and_time(source.path)
    if now is None or source.name != known["name"] or now[0] != known["bytes"]:
        return False
    return now[1] == known["mtime_ns"] or (known["sha256"] is not None and sha256(source.path) == known["sha256"])


@dataclass
class Survey:
    """What the first reading found: `levels` has a byte for every document, `lengths` a number for the first few."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    levels: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    unique: int = 0
    duplicates: int = 0
    size: int = 0  # bytes of text, duplicates left out
    smallest: tuple[int, int] = (2**64, 0)  # the hash of the document that has the smallest, and its place

    def add(self, key: bytes, is_new: bool, characters: int, size: int) -> None:
        if not is_new:
            self.levels.append(DUPLICATE)
            self.duplicates += 1
            return
        self.smallest = min(self.smallest, (_number(key), len(self.levels)))
        self.levels.append(_level(key))
        self.unique += 1
        self.size += size
        if len(self.lengths) < FEW:
            self.lengths.append(characters)

    def tell(self, problems: Problems, say: Callable[[str], None]) -> None:
        """Say what was wrong with the text. Raises `NextwordError` where there is none at all, with what was there."""
        for line in problems.lines():
            say(line)
        if not self.unique:
            raise NextwordError(
                "no text was found. "
                + "\n".join(["What was there:", *problems.lines()] if problems.found else [])
                + "\nName files or folders of .txt, .md, .jsonl, .csv, .tsv or .parquet, plain, .gz or .zst"
            )

    def split_of(self, place: int) -> Split | Literal["both", "neither"]:
        """Where a document goes, by its place in the corpus."""
        level = self.levels[place]
        if level == DUPLICATE:
            return "neither"
        if self.unique < FEW:
            return "both"
        # The smallest hash is in validation already, unless nothing is.
        return "validation" if level >= self.held_out or place == self.smallest[1] else "train"

    def split_by(self, key: bytes) -> Split | Literal["both"]:
        """Where the text of a hash goes, whichever of its copies it is."""
        if self.unique < FEW:
            return "both"
        return "validation" if _level(key) >= self.held_out or _number(key) == self.smallest[0] else "train"

    @property
    def held_out(self) -> int:
        """From which level on a document is held out."""
        return TENTH if self.size < 10_000_000 else TWENTIETH if self.size < 100_000_000 else HUNDREDTH


def _number(key: bytes) -> int:
    """The hash of a document as a number, by which it is drawn."""
    return int.from_bytes(key[:8], "big")


def _level(key: bytes) -> int:
    return TRAIN + sum(_number(key) < 2**64 * share // 100 for share in (10, 5, 1))


class Watcher(Protocol):
    """Sees the documents go by at the first reading."""

    def begin(self, source: int, document: Document) -> None: ...

    def add(self, piece: str) -> None: ...

    def end(self, key: bytes) -> None: ...


class Bar:
    """Tells how far one reading of the sources has come, in bytes of their files."""

    def __init__(self, stage: str, sources: Sequence[Source], progress: Progress):
        self._stage, self._progress = stage, progress
        self._sizes = [(size_and_time(source.path) or (0, 0))[0] for source in sources]
        self._total = sum(self._sizes)
        self._file = self._before = self._inside = self._told = 0

    def advance(self, count: int) -> None:
        """So many bytes of text went by. A compressed file holds more than its size, and is not counted past that."""
        self._inside = min(self._inside + count, self._sizes[self._file])
        if self._before + self._inside >= self._told + 2**20:
            self._tell()

    def end_file(self) -> None:
        self._before, self._inside, self._file = self._before + self._sizes[self._file], 0, self._file + 1
        if self._file == len(self._sizes):
            self._tell()

    def _tell(self) -> None:
        self._told = self._before + self._inside
        self._progress(self._stage, self._told, self._total)


class Text:
    """A document's pieces, hashed and measured as they go by."""

    def __init__(self, document: Document, bar: Bar):
        self._document, self._bar = document, bar
        self._hash = hashlib.blake2b(digest_size=16)
        self._begins: list[int] = []  # of each piece, in characters
        self.characters = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for piece in self._document.pieces:
            data = piece.encode()
            self._hash.update(data)
            self._begins.append(self.characters)
            self.characters += len(piece)
            self.bytes += len(data)
            self._bar.advance(len(data))
            yield piece

    def finish(self) -> bytes:
        """Read what is left; the hash of the whole text."""
        for _ in self:
            pass
        return self._hash.digest()

    def pieces(self) -> tuple[int, int]:
        """How many pieces the text has, and how many begin in its first nine tenths."""
        return len(self._begins), bisect.bisect_left(self._begins, self.characters * 9 // 10)


@contextlib.contextmanager
def seen(path: Path) -> Iterator[Callable[[bytes], bool]]:
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
        kind = DiskFull if "full" in str(error) else NextwordError
        raise kind(f"{path}: {error} ({free:,} bytes free). Make room, and run the same command again") from error


def read_source(
    source: Source, problems: Problems, bar: Bar, add: Callable[[bytes, Text], None], number: int = 0,
    watcher: Watcher | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Read one source for the first time, and `add` the hash and the measures of each document; the source's facts."""
    size, time = size_and_time(source.path) or (None, None)
    texts = hashlib.blake2b(digest_size=16)
    for document in source.read(problems):
        text = Text(document, bar)
        if watcher is not None:
            watcher.begin(number, document)
            for piece in text:
                watcher.add(piece)
        key = text.finish()
        if watcher is not None:
            watcher.end(key)
        texts.update(key)
        add(key, text)
    bar.end_file()
    try:
        content = sha256(source.path)
    except OSError:  # its reader has reported it
        content = None
    facts = {"name": without_surrogates(source.name), "bytes": size, "mtime_ns": time, "sha256": content}
    return {**facts, "texts": texts.hexdigest()}


def survey(
    sources: list[Source], directory: Path, problems: Problems, progress: Progress, say: Callable[[str], None],
    watcher: Watcher | None = None,
) -> Survey:  # fmt: skip
    """The first reading: what is there, what of it is new, and which split each document belongs to.

    Raises:
        NextwordError: there is no text at all; with what was there.
    """
    found, bar = Survey(), Bar("reading", sources, progress)
    with seen(directory / "seen.sqlite") as is_new:
        for number, source in enumerate(sources):
            facts = read_source(
                source, problems, bar, lambda key, text: found.add(key, is_new(key), text.characters, text.bytes), number,
                watcher,
            )  # fmt: skip
            found.sources.append(facts)
    found.tell(problems, say)
    return found


def split_texts(
    sources: Sequence[Source], survey: Survey, stage: str, progress: Progress, first: int = 0, place: int = 0
) -> Iterator[tuple[Split, str | Origin]]:
    """A later reading: each new document's pieces with the split they belong to, and its origin where it ends.

    `sources` are those of the survey from the one numbered `first` on, whose first document has the number `place`.
    Raises `NextwordError` where a file no longer holds the texts that the survey found.
    """
    bar = Bar(stage, sources, progress)
    lengths = iter(survey.lengths[place - survey.levels.count(DUPLICATE, 0, place) :])
    facts = survey.sources[first : first + len(sources)]
    for number, (source, known) in enumerate(zip(sources, facts, strict=True), start=first):
        texts = hashlib.blake2b(digest_size=16)
        for document in source.read(Problems()):  # what is wrong was told the first time
            text = Text(document, bar)
            where = survey.split_of(place) if place < len(survey.levels) else "neither"
            origin = Origin(number, document.line)
            if where == "both":
                yield from _last_tenth_held_out(text, next(lengths), origin)
            elif where != "neither":
                for piece in text:
                    yield where, piece
                yield where, origin
            texts.update(text.finish())
            place += 1
        bar.end_file()
        if texts.hexdigest() != known["texts"]:
            raise NextwordError(f"{source.path}: changed while it was read; run the same command again when it rests")


def _last_tenth_held_out(text: Iterable[str], length: int, origin: Origin) -> Iterator[tuple[Split, str | Origin]]:
    """The pieces of a document of so many characters, cut at nine tenths of them."""
    left = length * 9 // 10
    for piece in text:
        if left > 0:
            yield "train", piece[:left]
            if left <= len(piece):
                yield "train", origin
        if left < len(piece):
            yield "validation", piece[max(left, 0) :]
        left -= len(piece)
    yield "validation", origin
