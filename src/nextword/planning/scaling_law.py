"""A scaling law: the bits per byte that a model reaches, from its size, its training data and the difficulty of the text.

The form is from the literature. The constants were fitted to 51 runs on six texts and parts of three of them
(`python -m benchmarks.scaling_laws`). Data is counted in bytes, so that one law holds for every vocabulary.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenSource
from nextword.data.ngrams import ORDER, ngram_bits

NGRAM_SAMPLE_TOKENS = 2**18  # counted in about a second
# The gain from four times as many n-gram counts, as a fraction of the gain from the quadrupling before; from the fit's texts.
NGRAM_GAIN_DECAY = 0.83
# Parameters, bytes of the training set and difficulty of the runs of the fit (benchmarks/scaling_laws.jsonl), rounded outwards.
FITTED_RANGES = ((1.3e5, 4.1e6), (1.7e5, 3.4e7), (1.49, 2.30))


@dataclass(frozen=True)
class ScalingLaw:
    """bits = difficulty^δ · (L∞ + (N₀ / N)^α + (D₀ / D′)^β + c (N / U)^γ R).

    Hoffmann et al. 2022, equation 2, relative to the difficulty of the text for an n-gram model. U unique bytes that are
    repeated R times are worth D′ = U (1 + R* (1 − e^(−R / R*))) (Muennighoff et al. 2023, equation 5). The last term is
    memorization, which grows with the size of the model relative to the text. R is at most the number of repeats at which
    the loss is lowest, because training keeps the best weights.

    Attributes:
        irreducible_loss: L∞.
        parameters_scale: N₀.
        alpha: the exponent of the number of parameters.
        bytes_scale: D₀.
        beta: the exponent of the training data.
        repeat_half_life: R*.
        difficulty_exponent: δ.
        memorization_coefficient: c.
        memorization_exponent: γ.
        relative_error: half the width of the 80 % prediction interval, relative to the prediction. Of n texts that the law was
            not fitted to, it covers the ⌈0.8 (n + 1)⌉-th largest error (split conformal prediction, Papadopoulos et al.
            2002), with the largest error of the runs on each text: of the seven texts in docs/benchmarks.md, that of all.
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
    relative_error: float = 0.18

    @classmethod
    def fitted_fields(cls) -> list[str]:
        """The names of the constants that are fitted, in order."""
        return [field.name for field in fields(cls)][:-1]

    def effective_data(self, repeats: float, unique_bytes: float) -> float:
        """D′: the bytes of unique text that `unique_bytes`, repeated `repeats` times, are worth."""
        return unique_bytes * (1 + self.repeat_half_life * -math.expm1(-repeats / self.repeat_half_life))

    def bits_per_byte(self, parameters: float, train_bytes: float, unique_bytes: float, difficulty: float) -> float:
        """The predicted validation loss in bits per byte.

        Args:
            parameters: the number of parameters, embeddings included.
            train_bytes: the bytes trained on, repeats included.
            unique_bytes: the bytes of the training set.
            difficulty: bits per byte of an n-gram model, see `corpus_difficulty`.
        """
        terms = self.loss_terms(parameters, train_bytes, unique_bytes)
        return difficulty**self.difficulty_exponent * (self.irreducible_loss + sum(terms))

    def prediction_interval(self, bits: float, uncertainty: float, is_fitted: bool = True) -> tuple[float, float]:
        """The 80 % prediction interval around `bits`.

        Args:
            bits: the prediction.
            uncertainty: the relative uncertainty of the text's difficulty.
            is_fitted: whether the run is inside the ranges of the fit; if not, the interval is twice as wide.
        """
        error = min(0.9, (self.relative_error + self.difficulty_exponent * uncertainty) * (1 if is_fitted else 2))
        return bits * (1 - error), bits * (1 + error)

    @staticmethod
    def is_fitted(parameters: float, unique_bytes: float, difficulty: float) -> bool:
        """Whether a run is inside the ranges of the runs that the law was fitted to."""
        return all(
            low <= value <= high
            for value, (low, high) in zip((parameters, unique_bytes, difficulty), FITTED_RANGES, strict=True)
        )

    def loss_terms(self, parameters: float, train_bytes: float, unique_bytes: float) -> tuple[float, float, float]:
        """The terms of limited size, limited data and memorization, relative to the difficulty."""
        repeats = self.useful_repeats(parameters, train_bytes, unique_bytes)
        effective = train_bytes if train_bytes <= unique_bytes else self.effective_data(repeats, unique_bytes)
        by_size = (self.parameters_scale / parameters) ** self.alpha
        by_data = (self.bytes_scale / effective) ** self.beta
        return by_size, by_data, self.memorization_per_repeat(parameters, unique_bytes) * repeats

    def memorization_per_repeat(self, parameters: float, unique_bytes: float) -> float:
        """The loss that each repeat of the text adds by memorization."""
        return self.memorization_coefficient * (parameters / unique_bytes) ** self.memorization_exponent

    def gain_per_repeat(self, repeats: float, unique_bytes: float) -> float:
        """The loss that one more repeat of the text removes from the data term (its derivative)."""
        effective = self.effective_data(repeats, unique_bytes)
        by_data = (self.bytes_scale / effective) ** self.beta
        return self.beta * by_data * unique_bytes * math.exp(-repeats / self.repeat_half_life) / effective

    def useful_repeats(self, parameters: float, train_bytes: float, unique_bytes: float) -> float:
        """The repeats of the text until the loss is lowest, at most those of the run."""
        low, high = 0.0, max(0.0, train_bytes / unique_bytes - 1)
        memorization = self.memorization_per_repeat(parameters, unique_bytes)
        if high == 0 or self.gain_per_repeat(high, unique_bytes) >= memorization:
            return high
        for _ in range(50):  # bisection: the gain falls monotonically
            middle = (low + high) / 2
            if self.gain_per_repeat(middle, unique_bytes) > memorization:
                low = middle
            else:
                high = middle
        return low

    def elasticities(self, parameters: float, train_bytes: float, unique_bytes: float) -> tuple[float, float]:
        """The decrease of the loss terms per relative increase of the parameters, and of the training data."""
        by_size, by_data, memorized = self.loss_terms(parameters, train_bytes, unique_bytes)
        size_elasticity = self.alpha * by_size - self.memorization_exponent * memorized
        if train_bytes <= unique_bytes:
            return size_elasticity, self.beta * by_data
        gain = self.gain_per_repeat(train_bytes / unique_bytes - 1, unique_bytes)
        gain -= self.memorization_per_repeat(parameters, unique_bytes)
        return size_elasticity, max(0.0, gain) * train_bytes / unique_bytes


