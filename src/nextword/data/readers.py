"""Files to documents, and tables to records. Every flaw goes to an `IssueLog`; none is fatal.

A document is a text file, or a row of a table. Its text comes in chunks, so that memory use does not depend on its
length. Rows of tables (CSV, TSV, JSON Lines, JSON and Parquet) are read one at a time; only a `.json` file is held in
memory whole. Line ends become "\\n", a byte order mark is honoured and dropped, and what is not valid becomes U+FFFD;
otherwise the text is kept as it is.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nextword.common.errors import UsageError, import_optional
from nextword.common.fs import MANIFEST, is_json_array, is_json_object
from nextword.common.text_units import ends_sentence, split_words, uses_spaces
from nextword.data.decoding import (
    MAX_LINE_CHARS,
    LineReader,
    RowTooLongError,
    check_expansion,
    decode_chunks,
    file_format,
    rechunk,
)
from nextword.data.issues import IssueLog, RowError, error_text, join_names, replace_surrogates

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tbz", ".txz", ".zip", ".xz", ".bz2", ".7z", ".rar", ".lz4", ".br")
# The usual names of a column of texts, most usual first (case is ignored).
TEXT_COLUMNS = (
    *("text", "content", "document", "body", "article", "story"),
    *("sentence", "review", "comment", "tweet", "utterance"),
)
MAX_JSON_CHARS = 2**28  # of a .json file
MAX_JSON_VALUES = 2**21  # of a row, each of which takes about a hundred bytes of memory
PARQUET_BATCH_BYTES = 2**26  # read at once, unless a single row is larger

csv.field_size_limit(MAX_LINE_CHARS)  # the library's default of 131,072 characters is too short for a book
CSV_SAMPLE_CHARS = 2**16  # of which the separator is decided
TSV_SAMPLE_CHARS = 2**24  # of which it is decided whether quotes enclose cells

_TSV_CELL = re.compile(r"""(?:("(?:[^"]|"")*+")|([^\t\n]*))(?:[\t\n]|\Z)""")  # quoted or not
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"')
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)*")
MAX_NAME_WORDS, MAX_NAME_CHARACTERS = 5, 15  # of a column; characters in scripts without spaces
_WHITESPACE = re.compile(r"[ \t\n\r]*")

ColumnSelector = Callable[[list[str]], list[str]]
RecordMaker = Callable[[int, Any], "Iterator[Record]"]  # of the object at a line, if it is one


@dataclass
class Document:
    """A text of the corpus.

    Attributes:
        path: the file that it was read from.
        line: the line of its row (in Parquet the number of the row), from 1; None if the file is one document.
        chunks: its text. To be read once, before the next document is requested.
    """

    path: Path
    line: int | None
    chunks: Iterator[str]


@dataclass
class SourceFile:
    """A file of the corpus: its name within the corpus, its path, and a function that reads its documents."""

    name: str
    path: Path
    read: Callable[[IssueLog], Iterator[Document]]


def find_files(
    corpora: Iterable[Path], issues: IssueLog, text_column: str | None = None, exclude: Path | None = None
) -> list[SourceFile]:
    """The text files at or below each path, in the order of their names.

    Args:
        corpora: files and folders. A folder that is reached by several links is read once.
        issues: where files are recorded that are not read: other formats by count, broken links, hidden files, and the
            directories of runs, models and prepared text.
        text_column: see `read_documents`.
        exclude: a directory that is not read, with the hidden files beside it that belong to it.

    Raises:
        UsageError: a path does not exist.
    """
    sources: list[SourceFile] = []
    for corpus in map(Path, corpora):
        if not corpus.exists():
            raise UsageError(f"{corpus}: no such file or folder")
        skipped_counts: Counter[str] = Counter()
        paths = _walk_files(corpus, issues, skipped_counts, exclude and exclude.resolve())
        for path in paths if corpus.is_dir() else [corpus]:
            suffix = file_format(path)[0]
            if suffix in TEXT_SUFFIXES:
                name = path.relative_to(corpus).as_posix() if path != corpus else path.name
                sources.append(SourceFile(name, path, partial(read_documents, path, text_column=text_column)))
            elif suffix in ARCHIVE_SUFFIXES:
                issues.add(path, None, "an archive or compression format that is not supported; unpack it first")
            elif path == corpus:
                issues.add(path, None, f"not a supported format ({', '.join(TEXT_SUFFIXES)}, plain, .gz or .zst)")
            else:
                skipped_counts["files with the suffix " + suffix if suffix else "files without a suffix"] += 1
        for kind, count in sorted(skipped_counts.items()):
            issues.info(corpus, None, f"left out: {kind}", count=count)
    return sources


