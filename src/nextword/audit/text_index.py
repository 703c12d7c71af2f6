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
from nextword.common.console import Console
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import (
    MANIFEST,
    atomic_replace_dir,
    map_disk_errors,
    read_manifest,
    recover_interrupted_swap,
    verify_manifest,
    write_manifest,
)
from nextword.data.builtin_datasets import find_sources
from nextword.data.corpus import Corpus
from nextword.data.documents import SourceFile
from nextword.data.issues import IssueLog
from nextword.data.scan import CorpusScan, HashedDocument, is_unchanged, scan_corpus

VERSION = 1
MIN_MATCH_BYTES = 24  # bytes of a match that is told of, where nothing else is asked for
CHUNK_BYTES = 2**20  # bytes of a document read at once
# "learned": up to which byte of the text a document is trained on: its end, its begin (held out), or a cut in between.
DOCUMENT_DTYPE = np.dtype(
    [("begin", "<u8"), ("end", "<u8"), ("learned", "<u8"), ("key", "S32"), ("source", "<u4"), ("line", "<u4")]
)


class Match(NamedTuple):
    """Bytes start … end−1 of a looked-up text stand in a document, from its byte `offset` on."""

    start: int
    end: int
    document: int
    offset: int


class CorpusIndex:
    """A corpus that can be searched. Made by `build_index`, opened by `Index.open`.

    Attributes:
        documents: a row a document, in the order of the corpus; see `ROW`.
        held_out: whether documents that the model did not learn from are known; only what it learned from is searched.
        problems: what was wrong with the corpus's files, by kind.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path, self.metadata = path, metadata
        self.text = MappedText(path / "text.bin")
        self.documents = np.asarray(np.load(path / "documents.npy", mmap_mode="r", allow_pickle=False))
        table, signposts = (
            np.asarray(np.memmap(path / name, dtype=np.dtype(kind), mode="r"))
            for name, kind in (("suffixes.bin", metadata["places"]), ("signposts.bin", "<u8"))
        )
        self.suffix_array = SuffixArray(self.text, table, signposts)
        self.has_held_out: bool = metadata["held_out"]
        self.problems: dict[str, int] = metadata["problems"]

    @classmethod
    def open(cls, path: Path) -> "CorpusIndex":
        """Open what `build_index` wrote, every file checked against its hash.

        Raises `CorruptFile` naming each file that differs, `NextwordError` where this is no index.
        """
        path = Path(path)
        if read_manifest(path).get("kind") != "index":
            raise NextwordError(f"{path}: not an index of a corpus; name another place")
        facts = verify_manifest(path)
        if facts.get("version") != VERSION:
            raise NextwordError(f"{path}: made by another version of nextword; remove it, and it is made anew")
        try:
            return cls(path, facts)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise CorruptFileError(f"{path}: not an index that can be read ({error})") from error

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def num_text_bytes(self) -> int:
        """Bytes of text, in UTF-8."""
        return len(self.text) - len(self)

    # ------------------------------------------------------------ documents

    def document_name(self, document: int) -> str:
        """The file that a document was read from, and in a table its line."""
        row = self.documents[document]
        name = self.metadata["sources"][row["source"]]["name"]
        return f"{name} line {row['line']:,}" if row["line"] else name

    def read_bytes(self, document: int, start: int = 0, count: int | None = None) -> bytes:
        """Bytes of a document, from `start` on; to its end where no count is said."""
        begin, end = (int(self.documents[document][side]) for side in ("begin", "end"))
        start = begin + max(0, start)
        return self.text.bytes[start : end if count is None else min(end, start + count)].tobytes()

    def iter_chunks(self, document: int) -> Iterator[tuple[int, str]]:
        """A document as texts of at most `PIECE` bytes, each with where it begins; cut after a line or else between words,
        where that can be."""
        offset, size = 0, int(self.documents[document]["end"] - self.documents[document]["begin"])
        while offset < size:
            data = self.read_bytes(document, offset, CHUNK_BYTES)
            if offset + len(data) < size:
                cut = max(data.rfind(b"\n"), data.rfind(b" ")) + 1
                data = data[:cut] if cut > len(data) // 2 else trim_partial_character(data)
            yield offset, data.decode("utf-8", "replace")
            offset += len(data)

    # ------------------------------------------------------------ look-ups

    def find_matches(self, text: bytes | str, min_bytes: int = MIN_MATCH_BYTES) -> list[Match]:
        """What of a text stands in the corpus, `least` bytes or more together: every passage that cannot be made longer.

        For each character of the text the longest passage that covers it is among these, and none lies inside another. Of a
        passage that stands in several places, one is told. Passages begin and end between characters.
        """
        query = Query(encode_text(text))
        data = np.frombuffer(query.data, np.uint8)
        starts = np.flatnonzero((data & 0xC0) != 0x80)  # a byte 10xxxxxx goes on with a character
        if not len(starts) or not len(self.suffix_array):
            return []
        lengths, positions = longest_matches(self.suffix_array, query, starts)
        for _ in range(3):  # the bytes of a character that is another one in the corpus
            lengths -= (lengths > 0) & ((self.text.bytes[positions + lengths] & 0xC0) == 0x80)
        ends = starts + lengths
        is_maximal = ends > np.maximum.accumulate(np.append(-1, ends[:-1]))
        selected = np.flatnonzero(is_maximal & (lengths >= max(1, min_bytes)))
        documents = self._document_ids_at(positions[selected])
        offsets = positions[selected] - self.documents["begin"][documents].astype(np.int64)
        columns = (starts[selected], ends[selected], documents, offsets)
        return [Match(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def longest_match(self, text: bytes | str) -> Match | None:
        """The longest passage of a text that stands in the corpus; None where not one character does."""
        return max(self.find_matches(text, 1), key=lambda match: match.end - match.start, default=None)

    def find_documents(self, passage: bytes | str) -> list[int]:
        """The documents in which a passage stands whole, letter for letter, in their order."""
        query = Query(encode_text(passage))
        if not query.data:
            return []
        low, high = self.suffix_array.prefix_range(query.data)
        document_ids: set[int] = set()
        for begin in range(low, high, 2**16):
            positions = self.suffix_array.positions[begin : min(high, begin + 2**16)].astype(np.int64)
            if len(query.data) > SORT_DEPTH:
                positions = positions[common_prefix_bytes(self.text, query, positions, 0) >= len(query.data)]
            document_ids.update(np.unique(self._document_ids_at(positions)).tolist())
        return sorted(document_ids)

    def _document_ids_at(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.documents["begin"], positions.astype(np.uint64), side="right") - 1


def encode_text(text: bytes | str) -> bytes:
    return text.encode("utf-8", "replace") if isinstance(text, str) else text


def trim_partial_character(data: bytes) -> bytes:
    """Bytes of UTF-8 without a character at their end that is not whole."""
    tail_length = next((k for k in range(1, min(4, len(data)) + 1) if data[-k] & 0xC0 != 0x80), 0)
    lead_byte = data[-tail_length] if tail_length else 0
    character_length = 1 if lead_byte < 0x80 else 2 if lead_byte < 0xE0 else 3 if lead_byte < 0xF0 else 4
    return data[: len(data) - tail_length] if tail_length and character_length > tail_length else data


# ---------------------------------------------------------------- building


def build_index(
    corpora: Sequence[str | Path],
    out: Path,
    *,
    training_corpus: Corpus | None = None,
    text_column: str | None = None,
    console: Console | None = None,
) -> CorpusIndex:
    """The index of files, folders and named corpora at `out`; where it is there already and they are unchanged, that one.

    `prepared` are the tokens that a model was trained on. Where they were made of this very text, the documents that were
    held out from training are known, and are not searched; else all are. Memory does not grow with the corpus; on disk an
    index takes about five times the bytes of an English text, three of a Russian one.

    Raises:
        UsageError: a path that is not there, or `out` holds something else.
        NextwordError: there is no text in the corpora.
    """
    out, console = Path(out), console or Console(quiet=True)
    training_text_hash = (
        None
        if training_corpus is None
        else sha256(json.dumps(_text_hashes(training_corpus.manifest["sources"])).encode()).hexdigest()
    )
    build_settings = {
        "text_column": text_column,
        "prepared": training_text_hash,
    }  # every run on one text can use one index
    problems = IssueLog()
    with map_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.with_name(f".{out.name}.lock")).acquire()
    with lock:
        recover_interrupted_swap(out)
        sources = find_sources(corpora, problems, text_column, exclude=out)
        index = _open_if_unchanged(out, build_settings, sources, console.info)
        if index is not None:
            return index
        partial = out.with_name(f".{out.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            with map_disk_errors(partial):
                partial.mkdir()
            metadata = _build_files(sources, partial, training_corpus, problems, console)
            with map_disk_errors(partial):
                write_manifest(partial, {"kind": "index", "version": VERSION, "asked": build_settings, **metadata})
            atomic_replace_dir(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return CorpusIndex.open(out)


def _open_if_unchanged(
    out: Path, build_settings: dict[str, Any], sources: list[SourceFile], log: Callable[[str], None]
) -> CorpusIndex | None:
    """The index at `out` where it was made of the same text in the same way. Raises `UsageError` where `out` holds something
    else, which is not ours to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file() or read_manifest(out).get("kind") != "index":
        raise UsageError(f"{out}: exists and is not an index; name another place for it")
    manifest = read_manifest(out)
    if manifest.get("version") != VERSION or manifest.get("asked") != build_settings:
        return None
    known_sources = manifest["sources"]
    if len(known_sources) != len(sources) or not all(map(is_unchanged, sources, known_sources)):
        log(f"{out}: the text has changed, so the index is made anew")
        return None
    try:
        return CorpusIndex.open(out)
    except CorruptFileError as error:
        log(f"{error}\nThe index is damaged, so it is made anew")
        return None


