"""Where a passage stands in a corpus: the longest match anywhere, exact to the byte, and the document that it is in.

index = build_index(["my-texts/"], Path("runs/mine/index"))
for match in index.matches(b"some text of a model"):
    print(match.start, match.end, index.name(match.document))

DIR/text.bin         the documents' text as training reads it, in UTF-8, end to end, a byte 0xFF after each
DIR/documents.npy    where each begins and ends, how far it is learned from, and where it was read
DIR/suffixes.bin     where each character of what is learned from begins, in the order of what follows (see `suffixes`)
DIR/signposts.bin    the first eight bytes of every 64th of these
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from nextword.audit.suffix_array import (
    DEPTH,
    END,
    PADDING,
    Query,
    Suffixes,
    Text,
    longest,
    shared_bytes,
    sort_suffixes,
    write_signposts,
)
from nextword.common.console import Console
from nextword.common.errors import CorruptFile, NextwordError, UsageError
from nextword.common.fs import MANIFEST, check_seal, move_into_place, read_manifest, seal, settle, writing
from nextword.data.corpus import Corpus, find_sources
from nextword.data.documents import Document, Problems, Source
from nextword.data.scan import Survey, survey, unchanged

VERSION = 1
LEAST = 24  # bytes of a match that is told of, where nothing else is asked for
PIECE = 2**20  # bytes of a document read at once
# "learned": up to which byte of the text a document is trained on: its end, its begin (held out), or a cut in between.
ROW = np.dtype(
    [("begin", "<u8"), ("end", "<u8"), ("learned", "<u8"), ("key", "S32"), ("source", "<u4"), ("line", "<u4")]
)


class Match(NamedTuple):
    """Bytes start … end−1 of a looked-up text stand in a document, from its byte `offset` on."""

    start: int
    end: int
    document: int
    offset: int


class Index:
    """A corpus that can be searched. Made by `build_index`, opened by `Index.open`.

    Attributes:
        documents: a row a document, in the order of the corpus; see `ROW`.
        held_out: whether documents that the model did not learn from are known; only what it learned from is searched.
        problems: what was wrong with the corpus's files, by kind.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts = path, facts
        self.text = Text(path / "text.bin")
        self.documents = np.asarray(np.load(path / "documents.npy", mmap_mode="r", allow_pickle=False))
        table, signposts = (
            np.asarray(np.memmap(path / name, dtype=np.dtype(kind), mode="r"))
            for name, kind in (("suffixes.bin", facts["places"]), ("signposts.bin", "<u8"))
        )
        self.suffixes = Suffixes(self.text, table, signposts)
        self.held_out: bool = facts["held_out"]
        self.problems: dict[str, int] = facts["problems"]

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Open what `build_index` wrote, every file checked against its hash.

        Raises `CorruptFile` naming each file that differs, `NextwordError` where this is no index.
        """
        path = Path(path)
        if read_manifest(path).get("kind") != "index":
            raise NextwordError(f"{path}: not an index of a corpus; name another place")
        facts = check_seal(path)
        if facts.get("version") != VERSION:
            raise NextwordError(f"{path}: made by another version of nextword; remove it, and it is made anew")
        try:
            return cls(path, facts)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise CorruptFile(f"{path}: not an index that can be read ({error})") from error

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def size(self) -> int:
        """Bytes of text, in UTF-8."""
        return len(self.text) - len(self)

    # ------------------------------------------------------------ documents

    def name(self, document: int) -> str:
        """The file that a document was read from, and in a table its line."""
        row = self.documents[document]
        name = self.facts["sources"][row["source"]]["name"]
        return f"{name} line {row['line']:,}" if row["line"] else name

    def read(self, document: int, start: int = 0, count: int | None = None) -> bytes:
        """Bytes of a document, from `start` on; to its end where no count is said."""
        begin, end = (int(self.documents[document][side]) for side in ("begin", "end"))
        start = begin + max(0, start)
        return self.text.bytes[start : end if count is None else min(end, start + count)].tobytes()

    def pieces(self, document: int) -> Iterator[tuple[int, str]]:
        """A document as texts of at most `PIECE` bytes, each with where it begins; cut after a line or else between words,
        where that can be."""
        at, size = 0, int(self.documents[document]["end"] - self.documents[document]["begin"])
        while at < size:
            data = self.read(document, at, PIECE)
            if at + len(data) < size:
                cut = max(data.rfind(b"\n"), data.rfind(b" ")) + 1
                data = data[:cut] if cut > len(data) // 2 else whole(data)
            yield at, data.decode("utf-8", "replace")
            at += len(data)

    # ------------------------------------------------------------ look-ups

    def matches(self, text: bytes | str, least: int = LEAST) -> list[Match]:
        """What of a text stands in the corpus, `least` bytes or more together: every passage that cannot be made longer.

        For each character of the text the longest passage that covers it is among these, and none lies inside another. Of a
        passage that stands in several places, one is told. Passages begin and end between characters.
        """
        query = Query(as_bytes(text))
        data = np.frombuffer(query.data, np.uint8)
        starts = np.flatnonzero((data & 0xC0) != 0x80)  # a byte 10xxxxxx goes on with a character
        if not len(starts) or not len(self.suffixes):
            return []
        lengths, where = longest(self.suffixes, query, starts)
        for _ in range(3):  # the bytes of a character that is another one in the corpus
            lengths -= (lengths > 0) & ((self.text.bytes[where + lengths] & 0xC0) == 0x80)
        ends = starts + lengths
        further = ends > np.maximum.accumulate(np.append(-1, ends[:-1]))
        found = np.flatnonzero(further & (lengths >= max(1, least)))
        documents = self._documents_of(where[found])
        offsets = where[found] - self.documents["begin"][documents].astype(np.int64)
        columns = (starts[found], ends[found], documents, offsets)
        return [Match(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def longest(self, text: bytes | str) -> Match | None:
        """The longest passage of a text that stands in the corpus; None where not one character does."""
        return max(self.matches(text, 1), key=lambda match: match.end - match.start, default=None)

    def find(self, passage: bytes | str) -> list[int]:
        """The documents in which a passage stands whole, letter for letter, in their order."""
        query = Query(as_bytes(passage))
        if not query.data:
            return []
        low, high = self.suffixes.range_of(query.data)
        found: set[int] = set()
        for begin in range(low, high, 2**16):
            places = self.suffixes.table[begin : min(high, begin + 2**16)].astype(np.int64)
            if len(query.data) > DEPTH:
                places = places[shared_bytes(self.text, query, places, 0) >= len(query.data)]
            found.update(np.unique(self._documents_of(places)).tolist())
        return sorted(found)

    def _documents_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.documents["begin"], places.astype(np.uint64), side="right") - 1


def as_bytes(text: bytes | str) -> bytes:
    return text.encode("utf-8", "replace") if isinstance(text, str) else text


def whole(data: bytes) -> bytes:
    """Bytes of UTF-8 without a character at their end that is not whole."""
    cut = next((k for k in range(1, min(4, len(data)) + 1) if data[-k] & 0xC0 != 0x80), 0)
    lead = data[-cut] if cut else 0
    size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    return data[: len(data) - cut] if cut and size > cut else data


# ---------------------------------------------------------------- building


def build_index(
    corpora: Sequence[str | Path],
    out: Path,
    *,
    prepared: Corpus | None = None,
    text_column: str | None = None,
    console: Console | None = None,
) -> Index:
    """The index of files, folders and named corpora at `out`; where it is there already and they are unchanged, that one.

    `prepared` are the tokens that a model was trained on. Where they were made of this very text, the documents that were
    held out from training are known, and are not searched; else all are. Memory does not grow with the corpus; on disk an
    index takes about five times the bytes of an English text, three of a Russian one.

    Raises:
        UsageError: a path that is not there, or `out` holds something else.
        NextwordError: there is no text in the corpora.
    """
    out, console = Path(out), console or Console(quiet=True)
    learned = None if prepared is None else sha256(json.dumps(_texts(prepared.facts["sources"])).encode()).hexdigest()
    asked = {"text_column": text_column, "prepared": learned}  # every run on one text can use one index
    problems = Problems()
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(out.with_name(f".{out.name}.lock")).acquire()
    with held:
        settle(out)
        sources = find_sources(corpora, problems, text_column, leave_out=out)
        index = _reusable(out, asked, sources, console.say)
        if index is not None:
            return index
        aside = out.with_name(f".{out.name}.partial")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            with writing(aside):
                aside.mkdir()
            facts = _build(sources, aside, prepared, problems, console)
            with writing(aside):
                seal(aside, {"kind": "index", "version": VERSION, "asked": asked, **facts})
            move_into_place(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return Index.open(out)


def _reusable(out: Path, asked: dict[str, Any], sources: list[Source], say: Callable[[str], None]) -> Index | None:
    """The index at `out` where it was made of the same text in the same way. Raises `UsageError` where `out` holds something
    else, which is not ours to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file() or read_manifest(out).get("kind") != "index":
        raise UsageError(f"{out}: exists and is not an index; name another place for it")
    facts = read_manifest(out)
    if facts.get("version") != VERSION or facts.get("asked") != asked:
        return None
    known = facts["sources"]
    if len(known) != len(sources) or not all(map(unchanged, sources, known)):
        say(f"{out}: the text has changed, so the index is made anew")
        return None
    try:
        return Index.open(out)
    except CorruptFile as error:
        say(f"{error}\nThe index is damaged, so it is made anew")
        return None