def _walk_files(root: Path, issues: IssueLog, skipped_counts: Counter[str], exclude: Path | None) -> Iterator[Path]:
    """Every regular file below a folder, depth first, by name."""
    visited: set[Path] = set()
    pending = [root]
    while pending:
        path = pending.pop()
        try:
            if path.is_dir():
                resolved = path.resolve()
                if resolved in visited:
                    issues.add(path, None, "a link to a folder that was read already; not followed again")
                elif resolved == exclude or _is_run_or_model(path):
                    issues.info(path, None, "left out: a run, a model or another directory made by nextword")
                else:
                    visited.add(resolved)
                    entries = sorted(path.iterdir(), key=lambda p: p.name, reverse=True)
                    pending += [p for p in entries if not p.name.startswith(".")]
                    # The lock and the temporary directories beside `exclude` are nextword's own.
                    own_prefix = f".{exclude.name}." if exclude else "/"
                    if hidden := sum(p.name.startswith(".") and not p.name.startswith(own_prefix) for p in entries):
                        skipped_counts["files or folders that are hidden"] += hidden
            elif path.is_file():
                yield path
            else:
                issues.add(path, None, "not a file: a broken link, a loop of links, or a device")
        except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for some loops of links
            issues.add(path, None, "cannot be read", error_text(error))


def _is_run_or_model(path: Path) -> bool:
    """Whether a directory is one that nextword has made, finished or not, or holds a model of any program."""
    names = {file.name for file in path.iterdir()}
    is_run = "run.json" in names and not names.isdisjoint(("checkpoints", "metrics.jsonl", "data", "model", "lock"))
    model_files = (".safetensors", ".gguf", ".bin", ".pt", ".pth", "tokenizer.json", "tokenizer_config.json")
    is_model = "config.json" in names and any(name.endswith(model_files) for name in names)
    return is_run or is_model or MANIFEST in names


