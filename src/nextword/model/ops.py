"""Operators of the model in compiled C++ for training and evaluation on a CPU.

Each operator is an autograd function with its own backward pass: attention with the normalization and rotation of its heads,
residual addition with normalization, the feed-forward activation, and the linear layer with cross-entropy. `model/gpt.py`
calls them where `is_available` holds and the caller asks for `kernels=True`; everywhere else it calls PyTorch's operators.
`tests/test_ops.py` holds both paths equal, outputs and gradients. PyTorch passes over memory some forty times a block, forward
and backward; these operators four times.

Shapes: B batch, T time, D model width, H query heads, G key-value heads, K width of a head, F feed-forward width, V
vocabulary; N = B · T rows.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nextword.common import native_build
from nextword.model.config import ModelConfig

SOURCE = Path(__file__).with_suffix(".cpp")
ACTIVATION_CODES = {"swiglu": 0, "relu": 1, "gelu": 2}
LOGITS_PER_CHUNK = 2**22  # 16 MB of logits at once, about the size of a last-level cache


def supports(config: ModelConfig, weight: Tensor, device: torch.device | None = None) -> bool:
    """Whether the kernels' layout holds the model: unsharded float32 on a CPU, with widths that are multiples of 8.

    Args:
        config: The model's configuration.
        weight: Any weight of the model.
        device: The device the model will be moved to. Default: the device of `weight`.
    """
    widths = (config.d_model, config.head_dim, config.d_ff)
    on_cpu = (device or weight.device).type == "cpu" and not hasattr(weight, "placements")
    return on_cpu and weight.dtype == torch.float32 and all(width % 8 == 0 for width in widths)


def is_available(config: ModelConfig, weight: Tensor, device: torch.device | None = None) -> bool:
    """Whether `supports` holds and the kernels are compiled on this machine. Arguments as in `supports`."""
    return supports(config, weight, device) and native_build.load_native_library(SOURCE)[0] is not None


def _apply(function: type[Any], *inputs: Any) -> Any:
    """`Function.apply`, for which PyTorch declares no type."""
    return function.apply(*inputs)


# ---------------------------------------------------------------- attention


def attention(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    config: ModelConfig,
    rotary_cos_sin: tuple[Tensor, Tensor] | None = None,
    segment_starts: Tensor | None = None,
    attention_gaps: Tensor | None = None,
) -> Tensor:
    """Causal self-attention of normalized and rotated heads, `softmax(Q Kᵀ / √K) V`.

    Vaswani et al. 2017, equation 1; grouped queries: Ainslie et al. 2023; computed in blocks of queries that stay in the
    cache: Dao et al. 2022.

    Args:
        qkv: Queries, keys and values side by side, [B, T, (H + 2G)·K].
        query_norm: RMSNorm weight of the queries [K], or None without normalization.
        key_norm: RMSNorm weight of the keys [K], or None.
        config: The model's configuration, for the number of heads and the norm's epsilon.
        rotary_cos_sin: Cosines and sines, each [..., T, K/2] with one row for each position or each token; or None.
        segment_starts: The first position each token attends to, [B, T]. Default: 0.
        attention_gaps: The positions first to last - 1 that each token does not attend to, [B, T, 2]. Without gradient.

    Returns:
        The heads side by side, [B, T, H·K].
    """
    others = (query_norm, key_norm, config, rotary_cos_sin, segment_starts, attention_gaps)
    return _apply(_Attention, qkv, *others)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *others: Any) -> Tensor:
        query_norm, key_norm, config, rotary_cos_sin, segment_starts, attention_gaps = others
        qkv = qkv.contiguous()
        batch, length, _ = qkv.shape
        cos, sin = (None, None) if rotary_cos_sin is None else (t.flatten(0, -2).contiguous() for t in rotary_cos_sin)
        arguments = (
            *(batch, length, config.n_heads, config.n_kv_heads, config.head_dim, length if cos is None else len(cos)),
            *(query_norm, key_norm, cos, sin, segment_starts, attention_gaps, config.norm_eps),
        )
        out = qkv.new_empty(batch, length, config.n_heads * config.head_dim)
        logsumexp = qkv.new_empty(batch, config.n_heads, length)
        native_build.call_native(SOURCE, "attention_forward", *arguments, qkv, out, logsumexp)
        ctx.save_for_backward(qkv, out, logsumexp, query_norm, key_norm)
        ctx.arguments, ctx.has_gaps = arguments, attention_gaps is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own form
        if ctx.has_gaps:
            raise NotImplementedError("attention with gaps has no backward pass")
        qkv, out, logsumexp, query_norm, key_norm = ctx.saved_tensors
        dout, dqkv = grad_outputs[0].contiguous(), torch.empty_like(qkv)
        dquery_norm, dkey_norm = (None if w is None else torch.empty_like(w) for w in (query_norm, key_norm))
        tensors = (qkv, out, logsumexp, dout, dqkv, dquery_norm, dkey_norm)
        native_build.call_native(SOURCE, "attention_backward", *ctx.arguments, *tensors)
        return dqkv, dquery_norm, dkey_norm, None, None, None, None


# ---------------------------------------------------------------- residual addition and normalization


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual sum `x + branch` and its normalization, in one pass over memory.

    Args:
        x: The residual stream, [..., D].
        branch: What is added to it, [..., D], or None.
        weight: Weight of the norm, [D].
        bias: Bias of a LayerNorm (Ba et al. 2016), [D]; None for RMSNorm (Zhang and Sennrich 2019).
        eps: Epsilon of the norm.

    Returns:
        The sum and its normalization, each [..., D].
    """
    return _apply(_AddNorm, x, branch, weight, bias, eps)


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        branch = None if branch is None else branch.contiguous()
        total, y = x if branch is None else torch.empty_like(x), torch.empty_like(x)
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        native_build.call_native(SOURCE, "add_norm_forward", rows, width, eps, x, branch, weight, bias, total, y)
        ctx.save_for_backward(total, weight, bias)
        ctx.eps, ctx.has_branch = eps, branch is not None
        ctx.set_materialize_grads(False)
        return (x.view_as(x) if branch is None else total), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own form
        dtotal, dy = grad_outputs
        total, weight, bias = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal if ctx.has_branch else None, None, None, None
        dx, dweight = torch.empty_like(total), torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        dtotal, dy = None if dtotal is None else dtotal.contiguous(), dy.contiguous()
        rows, width = total.numel() // total.shape[-1], total.shape[-1]
        tensors = (total, weight, bias, dy, dtotal, dx, dweight, dbias)
        native_build.call_native(SOURCE, "add_norm_backward", rows, width, ctx.eps, *tensors)
        return dx, dx if ctx.has_branch else None, dweight, dbias, None


