"""A prepared corpus: a directory with a tokenizer, the tokens of each split, and the sources of the training documents.

The tokens of a split are a sequence in `.npy` files of bounded size. `train-documents.bin` has a row for each document of
the training split, in the order of the tokens: its source file, and its line there. `prepare` makes a corpus.
"""

import hashlib
import json
import os
import unicodedata
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.format import quote_command
from nextword.common.fs import MANIFEST, map_disk_errors, read_manifest, verify_manifest
from nextword.data.dataset import TokenArray
from nextword.data.tokenizer import Tokenizer, lost_text_message

FORMAT_VERSION = 1  # a corpus of another version is prepared again

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

MAX_NAMED_FILES = 5  # in messages
SHARD_TOKENS = 2**26
COPY_CHUNK_TOKENS = 2**20
ENCODE_BATCH_CHARS = 2**21  # each takes about fifty bytes of memory

DOCUMENT_TABLE = "train-documents.bin"
# "end": the index after the document's end-of-text token. "line": 0 if the file is one document.
DOCUMENT_DTYPE = np.dtype([("end", "<u8"), ("source", "<u4"), ("line", "<u4")])


class DocumentSource(NamedTuple):
    """The index of a document's source file, and its line there (None if the file is one document)."""

    source: int
    line: int | None


SplitText = tuple[Split, str | DocumentSource]  # a chunk of a document, or its source where it ends


@dataclass
class SplitStats:
    """The size of a split.

    Attributes:
        documents: the number of documents; one that is cut between the splits counts in both.
        tokens: the number of tokens, the end-of-text tokens included.
        bytes: the length of its text in UTF-8.
        characters: the length of its text.
        unknown: the bytes of its text that the tokenizer cannot represent.
        broken: the number of tokens that are not whole characters.
        not_nfc, not_nfd: the number of its lines that are not in this Unicode normalization form.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    unknown: int = 0
    broken: int = 0
    not_nfc: int = 0
    not_nfd: int = 0

    @property
    def seen_bytes(self) -> int:
        """The bytes that the tokens stand for."""
        return self.bytes - self.unknown


class ShardedTokens:
    """A sequence of token ids in several files, which are mapped into memory.

    Args:
        shards: the files, in order.

    Raises:
        CorruptFileError: a file is not an array of tokens.
    """

    def __init__(self, shards: Iterable[Path]):
        self._shards = [_open_shard(shard) for shard in shards]
        self._starts = list(accumulate(map(len, self._shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens start … start + count − 1 as int64 [count]. Raises `IndexError` if there are fewer."""
        end = start + count
        if start < 0 or count < 0 or end > len(self):
            raise IndexError(f"tokens {start:,} to {end:,} of a sequence of {len(self):,}")
        shards = range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, end))
        parts = [self._shards[i][max(0, start - self._starts[i]) : end - self._starts[i]] for i in shards]
        return np.concatenate([np.empty(0, np.int64), *parts])


