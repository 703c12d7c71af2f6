"""Which input words an output leans on: integrated gradients, with their own proof of being complete.

Sundararajan et al. 2017, equation 1: the part of token i is (x_i − x′_i) · ∫₀¹ ∂F/∂x_i (x′ + α (x − x′)) dα, x its embedding
and x′ the baseline's. Their proposition 1, completeness: the parts add up to F(x) − F(x′), which tells whether the integral
was taken finely enough. Shapes: T tokens, D model width, B points of the path that go through the model at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextword.interpretability.activations import override_embeddings
from nextword.model.gpt import GPT

COMPLETENESS_TOLERANCE = 0.01  # how far the parts' sum may be from what they are parts of
INITIAL_STEPS, MAX_STEPS = 16, 1024
BATCH_TOKENS = 2048

OutputFunction = Callable[[Tensor], Tensor]  # hidden states [B, T, D] → a number each [B]


@dataclass(frozen=True)
class Attributions:
    """What each token has added to an output.

    Attributes:
        parts: [T], in the output's unit.
        output, at_baseline: the output at the text itself, and at the baseline.
        steps: points at which the gradient was taken.
    """

    per_token: list[float]
    target_output: float
    baseline_output: float
    steps: int

    @property
    def output_difference(self) -> float:
        return self.target_output - self.baseline_output

    @property
    def total(self) -> float:
        return float(np.sum(self.per_token))

    @property
    def completeness_error(self) -> float:
        """|Σ parts − difference| / |difference|; where nothing differs, the parts' own size takes its place."""
        gap = abs(self.total - self.output_difference)
        scale = abs(self.output_difference) or float(np.abs(self.per_token).sum())
        return gap / scale if scale else 0.0


def mean_token_embedding(model: GPT) -> Tensor:
    """The baseline [D]: the mean of all token embeddings, a word that is no word in particular."""
    return model.token_embedding.weight.detach().mean(0)


def integrated_gradients(
    model: GPT, input_ids: Sequence[int], output_function: OutputFunction, fixed_positions: Sequence[int] = ()
) -> Attributions:
    """Integrated gradients of an output on a text's token embeddings, from the average word at every place but the `fixed`
    ones (a task's markers, which no text is without); positions stay as they are.

    The integral is taken by Gauss and Legendre's rule with 16 points, and with twice as many until the parts add up within
    1 % or there are 1,024.
    """
    tokens = torch.tensor([list(input_ids)], device=model.unembedding.device)  # [1, T]
    embeddings = model.token_embedding.weight.detach()[tokens[0]]  # [T, D]
    baseline = mean_token_embedding(model).repeat(len(input_ids), 1)  # [T, D]
    baseline[list(fixed_positions)] = embeddings[list(fixed_positions)]

    def output_at(points: Tensor) -> Tensor:
        with override_embeddings(model, points):
            return output_function(model(tokens.expand(len(points), -1)))

    with torch.no_grad():
        endpoint_outputs = output_at(torch.stack((embeddings, baseline))).double().tolist()
    steps = INITIAL_STEPS
    while True:
        token_attributions = _integrate_path(output_at, embeddings, baseline, steps)
        attributions = Attributions(token_attributions, endpoint_outputs[0], endpoint_outputs[1], steps)
        if attributions.completeness_error < COMPLETENESS_TOLERANCE or steps >= MAX_STEPS:
            return attributions
        steps *= 2


def _integrate_path(output_function: OutputFunction, embeddings: Tensor, baseline: Tensor, steps: int) -> list[float]:
    """The parts [T] by so many points of the path."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on −1 to 1
    rows = max(1, BATCH_TOKENS // len(embeddings))
    gradient = torch.zeros(embeddings.shape, dtype=torch.float64)
    for start in range(0, steps, rows):
        batch = slice(start, start + rows)
        alpha = torch.as_tensor((nodes[batch] + 1) / 2).to(embeddings)[:, None, None]
        points = (baseline + alpha * (embeddings - baseline)).requires_grad_()  # [B, T, D]
        (batch_gradient,) = torch.autograd.grad(output_function(points).sum(), points)
        gradient += (batch_gradient.cpu().double() * torch.as_tensor(weights[batch] / 2)[:, None, None]).sum(0)
    return ((embeddings - baseline).cpu().double() * gradient).sum(-1).tolist()
