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
from nextword.inference.quantization import KINDS, Packed, Precision, of_matrix, pack
from nextword.model.gpt import GPT, Norm, rotary_angles

SOURCE = Path(__file__).with_suffix(".cpp")
ACTIVATIONS = {"swiglu": 0, "relu": 1, "gelu": 2}

# ---------------------------------------------------------------- native.cpp's types


class _Matrix(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("data", "scale", "bias")] + [
        (n, ctypes.c_int64) for n in ("kind", "out", "in_")
    ]


class _Norm(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("weight", "bias")]


class _Layer(ctypes.Structure):
    _fields_ = [(n, _Norm) for n in ("attention_norm", "feed_forward_norm", "query_norm", "key_norm")] + [
        (n, _Matrix) for n in ("query", "key", "value", "output", "up", "gate", "down")
    ]


class _Model(ctypes.Structure):
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
        ("final_norm", _Norm), ("embedding", _Matrix), ("head", _Matrix), ("layers", ctypes.POINTER(_Layer)),
    ]  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("keys", "values")), *((n, ctypes.c_int64) for n in ("slots", "room"))]


# ---------------------------------------------------------------- the library


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled code, its functions' types declared; or None and why not, in words for the person."""
    loaded, why = native_build.library(SOURCE)
    if loaded is not None:
        loaded.nextword_scratch.restype = ctypes.c_void_p
        loaded.nextword_free.argtypes = [ctypes.c_void_p]
        loaded.nextword_pass.restype = None
        loaded.nextword_pass.argtypes = [
            ctypes.POINTER(_Model), ctypes.POINTER(_Cache), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
            *[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_void_p] * 2,
        ]  # fmt: skip
    return loaded, why


def fits(model: GPT) -> bool:
    """Whether a pass of this model can be done here: float32 on a CPU, widths of whole vectors."""
    config, weight = model.config, model.token_embedding.weight
    widths = (config.d_model, config.head_dim, config.d_ff)
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and all(width % 8 == 0 for width in widths)


# ---------------------------------------------------------------- a model for it


class Native:
    """A model whose passes are compiled code. Its float32 weights are the model's own, not copies.

    Args:
        precision: of the matrices; norms, biases, positions and all sums stay float32.

    Raises:
        RuntimeError: there is no compiled code here, or the model does not fit it (see `library` and `fits`).
    """

    def __init__(self, model: GPT, precision: Precision = "float32"):
        loaded, why = library()
        if loaded is None or not fits(model):
            raise RuntimeError(why or "this model's widths are no multiples of 8, or it is not float32 on a CPU")
        self.library, self.config = loaded, model.config
        self.kept: list[Any] = [model]  # whatever the pointers below point to
        self.scratch = ctypes.c_void_p(loaded.nextword_scratch())
        self.described = self._describe(model, precision)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # where __init__ did not come so far
            self.library.nextword_free(self.scratch)

    def _describe(self, model: GPT, precision: Precision) -> _Model:
        config = model.config
        layers = (_Layer * config.n_layers)()
        for layer, block in zip(layers, model.blocks, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            layer.attention_norm, layer.feed_forward_norm = map(
                self._norm, (block.attention_norm, block.feed_forward_norm)
            )
            layer.query_norm, layer.key_norm = map(self._norm, (attention.query_norm, attention.key_norm))
            for part, names in (
                (attention, ("query", "key", "value", "output")),
                (feed_forward, ("up", "gate", "down")),
            ):
                for name in names:
                    if (linear := getattr(part, name, None)) is not None:
                        setattr(layer, name, self._matrix(pack(linear.weight, precision), linear.bias))
        self.kept.append(layers)
        outer = of_matrix(precision, inside=False)
        head = self._matrix(pack(model.unembedding, outer), None)
        embedding = head if model.head is None else self._matrix(pack(model.token_embedding.weight, outer), None)
        table = cosines = sines = None
        if config.positions == "rope":
            cosines, sines = rotary_angles(torch.arange(config.context_length), config.head_dim, config.rope_theta)
        elif config.positions == "learned":
            table = model.position_embedding.weight
        else:
            table = model.get_buffer("position_table")
        return _Model(
            config.n_layers, config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff,
            config.context_length, ACTIVATIONS[config.activation], config.norm_position == "post", config.norm_eps, 0.0,
            *map(self._pointer, (table, cosines, sines)), self._norm(model.final_norm), embedding, head, layers,
        )  # fmt: skip

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: Any) -> _Norm:
        return _Norm(self._pointer(norm.weight), self._pointer(norm.bias)) if isinstance(norm, Norm) else _Norm()

    def _matrix(self, packed: Packed, bias: Tensor | None) -> _Matrix:
        data, scale = self._pointer(packed.data), self._pointer(packed.scale)
        return _Matrix(data, scale, self._pointer(bias), KINDS[packed.precision], *packed.shape)

    def read(
        self,
        cache: KeyValueCache,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        wanted: Sequence[int],
    ) -> Tensor:
        """Rows, each a token at a position of the text in a slot, through the model; the logits [len(wanted), V] of the
        rows that are wanted. Their keys and values are in the cache then. A prompt is a row for each of its tokens."""
        cache.reserve(max(slots) + 1, max(positions) + 1)
        where = _Cache(cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[1], cache.keys.shape[3])
        rows = torch.tensor([tokens, positions, slots])  # int64
        chosen = torch.tensor(wanted)
        logits = torch.empty(len(wanted), self.described.head.out)
        self.library.nextword_pass(
            ctypes.byref(self.described), ctypes.byref(where), self.scratch, native_build.threads(), len(tokens),
            rows[0].data_ptr(), rows[1].data_ptr(), rows[2].data_ptr(), len(wanted), chosen.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        return logits