def _open_shard(path: Path) -> TokenArray:
    try:
        with warnings.catch_warnings():  # NumPy warns of headers that Python 2 may have written
            warnings.simplefilter("error")
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a malformed header raises whatever evaluating it raises
        raise CorruptFileError(f"{path}: not a NumPy array file ({error})") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise CorruptFileError(f"{path}: not a one-dimensional array of uint16 or uint32")
    return tokens


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
        train, validation, test: the size of each split. The test set may be empty.
        fingerprint: a hash of the tokens and the tokenizer. It does not depend on the names of the source files.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.tokenizer = Tokenizer.open(path)
        self.documents: int = manifest["documents"]
        self.duplicates: int = manifest["duplicates"]
        self.problems: dict[str, Any] = manifest["problems"]
        # A corpus of an earlier version has no test set.
        self.train, self.validation, self.test = (SplitStats(**manifest.get(split, {})) for split in SPLITS)
        files = sorted((name, file["sha256"]) for name, file in manifest["files"].items())
        content = [entry for entry in files if entry[0] == "tokenizer.json" or entry[0].endswith(".npy")]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """Open a prepared corpus, and check every file against its SHA-256.

        Raises:
            CorruptFileError: with a line for every file that differs.
            NextwordError: there is no such directory, or it is not a prepared corpus.
        """
        path = Path(path)
        if not path.exists():
            raise NextwordError(
                f"{path}: the prepared text is not there (any more). Continue a run with the place where it is now: nextword "
                "pretrain SHARDS --out RUN --resume. Evaluate one on a text: nextword evaluate RUN TEXT"
            )
        if read_manifest(path).get("kind") != "corpus":
            raise NextwordError(
                f"{path}: not a prepared corpus; make one with: {quote_command('nextword', 'prepare', 'TEXT', f'--out={path}')}"
            )
        manifest = verify_manifest(path)
        if manifest.get("version") != FORMAT_VERSION:
            raise NextwordError(f"{path}: prepared by another version of nextword; prepare it again")
        try:
            return cls(path, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{path / MANIFEST}: not the manifest of a prepared corpus ({error!r})") from error

    @property
    def lost_text(self) -> str:
        """How much of the text its tokenizer cannot represent, for the user; "" if nothing."""
        splits = (self.train, self.validation, self.test)
        return lost_text_message(sum(split.unknown for split in splits), sum(split.bytes for split in splits))

    def text_notes(self) -> list[str]:
        """What the user should know about the text and its tokens, in a line for each."""
        notes = [self.lost_text] if self.lost_text else []
        splits = (self.train, self.validation, self.test)
        if 100 * self.validation.broken >= self.validation.tokens:
            share = self.validation.broken / self.validation.tokens
            notes.append(f"{share:.0%} of the tokens of the validation set are parts of characters")
        if not_nfc := sum(split.not_nfc for split in splits):
            is_nfd = not any(split.not_nfd for split in splits)
            notes.append(
                f"{not_nfc:,} lines are not in the Unicode normalization form NFC{' but in NFD' if is_nfd else ''}: their "
                "characters look like those of NFC, but are other tokens. --normalize nfc trains on the text in NFC"
            )
        return notes

    def describe_held_out(self) -> list[str]:
        """What the validation and the test set are, and their share of the text, in a line for each."""
        lines: list[str] = []
        total = self.train.bytes + self.validation.bytes + self.test.bytes
        fractions = self.manifest.get("held_out", {}).get("fractions", (0.0, 0.0))
        for split, stats, fraction in zip(SPLITS[1:], (self.validation, self.test), fractions, strict=True):
            counts = {source["name"]: source[split] for source in self.manifest["sources"] if split in source}
            num_cut = sum(source.get("cut", 0) for source in self.manifest["sources"]) if fraction else 0
            names = f" ({', '.join(counts)})" if 0 < len(counts) <= MAX_NAMED_FILES else ""
            parts = [f"{sum(counts.values()):,} documents{names}"] if counts else []
            parts += [f"the end of {num_cut:,} documents"] if num_cut else []
            described = f": {' and '.join(parts)}," if parts else ":"
            if stats.documents:
                lines.append(
                    f"{split} set{described} {stats.bytes / max(1, total):.1%} of the text, {stats.tokens:,} tokens"
                )
        return lines

    def tokens(self, split: Split) -> ShardedTokens:
        """The tokens of a split. Each document is followed by the end-of-text token."""
        return ShardedTokens(sorted(self.path.glob(f"{split}-*.npy")))

    def share_of_documents_beyond(self, context_length: int) -> float:
        """The share of the training documents that have more tokens than a context."""
        table = self._document_table()
        return 0.0 if table is None else float((np.diff(table["end"], prepend=0) > context_length).mean())

    def _document_table(self) -> np.memmap | None:
        """The table of the training documents; None in a corpus that was made before it existed.

        Raises:
            CorruptFileError: the file is no such table.
        """
        path = self.path / DOCUMENT_TABLE
        if not path.exists():
            return None
        if not path.stat().st_size or path.stat().st_size % DOCUMENT_DTYPE.itemsize:
            raise CorruptFileError(f"{path}: not a table of documents; prepare the text again")
        return np.memmap(path, DOCUMENT_DTYPE, mode="r")

    def document_names(self, spans: Iterable[tuple[int, int]]) -> list[str]:
        """The names of the documents that have a training token in one of the spans: file and line, in their order.

        A corpus without the table of documents (made before it existed) gives the spans themselves.

        Args:
            spans: the first token, and the number of tokens.

        Raises:
            CorruptFileError: the table does not belong to these tokens.
        """
        path, table = self.path / DOCUMENT_TABLE, self._document_table()
        if table is None:
            return [f"tokens {start:,} to {start + count - 1:,}" for start, count in spans]
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


# ---------------------------------------------------------------- writing


class _ShardWriter:
    """Writes the tokens of a split to files of `SHARD_TOKENS` tokens, as uint16 if every id fits, else as uint32."""

    def __init__(self, directory: Path, split: Split, vocab_size: int):
        self._directory, self._split, self._num_tokens = directory, split, 0
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

    def append(self, tokens: TokenArray) -> None:
        """Write tokens [T] after those before."""
        tokens = tokens.astype(self._dtype)
        while len(tokens):
            index, offset = divmod(self._num_tokens, SHARD_TOKENS)
            part, tokens = np.split(tokens, [SHARD_TOKENS - offset])
            with (self._directory / f"{self._split}-{index:05d}.npy").open("r+b" if offset else "wb") as file:
                header = {"descr": self._dtype.str, "fortran_order": False, "shape": (offset + len(part),)}
                np.lib.format.write_array_header_1_0(file, header)  # the same size for every length
                file.seek(0, os.SEEK_END)
                file.write(part.tobytes())
            self._num_tokens += len(part)


def write_shards(items: Iterable[SplitText], tokenizer: Tokenizer, directory: Path) -> dict[Split, SplitStats]:
    """Encode texts, and write the tokens of each split and the sources of the training documents.

    Args:
        items: the chunks of each document with their split, and its source at its end.
        tokenizer: encodes the chunks, in batches.
        directory: an empty directory.

    Returns:
        The size of each split.
    """
    writers: dict[Split, _ShardWriter] = {
        split: _ShardWriter(directory, split, tokenizer.vocab_size) for split in SPLITS
    }
    stats: dict[Split, SplitStats] = {split: SplitStats() for split in SPLITS}
    eos = np.array([tokenizer.eos_id])
    # A begin token that is the end-of-text token stands between the documents already.
    begin = np.array([id for id in tokenizer.bos_ids if id != tokenizer.eos_id], dtype=np.int64)
    begins_document = dict.fromkeys(SPLITS, True)
    batch: list[SplitText] = []

    def write_batch() -> None:
        texts = [text for _, text in batch if isinstance(text, str)]
        encoded = zip(tokenizer.encode_batch(texts), tokenizer.lost_text(texts), strict=True)
        tokens: dict[Split, list[TokenArray]] = {split: [eos[:0]] for split in SPLITS}
        documents: list[tuple[int, int, int]] = []
        for split, text in batch:
            size = stats[split]
            is_text = isinstance(text, str)
            ids, lost = next(encoded) if is_text else (eos, "")
            ids = np.concatenate([begin, ids]) if begins_document[split] and len(begin) else ids
            begins_document[split] = not is_text
            size.tokens += len(ids)
            tokens[split].append(ids)
            if is_text:
                size.bytes += len(text.encode())
                size.characters += len(text)
                size.unknown += len(lost.encode())
                size.broken += int(tokenizer.is_broken[ids].sum())
                size.not_nfc += _lines_not_in("NFC", text)
                size.not_nfd += _lines_not_in("NFD", text)
            else:
                size.documents += 1
                if split == "train":
                    documents.append((size.tokens, text.source, text.line or 0))
        with map_disk_errors(directory), (directory / DOCUMENT_TABLE).open("ab") as table:
            table.write(np.array(documents, DOCUMENT_DTYPE).tobytes())
            for split, writer in writers.items():
                writer.append(np.concatenate(tokens[split]))
        batch.clear()

    batch_size = 0
    for item in items:
        batch.append(item)
        batch_size += (len(item[1]) if isinstance(item[1], str) else 0) + 64  # short texts take memory too
        if batch_size >= ENCODE_BATCH_CHARS:
            write_batch()
            batch_size = 0
    write_batch()
    return stats


def _lines_not_in(form: Literal["NFC", "NFD"], text: str) -> int:
    if text.isascii() or unicodedata.is_normalized(form, text):
        return 0
    return sum(not unicodedata.is_normalized(form, line) for line in text.splitlines())


def concatenate_shards(parts: list[Path], vocab_size: int, directory: Path) -> None:
    """Copy what several calls of `write_shards` have written, as if it was one.

    Args:
        parts: their directories, in order.
        vocab_size: that of their tokenizer.
        directory: an empty directory.
    """
    with map_disk_errors(directory), (directory / DOCUMENT_TABLE).open("wb") as table:
        for split in SPLITS:
            writer, num_tokens = _ShardWriter(directory, split, vocab_size), 0
            for part in parts:
                if split == "train":
                    rows = np.fromfile(part / DOCUMENT_TABLE, DOCUMENT_DTYPE)
                    rows["end"] += num_tokens
                    table.write(rows.tobytes())
                tokens = ShardedTokens(sorted(part.glob(f"{split}-*.npy")))
                for start in range(0, len(tokens), COPY_CHUNK_TOKENS):
                    writer.append(tokens.read(start, min(COPY_CHUNK_TOKENS, len(tokens) - start)))
                num_tokens += len(tokens)
