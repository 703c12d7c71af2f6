"""From the time there is and the text there is to the size of a model, and what it will reach.

Pure: the law says what a size reaches on so many bytes, the machine is asked how fast it takes a size through them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from nextword.common.errors import UsageError
from nextword.model.config import ModelConfig
from nextword.planning.scaling_law import ScalingLaw

DEFAULT_LAW = ScalingLaw()
MIN_GAIN = 0.003  # a larger size is taken where it promises so much less loss, as a share
# What a run takes for each second that the trial's steps would: looks at held-out text, samples and checkpoints add some
# seven hundredths, and steps that go on for long are an eighth slower than the fastest of a trial.
TRAINING_OVERHEAD = 1.2
MAX_BENCHMARKED_SIZES = 4  # sizes that the machine is asked about at most


class CorpusStats(NamedTuple):
    """What a plan knows of a text: the tokens to learn from and the bytes they stand for, bits per byte for trigrams, the
    tokens that are held out, and the share that the difficulty may be off by."""

    tokens: int
    bytes: int
    difficulty: float
    validation_tokens: int = 0
    uncertainty: float = 0.0


class BenchmarkResult(NamedTuple):
    """How a machine trains one size: seconds a token, bytes of memory."""

    seconds_per_token: float
    memory_bytes: int


class ThroughputEstimator(Protocol):
    matmul_flops: float  # floating-point operations a second, in a product of matrices

    def measure(self, config: ModelConfig, batch_tokens: int) -> BenchmarkResult:
        """Measured on real steps."""
        ...


@dataclass(frozen=True)
class RunLength:
    """How long a run is: exactly one of seconds (from the first step to the end), tokens, and floating-point operations."""

    seconds: float | None = None
    tokens: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in asdict(self).values()) != 1:
            raise UsageError("say how long the run is to be: by its time, its tokens or its operations")

    def num_tokens(self, config: ModelConfig, seconds_per_token: float, validation_tokens: int) -> float:
        """Tokens that are trained on in a run of this length, where one takes so many seconds. At its end the model reads all
        that was held out, at a third of the cost, which takes a third of the time at most."""
        if self.seconds is not None:
            tokens = self.seconds / seconds_per_token
            return max(tokens - 0.37 * validation_tokens, tokens * 2 / 3) / TRAINING_OVERHEAD
        return self.tokens if self.tokens is not None else (self.flops or 0.0) / flops_per_token(config)


@dataclass(frozen=True)
class TrainingPlan:
    """What a run would be, and why. Seconds are the training's; bits per byte are of held-out text, with the interval in which
    four runs of five end."""

    size: str
    model: dict[str, Any]
    parameters: int
    batch_tokens: int
    lr: float
    dropout: float
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
    why: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary_lines(self) -> list[str]:
        """What was chosen and why, and what is expected, a line each."""
        expected = f"expected: {self.bits_per_byte:.3f} bits/byte, four times in five {self.low:.3f} to {self.high:.3f}"
        return [*self.why, expected]


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of one token in training: six for each number of a matrix (Kaplan et al. 2020, section 2.1),
    and attention's own products over half a window."""
    embedding_parameters = 0 if config.tied else config.vocab_size * config.d_model
    embedding_parameters += config.context_length * config.d_model if config.positions == "learned" else 0
    attention = 6 * config.n_layers * config.n_heads * config.head_dim * config.context_length
    return 6.0 * (config.parameters - embedding_parameters) + attention


def default_batch_tokens(tokens: float) -> int:
    """Tokens of a step: some 1,500 steps, as far as the batch stays between what uses a machine and what still helps."""
    return 2 ** max(11, min(19, round(math.log2(max(1.0, tokens / 1500)))))


def default_peak_lr(width: int, batch_tokens: int, optimizer: str = "muon") -> float:
    """The peak learning rate: falling with the width (Yang et al. 2022, "Tensor programs V", table 8), rising with the root of
    the batch (Malladi et al. 2022), and a quarter of Muon's for AdamW. Where the best one lay at widths of 64, 128 and 192, in
    batches of 2,048 and 8,192 tokens, docs/experiments.md tells; beyond these batches it stays."""
    lr = 0.75 / max(64, width) * math.sqrt(min(8192, max(2048, batch_tokens)) / 2048)
    return lr if optimizer == "muon" else lr / 4


def default_dropout(epochs: float) -> float:
    """Nothing for a text that is read a few times; more, the more often."""
    return 0.0 if epochs < 4 else 0.1 if epochs < 16 else 0.2


