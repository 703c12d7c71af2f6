"""How hard a text is to predict for counting alone: the yardstick by which a plan guesses what a model will reach.

An interpolated Kneser-Ney model of three tokens (Kneser and Ney 1995; Chen and Goodman 1999, section 3.6) in a few sorts.
"""

import math

import numpy as np

from nextword.data.dataset import TokenSource

ORDER, DISCOUNT = 3, 0.75
MOST = 2**22  # tokens that are counted at most: a second of sorting
PIECE = 1024  # tokens that stand together where not all are counted; the few runs of three across a joint do no harm


def ngram_bits(
    train: TokenSource, held_out: TokenSource, vocab_size: int, *, most: int = MOST, order: int = ORDER
) -> float:
    """Bits per token of the held-out tokens under runs of `order` tokens counted in the others; `most` of each, from all over
    it. A run is told by one number of 63 bits, so that of a large vocabulary it is cut to what that holds."""
    order = min(order, int(62 / math.log2(max(2, vocab_size))))
    counted, predicted = (evenly(source, most).astype(np.int64) for source in (train, held_out))
    if len(counted) <= order or len(predicted) <= order:
        return math.log2(vocab_size)
    grams = [grams_of(counted, vocab_size, length) for length in range(1, order + 1)]
    probability = np.full(len(predicted), 1.0 / vocab_size)
    for length in range(1, order + 1):
        kinds, counts = np.unique(grams[length - 1], return_counts=True)
        if length < order:  # not how often, but after how many different tokens
            longer = np.unique(grams[length])
            kinds, counts = np.unique(longer % vocab_size**length, return_counts=True)
        contexts, first = np.unique(kinds // vocab_size, return_index=True)
        totals, followers = np.add.reduceat(counts, first), np.diff([*first, len(kinds)])
        asked = grams_of(predicted, vocab_size, length)
        count = look_up(kinds, counts, asked)
        total, distinct = (look_up(contexts, found, asked // vocab_size) for found in (totals, followers))
        below = probability[length - 1 :]
        known = total > 0
        here = np.maximum(count - DISCOUNT, 0) + DISCOUNT * distinct * below
        below[known] = here[known] / total[known]
    return float(-np.log2(probability).mean())


def evenly(source: TokenSource, most: int) -> np.ndarray:
    """At most so many tokens, in pieces at equal distances from the first to the last. A text's beginning alone may be one
    book of many, or the short lines of a sorted file."""
    if len(source) <= most:
        return source.read(0, len(source))
    piece = min(PIECE, most)
    starts = np.linspace(0, len(source) - piece, max(1, most // piece)).astype(int)
    return np.concatenate([source.read(int(start), piece) for start in starts])


def grams_of(tokens: np.ndarray, vocab_size: int, order: int) -> np.ndarray:
    """Each run of `order` tokens as one number, by its last token."""
    codes = np.zeros(len(tokens) - order + 1, dtype=np.int64)
    for i in range(order):
        codes = codes * vocab_size + tokens[i : len(tokens) - order + 1 + i]
    return codes


def look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each key (sorted), 0 where it is not there."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
