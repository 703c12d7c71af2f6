"""From the logits of one position to the next token. Pure: what is random is one number of the caller's generator."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextword.errors import NextwordError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How a text is continued. What is None is off; the filters are applied in the order in which they stand here.

    Attributes:
        repetition_penalty: above 1 makes tokens that the text has already less likely (Keskar et al. 2019, 4.1).
        temperature: what logits are divided by; below 1 is more careful, above 1 bolder, 0 always takes the likeliest.
        top_k: draw from the k likeliest tokens (Fan et al. 2018, section 5.4).
        top_p: draw from the fewest tokens that have this probability together (Holtzman et al. 2020, section 3.1).
        min_p: draw from tokens at least this share as likely as the likeliest (Nguyen et al. 2024, section 3).
        max_tokens: how many tokens are drawn at most.
        stop: the text ends before the first of these strings.
        seed: the same one gives the same text again; None takes the engine's.

    Raises:
        UsageError: a setting out of its range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_tokens: int = 200
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, range_: str) -> None:
            if not fine:
                raise UsageError(f"{name} must be {range_}, not {getattr(self, name)!r}")

        whole = {name: isinstance(getattr(self, name), int) for name in ("top_k", "max_tokens", "seed")}
        check("temperature", 0 <= self.temperature < math.inf, "0 (always the likeliest token) or more")
        check("top_k", self.top_k is None or (whole["top_k"] and self.top_k >= 1), "a whole number of at least 1")
        check("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 changes nothing)")
        check("max_tokens", whole["max_tokens"] and self.max_tokens >= 1, "a whole number of at least 1")
        check("seed", self.seed is None or whole["seed"], "a whole number")
        strings = isinstance(self.stop, tuple) and all(isinstance(string, str) and string for string in self.stop)
        check("stop", strings, "a tuple of strings that are not empty")


def adjust(logits: Tensor, sampling: Sampling, history: Sequence[int] = ()) -> Tensor:
    """The logits [V] that are drawn from, in float64; what is ruled out is minus infinity, and the largest is 0.

    Args:
        history: the token ids of the text so far, for the repetition penalty.

    Raises:
        NextwordError: the model's logits are not finite numbers.
    """
    logits = logits.double()
    if not torch.isfinite(logits).all():
        raise NextwordError(
            "the model's logits are not finite numbers, so no next token can be drawn: its weights are damaged, or its "
            "training diverged. Check the files with `nextword verify`, or take an earlier checkpoint."
        )
    if sampling.repetition_penalty != 1 and len(history):
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        score, penalty = logits[seen], sampling.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(score > 0, score / penalty, score * penalty))
    if sampling.temperature == 0:
        return torch.full_like(logits, -math.inf).index_fill(0, logits.argmax(), 0.0)
    # The largest becomes 0 before the division, so that no temperature makes it infinite.
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        probability, order = logits.softmax(0).sort(descending=True, stable=True)
        before = probability.cumsum(0) - probability  # the mass of all likelier tokens; 0 for the first, so it stays
        logits = logits.index_fill(0, order[before >= sampling.top_p], -math.inf)
    if sampling.min_p:
        # p < min_p · max p, as logits: the largest of them is 0
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits


def probabilities(logits: Tensor, sampling: Sampling, history: Sequence[int] = ()) -> Tensor:
    """The probability [V], float64, with which each token is drawn. Raises as `adjust` does."""
    return adjust(logits, sampling, history).softmax(0)


def draw(logits: Tensor, sampling: Sampling, history: Sequence[int], generator: torch.Generator) -> int:
    """The id of the next token. Raises as `adjust` does.

    One number of the (CPU) generator decides: the first token at which the summed probability passes it is taken.
    Greedy sampling needs none.
    """
    logits = logits.cpu()
    if sampling.temperature == 0:
        return int(adjust(logits, sampling, history).argmax())
    summed = probabilities(logits, sampling, history).cumsum(0)
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return int(torch.searchsorted(summed, uniform * summed[-1], right=True))
