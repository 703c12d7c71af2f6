"""The next token from the model's logits [V]: penalties, temperature, filters, and a draw."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. None switches a parameter off.

    Biases and penalties are applied to the logits first, then temperature, top_k, top_p and min_p in this order.

    Attributes:
        temperature: Divides the logits. Below 1 is more conservative, above 1 more diverse, 0 is greedy decoding.
        top_k: Sample from the k most likely tokens (Fan et al. 2018, section 5.4).
        top_p: Sample from the smallest set of tokens with this total probability (Holtzman et al. 2020, section 3.1).
        min_p: Sample from tokens at least this times as likely as the most likely one (Nguyen et al. 2024, section 3).
        repetition_penalty: Above 1 makes tokens that already are in the text less likely (Keskar et al. 2019, section 4.1).
        max_tokens: Maximum number of generated tokens.
        stop: The text ends before the first of these strings.
        seed: The same seed gives the same text. Default: the engine's seed.
        logprobs: Return the log-probability of each generated token and of this many most likely tokens.
        prompt_logprobs: The same for the tokens of the prompt.
        logit_bias: Added to the logits of single tokens, by token id.
        presence_penalty: Subtracted from the logit of each token that was generated before.
        frequency_penalty: Subtracted for each time that it was generated.

    Raises:
        UsageError: A parameter is out of range.
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
        def check(name: str, is_valid: bool, expected: str) -> None:
            if not is_valid:
                raise UsageError(f"{name} must be {expected}, not {getattr(self, name)!r}")

        def is_count(value: object, minimum: float, optional: bool = True) -> bool:
            return (optional and value is None) or (isinstance(value, int) and value >= minimum)

        check("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 is greedy decoding)")
        check("top_k", is_count(self.top_k, 1), "an integer of at least 1")
        check("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 has no effect)")
        check("max_tokens", is_count(self.max_tokens, 0, optional=False), "an integer of at least 0")
        check("presence_penalty", math.isfinite(self.presence_penalty), "a finite number")
        check("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")
        biases = (self.logit_bias or {}).values()
        check("logit_bias", all(math.isfinite(bias) for bias in biases), "finite numbers by token id")
        check("logprobs", is_count(self.logprobs, 0), "an integer of at least 0")
        check("prompt_logprobs", is_count(self.prompt_logprobs, 0), "an integer of at least 0")
        check("seed", is_count(self.seed, -math.inf), "an integer")
        stop: object = vars(self)["stop"]  # a string would be a sequence of strings, too
        check("stop", isinstance(stop, tuple) and all(self.stop), "a tuple of non-empty strings")


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token under the model's own distribution.

    Attributes:
        token: Token id.
        logprob: Its log-probability.
        top_logprobs: The most likely tokens and their log-probabilities.
    """

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


def top_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """The log-probability of a token and of the `count` most likely ones.

    Args:
        logits: The model's logits, [V].
        token: Token id.
        count: Number of tokens.
    """
    logprobs = logits.double().log_softmax(0)
    values, ids = logprobs.topk(min(max(0, count), len(logprobs)))
    return TokenLogprob(
        token, float(logprobs[token]), tuple(zip(ids.numpy().tolist(), values.numpy().tolist(), strict=True))
    )


def apply_penalties(
    logits: Tensor,
    sampling: Sampling,
    history: Sequence[int] = (),
    generated: Sequence[int] = (),
    allowed_mask: Tensor | None = None,
) -> Tensor:
    """Apply biases, penalties and the mask of allowed tokens.

    Args:
        logits: The model's logits, [V].
        sampling: Sampling parameters.
        history: Token ids of the text so far, for the repetition penalty.
        generated: The generated ones among them, for presence and frequency penalty.
        allowed_mask: Boolean [V], the tokens that may follow. Default: all.

    Returns:
        [V] in float64.

    Raises:
        NextwordError: The logits are not finite.
    """
    logits = logits.double()
    if not torch.isfinite(logits).all():
        raise NextwordError(
            "the model's logits are not finite: its weights are damaged, or its training diverged. "
            "Check the files with `nextword verify`, or use an earlier checkpoint."
        )
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias.items(), strict=True)
        logits = logits.index_add(0, torch.tensor(ids), torch.tensor(biases, dtype=torch.float64))
    if sampling.repetition_penalty != 1 and len(history):
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        scores, penalty = logits[seen], sampling.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))
    if (sampling.presence_penalty or sampling.frequency_penalty) and len(generated):
        counts = Counter(generated)
        repetitions = torch.tensor(list(counts.values()), dtype=torch.float64)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * repetitions
        logits = logits.index_add(0, torch.tensor(list(counts)), -penalties)
    return logits if allowed_mask is None else logits.masked_fill(~allowed_mask, -math.inf)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probability of each token after temperature and filters.

    Args:
        logits: Logits [V], with penalties applied.
        sampling: Sampling parameters.

    Returns:
        [V] in float64.
    """
    logits = logits.double()
    if sampling.temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    # Shifted before the division, so that no temperature overflows.
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        probability, order = logits.softmax(0).sort(descending=True, stable=True)
        mass_before = probability.cumsum(0) - probability  # 0 for the most likely token, which always stays
        logits = logits.index_fill(0, order[mass_before >= sampling.top_p], -math.inf)
    if sampling.min_p:
        # p < min_p · max p; the largest logit is 0.
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits.softmax(0)


def sample(
    logits: Tensor,
    sampling: Sampling,
    history: Sequence[int],
    generated: Sequence[int],
    generator: torch.Generator,
    allowed_mask: Tensor | None = None,
) -> int:
    """Draw the id of the next token by inverting the cumulative distribution. Errors as in `apply_penalties`.

    Args:
        logits: See `apply_penalties`, as the other arguments.
        sampling: Sampling parameters.
        history: Token ids of the text so far.
        generated: The generated ones among them.
        generator: A generator on the CPU; one number is drawn, none with temperature 0.
        allowed_mask: Tokens that may follow.
    """
    logits = apply_penalties(logits, sampling, history, generated, allowed_mask)
    if sampling.temperature == 0:
        return int(logits.argmax())
    cumulative = probabilities(logits, sampling).cumsum(0)
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
