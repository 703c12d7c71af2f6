"""From the time there is and the text there is to the size of a model, and what it will reach.

Pure: the law says what a size reaches on so many bytes, the machine is asked how fast it takes a size through them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from nextword.common.errors import UsageError
from nextword.model.config import ModelConfig
from nextword.planning.scaling_law import Law

LAW = Law()
WORTH = 0.003  # a larger size is taken where it promises so much less loss, as a share
# What a run takes for each second that the trial's steps would: looks at held-out text, samples and checkpoints add some
# seven hundredths, and steps that go on for long are an eighth slower than the fastest of a trial.
OVERHEAD = 1.2
TRIALS = 4  # sizes that the machine is asked about at most


class Text(NamedTuple):
    """What a plan knows of a text: the tokens to learn from and the bytes they stand for, bits per byte for trigrams, the
    tokens that are held out, and the share that the difficulty may be off by."""

    tokens: int
    bytes: int
    difficulty: float
    held_out: int = 0
    doubt: float = 0.0


class Speed(NamedTuple):
    """How a machine trains one size: seconds a token, bytes of memory."""

    seconds: float
    memory: int


class Machine(Protocol):
    rate: float  # floating-point operations a second, in a product of matrices

    def speed(self, config: ModelConfig, batch_tokens: int) -> Speed:
        """Measured on real steps."""
        ...


@dataclass(frozen=True)
class Length:
    """How long a run is: exactly one of seconds (from the first step to the end), tokens, and floating-point operations."""

    seconds: float | None = None
    tokens: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in asdict(self).values()) != 1:
            raise UsageError("say how long the run is to be: by its time, its tokens or its operations")

    def tokens_of(self, config: ModelConfig, seconds: float, held_out: int) -> float:
        """Tokens that are trained on in a run of this length, where one takes so many seconds. At its end the model reads all
        that was held out, at a third of the cost, which takes a third of the time at most."""
        if self.seconds is not None:
            tokens = self.seconds / seconds
            return max(tokens - 0.37 * held_out, tokens * 2 / 3) / OVERHEAD
        return self.tokens if self.tokens is not None else (self.flops or 0.0) / flops_of(config)


@dataclass(frozen=True)
class Plan:
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

    def in_words(self) -> list[str]:
        """What was chosen and why, and what is expected, a line each."""
        expected = f"expected: {self.bits_per_byte:.3f} bits/byte, four times in five {self.low:.3f} to {self.high:.3f}"
        return [*self.why, expected]


def flops_of(config: ModelConfig) -> float:
    """Floating-point operations of one token in training: six for each number of a matrix (Kaplan et al. 2020, section 2.1),
    and attention's own products over half a window."""
    looked_up = 0 if config.tied else config.vocab_size * config.d_model
    looked_up += config.context_length * config.d_model if config.positions == "learned" else 0
    attention = 6 * config.n_layers * config.n_heads * config.head_dim * config.context_length
    return 6.0 * (config.parameters - looked_up) + attention


def batch_tokens(tokens: float) -> int:
    """Tokens of a step: some 1,500 steps, as far as the batch stays between what uses a machine and what still helps."""
    return 2 ** max(11, min(19, round(math.log2(max(1.0, tokens / 1500)))))


def peak_lr(width: int, batch: int, optimizer: str = "muon") -> float:
    """The peak learning rate: falling with the width (Yang et al. 2022, "Tensor programs V", table 8), rising with the root of
    the batch (Malladi et al. 2022), and a quarter of Muon's for AdamW. Where the best one lay at widths of 64, 128 and 192, in
    batches of 2,048 and 8,192 tokens, docs/experiments.md tells; beyond these batches it stays."""
    lr = 0.75 / max(64, width) * math.sqrt(min(8192, max(2048, batch)) / 2048)
    return lr if optimizer == "muon" else lr / 4


def dropout_for(epochs: float) -> float:
    """Nothing for a text that is read a few times; more, the more often."""
    return 0.0 if epochs < 4 else 0.1 if epochs < 16 else 0.2