class NgramDifficulty(NamedTuple):
    """The loss of an n-gram model in bits, and its relative uncertainty if it is extrapolated from a short text."""

    bits: float
    uncertainty: float = 0.0


def corpus_difficulty(corpus: Corpus) -> NgramDifficulty:
    """The bits per byte of an n-gram model on the validation set.

    Trigrams; for a character tokenizer n-grams of about nine bytes, the length of a typical token trigram.
    """
    order, train, validation = ORDER, corpus.train, corpus.validation
    if corpus.tokenizer.kind == "char":
        order = max(ORDER, round(9 * train.tokens / max(1, train.seen_bytes)))
    tokens = corpus.tokens("train"), corpus.tokens("validation")
    per_token = ngram_difficulty(*tokens, corpus.tokenizer.vocab_size, order)
    return per_token._replace(bits=per_token.bits * validation.tokens / max(1, validation.seen_bytes))


def ngram_difficulty(
    train: TokenSource, validation: TokenSource, vocab_size: int, order: int = ORDER
) -> NgramDifficulty:
    """The bits per token of an n-gram model that is counted in `NGRAM_SAMPLE_TOKENS` tokens.

    For a shorter text this is extrapolated from the gain of its last three quarters, since the law accounts for the size of
    the training set by itself. Half of the extrapolated gain is the uncertainty.
    """
    bits = ngram_bits(train, validation, vocab_size, max_tokens=NGRAM_SAMPLE_TOKENS, order=order)
    if len(train) >= NGRAM_SAMPLE_TOKENS or len(train) < 4:
        return NgramDifficulty(bits)
    bits_on_quarter = ngram_bits(train, validation, vocab_size, max_tokens=len(train) // 4, order=order)
    gain = max(0.0, bits_on_quarter - bits)
    quadruplings = math.log(NGRAM_SAMPLE_TOKENS / len(train), 4)
    decay = NGRAM_GAIN_DECAY
    remaining_gain = gain * decay * (1 - decay**quadruplings) / (1 - decay)  # geometric series
    extrapolated = max(bits / 2, bits - remaining_gain)
    return NgramDifficulty(extrapolated, (bits - extrapolated) / 2 / extrapolated)
