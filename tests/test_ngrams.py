"""The counting model: its probabilities are the formula's and sum to one, and more text of a kind is easier."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from nextword.text.batches import TokenRow
from nextword.text.ngrams import DISCOUNT, PIECE, evenly, ngram_bits


def by_hand(train: list[int], context: tuple[int, ...], word: int, vocabulary: int) -> float:
    """P(word | at most two tokens of context), as the papers write it."""
    trigrams: dict[tuple[int, ...], int] = Counter(zip(train, train[1:], train[2:], strict=False))
    bigrams = Counter(gram[1:] for gram in trigrams)  # after how many different tokens
    unigrams = Counter(gram[1:] for gram in set(itertools.pairwise(train)))

    def level(counts: dict[tuple[int, ...], int], context: tuple[int, ...], below: float) -> float:
        found = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
        if not found:
            return below
        return (max(found.get(word, 0) - DISCOUNT, 0) + DISCOUNT * len(found) * below) / sum(found.values())

    probability = level(unigrams, (), 1 / vocabulary)
    if context:
        probability = level(bigrams, context[-1:], probability)
    return level(trigrams, context, probability) if len(context) == 2 else probability


def test_it_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 6, 200).tolist(), rng.integers(0, 7, 40).tolist()
    expected = [-math.log2(by_hand(train, tuple(held_out[max(0, i - 2) : i]), held_out[i], 7)) for i in range(40)]
    found = ngram_bits(TokenRow(np.array(train)), TokenRow(np.array(held_out)), 7)
    assert found == pytest.approx(sum(expected) / 40, rel=1e-12)
    assert sum(by_hand(train, (3, 4), word, 7) for word in range(7)) == pytest.approx(1)
    cut = ngram_bits(TokenRow(np.array(train)), TokenRow(np.array(held_out)), 7, most=30)
    assert cut == ngram_bits(TokenRow(np.array(train[:30])), TokenRow(np.array(held_out[:30])), 7)


def test_a_text_like_the_one_that_was_counted_is_easier() -> None:
    text = np.array(list(b"the house on the hill and the mill by the hill " * 20))
    noise = np.random.default_rng(0).integers(32, 122, len(text))
    easy = ngram_bits(TokenRow(text[:700]), TokenRow(text[700:]), 128)
    assert easy < 1 < 5 < ngram_bits(TokenRow(text[:700]), TokenRow(noise), 128)
    assert easy < ngram_bits(TokenRow(text[:60]), TokenRow(text[700:]), 128)
    assert ngram_bits(TokenRow(text[:2]), TokenRow(text), 128) == 7


def test_a_part_is_taken_from_all_over_a_text() -> None:
    text = TokenRow(np.arange(100 * PIECE))
    part = evenly(text, 10 * PIECE)
    assert len(part) == 10 * PIECE and part[0] == 0 and part[-1] == len(text) - 1
    starts = part[::PIECE]
    assert set(np.diff(starts)) == {11 * PIECE}
    assert evenly(text, len(text)).tolist() == text.tokens.tolist()
    # A sorted text: its beginning says little of the rest.
    ordered, most = np.repeat(np.arange(100), 200), 8 * PIECE
    beginning = ngram_bits(TokenRow(ordered[:most]), TokenRow(ordered), 100)
    assert ngram_bits(TokenRow(ordered), TokenRow(ordered), 100, most=most) < 0.5 * beginning
