"""The n-gram model: its probabilities are those of the formula and sum to one, and similar text is more predictable."""

import math
from collections import Counter

import numpy as np
import pytest

from nextword.data.dataset import InMemoryTokens
from nextword.data.ngrams import DISCOUNT, SAMPLE_BLOCK_TOKENS, ngram_bits, sample_evenly


def probability_by_definition(train: list[int], context: tuple[int, ...], token: int, vocab_size: int, order: int):
    """P(token | at most order - 1 tokens of context), as the papers define it."""
    counts: dict[tuple[int, ...], int] = Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))
    levels = [counts]
    for length in range(order, 1, -1):  # a lower order counts distinct preceding tokens
        ngrams = {tuple(train[i : i + length]) for i in range(len(train) - length + 1)}
        levels.append(Counter(ngram[1:] for ngram in ngrams))
    probability = 1 / vocab_size
    for length, level in enumerate(reversed(levels)):
        suffix = context[len(context) - length :]
        followers = {ngram[-1]: count for ngram, count in level.items() if ngram[:-1] == suffix}
        if length <= len(context) and followers:
            discounted = max(followers.get(token, 0) - DISCOUNT, 0) + DISCOUNT * len(followers) * probability
            probability = discounted / sum(followers.values())
    return probability


@pytest.mark.parametrize("order", [2, 3, 5])
def test_bits_match_the_formula(order: int) -> None:
    rng = np.random.default_rng(0)
    train, validation = rng.integers(0, 6, 200), rng.integers(0, 7, 40)
    contexts = [tuple(validation[max(0, i - order + 1) : i].tolist()) for i in range(40)]
    bits = [
        -math.log2(probability_by_definition(train.tolist(), context, int(token), 7, order))
        for context, token in zip(contexts, validation, strict=True)
    ]
    result = ngram_bits(InMemoryTokens(train), InMemoryTokens(validation), 7, order=order)
    assert result == pytest.approx(sum(bits) / 40, rel=1e-12)
    context = tuple(train[: order - 1].tolist())
    total = sum(probability_by_definition(train.tolist(), context, token, 7, order) for token in range(7))
    assert total == pytest.approx(1)
    limited = ngram_bits(InMemoryTokens(train), InMemoryTokens(validation), 7, max_tokens=30, order=order)
    assert limited == ngram_bits(InMemoryTokens(train[:30]), InMemoryTokens(validation[:30]), 7, order=order)


def test_a_large_vocabulary_shortens_the_ngrams() -> None:
    """Three ids of a vocabulary of three million exceed 63 bits; two do not."""
    tokens = InMemoryTokens(np.random.default_rng(0).integers(0, 1_500_000, 500) // 100_000 * 100_000)
    assert ngram_bits(tokens, tokens, 1_500_000) != ngram_bits(tokens, tokens, 1_500_000, order=2)
    assert ngram_bits(tokens, tokens, 3_000_000) == ngram_bits(tokens, tokens, 3_000_000, order=2)


def test_similar_text_is_more_predictable() -> None:
    text = np.array(list(b"the house on the hill and the mill by the hill " * 20))
    noise = np.random.default_rng(0).integers(32, 122, len(text))
    train, validation = InMemoryTokens(text[:700]), InMemoryTokens(text[700:])
    similar = ngram_bits(train, validation, 128)
    assert similar < 1 < 5 < ngram_bits(train, InMemoryTokens(noise), 128)
    assert similar < ngram_bits(InMemoryTokens(text[:60]), validation, 128)
    assert ngram_bits(InMemoryTokens(text[:2]), InMemoryTokens(text), 128) == 7


def test_the_sample_is_spread_over_the_text() -> None:
    text = InMemoryTokens(np.arange(100 * SAMPLE_BLOCK_TOKENS))
    sample = sample_evenly(text, 10 * SAMPLE_BLOCK_TOKENS)
    assert len(sample) == 10 * SAMPLE_BLOCK_TOKENS and sample[0] == 0 and sample[-1] == len(text) - 1
    assert set(np.diff(sample[::SAMPLE_BLOCK_TOKENS])) == {11 * SAMPLE_BLOCK_TOKENS}
    assert sample_evenly(text, len(text)).tolist() == text.tokens.tolist()
    # The beginning of a sorted text says little about the rest.
    ordered, max_tokens = np.repeat(np.arange(100), 200), 8 * SAMPLE_BLOCK_TOKENS
    beginning = ngram_bits(InMemoryTokens(ordered[:max_tokens]), InMemoryTokens(ordered), 100)
    sampled = ngram_bits(InMemoryTokens(ordered), InMemoryTokens(ordered), 100, max_tokens=max_tokens)
    assert sampled < 0.5 * beginning
