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

from nextword.common.errors import MissingExtra, NextwordError

COMPRESSED = (".gz", ".zst")
PIECE = 2**16  # characters
LONGEST_LINE = 2**25  # characters a table's row may have; it has to be held in memory whole
SHOWN = 20
KEPT = 1000  # different problems remembered one by one; beyond them only the counts grow

_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def without_surrogates(text: str) -> str:
    """The text with every half surrogate, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


@dataclass
class Problem:
    """One kind of flaw in one file: where it is first met, and how often."""

    path: str
    line: int | None
    what: str
    count: int = 1

    def __str__(self) -> str:
        where = self.path if self.line is None else f"{self.path} line {self.line:,}"
        return f"{where}: {self.what}" + (f" ({self.count:,} in all)" if self.count > 1 else "")


class Problems:
    """Collects what was wrong with the input. With `strict` the first problem is a `NextwordError`; a notice never
    is.

    `total` counts problems, `kinds` counts them by kind (notices too), `found` holds the first thousand by file and
    kind, in order. `on_problem` is called with each of those when it is first met.
    """

    def __init__(self, strict: bool = False, on_problem: Callable[[Problem], None] | None = None):
        self.strict, self.on_problem = strict, on_problem
        self.total = 0
        self.kinds: Counter[str] = Counter()
        self._found: dict[tuple[str, str], Problem] = {}

    def add(self, path: Path | str, line: int | None, kind: str, detail: str = "", count: int = 1) -> None:
        """Something of the input was lost or changed."""
        self.total += count
        problem = self._note(path, line, kind, detail, count)
        if self.strict:
            raise NextwordError(f"{problem}. Mend it, or leave out --strict to go on without it")

    def notice(self, path: Path | str, line: int | None, kind: str, detail: str = "", count: int = 1) -> None:
        """Something that its owner may want to know, and that is no fault: a picture beside the texts."""
        self._note(path, line, kind, detail, count)

    def _note(self, path: Path | str, line: int | None, kind: str, detail: str, count: int) -> Problem:
        self.kinds[kind] += count
        name = without_surrogates(str(path))  # a file's name may be no UTF-8
        known = self._found.get((name, kind))
        if known is not None:
            known.count += count
            return known
        problem = Problem(name, line, f"{kind}: {without_surrogates(detail)}" if detail else kind, count)
        if len(self._found) < KEPT:
            self._found[name, kind] = problem
            if self.on_problem is not None:
                self.on_problem(problem)
        return problem

    @property
    def found(self) -> list[Problem]:
        return list(self._found.values())

    def facts(self) -> dict[str, Any]:
        """All of it as JSON holds it, for `take_over`."""
        found = [{"kind": kind, **asdict(problem)} for (_, kind), problem in self._found.items()]
        return {"total": self.total, "kinds": dict(self.kinds), "found": found}

    def take_over(self, facts: dict[str, Any]) -> None:
        """Add what another reading has found, as if it were met now."""
        self.total += facts["total"]
        self.kinds.update(facts["kinds"])
        for one in facts["found"]:
            problem = Problem(one["path"], one["line"], one["what"], one["count"])
            known = self._found.get((problem.path, one["kind"]))
            if known is not None:
                known.count += problem.count
            elif len(self._found) < KEPT:
                self._found[problem.path, one["kind"]] = problem

    def lines(self) -> list[str]:
        """What to show a person: the first of them, and how many more there are."""
        found = self.found
        more = [f"… and {len(found) - SHOWN:,} more like these"] if len(found) > SHOWN else []
        return [str(problem) for problem in found[:SHOWN]] + more


def suffixes(path: Path) -> tuple[str, str]:
    """The format's suffix and the compression's ("" for none), as in (".jsonl", ".gz")."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSED else (suffix, "")


