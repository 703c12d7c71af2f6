"""The model's forward pass for training on a CPU, with everything between its large matrix products in compiled code.

The same mathematics and the same weights as `GPT.forward`, which stays the definition: `tests/test_fused.py` holds the two and
their gradients equal. What PyTorch does in some forty passes over memory a block does here in four, forward and backward.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nextword.common import native_build
from nextword.model.config import ModelConfig
from nextword.model.gpt import GPT, Block, Norm, apply_dropout, compute_rotary_cos_sin

SOURCE = Path(__file__).with_suffix(".cpp")
ACTIVATION_CODES = {"swiglu": 0, "relu": 1, "gelu": 2}
LOGITS_PER_CHUNK = 2**22  # logits that are held at once: 16 MB, about what the last cache holds


class _AttentionArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "H", "G", "K", "turns")),
        *((name, ctypes.c_void_p) for name in ("query_weight", "key_weight", "cosines", "sines", "starts", "holes")),
        ("eps", ctypes.c_float), ("unused", ctypes.c_float),
    ]  # fmt: skip


@cache
def load_kernels() -> tuple[Any, str]:
    """The compiled code, its functions' types declared; or None and why not, in words for the person."""
    kernels, reason = native_build.load_native_library(SOURCE)
    if kernels is not None:
        int64, float32, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
        for name, arguments in {
            "attend": [pointer, int64, *[pointer] * 3],
            "attend_backward": [pointer, int64, *[pointer] * 7],
            "norm": [int64, int64, int64, float32, *[pointer] * 6],
            "norm_backward": [int64, int64, int64, float32, *[pointer] * 8],
            "activate": [int64, int64, int64, int64, *[pointer] * 2],
            "activate_backward": [int64, int64, int64, int64, *[pointer] * 3],
            "cross_entropy": [int64, int64, int64, *[pointer] * 3],
            "log_sums": [int64, int64, int64, *[pointer] * 2],
        }.items():
            function = getattr(kernels, f"nextword_{name}")
            function.argtypes, function.restype = arguments, None
    return kernels, reason


def supports(model: GPT, device: torch.device | None = None) -> bool:
    """Whether the model can be trained here: float32 on a CPU, widths of whole vectors of eight; a hollow one, once it is on
    this device."""
    config, weight = model.config, model.token_embedding.weight
    widths = (config.d_model, config.head_dim, config.d_ff)
    on_cpu = (device or weight.device).type == "cpu"
    return on_cpu and weight.dtype == torch.float32 and all(width % 8 == 0 for width in widths)


def is_available(model: GPT, device: torch.device | None = None) -> bool:
    return supports(model, device) and load_kernels()[0] is not None


