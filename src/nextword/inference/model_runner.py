"""Model runners: what an engine calls in each step. Chunks of several sequences in, the logits after each of them out."""

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nextword.inference import native_runner
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.quantization import Precision, precision_for, quantize
from nextword.model.gpt import GPT


class TokenChunk(NamedTuple):
    """Consecutive tokens of the sequence in a slot. Earlier tokens are in the KV cache.

    Attributes:
        slot: Slot of the cache.
        start: Position of the first token.
        tokens: Token ids.
        all_logits: Return the logits after each token, not only those after the last one.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    all_logits: bool = False


class ModelRunner(Protocol):
    """Runs a model over chunks of tokens."""

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        """Run chunks through the model and store their keys and values in the cache.

        Returns:
            For each chunk the logits after its last token [1, V], or after each of its tokens [T, V]; float32 on the CPU.
        """
        ...

    def reusable_prefix(self, length: int, step_tokens: int) -> int:
        """How many of the first `length` cached positions another sequence may reuse.

        Args:
            length: Length of the common prefix.
            step_tokens: Tokens after which prompts are split into chunks.
        """
        ...


def build_runner(model: GPT, precision: Precision = "float32", batch_invariant: bool = False) -> ModelRunner:
    """The fastest runner of a model on this machine: compiled code, or else PyTorch.

    Args:
        model: The model.
        precision: Precision of the matrices.
        batch_invariant: Make the logits of a sequence independent of the others to the last bit. `NativeRunner` always does;
            in `TorchRunner` it costs speed.
    """
    if native_runner.is_available(model):
        return NativeRunner(model, precision)
    return TorchRunner(model, precision, batch_invariant)


class NativeRunner:
    """Runs all chunks in one compiled forward pass. Logits depend neither on other sequences nor on the chunks.

    Args:
        model: The model.
        precision: Precision of the matrices.
    """

    def __init__(self, model: GPT, precision: Precision = "float32"):
        self.native_model = native_runner.NativeModel(model, precision)

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        """See `ModelRunner.forward`."""
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
        slots = [chunk.slot for chunk in chunks for _ in chunk.tokens]
        ends = itertools.accumulate(len(chunk.tokens) for chunk in chunks)
        counts = [len(chunk.tokens) if chunk.all_logits else 1 for chunk in chunks]
        output_rows = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        return list(self.native_model.forward(cache, tokens, positions, slots, output_rows).split(counts))

    def reusable_prefix(self, length: int, step_tokens: int) -> int:
        """See `ModelRunner.reusable_prefix`."""
        return length


class TorchRunner:
    """Runs chunks with PyTorch: longer ones one by one, then all chunks of one token in one batch.

    Args:
        model: The model.
        precision: Precision whose values the matrices are rounded to; they stay float32.
        batch_invariant: Run every chunk by itself, so that the logits of a sequence do not depend on the others.
    """

    def __init__(self, model: GPT, precision: Precision = "float32", batch_invariant: bool = False):
        self.model = model if precision == "float32" else fake_quantize(model, precision)
        self.batch_invariant = batch_invariant

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        """See `ModelRunner.forward`."""
        batches: list[list[int]] = []
        decode: list[int] = []
        for i, chunk in enumerate(chunks):
            if len(chunk.tokens) > 1 or chunk.all_logits or self.batch_invariant:
                batches.append([i])
            else:
                decode.append(i)
        if decode:
            batches.append(sorted(decode, key=lambda i: chunks[i].slot))
        logits: dict[int, Tensor] = {}
        for batch in batches:
            logits.update(zip(batch, self._forward_batch(cache, [chunks[i] for i in batch]).cpu(), strict=True))
        return [logits[i] for i in range(len(chunks))]

    def _forward_batch(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> Tensor:
        device = self.model.unembedding.device
        tokens = torch.tensor([chunk.tokens for chunk in chunks], device=device)  # [B, T]
        slots, starts = [chunk.slot for chunk in chunks], [chunk.start for chunk in chunks]
        positions = cache.prepare(slots, starts, tokens.shape[1], device)
        hidden = self.model(tokens, positions=positions, cache=cache)  # [B, T, D]
        return self.model.unembed(hidden if chunks[0].all_logits else hidden[:, -1:]).float()  # [B, T or 1, V]

    def reusable_prefix(self, length: int, step_tokens: int) -> int:
        """See `ModelRunner.reusable_prefix`. Batch-invariant runs reuse whole chunks: the others' products differ in bits."""
        return length // step_tokens * step_tokens if self.batch_invariant else length


@torch.no_grad()
def fake_quantize(model: GPT, precision: Precision) -> GPT:
    """A float32 copy of a model whose matrices have the values of a precision: its accuracy without its speed."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "position_embedding" not in name and "score" not in name:
            parameter.copy_(quantize(parameter, precision_for(precision, "blocks." in name)).dequantize())
    return model
