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

from nextword.interpretability.activations import embedded_as
from nextword.model.gpt import GPT

TOLERANCE = 0.01  # how far the parts' sum may be from what they are parts of
FIRST_STEPS, MOST_STEPS = 16, 1024
TOKENS_AT_ONCE = 2048

Output = Callable[[Tensor], Tensor]  # hidden states [B, T, D] → a number each [B]


@dataclass(frozen=True)
class Leaning:
    """What each token has added to an output.

    Attributes:
        parts: [T], in the output's unit.
        output, at_baseline: the output at the text itself, and at the baseline.
        steps: points at which the gradient was taken.
    """

    parts: list[float]
    output: float
    at_baseline: float
    steps: int

    @property
    def difference(self) -> float:
        return self.output - self.at_baseline

    @property
    def sum(self) -> float:
        return float(np.sum(self.parts))

    @property
    def relative_error(self) -> float:
        """|Σ parts − difference| / |difference|; where nothing differs, the parts' own size takes its place."""
        apart = abs(self.sum - self.difference)
        scale = abs(self.difference) or float(np.abs(self.parts).sum())
        return apart / scale if scale else 0.0


def average_word(model: GPT) -> Tensor:
    """The baseline [D]: the mean of all token embeddings, a word that is no word in particular."""
    return model.token_embedding.weight.detach().mean(0)


def leaning(model: GPT, ids: Sequence[int], output: Output, fixed: Sequence[int] = ()) -> Leaning:
    """Integrated gradients of an output on a text's token embeddings, from the average word at every place but the `fixed`
    ones (a task's markers, which no text is without); positions stay as they are.

    The integral is taken by Gauss and Legendre's rule with 16 points, and with twice as many until the parts add up within
    1 % or there are 1,024.
    """
    tokens = torch.tensor([list(ids)], device=model.unembedding.device)  # [1, T]
    embedded = model.token_embedding.weight.detach()[tokens[0]]  # [T, D]
    baseline = average_word(model).repeat(len(ids), 1)  # [T, D]
    baseline[list(fixed)] = embedded[list(fixed)]

    def value(points: Tensor) -> Tensor:
        with embedded_as(model, points):
            return output(model(tokens.expand(len(points), -1)))

    with torch.no_grad():
        ends = value(torch.stack((embedded, baseline))).double().tolist()
    steps = FIRST_STEPS
    while True:
        parts = _parts(value, embedded, baseline, steps)
        found = Leaning(parts, ends[0], ends[1], steps)
        if found.relative_error < TOLERANCE or steps >= MOST_STEPS:
            return found
        steps *= 2


def _parts(value: Output, embedded: Tensor, baseline: Tensor, steps: int) -> list[float]:
    """The parts [T] by so many points of the path."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on −1 to 1
    rows = max(1, TOKENS_AT_ONCE // len(embedded))
    gradient = torch.zeros(embedded.shape, dtype=torch.float64)
    for start in range(0, steps, rows):
        chosen = slice(start, start + rows)
        alpha = torch.as_tensor((nodes[chosen] + 1) / 2).to(embedded)[:, None, None]
        points = (baseline + alpha * (embedded - baseline)).requires_grad_()  # [B, T, D]
        (each,) = torch.autograd.grad(value(points).sum(), points)
        gradient += (each.cpu().double() * torch.as_tensor(weights[chosen] / 2)[:, None, None]).sum(0)
    return ((embedded - baseline).cpu().double() * gradient).sum(-1).tolist()
