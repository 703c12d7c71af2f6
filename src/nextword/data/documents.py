"""Files to documents: every format read as a stream, every flaw reported, none fatal.

A document is one text file, or one row of a table. It comes in pieces of at most `PIECE` characters, so that memory
stays flat whatever the size. Line ends become "\\n", an encoding mark (UTF-8, UTF-16, UTF-32) is honoured and
dropped, bytes that are no UTF-8 become U+FFFD; the text is otherwise kept as it is.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nextword.common.errors import UsageError
from nextword.common.fs import MANIFEST
from nextword.data.decoding import (
    MAX_LINE_CHARS,
    IssueLog,
    decode_chunks,
    error_text,
    file_format,
    rechunk,
)
from nextword.data.readers import MissingColumnError, read_records

__all__ = [
    "FORMATS",
    "Document",
    "Problem",
    "Problems",
    "Source",
    "find_files",
    "pieces",
    "read_documents",
    "text_rows",
    "without_surrogates",
]

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tbz", ".txz", ".zip", ".xz", ".bz2", ".7z", ".rar", ".lz4", ".br")
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "story")


@dataclass
class Document:
    """One text. `pieces` is read once, before the next document is asked for; `line` is that of its row."""

    path: Path
    line: int | None
    chunks: Iterator[str]


@dataclass
class SourceFile:
    """One file of a corpus: its name in the corpus, and how its documents are read, as often as one likes."""

    name: str
    path: Path
    read: Callable[[IssueLog], Iterator[Document]]


def find_files(
    corpora: Iterable[Path], problems: IssueLog, text_column: str | None = None, exclude: Path | None = None
) -> list[SourceFile]:
    """The text files under each path, in the order of their names, the same on every machine.

    A linked folder is entered once. What is not read is reported: other suffixes by count, links that lead nowhere or
    back, hidden files, and folders that nextword made (`leave_out` is one in the making). Raises `UsageError` for a
    missing path.
    """
    sources: list[SourceFile] = []
    excluded_dir = None if exclude is None else exclude.resolve()
    for corpus in corpora:
        corpus = Path(corpus)
        if not corpus.exists():
            raise UsageError(f"{corpus}: no such file or folder")
        skipped_counts: Counter[str] = Counter()
        for path in _walk_files(corpus, problems, skipped_counts, excluded_dir) if corpus.is_dir() else [corpus]:
            suffix = file_format(path)[0]
            if suffix in TEXT_SUFFIXES:
                name = path.relative_to(corpus).as_posix() if path != corpus else path.name
                sources.append(
                    SourceFile(name, path, lambda found, path=path: read_documents(path, found, text_column))
                )
            elif suffix in ARCHIVE_SUFFIXES:
                problems.add(path, None, "an archive or a compression that is not read; unpack it first")
            elif path == corpus:
                problems.add(path, None, f"not a format that is read ({', '.join(TEXT_SUFFIXES)}, plain, .gz or .zst)")
            else:
                skipped_counts["with the suffix " + suffix if suffix else "without a suffix"] += 1
        for kind, count in sorted(skipped_counts.items()):
            problems.info(corpus, None, f"left out: files {kind}", count=count)
    return sources


def _walk_files(
    root: Path, problems: IssueLog, skipped_counts: Counter[str], excluded_dir: Path | None
) -> Iterator[Path]:
    """Every plain file under a folder, depth first, by name."""
    visited: set[Path] = set()
    pending = [root]
    while pending:
        path = pending.pop()
        try:
            if path.is_dir():
                resolved = path.resolve()
                if resolved in visited:
                    problems.add(path, None, "a link to a folder that was entered already; not followed again")
                elif resolved == excluded_dir or (path / MANIFEST).is_file():
                    problems.info(path, None, "left out: a folder that nextword makes")
                else:
                    visited.add(resolved)
                    entries = sorted(path.iterdir(), key=lambda p: p.name, reverse=True)
                    visible = [p for p in entries if not p.name.startswith(".")]
                    # What is made beside `left_out`, a lock and the like, is no text of anybody's.
                    partials = [p for p in entries if excluded_dir and p.name.startswith(f".{excluded_dir.name}.")]
                    if hidden := len({*entries} - {*visible} - {*partials}):
                        skipped_counts["or folders that are hidden"] += hidden
                    pending += visible
            elif path.is_file():
                yield path
            else:
                problems.add(path, None, "not a file: a link that leads nowhere or round in a circle, or a device")
        except (OSError, RuntimeError) as error:  # pathlib says of some loops that they are a RuntimeError
            problems.add(path, None, "cannot be read", error_text(error))


def read_documents(path: Path, problems: IssueLog, text_column: str | None = None) -> Iterator[Document]:
    """The documents of one file. Whatever is wrong with it goes to `problems`, and the rest is read all the same.

    `text_column` names the column of a table that holds the text; without it the first of `TEXT_COLUMNS` is taken.
    Raises `MissingExtra` for a `.parquet` or a `.zst` without its package, and under strict `NextwordError` at the
    first problem.
    """
    if file_format(path)[0] in (".txt", ".md"):
        documents = _text_document(path, decode_chunks(path, problems), problems)
    else:
        documents = _row_documents(path, read_text_rows(path, problems, text_column), problems)
    has_documents, problems_before = False, problems.total
    for document in documents:
        has_documents = True
        yield document
    if not has_documents and problems.total == problems_before:  # else it has been said already why there is nothing
        problems.add(path, None, "there is no text in the file")


def _row_documents(path: Path, rows: Iterable[tuple[int, str]], problems: IssueLog) -> Iterator[Document]:
    """A document for each row, by its line and text."""
    for line, text in rows:
        if text.strip():
            yield Document(path, line, rechunk([text]))
        else:
            problems.add(path, line, "the text is empty")


def _text_document(path: Path, chunks: Iterable[str], problems: IssueLog) -> Iterator[Document]:
    """A text file: one document."""

    def report_long_lines() -> Iterator[str]:
        """The chunks, with a word where a line is so long that it is no line."""
        line, length = 1, 0
        for chunk in chunks:
            before = length
            breaks = chunk.count("\n")
            length = len(chunk) - 1 - chunk.rfind("\n") if breaks else length + len(chunk)
            if length > MAX_LINE_CHARS >= before:
                what = f"a line of more than {MAX_LINE_CHARS:,} characters; kept, and read in pieces"
                problems.info(path, line + breaks, what)
            line += breaks
            yield chunk

    text = rechunk(report_long_lines())
    first, second = next(text, ""), next(text, "")
    if first.strip() or second:
        yield Document(path, None, (piece for part in ((first, second), text) for piece in part if piece))


def _find_text_column(columns: Iterable[str], text_column: str | None) -> str | None:
    """The column that holds the text."""
    names = list(columns)
    return next((name for name in ((text_column,) if text_column else TEXT_COLUMNS) if name in names), None)


def _missing_column_detail(columns: Iterable[str], text_column: str | None) -> str:
    names = list(columns)
    available = ", ".join(map(str, names[:12])) + (", …" if len(names) > 12 else "") or "none"
    return f"looked for {text_column or ', '.join(TEXT_COLUMNS)}; found {available}. Name one with --text-column"


def read_text_rows(path: Path, problems: IssueLog, text_column: str | None = None) -> Iterator[tuple[int, str]]:
    """The line (in Parquet the number, from 1) and the text of each row of a table, blank ones included."""

    def select_text_column(names: list[str]) -> list[str]:
        name = _find_text_column(names, text_column)
        if name is None:
            raise MissingColumnError("no text column", _missing_column_detail(names, text_column))
        return [name]

    for record in read_records(path, problems, select_text_column):
        [(name, text)] = record.values.items()
        if isinstance(text, str):
            yield record.line, text
        else:
            problems.add(path, record.line, "the text is not a string", f"{name} is a {type(text).__name__}")
