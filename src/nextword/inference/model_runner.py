"""Model runners: what an engine calls in each step. Takes chunks of several sequences and returns the logits after each.

`NativeRunner` calls compiled C++ once for each forward pass: native_runner.cpp. This is a second implementation of the forward
pass in `model/gpt.py`, built from the same `ModelConfig` and weights. It exists for speed: a decoding step of a small model is
some hundred operations of a few microseconds, whose dispatch from Python takes longer than the arithmetic, and PyTorch has no
int4 matrix products for a CPU. `tests/test_model_runner.py` checks that it equals `GPT.forward` for every preset and precision.
"""

import copy
import ctypes
import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nextword.common import native_build
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.quantization import PRECISION_CODES, Precision, precision_for, quantize
from nextword.model import ops
from nextword.model.gpt import GPT, Norm, compute_rotary_cos_sin, named_modules

SOURCE = Path(__file__).with_name("native_runner.cpp")


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
    """Runs a model over chunks of tokens.

    Attributes:
        reuses_any_prefix: Whether another sequence may reuse any number of cached positions. Otherwise whole chunks only,
            because products of other shapes differ in their last bits.
    """

    reuses_any_prefix: bool

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        """Run chunks through the model and store their keys and values in the cache.

        Returns:
            For each chunk the logits after its last token [1, V], or after each of its tokens [T, V]; float32 on the CPU.
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
    if NativeRunner.unavailable_reason(model):
        return TorchRunner(model, precision, batch_invariant)
    return NativeRunner(model, precision)


# ---------------------------------------------------------------- PyTorch


class TorchRunner:
    """Runs chunks with PyTorch: longer ones one by one, then all chunks of one token in one batch.

    Args:
        model: The model.
        precision: Precision whose values the matrices are rounded to; they stay float32.
        batch_invariant: Run every chunk by itself, so that the logits of a sequence do not depend on the others.
    """

    def __init__(self, model: GPT, precision: Precision = "float32", batch_invariant: bool = False):
        self.model = model if precision == "float32" else fake_quantize(model, precision)
        self.reuses_any_prefix = not batch_invariant
        self.batch_invariant = batch_invariant

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        """See `ModelRunner.forward`."""
        single = [len(chunk.tokens) == 1 and not (chunk.all_logits or self.batch_invariant) for chunk in chunks]
        batches = [[i] for i in range(len(chunks)) if not single[i]]
        if any(single):
            batches.append(sorted(itertools.compress(range(len(chunks)), single), key=lambda i: chunks[i].slot))
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


@torch.no_grad()
def fake_quantize(model: GPT, precision: Precision) -> GPT:
    """A float32 copy of a model whose matrices have the values of a precision: its accuracy without its speed."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "position_embedding" not in name and "score" not in name:
            parameter.copy_(quantize(parameter, precision_for(precision, "blocks." in name)).dequantize())
    return model