def reason(error: BaseException) -> str:
    """What an error says, without its number and its path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


class Lines:
    """The lines of decoded chunks, each with its newline, one too long to hold skipped and reported.

    `number` is that of the line last given, `first` that of the row's first, after `begin_row` has said that a row
    begins. `back_to_second` takes the reading back to the row's second line. `ended` says that a line was asked for
    and none was left.
    """

    def __init__(self, path: Path, chunks: Iterator[str], problems: Problems):
        self._path, self._problems = path, problems
        self._lines = self._split(chunks)
        self._row: list[tuple[int, str]] = []
        self._again: list[tuple[int, str]] = []  # the next one last
        self.number, self.ended = 0, False

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.number = line[0]
        self._row.append(line)
        return line[1]

    @property
    def first(self) -> int:
        return self._row[0][0]

    def begin_row(self) -> None:
        self._row.clear()

    def back_to_second(self) -> int:
        """Give the lines of this row again, all but the first; the first one's number."""
        first, *others = self._row
        self._again += reversed(others)
        self.ended = False
        return first[0]

    def _split(self, chunks: Iterator[str]) -> Iterator[tuple[int, str]]:
        number, parts, length = 1, [], 0
        for chunk in chunks:
            *lines, rest = chunk.split("\n")
            for line in lines:
                if length + len(line) <= LONGEST_LINE:
                    yield number, "".join([*parts, line, "\n"])
                else:
                    self._too_long(number)
                number, parts, length = number + 1, [], 0
            length += len(rest)
            parts = [*parts, rest] if length <= LONGEST_LINE else []
        if length > LONGEST_LINE:
            self._too_long(number)
        elif length:
            yield number, "".join(parts)

    def _too_long(self, number: int) -> None:
        what = f"a line of more than {LONGEST_LINE:,} characters; left out"
        self._problems.add(self._path, number, what)


def pieces(chunks: Iterable[str], limit: int = PIECE) -> Iterator[str]:
    """The same text cut anew into pieces of at most `limit` characters, where a tokenizer minds it least (`_cut`)."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > limit:
            end = _cut(rest, start, start + limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _cut(text: str, start: int, limit: int) -> int:
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


def _blocks(path: Path, problems: Problems) -> Iterator[bytes]:
    """The bytes of a file, unpacked, in blocks. A stream that breaks off is reported; what came before is kept."""
    compression = suffixes(path)[1]
    try:
        if compression == ".zst":
            yield from _zstd_blocks(path, problems)
            return
        with gzip.open(path) if compression == ".gz" else path.open("rb") as file:
            while block := file.read(2**18):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problems.add(path, None, "the compressed stream is broken; what came before the break is kept", reason(error))
    except OSError as error:
        problems.add(path, None, "cannot be read", reason(error))


def _zstd_blocks(path: Path, problems: Problems) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra(f"{path}: a .zst file", "zstd") from error
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


def decoded(path: Path, problems: Problems, blocks: Iterator[bytes] | None = None) -> Iterator[str]:
    """The text of a file in chunks, line ends made "\\n". A binary file is reported and gives nothing.

    `blocks` are its bytes where they are not to be read from the path: those of a file in an archive.
    """
    blocks = _blocks(path, problems) if blocks is None else blocks
    head = b""
    for block in blocks:
        head += block
        if len(head) >= 2**16:
            break
    codec = next((codec for mark, codec in _MARKS if head.startswith(mark)), "utf-8")
    head = head.removeprefix(codecs.BOM_UTF8)
    if codec == "utf-8" and (why := _binary(head[: 2**16])):
        problems.add(path, None, "not text; left out", why)
        return
    decoder = codecs.getincrementaldecoder(codec)("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    for data in _and_an_end(head, blocks):
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
            where = line + text.count("\n", 0, max(0, text.find("\ufffd")))
            problems.add(path, where, f"not valid {codec.upper()}; replaced by U+FFFD", count=invalid)
        line += text.count("\n")
        if text:
            yield text


def _and_an_end(head: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """All blocks, and an empty one that says that they are over."""
    if head:
        yield head
    yield from blocks
    yield b""


def _binary(head: bytes) -> str:
    """Why these first bytes of a file are no text, or ""."""
    if b"\0" in head:
        return "it has NUL bytes (a binary file, or UTF-16 without its mark)"
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)
    invalid = len(_SURROGATE.findall(text))
    return "more than a tenth of it is not valid UTF-8 (save it as UTF-8)" if invalid > len(text) / 10 else ""