def read_documents(path: Path, issues: IssueLog, text_column: str | None = None) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
        path: a file with one of `TEXT_SUFFIXES`, plain, .gz or .zst.
        issues: where flaws are recorded; the rest of the file is read all the same.
        text_column: the column of a table that holds the text. Default: the first of `TEXT_COLUMNS` that exists.

    Raises:
        MissingDependencyError: a .parquet or .zst file without the package that reads it.
        NextwordError: at the first issue, if `issues` is strict.
    """
    has_documents, issues_before = False, issues.total
    if file_format(path)[0] in (".txt", ".md"):
        chunks = rechunk(_report_long_lines(path, decode_chunks(path, issues), issues))
        first = list(islice(chunks, 2))
        if has_documents := bool("".join(first[:1]).strip() or first[1:]):  # not blank
            yield Document(path, None, chain(first, chunks))
    else:
        for line, text in read_text_rows(path, issues, text_column):
            if text.strip():
                has_documents = True
                yield Document(path, line, rechunk([text]))
            else:
                issues.add(path, line, "the text is empty")
    if not has_documents and issues.total == issues_before:  # no issue explains it
        issues.add(path, None, "there is no text in the file")


def _report_long_lines(path: Path, chunks: Iterable[str], issues: IssueLog) -> Iterator[str]:
    """The chunks, with an issue for a line that is longer than a line of text can be."""
    line, length = 1, 0
    for chunk in chunks:
        length_before = length
        num_breaks = chunk.count("\n")
        length = len(chunk) - 1 - chunk.rfind("\n") if num_breaks else length + len(chunk)
        if length > MAX_LINE_CHARS >= length_before:
            what = f"a line of more than {MAX_LINE_CHARS:,} characters; kept, and read in chunks"
            issues.info(path, line + num_breaks, what)
        line += num_breaks
        yield chunk


def read_text_rows(path: Path, issues: IssueLog, text_column: str | None = None) -> Iterator[tuple[int, str]]:
    """The line (in Parquet the number of the row), from 1, and the text of each row of a table, blank ones included."""
    candidates = (text_column,) if text_column else TEXT_COLUMNS

    def select_text_column(names: list[str]) -> list[str]:
        name = text_column if text_column in names else find_column(names, candidates)
        if name is None:
            detail = f"looked for {', '.join(candidates)}; found {join_names(names)}. Name one with --text-column"
            detail += " (finetune: --column text=NAME)"
            raise MissingColumnError("no text column", detail)
        return [name]

    for record in read_records(path, issues, select_text_column):
        [(name, text)] = record.values.items()
        if isinstance(text, str):
            yield record.line, text
        else:
            issues.add(path, record.line, "the text is not a string", f"{name} is a {type(text).__name__}")


def find_column(column_names: list[str], aliases: Iterable[str], exclude: Iterable[str] = ()) -> str | None:
    """The column with the first alias that occurs; case and surrounding spaces are ignored."""
    excluded = set(exclude)
    available = {name.strip().lower(): name for name in reversed(column_names) if name not in excluded}
    return next((available[key] for alias in aliases if (key := alias.strip().lower()) in available), None)


# ---------------------------------------------------------------- tables


class MissingColumnError(RowError):
    """Raised by a `ColumnSelector` if a table, or an object in JSON, lacks a required column.

    `read_records` records it as an issue of this kind and detail, and skips the table or the object.
    """


@dataclass(slots=True)
class Record:
    """A row of a table.

    Attributes:
        line: the line where it begins (in Parquet the number of the row), from 1.
        values: the values by column.
        row: the values of all columns, if `read_records` keeps them.
    """

    line: int
    values: dict[str, Any]
    row: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class TableFormat:
    """How a table is read.

    Attributes:
        suffix: the format, one of `TABLE_SUFFIXES`. Default: that of the file's name.
        header_names: usual names of columns. If they are given, the rows decide whether the first one is a header: in a table
            without one the columns are called 1, 2, ….
        is_numbered: columns are requested by number, so a first row that may be either is data.
        keeps_rows: each record also has the values of all columns.
    """

    suffix: str = ""
    header_names: frozenset[str] = frozenset()
    is_numbered: bool = False
    keeps_rows: bool = False


def read_records(
    path: Path,
    issues: IssueLog,
    select_columns: ColumnSelector | None = None,
    blocks: Iterator[bytes] | None = None,
    table_format: TableFormat = TableFormat(),
) -> Iterator[Record]:
    """Read the rows of a table.

    A `.json` file is a list of objects, or an object with exactly one list of objects among its values.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .json file (each plain, .gz or .zst), or a .parquet file.
        issues: where flaws are recorded; the other rows are read all the same.
        select_columns: returns the columns to read, given those that exist, or raises `MissingColumnError`. It is
            called once for a table, and for every object in JSON. Default: all columns.
        blocks: the bytes of a file in an archive; `path` then only names it.
        table_format: how the table is read.

    Yields:
        Records, whose values have the types of the format; those of CSV and TSV are strings.

    Raises:
        MissingDependencyError: a .parquet or .zst file without the package that reads it.
        NextwordError: at the first issue, if `issues` is strict.
    """
    suffix, compression = file_format(path)
    suffix, selector = table_format.suffix or suffix, select_columns or list[str]
    make_record = partial(_make_record, path, issues, selector, table_format.keeps_rows)
    if suffix not in TABLE_SUFFIXES:
        issues.add(path, None, f"not a supported table ({', '.join(TABLE_SUFFIXES)}, plain, .gz or .zst)")
    elif suffix == ".parquet" and compression:
        issues.add(path, None, "parquet files are compressed inside; unpack this one")
    elif blocks is not None and (compression or suffix == ".parquet"):
        issues.add(path, None, "compressed inside an archive; unpack the archive")
    elif suffix == ".parquet":
        yield from _read_parquet(path, issues, selector, table_format.keeps_rows)
    elif suffix == ".json":
        yield from _read_json(path, decode_chunks(path, issues, blocks), issues, make_record)
    else:
        lines = LineReader(path, decode_chunks(path, issues, blocks), issues)
        if suffix in (".jsonl", ".ndjson"):
            yield from _read_jsonl(path, lines, issues, make_record)
        else:
            yield from _read_csv(path, lines, issues, selector, replace(table_format, suffix=suffix))


def map_strings(value: Any, transform: Callable[[Any], str], string_type: type = str) -> Any:
    """A JSON value with every string (or bytes) transformed, those in lists and objects included."""
    if isinstance(value, string_type):
        return transform(value)
    if is_json_array(value):
        return [map_strings(item, transform, string_type) for item in value]
    if is_json_object(value):
        return {name: map_strings(item, transform, string_type) for name, item in value.items()}
    return value


def _normalize_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---------------------------------------------------------------- JSON


def _read_jsonl(path: Path, lines: LineReader, issues: IssueLog, make_record: RecordMaker) -> Iterator[Record]:
    for line in lines:
        lines.start_row()
        if line.isspace():
            continue
        if len(line) > MAX_JSON_VALUES and sum(map(_JSON_STRING.sub("", line).count, ",[{")) > MAX_JSON_VALUES:
            what = f"more than {MAX_JSON_VALUES:,} values in one row; left out: make several rows of it"
            issues.lose_row(path, lines.line_number, what)
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            issues.lose_row(path, lines.line_number, "not valid JSON", error_text(error))
            continue
        yield from make_record(lines.line_number, value)


def _make_record(
    path: Path, issues: IssueLog, selector: ColumnSelector, keeps_rows: bool, line: int, value: Any
) -> Iterator[Record]:
    """The record of a JSON object; none if it is no object or lacks a column."""
    if not is_json_object(value):
        issues.lose_row(path, line, "not a JSON object", f"it is a {type(value).__name__}")
        return
    try:
        selected = [name for name in selector(list(value)) if name in value]
        needed = value if keeps_rows else {name: value[name] for name in selected}
        values = map_strings(needed, _normalize_newlines)
        clean = map_strings(values, lambda text: replace_surrogates(text).replace("\0", "\ufffd"))
        was_repaired = clean != values
    except MissingColumnError as error:
        issues.lose_row(path, line, error.kind, error.detail)
        return
    except RecursionError as error:  # `json` parses deeper nesting than `map_strings` can walk
        issues.lose_row(path, line, "not valid JSON", error_text(error))
        return
    if was_repaired:
        issues.add(path, line, "half a surrogate pair, or NUL; replaced by U+FFFD")
    yield Record(line, {name: clean[name] for name in selected}, clean if keeps_rows else {})


class _JSONScanner:
    """Parses the objects of a JSON text one by one, with their lines. A syntax error is a `ValueError`.

    The standard library's decoder parses the values. (It reports no positions, and `ijson` no line numbers.)
    """

    def __init__(self, text: str):
        self._text, self._position = text, 0
        self._decoder = json.JSONDecoder()

    @property
    def line(self) -> int:
        """The line of the current position."""
        return 1 + self._text.count("\n", 0, self._position)

    def peek(self) -> str:
        """The next character that is not whitespace; "" at the end."""
        space = _WHITESPACE.match(self._text, self._position)
        self._position = space.end() if space else self._position
        return self._text[self._position : self._position + 1]

    def take(self, characters: str) -> str:
        """Skip the next character, which has to be one of `characters`."""
        character = self.peek()
        if not character or character not in characters:
            expected = " or ".join(map(repr, characters))
            raise json.JSONDecodeError(f"expected {expected}", self._text, self._position)
        self._position += 1
        return character

    def read_value(self) -> Any:
        """Parse the value at the current position."""
        self.peek()
        value, self._position = self._decoder.raw_decode(self._text, self._position)
        return value

    def _iter_items(self, closing: str) -> Iterator[None]:
        """Go to each item of the list or object at the current position. The caller reads it."""
        self._position += 1
        if self.peek() == closing:
            self._position += 1
            return
        yield
        while self.take(closing + ",") == ",":
            yield

    def iter_elements(self) -> Iterator[tuple[int, Any]]:
        """The first line and the value of each element of the list at the current position."""
        line, counted = self.line, self._position
        for _ in self._iter_items("]"):
            self.peek()
            line, counted = line + self._text.count("\n", counted, self._position), self._position
            yield line, self.read_value()

    def collect_object_lists(self, lists: dict[str, list[tuple[int, Any]]]) -> None:
        """Parse the object at the current position, and put its lists of objects into `lists`, as far as they are valid."""
        for _ in self._iter_items("}"):
            if self.peek() != '"':
                self.take('"')  # raises
            name = self.read_value()
            self.take(":")
            if self.peek() != "[":
                self.read_value()
                continue
            elements: list[tuple[int, Any]] = []
            for line, value in self.iter_elements():
                elements.append((line, value))
                if isinstance(value, dict):
                    lists[name] = elements


def _read_json(path: Path, chunks: Iterable[str], issues: IssueLog, make_record: RecordMaker) -> Iterator[Record]:
    scanner = _JSONScanner(join_chunks(path, chunks, issues))
    lists: dict[str, list[tuple[int, Any]]] = {}
    first = scanner.peek()
    try:
        if first == "[":
            for line, value in scanner.iter_elements():
                yield from make_record(line, value)
        elif first == "{":
            scanner.collect_object_lists(lists)
        elif first:
            scanner.read_value()
        trailing = scanner.peek()
        if first == trailing == "{":
            what = "something after the end of the JSON; if each line is an object, name the file .jsonl"
            issues.add(path, scanner.line, what)
            return
        if trailing:
            issues.add(path, scanner.line, "something after the end of the JSON; left out")
        elif first and first != "[" and not lists:
            issues.add(path, 1, "neither a list of objects, nor an object with one in it")
    except (ValueError, RecursionError) as error:
        issues.add(path, scanner.line, "not valid JSON; the rest of the file is left out", error_text(error))
    if len(lists) > 1:
        issues.add(path, 1, "more than one list of objects; make a file of each", ", ".join(lists))
        return
    for line, value in chain.from_iterable(lists.values()):
        yield from make_record(line, value)


def join_chunks(path: Path, chunks: Iterable[str], issues: IssueLog) -> str:
    """The first `MAX_JSON_CHARS` characters of a text."""
    parts, room = list[str](), MAX_JSON_CHARS
    for chunk in chunks:
        parts.append(chunk[:room])
        if len(chunk) > room:
            what = f"more than {MAX_JSON_CHARS:,} characters; the rest is left out. Make a .jsonl file of it"
            issues.add(path, None, what)
            break
        room -= len(chunk)
    return "".join(parts)


# ---------------------------------------------------------------- CSV and TSV


def _read_csv(
    path: Path, lines: LineReader, issues: IssueLog, selector: ColumnSelector, table_format: TableFormat
) -> Iterator[Record]:
    read_options = _tsv_options if table_format.suffix == ".tsv" else _csv_options
    options = read_options(path, lines, issues)
    sample = (
        list(islice(csv.reader(lines.peek(CSV_SAMPLE_CHARS), **options), 1000)) if table_format.header_names else []
    )
    rows = _iter_csv_rows(path, lines, issues, options)
    header_line, header = next(rows, (0, list[str]()))
    if not header:
        return
    is_header = first_row_is_header(sample, table_format.header_names) if sample else True
    if is_header is False or (is_header is None and table_format.is_numbered):
        cells = " · ".join(f"{number}: {cell[:30]}" for number, cell in enumerate(header, 1))
        issues.info(path, header_line, "no header: the first line is data, and the columns are numbered", cells)
        rows = chain([(header_line, header)], rows)
        header = [str(number + 1) for number in range(max(map(len, sample)))]
    try:
        names = selector(list(dict.fromkeys(header)))
    except MissingColumnError as error:
        issues.add(path, header_line, error.kind, error.detail)
        return
    column_indices = {name: header.index(name) for name in names if name in header}
    if repeated := [name for name in column_indices if header.count(name) > 1]:
        issues.add(path, header_line, "two columns of one name; the first is read", ", ".join(repeated))
    min_columns = max(column_indices.values(), default=-1) + 1
    for line, row in rows:
        what, is_kept = None, True
        if len(row) < min_columns:
            what, is_kept = "a row with too few columns; left out", False
        elif len(row) > len(header) and len(column_indices) > 1:  # the columns of the values are not known
            what, is_kept = "a row with too many columns; left out: put quotes around its text", False
        elif len(row) > len(header):
            what = "a row with too many columns; its text is kept, and may be cut at an unquoted separator"
        if what is not None:
            record = issues.add if is_kept else issues.lose_row
            record(path, line, what, f"{len(row)} instead of {len(header)}")
        if is_kept:
            values = {name: row[index] for name, index in column_indices.items()}
            yield Record(line, values, dict(zip(header, row, strict=False)) if table_format.keeps_rows else {})


def first_row_is_header(rows: Sequence[Sequence[str]], known_names: Collection[str]) -> bool | None:
    """Whether the first row of a table names its columns; None if the rows do not tell.

    It is data if one of its cells occurs again in its column, is as long as a sentence, or is a number (unless the numbers
    count the columns). It is a header if it has a known name, or if a column has numbers in all other rows.
    """
    first, rest = [cell.strip() for cell in rows[0]], [row for row in rows[1:] if row != rows[0]]
    columns = [[row[i].strip() for row in rest if i < len(row)] for i in range(len(first))]
    if any(cell and cell in column for cell, column in zip(first, columns, strict=True)):
        return False
    if any(cell.lower() in known_names for cell in first):
        return True
    numbers = [cell for cell in first if _NUMBER.fullmatch(cell)]
    counts_columns = numbers in ([str(i) for i in range(len(numbers))], [str(i + 1) for i in range(len(numbers))])
    is_range = counts_columns and len(numbers) >= len(first) - 1 and len(numbers) > 1
    if (numbers and not is_range) or any(map(_reads_like_text, first)):
        return False
    return True if is_range or any(column and all(map(_NUMBER.fullmatch, column)) for column in columns) else None


def _reads_like_text(cell: str) -> bool:
    """Whether a cell is too long for the name of a column, or ends with a sentence terminal of any script."""
    limit = MAX_NAME_WORDS if uses_spaces(cell) else MAX_NAME_CHARACTERS
    return len(split_words(cell)) > limit or ends_sentence(cell)


def _csv_options(path: Path, lines: LineReader, issues: IssueLog) -> dict[str, Any]:
    """The separator, which gives most rows at the beginning of the file as many cells as the header. Excel may name it."""
    sample = lines.peek(CSV_SAMPLE_CHARS)
    if named := re.fullmatch(r"sep=(.)\s*", "".join(sample[:1])):
        next(lines)
        return {"delimiter": named[1]}

    def num_regular_rows(delimiter: str) -> int:
        with suppress(csv.Error):
            widths = [len(row) for row in csv.reader(sample, delimiter=delimiter) if row]
            return sum(width == widths[0] > 1 for width in widths)
        return 0

    delimiter = max(",;\t|", key=num_regular_rows)
    if delimiter != ",":
        issues.info(path, None, "the separator of the columns is", repr(delimiter))
    return {"delimiter": delimiter}


def _tsv_options(path: Path, lines: LineReader, issues: IssueLog) -> dict[str, Any]:
    """Whether quotes enclose cells, as most programs write them, or are ordinary characters, as in the registered media type.

    They enclose cells if each quote of the file belongs to a quoted cell, and the header is quoted, or a cell has doubled
    quotes, a line break or a tab; but not if the rows have equal lengths without quoting, and not with it.
    """
    sample = lines.peek(TSV_SAMPLE_CHARS)
    cells = _TSV_CELL.findall("".join(sample))
    are_regular = len({line.count("\t") for line in sample if line.strip()}) == 1 and "\t" in sample[0]
    spans_cells = any("\t" in quoted or "\n" in quoted for quoted, _ in cells)
    is_quoted = not (spans_cells and are_regular) and (
        spans_cells or bool(cells[0][0]) or any('""' in quoted[1:-1] for quoted, _ in cells)
    )
    if is_quoted and any('"' in unquoted for _, unquoted in cells):
        issues.info(path, None, "quotes are read as characters, because some do not enclose a cell")
        is_quoted = False
    elif is_quoted:
        issues.info(path, None, "quotes enclose cells, and are not part of them")
    return {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE}


def _iter_csv_rows(
    path: Path, lines: LineReader, issues: IssueLog, options: dict[str, Any]
) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each row that is not blank.

    A quote that is never closed loses its own line only.
    """
    while True:
        reader = csv.reader(lines, **options)
        lines.start_row()
        try:
            row = next(reader, None)
        except RowTooLongError as error:  # not read again: each of its quotes might begin another long row
            issues.lose_row(path, lines.first_line_number, "a row that is too long; left out", str(error))
            continue
        except csv.Error as error:
            what = "a row that cannot be read; its first line is left out"
            issues.lose_row(path, lines.rewind_to_second_line(), what, str(error))
            continue
        if row is None:
            return
        if lines.exhausted:  # the file has ended inside quotes
            issues.lose_row(path, lines.rewind_to_second_line(), "a quote that is never closed; its line is left out")
        elif row:
            yield lines.first_line_number, row


