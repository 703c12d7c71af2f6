"""What a step of the engine asks of a model: pieces of several texts in, the logits of what follows each out."""

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.native_runner import Native, fits, library
from nextword.inference.quantization import Precision, of_matrix, pack
from nextword.model.gpt import GPT


class Piece(NamedTuple):
    """Tokens of the text in a slot, from position `start` on. What stands before them is in the cache. `every`: the logits
    after each of its tokens are asked for, and not only those after its last."""

    slot: int
    start: int
    tokens: Sequence[int]
    every: bool = False


class Reader(Protocol):
    def read(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> list[Tensor]:
        """For each piece the logits [1, V] of what follows it, or [T, V] of what follows each of its tokens, float32 on the
        CPU; all of them are in the cache then."""
        ...

    def whole(self, length: int, step_tokens: int) -> int:
        """How many of `length` positions may be taken over from another text, where prompts are cut every `step_tokens`."""
        ...


def reader_of(model: GPT, precision: Precision = "float32", apart: bool = False) -> Reader:
    """The quickest way there is to read with this model on this machine: compiled code, else PyTorch's operations.

    Args:
        apart: a text's numbers must not depend on the others at all, which costs speed without compiled code.
    """
    if fits(model) and library()[0] is not None:
        return CompiledReader(model, precision)
    return PlainReader(model, precision, apart)


class CompiledReader:
    """All pieces in one pass. A text's logits do not depend on the others, nor on how it is cut into pieces."""

    def __init__(self, model: GPT, precision: Precision = "float32"):
        self.native = Native(model, precision)

    def read(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> list[Tensor]:
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = [piece.start + i for piece in pieces for i in range(len(piece.tokens))]
        slots = [piece.slot for piece in pieces for _ in piece.tokens]
        ends = list(itertools.accumulate(len(piece.tokens) for piece in pieces))
        counts = [len(piece.tokens) if piece.every else 1 for piece in pieces]
        wanted = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        return list(self.native.read(cache, tokens, positions, slots, wanted).split(counts))

    def whole(self, length: int, step_tokens: int) -> int:
        return length


class PlainReader:
    """Each longer piece by itself, then all pieces of one token together, since a tensor's rows have one length.

    Args:
        apart: every piece is read by itself, so that a text's numbers do not depend on the others at all.
    """

    def __init__(self, model: GPT, precision: Precision = "float32", apart: bool = False):
        self.model = model if precision == "float32" else rounded(model, precision)
        self.apart = apart

    def read(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> list[Tensor]:
        logits: dict[int, Tensor] = {}
        longer = [[i] for i, piece in enumerate(pieces) if len(piece.tokens) > 1 or piece.every or self.apart]
        alone = {i for group in longer for i in group}
        single = sorted((i for i in range(len(pieces)) if i not in alone), key=lambda i: pieces[i].slot)
        for group in [*longer, *([single] if single else [])]:
            found = self._read(cache, [pieces[i] for i in group]).cpu()
            logits.update(zip(group, found, strict=True))
        return [logits[i] for i in range(len(pieces))]

    def _read(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> Tensor:
        device = self.model.unembedding.device
        tokens = torch.tensor([piece.tokens for piece in pieces], device=device)  # [B, T]
        slots, starts = [piece.slot for piece in pieces], [piece.start for piece in pieces]
        positions = cache.select(slots, starts, tokens.shape[1], device)
        hidden = self.model(tokens, positions=positions, cache=cache)  # [B, T, D]
        return self.model.unembed(hidden if pieces[0].every else hidden[:, -1:]).float()  # [B, T or 1, V]

    def whole(self, length: int, step_tokens: int) -> int:
        return length // step_tokens * step_tokens if self.apart else length


@torch.no_grad()
def rounded(model: GPT, precision: Precision) -> GPT:
    """A copy whose matrices have the values that their packed form stands for: what a precision loses, without its speed."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "position_embedding" not in name and "score" not in name:
            parameter.copy_(pack(parameter, of_matrix(precision, "blocks." in name)).unpack())
    return model
