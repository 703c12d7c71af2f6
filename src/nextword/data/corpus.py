"""A prepared corpus: a directory with a tokenizer and the tokens of both splits. `prepare` makes it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import MANIFEST, read_manifest, verify_manifest
from nextword.data.shards import DOCUMENT_DTYPE, DOCUMENT_TABLE, ShardedTokens, Split, SplitStats
from nextword.data.tokenizer import Tokenizer

FORMAT_VERSION = 1  # a corpus of another version is prepared again


class Corpus:
    """A prepared corpus. Opened by `Corpus.open`.

    Args:
        path: its directory.
        manifest: the manifest of the directory.

    Attributes:
        tokenizer: its tokenizer.
        documents: the number of unique documents.
        duplicates: the number of documents that repeat an earlier one.
        problems: the number of issues of the text, by kind and in total.
        train, validation: the size of each split.
        fingerprint: a hash of the tokens and the tokenizer. It does not depend on the names of the source files.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.tokenizer = Tokenizer.open(path)
        self.documents: int = manifest["documents"]
        self.duplicates: int = manifest["duplicates"]
        self.problems: dict[str, Any] = manifest["problems"]
        self.train, self.validation = SplitStats(**manifest["train"]), SplitStats(**manifest["validation"])
        files = sorted((name, file["sha256"]) for name, file in manifest["files"].items())
        content = [entry for entry in files if entry[0] == "tokenizer.json" or entry[0].endswith(".npy")]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """Open a prepared corpus, and check every file against its SHA-256.

        Raises:
            CorruptFileError: with a line for every file that differs.
            NextwordError: this is not a prepared corpus.
        """
        path = Path(path)
        if read_manifest(path).get("kind") != "corpus":
            raise NextwordError(f"{path}: not a prepared corpus; make one with: nextword prepare CORPUS --out {path}")
        manifest = verify_manifest(path)
        if manifest.get("version") != FORMAT_VERSION:
            raise NextwordError(f"{path}: prepared by another version of nextword; prepare it again")
        try:
            return cls(path, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{path / MANIFEST}: not the manifest of a prepared corpus ({error!r})") from error

    def tokens(self, split: Split) -> ShardedTokens:
        """The tokens of a split. Each document is followed by the end-of-text token."""
        return ShardedTokens(sorted(self.path.glob(f"{split}-*.npy")))

    def document_names(self, spans: Iterable[tuple[int, int]]) -> list[str]:
        """The names of the documents that have a training token in one of the spans: file and line, in their order.

        A corpus without the table of documents (made before it existed) gives the spans themselves.

        Args:
            spans: the first token, and the number of tokens.

        Raises:
            CorruptFileError: the table does not belong to these tokens.
        """
        path = self.path / DOCUMENT_TABLE
        if not path.exists():
            return [f"tokens {start:,} to {start + count - 1:,}" for start, count in spans]
        if not path.stat().st_size or path.stat().st_size % DOCUMENT_DTYPE.itemsize:
            raise CorruptFileError(f"{path}: not a table of documents; prepare the text again")
        table = np.memmap(path, DOCUMENT_DTYPE, mode="r")
        indices: set[int] = set()
        for start, count in spans:
            first, last = np.searchsorted(table["end"], [start, start + count - 1], side="right").tolist()
            indices.update(range(first, last + 1))
        names = [source["name"] for source in self.manifest["sources"]]
        rows = table[sorted(index for index in indices if index < len(table))]
        if len(rows) < len(indices) or (rows["source"] >= len(names)).any():
            raise CorruptFileError(f"{path}: does not match the tokens beside it; prepare the text again")
        locations: list[tuple[int, int]] = rows[["source", "line"]].tolist()
        return [names[source] + (f" line {line}" if line else "") for source, line in locations]