def select_size(
    corpus_stats: CorpusStats,
    run_length: RunLength,
    candidates: Mapping[str, ModelConfig],
    benchmark: ThroughputEstimator,
    *,
    batch_tokens: int | None = None,
    lr: float | None = None,
    optimizer: str = "muon",
    law: ScalingLaw = DEFAULT_LAW,
) -> TrainingPlan:
    """The size out of `sizes`, in their order from small to large, that promises the least loss in this length; with one
    size alone, what that will reach.

    Of a time or a number of operations the law of the loss gives each size its share (Hoffmann et al. 2022, section 3.3). Of a
    number of tokens alone the largest size would always be best; taken is the one that would be best for as many operations.
    The machine is asked about the sizes that come into question, a few at most.

    Args:
        batch: tokens of a step, where they are said already.
        lr: the peak learning rate, where it is; else it is that of the optimizer.
    """
    measured: dict[str, BenchmarkResult] = {}

    def seconds_per_token(size: str) -> float:
        """Of one token: as measured, or by its operations and the pace of the nearest size that was measured."""
        if size in measured:
            return measured[size].seconds_per_token
        own = flops_per_token(candidates[size])
        if not measured:
            return 2 * own / benchmark.matmul_flops  # half of a product's rate is what a step reaches
        nearest = min(measured, key=lambda other: abs(math.log(flops_per_token(candidates[other]) / own)))
        return measured[nearest].seconds_per_token * own / flops_per_token(candidates[nearest])

    def forecast(size: str) -> tuple[float, float]:
        tokens = max(
            1.0, run_length.num_tokens(candidates[size], seconds_per_token(size), corpus_stats.validation_tokens)
        )
        return tokens, law.bits_per_byte(
            candidates[size].parameters,
            tokens * corpus_stats.bytes / corpus_stats.tokens,
            corpus_stats.bytes,
            corpus_stats.difficulty,
        )

    while True:
        best = (
            _compute_optimal_size(corpus_stats, run_length.tokens, candidates, law)
            if run_length.tokens
            else _lowest_loss_size(candidates, forecast)
        )
        if best in measured:
            break
        if len(measured) == MAX_BENCHMARKED_SIZES:
            best = min(measured, key=lambda size: forecast(size)[1])
            break
        tokens = forecast(best)[0]
        measured[best] = benchmark.measure(candidates[best], batch_tokens or default_batch_tokens(tokens))
    tokens, bits = forecast(best)
    batch_tokens = batch_tokens or default_batch_tokens(tokens)
    lr = lr or default_peak_lr(candidates[best].d_model, batch_tokens, optimizer)
    return _build_plan(
        best, candidates[best], tokens, bits, corpus_stats, run_length, measured[best], batch_tokens, lr, law
    )


def _lowest_loss_size(candidates: Mapping[str, ModelConfig], forecast: Any) -> str:
    best, least = "", math.inf
    for size in candidates:
        bits = forecast(size)[1]
        if bits < (1 - MIN_GAIN) * least:
            best, least = size, bits
    return best


def _compute_optimal_size(
    corpus_stats: CorpusStats, tokens: float, candidates: Mapping[str, ModelConfig], law: ScalingLaw
) -> str:
    """The largest size to which a few more parameters still give more than as many more tokens would."""
    best, train_bytes = next(iter(candidates)), tokens * corpus_stats.bytes / corpus_stats.tokens
    for size, config in candidates.items():
        by_size, by_reading = law.elasticities(config.parameters, train_bytes, corpus_stats.bytes)
        if by_size >= by_reading:
            best = size
    return best


def _build_plan(
    size: str, config: ModelConfig, tokens: float, bits: float, corpus_stats: CorpusStats, run_length: RunLength, measurement: BenchmarkResult, batch_tokens: int, lr: float,
    law: ScalingLaw,
) -> TrainingPlan:  # fmt: skip
    epochs, (low, high) = tokens / max(1, corpus_stats.tokens), law.prediction_interval(bits, corpus_stats.uncertainty)
    dropout, effective_epochs = (
        default_dropout(epochs),
        law.effective_data(max(0.0, epochs - 1), corpus_stats.bytes) / corpus_stats.bytes,
    )
    why = [
        f"size {size}: {config.parameters / 1e6:.2g} million parameters for {tokens / 1e6:.2g} million tokens, "
        f"{1 / measurement.seconds_per_token:,.0f} tokens/s on this machine"
    ]
    why.append(f"batches of {batch_tokens:,} tokens, learning rate {lr:.2g}")
    if epochs > 1.05:
        why.append(
            f"the text is read {epochs:.1f} times, which is worth {effective_epochs:.1f} times as much text read once"
        )
    if dropout:
        why.append(f"dropout {dropout}, since the text is read so often")
    return TrainingPlan(
        size=size, model=config.to_dict(), parameters=config.parameters, batch_tokens=batch_tokens, lr=lr, dropout=dropout,
        tokens=round(tokens), epochs=epochs, steps=max(1, round(tokens / batch_tokens)),
        seconds=run_length.seconds if run_length.seconds is not None else tokens * measurement.seconds_per_token * TRAINING_OVERHEAD,
        seconds_per_token=measurement.seconds_per_token, memory_bytes=measurement.memory_bytes, flops=tokens * flops_per_token(config), bits_per_byte=bits,
        low=low, high=high, why=tuple(why),
    )  # fmt: skip
