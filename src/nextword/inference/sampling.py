"""The next token from the model's logits [V]: penalties, temperature, filters, and a draw."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextword.common import numbers
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

    temperature: numbers.Temperature = 0.8
    top_k: numbers.Count | None = None
    top_p: numbers.PositiveShare | None = None
    min_p: numbers.Share | None = None
    repetition_penalty: numbers.RepetitionPenalty = 1.0
    max_tokens: numbers.CountOrZero = 200
    stop: tuple[str, ...] = ()
    seed: numbers.Seed | None = None
    logprobs: numbers.CountOrZero | None = None
    prompt_logprobs: numbers.CountOrZero | None = None
    logit_bias: Mapping[int, float] | None = None
    presence_penalty: numbers.Penalty = 0.0
    frequency_penalty: numbers.Penalty = 0.0

    def __post_init__(self) -> None:
        for name, number in numbers.check_numbers(type(self), vars(self)):
            object.__setattr__(self, name, number)
        if not all(map(math.isfinite, (self.logit_bias or {}).values())):
            raise UsageError(f"logit_bias must be finite numbers by token id, not {self.logit_bias!r}")
        stop: object = vars(self)["stop"]  # a string would be a sequence of strings, too
        if not (isinstance(stop, tuple) and all(self.stop)):
            raise UsageError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")


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


def top_logprobs(logits: Tensor, token: int, count: int, vocab_size: int | None = None) -> TokenLogprob:
    """The log-probability of a token and of the `count` most likely ones.

    Args:
        logits: The model's logits, [V].
        token: Token id.
        count: Number of tokens.
        vocab_size: Size of the tokenizer's vocabulary, from which the most likely ones are. Default: all of V.
    """
    logprobs = logits.double().log_softmax(0)[:vocab_size]
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
        mass_before = (probability.cumsum(0) - probability)[1:]  # the most likely token always stays
        logits = logits.index_fill(0, order[1:][mass_before >= sampling.top_p], -math.inf)
    if sampling.min_p:
        # p < min_p · max p
        logits = logits.masked_fill(logits < logits.max() + math.log(sampling.min_p), -math.inf)
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
