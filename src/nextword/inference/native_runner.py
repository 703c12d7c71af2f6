"""Decoding on a CPU in one call of compiled C++ for each forward pass: native_runner.cpp.

This is a second implementation of the forward pass in `model/gpt.py`, built from the same `ModelConfig` and weights. It exists
for speed: a decoding step of a small model is some hundred operations of a few microseconds, whose dispatch from Python takes
longer than the arithmetic, and PyTorch has no int4 matrix products for a CPU. `tests/test_model_runner.py` holds it equal to
`GPT.forward` for every preset and precision.
"""

import contextlib
import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextword.common import native_build
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.quantization import PRECISION_CODES, Precision, QuantizedTensor, precision_for, quantize
from nextword.model import ops
from nextword.model.gpt import GPT, Norm, compute_rotary_cos_sin

SOURCE = Path(__file__).with_suffix(".cpp")

# ---------------------------------------------------------------- the structures of native_runner.cpp

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("data", "scale", "bias")),
        *((name, INT) for name in ("precision", "out_features", "in_features")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("bias", POINTER)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "feed_forward_norm", "query_norm", "key_norm")),
        *((name, _Matrix) for name in ("query", "key", "value", "output", "up", "gate", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff")),
        *((name, INT) for name in ("context_length", "activation", "post_norm")),
        *((name, FLOAT) for name in ("eps", "padding")),
        *((name, POINTER) for name in ("position_table", "cos", "sin")),
        ("final_norm", _Norm),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [("keys", POINTER), ("values", POINTER), ("slots", INT), ("capacity", INT)]


@cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library with the types of its functions declared, or None and the reason why it cannot be built."""
    library, reason = native_build.load_native_library(SOURCE)
    if library is not None:
        library.nextword_scratch_new.restype = POINTER
        library.nextword_scratch_free.argtypes = [POINTER]
        library.nextword_forward.restype = None
        structures = [ctypes.POINTER(_Model), ctypes.POINTER(_Cache)]
        library.nextword_forward.argtypes = [*structures, POINTER, INT, INT, *[POINTER] * 3, INT, *[POINTER] * 2]
    return library, reason


def is_available(model: GPT) -> bool:
    """Whether `NativeModel` can run this model here: see `ops.supports`; and the library is compiled."""
    return ops.supports(model.config, model.token_embedding.weight) and load_library()[0] is not None


# ---------------------------------------------------------------- the model


class NativeModel:
    """A model whose forward pass is compiled code. In float32 it uses the weights of the `GPT` itself, not copies.

    Args:
        model: The model, in float32 on a CPU.
        precision: Precision of the matrices. Norms, biases, positions and sums are float32.

    Raises:
        RuntimeError: `is_available` does not hold.
    """

    def __init__(self, model: GPT, precision: Precision = "float32"):
        library, reason = load_library()
        if library is None or not is_available(model):
            raise RuntimeError(reason or "the model's widths are not multiples of 8, or it is not float32 on a CPU")
        self.library, self.config = library, model.config
        self.keepalive: list[Any] = [model]  # the memory that the structures below point to
        self.scratch = ctypes.c_void_p(library.nextword_scratch_new())
        self.model_struct = self._build_model_struct(model, precision)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # `__init__` failed
            self.library.nextword_scratch_free(self.scratch)

    def forward(
        self,
        cache: KeyValueCache,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        output_rows: Sequence[int],
    ) -> Tensor:
        """Run rows through the model, each a token at a position of the sequence in a slot. A prompt is a row for each token.

        Args:
            cache: Receives the keys and values of all rows.
            tokens: The token id of each row.
            positions: The position of each row.
            slots: The slot of each row.
            output_rows: Rows whose logits are wanted.

        Returns:
            Logits [len(output_rows), V].
        """
        cache.reserve(max(slots) + 1, max(positions) + 1)
        cache_struct = _Cache(cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[1], cache.keys.shape[3])
        rows = torch.tensor([tokens, positions, slots])  # int64
        outputs = torch.tensor(output_rows)
        logits = torch.empty(len(output_rows), self.model_struct.head.out_features)
        self.library.nextword_forward(
            *(ctypes.byref(self.model_struct), ctypes.byref(cache_struct), self.scratch),
            *(native_build.num_threads(), len(tokens), *(row.data_ptr() for row in rows)),
            *(len(output_rows), outputs.data_ptr(), logits.data_ptr()),
        )
        return logits

    # ------------------------------------------------------------ structures

    def _build_model_struct(self, model: GPT, precision: Precision) -> _Model:
        config = model.config
        layers = (_Layer * config.n_layers)()
        for layer, block in zip(layers, model.blocks, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            layer.attention_norm, layer.feed_forward_norm = map(
                self._norm, (block.attention_norm, block.feed_forward_norm)
            )
            layer.query_norm, layer.key_norm = self._norm(attention.query_norm), self._norm(attention.key_norm)
            for name, module in (*attention.named_children(), *feed_forward.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(layer, name, self._matrix(quantize(module.weight, precision), module.bias))
        self.keepalive.append(layers)
        outer_precision = precision_for(precision, in_block=False)
        head = embedding = self._matrix(quantize(model.unembedding, outer_precision))
        if model.head is not None:
            embedding = self._matrix(quantize(model.token_embedding.weight, outer_precision))
        table = cos = sin = None
        if config.positions == "rope":
            positions = torch.arange(config.context_length)
            cos, sin = compute_rotary_cos_sin(positions, config.head_dim, config.rope_theta)
        elif config.positions == "learned":
            table = model.position_embedding.weight
        else:
            table = model.get_buffer("position_table")
        return _Model(
            *(config.n_layers, config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff),
            *(config.context_length, ops.ACTIVATION_CODES[config.activation], config.norm_position == "post"),
            *(config.norm_eps, 0.0, *map(self._data_pointer, (table, cos, sin))),
            *(self._norm(model.final_norm), embedding, head, layers),
        )

    def _data_pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self.keepalive.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: nn.Module) -> _Norm:
        """The structure of a norm; null pointers for `nn.Identity`."""
        return _Norm(*map(self._data_pointer, (norm.weight, norm.bias))) if isinstance(norm, Norm) else _Norm()

    def _matrix(self, quantized: QuantizedTensor, bias: Tensor | None = None) -> _Matrix:
        pointers = map(self._data_pointer, (quantized.data, quantized.scale, bias))
        return _Matrix(*pointers, PRECISION_CODES[quantized.precision], *quantized.shape)
