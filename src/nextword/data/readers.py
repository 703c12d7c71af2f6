"""Tables to records: the rows of CSV, TSV, JSON Lines, JSON and Parquet, every flaw reported, none fatal.

Rows come one at a time, so that memory stays flat; only a `.json` file is held whole. Text in them is as in documents:
line ends are "\\n", what UTF-8 cannot hold is U+FFFD.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.common.errors import MissingDependencyError
from nextword.data.decoding import (
    MAX_LINE_CHARS,
    IssueLog,
    LineReader,
    decode_chunks,
    error_text,
    file_format,
    replace_surrogates,
)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
MAX_JSON_CHARS = 2**28  # characters a .json file may have; it has to be held in memory whole

_WHITESPACE = re.compile(r"[ \t\n\r]*")

ColumnSelector = Callable[[list[str]], list[str]]


class MissingColumnError(Exception):
    """What a `columns` function raises where a table, or a record of JSON, lacks what is looked for.

    It becomes a problem of that `kind` and `detail`, and the table or the record is left out.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass(slots=True)
class Record:
    """One row: the line it begins at (in Parquet its number, both from 1), and its values by column."""

    line: int
    values: dict[str, Any]


def read_records(
    path: Path, problems: IssueLog, select_columns: ColumnSelector | None = None, blocks: Iterator[bytes] | None = None
) -> Iterator[Record]:
    """The rows of a table: .csv, .tsv, .jsonl, .ndjson, .json (each plain, .gz or .zst) or .parquet.

    A `.json` file is a list of objects, or an object that holds one list of objects among other things. Values are
    what the format has; those of CSV and TSV are all str. `columns` is given the names found and returns those to
    read, or raises `NoColumn`: it is asked once a table, and once a record in JSON, where each has its own. Every flaw
    goes to `problems`, and the rest is read all the same. `blocks` are the bytes of a file in an archive, which has only
    its name from `path` and is not compressed once more. Raises `MissingExtra` for a `.parquet` or a `.zst` without
    its package, and under strict `NextwordError` at the first problem.
    """
    suffix, compression = file_format(path)
    selector = select_columns or list[str]
    if suffix not in TABLE_SUFFIXES:
        problems.add(path, None, f"not a table that is read ({', '.join(TABLE_SUFFIXES)}, plain, .gz or .zst)")
    elif suffix == ".parquet" and compression:
        problems.add(path, None, "parquet files are compressed inside; unpack this one")
    elif blocks is not None and (compression or suffix == ".parquet"):
        problems.add(path, None, "compressed inside an archive; unpack the archive")
    elif suffix == ".parquet":
        yield from _read_parquet(path, problems, selector)
    elif suffix == ".json":
        yield from _read_json(path, decode_chunks(path, problems, blocks), problems, selector)
    else:
        rows = _read_jsonl if suffix in (".jsonl", ".ndjson") else _read_csv
        yield from rows(path, LineReader(path, decode_chunks(path, problems, blocks), problems), problems, selector)


def _normalize_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def map_strings(value: Any, transform: Callable[[str], str]) -> Any:
    """The value with every string in it changed, those in lists and objects included."""
    if isinstance(value, str):
        return transform(value)
    if isinstance(value, list):
        return [map_strings(item, transform) for item in value]
    if isinstance(value, dict):
        return {name: map_strings(item, transform) for name, item in value.items()}
    return value


def _read_jsonl(path: Path, lines: LineReader, problems: IssueLog, select_columns: ColumnSelector) -> Iterator[Record]:
    for line in lines:
        lines.start_row()
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(path, lines.line_number, "not valid JSON", error_text(error))
            continue
        if record := _make_record(path, lines.line_number, value, "\\u" in line, problems, select_columns):
            yield record


def _make_record(
    path: Path, line: int, value: Any, has_escapes: bool, problems: IssueLog, select_columns: ColumnSelector
) -> Record | None:
    """What is wanted of a JSON object. `escapes`: its text has some, which may be half a surrogate pair."""
    if not isinstance(value, dict):
        problems.add(path, line, "not a JSON object", f"it is a {type(value).__name__}")
        return None
    try:
        values = {
            name: map_strings(value[name], _normalize_newlines) for name in select_columns(list(value)) if name in value
        }
        clean = map_strings(values, replace_surrogates) if has_escapes else values
        was_repaired = clean != values
    except MissingColumnError as error:
        problems.add(path, line, error.kind, error.detail)
        return None
    except RecursionError as error:  # what json reads may be nested deeper than what can be walked
        problems.add(path, line, "not valid JSON", error_text(error))
        return None
    if was_repaired:
        problems.add(path, line, "half a surrogate pair; replaced by U+FFFD")
    return Record(line, clean)


