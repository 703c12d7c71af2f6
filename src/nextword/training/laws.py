"""What a run will reach by its size, its tokens and its text: laws of the literature, their constants fitted to runs made
here (`python -m benchmarks.laws`; docs/experiments.md has the runs, and where published constants did not hold).

Tokens are counted as the bytes that they stand for, so that one law serves every vocabulary.
"""

import math
from dataclasses import astuple, dataclass

from nextword.text.corpus import Corpus
from nextword.text.ngrams import ngram_bits

COUNTED = 2**18  # tokens that the difficulty of a text is counted in: a second's work, and most texts have them


@dataclass(frozen=True)
class Law:
    """bits = difficulty^taste · (floor + (N₀ / N)^α + (D₀ / D′)^β): Hoffmann et al. 2022, equation 2, relative to how hard
    the text is for counting alone.

    D′ = U (1 + R* (1 − e^(−R / R*))) are the bytes that D, read R times beyond the first, are worth (Muennighoff et al.
    2023, equation 5; R* is `half_life`).
    """

    floor: float = 0.45
    parameters_scale: float = 1e3
    alpha: float = 0.25
    bytes_scale: float = 1e5
    beta: float = 0.3
    half_life: float = 15.4
    taste: float = 1.0

    def constants(self) -> tuple[float, ...]:
        return astuple(self)

    def worth(self, read: float, unique: float) -> float:
        """The unread bytes that so many bytes of reading are worth, of a text of `unique` bytes."""
        if read <= unique:
            return read
        again = read / unique - 1
        return unique * (1 + self.half_life * -math.expm1(-again / self.half_life))

    def bits(self, parameters: float, read: float, unique: float, difficulty: float) -> float:
        """Bits per byte of held-out text: parameters (embeddings included), bytes read in all, bytes of the text, and its
        difficulty (see `difficulty`)."""
        worth = self.worth(read, unique)
        lost = (self.parameters_scale / parameters) ** self.alpha + (self.bytes_scale / worth) ** self.beta
        return difficulty**self.taste * (self.floor + lost)


def difficulty(corpus: Corpus) -> float:
    """Bits per byte of a corpus's held-out text for trigrams counted in its beginning."""
    bits = ngram_bits(corpus.tokens("train"), corpus.tokens("validation"), corpus.tokenizer.vocab_size, most=COUNTED)
    return bits * corpus.validation.tokens / max(1, corpus.validation.bytes)
