"""Which document a token of the training part came from: its file, and its line where the file is a table.

SHARDS/train-documents.bin has a row for each document, in the order of the tokens. Shards of earlier versions lack it; there a
document is called by its first words.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nextword.common.errors import CorruptFile
from nextword.common.fs import writing
from nextword.data.shards import Tokens
from nextword.data.tokenizer import Tokenizer

NAME = "train-documents.bin"
# The document's tokens, its end-of-text token the last of them, stand before "end"; line 0: the file is one document.
ROW = np.dtype([("end", "<u8"), ("source", "<u4"), ("line", "<u4")])
FIRST_WORDS = 12  # tokens that a document without a name is called by
BLOCK = 2**16  # tokens read at once on the way back to where a document begins

Span = tuple[int, int]  # the first token, and how many


class Origin(NamedTuple):
    """Where a document was read: the number of its source, and its line there (None: the source is one document)."""

    source: int
    line: int | None


class OriginWriter:
    """Writes a row at the end of each document of the training part."""

    def __init__(self, directory: Path):
        self._path = directory / NAME
        self._waiting: list[tuple[int, int, int]] = []

    def add(self, end: int, origin: Origin) -> None:
        self._waiting.append((end, origin.source, origin.line or 0))

    def copy(self, directory: Path, before: int) -> None:
        """The rows of a part of the corpus, which stands after so many tokens."""
        rows = np.fromfile(directory / NAME, ROW)
        rows["end"] += before
        self._append(rows)

    def write(self) -> None:
        """Put on disk what was added."""
        self._append(np.array(self._waiting, ROW))
        self._waiting = []

    def _append(self, rows: np.ndarray) -> None:
        with writing(self._path), self._path.open("ab") as file:
            file.write(rows.tobytes())


def names_in(
    directory: Path, sources: Sequence[str], tokens: Tokens, tokenizer: Tokenizer, spans: Iterable[Span]
) -> list[str]:
    """What the documents are called that have a token in one of the spans, each once, in the order of the tokens.

    Raises:
        CorruptFile: the table is no table of these documents.
    """
    path = directory / NAME
    if not path.exists():
        begins = sorted({begin for span in spans for begin in _begins(tokens, tokenizer.end_of_text, span)})
        return [_first_words(tokens, tokenizer, begin) for begin in begins]
    if not path.stat().st_size or path.stat().st_size % ROW.itemsize:
        raise CorruptFile(f"{path}: not a table of documents; prepare the text anew")
    table = np.memmap(path, ROW, mode="r")
    found: set[int] = set()
    for start, count in spans:
        first, last = np.searchsorted(table["end"], [start, start + count - 1], side="right").tolist()
        found |= set(range(first, last + 1))
    rows = [table[number] for number in sorted(found) if number < len(table)]
    if len(rows) < len(found) or any(row["source"] >= len(sources) for row in rows):
        raise CorruptFile(f"{path}: does not fit the tokens beside it; prepare the text anew")
    places = [(int(row["source"]), int(row["line"])) for row in rows]
    return [sources[source] + (f" line {line}" if line else "") for source, line in places]


def _begins(tokens: Tokens, end_of_text: int, span: Span) -> Iterator[int]:
    """Where the documents of a span begin, the first of them perhaps long before it."""
    start, count = span
    begin = start
    while begin:
        low = max(0, begin - BLOCK)
        ends = np.flatnonzero(tokens.read(low, begin - low) == end_of_text)
        begin = low if not len(ends) else low + int(ends[-1]) + 1
        if len(ends):
            break
    yield begin
    for place in np.flatnonzero(tokens.read(start, count - 1) == end_of_text).tolist():
        yield start + place + 1


def _first_words(tokens: Tokens, tokenizer: Tokenizer, begin: int) -> str:
    ids = tokens.read(begin, min(FIRST_WORDS, len(tokens) - begin)).tolist()
    if tokenizer.end_of_text in ids:
        ids = ids[: ids.index(tokenizer.end_of_text)]
    words = " ".join(tokenizer.decode(ids).split())
    return f'the document that begins with "{words}" (token {begin:,})'
