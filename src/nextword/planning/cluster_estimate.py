"""A plan on paper: what a run would need and give on machines that are not here, by their datasheets and by arithmetic.

What it says of published runs is compared with what was published in tests/test_paper.py.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from nextword.common.errors import UsageError
from nextword.model.config import ModelConfig
from nextword.planning.size_selection import flops_of

# Of a GPU's datasheet rate, what training reaches where nothing waits: between these ends in the runs that were published.
UTILISATION, LEAST, MOST = 0.42, 0.30, 0.55
MEMORY_SHARE = 0.9  # of a GPU's memory, what may be planned with: the rest is lost between the pieces
LOGITS = 2**29  # bytes of logits and their gradients, which are made a piece at a time
PER_PARAMETER = 20  # tokens a parameter, where no length is said (Hoffmann et al. 2022, table A3)
OVERHEAD_POWER = 1.1  # cooling and supply, beside the GPUs' own


@dataclass(frozen=True)
class Gpu:
    """By its datasheet: operations a second in bfloat16 (without sparsity; float16 where there is none), bytes of memory, bytes
    a second to another in the same machine and to another machine (one direction), watts."""

    flops: float
    memory: float
    link: float
    network: float
    watts: float


GPUS = {
    "v100": Gpu(125e12, 32e9, 150e9, 12.5e9, 300),
    "a100": Gpu(312e12, 80e9, 300e9, 25e9, 400),
    "h100": Gpu(989e12, 80e9, 450e9, 50e9, 700),
    "h200": Gpu(989e12, 141e9, 450e9, 50e9, 700),
    "b200": Gpu(2250e12, 180e9, 900e9, 50e9, 1000),
    "l4": Gpu(121e12, 24e9, 32e9, 3e9, 72),
    "l40s": Gpu(362e12, 48e9, 32e9, 12.5e9, 350),
    "rtx4090": Gpu(165e12, 24e9, 32e9, 3e9, 450),
}


@dataclass(frozen=True)
class Cluster:
    """So many machines with so many GPUs each."""

    gpu: Gpu
    machines: int = 1
    gpus: int = 8

    @property
    def size(self) -> int:
        return self.machines * self.gpus


@dataclass(frozen=True)
class Way:
    """How the work is shared.

    Attributes:
        parallel: "data", the weights are whole in each process while it works; "full", each block's are gathered when it
            works; "hybrid", full inside a machine, and a copy in each.
        recompute: what a block keeps for its backward pass is made again.
        windows: so many go through at once.
        tensor: so many GPUs of a machine work on each matrix together.
    """

    parallel: str
    recompute: bool
    windows: int
    tensor: int = 1


@dataclass(frozen=True)
class Paper:
    """What a run would need and give. Memory is of one GPU; what is sent, of one GPU in one step, in bytes; `utilisation` is
    the share of the datasheet's operations that are the model's own (Chowdhery et al. 2022, appendix B: MFU)."""

    parameters: int
    tokens: float
    flops: float
    batch_tokens: int
    steps: int
    parallel: str
    tensor: int
    recompute: bool
    memory_bytes: float
    sent_bytes: float
    sending_seconds: float
    step_seconds: float
    utilisation: float
    seconds: float
    low_seconds: float
    high_seconds: float
    gpu_hours: float
    kilowatt_hours: float
    money: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shape_for(parameters: float) -> tuple[int, int, int]:
    """Layers, heads and width of a model of about so many parameters: 128 of width a layer, as the large published ones have,
    and heads of 128; 12·layers·width² parameters in the blocks."""
    width = max(128, round((parameters * 128 / 12) ** (1 / 3) / 128) * 128)
    return max(1, round(parameters / (12 * width**2))), width // 128, width


def batch_for(tokens: float, context_length: int, size: int) -> int:
    """Tokens of a step: about 4·√tokens, as in published runs from ten billion tokens to fifteen trillion; whole windows for
    every process."""
    each = context_length * size
    return each * max(1, round(4 * math.sqrt(tokens) / each))


def memory_of(config: ModelConfig, cluster: Cluster, way: Way) -> float:
    """Bytes in one GPU: weights, gradients and two averages in float32, shared; what is gathered of them in bfloat16, with its
    gradients; what the backward pass needs (Korthikanti et al. 2022, table 2, without the attention matrices that are never
    held: 34 bytes a number of the residual stream); the logits. Of a matrix that several work on each has its part, and of
    those 34 bytes all but what goes into attention and into feed-forward, 2 each."""
    n = config.parameters
    embeddings = config.vocab_size * config.d_model * (1 if config.tied else 2)
    block = (n - embeddings) / config.n_layers
    shards = cluster.gpus if way.parallel == "hybrid" else cluster.size
    gathered = (
        6 * n if way.parallel == "data" else 6 * embeddings + 8 * block
    )  # the next block's weights are fetched ahead
    stream = way.windows * config.context_length * config.d_model
    one = (4 + 30 / way.tensor) * stream  # block's, with nothing made again
    kept = one * config.n_layers if not way.recompute else one + 2 * stream / way.tensor * config.n_layers
    return 16 * n / shards + gathered / way.tensor + kept + LOGITS


class Sent(NamedTuple):
    """What one GPU sends in a step: bytes; seconds for weights and gradients; seconds within matrices, for which all wait."""

    bytes: float
    sharing: float
    within: float


def sent_of(config: ModelConfig, cluster: Cluster, way: Way, micro_batches: int) -> Sent:
    """Weights gathered in bfloat16, forward and backward of each micro-batch (once a step where they stay whole), gradients
    summed in float32; and of matrices that several work on, the sums after attention and feed-forward, forward and backward
    (Shoeybi et al. 2019, section 3)."""
    weights, gradients = 2.0 * config.parameters / way.tensor, 4.0 * config.parameters / way.tensor
    gathers = 1 if way.parallel == "data" else 2 * micro_batches
    stream = 2 * way.windows * config.context_length * config.d_model  # bytes
    sums = config.n_layers * micro_batches * (6 if way.recompute else 4)
    within = sums * 2 * (way.tensor - 1) / way.tensor * stream
    inner = cluster.gpus // way.tensor if way.parallel == "hybrid" or cluster.machines == 1 else 1
    group = cluster.size // way.tensor  # processes that share the same part of each matrix
    outer = group // inner
    near = (inner - 1) / inner * (gathers * weights + gradients)
    far = 0.0
    if outer > 1:
        copies = way.parallel == "hybrid"  # the machines' gradients alone are summed, each GPU's part of them
        far = (
            2 * (outer - 1) / outer * gradients / inner
            if copies
            else (group - 1) / group * (gathers * weights + gradients)
        )
    link, network = cluster.gpu.link, cluster.gpu.network
    return Sent(near + far + within, near / link + far / network, within / link)


def ways(cluster: Cluster, most_windows: int) -> Iterator[Way]:
    """All that come into question; `most_windows` are those of a step for one GPU."""
    kinds = ["data", "full", *(["hybrid"] if cluster.machines > 1 else [])] if cluster.size > 1 else ["data"]
    for tensor in (t for t in (1, 2, 4, 8) if cluster.gpus % t == 0):
        for recompute in (False, True):
            for kind in kinds:
                windows = most_windows * tensor
                while windows >= 1:
                    yield Way(kind, recompute, windows, tensor)
                    windows //= 2


def on_paper(
    config: ModelConfig, tokens: float, cluster: Cluster, *, batch_tokens: int | None = None, price: float | None = None
) -> Paper:
    """The plan of a run, by the quickest way that memory holds.

    Args:
        tokens: that the model is trained on.
        batch_tokens: of one step; `batch_for` where not given.
        price: of a GPU hour, in any money.

    Raises:
        UsageError: no way fits into memory; with how many GPUs it would.
    """
    batch = batch_tokens or batch_for(tokens, config.context_length, cluster.size)
    most = max(1, batch // (config.context_length * cluster.size))
    room = MEMORY_SHARE * cluster.gpu.memory
    fitting = [way for way in ways(cluster, most) if memory_of(config, cluster, way) <= room]
    if not fitting:
        raise UsageError(
            f"{config.parameters / 1e9:.3g} billion parameters do not fit: {_needed(config, cluster, room)}"
        )
    flops = flops_of(config)

    def seconds(way: Way, utilisation: float) -> float:
        """Of a step: sending goes on beside computing where blocks are gathered one by one."""
        computing = batch * flops / (cluster.size * cluster.gpu.flops * utilisation) * (4 / 3 if way.recompute else 1)
        sent = sending(way)
        working = computing + sent.within
        return working + sent.sharing if way.parallel == "data" else max(working, sent.sharing)

    def sending(way: Way) -> Sent:
        return sent_of(config, cluster, way, -(-most * way.tensor // way.windows))

    way = min(fitting, key=lambda way: seconds(way, UTILISATION))
    sent = sending(way)
    steps = math.ceil(tokens / batch)
    step = seconds(way, UTILISATION)
    hours = steps * step * cluster.size / 3600
    return Paper(
        parameters=config.parameters, tokens=tokens, flops=tokens * flops, batch_tokens=batch, steps=steps,
        parallel=way.parallel, tensor=way.tensor, recompute=way.recompute, memory_bytes=memory_of(config, cluster, way),
        sent_bytes=sent.bytes, sending_seconds=sent.sharing + sent.within, step_seconds=step,
        utilisation=batch * flops / (step * cluster.size * cluster.gpu.flops), seconds=steps * step,
        low_seconds=steps * seconds(way, MOST), high_seconds=steps * seconds(way, LEAST), gpu_hours=hours,
        kilowatt_hours=hours * cluster.gpu.watts * OVERHEAD_POWER / 1000, money=None if price is None else hours * price,
    )  # fmt: skip


def _needed(config: ModelConfig, cluster: Cluster, room: float) -> str:
    """How many machines of this kind would hold it, if any number does."""
    machines = cluster.machines
    while machines < 2**20:
        machines *= 2
        larger = Cluster(cluster.gpu, machines, cluster.gpus)
        if memory_of(config, larger, Way("full", True, 1, cluster.gpus)) <= room:
            return f"{machines} such machines would hold it"
    return "one block alone is more than a GPU of this kind holds"
