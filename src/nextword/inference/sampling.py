"""The next token from the model's logits [V]: penalties, temperature, filters, and a draw."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextword.common.errors import NextwordError
from nextword.inference.sampling_options import Sampling


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
    if sampling.top_k and sampling.top_k < len(logits):
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
