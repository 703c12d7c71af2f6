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

from nextword.model.gpt import GPT, Attention, apply_rotary_embedding

MAX_TOKENS = 128  # tokens that are explained at most: more can be computed, but nobody reads it
MAX_ATTENTION_WEIGHTS = 4_000_000  # attention weights that a page may hold, 8 MB of them


@dataclass(frozen=True)
class Activations:
    """What one text [T] makes of a model.

    Attributes:
        attention: softmax(Q Kᵀ / √d_k) of every layer and head [L, H, T, T]; row t is what token t looks at.
        streams: the residual stream before the first layer and after each [L + 1, T, D].
    """

    attention: Tensor
    residual_streams: Tensor


def max_explained_tokens(model: GPT) -> int:
    """How many tokens of a text can be explained: those that a person reads, the model has room for, and a page can hold."""
    heads = model.config.n_layers * model.config.n_heads
    return max(1, min(MAX_TOKENS, model.config.context_length, math.isqrt(2 * MAX_ATTENTION_WEIGHTS // heads)))


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d_k), masked so that no position sees a later one: [H, T, T] of query [H, T, K] and key [G, T, K].

    Vaswani et al. 2017, equation 1, whose product with the values the model computes without ever holding it.
    """
    query, key = query.cpu().double(), key.cpu().double()
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)  # each shared by H / G query heads
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    causal_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(causal_mask, -math.inf).softmax(-1)


@torch.no_grad()
def capture(model: GPT, input_ids: Sequence[int]) -> Activations:
    """Let a model read a text and see what passes through it."""
    streams: list[Tensor] = []
    captured: list[dict[str, Any]] = [{} for _ in model.blocks]
    handles = []
    for layer, block in enumerate(model.blocks):
        handles += _register_attention_hooks(block.attention, captured[layer])
        handles.append(block.register_forward_hook(lambda module, inputs, output: streams.append(output[0])))
    handles.append(
        model.blocks[0].register_forward_pre_hook(lambda module, inputs: streams.insert(0, inputs[0][0]))
    )  # fmt: skip
    try:
        model(torch.tensor([list(input_ids)], device=model.unembedding.device))
    finally:
        for handle in handles:
            handle.remove()
    weights = []
    for layer_capture in captured:
        query, key = (
            layer_capture["query"],
            layer_capture["key"],
        )  # [1, H, T, K] and [1, G, T, K], normalised where the model does that
        if layer_capture["rotation"] is not None:
            query, key = (
                apply_rotary_embedding(query, *layer_capture["rotation"]),
                apply_rotary_embedding(key, *layer_capture["rotation"]),
            )
        weights.append(attention_weights(query[0], key[0]).float())
    return Activations(torch.stack(weights), torch.stack(streams))


def _register_attention_hooks(attention: Attention, captured: dict[str, Any]) -> list[Any]:
    """Hooks that keep one layer's queries, keys and rotation; their handles."""

    def store_output(name: str) -> Any:
        return lambda module, inputs, output: captured.__setitem__(name, output)

    norms: tuple[nn.Module, nn.Module] = (attention.query_norm, attention.key_norm)  # identities where there are none
    return [
        attention.register_forward_pre_hook(lambda module, inputs: captured.__setitem__("rotation", inputs[1].rotary_cos_sin)),
        *(norm.register_forward_hook(store_output(name)) for norm, name in zip(norms, ("query", "key"), strict=True)),
    ]


def head_patterns(attention: Tensor) -> Tensor:
    """The share of each head's weight that goes to the token before, to the first token and to the token itself, mean over
    the positions that have a choice (from the third token on): [L, H, 3]; NaN of shorter texts."""
    rows = attention[:, :, 2:]  # [L, H, T - 2, T]
    to_previous = rows.diagonal(offset=1, dim1=-2, dim2=-1)
    to_self = rows.diagonal(offset=2, dim1=-2, dim2=-1)
    return torch.stack((to_previous.mean(-1), rows[..., 0].mean(-1), to_self.mean(-1)), dim=-1)


@torch.no_grad()
def logit_lens(model: GPT, residual_stream: Tensor) -> Tensor:
    """The logits [T, V] that a layer's residual stream [T, D] would give if it were the last: the logit lens (nostalgebraist
    2020), the model's final norm and unembedding. Where norms follow each sum (GPT-1), every layer ends with its own, and
    there is no final one to add; after the last layer these are the model's own logits."""
    return model.unembed(model.final_norm(residual_stream)).float()


@contextmanager
def override_embeddings(model: GPT, embeddings: Tensor) -> Iterator[None]:
    """The model as if its token embeddings were these [B, T, D], whatever tokens it is given."""
    handle = model.token_embedding.register_forward_hook(lambda module, inputs, output: embeddings)
    try:
        yield
    finally:
        handle.remove()
