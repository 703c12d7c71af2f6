"""Files to documents. Every flaw goes to an `IssueLog`; none is fatal.

A document is a text file, or a row of a table. Its text comes in chunks, so that memory use does not depend on its
length. Line ends become "\\n", a byte order mark is honoured and dropped, bytes that are not valid become U+FFFD;
otherwise the text is kept as it is.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from nextword.common.errors import UsageError
from nextword.common.fs import MANIFEST
from nextword.data.decoding import MAX_LINE_CHARS, decode_chunks, file_format, rechunk
from nextword.data.issues import IssueLog, error_text
from nextword.data.readers import MissingColumnError, read_records

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tbz", ".txz", ".zip", ".xz", ".bz2", ".7z", ".rar", ".lz4", ".br")
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "story")


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
            directories that nextword has made.
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
                elif resolved == exclude or (path / MANIFEST).is_file():
                    issues.info(path, None, "left out: a directory made by nextword")
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
        name = next((name for name in candidates if name in names), None)
        if name is None:
            available = ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "none"
            detail = f"looked for {', '.join(candidates)}; found {available}. Name one with --text-column"
            raise MissingColumnError("no text column", detail)
        return [name]

    for record in read_records(path, issues, select_text_column):
        [(name, text)] = record.values.items()
        if isinstance(text, str):
            yield record.line, text
        else:
            issues.add(path, record.line, "the text is not a string", f"{name} is a {type(text).__name__}")
