"""Bytes of a file to text: decompressed, decoded, and cut into chunks or lines. Every flaw goes to an `IssueLog`."""

import codecs
import gzip
import io
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError, import_optional
from nextword.data.issues import SURROGATE, IssueLog, error_text

COMPRESSION_SUFFIXES = (".gz", ".zst")
CHUNK_CHARS = 2**16
MAX_LINE_CHARS = 2**25  # of a line of a table, which is held in memory whole
MAX_ROW_CHARS = 2**26  # of a row of several lines
MAX_ROW_LINES = 2**20  # each of which takes memory, however short it is
BLOCK_BYTES = 2**18
MIN_EXPANDED_BYTES, MAX_EXPANSION = 2**26, 200  # a compressed file may not expand beyond both

_CONTROL_BYTES = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))  # that no text has, NUL among them
_BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def file_format(path: Path) -> tuple[str, str]:
    """The suffixes of a file's format and compression: (".jsonl", ".gz"), or (".jsonl", "") without compression."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSION_SUFFIXES else (suffix, "")


def decode_chunks(path: Path, issues: IssueLog, blocks: Iterator[bytes] | None = None) -> Iterator[str]:
    """Decode a file. Line ends become "\\n"; what is not valid, and NUL, become U+FFFD. A binary file gives nothing.

    Args:
        path: a file, plain or compressed (.gz, .zst), in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.
        issues: where flaws are recorded.
        blocks: the bytes of the file, if they are not to be read from `path`, as for a file in an archive.

    Yields:
        The text in chunks of any length.
    """
    blocks = limit_expansion(path, _read_blocks(path, issues)) if blocks is None else blocks
    head = b""
    for block in blocks:
        head += block
        if len(head) >= 2**16:
            break
    codec = next((codec for bom, codec in _BOMS if head.startswith(bom)), "utf-8")
    head = head.removeprefix(codecs.BOM_UTF8)
    if codec == "utf-8" and (reason := _why_binary(head[: 2**16])):
        issues.add(path, None, "not text; left out", reason)
        return
    decoder = codecs.getincrementaldecoder(codec)("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    for data in chain([head], blocks, [b""]):
        num_invalid = 0
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError:  # the decoder is still in its state before `data`: decode again, with replacements
            decoder.errors = "surrogateescape" if codec == "utf-8" else "replace"
            text, num_invalid = SURROGATE.subn("\ufffd", decoder.decode(data, final=not data))
            decoder.errors = "strict"
            num_invalid = num_invalid or text.count("\ufffd")
        text = newlines.decode(text, final=not data)
        invalid = {f"not valid {codec.upper()}": (num_invalid, "\ufffd"), "NUL": (text.count("\0"), "\0")}
        for what, (count, character) in invalid.items():
            if count:
                issue_line = line + text.count("\n", 0, max(0, text.find(character)))
                issues.add(path, issue_line, f"{what}; replaced by U+FFFD", count=count)
        text = text.replace("\0", "\ufffd")
        line += text.count("\n")
        if text:
            yield text


def _why_binary(head: bytes) -> str:
    """The reason why the beginning of a file is not text, or ""."""
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)
    num_invalid = len(SURROGATE.findall(text)) + len(head) - len(head.translate(None, _CONTROL_BYTES))
    reason = (
        "more than a tenth of it is not valid UTF-8, or control characters: a binary file, or text to save as UTF-8"
    )
    return reason if num_invalid > len(text) / 10 else ""


def limit_expansion(path: Path, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks of a file. Raises `NextwordError` if they exceed the limits of `MIN_EXPANDED_BYTES` and `MAX_EXPANSION`."""
    size = 0
    for block in blocks:
        size += len(block)
        check_expansion(path, size)
        yield block


def check_expansion(path: Path, size: int) -> None:
    """Raise `NextwordError` if a file may not expand to `size` bytes."""
    if size > MIN_EXPANDED_BYTES and size > MAX_EXPANSION * path.stat().st_size:
        raise NextwordError(
            f"{path}: expands to more than {MAX_EXPANSION} times its size, {size:,} bytes so far. If that is intended, "
            "unpack it (or write the Parquet file without compression), and name that file"
        )


def _read_blocks(path: Path, issues: IssueLog) -> Iterator[bytes]:
    """The decompressed bytes of a file."""
    compression = file_format(path)[1]
    try:
        if compression == ".zst":
            yield from _read_zstd_blocks(path)
            return
        with gzip.open(path) if compression == ".gz" else path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        issues.add(path, None, "the compressed stream is broken; the text before the break is kept", error_text(error))
    except OSError as error:
        issues.add(path, None, "cannot be read", error_text(error))


