"""The whole GPT, from token ids to the next word's logits. Read it from top to bottom.

Shapes are written where they change: B batch, T time (positions in the window), D model width, H heads, G key-value heads,
K width of a head, F feed-forward width, V vocabulary, S positions that can be looked at (T, or the cache's length).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from nextword.model.config import ModelConfig


class Cache(Protocol):
    """Keeps keys and values of earlier positions, so that generation computes only the new ones."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take a layer's new keys and values [B, G, T, K]; give all of them [B, G, S, K] and who may look where.

        The mask is boolean, [B, 1, T, S], true where the query at T may look at S.
        """
        ...


# ---------------------------------------------------------------- positions


def sinusoidal_table(context_length: int, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(the same); [context_length, D].

    Vaswani et al. 2017, section 3.5. Computed in float64, since the angle of a far position has many digits.
    """
    position = torch.arange(context_length, dtype=torch.float64)[:, None]
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


def compute_rotary_cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of pos / theta^(2i/K), each [..., T, K/2], in float32. Su et al. 2021, equation 15."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def apply_rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + K/2}) by its position's angle. x [B, H, T, K]; cos, sin [B or 1, 1, T, K/2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------- the parts


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V, masked so that no position sees a later one.

    Vaswani et al. 2017, equation 1. query [B, H, T, K]; key and value [B, G, S, K], each shared by H / G query heads
    (Ainslie et al. 2023). Without a mask S = T and position t sees 0..t; a mask [B, 1, T, S] says it outright.
    PyTorch computes this equation in blocks, never holding the T × S matrix (Dao et al. 2022).
    """
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
    )


class Norm(nn.Module):
    """Layer normalisation (Ba et al. 2016), or without its mean and bias, RMSNorm (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, kind: str, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """MultiHead(x) = Concat(head_1 … head_H) W_O, head_i = Attention(x W_Qi, x W_Ki, x W_Vi). Section 3.2.2."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.query = nn.Linear(config.d_model, query_width, bias=config.attention_bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.output = nn.Linear(query_width, config.d_model, bias=config.attention_bias)
        if config.qk_norm:
            self.query_norm = Norm(config.head_dim, config.norm, config.norm_eps)
            self.key_norm = Norm(config.head_dim, config.norm, config.norm_eps)
        else:
            self.query_norm, self.key_norm = nn.Identity(), nn.Identity()

    def forward(
        self, x: Tensor, rotary_cos_sin: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        query = self.query_norm(self.split_heads(self.query(x)))  # [B, H, T, K]
        key = self.key_norm(self.split_heads(self.key(x)))  # [B, G, T, K]
        value = self.split_heads(self.value(x))  # [B, G, T, K]
        if rotary_cos_sin is not None:
            query, key = apply_rotary_embedding(query, *rotary_cos_sin), apply_rotary_embedding(key, *rotary_cos_sin)
        if cache is not None:
            key, value, mask = cache.update(self.layer, key, value)  # [B, G, S, K]
        heads = attention(query, key, value, mask)  # [B, H, T, K]
        return self.output(heads.transpose(1, 2).flatten(2))  # [B, T, D]

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, H·K] → [B, H, T, K]


class FeedForward(nn.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2 (section 3.3), or with GELU in place of the maximum, or SwiGLU.

    SwiGLU(x) = (silu(x W_gate) ⊙ x W_up) W_down (Shazeer 2020, equation 6).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.feed_forward_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.feed_forward_bias)
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.feed_forward_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))  # [B, T, D] → [B, T, F] → [B, T, D]
        if self.activation == "relu":
            return self.down(F.relu(self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then feed-forward, each added to what came in.

    Pre-norm (GPT-2 on): x + f(norm(x)). Post-norm (Vaswani et al. 2017, section 3.1; GPT-1): norm(x + f(x)).
    With `recompute` it keeps nothing but its input for the backward pass, which makes the rest again (Chen et al. 2016).
    """

    activation_checkpointing = False

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.dropout = config.dropout
        self.attention_norm = Norm(config.d_model, config.norm, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = Norm(config.d_model, config.norm, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rotary_cos_sin: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: Cache | None,
        dropout_masks: Tensor | None,
    ) -> Tensor:
        if (
            self.activation_checkpointing and torch.is_grad_enabled()
        ):  # in here, so that the weights may be gathered around it
            settings = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn in a block
            return partial(checkpoint, self._forward, **settings)(x, rotary_cos_sin, mask, cache, dropout_masks)
        return self._forward(x, rotary_cos_sin, mask, cache, dropout_masks)

    def _forward(
        self,
        x: Tensor,
        rotary_cos_sin: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: Cache | None,
        dropout_masks: Tensor | None,
    ) -> Tensor:
        attention_mask, feed_forward_mask = (None, None) if dropout_masks is None else dropout_masks.unbind()
        if self.post_norm:
            x = self.attention_norm(
                x + apply_dropout(self.attention(x, rotary_cos_sin, mask, cache), attention_mask, self.dropout)
            )
            return self.feed_forward_norm(x + apply_dropout(self.feed_forward(x), feed_forward_mask, self.dropout))
        attended = self.attention(self.attention_norm(x), rotary_cos_sin, mask, cache)
        x = x + apply_dropout(attended, attention_mask, self.dropout)
        return x + apply_dropout(self.feed_forward(self.feed_forward_norm(x)), feed_forward_mask, self.dropout)


def apply_dropout(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """Residual dropout (Vaswani et al. 2017, section 5.4) with a mask [B, T, D] that was drawn before the step."""
    return x if mask is None else x * mask / (1 - probability)


# ---------------------------------------------------------------- the model


class SkipInit(TorchFunctionMode):
    """Inside, modules get no first numbers: where there is no memory to hold them, drawing them would import a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class GPT(nn.Module):
    """A decoder-only Transformer: P(x_t | x_<t; θ) for every t of a window at once.

    A fresh one is initialised as its preset's source has it; draw it under a seed of your own.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        with SkipInit():
            self._build()
        if not self.token_embedding.weight.is_meta:
            self.init_weights()

    def _build(self) -> None:
        """Every part, without its first numbers."""
        config = self.config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        elif config.positions == "sinusoidal":
            # Not a parameter, and not in our own weight files: the formula is.
            table = sinusoidal_table(config.context_length, config.d_model)
            self.register_buffer("position_table", table, persistent=False)
        blocks: Any = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.blocks: Sequence[Block] = blocks
        pre_norm = config.norm_position == "pre"
        self.final_norm = Norm(config.d_model, config.norm, config.norm_eps) if pre_norm else nn.Identity()
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.score = nn.Linear(config.d_model, config.n_labels, bias=False) if config.n_labels else None

    @classmethod
    def on_meta(cls, config: ModelConfig) -> "GPT":
        """A model of this configuration without numbers and without the memory for them."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: dict[str, Tensor]) -> "GPT":
        """The model of this configuration whose `state_dict` is `weights`; the tensors are taken as they are, not copied."""
        model = cls.on_meta(config)
        model.load_state_dict(weights, assign=True)
        model.init_buffers()
        return model

    def init_buffers(self) -> None:
        """Compute what is no parameter, on the weights' device and in their precision."""
        if self.config.positions == "sinusoidal":
            table = sinusoidal_table(self.config.context_length, self.config.d_model)
            self.position_table = table.to(self.token_embedding.weight.device, self.token_embedding.weight.dtype)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        dropout_masks: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] of token ids [B, T]; `unembed` turns them into logits.

        Args:
            positions: [B, T] or [T], the place of each token in its window; 0, 1, 2 … where not given.
            segments: [B, T], the document that each token belongs to; none then sees another's tokens. Not with a cache.
            cache: keys and values of earlier positions; `positions` then says where the new ones stand.
            keep: [1 + 2·n_layers, B, T, D] from `dropout_masks`, in training with dropout.

        Raises:
            ValueError: the window is longer than the context length and it is not said where its tokens stand, or segments
                are given together with a cache.
        """
        length = tokens.shape[1]
        if positions is None and length > self.config.context_length:
            raise ValueError(f"{length} tokens are more than the context length of {self.config.context_length}")
        if segments is not None and cache is not None:
            raise ValueError("segments and a cache exclude each other: a cache holds one document a row")
        if positions is None:
            positions = torch.arange(length, device=tokens.device)
        mask = None if segments is None else document_mask(segments)  # [B, 1, T, T]
        x = self.token_embedding(tokens)  # [B, T, D]
        rotary_cos_sin = None
        if self.config.positions == "rope":
            cos, sin = compute_rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta)  # [(B,) T, K/2]
            rotary_cos_sin = (cos.unsqueeze(-3), sin.unsqueeze(-3))  # one for all heads: [(B,) 1, T, K/2]
        elif self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        else:
            x = x + self.get_buffer("position_table")[positions]
        x = apply_dropout(x, None if dropout_masks is None else dropout_masks[0], self.config.dropout)
        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                rotary_cos_sin,
                mask,
                cache,
                None if dropout_masks is None else dropout_masks[1 + 2 * layer : 3 + 2 * layer],
            )
        return self.final_norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]: one score for every token of the vocabulary."""
        return F.linear(hidden, self.unembedding)

    @property
    def unembedding(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits; with a tied head, the token embedding itself."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def classify(self, hidden: Tensor) -> Tensor:
        """Logits [N, n_labels] of the hidden states [N, D] at each sequence's last token: W_y h (Radford et al. 2018, eq. 3).

        Raises:
            ValueError: the model has no classification head.
        """
        if self.score is None:
            raise ValueError("this model has no classification head (n_labels is 0); with_head makes one that has")
        return self.score(hidden)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights, see `first_numbers`."""
        for name, draw in self.initializers():
            draw(self.get_parameter(name))

    @torch.no_grad()
    def iter_init_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What `initialise` would draw, one tensor after the other, for those who keep a part of each."""
        for name, draw in self.initializers():
            yield name, draw(torch.empty(self.get_parameter(name).shape))

    def initializers(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """Each parameter's name and how it is drawn, in order, as the preset's source has it.

        GPT-1 (section 4.1) and the stock classes of all families: N(0, 0.02). GPT-2 (section 2.3): what is added to the
        residual stream is scaled by 1/√N, N residual layers; `modern` keeps that. `tutorial`: Glorot's uniform, and words
        as large as the position table (its numbers have the mean square 1/2), so that neither drowns the other.
        A classification head is N(0, 0.02) in all of them. Biases begin at zero, and the weights of norms at one.
        """
        config = self.config
        glorot = config.positions == "sinusoidal"
        for module_name, module in self.named_modules():
            initializer: Callable[[Tensor], Tensor] = nn.init.ones_
            if isinstance(module, nn.Linear):
                residual = (
                    module_name.endswith(("attention.output", "feed_forward.down")) and config.norm_position == "pre"
                )
                initializer = partial(nn.init.normal_, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)
                if glorot and module is not self.head and module is not self.score:
                    initializer = nn.init.xavier_uniform_
            elif isinstance(module, nn.Embedding):
                initializer = partial(nn.init.normal_, std=math.sqrt(0.5) if glorot and not config.tied else 0.02)
            for name, _ in module.named_parameters(prefix=module_name, recurse=False):
                yield name, nn.init.zeros_ if name.endswith("bias") else initializer


# ---------------------------------------------------------------- a model made from another


def with_resized_vocabulary(model: GPT, vocab_size: int, seed: int) -> GPT:
    """A copy of the model that knows more tokens: rows added below the token embedding and below an untied head.

    Each new row is the mean of the old ones plus N(0, 0.02) noise drawn under `seed`, so that a token never seen starts as
    an average one. Everything else is equal; precision and device are kept.

    Raises:
        ValueError: the new vocabulary is smaller than the old one.
    """
    num_new = vocab_size - model.config.vocab_size
    if num_new < 0:
        raise ValueError(f"a vocabulary only grows: {vocab_size} tokens are fewer than {model.config.vocab_size}")
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device gets the same numbers
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in ("token_embedding.weight", "head.weight"):
        if name in weights and num_new:
            old_weight = weights[name]
            noise = 0.02 * torch.randn(num_new, old_weight.shape[1], generator=generator)
            rows = old_weight.float().mean(0) + noise.to(old_weight.device)  # [new, D]
            weights[name] = torch.cat((old_weight, rows.to(old_weight.dtype)))
    return GPT.from_weights(replace(model.config, vocab_size=vocab_size), weights).train(model.training)


def with_classification_head(model: GPT, n_labels: int, seed: int) -> GPT:
    """A copy of the model with a fresh classification head, N(0, 0.02) under `seed`; one that was there is left out.

    Everything else is equal; precision and device are kept. `n_labels` 0 takes the head away.
    """
    config = replace(model.config, n_labels=n_labels)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != "score.weight"}
    if n_labels:
        fresh = 0.02 * torch.randn(n_labels, config.d_model, generator=torch.Generator().manual_seed(seed))
        weights["score.weight"] = fresh.to(model.unembedding)
    return GPT.from_weights(config, weights).train(model.training)


# ---------------------------------------------------------------- masks


def document_mask(segments: Tensor) -> Tensor:
    """True where a query may look: at its own document, at itself and before. [B, T] → [B, 1, T, T]."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()[:, None]


def sample_dropout_masks(
    config: ModelConfig, seeds: list[int], length: int, device: torch.device | str
) -> Tensor | None:
    """Which numbers dropout keeps, [1 + 2·n_layers, B, T, D] booleans; None without dropout.

    Each row of the batch is drawn from its own seed, so that the masks do not depend on how a batch is cut into
    micro-batches or spread over machines.
    """
    if config.dropout == 0:
        return None
    rows = torch.empty(len(seeds), 1 + 2 * config.n_layers, length, config.d_model, dtype=torch.bool, device=device)
    for row, seed in zip(rows, seeds, strict=True):
        row.bernoulli_(1 - config.dropout, generator=torch.Generator(device).manual_seed(seed))
    return rows.transpose(0, 1)
