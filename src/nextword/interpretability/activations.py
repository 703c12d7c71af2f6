"""Activations of a model for one text: attention weights and the residual stream, captured by forward hooks.

Shapes: T tokens, L layers, H heads, G key-value heads, K head width, D model width, V vocabulary.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextword.model.gpt import GPT, apply_rotary_embedding

MAX_TOKENS = 128
MAX_ATTENTION_WEIGHTS = 4_000_000  # 8 MB in a page


@dataclass(frozen=True)
class Activations:
    """Activations of a text.

    Attributes:
        attention: softmax(Q Kᵀ / √d_k) [L, H, T, T]; row t holds the weights with which token t attends to each token.
        residual_streams: the residual stream before the first layer and after every layer [L + 1, T, D].
    """

    attention: Tensor
    residual_streams: Tensor


def max_explained_tokens(model: GPT) -> int:
    """The number of tokens that are explained: at most 128, the context length, and what fits into a page."""
    num_heads = model.config.n_layers * model.config.n_heads
    return max(1, min(MAX_TOKENS, model.config.context_length, math.isqrt(2 * MAX_ATTENTION_WEIGHTS // num_heads)))


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d_k) with a causal mask: [H, T, T] from a query [H, T, K] and a key [G, T, K].

    Vaswani et al. 2017, equation 1. The model itself never materializes these weights.
    """
    query, key = query.cpu().double(), key.cpu().double()
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)  # H / G query heads share a key head
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    causal_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(causal_mask, -math.inf).softmax(-1)


@torch.no_grad()
def capture(model: GPT, input_ids: Sequence[int]) -> Activations:
    """Run a model on a text [T] and capture its activations."""
    streams: list[Tensor] = []
    queries: list[Any] = []  # [1, H, T, K] of each layer
    keys: list[Any] = []  # [1, G, T, K] of each layer
    rotations: list[tuple[Tensor, Tensor] | None] = []
    handles = [model.blocks[-1].register_forward_hook(lambda module, inputs, output: streams.append(output[0]))]
    for block in model.blocks:
        attention = block.attention
        handles += [
            block.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0][0])),
            attention.register_forward_pre_hook(lambda module, inputs: rotations.append(inputs[1].rotary_cos_sin)),
            attention.query_norm.register_forward_hook(lambda module, inputs, output: queries.append(output)),
            attention.key_norm.register_forward_hook(lambda module, inputs, output: keys.append(output)),
        ]  # the norms are identities without QK-norm
    try:
        model(torch.tensor([list(input_ids)], device=model.unembedding.device))
    finally:
        for handle in handles:
            handle.remove()
    weights: list[Tensor] = []
    for query, key, rotation in zip(queries, keys, rotations, strict=True):
        if rotation is not None:
            query, key = (apply_rotary_embedding(x, *rotation) for x in (query, key))
        weights.append(attention_weights(query[0], key[0]).float())
    return Activations(torch.stack(weights), torch.stack(streams))


def head_patterns(attention: Tensor) -> Tensor:
    """The share of each head's attention on the previous token, the first token and the token itself [L, H, 3].

    The mean over positions from the third on, which can tell these apart; NaN for shorter texts.
    """
    rows = attention[:, :, 2:]  # [L, H, T − 2, T]
    to_previous = rows.diagonal(offset=1, dim1=-2, dim2=-1)
    to_self = rows.diagonal(offset=2, dim1=-2, dim2=-1)
    return torch.stack((to_previous.mean(-1), rows[..., 0].mean(-1), to_self.mean(-1)), dim=-1)


@torch.no_grad()
def logit_lens(model: GPT, residual_stream: Tensor) -> Tensor:
    """The logits [T, V] of a layer's residual stream [T, D] read by the model's final norm and unembedding (nostalgebraist
    2020).

    Post-norm models (GPT-1) have no final norm. For the last layer these are the model's logits.
    """
    return model.unembed(model.final_norm(residual_stream)).float()


@contextmanager
def override_embeddings(model: GPT, embeddings: Tensor) -> Generator[None]:
    """Replace the model's token embeddings by `embeddings` [B, T, D], whatever its input tokens."""
    handle = model.token_embedding.register_forward_hook(lambda module, inputs, output: embeddings)
    try:
        yield
    finally:
        handle.remove()
