"""Attribution of an output to the input tokens by integrated gradients.

Sundararajan et al. 2017, equation 1: the attribution of token i is (x_i − x′_i) · ∫₀¹ ∂F/∂x_i (x′ + α (x − x′)) dα, with its
embedding x and the baseline x′. By completeness (proposition 1), the attributions sum to F(x) − F(x′), which measures the error
of the numerical integral. Shapes: T tokens, D model width, B points of the path in a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextword.interpretability.activations import override_embeddings
from nextword.model.gpt import GPT

COMPLETENESS_TOLERANCE = 0.01  # relative
INITIAL_STEPS, MAX_STEPS = 16, 1024
BATCH_TOKENS = 2048

OutputFunction = Callable[[Tensor], Tensor]  # hidden states [B, T, D] → outputs [B]


@dataclass(frozen=True)
class Attributions:
    """The contribution of each token to an output.

    Attributes:
        per_token: [T], in the unit of the output.
        target_output, baseline_output: the output for the text and for the baseline.
        steps: points at which the gradient was evaluated.
    """

    per_token: list[float]
    target_output: float
    baseline_output: float
    steps: int

    @property
    def output_difference(self) -> float:
        """What the attributions should add up to."""
        return self.target_output - self.baseline_output

    @property
    def total(self) -> float:
        """What the attributions add up to."""
        return float(np.sum(self.per_token))

    @property
    def completeness_error(self) -> float:
        """|Σ attributions − difference| / |difference|, or by Σ |attributions| if the difference is 0."""
        gap = abs(self.total - self.output_difference)
        scale = abs(self.output_difference) or float(np.abs(self.per_token).sum())
        return gap / scale if scale else 0.0


def mean_token_embedding(model: GPT) -> Tensor:
    """The baseline [D]: the mean of all token embeddings."""
    return model.token_embedding.weight.detach().mean(0)


def integrated_gradients(
    model: GPT, input_ids: Sequence[int], output_function: OutputFunction, fixed_positions: Sequence[int] = ()
) -> Attributions:
    """Integrated gradients of an output with respect to the token embeddings, from the mean embedding at every position.

    The integral is taken by Gauss–Legendre quadrature with 16 points, doubled until the completeness error is below 1 % or
    there are 1,024 points.

    Args:
        model: the model.
        input_ids: the tokens [T].
        output_function: the output from the hidden states.
        fixed_positions: tokens that keep their embedding in the baseline, such as the special tokens of a task.
    """
    tokens = torch.tensor([list(input_ids)], device=model.unembedding.device)  # [1, T]
    embeddings = model.token_embedding.weight.detach()[tokens[0]]  # [T, D]
    baseline = mean_token_embedding(model).repeat(len(input_ids), 1)  # [T, D]
    baseline[list(fixed_positions)] = embeddings[list(fixed_positions)]

    def output_at(points: Tensor) -> Tensor:
        with override_embeddings(model, points):
            return output_function(model(tokens.expand(len(points), -1)))

    with torch.no_grad():
        target, reference = output_at(torch.stack((embeddings, baseline))).cpu().double().numpy().tolist()
    steps = INITIAL_STEPS
    while True:
        per_token = _integrate_path(output_at, embeddings, baseline, steps)
        attributions = Attributions(per_token, target, reference, steps)
        if attributions.completeness_error < COMPLETENESS_TOLERANCE or steps >= MAX_STEPS:
            return attributions
        steps *= 2


def _integrate_path(output_at: OutputFunction, embeddings: Tensor, baseline: Tensor, steps: int) -> list[float]:
    """The attributions [T] by quadrature with `steps` points."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on −1 to 1
    batch_size = max(1, BATCH_TOKENS // len(embeddings))
    gradient = torch.zeros(embeddings.shape, dtype=torch.float64)
    for start in range(0, steps, batch_size):
        batch = slice(start, start + batch_size)
        alpha = torch.as_tensor((nodes[batch] + 1) / 2).to(embeddings)[:, None, None]
        points = (baseline + alpha * (embeddings - baseline)).requires_grad_()  # [B, T, D]
        (batch_gradient,) = torch.autograd.grad(output_at(points).sum(), points)
        gradient += (batch_gradient.cpu().double() * torch.as_tensor(weights[batch] / 2)[:, None, None]).sum(0)
    return ((embeddings - baseline).cpu().double() * gradient).sum(-1).numpy().tolist()
