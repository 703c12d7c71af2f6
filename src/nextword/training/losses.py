"""What is minimised. An objective gives sums; who trains divides each once, by its count over the whole global batch.

So neither the micro-batch nor the number of machines changes the loss, and a short row weighs as much as its tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nextword.data.dataset import IGNORE_INDEX
from nextword.model.fused import FusedGPT
from nextword.model.gpt import GPT
from nextword.training.parallel import vocab_parallel_cross_entropy

MAX_LOGIT_BYTES = 2**28  # logits beyond this are made in pieces, and made again in the backward pass


class LossTerm(NamedTuple):
    """A term's sum (of nats over tokens, of losses over examples), and how much the term weighs beside the others."""

    total: Tensor
    weight: float = 1.0


class LabelTensors(NamedTuple):
    """`nextword.data.dataset.Labels` on the device."""

    pool_positions: Tensor
    example_ids: Tensor
    targets: Tensor
    weights: Tensor
    reference_logprobs: Tensor | None


class DeviceBatch(NamedTuple):
    """A micro-batch on the device: tokens and targets [B, T], what dropout keeps (None without dropout), segments [B, T]
    where several texts share a row, positions [B, T] then, and what labelled examples have beside their tokens."""

    tokens: Tensor
    targets: Tensor
    dropout_masks: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    labels: LabelTensors | None = None


TrainableModel = GPT | FusedGPT
LossFn = Callable[[TrainableModel, DeviceBatch], dict[str, LossTerm]]


def causal_lm_loss(model: TrainableModel, batch: DeviceBatch) -> dict[str, LossTerm]:
    """L(θ) = −Σ log P(x_t | x_<t; θ), summed over every position that has a target."""
    hidden = model(batch.tokens, dropout_masks=batch.dropout_masks)  # [B, T, D]
    return {"next_word": LossTerm(nll_sum(model, hidden.flatten(0, 1), batch.targets.flatten()))}


