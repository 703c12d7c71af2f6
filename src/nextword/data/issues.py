"""What is wrong with input files: counted by kind, with path and line, and shown to the user."""

import re
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError

MAX_SHOWN_ISSUES = 20
MAX_STORED_ISSUES = 1000  # beyond them only the counts grow
MAX_LOST_ROWS = 1_000_000  # each is kept with its place and reason

SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """The text with every lone surrogate, which UTF-8 cannot encode, replaced by U+FFFD."""
    try:
        text.encode()  # much faster than a regular expression
    except UnicodeEncodeError:
        return SURROGATE.sub("\ufffd", text)
    return text


def join_names(names: Iterable[str]) -> str:
    """The first twelve names, for a message."""
    names = list(names)
    shown = ", ".join(map(replace_surrogates, names[:12]))
    return (shown + (", …" if len(names) > 12 else "")) or "none"


def error_text(error: BaseException) -> str:
    """The message of an exception, without its error number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


@contextmanager
def name_source(source: Path | str) -> Generator[None]:
    """Put the name of what is read before the message of a `NextwordError`; its type and attributes stay."""
    try:
        yield
    except NextwordError as error:
        named = type(error)(f"{source}: {error}")
        named.__dict__.update(error.__dict__)
        raise named from error


class RowError(Exception):
    """Why a row or a table cannot be used.

    Attributes:
        kind: The kind of error, the same text for all rows with this error.
        detail: The value that this row has.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass
class Issue:
    """One kind of issue in one file: where it occurs first, and how often.

    Attributes:
        path: the file.
        line: the line (in Parquet the row) of its first occurrence, from 1; None if it concerns the whole file.
        what: the kind of the issue, with details.
        count: the number of occurrences.
    """

    path: str
    line: int | None
    what: str
    count: int = 1

    def __str__(self) -> str:
        location = self.path if self.line is None else f"{self.path} line {self.line:,}"
        return f"{location}: {self.what}" + (f" ({self.count:,} in all)" if self.count > 1 else "")


class IssueLog:
    """Collects the issues of input files.

    Args:
        strict: raise `NextwordError` at the first issue that loses or changes text.

    Attributes:
        total: the number of issues that lose or change text.
        counts_by_kind: the number of issues by kind, those of `info` included.
        lost_rows: path, line and reason of each row of a table that was left out.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.total = 0
        self.counts_by_kind: Counter[str] = Counter()
        self.lost_rows: list[tuple[str, int, str]] = []
        self._issues: dict[tuple[str, str], Issue] = {}

    def add(self, path: Path | str, line: int | None, kind: str, detail: str = "", count: int = 1) -> None:
        """Record that text was lost or changed. Raises `NextwordError` if the log is strict."""
        self.total += count
        issue = self.info(path, line, kind, detail, count)
        if self.strict:
            raise NextwordError(f"{issue}. Correct it, or leave out --strict to continue without it")

    def lose_row(self, path: Path | str, line: int, kind: str, detail: str = "") -> str:
        """Record that a row of a table was left out. Returns the reason.

        Raises:
            NextwordError: as `add`, or too many rows were left out.
        """
        reason = f"{kind}: {replace_surrogates(detail)}" if detail else kind
        if len(self.lost_rows) >= MAX_LOST_ROWS:
            raise NextwordError(
                f"{path}, line {line}: {reason}. More than {MAX_LOST_ROWS:,} rows cannot be read: is this a table, with this "
                "separator and these quotes?"
            )
        self.lost_rows.append((str(path), line, reason))
        self.add(path, line, kind, detail)
        return reason

    def info(self, path: Path | str, line: int | None, kind: str, detail: str = "", count: int = 1) -> Issue:
        """Record something that is no error, such as an image among the texts. It is not part of `total`."""
        self.counts_by_kind[kind] += count
        what = f"{kind}: {replace_surrogates(detail)}" if detail else kind
        return self._store(kind, Issue(replace_surrogates(str(path)), line, what, count))

    def _store(self, kind: str, issue: Issue) -> Issue:
        """Add an issue, or its count to the stored issue of the same file and kind."""
        existing = self._issues.get((issue.path, kind))
        if existing is not None:
            existing.count += issue.count
        elif len(self._issues) < MAX_STORED_ISSUES:
            self._issues[issue.path, kind] = issue
        return existing or issue

    @property
    def issues(self) -> list[Issue]:
        """The first `MAX_STORED_ISSUES` issues by file and kind, in order."""
        return list(self._issues.values())

    def to_dict(self) -> dict[str, Any]:
        """The whole log as JSON can hold it, for `merge`."""
        found = [[kind, asdict(issue)] for (_, kind), issue in self._issues.items()]
        return {"total": self.total, "kinds": dict(self.counts_by_kind), "found": found}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the issues of another log, given by its `to_dict()`."""
        self.total += state["total"]
        self.counts_by_kind.update(state["kinds"])
        for kind, issue in state["found"]:
            self._store(kind, Issue(**issue))

    def summary_lines(self) -> list[str]:
        """The first `MAX_SHOWN_ISSUES` issues as text, and the number of the others."""
        lines = list(map(str, self.issues))
        num_hidden = len(lines) - MAX_SHOWN_ISSUES
        return lines[:MAX_SHOWN_ISSUES] + ([f"… and {num_hidden:,} more like these"] if num_hidden > 0 else [])
