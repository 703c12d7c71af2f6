"""The document that a token of the training split came from: its file, and its line if the file is a table.

SHARDS/train-documents.bin has a row for each document, in the order of the tokens.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nextword.common.errors import CorruptFileError
from nextword.common.fs import map_disk_errors
from nextword.data.dataset import TokenArray

PROVENANCE_FILE = "train-documents.bin"
# "end": the index after the document's end-of-text token. "line": 0 if the file is one document.
ROW_DTYPE = np.dtype([("end", "<u8"), ("source", "<u4"), ("line", "<u4")])

TokenSpan = tuple[int, int]  # the first token, and the number of tokens


class DocumentSource(NamedTuple):
    """The index of a document's source file, and its line there (None if the file is one document)."""

    source: int
    line: int | None


class ProvenanceWriter:
    """Writes a row for each document of the training split."""

    def __init__(self, directory: Path):
        self._path = directory / PROVENANCE_FILE
        self._pending: list[tuple[int, int, int]] = []

    def add(self, end: int, document_source: DocumentSource) -> None:
        """Add a document whose tokens stand before index `end`."""
        self._pending.append((end, document_source.source, document_source.line or 0))

    def append_from(self, directory: Path, token_offset: int) -> None:
        """Copy the rows of another directory, whose tokens begin at index `token_offset` here."""
        rows = np.fromfile(directory / PROVENANCE_FILE, ROW_DTYPE)
        rows["end"] += token_offset
        self._append_rows(rows)

    def flush(self) -> None:
        """Write the pending rows to disk."""
        self._append_rows(np.array(self._pending, ROW_DTYPE))
        self._pending = []

    def _append_rows(self, rows: TokenArray) -> None:
        with map_disk_errors(self._path), self._path.open("ab") as file:
            file.write(rows.tobytes())


def document_names(directory: Path, sources: Sequence[str], spans: Iterable[TokenSpan]) -> list[str]:
    """The names of the documents that have a token in one of the spans, in the order of the tokens.

    Shards without the table (made before it existed) give the spans themselves.

    Args:
        directory: the shards.
        sources: the names of the source files.
        spans: spans of the training tokens.

    Raises:
        CorruptFileError: the table does not belong to these shards.
    """
    path = directory / PROVENANCE_FILE
    if not path.exists():
        return [f"tokens {start:,} to {start + count - 1:,}" for start, count in spans]
    if not path.stat().st_size or path.stat().st_size % ROW_DTYPE.itemsize:
        raise CorruptFileError(f"{path}: not a table of documents; prepare the text again")
    table = np.memmap(path, ROW_DTYPE, mode="r")
    indices: set[int] = set()
    for start, count in spans:
        first, last = np.searchsorted(table["end"], [start, start + count - 1], side="right").tolist()
        indices.update(range(first, last + 1))
    rows = table[sorted(index for index in indices if index < len(table))]
    if len(rows) < len(indices) or (rows["source"] >= len(sources)).any():
        raise CorruptFileError(f"{path}: does not match the tokens beside it; prepare the text again")
    locations: list[tuple[int, int]] = rows[["source", "line"]].tolist()
    return [sources[source] + (f" line {line}" if line else "") for source, line in locations]