def nll_sum(model: TrainableModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Σ −log softmax(hidden · unembeddingᵀ)[target] over the positions [N] that have a target."""
    if isinstance(model, FusedGPT):
        return model.nll_sum(hidden, targets)
    return token_nll(hidden, model.unembedding, targets).sum()


def token_nll(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(hidden · unembeddingᵀ)[target] at each position [N], in float32; 0 where the target is `IGNORE`.

    hidden [N, D], unembedding [V, D], targets [N]. Where the logits [N, V] would be large they are made a piece at a
    time, and once more in the backward pass.
    """

    def piece(hidden: Tensor, targets: Tensor) -> Tensor:
        return dense_token_nll(hidden, unembedding, targets)

    rows = max(1, MAX_LOGIT_BYTES // (4 * unembedding.shape[0]))
    if len(hidden) <= rows:
        return piece(hidden, targets)
    return torch.cat(
        [
            checkpoint(piece, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    )


def dense_token_nll(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """The same, all logits made at once; of an unembedding that several processes have among them, by all of these together."""
    if hasattr(unembedding, "placements"):
        return vocab_parallel_cross_entropy(hidden, unembedding, targets, IGNORE_INDEX)
    logits = F.linear(hidden, unembedding).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


# ---------------------------------------------------------------- labelled examples


def hidden_states(model: TrainableModel, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, D], and which positions have a target [B, T].

    Logits are made for those positions alone: in fine-tuning they are often a small part.
    """
    hidden = model(batch.tokens, dropout_masks=batch.dropout_masks, segments=batch.segments, positions=batch.positions)
    return hidden, batch.targets != IGNORE_INDEX


def completion_loss(model: TrainableModel, batch: DeviceBatch) -> dict[str, LossTerm]:
    """The next word again, where only some positions are learned: those of the answer, not those of the question."""
    hidden, has_target = hidden_states(model, batch)
    return {"next_word": LossTerm(nll_sum(model, hidden[has_target], batch.targets[has_target]))}


def sequence_logprobs(model: TrainableModel, batch: DeviceBatch) -> Tensor:
    """Σ log P(x_t | x_<t; θ) over the targets of each row; [B]."""
    hidden, has_target = hidden_states(model, batch)
    losses = token_nll(hidden[has_target], model.unembedding, batch.targets[has_target])
    rows = has_target.nonzero()[:, 0]
    return -losses.new_zeros(len(batch.tokens)).index_add(0, rows, losses)


def example_logits(model: TrainableModel, hidden: Tensor, labels: LabelTensors) -> Tensor:
    """The head's logits [E, n_labels] at each row's end, those of an example's rows summed (Radford et al. 2018, 3.3)."""
    rows = model.classify(hidden[torch.arange(len(hidden), device=hidden.device), labels.pool_positions]).float()
    return rows.new_zeros(int(labels.weights.shape[0]), rows.shape[1]).index_add(0, labels.example_ids, rows)


def multiple_choice_logits(model: TrainableModel, hidden: Tensor, labels: LabelTensors) -> Tensor:
    """One logit a row, as [E, C]: those of an example's choices side by side, −∞ where it has fewer than C."""
    rows = model.classify(hidden[torch.arange(len(hidden), device=hidden.device), labels.pool_positions]).float()[:, 0]
    first = torch.searchsorted(labels.example_ids, labels.example_ids)  # the first row of the same example
    place = torch.arange(len(rows), device=rows.device) - first
    table = rows.new_full((int(labels.weights.shape[0]), int(place.max()) + 1), -torch.inf)
    return table.index_put((labels.example_ids, place), rows)


def classification_loss(kind: str, auxiliary_weight: float = 0.0) -> LossFn:
    """L₃ = L₂ + λ L₁: a head's loss over the examples, and λ times the next word's over their tokens.

    Radford et al. 2018, equation 5; each term is divided by its own count. `kind` is "label" (cross entropy), "labels"
    (several at once: binary cross entropy, the mean over labels), "score" (squared error) or "choice" (softmax over an
    example's rows).
    """

    def objective(model: TrainableModel, inputs: DeviceBatch) -> dict[str, LossTerm]:
        labels = inputs.labels
        assert labels is not None
        hidden, learned = hidden_states(model, inputs)
        logits = (multiple_choice_logits if kind == "choice" else example_logits)(model, hidden, labels)
        if kind == "score":
            each = (logits[:, 0] - labels.targets) ** 2
        elif kind == "labels":
            each = F.binary_cross_entropy_with_logits(logits, labels.targets, reduction="none").mean(1)
        else:
            each = F.cross_entropy(logits, labels.targets, reduction="none")
        terms = {"task": LossTerm((each * labels.weights).sum())}
        if auxiliary_weight:
            terms["next_word"] = LossTerm(nll_sum(model, hidden[learned], inputs.targets[learned]), auxiliary_weight)
        return terms

    return objective


def dpo_loss(beta: float) -> LossFn:
    """DPO: −log σ(β [(log π(y₊|x) − log π₀(y₊|x)) − (log π(y₋|x) − log π₀(y₋|x))]). Rafailov et al. 2023, equation 7.

    A pair's rows are the chosen answer and the rejected one, in this order; `reference` holds log π₀.
    """

    def objective(model: TrainableModel, inputs: DeviceBatch) -> dict[str, LossTerm]:
        assert inputs.labels is not None and inputs.labels.reference_logprobs is not None
        gained = sequence_logprobs(model, inputs) - inputs.labels.reference_logprobs
        return {"task": LossTerm(-F.logsigmoid(beta * (gained[0::2] - gained[1::2])).sum())}

    return objective


class LossModule(nn.Module):
    """The model with its loss: the one module that is compiled, or made of compiled parts (see `fused`)."""

    def __init__(self, model: GPT, loss_fn: LossFn, fused: bool = False):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.fused = FusedGPT(model) if fused else None

    def forward(self, batch: DeviceBatch) -> dict[str, LossTerm]:
        return self.loss_fn(self.fused or self.model, batch)
