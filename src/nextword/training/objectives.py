"""What is minimised. An objective gives sums; who trains divides each once, by its count over the whole global batch.

So neither the micro-batch nor the number of machines changes the loss, and a short row weighs as much as its tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nextword.model.gpt import GPT
from nextword.text.batches import IGNORE

LOGIT_BYTES = 2**28  # logits beyond this are made in pieces, and made again in the backward pass


class Loss(NamedTuple):
    """A term's sum over tokens, in nats, and how many tokens it is over."""

    total: Tensor
    n: Tensor


class Inputs(NamedTuple):
    """A micro-batch on the device: tokens and targets [B, T], and what dropout keeps (None without dropout)."""

    tokens: Tensor
    targets: Tensor
    keep: Tensor | None


Objective = Callable[[GPT, Inputs], dict[str, Loss]]


def next_word(model: GPT, inputs: Inputs) -> dict[str, Loss]:
    """L(θ) = −Σ log P(x_t | x_<t; θ), summed over every position that has a target."""
    hidden = model(inputs.tokens, keep=inputs.keep)  # [B, T, D]
    total = negative_log_likelihood(hidden.flatten(0, 1), model.unembedding, inputs.targets.flatten())
    return {"next_word": Loss(total, (inputs.targets != IGNORE).sum())}


def negative_log_likelihood(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """−Σ log softmax(hidden · unembeddingᵀ)[target], in float32. hidden [N, D], unembedding [V, D], targets [N].

    Where the logits [N, V] would be large they are made a piece at a time, and once more in the backward pass.
    """

    def piece(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, unembedding).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    rows = max(1, LOGIT_BYTES // (4 * unembedding.shape[0]))
    if len(hidden) <= rows:
        return piece(hidden, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(piece, h, t, use_reentrant=False)
    return total


class Step(nn.Module):
    """The model with its loss: the one module that is compiled."""

    def __init__(self, model: GPT, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, inputs: Inputs) -> dict[str, Loss]:
        return self.objective(self.model, inputs)
