"""A file's bytes to characters: unpacked, decoded, in pieces or in lines, and a word about everything wrong in it."""

import codecs
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nextword.common.errors import MissingDependencyError, NextwordError

COMPRESSION_SUFFIXES = (".gz", ".zst")
CHUNK_CHARS = 2**16  # characters
MAX_LINE_CHARS = 2**25  # characters a table's row may have; it has to be held in memory whole
MAX_SHOWN_ISSUES = 20
MAX_STORED_ISSUES = 1000  # different problems remembered one by one; beyond them only the counts grow

_SURROGATE = re.compile("[\ud800-\udfff]")
_BOMS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def replace_surrogates(text: str) -> str:
    """The text with every half surrogate, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


@dataclass
class Issue:
    """One kind of flaw in one file: where it is first met, and how often."""

    path: str
    line: int | None
    what: str
    count: int = 1

    def __str__(self) -> str:
        where = self.path if self.line is None else f"{self.path} line {self.line:,}"
        return f"{where}: {self.what}" + (f" ({self.count:,} in all)" if self.count > 1 else "")


class IssueLog:
    """Collects what was wrong with the input. With `strict` the first problem is a `NextwordError`; a notice never
    is.

    `total` counts problems, `kinds` counts them by kind (notices too), `found` holds the first thousand by file and
    kind, in order. `on_problem` is called with each of those when it is first met.
    """

    def __init__(self, strict: bool = False, on_issue: Callable[[Issue], None] | None = None):
        self.strict, self.on_issue = strict, on_issue
        self.total = 0
        self.counts_by_kind: Counter[str] = Counter()
        self._issues: dict[tuple[str, str], Issue] = {}

    def add(self, path: Path | str, line: int | None, kind: str, detail: str = "", count: int = 1) -> None:
        """Something of the input was lost or changed."""
        self.total += count
        issue = self._record(path, line, kind, detail, count)
        if self.strict:
            raise NextwordError(f"{issue}. Mend it, or leave out --strict to go on without it")

    def info(self, path: Path | str, line: int | None, kind: str, detail: str = "", count: int = 1) -> None:
        """Something that its owner may want to know, and that is no fault: a picture beside the texts."""
        self._record(path, line, kind, detail, count)

    def _record(self, path: Path | str, line: int | None, kind: str, detail: str, count: int) -> Issue:
        self.counts_by_kind[kind] += count
        name = replace_surrogates(str(path))  # a file's name may be no UTF-8
        existing = self._issues.get((name, kind))
        if existing is not None:
            existing.count += count
            return existing
        issue = Issue(name, line, f"{kind}: {replace_surrogates(detail)}" if detail else kind, count)
        if len(self._issues) < MAX_STORED_ISSUES:
            self._issues[name, kind] = issue
            if self.on_issue is not None:
                self.on_issue(issue)
        return issue

    @property
    def issues(self) -> list[Issue]:
        return list(self._issues.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it, for `take_over`."""
        issues = [{"kind": kind, **asdict(problem)} for (_, kind), problem in self._issues.items()]
        return {"total": self.total, "kinds": dict(self.counts_by_kind), "found": issues}

    def merge(self, state: dict[str, Any]) -> None:
        """Add what another reading has found, as if it were met now."""
        self.total += state["total"]
        self.counts_by_kind.update(state["kinds"])
        for entry in state["found"]:
            issue = Issue(entry["path"], entry["line"], entry["what"], entry["count"])
            existing = self._issues.get((issue.path, entry["kind"]))
            if existing is not None:
                existing.count += issue.count
            elif len(self._issues) < MAX_STORED_ISSUES:
                self._issues[issue.path, entry["kind"]] = issue

    def summary_lines(self) -> list[str]:
        """What to show a person: the first of them, and how many more there are."""
        issues = self.issues
        more = [f"… and {len(issues) - MAX_SHOWN_ISSUES:,} more like these"] if len(issues) > MAX_SHOWN_ISSUES else []
        return [str(problem) for problem in issues[:MAX_SHOWN_ISSUES]] + more


def file_format(path: Path) -> tuple[str, str]:
    """The format's suffix and the compression's ("" for none), as in (".jsonl", ".gz")."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSION_SUFFIXES else (suffix, "")


def error_text(error: BaseException) -> str:
    """What an error says, without its number and its path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