# ---------------------------------------------------------------- feed-forward


def activation(x: Tensor, name: str) -> Tensor:
    """ReLU, GELU in its tanh form (Hendrycks and Gimpel 2016), or SwiGLU (Shazeer 2020, equation 6).

    Args:
        x: [..., F]; for SwiGLU the gate and the up projection side by side, [..., 2F].
        name: "relu", "gelu" or "swiglu".

    Returns:
        [..., F].
    """
    return _apply(_Activation, x, name)


class _Activation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // (2 if name == "swiglu" else 1)
        y = x.new_empty(*x.shape[:-1], width)
        ctx.save_for_backward(x)
        ctx.shape = (ACTIVATION_CODES[name], y.numel() // width, width)
        native_build.call_native(SOURCE, "activation_forward", *ctx.shape, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own form
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        native_build.call_native(SOURCE, "activation_backward", *ctx.shape, x, grad_outputs[0].contiguous(), dx)
        return dx, None


def fused_linear(x: Tensor, layers: tuple[nn.Module, ...]) -> Tensor:
    """The outputs of several linear layers of one input, side by side.

    Plain layers are computed in one matrix product. Layers of another class, as LoRA's, are computed by themselves.

    Args:
        x: [..., in].
        layers: Linear layers with `in` inputs each.

    Returns:
        [..., the sum of their outputs].
    """
    if len(layers) == 1:
        return layers[0](x)
    linear = [layer for layer in layers if type(layer) is nn.Linear]
    if len(linear) < len(layers):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    has_bias = cast("Tensor | None", linear[0].bias) is not None
    bias = torch.cat([layer.bias for layer in linear]) if has_bias else None
    return F.linear(x, torch.cat([layer.weight for layer in linear]), bias)


# ---------------------------------------------------------------- cross-entropy


def linear_cross_entropy(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Σ −log softmax(hidden · unembeddingᵀ)[target] in nats.

    The logits are made in chunks that are turned into gradients at once, so that they are neither held whole nor made twice.

    Args:
        hidden: [N, D].
        unembedding: [V, D].
        targets: [N] int64; rows with a negative target are ignored.

    Returns:
        The sum, a scalar.
    """
    return _apply(_LinearCrossEntropy, hidden, unembedding, targets)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        hidden, targets = hidden.contiguous(), targets.contiguous()
        needs_dhidden, needs_dunembedding, _ = ctx.needs_input_grad
        losses = hidden.new_empty(len(hidden))
        dhidden = torch.empty_like(hidden) if needs_dhidden else None
        dunembedding = torch.zeros_like(unembedding) if needs_dunembedding else None
        rows = max(1, LOGITS_PER_CHUNK // len(unembedding))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = F.linear(hidden[chunk], unembedding)
            tensors = (targets[chunk], logits, losses[chunk])
            native_build.call_native(SOURCE, "cross_entropy_with_grad", *logits.shape, *tensors)
            if dhidden is not None:
                torch.mm(logits, unembedding, out=dhidden[chunk])
            if dunembedding is not None:
                dunembedding.addmm_(logits.T, hidden[chunk])
        ctx.save_for_backward(dhidden)
        ctx.dunembedding = dunembedding  # not saved: its size does not depend on the rows, by which memory is estimated
        return losses.double().sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own form
        (dloss,) = grad_outputs
        gradients = (*ctx.saved_tensors, ctx.dunembedding)
        return *(None if gradient is None else gradient.mul_(dloss) for gradient in gradients), None


def logsumexp(logits: Tensor) -> Tensor:
    """log Σ exp of each row of logits [N, V]; [N], without gradient. Falls back to PyTorch without compiled kernels."""
    if (
        logits.device.type != "cpu"
        or logits.dtype != torch.float32
        or native_build.load_native_library(SOURCE)[0] is None
    ):
        return torch.logsumexp(logits, dim=1)
    logits, sums = logits.contiguous(), logits.new_empty(len(logits))
    native_build.call_native(SOURCE, "logsumexp", *logits.shape, logits, sums)
    return sums
