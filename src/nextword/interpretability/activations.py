"""What goes on inside a model while it reads one text: who looks where, and what each layer would already say.

The model itself is left as it is; hooks see what passes through it. Shapes: T tokens of the text, L layers, H heads, G
key-value heads, K width of a head, D model width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nextword.model.gpt import GPT, Attention, rotate

MOST_TOKENS = 128  # tokens that are explained at most: more can be computed, but nobody reads it
WEIGHTS = 4_000_000  # attention weights that a page may hold, 8 MB of them


@dataclass(frozen=True)
class Inside:
    """What one text [T] makes of a model.

    Attributes:
        attention: softmax(Q Kᵀ / √d_k) of every layer and head [L, H, T, T]; row t is what token t looks at.
        streams: the residual stream before the first layer and after each [L + 1, T, D].
    """

    attention: Tensor
    streams: Tensor


def most_tokens(model: GPT) -> int:
    """How many tokens of a text can be explained: those that a person reads, the model has room for, and a page can hold."""
    heads = model.config.n_layers * model.config.n_heads
    return max(1, min(MOST_TOKENS, model.config.context_length, math.isqrt(2 * WEIGHTS // heads)))


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d_k), masked so that no position sees a later one: [H, T, T] of query [H, T, K] and key [G, T, K].

    Vaswani et al. 2017, equation 1, whose product with the values the model computes without ever holding it.
    """
    query, key = query.cpu().double(), key.cpu().double()
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)  # each shared by H / G query heads
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1)


@torch.no_grad()
def look_inside(model: GPT, ids: Sequence[int]) -> Inside:
    """Let a model read a text and see what passes through it."""
    streams: list[Tensor] = []
    seen: list[dict[str, Any]] = [{} for _ in model.blocks]
    handles = []
    for layer, block in enumerate(model.blocks):
        handles += _watch(block.attention, seen[layer])
        handles.append(block.register_forward_hook(lambda module, inputs, output: streams.append(output[0])))
    handles.append(
        model.blocks[0].register_forward_pre_hook(lambda module, inputs: streams.insert(0, inputs[0][0]))
    )  # fmt: skip
    try:
        model(torch.tensor([list(ids)], device=model.unembedding.device))
    finally:
        for handle in handles:
            handle.remove()
    weights = []
    for one in seen:
        query, key = one["query"], one["key"]  # [1, H, T, K] and [1, G, T, K], normalised where the model does that
        if one["rotation"] is not None:
            query, key = rotate(query, *one["rotation"]), rotate(key, *one["rotation"])
        weights.append(attention_weights(query[0], key[0]).float())
    return Inside(torch.stack(weights), torch.stack(streams))


def _watch(attention: Attention, seen: dict[str, Any]) -> list[Any]:
    """Hooks that keep one layer's queries, keys and rotation; their handles."""

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    norms: tuple[nn.Module, nn.Module] = (attention.query_norm, attention.key_norm)  # identities where there are none
    return [
        attention.register_forward_pre_hook(lambda module, inputs: seen.__setitem__("rotation", inputs[1])),
        *(norm.register_forward_hook(keep(name)) for norm, name in zip(norms, ("query", "key"), strict=True)),
    ]


def kinds_of_heads(attention: Tensor) -> Tensor:
    """The share of each head's weight that goes to the token before, to the first token and to the token itself, mean over
    the positions that have a choice (from the third token on): [L, H, 3]; NaN of shorter texts."""
    rows = attention[:, :, 2:]  # [L, H, T - 2, T]
    before = rows.diagonal(offset=1, dim1=-2, dim2=-1)
    itself = rows.diagonal(offset=2, dim1=-2, dim2=-1)
    return torch.stack((before.mean(-1), rows[..., 0].mean(-1), itself.mean(-1)), dim=-1)


@torch.no_grad()
def said_by_layer(model: GPT, stream: Tensor) -> Tensor:
    """The logits [T, V] that a layer's residual stream [T, D] would give if it were the last: the logit lens (nostalgebraist
    2020), the model's final norm and unembedding. Where norms follow each sum (GPT-1), every layer ends with its own, and
    there is no final one to add; after the last layer these are the model's own logits."""
    return model.unembed(model.final_norm(stream)).float()


@contextmanager
def embedded_as(model: GPT, embedded: Tensor) -> Iterator[None]:
    """The model as if its token embeddings were these [B, T, D], whatever tokens it is given."""
    handle = model.token_embedding.register_forward_hook(lambda module, inputs, output: embedded)
    try:
        yield
    finally:
        handle.remove()
