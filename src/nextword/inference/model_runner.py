"""What a step of the engine asks of a model: pieces of several texts in, the logits of what follows each out."""

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.native_runner import NativeModel, load_library, supports
from nextword.inference.quantization import Precision, precision_for, quantize
from nextword.model.gpt import GPT


class TokenChunk(NamedTuple):
    """Tokens of the text in a slot, from position `start` on. What stands before them is in the cache. `every`: the logits
    after each of its tokens are asked for, and not only those after its last."""

    slot: int
    start: int
    tokens: Sequence[int]
    all_logits: bool = False


class ModelRunner(Protocol):
    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        """For each piece the logits [1, V] of what follows it, or [T, V] of what follows each of its tokens, float32 on the
        CPU; all of them are in the cache then."""
        ...

    def reusable_prefix(self, length: int, step_tokens: int) -> int:
        """How many of `length` positions may be taken over from another text, where prompts are cut every `step_tokens`."""
        ...


def build_runner(model: GPT, precision: Precision = "float32", batch_invariant: bool = False) -> ModelRunner:
    """The quickest way there is to read with this model on this machine: compiled code, else PyTorch's operations.

    Args:
        apart: a text's numbers must not depend on the others at all, which costs speed without compiled code.
    """
    if supports(model) and load_library()[0] is not None:
        return NativeRunner(model, precision)
    return TorchRunner(model, precision, batch_invariant)


class NativeRunner:
    """All pieces in one pass. A text's logits do not depend on the others, nor on how it is cut into pieces."""

    def __init__(self, model: GPT, precision: Precision = "float32"):
        self.native_model = NativeModel(model, precision)

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        tokens = [token for piece in chunks for token in piece.tokens]
        positions = [piece.start + i for piece in chunks for i in range(len(piece.tokens))]
        slots = [piece.slot for piece in chunks for _ in piece.tokens]
        ends = list(itertools.accumulate(len(piece.tokens) for piece in chunks))
        counts = [len(piece.tokens) if piece.all_logits else 1 for piece in chunks]
        output_rows = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        return list(self.native_model.forward(cache, tokens, positions, slots, output_rows).split(counts))

    def reusable_prefix(self, length: int, step_tokens: int) -> int:
        return length


class TorchRunner:
    """Each longer piece by itself, then all pieces of one token together, since a tensor's rows have one length.

    Args:
        apart: every piece is read by itself, so that a text's numbers do not depend on the others at all.
    """

    def __init__(self, model: GPT, precision: Precision = "float32", batch_invariant: bool = False):
        self.model = model if precision == "float32" else fake_quantize(model, precision)
        self.batch_invariant = batch_invariant

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        logits: dict[int, Tensor] = {}
        batches = [
            [i] for i, piece in enumerate(chunks) if len(piece.tokens) > 1 or piece.all_logits or self.batch_invariant
        ]
        batched_separately = {i for group in batches for i in group}
        decode_chunks = sorted(
            (i for i in range(len(chunks)) if i not in batched_separately), key=lambda i: chunks[i].slot
        )
        for group in [*batches, *([decode_chunks] if decode_chunks else [])]:
            batch_logits = self._forward_batch(cache, [chunks[i] for i in group]).cpu()
            logits.update(zip(group, batch_logits, strict=True))
        return [logits[i] for i in range(len(chunks))]

    def _forward_batch(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> Tensor:
        device = self.model.unembedding.device
        tokens = torch.tensor([piece.tokens for piece in chunks], device=device)  # [B, T]
        slots, starts = [piece.slot for piece in chunks], [piece.start for piece in chunks]
        positions = cache.prepare(slots, starts, tokens.shape[1], device)
        hidden = self.model(tokens, positions=positions, cache=cache)  # [B, T, D]
        return self.model.unembed(hidden if chunks[0].all_logits else hidden[:, -1:]).float()  # [B, T or 1, V]

    def reusable_prefix(self, length: int, step_tokens: int) -> int:
        return length // step_tokens * step_tokens if self.batch_invariant else length


@torch.no_grad()
def fake_quantize(model: GPT, precision: Precision) -> GPT:
    """A copy whose matrices have the values that their packed form stands for: what a precision loses, without its speed."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "position_embedding" not in name and "score" not in name:
            parameter.copy_(quantize(parameter, precision_for(precision, "blocks." in name)).dequantize())
    return model
