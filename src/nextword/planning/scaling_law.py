"""What a run will reach by its size, its tokens and its text: laws of the literature, their constants fitted to runs made
here (`python -m benchmarks.laws`): fifty-one, on six texts and parts of three of them.

Tokens are counted as the bytes that they stand for, so that one law serves every vocabulary.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenSource
from nextword.data.ngrams import ORDER, ngram_bits

COUNTED = 2**18  # tokens that the difficulty of a text is counted in: a second's work, and most texts have them
# What four times as many tokens gain the next time, of what they gained the last, on the texts of the fit.
SLOWING = 0.83


@dataclass(frozen=True)
class Law:
    """bits = difficulty^taste · (floor + (N₀ / N)^α + (D₀ / D′)^β + c (N / U)^γ R): Hoffmann et al. 2022, equation 2, relative
    to how hard the text is for counting alone.

    D′ = U (1 + R* (1 − e^(−R / R*))) are the bytes that D, read R times beyond the first, are worth (Muennighoff et al.
    2023, equation 5; R* is `half_life`). What the last term adds is memorised: the more, the larger a model is for its text
    (c is `memorising`, γ `swelling`). Since the best weights are kept, R is never more than what is best.
    """

    floor: float = 0.642
    parameters_scale: float = 1391.0
    alpha: float = 0.354
    bytes_scale: float = 6.22e4
    beta: float = 0.391
    half_life: float = 15.0
    taste: float = 0.937
    memorising: float = 0.00581
    swelling: float = 0.344
    # The share within which four runs of five are expected to end: 0.043 on a text that is left out of the fit, and what a
    # machine's speed may be off by.
    spread: float = 0.06

    @classmethod
    def fitted(cls) -> list[str]:
        """The names of what is fitted, in this order."""
        return [field.name for field in fields(cls)][:-1]

    def worth(self, again: float, unique: float) -> float:
        """The unread bytes that a text of `unique` bytes is worth, read so many times beyond the first."""
        return unique * (1 + self.half_life * -math.expm1(-again / self.half_life))

    def bits(self, parameters: float, read: float, unique: float, difficulty: float) -> float:
        """Bits per byte of held-out text: parameters (embeddings included), bytes read in all, bytes of the text, and its
        difficulty (see `difficulty`)."""
        return difficulty**self.taste * (self.floor + sum(self.losses(parameters, read, unique)))

    def interval(self, bits: float, doubt: float) -> tuple[float, float]:
        """From where to where four runs of five end, of a text whose difficulty is in doubt by this share."""
        spread = self.spread + self.taste * doubt
        return bits * (1 - spread), bits * (1 + spread)

    def losses(self, parameters: float, read: float, unique: float) -> tuple[float, float, float]:
        """What the model's size and the reading leave to be wished for, and what is memorised, as shares of the difficulty."""
        again = self.useful(parameters, read, unique)
        worth = read if read <= unique else self.worth(again, unique)
        by_size = (self.parameters_scale / parameters) ** self.alpha
        return by_size, (self.bytes_scale / worth) ** self.beta, self.memory(parameters, unique) * again

    def memory(self, parameters: float, unique: float) -> float:
        """What reading a text once again does harm."""
        return self.memorising * (parameters / unique) ** self.swelling

    def useful(self, parameters: float, read: float, unique: float) -> float:
        """How many times beyond the first a text is read until the model is at its best, or the reading ends."""
        least, most, harm = 0.0, max(0.0, read / unique - 1), self.memory(parameters, unique)
        if most == 0 or self.gain(most, unique) >= harm:
            return most
        for _ in range(50):  # the gain falls: halve to where it is the harm
            middle = (least + most) / 2
            least, most = (middle, most) if self.gain(middle, unique) > harm else (least, middle)
        return least

    def gain(self, again: float, unique: float) -> float:
        """How much less reading a text leaves to be wished for, for each time more."""
        worth = self.worth(again, unique)
        return self.beta * (self.bytes_scale / worth) ** self.beta * unique * math.exp(-again / self.half_life) / worth

    def slopes(self, parameters: float, read: float, unique: float) -> tuple[float, float]:
        """How much less is lost with a small share more of parameters, and of reading."""
        by_size, by_reading, memorised = self.losses(parameters, read, unique)
        by_size = self.alpha * by_size - self.swelling * memorised
        if read <= unique:
            return by_size, self.beta * by_reading
        again = read / unique - 1
        return by_size, max(0.0, self.gain(again, unique) - self.memory(parameters, unique)) * read / unique


class Difficulty(NamedTuple):
    """Bits for trigrams, and the share that these may be off by, since they were not counted in enough of a text."""

    bits: float
    doubt: float = 0.0


def difficulty(corpus: Corpus) -> Difficulty:
    """Per byte of a corpus's held-out text, for trigrams counted in a part of it; of characters, for as many as have nine
    bytes, about what three tokens of a vocabulary have."""
    order, train = ORDER, corpus.train
    if corpus.tokenizer.kind == "char":
        order = max(ORDER, round(9 * train.tokens / max(1, train.bytes)))
    found = counted(corpus.tokens("train"), corpus.tokens("validation"), corpus.tokenizer.vocab_size, order)
    return found._replace(bits=found.bits * corpus.validation.tokens / max(1, corpus.validation.bytes))


def counted(train: TokenSource, held_out: TokenSource, vocab_size: int, order: int = ORDER) -> Difficulty:
    """Per token, for runs of `order` tokens counted in `COUNTED` tokens. Of a shorter text, what it would be were it so long:
    by what its last three quarters gained, and half of that in doubt. For a text is not the harder for being short, and what
    its length means for a model is in the law by itself."""
    bits = ngram_bits(train, held_out, vocab_size, most=COUNTED, order=order)
    if len(train) >= COUNTED or len(train) < 4:
        return Difficulty(bits)
    fewer = ngram_bits(train, held_out, vocab_size, most=len(train) // 4, order=order)
    gained = max(0.0, fewer - bits)
    times = math.log(COUNTED / len(train), 4)
    more = SLOWING * (1 - SLOWING**times) / (1 - SLOWING)  # SLOWING + SLOWING² + … , `times` of them
    long = max(bits / 2, bits - gained * more)
    return Difficulty(long, (bits - long) / 2 / long)
