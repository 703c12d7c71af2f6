"""The whole GPT, from token ids to logits. Read it from top to bottom.

Shapes: B batch, T time (positions of the window), D model width, H query heads, G key-value heads, K width of a head, F
feed-forward width, V vocabulary, S keys that can be attended to (T, or the length of the cache).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]  # untyped in torch

from nextword.model import ops
from nextword.model.config import ModelConfig


class Cache(Protocol):
    """A KV cache: keys and values of processed positions, so that generation computes only new ones."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store a layer's new keys and values and return all of them.

        Args:
            layer: Index of the block.
            keys: [B, G, T, K].
            values: [B, G, T, K].

        Returns:
            Keys and values [B, G, S, K], and a boolean mask [B, 1, T, S] that is true where a query may attend.
        """
        ...


class ForwardContext(NamedTuple):
    """What the blocks of one forward pass share.

    Attributes:
        rotary_cos_sin: Cosines and sines of the positions, each [B or 1, 1, T, K/2]; None without RoPE.
        mask: Boolean attention mask [B, 1, T, T] of PyTorch's operators; None for a causal one.
        segment_starts: The first position each token attends to, [B, T], for the kernels; None: 0.
        attention_gaps: See `GPT.forward`, for the kernels.
        cache: KV cache.
        kernels: Whether blocks call the compiled operators of `ops`.
    """

    rotary_cos_sin: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    segment_starts: Tensor | None = None
    attention_gaps: Tensor | None = None
    cache: Cache | None = None
    kernels: bool = False


# ---------------------------------------------------------------- positions


def sinusoidal_table(context_length: int, d_model: int) -> Tensor:
    """Sinusoidal position encoding: PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(pos / 10000^(2i/D)).

    Vaswani et al. 2017, section 3.5. Computed in float64, because the angles of late positions have many digits.

    Returns:
        [context_length, D] in float32.
    """
    position = torch.arange(context_length, dtype=torch.float64)[:, None]
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


def compute_rotary_cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of pos / theta^(2i/K). Su et al. 2021, equation 15.

    Args:
        positions: [..., T].
        head_dim: K.
        theta: Base of the frequencies.

    Returns:
        Cosines and sines, each [..., T, K/2] in float32.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def apply_rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + K/2}) by the angle of its position. Su et al. 2021, equation 34.

    Args:
        x: Queries or keys, [B, H, T, K].
        cos: [B or 1, 1, T, K/2].
        sin: [B or 1, 1, T, K/2].

    Returns:
        [B, H, T, K] in the precision of x.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------- layers


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V, masked so that no position attends to a later one.

    Vaswani et al. 2017, equation 1. PyTorch computes it in blocks and never holds the T × S matrix (Dao et al. 2022).

    Args:
        query: [B, H, T, K].
        key: [B, G, S, K]; each key-value head is shared by H / G query heads (Ainslie et al. 2023).
        value: [B, G, S, K].
        mask: Boolean [B, 1, T, S], true where a query may attend. Default: causal, with S = T.

    Returns:
        [B, H, T, K].
    """
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
    )


class Norm(nn.Module):
    """Layer normalization (Ba et al. 2016), or RMSNorm, without mean and bias (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, kind: str, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of x, [..., D]."""
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def add_norm(x: Tensor, branch: Tensor | None, norm: Norm, kernels: bool) -> tuple[Tensor, Tensor]:
    """The residual sum x + branch and its normalization, both [..., D]."""
    if kernels:
        return ops.add_norm(x, branch, norm.weight, norm.bias, norm.eps)
    total = x if branch is None else x + branch
    return total, norm(total)