# ---------------------------------------------------------------- Parquet


def _read_parquet(path: Path, issues: IssueLog, selector: ColumnSelector, keeps_rows: bool) -> Iterator[Record]:
    arrow = import_optional("pyarrow", f"{path}: a .parquet file", "parquet")
    parquet = import_optional("pyarrow.parquet", f"{path}: a .parquet file", "parquet")
    invalid: list[bytes] = []

    def decode(data: bytes) -> str:
        text = data.decode("utf-8", "replace").replace("\0", "\ufffd")
        if "\ufffd" in text and text.encode() != data:
            invalid.append(data)
        return _normalize_newlines(text)

    row = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            available = list(dict.fromkeys(file.schema_arrow.names))
            selected = [name for name in selector(available) if name in available]
            names = available if keeps_rows else selected
            batch_size = _parquet_batch_size(path, file.metadata, names)
            for batch in file.iter_batches(batch_size=batch_size, columns=names):
                columns = {name: _column_values(batch.column(batch.schema.names.index(name)), arrow) for name in names}
                for index in range(batch.num_rows):
                    row += 1
                    invalid.clear()
                    values = {name: map_strings(column[index], decode, bytes) for name, column in columns.items()}
                    if invalid:
                        issues.add(path, row, "not valid UTF-8, or NUL; replaced by U+FFFD")
                    selected_values = {name: values[name] for name in selected}
                    yield Record(row, selected_values, values if keeps_rows else {})
    except MissingColumnError as error:
        issues.add(path, None, error.kind, error.detail)
    except (OSError, ValueError, EOFError, arrow.ArrowException) as error:
        what = "not a parquet file that can be read; the rest of it is left out"
        issues.add(path, row or None, what, error_text(error))
    else:
        if not row:
            issues.add(path, None, "the file has no rows")


