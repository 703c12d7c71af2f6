"""The tokens of a corpus on disk: a sequence for each split, in `.npy` files of bounded size."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from nextword.common.errors import CorruptFileError
from nextword.common.fs import map_disk_errors
from nextword.data.dataset import TokenArray
from nextword.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

SHARD_TOKENS = 2**26
COPY_CHUNK_TOKENS = 2**20


@dataclass(frozen=True)
class SplitStats:
    """The size of a split.

    Attributes:
        documents: the number of documents; one that is cut between the splits counts in both.
        tokens: the number of tokens, the end-of-text tokens included.
        bytes: the length of its text in UTF-8.
        characters: the length of its text.
        unknown: the number of unknown tokens.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    unknown: int = 0


class ShardedTokens:
    """A sequence of token ids in several files, which are mapped into memory.

    Args:
        shards: the files, in order.

    Raises:
        CorruptFileError: a file is not an array of tokens.
    """

    def __init__(self, shards: list[Path]):
        self._shards = [_open_shard(shard) for shard in shards]
        self._shard_ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._shard_ends[-1]) if self._shards else 0

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens start … start + count − 1 as int64 [count]. Raises `IndexError` if there are fewer."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start:,} to {start + count:,} of a sequence of {len(self):,}")
        parts, shard = [np.empty(0, np.int64)], int(np.searchsorted(self._shard_ends, start, side="right"))
        while count:
            offset = start - (int(self._shard_ends[shard - 1]) if shard else 0)
            part = self._shards[shard][offset : offset + count].astype(np.int64)
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts)


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


class ShardWriter:
    """Writes the tokens of a split to `.npy` files of `SHARD_TOKENS` tokens, as uint16 if every id fits, else as uint32.

    Attributes:
        tokens_added: the number of tokens so far, those that are not flushed included.
    """

    def __init__(self, directory: Path, split: Split, tokenizer: Tokenizer):
        self._directory, self._split = directory, split
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._eos, self._unk_id = np.array([tokenizer.eos_id], self._dtype), tokenizer.unk_id
        self._pending: list[TokenArray] = []
        self._file: BinaryIO | None = None
        self._tokens_in_file = self._num_files = 0
        self._documents = self._bytes = self._characters = self._unknown = 0
        self.tokens_added = 0

    def add(self, text: str, ids: TokenArray) -> None:
        """Add a text and its ids [T]."""
        self._bytes += len(text.encode())
        self._characters += len(text)
        if self._unk_id is not None:
            self._unknown += int(np.count_nonzero(ids == self._unk_id))
        self._append(ids)

    def end_document(self) -> None:
        """Add the end-of-text token."""
        self._documents += 1
        self._append(self._eos)

    def append_from(self, tokens: ShardedTokens) -> None:
        """Copy the tokens of another writer. They are not part of the other statistics."""
        for start in range(0, len(tokens), COPY_CHUNK_TOKENS):
            self._append(tokens.read(start, min(COPY_CHUNK_TOKENS, len(tokens) - start)))
            self.flush()

    def _append(self, ids: TokenArray) -> None:
        self.tokens_added += len(ids)
        self._pending.append(ids.astype(self._dtype))

    def flush(self) -> None:
        """Write the pending tokens to disk."""
        tokens = np.concatenate([self._eos[:0], *self._pending])
        self._pending = []
        with map_disk_errors(self._directory):
            while len(tokens):
                if self._file is None:
                    self._file = (self._directory / f"{self._split}-{self._num_files:05d}.npy").open("wb")
                    self._file.write(self._header(0))
                free = SHARD_TOKENS - self._tokens_in_file
                part, tokens = tokens[:free], tokens[free:]
                self._file.write(part.tobytes())
                self._tokens_in_file += len(part)
                if self._tokens_in_file == SHARD_TOKENS:
                    self._close_file()

    def _header(self, length: int) -> bytes:
        """The header of NumPy's format 1.0: always 128 bytes, so that it can be overwritten when the length is known."""
        fields = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.write(self._header(self._tokens_in_file))
            self._file.close()
            self._file, self._tokens_in_file, self._num_files = None, 0, self._num_files + 1

    def close(self) -> SplitStats:
        """Write what is pending, complete the last file, and return the size of the split."""
        self.flush()
        with map_disk_errors(self._directory):
            self._close_file()
        return SplitStats(self._documents, self.tokens_added, self._bytes, self._characters, self._unknown)
