"""How much texts repeat themselves and each other, by the words between spaces (of a script without spaces, characters)."""

from collections.abc import Iterator, Sequence


def words(text: str) -> list[str]:
    """What stands between spaces; of a text that has next to none, its characters."""
    parts = text.split()
    return parts if 20 * len(parts) > len(text) else [character for character in text if not character.isspace()]


def repeated(text: Sequence[str], n: int = 4) -> float:
    """The share of a text's n-grams that it has had before: 1 − |distinct n-grams| / |n-grams| (Welleck et al. 2020, equation
    11); 0 of a text without any."""
    found = list(_ngrams(text, n))
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct n-grams of all texts together, over all that there are (Li et al. 2016, section 5.2); 0 where there are none.

    It falls with the amount of text: compare amounts that are alike.
    """
    found = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def _ngrams(text: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(text[i : i + n]) for i in range(len(text) - n + 1))