def _parquet_batch_size(path: Path, metadata: Any, names: list[str]) -> int:
    """How many rows to read at once, by the largest rows. Raises `NextwordError` if the file expands beyond the limits."""
    row_bytes, size = 1.0, 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.split(".")[0] in names]
        for chunk in chunks:
            size += chunk.total_uncompressed_size
            chunk_row_bytes = chunk.total_uncompressed_size / max(1, group.num_rows)
            if chunk.has_dictionary_page:  # each row may have its longest value; its size is known as it is compressed
                share = (chunk.data_page_offset - chunk.dictionary_page_offset) / max(1, chunk.total_compressed_size)
                chunk_row_bytes += share * chunk.total_uncompressed_size
            row_bytes = max(row_bytes, chunk_row_bytes)
    check_expansion(path, size)
    return min(256, max(1, int(PARQUET_BATCH_BYTES / row_bytes)))


def _column_values(column: Any, arrow: Any) -> list[Any]:
    """The values of an Arrow column, with strings as bytes at any depth, since they may not be valid UTF-8."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    binary_type = _binary_type(column.type, arrow)
    return (column if binary_type.equals(column.type) else column.cast(binary_type)).to_pylist()


def _binary_type(arrow_type: Any, arrow: Any) -> Any:
    """The Arrow type with bytes in the place of strings."""
    types = arrow.types
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return arrow.large_binary()
    if types.is_list(arrow_type):
        return arrow.list_(arrow_type.value_field.with_type(_binary_type(arrow_type.value_type, arrow)))
    if types.is_struct(arrow_type):
        return arrow.struct([field.with_type(_binary_type(field.type, arrow)) for field in arrow_type])
    return arrow_type
