"""A prepared corpus: a directory with a tokenizer and the tokens of both splits. `prepare` makes it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import MANIFEST, read_manifest, verify_manifest
from nextword.data.provenance import TokenSpan, document_names
from nextword.data.shards import ShardedTokens, Split, SplitStats
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

    def document_names(self, spans: Iterable[TokenSpan]) -> list[str]:
        """The names of the documents that some spans of the training tokens came from: file and line."""
        sources = [source["name"] for source in self.manifest["sources"]]
        return document_names(self.path, sources, spans)
