"""From the logits of one position to the next token. Pure: what is random is one number of the caller's generator."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How a text is continued. What is None is off. First biases and penalties change the logits, then the filters are
    applied in the order in which they stand here.

    Attributes:
        repetition_penalty: above 1 makes tokens that the text has already less likely (Keskar et al. 2019, 4.1).
        temperature: what logits are divided by; below 1 is more careful, above 1 bolder, 0 always takes the likeliest.
        top_k: draw from the k likeliest tokens (Fan et al. 2018, section 5.4).
        top_p: draw from the fewest tokens that have this probability together (Holtzman et al. 2020, section 3.1).
        min_p: draw from tokens at least this share as likely as the likeliest (Nguyen et al. 2024, section 3).
        max_tokens: how many tokens are drawn at most.
        stop: the text ends before the first of these strings.
        logprobs: how many of the likeliest tokens are told with each token that is drawn, and how likely it was; None: not.
        prompt_logprobs: the same for the tokens of the prompt, which is then read whole.
        logit_bias: what is added to single tokens' logits.
        presence_penalty: what is taken from the logit of a token that was drawn already.
        frequency_penalty: what is taken for each time that it was drawn.
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
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        def require(name: str, fine: bool, range_: str) -> None:
            if not fine:
                raise UsageError(f"{name} must be {range_}, not {getattr(self, name)!r}")

        is_integer = {name: isinstance(getattr(self, name), int) for name in ("top_k", "max_tokens", "seed")}
        require("temperature", 0 <= self.temperature < math.inf, "0 (always the likeliest token) or more")
        require(
            "top_k", self.top_k is None or (is_integer["top_k"] and self.top_k >= 1), "a whole number of at least 1"
        )
        require("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        require("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1")
        require("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 changes nothing)")
        require("max_tokens", is_integer["max_tokens"] and self.max_tokens >= 0, "a whole number of at least 0")
        for name in ("presence_penalty", "frequency_penalty"):
            require(name, math.isfinite(getattr(self, name)), "a finite number")
        finite = all(math.isfinite(value) for value in (self.logit_bias or {}).values())
        require("logit_bias", finite, "finite numbers by token id")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(name, value is None or (isinstance(value, int) and value >= 0), "a whole number of at least 0")
        require("seed", self.seed is None or is_integer["seed"], "a whole number")
        strings = isinstance(self.stop, tuple) and all(isinstance(string, str) and string for string in self.stop)
        require("stop", strings, "a tuple of strings that are not empty")


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, of the model's own distribution: its log-probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


def top_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """A token's log-probability, and the `count` likeliest ones', under logits [V] before anything is done to them."""
    logprobs = logits.double().log_softmax(0)
    values, ids = logprobs.topk(min(max(0, count), len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def apply_penalties(
    logits: Tensor,
    sampling: Sampling,
    history: Sequence[int] = (),
    generated: Sequence[int] = (),
    allowed_mask: Tensor | None = None,
) -> Tensor:
    """The logits [V] with biases and penalties, in float64.

    Args:
        history: the token ids of the text so far, for the repetition penalty.
        drawn: those among them that were drawn, for the penalties of presence and frequency.
        allowed: boolean [V], which tokens may follow at all; None for every one.

    Raises:
        NextwordError: the model's logits are not finite numbers.
    """
    logits = logits.double()
    if not torch.isfinite(logits).all():
        raise NextwordError(
            "the model's logits are not finite numbers, so no next token can be drawn: its weights are damaged, or its "
            "training diverged. Check the files with `nextword verify`, or take an earlier checkpoint."
        )
    if sampling.logit_bias:
        ids, values = zip(*sampling.logit_bias.items(), strict=True)
        logits = logits.index_add(0, torch.tensor(ids), torch.tensor(values, dtype=torch.float64))
    if sampling.repetition_penalty != 1 and len(history):
        seen_ids = torch.tensor(sorted(set(history)), device=logits.device)
        scores, penalty = logits[seen_ids], sampling.repetition_penalty
        logits = logits.index_copy(0, seen_ids, torch.where(scores > 0, scores / penalty, scores * penalty))
    if (sampling.presence_penalty or sampling.frequency_penalty) and len(generated):
        ids, counts = torch.tensor(list(generated)).unique(return_counts=True)
        logits = logits.index_add(0, ids, -(sampling.presence_penalty + sampling.frequency_penalty * counts.double()))
    return logits if allowed_mask is None else logits.masked_fill(~allowed_mask, -math.inf)


def filter_logits(
    logits: Tensor,
    sampling: Sampling,
    history: Sequence[int] = (),
    generated: Sequence[int] = (),
    allowed_mask: Tensor | None = None,
) -> Tensor:
    """The logits [V] that are drawn from, in float64; what is ruled out is minus infinity, and the largest is 0. Arguments
    and errors are those of `score`."""
    logits = apply_penalties(logits, sampling, history, generated, allowed_mask)
    if sampling.temperature == 0:
        return torch.full_like(logits, -math.inf).index_fill(0, logits.argmax(), 0.0)
    # The largest becomes 0 before the division, so that no temperature makes it infinite.
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        probability, order = logits.softmax(0).sort(descending=True, stable=True)
        likelier_mass = (
            probability.cumsum(0) - probability
        )  # the mass of all likelier tokens; 0 for the first, so it stays
        logits = logits.index_fill(0, order[likelier_mass >= sampling.top_p], -math.inf)
    if sampling.min_p:
        # p < min_p · max p, as logits: the largest of them is 0
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits


def probabilities(
    logits: Tensor,
    sampling: Sampling,
    history: Sequence[int] = (),
    generated: Sequence[int] = (),
    allowed_mask: Tensor | None = None,
) -> Tensor:
    """The probability [V], float64, with which each token is drawn. Arguments and errors are those of `score`."""
    return filter_logits(logits, sampling, history, generated, allowed_mask).softmax(0)


def sample(
    logits: Tensor,
    sampling: Sampling,
    history: Sequence[int],
    generated: Sequence[int],
    generator: torch.Generator,
    allowed_mask: Tensor | None = None,
) -> int:
    """The id of the next token. Arguments and errors are those of `score`.

    One number of the (CPU) generator decides: the first token at which the summed probability passes it is taken.
    Greedy sampling needs none.
    """
    if sampling.temperature == 0:
        return int(apply_penalties(logits, sampling, history, generated, allowed_mask).argmax())
    cumulative = probabilities(logits, sampling, history, generated, allowed_mask).cumsum(0)
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
