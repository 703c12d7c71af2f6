"""Training losses. Each returns sums, which the trainer divides once by the counts of the whole global batch.

The loss therefore depends neither on the micro-batch size nor on the number of processes, and every token has the same weight.

Shapes: B rows of the micro-batch, T tokens of a row, N positions with a target, E examples, C choices, D model width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextword.model.cross_entropy import IGNORE_INDEX, nll_sum, token_nll
from nextword.model.gpt import GPT


class LossTerm(NamedTuple):
    """One term of a loss.

    Attributes:
        total: Sum over tokens (in nats) or over examples.
        weight: Relative weight of the term.
    """

    total: Tensor
    weight: float = 1.0


class LabelTensors(NamedTuple):
    """`data.dataset.Labels` on the model's device."""

    pool_positions: Tensor
    example_ids: Tensor
    targets: Tensor
    weights: Tensor
    reference_logprobs: Tensor | None


class DeviceBatch(NamedTuple):
    """A micro-batch on the model's device.

    Attributes:
        tokens: Token ids, [B, T].
        targets: Next token at each position, [B, T]; `IGNORE_INDEX` where there is none.
        dropout_masks: See `GPT.forward`; None without dropout.
        segments: The document of each token, [B, T], where rows are packed.
        positions: The position of each token in its document, [B, T], where rows are packed.
        labels: Labels of the examples.
    """

    tokens: Tensor
    targets: Tensor
    dropout_masks: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    labels: LabelTensors | None = None


# A model, a micro-batch and whether to use the kernels (see `GPT.forward`) → the terms of the loss by name.
LossFn = Callable[[GPT, DeviceBatch, bool], dict[str, LossTerm]]


# ---------------------------------------------------------------- language modeling


def causal_lm_loss(model: GPT, batch: DeviceBatch, kernels: bool = False) -> dict[str, LossTerm]:
    """L(θ) = −Σ log P(x_t | x_<t; θ) over every position that has a target."""
    hidden = model(batch.tokens, dropout_masks=batch.dropout_masks, kernels=kernels)  # [B, T, D]
    nll = nll_sum(hidden.flatten(0, 1), model.unembedding, batch.targets.flatten(), kernels)
    return {"next_word": LossTerm(nll)}


def distillation_loss(teachers: Sequence[GPT], weight: float) -> LossFn:
    """The cross-entropy to a mixture of the text and the averaged predictions of several models.

    −Σ_v q_v log P_v with q = (1 − w) [v = x_t] + w · mean of the teachers' P_v (Hinton, Vinyals and Dean 2015, section 2, at
    temperature 1).

    Args:
        teachers: The models, with the vocabulary of the student.
        weight: w.
    """

    def loss(model: GPT, batch: DeviceBatch, kernels: bool) -> dict[str, LossTerm]:
        hidden, has_target = hidden_states(model, batch, kernels)
        log_p = F.log_softmax(F.linear(hidden[has_target], model.unembedding).float(), dim=-1)  # [N, V]
        with torch.no_grad():
            q = torch.zeros_like(log_p)
            for teacher in teachers:
                states = teacher(batch.tokens, segments=batch.segments, positions=batch.positions, kernels=kernels)
                q += F.softmax(F.linear(states[has_target], teacher.unembedding).float(), dim=-1)
            q *= weight / len(teachers)
            targets = batch.targets[has_target, None]
            q.scatter_add_(1, targets, q.new_full(targets.shape, 1 - weight))
        return {"next_word": LossTerm(-(q * log_p).sum())}

    return loss


