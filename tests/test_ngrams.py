"""The counting model: its probabilities are the formula's and sum to one, and more text of a kind is easier."""

import math
from collections import Counter

import numpy as np
import pytest

from nextword.data.dataset import InMemoryTokens
from nextword.data.ngrams import DISCOUNT, SAMPLE_BLOCK_TOKENS, ngram_bits, sample_evenly


def by_hand(train: list[int], context: tuple[int, ...], word: int, vocabulary: int, order: int = 3) -> float:
    """P(word | at most order - 1 tokens of context), as the papers write it."""
    counts: dict[tuple[int, ...], int] = Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))
    levels = [counts]
    for length in range(order, 1, -1):  # below the longest: after how many different tokens
        kinds = {tuple(train[i : i + length]) for i in range(len(train) - length + 1)}
        levels.append(Counter(gram[1:] for gram in kinds))
    probability = 1 / vocabulary
    for length, known in enumerate(reversed(levels)):
        before = context[len(context) - length :]
        found = {gram[-1]: count for gram, count in known.items() if gram[:-1] == before}
        if length <= len(context) and found:
            here = max(found.get(word, 0) - DISCOUNT, 0) + DISCOUNT * len(found) * probability
            probability = here / sum(found.values())
    return probability


@pytest.mark.parametrize("order", [2, 3, 5])
def test_it_is_the_formula(order: int) -> None:
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 6, 200).tolist(), rng.integers(0, 7, 40).tolist()
    contexts = [tuple(held_out[max(0, i - order + 1) : i]) for i in range(40)]
    expected = [-math.log2(by_hand(train, contexts[i], held_out[i], 7, order)) for i in range(40)]
    found = ngram_bits(InMemoryTokens(np.array(train)), InMemoryTokens(np.array(held_out)), 7, order=order)
    assert found == pytest.approx(sum(expected) / 40, rel=1e-12)
    assert sum(by_hand(train, tuple(train[: order - 1]), word, 7, order) for word in range(7)) == pytest.approx(1)
    cut = ngram_bits(InMemoryTokens(np.array(train)), InMemoryTokens(np.array(held_out)), 7, max_tokens=30, order=order)
    assert cut == ngram_bits(
        InMemoryTokens(np.array(train[:30])), InMemoryTokens(np.array(held_out[:30])), 7, order=order
    )


def test_of_a_vocabulary_that_is_too_large_the_runs_are_shorter() -> None:
    """Three tokens of three million are more than one number holds; two are not."""
    row = InMemoryTokens(np.random.default_rng(0).integers(0, 1_500_000, 500) // 100_000 * 100_000)
    assert ngram_bits(row, row, 1_500_000) != ngram_bits(row, row, 1_500_000, order=2)
    assert ngram_bits(row, row, 3_000_000) == ngram_bits(row, row, 3_000_000, order=2)


def test_a_text_like_the_one_that_was_counted_is_easier() -> None:
    text = np.array(list(b"the house on the hill and the mill by the hill " * 20))
    noise = np.random.default_rng(0).integers(32, 122, len(text))
    easy = ngram_bits(InMemoryTokens(text[:700]), InMemoryTokens(text[700:]), 128)
    assert easy < 1 < 5 < ngram_bits(InMemoryTokens(text[:700]), InMemoryTokens(noise), 128)
    assert easy < ngram_bits(InMemoryTokens(text[:60]), InMemoryTokens(text[700:]), 128)
    assert ngram_bits(InMemoryTokens(text[:2]), InMemoryTokens(text), 128) == 7


def test_a_part_is_taken_from_all_over_a_text() -> None:
    text = InMemoryTokens(np.arange(100 * SAMPLE_BLOCK_TOKENS))
    part = sample_evenly(text, 10 * SAMPLE_BLOCK_TOKENS)
    assert len(part) == 10 * SAMPLE_BLOCK_TOKENS and part[0] == 0 and part[-1] == len(text) - 1
    starts = part[::SAMPLE_BLOCK_TOKENS]
    assert set(np.diff(starts)) == {11 * SAMPLE_BLOCK_TOKENS}
    assert sample_evenly(text, len(text)).tolist() == text.tokens.tolist()
    # A sorted text: its beginning says little of the rest.
    ordered, max_tokens = np.repeat(np.arange(100), 200), 8 * SAMPLE_BLOCK_TOKENS
    beginning = ngram_bits(InMemoryTokens(ordered[:most]), InMemoryTokens(ordered), 100)
    assert ngram_bits(InMemoryTokens(ordered), InMemoryTokens(ordered), 100, max_tokens=most) < 0.5 * beginning