class _JSONScanner:
    """A place in a JSON text. What is wrong there is a `ValueError`, and `line` says where it is."""

    def __init__(self, text: str):
        self.text, self.position = text, 0
        self._decoder = json.JSONDecoder()
        self._line, self._counted_to = 1, 0

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._counted_to, self.position)
        self._counted_to = self.position
        return self._line

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        space = _WHITESPACE.match(self.text, self.position)
        self.position = space.end() if space else self.position
        return self.text[self.position : self.position + 1]

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise json.JSONDecodeError(f"expected {character!r}", self.text, self.position)
        self.position += 1

    def read_value(self) -> Any:
        self.peek()
        value, self.position = self._decoder.raw_decode(self.text, self.position)
        return value

    def iter_elements(self) -> Iterator[tuple[int, Any, bool]]:
        """Line, value, and whether it has escapes, of each element of the list that begins here."""
        self.expect("[")
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            self.peek()
            line, start = self.line, self.position
            value = self.read_value()
            yield line, value, self.text.find("\\u", start, self.position) >= 0
            if self.peek() != ",":
                self.expect("]")
                return
            self.position += 1

    def collect_object_lists(self, lists: dict[str, list[tuple[int, Any, bool]]]) -> None:
        """Go through the object that begins here, and put the elements of each list of objects into `lists`."""
        self.expect("{")
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            self.expect('"')
            self.position -= 1
            name = self.read_value()
            self.expect(":")
            if self.peek() != "[":
                self.read_value()
            else:
                elements: list[tuple[int, Any, bool]] = []
                for element in self.iter_elements():
                    elements.append(element)
                    if isinstance(element[1], dict):
                        lists[name] = elements
            if self.peek() != ",":
                self.expect("}")
                return
            self.position += 1


def _read_json(
    path: Path, chunks: Iterable[str], problems: IssueLog, select_columns: ColumnSelector
) -> Iterator[Record]:
    scanner = _JSONScanner(_join_chunks(path, chunks, problems))
    lists: dict[str, list[tuple[int, Any, bool]]] = {}
    first_char = scanner.peek()
    try:
        if first_char == "[":
            for element in scanner.iter_elements():
                if record := _make_record(path, *element, problems, select_columns):
                    yield record
        elif first_char == "{":
            scanner.collect_object_lists(lists)
        elif first_char:
            scanner.read_value()
        trailing = scanner.peek()
        if trailing:
            hint = "; if each line is an object, name the file .jsonl" if first_char == trailing == "{" else ""
            problems.add(path, scanner.line, "something after the end of the JSON" + (hint or "; left out"))
            if hint:
                return
        elif first_char and (first_char not in "[{" or (first_char == "{" and not lists)):
            problems.add(path, 1, "neither a list of objects, nor an object with one in it")
    except (ValueError, RecursionError) as error:
        problems.add(path, scanner.line, "not valid JSON; the rest of the file is left out", error_text(error))
    if len(lists) > 1:
        problems.add(path, 1, "more than one list of objects; make a file of each", ", ".join(lists))
    elif lists:
        for element in next(iter(lists.values())):
            if record := _make_record(path, *element, problems, select_columns):
                yield record


def _join_chunks(path: Path, chunks: Iterable[str], problems: IssueLog) -> str:
    """All chunks as one text, as much of it as may be held."""
    parts, length = [], 0
    for chunk in chunks:
        parts.append(chunk[: MAX_JSON_CHARS - length])
        length += len(chunk)
        if length > MAX_JSON_CHARS:
            what = f"more than {MAX_JSON_CHARS:,} characters; the rest is left out. Make a .jsonl file of it"
            problems.add(path, None, what)
            break
    return "".join(parts)