def hidden_states(model: GPT, batch: DeviceBatch, kernels: bool = False) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, D] of packed rows, and which positions have a target, [B, T].

    In fine-tuning few positions have a target; logits are made for those alone.
    """
    hidden = model(
        batch.tokens,
        dropout_masks=batch.dropout_masks,
        segments=batch.segments,
        positions=batch.positions,
        kernels=kernels,
    )
    return hidden, batch.targets != IGNORE_INDEX


def completion_loss(model: GPT, batch: DeviceBatch, kernels: bool = False) -> dict[str, LossTerm]:
    """The language-modeling loss of the tokens of the answers; those of the prompts have no target."""
    hidden, has_target = hidden_states(model, batch, kernels)
    nll = nll_sum(hidden[has_target], model.unembedding, batch.targets[has_target], kernels)
    return {"next_word": LossTerm(nll)}


def sequence_logprobs(model: GPT, batch: DeviceBatch, kernels: bool = False) -> Tensor:
    """Σ log P(x_t | x_<t; θ) over the targets of each row; [B]."""
    hidden, has_target = hidden_states(model, batch, kernels)
    nll = token_nll(hidden[has_target], model.unembedding, batch.targets[has_target])
    rows = has_target.nonzero()[:, 0]
    return -nll.new_zeros(len(batch.tokens)).index_add(0, rows, nll)


def dpo_loss(beta: float) -> LossFn:
    """Direct preference optimization. Rafailov et al. 2023, equation 7.

    −log σ(β [(log π(y₊|x) − log π₀(y₊|x)) − (log π(y₋|x) − log π₀(y₋|x))]), with `LabelTensors.reference_logprobs` as log π₀.

    Args:
        beta: β. The rows of the batch are pairs: the chosen answer, then the rejected one.
    """

    def loss(model: GPT, batch: DeviceBatch, kernels: bool) -> dict[str, LossTerm]:
        assert batch.labels is not None and batch.labels.reference_logprobs is not None
        log_ratios = sequence_logprobs(model, batch, kernels) - batch.labels.reference_logprobs
        return {"task": LossTerm(-F.logsigmoid(beta * (log_ratios[0::2] - log_ratios[1::2])).sum())}

    return loss


# ---------------------------------------------------------------- classification


def example_logits(model: GPT, hidden: Tensor, labels: LabelTensors) -> Tensor:
    """Logits [E, n_labels] of the last token of each row, summed over an example's rows (Radford et al. 2018, section 3.3)."""
    rows = model.classify(hidden[torch.arange(len(hidden), device=hidden.device), labels.pool_positions]).float()
    return rows.new_zeros(int(labels.weights.shape[0]), rows.shape[1]).index_add(0, labels.example_ids, rows)


def multiple_choice_logits(model: GPT, hidden: Tensor, labels: LabelTensors) -> Tensor:
    """One logit for each row, as [E, C]: the choices of an example side by side, −∞ where it has fewer than C."""
    rows = model.classify(hidden[torch.arange(len(hidden), device=hidden.device), labels.pool_positions]).float()[:, 0]
    first_row = torch.searchsorted(labels.example_ids, labels.example_ids)  # the first row of the same example
    choice = torch.arange(len(rows), device=rows.device) - first_row
    table = rows.new_full((int(labels.weights.shape[0]), int(choice.max()) + 1), -torch.inf)
    return table.index_put((labels.example_ids, choice), rows)


def classification_loss(kind: str, auxiliary_weight: float = 0.0) -> LossFn:
    """The loss of a classification head, plus λ times the language-modeling loss of the same tokens, L₃ = L₂ + λ L₁.

    Radford et al. 2018, equation 5. Each term is divided by its own count.

    Args:
        kind: "label" (cross-entropy), "labels" (multilabel: the mean binary cross-entropy), "score" (squared error) or
            "choice" (cross-entropy over an example's rows).
        auxiliary_weight: λ.
    """

    def loss(model: GPT, batch: DeviceBatch, kernels: bool) -> dict[str, LossTerm]:
        labels = batch.labels
        assert labels is not None
        hidden, has_target = hidden_states(model, batch, kernels)
        logits = (multiple_choice_logits if kind == "choice" else example_logits)(model, hidden, labels)
        if kind == "score":
            losses = (logits[:, 0] - labels.targets) ** 2
        elif kind == "labels":
            losses = F.binary_cross_entropy_with_logits(logits, labels.targets, reduction="none").mean(1)
        else:
            losses = F.cross_entropy(logits, labels.targets, reduction="none")
        terms = {"task": LossTerm((losses * labels.weights).sum())}
        if auxiliary_weight:
            nll = nll_sum(hidden[has_target], model.unembedding, batch.targets[has_target], kernels)
            terms["next_word"] = LossTerm(nll, auxiliary_weight)
        return terms

    return loss


class LossModule(nn.Module):
    """A model with its loss: the module that is compiled, sharded and called in a training step.

    Args:
        model: The model.
        loss_fn: The loss.
        kernels: Call the compiled CPU operators, see `GPT.forward`.
    """

    def __init__(self, model: GPT, loss_fn: LossFn, kernels: bool = False):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.kernels = kernels

    def forward(self, batch: DeviceBatch) -> dict[str, LossTerm]:
        """The terms of the loss by name."""
        return self.loss_fn(self.model, batch, self.kernels)
