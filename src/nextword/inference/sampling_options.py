"""Sampling parameters: their names, ranges and descriptions, and the defaults of engine, commands, server and page."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nextword.common import fs, numbers
from nextword.common.errors import CorruptFileError, UsageError
from nextword.common.options import as_strings, option

GENERATION_CONFIG = "generation_config.json"
MAX_CONFIG_BYTES = 2**23
# The names in generation_config.json of what nextword samples with.
GENERATION_CONFIG_KEYS = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How new tokens are sampled.

    Attributes:
        max_tokens: Maximum number of new tokens per text. Default: that of the model's generation_config.json, or 200.
        temperature: Sampling temperature. 0 is greedy decoding; higher values give more varied text. Default: that of the
            model's generation_config.json, or 0.8.
        top_k: Top-k sampling (Fan et al. 2018): keep the k most likely tokens; 0 keeps all. Default: that of the model's
            generation_config.json, or all.
        top_p: Top-p (nucleus) sampling (Holtzman et al. 2020): keep the smallest set of most likely tokens with this total
            probability; 1 keeps all. Default: that of the model's generation_config.json, or 1.
        min_p: Min-p sampling (Nguyen et al. 2024): keep tokens with at least this fraction of the most likely token's
            probability; 0 keeps all. Default: that of the model's generation_config.json, or 0.
        repetition_penalty: Values above 1 make tokens that are already in the text less likely (Keskar et al. 2019). Default:
            that of the model's generation_config.json, or 1.
        stop: Text at which a sample ends. May be given more than once. Default: none.
        seed: Random seed of the sampling. Default: a new one each time.
        presence_penalty: Subtracted from the logits of tokens that were sampled before.
        frequency_penalty: Subtracted from the logits of a token each time that it was sampled before.
        logit_bias: Added to the logits of single tokens, by token id.
        logprobs: Number of alternatives whose log-probabilities are returned with each token.
        prompt_logprobs: The same for the tokens of the prompt.
    """

    max_tokens: numbers.CountOrZero | None = None
    temperature: numbers.Temperature | None = None
    top_k: numbers.CountOrZero | None = None
    top_p: numbers.PositiveShare | None = None
    min_p: numbers.Share | None = None
    repetition_penalty: numbers.RepetitionPenalty | None = None
    stop: tuple[str, ...] = option(default=(), converter=as_strings)
    seed: numbers.Seed | None = None
    presence_penalty: numbers.Penalty = option(default=0.0, python_only=True)
    frequency_penalty: numbers.Penalty = option(default=0.0, python_only=True)
    logit_bias: Mapping[int, float] | None = option(default=None, python_only=True)
    logprobs: numbers.CountOrZero | None = option(default=None, python_only=True)
    prompt_logprobs: numbers.CountOrZero | None = option(default=None, python_only=True)

    def sampling(self, defaults: "Sampling") -> "Sampling":
        """The parameters that are given, and otherwise the defaults. Raises `UsageError` for one that is out of its range."""
        values = {f.name: getattr(self, f.name) for f in fields(Sampling)}
        return replace(defaults, **{name: value for name, value in values.items() if value not in (None, ())})


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingOptions):
    """Sampling parameters, with the defaults of a model without a generation_config.json.

    Biases and penalties are applied to the logits first, then temperature, top_k, top_p and min_p in this order.

    Raises:
        UsageError: A parameter is out of range.
    """

    max_tokens: numbers.CountOrZero = 200
    temperature: numbers.Temperature = 0.8
    repetition_penalty: numbers.RepetitionPenalty = 1.0

    def __post_init__(self) -> None:
        numbers.set_checked_numbers(self)
        if not all(map(math.isfinite, (self.logit_bias or {}).values())):
            raise UsageError(f"logit_bias must be finite numbers by token id, not {self.logit_bias!r}")
        stop: object = vars(self)["stop"]  # a string would be a sequence of strings, too
        if not (isinstance(stop, tuple) and all(self.stop)):
            raise UsageError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")


def read_sampling_defaults(directory: Path) -> Sampling:
    """The sampling parameters of a model directory: those of its generation_config.json, otherwise those of `Sampling`.

    As in transformers, no other parameter counts beside `do_sample: false`, which is greedy decoding.

    Raises:
        CorruptFileError: the file is malformed, or a value is out of its range.
    """
    file = directory / GENERATION_CONFIG
    content: dict[str, Any] = fs.read_json_object(file, MAX_CONFIG_BYTES) if os.path.lexists(file) else {}
    if not isinstance(do_sample := content.get("do_sample"), bool | None):
        raise CorruptFileError(f"{file}: do_sample must be true or false, not {do_sample!r}")
    values: dict[str, Any] = {}
    types = numbers.number_types(Sampling)
    for key, name in GENERATION_CONFIG_KEYS.items():
        if (value := content.get(key)) is not None:
            kind, allowed, _ = types[name]
            try:
                values[name] = allowed.check(value, kind, f"{file}: {key}")
            except UsageError as error:
                raise CorruptFileError(str(error)) from error
    if do_sample is False:
        values["temperature"] = 0.0
    return Sampling(**values)