class Attention(nn.Module):
    """Multi-head attention. Vaswani et al. 2017, section 3.2.2.

    MultiHead(x) = Concat(head_1 … head_H) W_O, head_i = Attention(x W_Qi, x W_Ki, x W_Vi).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        query_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.query = nn.Linear(config.d_model, query_width, bias=config.attention_bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.output = nn.Linear(query_width, config.d_model, bias=config.attention_bias)
        head_norm = partial(Norm, config.head_dim, config.norm, config.norm_eps) if config.qk_norm else nn.Identity
        self.query_norm, self.key_norm = head_norm(), head_norm()

    def forward(self, x: Tensor, context: ForwardContext, output_indices: Tensor | None = None) -> Tensor:
        """Attention of x [B, T, D] to itself and to cached positions.

        Args:
            x: Normalized residual stream, or the residual stream itself with post-norm.
            context: What the blocks of a forward pass share.
            output_indices: See `Block.forward`.

        Returns:
            [B, T, D]; [P, D] with `output_indices`.
        """
        heads = self.attend_with_kernels(x, context) if context.kernels else self.attend(x, context)  # [B, T, H·K]
        return self.output(select_tokens(heads, output_indices))  # [B, T, D]

    def attend(self, x: Tensor, context: ForwardContext) -> Tensor:
        """The attention heads side by side, [B, T, H·K], by PyTorch's operators."""
        query = self.query_norm(self.split_heads(self.query(x)))  # [B, H, T, K]
        key = self.key_norm(self.split_heads(self.key(x)))  # [B, G, T, K]
        value = self.split_heads(self.value(x))  # [B, G, T, K]
        if context.rotary_cos_sin is not None:
            query = apply_rotary_embedding(query, *context.rotary_cos_sin)
            key = apply_rotary_embedding(key, *context.rotary_cos_sin)
        mask = context.mask
        if context.cache is not None:
            key, value, mask = context.cache.update(self.layer, key, value)  # [B, G, S, K]
        heads = attention(query, key, value, mask)  # [B, H, T, K]
        return heads.transpose(1, 2).flatten(2)  # [B, T, H·K]

    def attend_with_kernels(self, x: Tensor, context: ForwardContext) -> Tensor:
        """As `attend`, by the compiled operators."""
        qkv = ops.fused_linear(x, (self.query, self.key, self.value))  # [B, T, (H + 2G)·K]
        query_norm, key_norm = (n.weight if isinstance(n, Norm) else None for n in (self.query_norm, self.key_norm))
        rotary, starts, gaps = context.rotary_cos_sin, context.segment_starts, context.attention_gaps
        return ops.attention(qkv, query_norm, key_norm, self.config, rotary, starts, gaps)  # [B, T, H·K]

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, H·K] → [B, H, T, K]."""
        return torch.unflatten(x, -1, (-1, self.config.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, or with GELU instead of the maximum, or SwiGLU.

    Vaswani et al. 2017, section 3.3. SwiGLU(x) = (silu(x W_gate) ⊙ x W_up) W_down (Shazeer 2020, equation 6).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.feed_forward_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.feed_forward_bias)
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.feed_forward_bias)

    def forward(self, x: Tensor, kernels: bool = False) -> Tensor:
        """[..., D] → [..., D]; `kernels` as in `GPT.forward`."""
        if kernels:
            projections = (self.gate, self.up) if self.activation == "swiglu" else (self.up,)
            return self.down(ops.activation(ops.fused_linear(x, projections), self.activation))
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))  # [B, T, D] → [B, T, F] → [B, T, D]
        if self.activation == "relu":
            return self.down(F.relu(self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then feed-forward, each a residual branch.

    Pre-norm (GPT-2 and later): x + f(norm(x)). Post-norm (Vaswani et al. 2017, section 3.1; GPT-1): norm(x + f(x)).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.dropout = config.dropout
        self.activation_checkpointing = False  # see GPT.set_activation_checkpointing
        self.attention_norm = Norm(config.d_model, config.norm, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = Norm(config.d_model, config.norm, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        context: ForwardContext,
        dropout_masks: Tensor | None = None,
        output_indices: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after this block.

        Args:
            x: Residual stream, [B, T, D].
            context: What the blocks of a forward pass share.
            dropout_masks: [2, B, T, D] of the two branches, or None.
            output_indices: Tokens whose output is computed, [P] indices into the B · T tokens. Default: all.

        Returns:
            [B, T, D]; [P, D] with `output_indices`.
        """
        arguments = (x, context, dropout_masks, output_indices)
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Inside `forward`, so that FSDP gathers the weights around it. A block draws no random numbers.
            return cast(Tensor, checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False))
        return self._forward(*arguments)

    def _forward(
        self, x: Tensor, context: ForwardContext, dropout_masks: Tensor | None, output_indices: Tensor | None
    ) -> Tensor:
        attention_mask, feed_forward_mask = (None, None) if dropout_masks is None else dropout_masks.unbind()
        kernels = context.kernels
        if self.post_norm:
            branch = apply_dropout(self.attention(x, context, output_indices), attention_mask, self.dropout)
            _, x = add_norm(select_tokens(x, output_indices), branch, self.attention_norm, kernels)
            branch = apply_dropout(self.feed_forward(x, kernels=kernels), feed_forward_mask, self.dropout)
            return add_norm(x, branch, self.feed_forward_norm, kernels)[1]
        x, normed = add_norm(x, None, self.attention_norm, kernels)
        branch = apply_dropout(self.attention(normed, context, output_indices), attention_mask, self.dropout)
        x, normed = add_norm(select_tokens(x, output_indices), branch, self.feed_forward_norm, kernels)
        return x + apply_dropout(self.feed_forward(normed, kernels=kernels), feed_forward_mask, self.dropout)