# ---------------------------------------------------------------- the structures of native_runner.cpp

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _structure(name: str, *fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """A structure from types and the names of the fields that have them, in the order of the C++ file."""
    declared = [(field, kind) for kind, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": declared})


_Matrix = _structure("_Matrix", (POINTER, "data scale bias"), (INT, "precision out_features in_features"))
_Norm = _structure("_Norm", (POINTER, "weight bias"))
# Named as in a `Block`. What a block does not have stays null.
_Layer = _structure(
    "_Layer",
    (_Norm, "attention_norm feed_forward_norm query_norm key_norm"),
    (_Matrix, "query key value output up gate down"),
)
_Model = _structure(
    "_Model",
    (INT, "n_layers d_model n_heads n_kv_heads head_dim d_ff context_length activation post_norm"),
    (FLOAT, "eps padding"),
    (POINTER, "position_table cos sin"),
    (_Norm, "final_norm"),
    (_Matrix, "embedding head"),
    (ctypes.POINTER(_Layer), "layers"),
)
_Cache = _structure("_Cache", (POINTER, "keys values"), (INT, "slots capacity"))


# ---------------------------------------------------------------- compiled code


class NativeRunner:
    """Runs all chunks in one compiled forward pass. Logits depend neither on other sequences nor on the chunks.

    In float32 it uses the weights of the `GPT` itself, not copies.

    Args:
        model: The model, in float32 on a CPU.
        precision: Precision of the matrices. Norms, biases, positions and sums are float32.

    Raises:
        RuntimeError: There is an `unavailable_reason`.
    """

    reuses_any_prefix = True

    def __init__(self, model: GPT, precision: Precision = "float32"):
        if reason := self.unavailable_reason(model):
            raise RuntimeError(reason)
        library: Any = native_build.load_native_library(SOURCE)[0]
        library.nextword_scratch_new.restype = POINTER
        self.scratch = POINTER(library.nextword_scratch_new())
        # Not at exit: a thread may still be in `forward`, and the system frees the memory anyway.
        weakref.finalize(self, library.nextword_scratch_free, self.scratch).atexit = False
        self.model = model
        self.keepalive: list[Any] = []  # the memory that the structures point to, besides the model's
        self.model_struct = self._build_model_struct(model, precision)

    @staticmethod
    def unavailable_reason(model: GPT) -> str:
        """Why compiled code cannot run this model here; empty if it can."""
        if not ops.supports(model.config, model.token_embedding.weight):
            return "the model's widths are not multiples of 8, or it is not float32 on a CPU"
        return native_build.load_native_library(SOURCE)[1]

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[Tensor]:
        """See `ModelRunner.forward`."""
        length = max(chunk.start + len(chunk.tokens) for chunk in chunks)
        cache.reserve(max(chunk.slot for chunk in chunks) + 1, length)
        if length > self.model_struct.context_length:
            self._extend_rotary_table(cache.keys.shape[3])
        cache_struct = _Cache(cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[1], cache.keys.shape[3])
        tokens = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        positions = torch.tensor([chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))])
        slots = torch.tensor([chunk.slot for chunk in chunks for _ in chunk.tokens])
        counts = [len(chunk.tokens) if chunk.all_logits else 1 for chunk in chunks]
        ends = itertools.accumulate(len(chunk.tokens) for chunk in chunks)
        outputs = torch.tensor(
            [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        )
        logits = torch.empty(len(outputs), self.model_struct.head.out_features)
        native_build.call_native(
            *(SOURCE, "forward", ctypes.byref(self.model_struct), ctypes.byref(cache_struct), self.scratch),
            *(len(tokens), tokens, positions, slots, len(outputs), outputs, logits),
        )
        return list(torch.split(logits, counts))

    def _build_model_struct(self, model: GPT, precision: Precision) -> ctypes.Structure:
        config = model.config
        layers = (_Layer * config.n_layers)()
        self.keepalive.append(layers)
        for path, module in named_modules(model).items():
            if isinstance(module, Norm | nn.Linear) and path.startswith("blocks."):
                _, layer, *_, name = path.split(".")
                is_norm = isinstance(module, Norm)
                struct = self._norm(module) if is_norm else self._matrix(module.weight, precision, module.bias)
                setattr(layers[int(layer)], name, struct)
        outer_precision = precision_for(precision, in_block=False)
        head = embedding = self._matrix(model.unembedding, outer_precision)
        if model.head is not None:
            embedding = self._matrix(model.token_embedding.weight, outer_precision)
        table, num_positions = None, 0  # of rotary positions: as many as the cache has
        if config.positions != "rope":
            table = model.position_embedding.weight if config.positions == "learned" else model.position_table
            num_positions = config.context_length
        return _Model(
            *(config.n_layers, config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff),
            *(num_positions, ops.ACTIVATION_CODES[config.activation], config.norm_position == "post"),
            *(config.norm_eps, 0.0, self._data_pointer(table), None, None),
            *(self._norm(model.final_norm), embedding, head, layers),
        )

    def _extend_rotary_table(self, num_positions: int) -> None:
        config, struct = self.model.config, self.model_struct
        self.rotary_table = compute_rotary_cos_sin(torch.arange(num_positions), config.head_dim, config.rope_theta)
        struct.cos, struct.sin = (tensor.data_ptr() for tensor in self.rotary_table)
        struct.context_length = num_positions

    def _data_pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self.keepalive.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: nn.Module) -> ctypes.Structure:
        """The structure of a norm; null pointers for `nn.Identity`."""
        return _Norm(*map(self._data_pointer, (norm.weight, norm.bias))) if isinstance(norm, Norm) else _Norm()

    def _matrix(self, weight: Tensor, precision: Precision, bias: Tensor | None = None) -> ctypes.Structure:
        quantized = quantize(weight, precision)
        pointers = map(self._data_pointer, (quantized.data, quantized.scale, bias))
        return _Matrix(*pointers, PRECISION_CODES[precision], *quantized.shape)
