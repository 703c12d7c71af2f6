"""Files to documents: every format read as a stream, every flaw reported, none fatal.

A document is one text file, or one row of a table. It comes in pieces of at most `PIECE` characters, so that memory
stays flat whatever the size. Line ends become "\\n", an encoding mark (UTF-8, UTF-16, UTF-32) is honoured and
dropped, bytes that are no UTF-8 become U+FFFD; the text is otherwise kept as it is.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.errors import MissingExtra, UsageError
from nextword.files import MANIFEST
from nextword.text.streams import (
    LONGEST_LINE,
    Lines,
    Problem,
    Problems,
    decoded,
    pieces,
    reason,
    suffixes,
    without_surrogates,
)

__all__ = [
    "FORMATS",
    "Document",
    "Problem",
    "Problems",
    "Source",
    "find_files",
    "parquet_rows",
    "pieces",
    "read_documents",
    "without_surrogates",
]

FORMATS = (".txt", ".md", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
ARCHIVES = (".tar", ".tgz", ".tbz", ".txz", ".zip", ".xz", ".bz2", ".7z", ".rar", ".lz4", ".br")
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "story")


@dataclass
class Document:
    """One text. `pieces` is read once, before the next document is asked for; `line` is that of its row."""

    path: Path
    line: int | None
    pieces: Iterator[str]


@dataclass
class Source:
    """One file of a corpus: its name in the corpus, and how its documents are read, as often as one likes."""

    name: str
    path: Path
    read: Callable[[Problems], Iterator[Document]]


def find_files(
    corpora: Iterable[Path], problems: Problems, text_column: str | None = None, leave_out: Path | None = None
) -> list[Source]:
    """The text files under each path, in the order of their names, the same on every machine.

    A linked folder is entered once. What is not read is reported: other suffixes by count, links that lead nowhere or
    back, hidden files, and folders that nextword made (`leave_out` is one in the making). Raises `UsageError` for a
    missing path.
    """
    sources: list[Source] = []
    left_out = None if leave_out is None else leave_out.resolve()
    for corpus in corpora:
        corpus = Path(corpus)
        if not corpus.exists():
            raise UsageError(f"{corpus}: no such file or folder")
        others: Counter[str] = Counter()
        for path in _walk(corpus, problems, others, left_out) if corpus.is_dir() else [corpus]:
            suffix = suffixes(path)[0]
            if suffix in FORMATS:
                name = path.relative_to(corpus).as_posix() if path != corpus else path.name
                sources.append(Source(name, path, lambda found, path=path: read_documents(path, found, text_column)))
            elif suffix in ARCHIVES:
                problems.add(path, None, "an archive or a compression that is not read; unpack it first")
            elif path == corpus:
                problems.add(path, None, f"not a format that is read ({', '.join(FORMATS)}, plain, .gz or .zst)")
            else:
                others["with the suffix " + suffix if suffix else "without a suffix"] += 1
        for kind, count in sorted(others.items()):
            problems.notice(corpus, None, f"left out: files {kind}", count=count)
    return sources


def _walk(root: Path, problems: Problems, others: Counter[str], left_out: Path | None) -> Iterator[Path]:
    """Every plain file under a folder, depth first, by name."""
    entered: set[Path] = set()
    waiting = [root]
    while waiting:
        path = waiting.pop()
        try:
            if path.is_dir():
                real = path.resolve()
                if real in entered:
                    problems.add(path, None, "a link to a folder that was entered already; not followed again")
                elif real == left_out or (path / MANIFEST).is_file():
                    problems.notice(path, None, "left out: a folder that nextword makes")
                else:
                    entered.add(real)
                    inside = sorted(path.iterdir(), key=lambda p: p.name, reverse=True)
                    shown = [p for p in inside if not p.name.startswith(".")]
                    if len(shown) < len(inside):
                        others["or folders that are hidden"] += len(inside) - len(shown)
                    waiting += shown
            elif path.is_file():
                yield path
            else:
                problems.add(path, None, "not a file: a link that leads nowhere or round in a circle, or a device")
        except (OSError, RuntimeError) as error:  # pathlib says of some loops that they are a RuntimeError
            problems.add(path, None, "cannot be read", reason(error))


def read_documents(path: Path, problems: Problems, text_column: str | None = None) -> Iterator[Document]:
    """The documents of one file. Whatever is wrong with it goes to `problems`, and the rest is read all the same.

    `text_column` names the column of a table that holds the text; without it the first of `TEXT_COLUMNS` is taken.
    Raises `MissingExtra` for a `.parquet` or a `.zst` without its package, and under strict `NextwordError` at the
    first problem.
    """
    suffix, compression = suffixes(path)
    if suffix == ".parquet":
        if compression:
            problems.add(path, None, "parquet files are compressed inside; unpack this one")
            return
        yield from _documents(path, parquet_rows(path, problems, text_column), problems)
        return
    chunks = decoded(path, problems)
    if suffix in (".txt", ".md"):
        documents = _read_text(path, chunks, problems)
    else:
        rows = _read_jsonl if suffix in (".jsonl", ".ndjson") else _read_csv
        documents = _documents(path, rows(path, Lines(path, chunks, problems), problems, text_column), problems)
    found, before = False, problems.total
    for document in documents:
        found = True
        yield document
    if not found and problems.total == before:  # else it has been said already why there is nothing
        problems.add(path, None, "there is no text in the file")


def _documents(path: Path, rows: Iterable[tuple[int, str]], problems: Problems) -> Iterator[Document]:
    """A document for each row, by its line and text."""
    for line, text in rows:
        if text.strip():
            yield Document(path, line, pieces([text]))
        else:
            problems.add(path, line, "the text is empty")


def _read_text(path: Path, chunks: Iterable[str], problems: Problems) -> Iterator[Document]:
    """A text file: one document."""

    def watched() -> Iterator[str]:
        """The chunks, with a word where a line is so long that it is no line."""
        line, length = 1, 0
        for chunk in chunks:
            before = length
            breaks = chunk.count("\n")
            length = len(chunk) - 1 - chunk.rfind("\n") if breaks else length + len(chunk)
            if length > LONGEST_LINE >= before:
                what = f"a line of more than {LONGEST_LINE:,} characters; kept, and read in pieces"
                problems.notice(path, line + breaks, what)
            line += breaks
            yield chunk

    text = pieces(watched())
    first, second = next(text, ""), next(text, "")
    if first.strip() or second:
        yield Document(path, None, (piece for part in ((first, second), text) for piece in part if piece))


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _column(columns: Iterable[str], wanted: str | None) -> str | None:
    """The column that holds the text."""
    names = list(columns)
    return next((name for name in ((wanted,) if wanted else TEXT_COLUMNS) if name in names), None)


def _no_column(columns: Iterable[str], wanted: str | None) -> str:
    names = list(columns)
    found = ", ".join(map(str, names[:12])) + (", …" if len(names) > 12 else "") or "none"
    return f"looked for {wanted or ', '.join(TEXT_COLUMNS)}; found {found}. Name one with --text-column"


def _read_jsonl(path: Path, lines: Lines, problems: Problems, wanted: str | None) -> Iterator[tuple[int, str]]:
    """The line and the text of each record."""
    for line in lines:
        lines.begin_row()
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(path, lines.number, "not valid JSON", reason(error))
            continue
        if not isinstance(record, dict):
            problems.add(path, lines.number, "not a JSON object", f"it is a {type(record).__name__}")
        elif (column := _column(record, wanted)) is None:
            problems.add(path, lines.number, "no text column", _no_column(record, wanted))
        elif not isinstance(text := record[column], str):
            problems.add(path, lines.number, "the text is not a string", f"{column} is a {type(text).__name__}")
        else:
            clean = without_surrogates(text) if "\\u" in line else text
            if clean != text:
                problems.add(path, lines.number, "half a surrogate pair; replaced by U+FFFD")
            yield lines.number, _newlines(clean)


def _read_csv(path: Path, lines: Lines, problems: Problems, wanted: str | None) -> Iterator[tuple[int, str]]:
    """The first line and the text of each row.

    A quote that is never closed costs its own line only. In tab-separated files a quote is a letter like any other,
    as their registered media type has it.
    """
    csv.field_size_limit(LONGEST_LINE)  # the library's own limit of 131,072 characters is shorter than a book
    tab = suffixes(path)[0] == ".tsv"
    header: list[str] | None = None
    column = -1
    while True:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(lines)
        lines.begin_row()
        try:
            row = next(reader, None)
        except csv.Error as error:
            problems.add(
                path, lines.back_to_second(), "a row that cannot be read; its first line is left out", str(error)
            )
            continue
        if row is None:
            return
        if lines.ended:  # the row ended with the file, inside quotes
            problems.add(path, lines.back_to_second(), "a quote that is never closed; its line is left out")
            continue
        first = lines.first
        if not row:
            continue
        if header is None:
            header, name = row, _column(row, wanted)
            if name is None:
                problems.add(path, first, "no text column", _no_column(row, wanted))
                return
            column = row.index(name)
        elif len(row) <= column:
            problems.add(path, first, "a row with too few columns; left out", f"{len(row)} instead of {len(header)}")
        else:
            if len(row) > len(header):
                what = "a row with too many columns; its text is kept, and may be cut at an unquoted separator"
                problems.add(path, first, what, f"{len(row)} instead of {len(header)}")
            yield first, row[column]


def parquet_rows(path: Path, problems: Problems, wanted: str | None = None) -> Iterator[tuple[int, str]]:
    """The number (from 1) and the text of each row of a parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(f"{path}: a .parquet file", "parquet") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            name = _column(names, wanted)
            if name is None:
                problems.add(path, None, "no text column", _no_column(names, wanted))
                return
            for batch in file.iter_batches(batch_size=256, columns=[name]):
                for value in _cells(batch.column(0), pyarrow):
                    row += 1
                    if not isinstance(value, bytes):
                        problems.add(path, row, "the text is not a string", f"{name} is a {type(value).__name__}")
                        continue
                    text = value.decode("utf-8", "replace")
                    if "\ufffd" in text and text.encode() != value:
                        problems.add(path, row, "not valid UTF-8; replaced by U+FFFD")
                    yield row, _newlines(text)
    except (OSError, ValueError, EOFError, pyarrow.ArrowException) as error:
        problems.add(
            path, row or None, "not a parquet file that can be read; the rest of it is left out", reason(error)
        )
    if not row and path.is_file():
        problems.add(path, None, "the file has no rows")


def _cells(column: Any, pyarrow: Any) -> list[Any]:
    """The values of a column: text as bytes, for it may be no UTF-8; anything else as it is."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return (column.cast(pyarrow.large_binary()) if is_text else column).to_pylist()