class _Writer:
    """Writes the documents as they go by, and a row of facts for each."""

    def __init__(self, directory: Path):
        self._text, self._rows = (directory / "text.bin").open("wb"), (directory / "rows.bin").open("wb")
        self._row = np.zeros(1, ROW)
        self.size = self.count = 0

    def begin(self, source: int, document: Document) -> None:
        self._row["begin"], self._row["source"], self._row["line"] = self.size, source, document.line or 0

    def add(self, piece: str) -> None:
        self.size += self._text.write(piece.encode())

    def end(self, key: bytes) -> None:
        self._row["end"], self._row["key"] = self.size, key.hex()
        self._rows.write(self._row.tobytes())
        self.size += self._text.write(bytes([END]))
        self.count += 1

    def close(self) -> None:
        self._text.write(bytes([END]) * PADDING)
        self._text.close()
        self._rows.close()


def _build(
    sources: list[Source], directory: Path, prepared: Corpus | None, problems: Problems, console: Console
) -> dict[str, Any]:
    """Fill a directory; what its manifest is to say."""
    with writing(directory), closing(_Writer(directory)) as writer:
        found = survey(sources, directory, problems, console.progress, console.say, writer)
    held_out = prepared is not None and _texts(prepared.facts["sources"]) == _texts(found.sources)
    if prepared is not None and not held_out:
        console.say(
            "the corpus is not the text that the model was trained on, so all of it is searched, "
            "and none of it is known to be held out"
        )
    text = Text(directory / "text.bin")
    kind = np.dtype("<u4" if len(text) < 2**32 else "<u8")
    with writing(directory):
        rows = _documents(directory, text, writer.count, found if held_out else None)
        count = _places(directory / "suffixes.bin", text, rows, kind)
        sort_suffixes(
            text, directory / "suffixes.bin", count, kind, lambda done, of: console.progress("indexing", done, of)
        )
        write_signposts(text, directory / "suffixes.bin", directory / "signposts.bin", kind)
    return {
        "held_out": held_out, "documents": writer.count, "bytes": found.size, "places": kind.str,
        "problems": dict(problems.kinds), "sources": found.sources,
    }  # fmt: skip


