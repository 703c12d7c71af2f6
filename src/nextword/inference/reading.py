"""What a step of the engine asks of a model: pieces of several texts in, the logits of what follows each out."""

import copy
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nextword.inference.cache import KeyValueCache
from nextword.inference.native import Native, fits, library
from nextword.inference.quantize import Precision, of_matrix, pack
from nextword.model.gpt import GPT


class Piece(NamedTuple):
    """Tokens of the text in a slot, from position `start` on. What stands before them is in the cache."""

    slot: int
    start: int
    tokens: Sequence[int]


class Reader(Protocol):
    def read(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> Tensor:
        """The logits [len(pieces), V], float32 on the CPU, of what follows each piece; all of them are in the cache then."""
        ...


def reader_of(model: GPT, precision: Precision = "float32") -> Reader:
    """The quickest way there is to read with this model on this machine: compiled code, else PyTorch's operations."""
    if fits(model) and library()[0] is not None:
        return CompiledReader(model, precision)
    return PlainReader(model, precision)


class CompiledReader:
    """All pieces in one pass. A text's logits do not depend on the others, nor on how it is cut into pieces."""

    def __init__(self, model: GPT, precision: Precision = "float32"):
        self.native = Native(model, precision)

    def read(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> Tensor:
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = [piece.start + i for piece in pieces for i in range(len(piece.tokens))]
        slots = [piece.slot for piece in pieces for _ in piece.tokens]
        last, wanted = -1, []
        for piece in pieces:
            last += len(piece.tokens)
            wanted.append(last)
        return self.native.read(cache, tokens, positions, slots, wanted)


class PlainReader:
    """Each longer piece by itself, then all pieces of one token together, since a tensor's rows have one length."""

    def __init__(self, model: GPT, precision: Precision = "float32"):
        self.model = model if precision == "float32" else rounded(model, precision)

    def read(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> Tensor:
        logits = torch.empty(len(pieces), self.model.config.vocab_size)
        longer = [[i] for i, piece in enumerate(pieces) if len(piece.tokens) > 1]
        single = sorted((i for i, piece in enumerate(pieces) if len(piece.tokens) == 1), key=lambda i: pieces[i].slot)
        for group in [*longer, *([single] if single else [])]:
            logits[group] = self._read(cache, [pieces[i] for i in group]).cpu()
        return logits

    def _read(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> Tensor:
        device = self.model.unembedding.device
        tokens = torch.tensor([piece.tokens for piece in pieces], device=device)  # [B, T]
        slots, starts = [piece.slot for piece in pieces], [piece.start for piece in pieces]
        positions = cache.select(slots, starts, tokens.shape[1], device)
        hidden = self.model(tokens, positions=positions, cache=cache)  # [B, T, D]
        return self.model.unembed(hidden[:, -1]).float()  # [B, V]


@torch.no_grad()
def rounded(model: GPT, precision: Precision) -> GPT:
    """A copy whose matrices have the values that their packed form stands for: what a precision loses, without its speed."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "position_embedding" not in name and "score" not in name:
            parameter.copy_(pack(parameter, of_matrix(precision, "blocks." in name)).unpack())
    return model
