"""The tokens on disk: one long row for each split, in plain `.npy` files of bounded size, written as a stream."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nextword.common.errors import CorruptFileError
from nextword.common.fs import map_disk_errors
from nextword.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]

SHARD_TOKENS = 2**26
COPY_CHUNK_TOKENS = 2**20  # tokens at once


@dataclass(frozen=True)
class SplitStats:
    """What one split holds. `bytes` are those of its text in UTF-8; `unknown` counts the tokens that stand for none."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    unknown: int = 0


class ShardedTokens:
    """One long row of token ids over several files, mapped into memory rather than read."""

    def __init__(self, shards: list[Path]):
        """Raises `CorruptFile` for a file that is no row of tokens."""
        self._shards = [_open_shard(shard) for shard in shards]
        self._shard_ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._shard_ends[-1]) if self._shards else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start+count-1 as int64 [count]. Raises `IndexError` where the row is shorter."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start:,} to {start + count:,} of a row of {len(self):,}")
        parts, shard = [np.empty(0, np.int64)], int(np.searchsorted(self._shard_ends, start, side="right"))
        while count:
            offset = start - (int(self._shard_ends[shard - 1]) if shard else 0)
            part = self._shards[shard][offset : offset + count].astype(np.int64)
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts)


def _open_shard(shard: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():  # NumPy's, of headers that Python 2 may have written
            warnings.simplefilter("error")
            tokens = np.load(shard, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a header that is none, NumPy raises whatever reading it as Python's words does
        raise CorruptFileError(f"{shard}: not an array file of NumPy's ({error})") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise CorruptFileError(f"{shard}: not a row of uint16 or uint32")
    return tokens


class ShardWriter:
    """Writes one split's tokens: plain `.npy` files of one dimension, uint16 where every id fits, else uint32."""

    def __init__(self, directory: Path, split: Split, tokenizer: Tokenizer):
        self._directory, self._split = directory, split
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._eos, self._unknown_id = np.array([tokenizer.eos_id], self._dtype), tokenizer.unk_id
        self._pending: list[np.ndarray] = []
        self._file: Any = None
        self._tokens_in_file = self._num_files = 0
        self._documents = self._tokens = self._bytes = self._characters = self._unknown = 0
        self.tokens_added = 0  # tokens, those that wait to be written included

    def end_document(self) -> None:
        self._documents += 1
        self.tokens_added += 1
        self._pending.append(self._eos)

    def add(self, text: str, ids: np.ndarray) -> None:
        """A piece of text and its ids [T]."""
        self.tokens_added += len(ids)
        self._bytes += len(text.encode())
        self._characters += len(text)
        if self._unknown_id is not None:
            self._unknown += int(np.count_nonzero(ids == self._unknown_id))
        self._pending.append(ids.astype(self._dtype))

    def append_from(self, tokens: ShardedTokens) -> None:
        """A row of the same vocabulary; what it counts besides its tokens is known to whoever wrote it."""
        for start in range(0, len(tokens), COPY_CHUNK_TOKENS):
            self._pending.append(tokens.read(start, min(COPY_CHUNK_TOKENS, len(tokens) - start)).astype(self._dtype))
            self.flush()

    def flush(self) -> None:
        """Put on disk what was added."""
        tokens = np.concatenate(self._pending) if self._pending else self._eos[:0]
        self._pending = []
        self._tokens += len(tokens)
        with map_disk_errors(self._directory):
            while len(tokens):
                if self._file is None:
                    self._file = (self._directory / f"{self._split}-{self._num_files:05d}.npy").open("wb")
                    self._file.write(self._header(0))
                part, tokens = (
                    tokens[: SHARD_TOKENS - self._tokens_in_file],
                    tokens[SHARD_TOKENS - self._tokens_in_file :],
                )
                self._file.write(part.tobytes())
                self._tokens_in_file += len(part)
                if self._tokens_in_file == SHARD_TOKENS:
                    self._close_file()

    def _header(self, length: int) -> bytes:
        """What precedes the data in NumPy's format 1.0: always 128 bytes, so that the end can write it once more."""
        fields = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"

    def _close_file(self) -> None:
        self._file.seek(0)
        self._file.write(self._header(self._tokens_in_file))
        self._file.close()
        self._file, self._tokens_in_file, self._num_files = None, 0, self._num_files + 1

    def close(self) -> SplitStats:
        with map_disk_errors(self._directory):
            if self._file is not None:
                self._close_file()
        return SplitStats(self._documents, self._tokens, self._bytes, self._characters, self._unknown)