def choose(
    text: Text,
    length: Length,
    sizes: Mapping[str, ModelConfig],
    machine: Machine,
    *,
    batch: int | None = None,
    lr: float | None = None,
    optimizer: str = "muon",
    law: Law = LAW,
) -> Plan:
    """The size out of `sizes`, in their order from small to large, that promises the least loss in this length; with one
    size alone, what that will reach.

    Of a time or a number of operations the law of the loss gives each size its share (Hoffmann et al. 2022, section 3.3). Of a
    number of tokens alone the largest size would always be best; taken is the one that would be best for as many operations.
    The machine is asked about the sizes that come into question, a few at most.

    Args:
        batch: tokens of a step, where they are said already.
        lr: the peak learning rate, where it is; else it is that of the optimizer.
    """
    measured: dict[str, Speed] = {}

    def seconds(size: str) -> float:
        """Of one token: as measured, or by its operations and the pace of the nearest size that was measured."""
        if size in measured:
            return measured[size].seconds
        own = flops_of(sizes[size])
        if not measured:
            return 2 * own / machine.rate  # half of a product's rate is what a step reaches
        nearest = min(measured, key=lambda other: abs(math.log(flops_of(sizes[other]) / own)))
        return measured[nearest].seconds * own / flops_of(sizes[nearest])

    def forecast(size: str) -> tuple[float, float]:
        tokens = max(1.0, length.tokens_of(sizes[size], seconds(size), text.held_out))
        return tokens, law.bits(sizes[size].parameters, tokens * text.bytes / text.tokens, text.bytes, text.difficulty)

    while True:
        best = _largest_in_balance(text, length.tokens, sizes, law) if length.tokens else _best(sizes, forecast)
        if best in measured:
            break
        if len(measured) == TRIALS:
            best = min(measured, key=lambda size: forecast(size)[1])
            break
        tokens = forecast(best)[0]
        measured[best] = machine.speed(sizes[best], batch or batch_tokens(tokens))
    tokens, bits = forecast(best)
    batch = batch or batch_tokens(tokens)
    lr = lr or peak_lr(sizes[best].d_model, batch, optimizer)
    return _plan(best, sizes[best], tokens, bits, text, length, measured[best], batch, lr, law)


def _best(sizes: Mapping[str, ModelConfig], forecast: Any) -> str:
    best, least = "", math.inf
    for size in sizes:
        bits = forecast(size)[1]
        if bits < (1 - WORTH) * least:
            best, least = size, bits
    return best


def _largest_in_balance(text: Text, tokens: float, sizes: Mapping[str, ModelConfig], law: Law) -> str:
    """The largest size to which a few more parameters still give more than as many more tokens would."""
    best, read = next(iter(sizes)), tokens * text.bytes / text.tokens
    for size, config in sizes.items():
        by_size, by_reading = law.slopes(config.parameters, read, text.bytes)
        if by_size >= by_reading:
            best = size
    return best


def _plan(
    size: str, config: ModelConfig, tokens: float, bits: float, text: Text, length: Length, speed: Speed, batch: int, lr: float,
    law: Law,
) -> Plan:  # fmt: skip
    epochs, (low, high) = tokens / max(1, text.tokens), law.interval(bits, text.doubt)
    dropout, worth = dropout_for(epochs), law.worth(max(0.0, epochs - 1), text.bytes) / text.bytes
    why = [
        f"size {size}: {config.parameters / 1e6:.2g} million parameters for {tokens / 1e6:.2g} million tokens, "
        f"{1 / speed.seconds:,.0f} tokens/s on this machine"
    ]
    why.append(f"batches of {batch:,} tokens, learning rate {lr:.2g}")
    if epochs > 1.05:
        why.append(f"the text is read {epochs:.1f} times, which is worth {worth:.1f} times as much text read once")
    if dropout:
        why.append(f"dropout {dropout}, since the text is read so often")
    return Plan(
        size=size, model=config.to_dict(), parameters=config.parameters, batch_tokens=batch, lr=lr, dropout=dropout,
        tokens=round(tokens), epochs=epochs, steps=max(1, round(tokens / batch)),
        seconds=length.seconds if length.seconds is not None else tokens * speed.seconds * OVERHEAD,
        seconds_per_token=speed.seconds, memory_bytes=speed.memory, flops=tokens * flops_of(config), bits_per_byte=bits,
        low=low, high=high, why=tuple(why),
    )  # fmt: skip