class _IndexWriter:
    """Writes the documents as they go by, and a row of facts for each."""

    def __init__(self, directory: Path):
        self._text, self._rows = (directory / "text.bin").open("wb"), (directory / "rows.bin").open("wb")
        self._row = np.zeros(1, DOCUMENT_DTYPE)
        self.num_bytes = self.num_documents = 0

    def add(self, source: int, hashed: HashedDocument) -> None:
        self._row["begin"], self._row["source"], self._row["line"] = self.num_bytes, source, hashed.document.line or 0
        for chunk in hashed:
            self.num_bytes += self._text.write(chunk.encode())
        self._row["end"], self._row["key"] = self.num_bytes, hashed.finalize().hex()
        self._rows.write(self._row.tobytes())
        self.num_bytes += self._text.write(bytes([DOCUMENT_END]))
        self.num_documents += 1

    def close(self) -> None:
        self._text.write(bytes([DOCUMENT_END]) * PADDING)
        self._text.close()
        self._rows.close()


def _build_files(
    sources: list[SourceFile], directory: Path, training_corpus: Corpus | None, problems: IssueLog, console: Console
) -> dict[str, Any]:
    """Fill a directory; what its manifest is to say."""
    with map_disk_errors(directory), closing(_IndexWriter(directory)) as writer:
        scan = scan_corpus(sources, directory, problems, console.progress, console.info, writer.add)
    held_out = training_corpus is not None and _text_hashes(training_corpus.manifest["sources"]) == _text_hashes(
        scan.sources
    )
    if training_corpus is not None and not held_out:
        console.info(
            "the corpus is not the text that the model was trained on, so all of it is searched, "
            "and none of it is known to be held out"
        )
    text = MappedText(directory / "text.bin")
    position_dtype = np.dtype("<u4" if len(text) < 2**32 else "<u8")
    with map_disk_errors(directory):
        document_table = _write_documents(directory, text, writer.num_documents, scan if held_out else None)
        num_suffixes = _write_suffix_starts(directory / "suffixes.bin", text, document_table, position_dtype)
        sort_suffixes(
            text,
            directory / "suffixes.bin",
            num_suffixes,
            position_dtype,
            lambda done, of: console.progress("indexing", done, of),
        )
        write_sparse_index(text, directory / "suffixes.bin", directory / "signposts.bin", position_dtype)
    return {
        "held_out": held_out, "documents": writer.num_documents, "bytes": scan.size, "places": position_dtype.str,
        "problems": dict(problems.counts_by_kind), "sources": scan.sources,
    }  # fmt: skip


