"""How hard a text is to predict for counting alone: the yardstick by which a plan guesses what a model will reach.

An interpolated Kneser-Ney model of three tokens (Kneser and Ney 1995; Chen and Goodman 1999, section 3.6) in a few sorts.
"""

import math

import numpy as np

from nextword.data.dataset import TokenSource

ORDER, DISCOUNT = 3, 0.75
MAX_TOKENS = 2**22  # tokens that are counted at most: a second of sorting
SAMPLE_BLOCK_TOKENS = (
    1024  # tokens that stand together where not all are counted; the few runs of three across a joint do no harm
)


def ngram_bits(
    train: TokenSource, validation: TokenSource, vocab_size: int, *, max_tokens: int = MAX_TOKENS, order: int = ORDER
) -> float:
    """Bits per token of the held-out tokens under runs of `order` tokens counted in the others; `most` of each, from all over
    it. A run is told by one number of 63 bits, so that of a large vocabulary it is cut to what that holds."""
    order = min(order, int(62 / math.log2(max(2, vocab_size))))
    train_tokens, validation_tokens = (
        sample_evenly(source, max_tokens).astype(np.int64) for source in (train, validation)
    )
    if len(train_tokens) <= order or len(validation_tokens) <= order:
        return math.log2(vocab_size)
    grams = [encode_ngrams(train_tokens, vocab_size, length) for length in range(1, order + 1)]
    probability = np.full(len(validation_tokens), 1.0 / vocab_size)
    for length in range(1, order + 1):
        ngrams, counts = np.unique(grams[length - 1], return_counts=True)
        if length < order:  # not how often, but after how many different tokens
            longer = np.unique(grams[length])
            ngrams, counts = np.unique(longer % vocab_size**length, return_counts=True)
        contexts, first = np.unique(ngrams // vocab_size, return_index=True)
        totals, distinct_followers = np.add.reduceat(counts, first), np.diff([*first, len(ngrams)])
        queries = encode_ngrams(validation_tokens, vocab_size, length)
        count = lookup_sorted(ngrams, counts, queries)
        total, distinct = (
            lookup_sorted(contexts, found, queries // vocab_size) for found in (totals, distinct_followers)
        )
        lower_order = probability[length - 1 :]
        seen_context = total > 0
        discounted = np.maximum(count - DISCOUNT, 0) + DISCOUNT * distinct * lower_order
        lower_order[seen_context] = discounted[seen_context] / total[seen_context]
    return float(-np.log2(probability).mean())


def sample_evenly(source: TokenSource, max_tokens: int) -> np.ndarray:
    """At most so many tokens, in pieces at equal distances from the first to the last. A text's beginning alone may be one
    book of many, or the short lines of a sorted file."""
    if len(source) <= max_tokens:
        return source.read(0, len(source))
    block_size = min(SAMPLE_BLOCK_TOKENS, max_tokens)
    starts = np.linspace(0, len(source) - block_size, max(1, max_tokens // block_size)).astype(int)
    return np.concatenate([source.read(int(start), block_size) for start in starts])


def encode_ngrams(tokens: np.ndarray, vocab_size: int, order: int) -> np.ndarray:
    """Each run of `order` tokens as one number, by its last token."""
    codes = np.zeros(len(tokens) - order + 1, dtype=np.int64)
    for i in range(order):
        codes = codes * vocab_size + tokens[i : len(tokens) - order + 1 + i]
    return codes


def lookup_sorted(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The value of each key (sorted), 0 where it is not there."""
    indices = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[indices] == queries, values[indices], 0)
