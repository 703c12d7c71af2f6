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

from nextword.common.errors import MissingExtra
from nextword.data.decoding import LONGEST_LINE, Lines, Problems, decoded, reason, suffixes, without_surrogates

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
LONGEST_JSON = 2**28  # characters a .json file may have; it has to be held in memory whole

_SPACE = re.compile(r"[ \t\n\r]*")

Columns = Callable[[list[str]], list[str]]


class NoColumn(Exception):
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
    path: Path, problems: Problems, columns: Columns | None = None, blocks: Iterator[bytes] | None = None
) -> Iterator[Record]:
    """The rows of a table: .csv, .tsv, .jsonl, .ndjson, .json (each plain, .gz or .zst) or .parquet.

    A `.json` file is a list of objects, or an object that holds one list of objects among other things. Values are
    what the format has; those of CSV and TSV are all str. `columns` is given the names found and returns those to
    read, or raises `NoColumn`: it is asked once a table, and once a record in JSON, where each has its own. Every flaw
    goes to `problems`, and the rest is read all the same. `blocks` are the bytes of a file in an archive, which has only
    its name from `path` and is not compressed once more. Raises `MissingExtra` for a `.parquet` or a `.zst` without
    its package, and under strict `NextwordError` at the first problem.
    """
    suffix, compression = suffixes(path)
    choose = columns or list[str]
    if suffix not in TABLES:
        problems.add(path, None, f"not a table that is read ({', '.join(TABLES)}, plain, .gz or .zst)")
    elif suffix == ".parquet" and compression:
        problems.add(path, None, "parquet files are compressed inside; unpack this one")
    elif blocks is not None and (compression or suffix == ".parquet"):
        problems.add(path, None, "compressed inside an archive; unpack the archive")
    elif suffix == ".parquet":
        yield from _parquet(path, problems, choose)
    elif suffix == ".json":
        yield from _json(path, decoded(path, problems, blocks), problems, choose)
    else:
        rows = _jsonl if suffix in (".jsonl", ".ndjson") else _csv
        yield from rows(path, Lines(path, decoded(path, problems, blocks), problems), problems, choose)


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every string in it changed, those in lists and objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [each_text(item, change) for item in value]
    if isinstance(value, dict):
        return {name: each_text(item, change) for name, item in value.items()}
    return value


def _jsonl(path: Path, lines: Lines, problems: Problems, choose: Columns) -> Iterator[Record]:
    for line in lines:
        lines.begin_row()
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(path, lines.number, "not valid JSON", reason(error))
            continue
        if record := _record(path, lines.number, value, "\\u" in line, problems, choose):
            yield record


def _record(path: Path, line: int, value: Any, escapes: bool, problems: Problems, choose: Columns) -> Record | None:
    """What is wanted of a JSON object. `escapes`: its text has some, which may be half a surrogate pair."""
    if not isinstance(value, dict):
        problems.add(path, line, "not a JSON object", f"it is a {type(value).__name__}")
        return None
    try:
        values = {name: each_text(value[name], _newlines) for name in choose(list(value)) if name in value}
        clean = each_text(values, without_surrogates) if escapes else values
        mended = clean != values
    except NoColumn as error:
        problems.add(path, line, error.kind, error.detail)
        return None
    except RecursionError as error:  # what json reads may be nested deeper than what can be walked
        problems.add(path, line, "not valid JSON", reason(error))
        return None
    if mended:
        problems.add(path, line, "half a surrogate pair; replaced by U+FFFD")
    return Record(line, clean)


class _Scan:
    """A place in a JSON text. What is wrong there is a `ValueError`, and `line` says where it is."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self._decoder = json.JSONDecoder()
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise json.JSONDecodeError(f"expected {character!r}", self.text, self.at)
        self.at += 1

    def value(self) -> Any:
        self.peek()
        value, self.at = self._decoder.raw_decode(self.text, self.at)
        return value

    def elements(self) -> Iterator[tuple[int, Any, bool]]:
        """Line, value, and whether it has escapes, of each element of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            self.peek()
            line, start = self.line, self.at
            value = self.value()
            yield line, value, self.text.find("\\u", start, self.at) >= 0
            if self.peek() != ",":
                self.take("]")
                return
            self.at += 1

    def members(self, lists: dict[str, list[tuple[int, Any, bool]]]) -> None:
        """Go through the object that begins here, and put the elements of each list of objects into `lists`."""
        self.take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            self.take('"')
            self.at -= 1
            name = self.value()
            self.take(":")
            if self.peek() != "[":
                self.value()
            else:
                found: list[tuple[int, Any, bool]] = []
                for element in self.elements():
                    found.append(element)
                    if isinstance(element[1], dict):
                        lists[name] = found
            if self.peek() != ",":
                self.take("}")
                return
            self.at += 1


def _json(path: Path, chunks: Iterable[str], problems: Problems, choose: Columns) -> Iterator[Record]:
    scan = _Scan(_whole(path, chunks, problems))
    lists: dict[str, list[tuple[int, Any, bool]]] = {}
    kind = scan.peek()
    try:
        if kind == "[":
            for element in scan.elements():
                if record := _record(path, *element, problems, choose):
                    yield record
        elif kind == "{":
            scan.members(lists)
        elif kind:
            scan.value()
        rest = scan.peek()
        if rest:
            hint = "; if each line is an object, name the file .jsonl" if kind == rest == "{" else ""
            problems.add(path, scan.line, "something after the end of the JSON" + (hint or "; left out"))
            if hint:
                return
        elif kind and (kind not in "[{" or (kind == "{" and not lists)):
            problems.add(path, 1, "neither a list of objects, nor an object with one in it")
    except (ValueError, RecursionError) as error:
        problems.add(path, scan.line, "not valid JSON; the rest of the file is left out", reason(error))
    if len(lists) > 1:
        problems.add(path, 1, "more than one list of objects; make a file of each", ", ".join(lists))
    elif lists:
        for element in next(iter(lists.values())):
            if record := _record(path, *element, problems, choose):
                yield record


