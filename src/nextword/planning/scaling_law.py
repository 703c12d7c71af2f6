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

NGRAM_SAMPLE_TOKENS = (
    2**18
)  # tokens that the difficulty of a text is counted in: a second's work, and most texts have them
# What four times as many tokens gain the next time, of what they gained the last, on the texts of the fit.
NGRAM_GAIN_DECAY = 0.83


@dataclass(frozen=True)
class ScalingLaw:
    """bits = difficulty^taste · (floor + (N₀ / N)^α + (D₀ / D′)^β + c (N / U)^γ R): Hoffmann et al. 2022, equation 2, relative
    to how hard the text is for counting alone.

    D′ = U (1 + R* (1 − e^(−R / R*))) are the bytes that D, read R times beyond the first, are worth (Muennighoff et al.
    2023, equation 5; R* is `half_life`). What the last term adds is memorised: the more, the larger a model is for its text
    (c is `memorising`, γ `swelling`). Since the best weights are kept, R is never more than what is best.
    """

    irreducible_loss: float = 0.642
    parameters_scale: float = 1391.0
    alpha: float = 0.354
    bytes_scale: float = 6.22e4
    beta: float = 0.391
    repeat_half_life: float = 15.0
    difficulty_exponent: float = 0.937
    memorization_coefficient: float = 0.00581
    memorization_exponent: float = 0.344
    # The share within which four runs of five are expected to end: 0.043 on a text that is left out of the fit, and what a
    # machine's speed may be off by.
    relative_error: float = 0.06

    @classmethod
    def fitted_fields(cls) -> list[str]:
        """The names of what is fitted, in this order."""
        return [field.name for field in fields(cls)][:-1]

    def effective_data(self, repeats: float, unique_bytes: float) -> float:
        """The unread bytes that a text of `unique` bytes is worth, read so many times beyond the first."""
        return unique_bytes * (1 + self.repeat_half_life * -math.expm1(-repeats / self.repeat_half_life))

    def bits_per_byte(self, parameters: float, train_bytes: float, unique_bytes: float, difficulty: float) -> float:
        """Bits per byte of held-out text: parameters (embeddings included), bytes read in all, bytes of the text, and its
        difficulty (see `difficulty`)."""
        return difficulty**self.difficulty_exponent * (
            self.irreducible_loss + sum(self.loss_terms(parameters, train_bytes, unique_bytes))
        )

    def prediction_interval(self, bits: float, uncertainty: float) -> tuple[float, float]:
        """From where to where four runs of five end, of a text whose difficulty is in doubt by this share."""
        spread = self.relative_error + self.difficulty_exponent * uncertainty
        return bits * (1 - spread), bits * (1 + spread)

    def loss_terms(self, parameters: float, train_bytes: float, unique_bytes: float) -> tuple[float, float, float]:
        """What the model's size and the reading leave to be wished for, and what is memorised, as shares of the difficulty."""
        repeats = self.useful_repeats(parameters, train_bytes, unique_bytes)
        effective_bytes = train_bytes if train_bytes <= unique_bytes else self.effective_data(repeats, unique_bytes)
        by_size = (self.parameters_scale / parameters) ** self.alpha
        return (
            by_size,
            (self.bytes_scale / effective_bytes) ** self.beta,
            self.memorization_per_repeat(parameters, unique_bytes) * repeats,
        )

    def memorization_per_repeat(self, parameters: float, unique_bytes: float) -> float:
        """What reading a text once again does harm."""
        return self.memorization_coefficient * (parameters / unique_bytes) ** self.memorization_exponent

    def useful_repeats(self, parameters: float, train_bytes: float, unique_bytes: float) -> float:
        """How many times beyond the first a text is read until the model is at its best, or the reading ends."""
        low, high, memorization = (
            0.0,
            max(0.0, train_bytes / unique_bytes - 1),
            self.memorization_per_repeat(parameters, unique_bytes),
        )
        if high == 0 or self.gain_per_repeat(high, unique_bytes) >= memorization:
            return high
        for _ in range(50):  # the gain falls: halve to where it is the harm
            middle = (low + high) / 2
            low, high = (middle, high) if self.gain_per_repeat(middle, unique_bytes) > memorization else (low, middle)
        return low

    def gain_per_repeat(self, repeats: float, unique_bytes: float) -> float:
        """How much less reading a text leaves to be wished for, for each time more."""
        effective_bytes = self.effective_data(repeats, unique_bytes)
        return (
            self.beta
            * (self.bytes_scale / effective_bytes) ** self.beta
            * unique_bytes
            * math.exp(-repeats / self.repeat_half_life)
            / effective_bytes
        )

    def elasticities(self, parameters: float, train_bytes: float, unique_bytes: float) -> tuple[float, float]:
        """How much less is lost with a small share more of parameters, and of reading."""
        by_size, by_reading, memorised = self.loss_terms(parameters, train_bytes, unique_bytes)
        by_size = self.alpha * by_size - self.memorization_exponent * memorised
        if train_bytes <= unique_bytes:
            return by_size, self.beta * by_reading
        repeats = train_bytes / unique_bytes - 1
        return by_size, max(
            0.0, self.gain_per_repeat(repeats, unique_bytes) - self.memorization_per_repeat(parameters, unique_bytes)
        ) * train_bytes / unique_bytes


class NgramDifficulty(NamedTuple):
    """Bits for trigrams, and the share that these may be off by, since they were not counted in enough of a text."""

    bits: float
    uncertainty: float = 0.0


def corpus_difficulty(corpus: Corpus) -> NgramDifficulty:
    """Per byte of a corpus's held-out text, for trigrams counted in a part of it; of characters, for as many as have nine
    bytes, about what three tokens of a vocabulary have."""
    order, train = ORDER, corpus.train
    if corpus.tokenizer.kind == "char":
        order = max(ORDER, round(9 * train.tokens / max(1, train.bytes)))
    per_token = ngram_difficulty(
        corpus.tokens("train"), corpus.tokens("validation"), corpus.tokenizer.vocab_size, order
    )
    return per_token._replace(bits=per_token.bits * corpus.validation.tokens / max(1, corpus.validation.bytes))


def ngram_difficulty(
    train: TokenSource, validation: TokenSource, vocab_size: int, order: int = ORDER
) -> NgramDifficulty:
    """Per token, for runs of `order` tokens counted in `COUNTED` tokens. Of a shorter text, what it would be were it so long:
    by what its last three quarters gained, and half of that in doubt. For a text is not the harder for being short, and what
    its length means for a model is in the law by itself."""
    bits = ngram_bits(train, validation, vocab_size, max_tokens=NGRAM_SAMPLE_TOKENS, order=order)
    if len(train) >= NGRAM_SAMPLE_TOKENS or len(train) < 4:
        return NgramDifficulty(bits)
    bits_on_quarter = ngram_bits(train, validation, vocab_size, max_tokens=len(train) // 4, order=order)
    gain = max(0.0, bits_on_quarter - bits)
    quadruplings = math.log(NGRAM_SAMPLE_TOKENS / len(train), 4)
    remaining_gain = (
        NGRAM_GAIN_DECAY * (1 - NGRAM_GAIN_DECAY**quadruplings) / (1 - NGRAM_GAIN_DECAY)
    )  # SLOWING + SLOWING² + … , `times` of them
    extrapolated = max(bits / 2, bits - gain * remaining_gain)
    return NgramDifficulty(extrapolated, (bits - extrapolated) / 2 / extrapolated)