def _texts(sources: list[dict[str, Any]]) -> list[str]:
    return [source["texts"] for source in sources]


def _documents(directory: Path, text: Text, count: int, split: Survey | None) -> np.ndarray:
    """The table of documents, with how far each is learned from: to its end where no split is given."""
    spooled = directory / "rows.bin"
    rows = np.lib.format.open_memmap(directory / "documents.npy", mode="w+", dtype=ROW, shape=(count,))
    rows[:] = np.memmap(spooled, dtype=ROW, mode="r")
    rows["learned"] = rows["end"]
    if split is not None:
        for row in rows:
            where = split.split_by(bytes.fromhex(row["key"].decode()))
            if where == "both":
                row["learned"] = _nine_tenths(text, int(row["begin"]), int(row["end"]))
            elif where == "validation":
                row["learned"] = row["begin"]
    rows.flush()
    spooled.unlink()
    return rows


def _begins(text: Text, start: int, end: int) -> Iterator[np.ndarray]:
    """Where the characters of a stretch of text begin, part by part; the ends of documents are none."""
    for at in range(start, end, PIECE):
        part = text.bytes[at : min(end, at + PIECE)]
        yield at + np.flatnonzero(((part & 0xC0) != 0x80) & (part != END))


def _nine_tenths(text: Text, begin: int, end: int) -> int:
    """Where the last tenth of a document's characters begins, which is held out where there are few documents."""
    left = sum(len(part) for part in _begins(text, begin, end)) * 9 // 10
    for part in _begins(text, begin, end):
        if left < len(part):
            return int(part[left])
        left -= len(part)
    return end


def _places(path: Path, text: Text, rows: np.ndarray, kind: np.dtype) -> int:
    """Write where each character begins that is learned from, in the order of the text; how many."""
    count = 0
    with path.open("wb") as file:
        begin = 0
        outside = np.flatnonzero(rows["learned"] < rows["end"])
        for start, end in [*rows[outside][["learned", "end"]].tolist(), (len(text), len(text))]:
            for part in _begins(text, begin, start):
                file.write(part.astype(kind).tobytes())
                count += len(part)
            begin = end
    return count