def _whole(path: Path, chunks: Iterable[str], problems: Problems) -> str:
    """All chunks as one text, as much of it as may be held."""
    parts, length = [], 0
    for chunk in chunks:
        parts.append(chunk[: LONGEST_JSON - length])
        length += len(chunk)
        if length > LONGEST_JSON:
            what = f"more than {LONGEST_JSON:,} characters; the rest is left out. Make a .jsonl file of it"
            problems.add(path, None, what)
            break
    return "".join(parts)


def _csv(path: Path, lines: Lines, problems: Problems, choose: Columns) -> Iterator[Record]:
    rows = _csv_rows(path, lines, problems)
    first, header = next(rows, (0, []))
    if not header:
        return
    try:
        names = choose(list(dict.fromkeys(header)))
    except NoColumn as error:
        problems.add(path, first, error.kind, error.detail)
        return
    places = {name: header.index(name) for name in names if name in header}
    if twice := [name for name in places if header.count(name) > 1]:
        problems.add(path, first, "two columns of one name; the first is read", ", ".join(twice))
    least = max(places.values(), default=-1) + 1
    for line, row in rows:
        counts = f"{len(row)} instead of {len(header)}"
        if len(row) < least:
            problems.add(path, line, "a row with too few columns; left out", counts)
            continue
        if len(row) > len(header):
            if len(places) > 1:  # which value belongs to which column cannot be told
                problems.add(path, line, "a row with too many columns; left out: put quotes around its text", counts)
                continue
            what = "a row with too many columns; its text is kept, and may be cut at an unquoted separator"
            problems.add(path, line, what, counts)
        yield Record(line, {name: row[place] for name, place in places.items()})


def _csv_rows(path: Path, lines: Lines, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each row that is not blank.

    A quote that is never closed costs its own line only. In tab-separated files a quote is a letter like any other,
    as their registered media type has it.
    """
    csv.field_size_limit(LONGEST_LINE)  # the library's own limit of 131,072 characters is shorter than a book
    tab = suffixes(path)[0] == ".tsv"
    while True:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(lines)
        lines.begin_row()
        try:
            row = next(reader, None)
        except csv.Error as error:
            what = "a row that cannot be read; its first line is left out"
            problems.add(path, lines.back_to_second(), what, str(error))
            continue
        if row is None:
            return
        if lines.ended:  # the row ended with the file, inside quotes
            problems.add(path, lines.back_to_second(), "a quote that is never closed; its line is left out")
        elif row:
            yield lines.first, row


def _parquet(path: Path, problems: Problems, choose: Columns) -> Iterator[Record]:
    """Rows by their number, batch by batch, of the chosen columns alone."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(f"{path}: a .parquet file", "parquet") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            found = list(dict.fromkeys(file.schema_arrow.names))
            names = [name for name in choose(found) if name in found]
            for batch in file.iter_batches(batch_size=256, columns=names):
                cells = {name: _cells(batch.column(batch.schema.names.index(name)), pyarrow) for name in names}
                for place in range(batch.num_rows):
                    row += 1
                    invalid: list[bytes] = []
                    values = {name: _unpacked(column[place], invalid) for name, column in cells.items()}
                    if invalid:
                        problems.add(path, row, "not valid UTF-8; replaced by U+FFFD")
                    yield Record(row, values)
    except NoColumn as error:
        problems.add(path, None, error.kind, error.detail)
    except (OSError, ValueError, EOFError, pyarrow.ArrowException) as error:
        what = "not a parquet file that can be read; the rest of it is left out"
        problems.add(path, row or None, what, reason(error))
    else:
        if not row:
            problems.add(path, None, "the file has no rows")


def _cells(column: Any, pyarrow: Any) -> list[Any]:
    """The values of a column: text as bytes, for it may be no UTF-8, in lists and structures too."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    as_bytes = _as_bytes(column.type, pyarrow)
    return (column if as_bytes.equals(column.type) else column.cast(as_bytes)).to_pylist()


def _as_bytes(kind: Any, pyarrow: Any) -> Any:
    """The type with bytes in the place of text."""
    types = pyarrow.types
    if types.is_string(kind) or types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_as_bytes(kind.value_type, pyarrow)))
    if types.is_struct(kind):
        fields = [kind.field(place) for place in range(kind.num_fields)]
        return pyarrow.struct([field.with_type(_as_bytes(field.type, pyarrow)) for field in fields])
    return kind


def _unpacked(value: Any, invalid: list[bytes]) -> Any:
    """The value with its bytes as text; those that are no UTF-8 go to `invalid`."""
    if isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
        if "\ufffd" in text and text.encode() != value:
            invalid.append(value)
        return _newlines(text)
    if isinstance(value, list):
        return [_unpacked(item, invalid) for item in value]
    if isinstance(value, dict):
        return {name: _unpacked(item, invalid) for name, item in value.items()}
    return value
