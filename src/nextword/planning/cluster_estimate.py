"""A plan on paper: what a run would need and give on machines that are not here, by their datasheets and by arithmetic.

What it says of published runs is compared with what was published in tests/test_paper.py.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from nextword.common.errors import UsageError
from nextword.model.config import ModelConfig
from nextword.planning.size_selection import flops_per_token

# Of a GPU's datasheet rate, what training reaches where nothing waits: between these ends in the runs that were published.
TYPICAL_MFU, LOW_MFU, HIGH_MFU = 0.42, 0.30, 0.55
USABLE_MEMORY_FRACTION = 0.9  # of a GPU's memory, what may be planned with: the rest is lost between the pieces
LOGIT_CHUNK_BYTES = 2**29  # bytes of logits and their gradients, which are made a piece at a time
TOKENS_PER_PARAMETER = 20  # tokens a parameter, where no length is said (Hoffmann et al. 2022, table A3)
POWER_USAGE_EFFECTIVENESS = 1.1  # cooling and supply, beside the GPUs' own


@dataclass(frozen=True)
class GPUSpec:
    """By its datasheet: operations a second in bfloat16 (without sparsity; float16 where there is none), bytes of memory, bytes
    a second to another in the same machine and to another machine (one direction), watts."""

    peak_flops: float
    memory_bytes: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    watts: float


GPU_SPECS = {
    "v100": GPUSpec(125e12, 32e9, 150e9, 12.5e9, 300),
    "a100": GPUSpec(312e12, 80e9, 300e9, 25e9, 400),
    "h100": GPUSpec(989e12, 80e9, 450e9, 50e9, 700),
    "h200": GPUSpec(989e12, 141e9, 450e9, 50e9, 700),
    "b200": GPUSpec(2250e12, 180e9, 900e9, 50e9, 1000),
    "l4": GPUSpec(121e12, 24e9, 32e9, 3e9, 72),
    "l40s": GPUSpec(362e12, 48e9, 32e9, 12.5e9, 350),
    "rtx4090": GPUSpec(165e12, 24e9, 32e9, 3e9, 450),
}


@dataclass(frozen=True)
class Cluster:
    """So many machines with so many GPUs each."""

    gpu: GPUSpec
    machines: int = 1
    gpus_per_machine: int = 8

    @property
    def num_gpus(self) -> int:
        return self.machines * self.gpus_per_machine


@dataclass(frozen=True)
class ParallelLayout:
    """How the work is shared.

    Attributes:
        parallel: "data", the weights are whole in each process while it works; "full", each block's are gathered when it
            works; "hybrid", full inside a machine, and a copy in each.
        recompute: what a block keeps for its backward pass is made again.
        windows: so many go through at once.
        tensor: so many GPUs of a machine work on each matrix together.
    """

    parallel: str
    activation_checkpointing: bool
    micro_batch_size: int
    tp_size: int = 1


@dataclass(frozen=True)
class ClusterEstimate:
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


def model_shape_for(parameters: float) -> tuple[int, int, int]:
    """Layers, heads and width of a model of about so many parameters: 128 of width a layer, as the large published ones have,
    and heads of 128; 12·layers·width² parameters in the blocks."""
    width = max(128, round((parameters * 128 / 12) ** (1 / 3) / 128) * 128)
    return max(1, round(parameters / (12 * width**2))), width // 128, width


def cluster_batch_tokens(tokens: float, context_length: int, world_size: int) -> int:
    """Tokens of a step: about 4·√tokens, as in published runs from ten billion tokens to fifteen trillion; whole windows for
    every process."""
    tokens_per_round = context_length * world_size
    return tokens_per_round * max(1, round(4 * math.sqrt(tokens) / tokens_per_round))


def memory_per_gpu(config: ModelConfig, cluster: Cluster, layout: ParallelLayout) -> float:
    """Bytes in one GPU: weights, gradients and two averages in float32, shared; what is gathered of them in bfloat16, with its
    gradients; what the backward pass needs (Korthikanti et al. 2022, table 2, without the attention matrices that are never
    held: 34 bytes a number of the residual stream); the logits. Of a matrix that several work on each has its part, and of
    those 34 bytes all but what goes into attention and into feed-forward, 2 each."""
    num_parameters = config.parameters
    embeddings = config.vocab_size * config.d_model * (1 if config.tied else 2)
    block_parameters = (num_parameters - embeddings) / config.n_layers
    shards = cluster.gpus_per_machine if layout.parallel == "hybrid" else cluster.num_gpus
    gathered = (
        6 * num_parameters if layout.parallel == "data" else 6 * embeddings + 8 * block_parameters
    )  # the next block's weights are fetched ahead
    residual_numbers = layout.micro_batch_size * config.context_length * config.d_model
    block_activations = (4 + 30 / layout.tp_size) * residual_numbers  # block's, with nothing made again
    activations = (
        block_activations * config.n_layers
        if not layout.activation_checkpointing
        else block_activations + 2 * residual_numbers / layout.tp_size * config.n_layers
    )
    return 16 * num_parameters / shards + gathered / layout.tp_size + activations + LOGIT_CHUNK_BYTES


class CommVolume(NamedTuple):
    """What one GPU sends in a step: bytes; seconds for weights and gradients; seconds within matrices, for which all wait."""

    total_bytes: float
    fsdp_seconds: float
    tensor_parallel_seconds: float


def comm_volume(config: ModelConfig, cluster: Cluster, layout: ParallelLayout, micro_batches: int) -> CommVolume:
    """Weights gathered in bfloat16, forward and backward of each micro-batch (once a step where they stay whole), gradients
    summed in float32; and of matrices that several work on, the sums after attention and feed-forward, forward and backward
    (Shoeybi et al. 2019, section 3)."""
    weights, gradients = 2.0 * config.parameters / layout.tp_size, 4.0 * config.parameters / layout.tp_size
    num_gathers = 1 if layout.parallel == "data" else 2 * micro_batches
    residual_bytes = 2 * layout.micro_batch_size * config.context_length * config.d_model  # bytes
    num_all_reduces = config.n_layers * micro_batches * (6 if layout.activation_checkpointing else 4)
    tensor_parallel_bytes = num_all_reduces * 2 * (layout.tp_size - 1) / layout.tp_size * residual_bytes
    inner = cluster.gpus_per_machine // layout.tp_size if layout.parallel == "hybrid" or cluster.machines == 1 else 1
    group = cluster.num_gpus // layout.tp_size  # processes that share the same part of each matrix
    outer = group // inner
    intra_node_bytes = (inner - 1) / inner * (num_gathers * weights + gradients)
    inter_node_bytes = 0.0
    if outer > 1:
        copies = layout.parallel == "hybrid"  # the machines' gradients alone are summed, each GPU's part of them
        inter_node_bytes = (
            2 * (outer - 1) / outer * gradients / inner
            if copies
            else (group - 1) / group * (num_gathers * weights + gradients)
        )
    intra_node_bandwidth, inter_node_bandwidth = cluster.gpu.intra_node_bandwidth, cluster.gpu.inter_node_bandwidth
    return CommVolume(
        intra_node_bytes + inter_node_bytes + tensor_parallel_bytes,
        intra_node_bytes / intra_node_bandwidth + inter_node_bytes / inter_node_bandwidth,
        tensor_parallel_bytes / intra_node_bandwidth,
    )


def candidate_layouts(cluster: Cluster, max_micro_batch_size: int) -> Iterator[ParallelLayout]:
    """All that come into question; `most_windows` are those of a step for one GPU."""
    kinds = ["data", "full", *(["hybrid"] if cluster.machines > 1 else [])] if cluster.num_gpus > 1 else ["data"]
    for tensor in (t for t in (1, 2, 4, 8) if cluster.gpus_per_machine % t == 0):
        for recompute in (False, True):
            for kind in kinds:
                windows = max_micro_batch_size * tensor
                while windows >= 1:
                    yield ParallelLayout(kind, recompute, windows, tensor)
                    windows //= 2


def estimate(
    config: ModelConfig,
    tokens: float,
    cluster: Cluster,
    *,
    batch_tokens: int | None = None,
    price_per_gpu_hour: float | None = None,
) -> ClusterEstimate:
    """The plan of a run, by the quickest way that memory holds.

    Args:
        tokens: that the model is trained on.
        batch_tokens: of one step; `batch_for` where not given.
        price: of a GPU hour, in any money.

    Raises:
        UsageError: no way fits into memory; with how many GPUs it would.
    """
    batch = batch_tokens or cluster_batch_tokens(tokens, config.context_length, cluster.num_gpus)
    max_micro_batch_size = max(1, batch // (config.context_length * cluster.num_gpus))
    usable_memory = USABLE_MEMORY_FRACTION * cluster.gpu.memory_bytes
    fitting_layouts = [
        layout
        for layout in candidate_layouts(cluster, max_micro_batch_size)
        if memory_per_gpu(config, cluster, layout) <= usable_memory
    ]
    if not fitting_layouts:
        raise UsageError(
            f"{config.parameters / 1e9:.3g} billion parameters do not fit: {_required_machines_message(config, cluster, usable_memory)}"
        )
    token_flops = flops_per_token(config)

    def step_seconds_of(way: ParallelLayout, utilisation: float) -> float:
        """Of a step: sending goes on beside computing where blocks are gathered one by one."""
        computing = (
            batch
            * token_flops
            / (cluster.num_gpus * cluster.gpu.peak_flops * utilisation)
            * (4 / 3 if way.activation_checkpointing else 1)
        )
        comm = comm_volume_of(way)
        working = computing + comm.tensor_parallel_seconds
        return working + comm.fsdp_seconds if way.parallel == "data" else max(working, comm.fsdp_seconds)

    def comm_volume_of(way: ParallelLayout) -> CommVolume:
        return comm_volume(config, cluster, way, -(-max_micro_batch_size * way.tp_size // way.micro_batch_size))

    layout = min(fitting_layouts, key=lambda way: step_seconds_of(way, TYPICAL_MFU))
    comm = comm_volume_of(layout)
    steps = math.ceil(tokens / batch)
    step_seconds = step_seconds_of(layout, TYPICAL_MFU)
    gpu_hours = steps * step_seconds * cluster.num_gpus / 3600
    return ClusterEstimate(
        parameters=config.parameters, tokens=tokens, flops=tokens * token_flops, batch_tokens=batch, steps=steps,
        parallel=layout.parallel, tensor=layout.tp_size, recompute=layout.activation_checkpointing, memory_bytes=memory_per_gpu(config, cluster, layout),
        sent_bytes=comm.total_bytes, sending_seconds=comm.fsdp_seconds + comm.tensor_parallel_seconds, step_seconds=step_seconds,
        utilisation=batch * token_flops / (step_seconds * cluster.num_gpus * cluster.gpu.peak_flops), seconds=steps * step_seconds,
        low_seconds=steps * step_seconds_of(layout, HIGH_MFU), high_seconds=steps * step_seconds_of(layout, LOW_MFU), gpu_hours=gpu_hours,
        kilowatt_hours=gpu_hours * cluster.gpu.watts * POWER_USAGE_EFFECTIVENESS / 1000, money=None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour,
    )  # fmt: skip


def _required_machines_message(config: ModelConfig, cluster: Cluster, usable_memory: float) -> str:
    """How many machines of this kind would hold it, if any number does."""
    machines = cluster.machines
    while machines < 2**20:
        machines *= 2
        larger = Cluster(cluster.gpu, machines, cluster.gpus_per_machine)
        if memory_per_gpu(config, larger, ParallelLayout("full", True, 1, cluster.gpus_per_machine)) <= usable_memory:
            return f"{machines} such machines would hold it"
    return "one block alone is more than a GPU of this kind holds"
