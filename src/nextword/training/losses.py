"""What is minimised. An objective gives sums; who trains divides each once, by its count over the whole global batch.

So neither the micro-batch nor the number of machines changes the loss, and a short row weighs as much as its tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nextword.data.dataset import IGNORE
from nextword.model.fused import FusedGPT
from nextword.model.gpt import GPT
from nextword.training.parallel import split_cross_entropies

LOGIT_BYTES = 2**28  # logits beyond this are made in pieces, and made again in the backward pass


class Loss(NamedTuple):
    """A term's sum (of nats over tokens, of losses over examples), and how much the term weighs beside the others."""

    total: Tensor
    weight: float = 1.0


class LabelTensors(NamedTuple):
    """`text.batches.Labels` on the device."""

    ends: Tensor
    example: Tensor
    gold: Tensor
    weight: Tensor
    reference: Tensor | None


class Inputs(NamedTuple):
    """A micro-batch on the device: tokens and targets [B, T], what dropout keeps (None without dropout), segments [B, T]
    where several texts share a row, positions [B, T] then, and what labelled examples have beside their tokens."""

    tokens: Tensor
    targets: Tensor
    keep: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    labels: LabelTensors | None = None


Model = GPT | FusedGPT
Objective = Callable[[Model, Inputs], dict[str, Loss]]


def next_word(model: Model, inputs: Inputs) -> dict[str, Loss]:
    """L(θ) = −Σ log P(x_t | x_<t; θ), summed over every position that has a target."""
    hidden = model(inputs.tokens, keep=inputs.keep)  # [B, T, D]
    return {"next_word": Loss(summed_loss(model, hidden.flatten(0, 1), inputs.targets.flatten()))}


def summed_loss(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Σ −log softmax(hidden · unembeddingᵀ)[target] over the positions [N] that have a target."""
    if isinstance(model, FusedGPT):
        return model.summed_loss(hidden, targets)
    return negative_log_likelihoods(hidden, model.unembedding, targets).sum()


def negative_log_likelihoods(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(hidden · unembeddingᵀ)[target] at each position [N], in float32; 0 where the target is `IGNORE`.

    hidden [N, D], unembedding [V, D], targets [N]. Where the logits [N, V] would be large they are made a piece at a
    time, and once more in the backward pass.
    """

    def piece(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropies(hidden, unembedding, targets)

    rows = max(1, LOGIT_BYTES // (4 * unembedding.shape[0]))
    if len(hidden) <= rows:
        return piece(hidden, targets)
    return torch.cat(
        [
            checkpoint(piece, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    )


def cross_entropies(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """The same, all logits made at once; of an unembedding that several processes have among them, by all of these together."""
    if hasattr(unembedding, "placements"):
        return split_cross_entropies(hidden, unembedding, targets, IGNORE)
    logits = F.linear(hidden, unembedding).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


# ---------------------------------------------------------------- labelled examples


def hidden_states(model: Model, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, D], and which positions have a target [B, T].

    Logits are made for those positions alone: in fine-tuning they are often a small part.
    """
    hidden = model(inputs.tokens, keep=inputs.keep, segments=inputs.segments, positions=inputs.positions)
    return hidden, inputs.targets != IGNORE


def answer(model: Model, inputs: Inputs) -> dict[str, Loss]:
    """The next word again, where only some positions are learned: those of the answer, not those of the question."""
    hidden, learned = hidden_states(model, inputs)
    return {"next_word": Loss(summed_loss(model, hidden[learned], inputs.targets[learned]))}


def row_log_likelihoods(model: Model, inputs: Inputs) -> Tensor:
    """Σ log P(x_t | x_<t; θ) over the targets of each row; [B]."""
    hidden, learned = hidden_states(model, inputs)
    losses = negative_log_likelihoods(hidden[learned], model.unembedding, inputs.targets[learned])
    rows = learned.nonzero()[:, 0]
    return -losses.new_zeros(len(inputs.tokens)).index_add(0, rows, losses)


def example_logits(model: Model, hidden: Tensor, labels: LabelTensors) -> Tensor:
    """The head's logits [E, n_labels] at each row's end, those of an example's rows summed (Radford et al. 2018, 3.3)."""
    rows = model.classify(hidden[torch.arange(len(hidden), device=hidden.device), labels.ends]).float()
    return rows.new_zeros(int(labels.weight.shape[0]), rows.shape[1]).index_add(0, labels.example, rows)


def choice_logits(model: Model, hidden: Tensor, labels: LabelTensors) -> Tensor:
    """One logit a row, as [E, C]: those of an example's choices side by side, −∞ where it has fewer than C."""
    rows = model.classify(hidden[torch.arange(len(hidden), device=hidden.device), labels.ends]).float()[:, 0]
    first = torch.searchsorted(labels.example, labels.example)  # the first row of the same example
    place = torch.arange(len(rows), device=rows.device) - first
    table = rows.new_full((int(labels.weight.shape[0]), int(place.max()) + 1), -torch.inf)
    return table.index_put((labels.example, place), rows)


def labelled(kind: str, auxiliary: float = 0.0) -> Objective:
    """L₃ = L₂ + λ L₁: a head's loss over the examples, and λ times the next word's over their tokens.

    Radford et al. 2018, equation 5; each term is divided by its own count. `kind` is "label" (cross entropy), "labels"
    (several at once: binary cross entropy, the mean over labels), "score" (squared error) or "choice" (softmax over an
    example's rows).
    """

    def objective(model: Model, inputs: Inputs) -> dict[str, Loss]:
        labels = inputs.labels
        assert labels is not None
        hidden, learned = hidden_states(model, inputs)
        logits = (choice_logits if kind == "choice" else example_logits)(model, hidden, labels)
        if kind == "score":
            each = (logits[:, 0] - labels.gold) ** 2
        elif kind == "labels":
            each = F.binary_cross_entropy_with_logits(logits, labels.gold, reduction="none").mean(1)
        else:
            each = F.cross_entropy(logits, labels.gold, reduction="none")
        terms = {"task": Loss((each * labels.weight).sum())}
        if auxiliary:
            terms["next_word"] = Loss(summed_loss(model, hidden[learned], inputs.targets[learned]), auxiliary)
        return terms

    return objective


def preference(beta: float) -> Objective:
    """DPO: −log σ(β [(log π(y₊|x) − log π₀(y₊|x)) − (log π(y₋|x) − log π₀(y₋|x))]). Rafailov et al. 2023, equation 7.

    A pair's rows are the chosen answer and the rejected one, in this order; `reference` holds log π₀.
    """

    def objective(model: Model, inputs: Inputs) -> dict[str, Loss]:
        assert inputs.labels is not None and inputs.labels.reference is not None
        gained = row_log_likelihoods(model, inputs) - inputs.labels.reference
        return {"task": Loss(-F.logsigmoid(beta * (gained[0::2] - gained[1::2])).sum())}

    return objective


class Step(nn.Module):
    """The model with its loss: the one module that is compiled, or made of compiled parts (see `fused`)."""

    def __init__(self, model: GPT, objective: Objective, fused: bool = False):
        super().__init__()
        self.model = model
        self.objective = objective
        self.fused = FusedGPT(model) if fused else None

    def forward(self, inputs: Inputs) -> dict[str, Loss]:
        return self.objective(self.fused or self.model, inputs)