def _text_hashes(sources: list[dict[str, Any]]) -> list[str]:
    return [source["texts"] for source in sources]


def _write_documents(directory: Path, text: MappedText, count: int, split: CorpusScan | None) -> np.ndarray:
    """The table of documents, with how far each is learned from: to its end where no split is given."""
    rows_path = directory / "rows.bin"
    rows = np.lib.format.open_memmap(directory / "documents.npy", mode="w+", dtype=DOCUMENT_DTYPE, shape=(count,))
    rows[:] = np.memmap(rows_path, dtype=DOCUMENT_DTYPE, mode="r")
    rows["learned"] = rows["end"]
    if split is not None:
        for row in rows:
            assigned_split = split.split_for_key(bytes.fromhex(row["key"].decode()))
            if assigned_split == "both":
                row["learned"] = _last_tenth_start(text, int(row["begin"]), int(row["end"]))
            elif assigned_split == "validation":
                row["learned"] = row["begin"]
    rows.flush()
    rows_path.unlink()
    return rows


def _iter_character_starts(text: MappedText, start: int, end: int) -> Iterator[np.ndarray]:
    """Where the characters of a stretch of text begin, part by part; the ends of documents are none."""
    for chunk_start in range(start, end, CHUNK_BYTES):
        part = text.bytes[chunk_start : min(end, chunk_start + CHUNK_BYTES)]
        yield chunk_start + np.flatnonzero(((part & 0xC0) != 0x80) & (part != DOCUMENT_END))


def _last_tenth_start(text: MappedText, begin: int, end: int) -> int:
    """Where the last tenth of a document's characters begins, which is held out where there are few documents."""
    remaining = sum(len(part) for part in _iter_character_starts(text, begin, end)) * 9 // 10
    for part in _iter_character_starts(text, begin, end):
        if remaining < len(part):
            return int(part[remaining])
        remaining -= len(part)
    return end


def _write_suffix_starts(path: Path, text: MappedText, rows: np.ndarray, position_dtype: np.dtype) -> int:
    """Write where each character begins that is learned from, in the order of the text; how many."""
    count = 0
    with path.open("wb") as file:
        begin = 0
        held_out_rows = np.flatnonzero(rows["learned"] < rows["end"])
        for start, end in [*rows[held_out_rows][["learned", "end"]].tolist(), (len(text), len(text))]:
            for part in _iter_character_starts(text, begin, start):
                file.write(part.astype(position_dtype).tobytes())
                count += len(part)
            begin = end
    return count