class LineReader:
    """The lines of decoded chunks, each with its newline, one too long to hold skipped and reported.

    `number` is that of the line last given, `first` that of the row's first, after `begin_row` has said that a row
    begins. `back_to_second` takes the reading back to the row's second line. `ended` says that a line was asked for
    and none was left.
    """

    def __init__(self, path: Path, chunks: Iterator[str], problems: IssueLog):
        self._path, self._problems = path, problems
        self._lines = self._split_lines(chunks)
        self._row_lines: list[tuple[int, str]] = []
        self._pushed_back: list[tuple[int, str]] = []  # the next one last
        self.line_number, self.exhausted = 0, False

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._pushed_back.pop() if self._pushed_back else next(self._lines, None)
        if line is None:
            self.exhausted = True
            raise StopIteration
        self.line_number = line[0]
        self._row_lines.append(line)
        return line[1]

    @property
    def first_line_number(self) -> int:
        return self._row_lines[0][0]

    def start_row(self) -> None:
        self._row_lines.clear()

    def rewind_to_second_line(self) -> int:
        """Give the lines of this row again, all but the first; the first one's number."""
        first, *others = self._row_lines
        self._pushed_back += reversed(others)
        self.exhausted = False
        return first[0]

    def _split_lines(self, chunks: Iterator[str]) -> Iterator[tuple[int, str]]:
        number, parts, length = 1, [], 0
        for chunk in chunks:
            *lines, rest = chunk.split("\n")
            for line in lines:
                if length + len(line) <= MAX_LINE_CHARS:
                    yield number, "".join([*parts, line, "\n"])
                else:
                    self._report_too_long(number)
                number, parts, length = number + 1, [], 0
            length += len(rest)
            parts = [*parts, rest] if length <= MAX_LINE_CHARS else []
        if length > MAX_LINE_CHARS:
            self._report_too_long(number)
        elif length:
            yield number, "".join(parts)

    def _report_too_long(self, line_number: int) -> None:
        what = f"a line of more than {MAX_LINE_CHARS:,} characters; left out"
        self._problems.add(self._path, line_number, what)


def rechunk(chunks: Iterable[str], max_chars: int = CHUNK_CHARS) -> Iterator[str]:
    """The same text cut anew into pieces of at most `limit` characters, where a tokenizer minds it least (`_cut`)."""
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
    """Where to end a piece of text[start:limit], given that text goes on at `limit`.

    A word is never cut where this can be helped: after a single newline between two lines, else before a single
    space; there the tokens of the pieces are those of the whole. Else after any newline, else anywhere.
    """
    at = text.rfind("\n", start + 1, limit)
    while at > start:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", start + 1, at)
    at = text.rfind(" ", start + 1, limit)
    while at > start:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
        at = text.rfind(" ", start + 1, at)
    return text.rfind("\n", start, limit) + 1 or limit


def _read_blocks(path: Path, problems: IssueLog) -> Iterator[bytes]:
    """The bytes of a file, unpacked, in blocks. A stream that breaks off is reported; what came before is kept."""
    compression = file_format(path)[1]
    try:
        if compression == ".zst":
            yield from _read_zstd_blocks(path, problems)
            return
        with gzip.open(path) if compression == ".gz" else path.open("rb") as file:
            while block := file.read(2**18):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problems.add(
            path, None, "the compressed stream is broken; what came before the break is kept", error_text(error)
        )
    except OSError as error:
        problems.add(path, None, "cannot be read", error_text(error))


def _read_zstd_blocks(path: Path, problems: IssueLog) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError(f"{path}: a .zst file", "zstd") from error
    frame = None
    try:
        with path.open("rb") as file:
            while data := file.read(2**8):  # little at a time, for it may unpack to thousands of times its size
                while data:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    block = frame.decompress(data)
                    yield from (block[i : i + 2**18] for i in range(0, len(block), 2**18))
                    data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        problems.add(path, None, "the compressed stream is broken; what came before the break is kept", str(error))
        return
    if frame is not None:
        problems.add(path, None, "the compressed stream is broken; what came before the break is kept", "it ends early")


def decode_chunks(path: Path, problems: IssueLog, blocks: Iterator[bytes] | None = None) -> Iterator[str]:
    """The text of a file in chunks, line ends made "\\n". A binary file is reported and gives nothing.

    `blocks` are its bytes where they are not to be read from the path: those of a file in an archive.
    """
    blocks = _read_blocks(path, problems) if blocks is None else blocks
    head = b""
    for block in blocks:
        head += block
        if len(head) >= 2**16:
            break
    codec = next((codec for mark, codec in _BOMS if head.startswith(mark)), "utf-8")
    head = head.removeprefix(codecs.BOM_UTF8)
    if codec == "utf-8" and (binary_reason := _why_binary(head[: 2**16])):
        problems.add(path, None, "not text; left out", binary_reason)
        return
    decoder = codecs.getincrementaldecoder(codec)("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    for data in _with_final_empty_block(head, blocks):
        invalid = 0
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError:  # the decoder still stands before `data`: once more, with substitutes
            decoder.errors = "surrogateescape" if codec == "utf-8" else "replace"
            text, invalid = _SURROGATE.subn("\ufffd", decoder.decode(data, final=not data))
            decoder.errors = "strict"
            invalid = invalid or text.count("\ufffd")
        text = newlines.decode(text, final=not data)
        if invalid:
            issue_line = line + text.count("\n", 0, max(0, text.find("\ufffd")))
            problems.add(path, issue_line, f"not valid {codec.upper()}; replaced by U+FFFD", count=invalid)
        line += text.count("\n")
        if text:
            yield text


def _with_final_empty_block(head: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """All blocks, and an empty one that says that they are over."""
    if head:
        yield head
    yield from blocks
    yield b""


def _why_binary(head: bytes) -> str:
    """Why these first bytes of a file are no text, or ""."""
    if b"\0" in head:
        return "it has NUL bytes (a binary file, or UTF-16 without its mark)"
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)
    invalid = len(_SURROGATE.findall(text))
    return "more than a tenth of it is not valid UTF-8 (save it as UTF-8)" if invalid > len(text) / 10 else ""