def _read_zstd_blocks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a .zst file. Raises `EOFError` where its stream is broken."""
    zstandard = import_optional("zstandard", f"{path}: a .zst file", "zstd")
    frame: Any = None
    with path.open("rb") as file:
        while data := file.read(2**8):  # a small input may decompress to thousands of times its size
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    block = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                yield from (block[i : i + BLOCK_BYTES] for i in range(0, len(block), BLOCK_BYTES))
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends early")


def rechunk(chunks: Iterable[str], max_chars: int = CHUNK_CHARS) -> Iterator[str]:
    """The same text in chunks of at most `max_chars` characters, cut where the tokens stay the same if possible.

    A cut is placed between two lines, else before a single space: the chunks then have the tokens of the whole text.
    Without such a place it is after any newline, else anywhere but within what NFC may compose.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > max_chars:
            end = _find_split(rest, start, start + max_chars)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _find_split(text: str, start: int, limit: int) -> int:
    """Where to end the chunk that begins at `start`; the text continues at `limit`."""
    for separator, length in (("\n", 1), (" ", 0)):  # a newline stays in the chunk, a space begins the next one
        at = text.rfind(separator, start + 1, limit)
        while at > start:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + length
            at = text.rfind(separator, start + 1, at)
    at = text.rfind("\n", start, limit) + 1 or limit
    while at > start and _may_compose(text, at):
        at -= 1
    return at if at > start else limit


def _may_compose(text: str, at: int) -> bool:
    """Whether the character at `at` may become one with those before it in NFC: a mark, or the second part of a syllable."""
    return (
        unicodedata.combining(text[at]) > 0
        or "\u1161" <= text[at] <= "\u11ff"
        or len(unicodedata.normalize("NFC", text[at - 1 : at + 1])) < 2
    )


class RowTooLongError(Exception):
    """A row of a table that is longer than `MAX_ROW_CHARS` or `MAX_ROW_LINES`."""


class LineReader:
    """The lines of decoded chunks, each with its newline. A line that is too long is skipped and recorded.

    A row of a table may span several lines: `start_row` begins one, and `rewind_to_second_line` reads it again, without
    its first line.

    Attributes:
        line_number: the number of the last line, from 1.
        first_line_number: the number of the first line of the row.
        exhausted: whether a line was requested after the last one.
    """

    def __init__(self, path: Path, chunks: Iterator[str], issues: IssueLog):
        self._path, self._issues = path, issues
        self._lines = self._split_lines(chunks)
        self._row_lines: list[tuple[int, str]] = []
        self._row_chars = 0
        self._pushed_back: list[tuple[int, str]] = []  # in reverse order
        self.line_number = self.first_line_number = 0
        self.exhausted = False

    def __iter__(self) -> "LineReader":
        return self

    def __next__(self) -> str:
        line = self._pushed_back.pop() if self._pushed_back else next(self._lines, None)
        self.exhausted = line is None
        if line is None:
            raise StopIteration
        self._row_lines.append(line)
        self._row_chars += len(line[1])
        self.line_number, self.first_line_number = line[0], self._row_lines[0][0]
        if self._row_chars > MAX_ROW_CHARS:
            raise RowTooLongError(f"it has more than {MAX_ROW_CHARS:,} characters")
        if len(self._row_lines) > MAX_ROW_LINES:
            raise RowTooLongError(f"it has more than {MAX_ROW_LINES:,} lines")
        return line[1]

    def start_row(self) -> None:
        """Begin a new row at the next line."""
        self._row_lines.clear()
        self._row_chars = 0

    def rewind_to_second_line(self) -> int:
        """Go back to the second line of the row. Returns the number of the first one."""
        self._pushed_back += reversed(self._row_lines[1:])
        self.exhausted = False
        return self.first_line_number

    def peek(self, max_chars: int) -> list[str]:
        """The next lines, up to the one that exceeds `max_chars` characters in all. They are read again afterwards."""
        self.start_row()
        length = 0
        while length <= max_chars and (line := next(self, None)) is not None:
            length += len(line)
        self._pushed_back += reversed(self._row_lines)
        self.exhausted = False
        return [line for _, line in self._row_lines]

    def _split_lines(self, chunks: Iterator[str]) -> Iterator[tuple[int, str]]:
        too_long = f"a line of more than {MAX_LINE_CHARS:,} characters; left out"
        number, parts, length = 1, list[str](), 0
        for chunk in chunks:
            *lines, rest = chunk.split("\n")
            for line in lines:
                if length + len(line) <= MAX_LINE_CHARS:
                    yield number, "".join([*parts, line, "\n"])
                else:
                    self._issues.add(self._path, number, too_long)
                number, parts, length = number + 1, [], 0
            length += len(rest)
            parts = [*parts, rest] if length <= MAX_LINE_CHARS else []
        if length > MAX_LINE_CHARS:
            self._issues.add(self._path, number, too_long)
        elif length:
            yield number, "".join(parts)
