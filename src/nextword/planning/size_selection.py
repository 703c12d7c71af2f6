"""The choice of a model size from the length of the run and the text.

Pure functions: the scaling law predicts the loss of each size, and a `ThroughputEstimator` measures its speed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from nextword.common.command_result import Result
from nextword.model.config import ModelConfig
from nextword.planning.scaling_law import ScalingLaw
from nextword.training.config import DEFAULT_WEIGHT_DECAY, TrainingConfig

DEFAULT_LAW = ScalingLaw()
MIN_GAIN = 0.003  # the relative decrease of the loss for which a larger size is chosen
# The time of a run relative to its benchmarked steps: evaluations, samples and checkpoints add 7 %, and steps of a long run
# take an eighth longer than the fastest one of a benchmark.
TRAINING_OVERHEAD = 1.2
MAX_BENCHMARKED_SIZES = 4
MANY_EPOCHS = 4.0  # from which on a text counts as read many times
DECAY_HORIZON = 2.0  # epochs
MANY_BYTES_PER_PARAMETER = 2.0  # from which on a model is too small to memorize its text


class CorpusStats(NamedTuple):
    """What the size selection knows of a text.

    Attributes:
        tokens: tokens of the training set.
        bytes: bytes of the training set.
        difficulty: bits per byte of an n-gram model.
        validation_tokens: tokens of the validation and the test set.
        uncertainty: the relative uncertainty of `difficulty`.
    """

    tokens: int
    bytes: int
    difficulty: float
    validation_tokens: int = 0
    uncertainty: float = 0.0


class BenchmarkResult(NamedTuple):
    """The training speed in seconds per token, and the peak memory in bytes, of a model on a machine."""

    seconds_per_token: float
    memory_bytes: int


class ThroughputEstimator(Protocol):
    """A machine. `matmul_flops` is its rate of floating-point operations per second in matrix products."""

    matmul_flops: float

    def measure(self, config: ModelConfig, batch_tokens: int) -> BenchmarkResult:
        """Measure a model with batches of `batch_tokens` tokens."""
        ...


@dataclass(frozen=True)
class RunLength:
    """The length of a run: exactly one of seconds of training, tokens, and floating-point operations."""

    seconds: float | None = None
    tokens: float | None = None
    flops: float | None = None

    def num_tokens(self, config: ModelConfig, seconds_per_token: float, validation_tokens: int) -> float:
        """The number of training tokens.

        The evaluation on the validation set at the end costs a third of a training step per token, and takes at most a tenth of
        the time.
        """
        if self.seconds is not None:
            tokens = self.seconds / seconds_per_token
            return max(tokens - 0.37 * validation_tokens, 0.9 * tokens) / TRAINING_OVERHEAD
        return self.tokens if self.tokens is not None else (self.flops or 0.0) / config.flops_per_token


@dataclass(frozen=True)
class TrainingPlan(Result):
    """The plan of a run and its prediction, as run.json stores it.

    Attributes:
        size: Chosen size.
        model: Fields of the `ModelConfig`.
        parameters: Number of parameters.
        batch_tokens: Tokens per optimizer step.
        lr: Peak learning rate.
        dropout: Dropout rate.
        weight_decay: Weight decay.
        tokens: Training tokens, repeats included.
        epochs: Passes over the text.
        steps: Optimizer steps.
        seconds: Duration of the run.
        seconds_per_token: Measured training speed.
        memory_bytes: Peak memory.
        flops: Floating-point operations.
        bits_per_byte: Expected loss on the validation set; of four in five texts, the runs end between `low` and `high`.
        low: Lower end of the prediction interval.
        high: Upper end of the prediction interval.
        why: The reasons of the choices, a sentence each.
        difficulty: Bits per byte of an n-gram model on the text.
        uncertainty: Relative uncertainty of `difficulty`.
    """

    size: str
    model: dict[str, Any]
    parameters: int
    batch_tokens: int
    lr: float
    dropout: float
    weight_decay: float
    tokens: int
    epochs: float
    steps: int
    seconds: float
    seconds_per_token: float
    memory_bytes: int
    flops: float
    bits_per_byte: float
    low: float
    high: float
    why: list[str]
    difficulty: float
    uncertainty: float

    @property
    def interval(self) -> str:
        """The expected loss with its prediction interval, for a person."""
        return f"{self.bits_per_byte:.3f} bits/byte (80 % prediction interval {self.low:.3f} to {self.high:.3f})"

    def with_tokens(self, tokens: float, train_bytes: int, law: ScalingLaw = DEFAULT_LAW) -> "TrainingPlan":
        """The prediction for the same model, if it is trained on another number of tokens.

        Args:
            tokens: Training tokens, repeats included.
            train_bytes: Bytes of the training set.
            law: The scaling law.
        """
        epochs = self.epochs * tokens / self.tokens
        bits = law.bits_per_byte(self.parameters, epochs * train_bytes, train_bytes, self.difficulty)
        is_fitted = law.is_fitted(self.parameters, train_bytes, self.difficulty)
        low, high = law.prediction_interval(bits, self.uncertainty, is_fitted)
        return replace(self, tokens=round(tokens), epochs=epochs, bits_per_byte=bits, low=low, high=high)


# ---------------------------------------------------------------- defaults


def default_batch_tokens(tokens: float) -> int:
    """Tokens per step: a power of two that gives about 1,500 steps, at least 2,048 and at most 524,288."""
    return 2 ** max(11, min(19, round(math.log2(max(1.0, tokens / 1500)))))


def default_peak_lr(width: int, batch_tokens: int, optimizer: str = "muon") -> float:
    """The peak learning rate.

    It falls with the width (Yang et al. 2022, "Tensor Programs V", table 8) and rises with the square root of the batch
    (Malladi et al. 2022) within the batches that were tried: docs/experiments.md has the best rates at widths of 64, 128 and
    192 with batches of 2,048 and 8,192 tokens. AdamW's is a quarter of Muon's.
    """
    lr = 0.75 / max(64, width) * math.sqrt(min(8192, max(2048, batch_tokens)) / 2048)
    return lr if optimizer == "muon" else lr / 4


def default_dropout(epochs: float, bytes_per_parameter: float) -> float:
    """The dropout probability, which grows with the number of passes over the text; 0 if the model is too small to memorize it.

    Args:
        epochs: Passes over the text.
        bytes_per_parameter: Bytes of the training set for each parameter.
    """
    if epochs < MANY_EPOCHS or bytes_per_parameter > MANY_BYTES_PER_PARAMETER:
        return 0.0
    return 0.1 if epochs < 16 else 0.2


def default_weight_decay(lr: float, epochs: float, steps_per_epoch: float, bytes_per_parameter: float) -> float:
    """The decoupled weight decay.

    Weights are a moving average of the updates of the last 1 / (learning rate · decay) steps (Wang and Aitchison 2024, "How to
    set AdamW's weight decay as you scale model and dataset size"). For text that is read many times this horizon is
    `DECAY_HORIZON` epochs, so that the model forgets what only one passage supports; unless the model is too small to memorize.

    Args:
        lr: The peak learning rate.
        epochs: Passes over the text.
        steps_per_epoch: Optimizer steps of one pass.
        bytes_per_parameter: Bytes of the training set for each parameter.
    """
    if epochs < MANY_EPOCHS or bytes_per_parameter > MANY_BYTES_PER_PARAMETER:
        return DEFAULT_WEIGHT_DECAY
    return max(DEFAULT_WEIGHT_DECAY, round(1 / (lr * DECAY_HORIZON * steps_per_epoch), 3))


# ---------------------------------------------------------------- selection


def select_size(
    corpus_stats: CorpusStats,
    run_length: RunLength,
    candidates: Mapping[str, ModelConfig],
    benchmark: ThroughputEstimator,
    *,
    training: TrainingConfig = TrainingConfig(),
    law: ScalingLaw = DEFAULT_LAW,
) -> TrainingPlan:
    """Choose the size with the lowest predicted loss for a run of a given length.

    For a given time or number of operations the scaling law weighs size against data (Hoffmann et al. 2022, section 3.3). For a
    given number of tokens the largest size would always win; the one that is compute-optimal for those tokens is chosen. Only
    a few sizes are benchmarked; the speed of the others is extrapolated.

    Args:
        corpus_stats: the text.
        run_length: the length of the run.
        candidates: model configurations by size, from small to large. With a single one its prediction is returned.
        benchmark: measures the speed of a size.
        training: the recipe's training options. Batch size and learning rate are chosen unless they are set.
        law: the scaling law.
    """
    measured: dict[str, BenchmarkResult] = {}

    def seconds_per_token(size: str) -> float:
        if size in measured:
            return measured[size].seconds_per_token
        flops = candidates[size].flops_per_token
        if not measured:
            return 2 * flops / benchmark.matmul_flops  # training reaches about half of the rate of matrix products
        nearest = min(measured, key=lambda other: abs(math.log(candidates[other].flops_per_token / flops)))
        return measured[nearest].seconds_per_token * flops / candidates[nearest].flops_per_token

    def predict(size: str) -> tuple[float, float]:
        """Training tokens and bits per byte."""
        config = candidates[size]
        tokens = max(1.0, run_length.num_tokens(config, seconds_per_token(size), corpus_stats.validation_tokens))
        train_bytes = tokens * corpus_stats.bytes / corpus_stats.tokens
        bits = law.bits_per_byte(config.parameters, train_bytes, corpus_stats.bytes, corpus_stats.difficulty)
        return tokens, bits

    def choose_size() -> str:
        if run_length.tokens is None:  # a larger size only if it gains at least `MIN_GAIN`
            best, lowest = "", math.inf
            for size in candidates:
                if (bits := predict(size)[1]) < (1 - MIN_GAIN) * lowest:
                    best, lowest = size, bits
            return best
        # The largest size for which more parameters still gain at least as much as equally more data.
        train_bytes, best = run_length.tokens * corpus_stats.bytes / corpus_stats.tokens, next(iter(candidates))
        for size, config in candidates.items():
            by_size, by_data = law.elasticities(config.parameters, train_bytes, corpus_stats.bytes)
            best = size if by_size >= by_data else best
        return best

    while (best := choose_size()) not in measured:
        if len(measured) == MAX_BENCHMARKED_SIZES:
            best = min(measured, key=lambda size: predict(size)[1])
            break
        batch_tokens = training.batch_tokens or default_batch_tokens(predict(best)[0])
        measured[best] = benchmark.measure(candidates[best], batch_tokens)

    config, result, (tokens, bits) = candidates[best], measured[best], predict(best)
    batch_tokens = training.batch_tokens or default_batch_tokens(tokens)
    lr = training.lr or default_peak_lr(config.d_model, batch_tokens, training.optimizer)
    epochs = tokens / max(1, corpus_stats.tokens)
    bytes_per_parameter = corpus_stats.bytes / config.parameters
    dropout = default_dropout(epochs, bytes_per_parameter)
    weight_decay = training.weight_decay
    if weight_decay is None:
        weight_decay = default_weight_decay(lr, epochs, corpus_stats.tokens / batch_tokens, bytes_per_parameter)
    is_fitted = law.is_fitted(config.parameters, corpus_stats.bytes, corpus_stats.difficulty)
    low, high = law.prediction_interval(bits, corpus_stats.uncertainty, is_fitted)
    why = [
        f"size {best}: {config.parameters / 1e6:.2g} million parameters for {tokens / 1e6:.2g} million tokens, "
        f"{1 / result.seconds_per_token:,.0f} tokens/s on this machine",
        f"batch of {batch_tokens:,} tokens, learning rate {lr:.2g}",
    ]
    if epochs > 1.05:
        effective_epochs = law.effective_data(epochs - 1, corpus_stats.bytes) / corpus_stats.bytes
        why.append(f"{epochs:.1f} epochs, worth {effective_epochs:.1f} times as much unique text")
    if not is_fitted:
        why.append(
            "outside of the sizes and texts that the scaling law was fitted to: a prediction interval twice as wide"
        )
    if dropout:
        why.append(f"dropout {dropout}, because of the many epochs")
    if weight_decay > DEFAULT_WEIGHT_DECAY and training.weight_decay is None:
        why.append(f"weight decay {weight_decay:.2g}: the weights average the updates of {DECAY_HORIZON:g} epochs")
    return TrainingPlan(
        size=best,
        model=config.to_dict(),
        parameters=config.parameters,
        batch_tokens=batch_tokens,
        lr=lr,
        dropout=dropout,
        weight_decay=weight_decay,
        tokens=round(tokens),
        epochs=epochs,
        steps=max(1, round(tokens / batch_tokens)),
        seconds=run_length.seconds or tokens * result.seconds_per_token * TRAINING_OVERHEAD,
        seconds_per_token=result.seconds_per_token,
        memory_bytes=result.memory_bytes,
        flops=tokens * config.flops_per_token,
        bits_per_byte=bits,
        low=low,
        high=high,
        why=why,
        difficulty=corpus_stats.difficulty,
        uncertainty=corpus_stats.uncertainty,
    )
