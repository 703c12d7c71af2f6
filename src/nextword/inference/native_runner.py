"""A pass through the model in one call of compiled code: native.cpp, built on first use where a C++ compiler is found.

One token of a small model is some hundred operations of a few microseconds each; called one by one from Python, the calls
cost more than the arithmetic.
"""

import contextlib
import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextword.common import native_build
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.quantization import PRECISION_CODES, Precision, QuantizedTensor, precision_for, quantize
from nextword.model.gpt import GPT, Norm, compute_rotary_cos_sin

SOURCE = Path(__file__).with_suffix(".cpp")
ACTIVATION_CODES = {"swiglu": 0, "relu": 1, "gelu": 2}

# ---------------------------------------------------------------- native.cpp's types


class _MatrixStruct(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("data", "scale", "bias")] + [
        (n, ctypes.c_int64) for n in ("kind", "out", "in_")
    ]


class _NormStruct(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("weight", "bias")]


class _LayerStruct(ctypes.Structure):
    _fields_ = [(n, _NormStruct) for n in ("attention_norm", "feed_forward_norm", "query_norm", "key_norm")] + [
        (n, _MatrixStruct) for n in ("query", "key", "value", "output", "up", "gate", "down")
    ]


class _ModelStruct(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_int64)
            for n in (
                "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "context_length", "activation",
                "post_norm",
            )
        ),
        ("eps", ctypes.c_float), ("unused", ctypes.c_float),
        *((n, ctypes.c_void_p) for n in ("positions", "cosines", "sines")),
        ("final_norm", _NormStruct), ("embedding", _MatrixStruct), ("head", _MatrixStruct), ("layers", ctypes.POINTER(_LayerStruct)),
    ]  # fmt: skip


class _CacheStruct(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("keys", "values")), *((n, ctypes.c_int64) for n in ("slots", "room"))]


# ---------------------------------------------------------------- the library


@cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled code, its functions' types declared; or None and why not, in words for the person."""
    cdll, reason = native_build.load_native_library(SOURCE)
    if cdll is not None:
        cdll.nextword_scratch.restype = ctypes.c_void_p
        cdll.nextword_free.argtypes = [ctypes.c_void_p]
        cdll.nextword_pass.restype = None
        cdll.nextword_pass.argtypes = [
            ctypes.POINTER(_ModelStruct), ctypes.POINTER(_CacheStruct), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
            *[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_void_p] * 2,
        ]  # fmt: skip
    return cdll, reason


def supports(model: GPT) -> bool:
    """Whether a pass of this model can be done here: float32 on a CPU, widths of whole vectors."""
    config, weight = model.config, model.token_embedding.weight
    widths = (config.d_model, config.head_dim, config.d_ff)
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and all(width % 8 == 0 for width in widths)


# ---------------------------------------------------------------- a model for it


class NativeModel:
    """A model whose passes are compiled code. Its float32 weights are the model's own, not copies.

    Args:
        precision: of the matrices; norms, biases, positions and all sums stay float32.

    Raises:
        RuntimeError: there is no compiled code here, or the model does not fit it (see `library` and `fits`).
    """

    def __init__(self, model: GPT, precision: Precision = "float32"):
        cdll, reason = load_library()
        if cdll is None or not supports(model):
            raise RuntimeError(reason or "this model's widths are no multiples of 8, or it is not float32 on a CPU")
        self.library, self.config = cdll, model.config
        self.keepalive: list[Any] = [model]  # whatever the pointers below point to
        self.scratch = ctypes.c_void_p(cdll.nextword_scratch())
        self.model_struct = self._build_model_struct(model, precision)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # where __init__ did not come so far
            self.library.nextword_free(self.scratch)

    def _build_model_struct(self, model: GPT, precision: Precision) -> _ModelStruct:
        config = model.config
        layers = (_LayerStruct * config.n_layers)()
        for layer, block in zip(layers, model.blocks, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            layer.attention_norm, layer.feed_forward_norm = map(
                self._norm_struct, (block.attention_norm, block.feed_forward_norm)
            )
            layer.query_norm, layer.key_norm = map(self._norm_struct, (attention.query_norm, attention.key_norm))
            for submodule, names in (
                (attention, ("query", "key", "value", "output")),
                (feed_forward, ("up", "gate", "down")),
            ):
                for name in names:
                    if (linear := getattr(submodule, name, None)) is not None:
                        setattr(layer, name, self._matrix_struct(quantize(linear.weight, precision), linear.bias))
        self.keepalive.append(layers)
        outer_precision = precision_for(precision, in_block=False)
        head = self._matrix_struct(quantize(model.unembedding, outer_precision), None)
        embedding = (
            head
            if model.head is None
            else self._matrix_struct(quantize(model.token_embedding.weight, outer_precision), None)
        )
        position_table = cosines = sines = None
        if config.positions == "rope":
            cosines, sines = compute_rotary_cos_sin(
                torch.arange(config.context_length), config.head_dim, config.rope_theta
            )
        elif config.positions == "learned":
            position_table = model.position_embedding.weight
        else:
            position_table = model.get_buffer("position_table")
        return _ModelStruct(
            config.n_layers, config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff,
            config.context_length, ACTIVATION_CODES[config.activation], config.norm_position == "post", config.norm_eps, 0.0,
            *map(self._data_pointer, (position_table, cosines, sines)), self._norm_struct(model.final_norm), embedding, head, layers,
        )  # fmt: skip

    def _data_pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self.keepalive.append(tensor)
        return tensor.data_ptr()

    def _norm_struct(self, norm: Any) -> _NormStruct:
        return (
            _NormStruct(self._data_pointer(norm.weight), self._data_pointer(norm.bias))
            if isinstance(norm, Norm)
            else _NormStruct()
        )

    def _matrix_struct(self, quantized: QuantizedTensor, bias: Tensor | None) -> _MatrixStruct:
        data, scale = self._data_pointer(quantized.data), self._data_pointer(quantized.scale)
        return _MatrixStruct(
            data, scale, self._data_pointer(bias), PRECISION_CODES[quantized.precision], *quantized.shape
        )

    def forward(
        self,
        cache: KeyValueCache,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        output_rows: Sequence[int],
    ) -> Tensor:
        """Rows, each a token at a position of the text in a slot, through the model; the logits [len(wanted), V] of the
        rows that are wanted. Their keys and values are in the cache then. A prompt is a row for each of its tokens."""
        cache.reserve(max(slots) + 1, max(positions) + 1)
        cache_struct = _CacheStruct(
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[1], cache.keys.shape[3]
        )
        rows = torch.tensor([tokens, positions, slots])  # int64
        output_indices = torch.tensor(output_rows)
        logits = torch.empty(len(output_rows), self.model_struct.head.out)
        self.library.nextword_pass(
            ctypes.byref(self.model_struct), ctypes.byref(cache_struct), self.scratch, native_build.num_threads(), len(tokens),
            rows[0].data_ptr(), rows[1].data_ptr(), rows[2].data_ptr(), len(output_rows), output_indices.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        return logits