def select_tokens(x: Tensor, indices: Tensor | None) -> Tensor:
    """Some of the tokens of [B, T, ...], by [P] indices into B · T: [P, ...]; all without indices."""
    return x if indices is None else x.flatten(0, 1)[indices]


def apply_dropout(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """Residual dropout (Vaswani et al. 2017, section 5.4) with a mask [B, T, D] that was drawn before the step."""
    return x if mask is None else x * mask / (1 - probability)


# ---------------------------------------------------------------- the model


class SkipInit(TorchFunctionMode):
    """Turns the functions of `torch.nn.init` into no-ops, so that modules are built without drawing their weights.

    `GPT.init_weights` draws them, once. On the meta device PyTorch would also import its compiler to draw nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class GPT(nn.Module):
    """A decoder-only Transformer: P(x_t | x_<t; θ) for every t of a window at once.

    Args:
        config: Sizes and choices. The weights are initialized as in the source of the preset; seed PyTorch first.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        with SkipInit():
            self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
            if config.positions == "learned":
                self.position_embedding = nn.Embedding(config.context_length, config.d_model)
            elif config.positions == "sinusoidal":  # a buffer that is not saved: it follows from the configuration
                table = sinusoidal_table(config.context_length, config.d_model)
                self.register_buffer("position_table", table, persistent=False)
            blocks: Any = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.blocks: Sequence[Block] = blocks
            pre_norm = config.norm_position == "pre"
            self.final_norm = Norm(config.d_model, config.norm, config.norm_eps) if pre_norm else nn.Identity()
            self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
            self.score = nn.Linear(config.d_model, config.n_labels, bias=False) if config.n_labels else None
        if not self.token_embedding.weight.is_meta:
            self.init_weights()

    @classmethod
    def on_meta(cls, config: ModelConfig) -> "GPT":
        """A model on the meta device: shapes without memory. Give it memory with `to_empty`, then call `init_buffers`."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: dict[str, Tensor]) -> "GPT":
        """A model with these weights.

        Args:
            config: Its configuration.
            weights: Its `state_dict`. The tensors become the model's own; they are not copied.
        """
        model = cls.on_meta(config)
        model.load_state_dict(weights, assign=True)
        model.init_buffers()
        return model

    def init_buffers(self) -> None:
        """Compute the buffers that are not saved, on the device and in the precision of the weights."""
        if self.config.positions == "sinusoidal":
            table = sinusoidal_table(self.config.context_length, self.config.d_model)
            self.position_table = table.to(self.token_embedding.weight.device, self.token_embedding.weight.dtype)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only each block's input for the backward pass, which computes the rest again (Chen et al. 2016)."""
        for block in self.blocks:
            block.activation_checkpointing = enabled

    def supports_kernels(self, device: torch.device | None = None) -> bool:
        """Whether `forward(kernels=True)` can run here; see `ops.is_available`.

        Args:
            device: The device the model will be moved to. Default: the device it is on.
        """
        return ops.is_available(self.config, self.token_embedding.weight, device)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        attention_gaps: Tensor | None = None,
        cache: Cache | None = None,
        dropout_masks: Tensor | None = None,
        output_indices: Tensor | None = None,
        kernels: bool = False,
    ) -> Tensor:
        """Hidden states of token ids; `unembed` turns them into logits.

        Args:
            tokens: [B, T] token ids.
            positions: [B, T] or [T], the position of each token in its window. Default: 0, 1, 2 …
            segments: [B, T], the document of each token. Tokens do not attend to other documents. Not with a cache.
            attention_gaps: [B, T, 2], first and end of the positions of the row that a token does not attend to, beside
                later ones and other documents. For inference; needs `segments`.
            cache: KV cache; `positions` are then those of the new tokens.
            dropout_masks: [1 + 2·n_layers, B, T, D] from `sample_dropout_masks`, in training with dropout.
            output_indices: [P] indices into the B · T tokens whose hidden states are wanted. Default: all.
            kernels: Call the compiled operators of `ops`; requires `supports_kernels()`, and no cache.

        Returns:
            Hidden states [B, T, D]; [P, D] with `output_indices`.

        Raises:
            ValueError: The window is longer than the context length and no positions are given, or segments or kernels
                are combined with a cache.
        """
        config, length = self.config, tokens.shape[1]
        if positions is None and length > config.context_length:
            raise ValueError(f"{length} tokens are more than the context length of {config.context_length}")
        if cache is not None and (segments is not None or kernels):
            raise ValueError("segments and kernels cannot be combined with a KV cache")
        if positions is None:
            positions = torch.arange(length, device=tokens.device)
        x = self.token_embedding(tokens)  # [B, T, D]
        rotary_cos_sin = None
        if config.positions == "rope":
            cos, sin = compute_rotary_cos_sin(positions, config.head_dim, config.rope_theta)  # [(B,) T, K/2]
            rotary_cos_sin = (cos.unsqueeze(-3), sin.unsqueeze(-3))  # the same for all heads: [(B,) 1, T, K/2]
        elif config.positions == "learned":
            x = x + self.position_embedding(positions)
        else:
            x = x + self.get_buffer("position_table")[positions]
        x = apply_dropout(x, None if dropout_masks is None else dropout_masks[0], config.dropout)
        mask = starts = None
        if segments is not None and kernels:
            starts = segment_starts(segments)  # [B, T]
        elif segments is not None:
            mask = document_mask(segments, attention_gaps)  # [B, 1, T, T]
        context = ForwardContext(rotary_cos_sin, mask, starts, attention_gaps, cache, kernels)
        for layer, block in enumerate(self.blocks):
            masks = None if dropout_masks is None else dropout_masks[1 + 2 * layer : 3 + 2 * layer]
            x = block(x, context, masks, output_indices if layer == config.n_layers - 1 else None)
        if kernels and isinstance(self.final_norm, Norm):
            return add_norm(x, None, self.final_norm, kernels)[1]
        return self.final_norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return F.linear(hidden, self.unembedding)

    @property
    def unembedding(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits; with tied embeddings, the token embedding itself."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def classify(self, hidden: Tensor) -> Tensor:
        """Logits of the classification head, W_y h (Radford et al. 2018, equation 3).

        Args:
            hidden: Hidden states of the last token of each sequence, [N, D].

        Returns:
            [N, n_labels].

        Raises:
            ValueError: The model has no classification head.
        """
        if self.score is None:
            raise ValueError("the model has no classification head (n_labels is 0): see with_classification_head")
        return self.score(hidden)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights; see `initializers`."""
        for name, initialize in self.initializers():
            initialize(self.get_parameter(name))

    @torch.no_grad()
    def iter_init_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that `init_weights` would draw, one after the other, for a model whose weights are sharded."""
        for name, initialize in self.initializers():
            yield name, initialize(torch.empty(self.get_parameter(name).shape))

    def initializers(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """Each parameter's name and the function that initializes it, in order, as in the source of the preset.

        GPT-1 (section 4.1) and all transformers classes: N(0, 0.02). GPT-2 (section 2.3): the output projections of the
        residual branches are scaled by 1/√N, where N is the number of branches; `modern` keeps that. `tutorial`: Glorot's
        uniform distribution, and token embeddings as large as the position table, whose mean square is 1/2. Classification
        heads are N(0, 0.02), biases 0 and the weights of norms 1.
        """
        config = self.config
        glorot = config.positions == "sinusoidal"
        for module_name, module in named_modules(self).items():
            initialize: Callable[[Tensor], Tensor] = nn.init.ones_
            if isinstance(module, nn.Linear):
                is_residual = module_name.endswith(("attention.output", "feed_forward.down"))
                scaled = is_residual and config.norm_position == "pre"
                initialize = partial(nn.init.normal_, std=0.02 / math.sqrt(2 * config.n_layers) if scaled else 0.02)
                if glorot and module is not self.head and module is not self.score:
                    initialize = nn.init.xavier_uniform_
            elif isinstance(module, nn.Embedding):
                initialize = partial(nn.init.normal_, std=math.sqrt(0.5) if glorot and not config.tied else 0.02)
            for name, _ in module.named_parameters(prefix=module_name, recurse=False):
                yield name, nn.init.zeros_ if name.endswith("bias") else initialize


def named_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules of a module by their paths."""
    return dict(module.named_modules())  # pyright: ignore[reportUnknownArgumentType]  # untyped in torch


# ---------------------------------------------------------------- a model made from another


def with_resized_vocabulary(model: GPT, vocab_size: int, seed: int) -> GPT:
    """A copy of the model with a larger vocabulary: rows appended to the token embedding and to an untied head.

    Each new row is the mean of the old ones plus N(0, 0.02) noise. Everything else is equal, precision and device included.

    Args:
        model: The model; it stays as it is.
        vocab_size: The new number of tokens.
        seed: Seed of the noise.

    Raises:
        ValueError: The new vocabulary is smaller than the old one.
    """
    num_new = vocab_size - model.config.vocab_size
    if num_new < 0:
        raise ValueError(f"a vocabulary cannot shrink from {model.config.vocab_size} to {vocab_size} tokens")
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that the noise is the same on every device
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in ("token_embedding.weight", "head.weight"):
        if name in weights and num_new:
            old_weight = weights[name]
            noise = 0.02 * torch.randn(num_new, old_weight.shape[1], generator=generator)
            rows = old_weight.float().mean(0) + noise.to(old_weight.device)  # [num_new, D]
            weights[name] = torch.cat((old_weight, rows.to(old_weight.dtype)))
    return GPT.from_weights(replace(model.config, vocab_size=vocab_size), weights).train(model.training)


def with_context_length(model: GPT, context_length: int) -> GPT:
    """A copy of a model with rotary positions and another context length; the model itself if it has that length."""
    if model.config.context_length == context_length:
        return model
    return GPT.from_weights(replace(model.config, context_length=context_length), model.state_dict())


def with_classification_head(model: GPT, n_labels: int, seed: int) -> GPT:
    """A copy of the model with a new classification head, N(0, 0.02), in place of one it may have.

    Everything else is equal, precision and device included.

    Args:
        model: The model; it stays as it is.
        n_labels: Outputs of the head; 0 removes it.
        seed: Seed of the head's weights.
    """
    config = replace(model.config, n_labels=n_labels)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != "score.weight"}
    if n_labels:
        head = 0.02 * torch.randn(n_labels, config.d_model, generator=torch.Generator().manual_seed(seed))
        weights["score.weight"] = head.to(model.unembedding)
    return GPT.from_weights(config, weights).train(model.training)


# ---------------------------------------------------------------- masks


def document_mask(segments: Tensor, attention_gaps: Tensor | None = None) -> Tensor:
    """Causal attention mask of packed documents.

    Args:
        segments: The document of each token, [B, T].
        attention_gaps: First and end of the positions that each token does not attend to, [B, T, 2], or None.

    Returns:
        Boolean [B, 1, T, T], true where a query may attend: its own document, up to itself, outside its gap.
    """
    mask = (segments[:, :, None] == segments[:, None, :]).tril()
    if attention_gaps is not None:
        key = torch.arange(segments.shape[1], device=segments.device)
        mask &= (key < attention_gaps[:, :, :1]) | (key >= attention_gaps[:, :, 1:])
    return mask[:, None]


def segment_starts(segments: Tensor) -> Tensor:
    """The position at which the document of each token begins; [B, T] of segments [B, T] whose documents are contiguous."""
    positions = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(is_start, positions, 0).cummax(1).values.contiguous()


def sample_dropout_masks(
    config: ModelConfig, seeds: list[int], length: int, device: torch.device | str
) -> Tensor | None:
    """Dropout masks (true: keep) for a whole forward pass.

    Each row of the batch has its own seed, so that the masks do not depend on micro-batches or on the number of processes.

    Args:
        config: The model's configuration.
        seeds: One seed for each of the B rows.
        length: T.
        device: Device of the masks.

    Returns:
        Booleans [1 + 2·n_layers, B, T, D], or None without dropout.
    """
    if config.dropout == 0:
        return None
    rows = torch.empty(len(seeds), 1 + 2 * config.n_layers, length, config.d_model, dtype=torch.bool, device=device)
    for row, seed in zip(rows, seeds, strict=True):
        row.bernoulli_(1 - config.dropout, generator=torch.Generator(device).manual_seed(seed))
    return rows.transpose(0, 1)
