"""Which document a token of the training part came from: its file, and its line where the file is a table.

SHARDS/train-documents.bin has a row for each document, in the order of the tokens. Shards of earlier versions lack it; there a
document is called by its first words.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nextword.common.errors import CorruptFileError
from nextword.common.fs import map_disk_errors
from nextword.data.shards import ShardedTokens
from nextword.data.tokenizer import Tokenizer

PROVENANCE_FILE = "train-documents.bin"
# The document's tokens, its end-of-text token the last of them, stand before "end"; line 0: the file is one document.
ROW_DTYPE = np.dtype([("end", "<u8"), ("source", "<u4"), ("line", "<u4")])
PREVIEW_TOKENS = 12  # tokens that a document without a name is called by
SEARCH_BLOCK_TOKENS = 2**16  # tokens read at once on the way back to where a document begins

TokenSpan = tuple[int, int]  # the first token, and how many


class DocumentSource(NamedTuple):
    """Where a document was read: the number of its source, and its line there (None: the source is one document)."""

    source: int
    line: int | None


class ProvenanceWriter:
    """Writes a row at the end of each document of the training part."""

    def __init__(self, directory: Path):
        self._path = directory / PROVENANCE_FILE
        self._pending: list[tuple[int, int, int]] = []

    def add(self, end: int, document_source: DocumentSource) -> None:
        self._pending.append((end, document_source.source, document_source.line or 0))

    def append_from(self, directory: Path, token_offset: int) -> None:
        """The rows of a part of the corpus, which stands after so many tokens."""
        rows = np.fromfile(directory / PROVENANCE_FILE, ROW_DTYPE)
        rows["end"] += token_offset
        self._append_rows(rows)

    def flush(self) -> None:
        """Put on disk what was added."""
        self._append_rows(np.array(self._pending, ROW_DTYPE))
        self._pending = []

    def _append_rows(self, rows: np.ndarray) -> None:
        with map_disk_errors(self._path), self._path.open("ab") as file:
            file.write(rows.tobytes())


def document_names(
    directory: Path, sources: Sequence[str], tokens: ShardedTokens, tokenizer: Tokenizer, spans: Iterable[TokenSpan]
) -> list[str]:
    """What the documents are called that have a token in one of the spans, each once, in the order of the tokens.

    Raises:
        CorruptFile: the table is no table of these documents.
    """
    path = directory / PROVENANCE_FILE
    if not path.exists():
        starts = sorted({begin for span in spans for begin in _document_starts(tokens, tokenizer.eos_id, span)})
        return [_document_preview(tokens, tokenizer, begin) for begin in starts]
    if not path.stat().st_size or path.stat().st_size % ROW_DTYPE.itemsize:
        raise CorruptFileError(f"{path}: not a table of documents; prepare the text anew")
    table = np.memmap(path, ROW_DTYPE, mode="r")
    document_indices: set[int] = set()
    for start, count in spans:
        first, last = np.searchsorted(table["end"], [start, start + count - 1], side="right").tolist()
        document_indices |= set(range(first, last + 1))
    rows = [table[number] for number in sorted(document_indices) if number < len(table)]
    if len(rows) < len(document_indices) or any(row["source"] >= len(sources) for row in rows):
        raise CorruptFileError(f"{path}: does not fit the tokens beside it; prepare the text anew")
    locations = [(int(row["source"]), int(row["line"])) for row in rows]
    return [sources[source] + (f" line {line}" if line else "") for source, line in locations]


def _document_starts(tokens: ShardedTokens, eos_id: int, span: TokenSpan) -> Iterator[int]:
    """Where the documents of a span begin, the first of them perhaps long before it."""
    start, count = span
    document_start = start
    while document_start:
        block_start = max(0, document_start - SEARCH_BLOCK_TOKENS)
        ends = np.flatnonzero(tokens.read(block_start, document_start - block_start) == eos_id)
        document_start = block_start if not len(ends) else block_start + int(ends[-1]) + 1
        if len(ends):
            break
    yield document_start
    for offset in np.flatnonzero(tokens.read(start, count - 1) == eos_id).tolist():
        yield start + offset + 1


def _document_preview(tokens: ShardedTokens, tokenizer: Tokenizer, start: int) -> str:
    ids = tokens.read(start, min(PREVIEW_TOKENS, len(tokens) - start)).tolist()
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    words = " ".join(tokenizer.decode(ids).split())
    return f'the document that begins with "{words}" (token {start:,})'