def _read_csv(path: Path, lines: LineReader, problems: IssueLog, select_columns: ColumnSelector) -> Iterator[Record]:
    rows = _iter_csv_rows(path, lines, problems)
    header_line, header = next(rows, (0, []))
    if not header:
        return
    try:
        names = select_columns(list(dict.fromkeys(header)))
    except MissingColumnError as error:
        problems.add(path, header_line, error.kind, error.detail)
        return
    column_indices = {name: header.index(name) for name in names if name in header}
    if repeated := [name for name in column_indices if header.count(name) > 1]:
        problems.add(path, header_line, "two columns of one name; the first is read", ", ".join(repeated))
    min_columns = max(column_indices.values(), default=-1) + 1
    for line, row in rows:
        detail = f"{len(row)} instead of {len(header)}"
        if len(row) < min_columns:
            problems.add(path, line, "a row with too few columns; left out", detail)
            continue
        if len(row) > len(header):
            if len(column_indices) > 1:  # which value belongs to which column cannot be told
                problems.add(path, line, "a row with too many columns; left out: put quotes around its text", detail)
                continue
            what = "a row with too many columns; its text is kept, and may be cut at an unquoted separator"
            problems.add(path, line, what, detail)
        yield Record(line, {name: row[place] for name, place in column_indices.items()})


def _iter_csv_rows(path: Path, lines: LineReader, problems: IssueLog) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each row that is not blank.

    A quote that is never closed costs its own line only. In tab-separated files a quote is a letter like any other,
    as their registered media type has it.
    """
    csv.field_size_limit(MAX_LINE_CHARS)  # the library's own limit of 131,072 characters is shorter than a book
    is_tsv = file_format(path)[0] == ".tsv"
    while True:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(lines)
        lines.start_row()
        try:
            row = next(reader, None)
        except csv.Error as error:
            what = "a row that cannot be read; its first line is left out"
            problems.add(path, lines.rewind_to_second_line(), what, str(error))
            continue
        if row is None:
            return
        if lines.exhausted:  # the row ended with the file, inside quotes
            problems.add(path, lines.rewind_to_second_line(), "a quote that is never closed; its line is left out")
        elif row:
            yield lines.first_line_number, row


def _read_parquet(path: Path, problems: IssueLog, select_columns: ColumnSelector) -> Iterator[Record]:
    """Rows by their number, batch by batch, of the chosen columns alone."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(f"{path}: a .parquet file", "parquet") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            available = list(dict.fromkeys(file.schema_arrow.names))
            names = [name for name in select_columns(available) if name in available]
            for batch in file.iter_batches(batch_size=256, columns=names):
                cells = {name: _column_values(batch.column(batch.schema.names.index(name)), pyarrow) for name in names}
                for index in range(batch.num_rows):
                    row += 1
                    invalid: list[bytes] = []
                    values = {name: _decode_bytes(column[index], invalid) for name, column in cells.items()}
                    if invalid:
                        problems.add(path, row, "not valid UTF-8; replaced by U+FFFD")
                    yield Record(row, values)
    except MissingColumnError as error:
        problems.add(path, None, error.kind, error.detail)
    except (OSError, ValueError, EOFError, pyarrow.ArrowException) as error:
        what = "not a parquet file that can be read; the rest of it is left out"
        problems.add(path, row or None, what, error_text(error))
    else:
        if not row:
            problems.add(path, None, "the file has no rows")


def _column_values(column: Any, pyarrow: Any) -> list[Any]:
    """The values of a column: text as bytes, for it may be no UTF-8, in lists and structures too."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    as_bytes = _binary_type(column.type, pyarrow)
    return (column if as_bytes.equals(column.type) else column.cast(as_bytes)).to_pylist()


def _binary_type(arrow_type: Any, pyarrow: Any) -> Any:
    """The type with bytes in the place of text."""
    types = pyarrow.types
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return pyarrow.large_binary()
    if types.is_list(arrow_type):
        return pyarrow.list_(arrow_type.value_field.with_type(_binary_type(arrow_type.value_type, pyarrow)))
    if types.is_struct(arrow_type):
        fields = [arrow_type.field(place) for place in range(arrow_type.num_fields)]
        return pyarrow.struct([field.with_type(_binary_type(field.type, pyarrow)) for field in fields])
    return arrow_type


def _decode_bytes(value: Any, invalid: list[bytes]) -> Any:
    """The value with its bytes as text; those that are no UTF-8 go to `invalid`."""
    if isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
        if "\ufffd" in text and text.encode() != value:
            invalid.append(value)
        return _normalize_newlines(text)
    if isinstance(value, list):
        return [_decode_bytes(item, invalid) for item in value]
    if isinstance(value, dict):
        return {name: _decode_bytes(item, invalid) for name, item in value.items()}
    return value
