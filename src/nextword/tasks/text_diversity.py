"""How much texts repeat themselves and each other, by the words between spaces (of a script without spaces, characters)."""

from collections.abc import Iterator, Sequence


def split_words(text: str) -> list[str]:
    """What stands between spaces; of a text that has next to none, its characters."""
    tokens = text.split()
    return tokens if 20 * len(tokens) > len(text) else [character for character in text if not character.isspace()]


def repeated_ngram_fraction(tokens: Sequence[str], n: int = 4) -> float:
    """The share of a text's n-grams that it has had before: 1 − |distinct n-grams| / |n-grams| (Welleck et al. 2020, equation
    11); 0 of a text without any."""
    ngrams = list(_ngrams(tokens, n))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_n(token_lists: Sequence[Sequence[str]], n: int) -> float:
    """Distinct n-grams of all texts together, over all that there are (Li et al. 2016, section 5.2); 0 where there are none.

    It falls with the amount of text: compare amounts that are alike.
    """
    ngrams = [ngram for text in token_lists for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
