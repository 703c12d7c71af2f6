"""How predictable a text is for an n-gram model: the measure from which a plan estimates the loss of a GPT.

An interpolated Kneser-Ney trigram model (Kneser and Ney 1995; Chen and Goodman 1999, section 3.6), computed by sorting.
"""

import math

import numpy as np

from nextword.data.dataset import TokenArray, TokenSource

ORDER, DISCOUNT = 3, 0.75
MAX_TOKENS = 2**22  # a second of sorting
SAMPLE_BLOCK_TOKENS = 1024  # the n-grams across the joints of blocks are too few to matter


def ngram_bits(
    train: TokenSource, validation: TokenSource, vocab_size: int, *, max_tokens: int = MAX_TOKENS, order: int = ORDER
) -> float:
    """The cross entropy of the validation tokens under an n-gram model of the training tokens.

    Args:
        train: the tokens that are counted.
        validation: the tokens that are predicted.
        vocab_size: the number of different token ids.
        max_tokens: how many tokens of each are used at most, sampled evenly.
        order: the length of the n-grams. An n-gram is one 63-bit number, so that a large vocabulary shortens it.

    Returns:
        Bits per token; log2(vocab_size) if there are too few tokens.
    """
    order = min(order, int(62 / math.log2(max(2, vocab_size))))
    train_tokens, validation_tokens = (sample_evenly(source, max_tokens) for source in (train, validation))
    if len(train_tokens) <= order or len(validation_tokens) <= order:
        return math.log2(vocab_size)
    ngrams = [encode_ngrams(train_tokens, vocab_size, length) for length in range(1, order + 1)]
    probability = np.full(len(validation_tokens), 1.0 / vocab_size)
    for length in range(1, order + 1):
        keys, counts = np.unique(ngrams[length - 1], return_counts=True)
        if length < order:  # a lower order counts the different tokens before the n-gram, not its occurrences
            longer = np.unique(ngrams[length])
            keys, counts = np.unique(longer % vocab_size**length, return_counts=True)
        contexts, first = np.unique(keys // vocab_size, return_index=True)
        totals, distinct_followers = np.add.reduceat(counts, first), np.diff([*first, len(keys)])
        queries = encode_ngrams(validation_tokens, vocab_size, length)
        count = lookup_sorted(keys, counts, queries)
        total = lookup_sorted(contexts, totals, queries // vocab_size)
        distinct = lookup_sorted(contexts, distinct_followers, queries // vocab_size)
        lower_order = probability[length - 1 :]
        seen_context = total > 0
        discounted = np.maximum(count - DISCOUNT, 0) + DISCOUNT * distinct * lower_order
        lower_order[seen_context] = discounted[seen_context] / total[seen_context]
    return float(-np.log2(probability).mean())


def sample_evenly(source: TokenSource, max_tokens: int) -> TokenArray:
    """At most `max_tokens` tokens, in blocks at equal distances over the whole source. Returns int64 [T].

    The beginning alone may be one book of many, or the short lines of a sorted file.
    """
    if len(source) <= max_tokens:
        return source.read(0, len(source)).astype(np.int64)
    block_size = min(SAMPLE_BLOCK_TOKENS, max_tokens)
    starts = np.linspace(0, len(source) - block_size, max(1, max_tokens // block_size)).astype(int)
    return np.concatenate([source.read(int(start), block_size) for start in starts]).astype(np.int64)


def encode_ngrams(tokens: TokenArray, vocab_size: int, order: int) -> TokenArray:
    """Every n-gram of `order` tokens as one number. tokens [T] → int64 [T − order + 1]."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, order)
    return windows @ vocab_size ** np.arange(order - 1, -1, -1)


def lookup_sorted(keys: TokenArray, values: TokenArray, queries: TokenArray) -> TokenArray:
    """The value of each query among sorted keys, 0 if it is not there."""
    indices = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[indices] == queries, values[indices], 0)