def _data_ptr(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# ---------------------------------------------------------------- the parts, each with its gradient


class RowLayout(NamedTuple):
    """Where a row's tokens stand: cosines and sines of their rotations [T or B·T, K/2], and where several texts share a
    row, the first position that each one sees [B, T]; where several go on from one beginning, also the hole between that
    beginning and a text's own part [B, T, 2] (without gradients)."""

    cosines: Tensor | None = None
    sines: Tensor | None = None
    segment_starts: Tensor | None = None
    attention_gaps: Tensor | None = None


class FusedAttention(Function):
    """Heads [N, H·K] from queries, keys and values side by side [N, (H + 2G)·K]: normed, rotated, attended to causally."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, layout: RowLayout, config: ModelConfig,
        length: int,
    ) -> Tensor:  # fmt: skip
        inner, rows = config.n_heads * config.head_dim, qkv.shape[0]
        qkv = qkv.contiguous()
        out = qkv.new_empty(rows, inner)
        logsum = qkv.new_empty(rows, config.n_heads)  # as [B, H, T]
        heads = _AttentionArgs(
            rows // length, length, config.n_heads, config.n_kv_heads, config.head_dim,
            length if layout.cosines is None else len(layout.cosines),
            *map(_data_ptr, (query_weight, key_weight, *layout)), config.norm_eps, 0.0,
        )  # fmt: skip
        load_kernels()[0].nextword_attend(
            ctypes.byref(heads), native_build.num_threads(), _data_ptr(qkv), _data_ptr(out), _data_ptr(logsum)
        )
        ctx.save_for_backward(qkv, out, logsum, query_weight, key_weight)
        ctx.heads, ctx.places = heads, layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert ctx.places.attention_gaps is None
        (dout,) = grad_outputs
        qkv, out, logsum, query_weight, key_weight = ctx.saved_tensors
        dqkv, dout = torch.empty_like(qkv), dout.contiguous()
        dquery, dkey = (None if weight is None else torch.empty_like(weight) for weight in (query_weight, key_weight))
        load_kernels()[0].nextword_attend_backward(
            ctypes.byref(ctx.heads),
            native_build.num_threads(),
            *map(_data_ptr, (qkv, out, logsum, dout, dqkv, dquery, dkey)),
        )
        return dqkv, dquery, dkey, None, None, None


class FusedAddNorm(Function):
    """x + added, and its norm: both [N, D]. Without `added` x itself, and its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch_output: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        total, y = x if branch_output is None else torch.empty_like(x), torch.empty_like(x)
        load_kernels()[0].nextword_norm(
            native_build.num_threads(), rows, width, eps, *map(_data_ptr, (x, branch_output, weight, bias, total, y))
        )  # fmt: skip
        ctx.save_for_backward(total, weight, bias)
        ctx.eps, ctx.added = eps, branch_output is not None
        ctx.set_materialize_grads(False)
        return (total if ctx.added else x.view_as(x)), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtotal, dy = grad_outputs
        total, weight, bias = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal if ctx.added else None, None, None, None
        dx, dweight = torch.empty_like(total), torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        dtotal, dy = None if dtotal is None else dtotal.contiguous(), dy.contiguous()
        load_kernels()[0].nextword_norm_backward(
            native_build.num_threads(),
            *total.shape,
            ctx.eps,
            *map(_data_ptr, (total, weight, bias, dy, dtotal, dx, dweight, dbias)),
        )
        return dx, dx if ctx.added else None, dweight, dbias, None


class FusedActivation(Function):
    """What stands between the feed-forward matrices: of gate and up side by side [N, 2F] for SwiGLU, else of [N, F]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = ACTIVATION_CODES[activation]
        ctx.width = x.shape[1] // (2 if activation == "swiglu" else 1)
        y = x.new_empty(x.shape[0], ctx.width)
        load_kernels()[0].nextword_activate(
            native_build.num_threads(), ctx.kind, len(x), ctx.width, _data_ptr(x), _data_ptr(y)
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        (x,) = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        load_kernels()[0].nextword_activate_backward(
            native_build.num_threads(), ctx.kind, len(x), ctx.width, _data_ptr(x), _data_ptr(dy), _data_ptr(dx)
        )  # fmt: skip
        return dx, None


class FusedLinearCrossEntropy(Function):
    """Σ −log softmax(hidden · unembeddingᵀ)[target] in nats; hidden [N, D], targets [N], those below 0 left out.

    A piece of the logits at a time is made, and at once turned into gradients: they are never held whole, nor made twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        hidden, needs_grad = hidden.contiguous(), ctx.needs_input_grad
        losses = hidden.new_empty(len(hidden))
        dhidden = torch.empty_like(hidden) if needs_grad[0] else None
        dunembedding = torch.zeros_like(unembedding) if needs_grad[1] else None
        rows = max(1, LOGITS_PER_CHUNK // len(unembedding))
        for first in range(0, len(hidden), rows):
            hidden_chunk, target_chunk = hidden[first : first + rows], targets[first : first + rows]
            logits = F.linear(hidden_chunk, unembedding)
            load_kernels()[0].nextword_cross_entropy(
                native_build.num_threads(),
                *logits.shape,
                _data_ptr(target_chunk),
                _data_ptr(logits),
                _data_ptr(losses[first : first + rows]),
            )
            if dhidden is not None:
                torch.mm(logits, unembedding, out=dhidden[first : first + rows])
            if dunembedding is not None:
                dunembedding.addmm_(logits.T, hidden_chunk)
        ctx.save_for_backward(dhidden)
        ctx.dunembedding = dunembedding  # not a row's, so not what a micro-batch is measured by
        return losses.double().sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dloss,) = grad_outputs
        saved_gradients = (*ctx.saved_tensors, ctx.dunembedding)
        return *(None if gradient is None else gradient.mul_(dloss) for gradient in saved_gradients), None


def logsumexp(logits: Tensor) -> Tensor:
    """log Σ exp of each row of logits [N, V], without gradients; where nothing is compiled, by PyTorch."""
    kernels = load_kernels()[0] if logits.device.type == "cpu" and logits.dtype == torch.float32 else None
    if kernels is None:
        return torch.logsumexp(logits, dim=1)
    logits, sums = logits.contiguous(), logits.new_empty(len(logits))
    kernels.nextword_log_sums(native_build.num_threads(), *logits.shape, _data_ptr(logits), _data_ptr(sums))
    return sums


# ---------------------------------------------------------------- the model


class FusedGPT:
    """A GPT as an objective sees it, its forward pass made of the parts above."""

    def __init__(self, model: GPT):
        self.model = model
        self.config = model.config

    def __call__(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        dropout_masks: Tensor | None = None,
        attention_gaps: Tensor | None = None,
        output_indices: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D], as `GPT.forward` gives them; `holes` as in `Places`. With `only`, places [P] among all B · T
        tokens, those of these alone [P, D]: the last block needs no more of the others than their keys and values."""
        model, config, (rows, length) = self.model, self.config, tokens.shape
        if positions is None and length > config.context_length:
            raise ValueError(f"{length} tokens are more than the context length of {config.context_length}")
        x = model.token_embedding(tokens)
        position_ids = torch.arange(length) if positions is None else positions  # [T] or [B, T]
        if config.positions == "learned":
            x = x + model.position_embedding(position_ids)
        elif config.positions == "sinusoidal":
            x = x + model.get_buffer("position_table")[position_ids]
        layout = self.row_layout(position_ids, segments)._replace(attention_gaps=attention_gaps)
        flat_masks = None if dropout_masks is None else dropout_masks.flatten(1, 2)  # [1 + 2·n_layers, N, D]
        x = apply_dropout(x.flatten(0, 1), None if flat_masks is None else flat_masks[0], config.dropout)  # [N, D]
        branch_output: Tensor | None = None
        for layer, block in enumerate(model.blocks):
            masks = (None, None) if flat_masks is None else (flat_masks[1 + 2 * layer], flat_masks[2 + 2 * layer])
            layer_output_indices = output_indices if layer == len(model.blocks) - 1 else None
            if config.norm_position == "post":
                attended = apply_dropout(
                    self.attention(block, x, layout, length, layer_output_indices), masks[0], config.dropout
                )
                x = self.add_norm(_select_rows(x, layer_output_indices), attended, block.attention_norm)[1]
                x = self.add_norm(
                    x, apply_dropout(self.feed_forward(block, x), masks[1], config.dropout), block.feed_forward_norm
                )[1]
            else:
                x, normed = self.add_norm(x, branch_output, block.attention_norm)
                attended = apply_dropout(
                    self.attention(block, normed, layout, length, layer_output_indices), masks[0], config.dropout
                )
                x, normed = self.add_norm(_select_rows(x, layer_output_indices), attended, block.feed_forward_norm)
                branch_output = apply_dropout(self.feed_forward(block, normed), masks[1], config.dropout)
        if config.norm_position == "pre":
            x = self.add_norm(x, branch_output, model.final_norm)[1]
        return x.view(rows, length, -1) if output_indices is None else x

    def add_norm(self, x: Tensor, branch_output: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        assert isinstance(norm, Norm)
        return FusedAddNorm.apply(x, branch_output, norm.weight, norm.bias, norm.eps)  # pyright: ignore[reportReturnType]

    def row_layout(self, positions: Tensor, segments: Tensor | None) -> RowLayout:
        starts = None
        if segments is not None:  # where a segment begins, carried on to its end
            at = torch.arange(segments.shape[1]).expand_as(segments)
            begins = torch.ones_like(segments, dtype=torch.bool)
            begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
            starts = torch.where(begins, at, 0).cummax(1).values.contiguous()
        if self.config.positions != "rope":
            return RowLayout(segment_starts=starts)
        cosines, sines = compute_rotary_cos_sin(positions.flatten(), self.config.head_dim, self.config.rope_theta)
        return RowLayout(cosines.contiguous(), sines.contiguous(), starts)

    def attention(
        self, block: Block, x: Tensor, layout: RowLayout, length: int, output_indices: Tensor | None
    ) -> Tensor:
        a = block.attention
        qkv = fused_linear(x, (a.query, a.key, a.value))
        norms = (a.query_norm, a.key_norm)
        query, key = (norm.weight if isinstance(norm, Norm) else None for norm in norms)
        return a.output(
            _select_rows(FusedAttention.apply(qkv, query, key, layout, self.config, length), output_indices)
        )

    def feed_forward(self, block: Block, x: Tensor) -> Tensor:
        f = block.feed_forward
        hidden = fused_linear(x, (f.gate, f.up)) if f.activation == "swiglu" else f.up(x)
        return f.down(FusedActivation.apply(hidden, f.activation))

    # What objectives ask beside the hidden states.

    def nll_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return FusedLinearCrossEntropy.apply(hidden, self.unembedding, targets.contiguous())  # pyright: ignore[reportReturnType]

    @property
    def unembedding(self) -> Tensor:
        return self.model.unembedding

    def classify(self, hidden: Tensor) -> Tensor:
        return self.model.classify(hidden)


def _select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def fused_linear(x: Tensor, layers: tuple[Any, ...]) -> Tensor:
    """The outputs of several linear layers of the same input, in one product; an adapted layer (LoRA) has its own."""
    if any(type(layer) is not torch.nn.Linear for layer in layers):
        return torch.cat([layer(x) for layer in layers], dim=1)
    biases = [layer.bias for layer in layers]
    bias = None if any(one is None for one in biases) else torch.cat(biases)
    return F.linear(x, torch.cat([layer.weight for layer in layers]), bias)
