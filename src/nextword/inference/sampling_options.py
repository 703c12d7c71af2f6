"""Sampling parameters: their names, ranges, descriptions, and the defaults of commands, server and engine."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from nextword.common import numbers
from nextword.common.errors import UsageError
from nextword.common.options import as_strings, option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How new tokens are sampled.

    Attributes:
        max_tokens: Maximum number of new tokens per text.
        temperature: Sampling temperature. 0 is greedy decoding; higher values give more varied text.
        top_k: Top-k sampling (Fan et al. 2018): keep the k most likely tokens. Default: all tokens.
        top_p: Top-p (nucleus) sampling (Holtzman et al. 2020): keep the smallest set of most likely tokens with this total
            probability; 1 keeps all. Default: 1.
        min_p: Min-p sampling (Nguyen et al. 2024): keep tokens with at least this fraction of the most likely token's
            probability. Default: all tokens.
        repetition_penalty: Values above 1 make tokens that are already in the text less likely (Keskar et al. 2019).
        stop: Text at which a sample ends. May be given more than once. Default: none.
        seed: Random seed of the sampling. Default: a new one each time.
    """

    max_tokens: numbers.CountOrZero = 200
    temperature: numbers.Temperature = 0.8
    top_k: numbers.Count | None = None
    top_p: numbers.PositiveShare | None = None
    min_p: numbers.Share | None = None
    repetition_penalty: numbers.RepetitionPenalty = 1.0
    stop: tuple[str, ...] = option(default=(), converter=as_strings)
    seed: numbers.Seed | None = None

    def sampling(self) -> "Sampling":
        """The sampling parameters. Raises `UsageError` for one that is out of its range."""
        return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling) if hasattr(self, f.name)})


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingOptions):
    """Sampling parameters. None switches a parameter off.

    Biases and penalties are applied to the logits first, then temperature, top_k, top_p and min_p in this order.

    Attributes:
        presence_penalty: Subtracted from the logits of tokens that were sampled before.
        frequency_penalty: Subtracted from the logits of a token each time that it was sampled before.
        logit_bias: Added to the logits of single tokens, by token id.
        logprobs: Number of alternatives whose log-probabilities are returned with each token.
        prompt_logprobs: The same for the tokens of the prompt.

    Raises:
        UsageError: A parameter is out of range.
    """

    presence_penalty: numbers.Penalty = option(default=0.0, python_only=True)
    frequency_penalty: numbers.Penalty = option(default=0.0, python_only=True)
    logit_bias: Mapping[int, float] | None = option(default=None, python_only=True)
    logprobs: numbers.CountOrZero | None = option(default=None, python_only=True)
    prompt_logprobs: numbers.CountOrZero | None = option(default=None, python_only=True)

    def __post_init__(self) -> None:
        numbers.set_checked_numbers(self)
        if not all(map(math.isfinite, (self.logit_bias or {}).values())):
            raise UsageError(f"logit_bias must be finite numbers by token id, not {self.logit_bias!r}")
        stop: object = vars(self)["stop"]  # a string would be a sequence of strings, too
        if not (isinstance(stop, tuple) and all(self.stop)):
            raise UsageError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")
