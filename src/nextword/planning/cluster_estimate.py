"""The estimate of a run on a GPU cluster: memory, communication, time and energy, from datasheets and arithmetic.

Nothing is measured. tests/test_cluster_estimate.py compares the estimates with published runs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, get_args

from nextword.common.command_result import Result
from nextword.common.errors import UsageError
from nextword.common.format import format_duration
from nextword.model.config import ConfigError, ModelConfig, build_config
from nextword.training.config import ParallelStrategy, Recipe

# Model FLOPs utilisation of published training runs: typical, low, high.
TYPICAL_MFU, LOW_MFU, HIGH_MFU = 0.42, 0.30, 0.55
USABLE_MEMORY_FRACTION = 0.9  # the rest is lost to fragmentation
LOGIT_CHUNK_BYTES = 2**29  # logits and their gradients, computed in chunks
TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al. 2022, table A3)
POWER_USAGE_EFFECTIVENESS = 1.1  # cooling and power supply
DEFAULT_VOCAB_SIZE = 50_000
CONTEXT_LENGTH = 4096


@dataclass(frozen=True)
class GPUSpec:
    """The datasheet of a GPU.

    Attributes:
        name: the value of `nextword plan --gpu`.
        peak_flops: dense bfloat16 operations per second (float16 if there is no bfloat16).
        memory_bytes: memory.
        intra_node_bandwidth: bytes per second to another GPU of the machine, in one direction.
        inter_node_bandwidth: bytes per second to another machine, in one direction.
        watts: power.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    watts: float


GPU_SPECS = {
    spec.name: spec
    for spec in (
        GPUSpec("v100", 125e12, 32e9, 150e9, 12.5e9, 300),
        GPUSpec("a100", 312e12, 80e9, 300e9, 25e9, 400),
        GPUSpec("h100", 989e12, 80e9, 450e9, 50e9, 700),
        GPUSpec("h200", 989e12, 141e9, 450e9, 50e9, 700),
        GPUSpec("b200", 2250e12, 180e9, 900e9, 50e9, 1000),
        GPUSpec("l4", 121e12, 24e9, 32e9, 3e9, 72),
        GPUSpec("l40s", 362e12, 48e9, 32e9, 12.5e9, 350),
        GPUSpec("rtx4090", 165e12, 24e9, 32e9, 3e9, 450),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Machines with equal GPUs."""

    gpu: GPUSpec
    machines: int = 1
    gpus_per_machine: int = 8

    @property
    def num_gpus(self) -> int:
        """The GPUs of all machines."""
        return self.machines * self.gpus_per_machine


@dataclass(frozen=True)
class ParallelLayout:
    """How the work is divided between GPUs.

    Attributes:
        strategy: how the weights are sharded, see `nextword.training.parallel.parallelize`.
        activation_checkpointing: whether the backward pass recomputes the activations of a block.
        micro_batch_size: windows per forward pass.
        tp_size: the number of GPUs of a machine that each matrix is split between.
    """

    strategy: ParallelStrategy
    activation_checkpointing: bool
    micro_batch_size: int
    tp_size: int = 1


@dataclass(frozen=True)
class ClusterEstimate(Result):
    """The estimate of a run on other machines.

    Attributes:
        parameters: Number of parameters.
        tokens: Training tokens.
        flops: Floating-point operations of the model.
        batch_tokens: Tokens per optimizer step.
        steps: Optimizer steps.
        parallel: Data parallelism, a value of --training.parallel.
        tensor: Tensor parallelism, a value of --training.tensor.
        recompute: Whether activation checkpointing is on.
        memory_bytes: Memory of one GPU.
        sent_bytes: Bytes that one GPU sends in one step.
        sending_seconds: Seconds of communication in one step.
        step_seconds: Seconds of one step.
        utilisation: Model FLOPs utilization (MFU; Chowdhery et al. 2022, appendix B).
        seconds: Duration of the run at a typical utilization.
        low_seconds: Duration at a high one.
        high_seconds: Duration at a low one.
        gpu_hours: GPU hours.
        kilowatt_hours: Energy by the datasheet.
        money: Costs, if a price is given.
        gpu: Kind of GPU.
        gpus: Number of GPUs.
        machines: Number of machines.
        model: Fields of the `ModelConfig`.
    """

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
    gpu: str
    gpus: int
    machines: int
    model: dict[str, Any]

    def __str__(self) -> str:
        """The estimate for a person."""
        times = [self.seconds, self.low_seconds, self.high_seconds]
        days = self.seconds > 2 * 86400
        expected, low, high = (f"{t / 86400:,.3g} days" if days else format_duration(t) for t in times)
        parallelism = f"--training.parallel {self.parallel} --training.tensor {self.tensor}"
        rows = {
            "machines": f"{self.machines:,} with {self.gpus // self.machines} × {self.gpu}",
            "model": f"{self.parameters / 1e9:,.3g} billion parameters, {self.model['n_layers']} layers, width "
            f"{self.model['d_model']:,}, context length {self.model['context_length']:,}, vocabulary "
            f"{self.model['vocab_size']:,}",
            "training": f"{self.tokens / 1e9:,.4g} billion tokens, {self.steps:,} steps of {self.batch_tokens:,}",
            "parallelism": parallelism + (", activation checkpointing" if self.recompute else ""),
            "memory": f"{self.memory_bytes / 1e9:,.1f} GB per GPU",
            "network": f"{self.sent_bytes / 1e9:,.3g} GB per GPU and step, {format_duration(self.sending_seconds)} of "
            f"{format_duration(self.step_seconds)}",
            "utilization": f"{100 * self.utilisation:.0f} % of the peak FLOPS (MFU)",
            "time": f"{expected} ({low}–{high})",
            "GPU hours": f"{self.gpu_hours:,.0f}",
            "energy": f"{self.kilowatt_hours:,.0f} kWh, by the datasheet",
            "compute": f"{self.flops:.3g} floating-point operations",
            **({} if self.money is None else {"costs": f"{self.money:,.0f}"}),
        }
        return "\n".join(f"{name:<13}{value}" for name, value in rows.items())


# ---------------------------------------------------------------- memory and communication


def model_shape_for(parameters: float) -> tuple[int, int, int]:
    """Layers, heads and width of a model with about `parameters` parameters in its blocks.

    A width of 128 per layer, as in large published models, heads of 128, and 12·layers·width² parameters.
    """
    width = max(128, round((parameters * 128 / 12) ** (1 / 3) / 128) * 128)
    return max(1, round(parameters / (12 * width**2))), width // 128, width


def cluster_batch_tokens(tokens: float, context_length: int, world_size: int) -> int:
    """Tokens per step: about 4·√tokens, as in published runs on 10 billion to 15 trillion tokens, in whole windows per GPU."""
    tokens_per_round = context_length * world_size
    return tokens_per_round * max(1, round(4 * math.sqrt(tokens) / tokens_per_round))


def memory_per_gpu(config: ModelConfig, cluster: Cluster, layout: ParallelLayout) -> float:
    """The memory of one GPU in bytes.

    Sharded float32 weights, gradients and two moments (16 bytes a parameter); gathered bfloat16 weights with their gradients;
    activations of 34 bytes per number of the residual stream and block (Korthikanti et al. 2022, table 2, without attention
    matrices), of which tensor parallelism divides all but the 4 at the inputs of attention and feed-forward; logits.
    """
    num_parameters, tp_size = config.parameters, layout.tp_size
    embeddings = config.vocab_size * config.d_model * (1 if config.tied else 2)
    block_parameters = (num_parameters - embeddings) / config.n_layers
    shards = cluster.gpus_per_machine if layout.strategy == "hsdp" else cluster.num_gpus
    # Block by block, the next block's weights are prefetched.
    block_by_block = layout.strategy != "fsdp-no-reshard"
    gathered = 6 * embeddings + 8 * block_parameters if block_by_block else 6 * num_parameters
    residual_numbers = layout.micro_batch_size * config.context_length * config.d_model
    block_activations = (4 + 30 / tp_size) * residual_numbers
    activations = block_activations * config.n_layers
    if layout.activation_checkpointing:
        activations = block_activations + 2 * residual_numbers / tp_size * config.n_layers
    return 16 * num_parameters / shards + gathered / tp_size + activations + LOGIT_CHUNK_BYTES


class CommVolume(NamedTuple):
    """What one GPU sends in a step: bytes, seconds of FSDP, and seconds of tensor parallelism, which nothing overlaps."""

    total_bytes: float
    fsdp_seconds: float
    tensor_parallel_seconds: float


def comm_volume(config: ModelConfig, cluster: Cluster, layout: ParallelLayout, micro_batches: int) -> CommVolume:
    """The communication of a step.

    bfloat16 weights are gathered in the forward and backward pass of each micro-batch, or once a step without resharding;
    float32 gradients are reduced once. Tensor parallelism reduces activations after attention and feed-forward, in both passes
    (Shoeybi et al. 2019, section 3).
    """
    tp_size, is_hsdp = layout.tp_size, layout.strategy == "hsdp"
    weights, gradients = 2.0 * config.parameters / tp_size, 4.0 * config.parameters / tp_size
    gathers = 1 if layout.strategy == "fsdp-no-reshard" else 2 * micro_batches
    residual_bytes = 2 * layout.micro_batch_size * config.context_length * config.d_model
    all_reduces = config.n_layers * micro_batches * (6 if layout.activation_checkpointing else 4)
    tensor_parallel_bytes = all_reduces * 2 * (tp_size - 1) / tp_size * residual_bytes

    group = cluster.num_gpus // tp_size  # GPUs that hold the same slices
    inner = cluster.gpus_per_machine // tp_size if is_hsdp or cluster.machines == 1 else 1
    outer = group // inner
    intra_node_bytes = (inner - 1) / inner * (gathers * weights + gradients)
    inter_node_bytes = 0.0
    if outer > 1 and is_hsdp:  # machines all-reduce their shards of the gradients
        inter_node_bytes = 2 * (outer - 1) / outer * gradients / inner
    elif outer > 1:
        inter_node_bytes = (group - 1) / group * (gathers * weights + gradients)
    return CommVolume(
        intra_node_bytes + inter_node_bytes + tensor_parallel_bytes,
        intra_node_bytes / cluster.gpu.intra_node_bandwidth + inter_node_bytes / cluster.gpu.inter_node_bandwidth,
        tensor_parallel_bytes / cluster.gpu.intra_node_bandwidth,
    )


# ---------------------------------------------------------------- the estimate


def candidate_layouts(cluster: Cluster, max_micro_batch_size: int) -> Iterator[ParallelLayout]:
    """All layouts worth considering; `max_micro_batch_size` is the number of windows of a step per GPU."""
    tp_sizes = [size for size in (1, 2, 4, 8) if cluster.gpus_per_machine % size == 0]
    # fsdp takes several GPUs, hsdp several machines.
    strategies = get_args(ParallelStrategy)[: 1 + (cluster.num_gpus > 1) + (cluster.machines > 1)]
    for tp_size, activation_checkpointing, strategy in product(tp_sizes, (False, True), strategies):
        largest = max_micro_batch_size * tp_size
        for halvings in range(largest.bit_length()):
            yield ParallelLayout(strategy, activation_checkpointing, largest >> halvings, tp_size)


def estimate(
    config: ModelConfig,
    tokens: float,
    cluster: Cluster,
    *,
    batch_tokens: int | None = None,
    price_per_gpu_hour: float | None = None,
) -> ClusterEstimate:
    """Estimate a run with the fastest layout that fits in memory.

    Args:
        config: the model.
        tokens: the training tokens.
        cluster: the machines.
        batch_tokens: tokens per step; None for `cluster_batch_tokens`.
        price_per_gpu_hour: in any currency.

    Raises:
        UsageError: no layout fits in memory; says how many machines would do.
    """
    batch = batch_tokens or cluster_batch_tokens(tokens, config.context_length, cluster.num_gpus)
    windows_per_gpu = max(1, batch // (config.context_length * cluster.num_gpus))
    usable_memory = USABLE_MEMORY_FRACTION * cluster.gpu.memory_bytes
    layouts = candidate_layouts(cluster, windows_per_gpu)
    fitting = [layout for layout in layouts if memory_per_gpu(config, cluster, layout) <= usable_memory]
    if not fitting:
        sharded = ParallelLayout("fsdp", True, 1, cluster.gpus_per_machine)
        larger = (replace(cluster, machines=cluster.machines << doublings) for doublings in range(1, 21))
        enough = (c.machines for c in larger if memory_per_gpu(config, c, sharded) <= usable_memory)
        too_large = "a single block needs more memory than a GPU of this type has"
        remedy = next((f"{machines} such machines would do" for machines in enough), too_large)
        raise UsageError(f"{config.parameters / 1e9:.3g} billion parameters do not fit: {remedy}")
    batch_flops, cluster_flops = batch * config.flops_per_token, cluster.num_gpus * cluster.gpu.peak_flops

    def comm_of(layout: ParallelLayout) -> CommVolume:
        return comm_volume(config, cluster, layout, -(-windows_per_gpu * layout.tp_size // layout.micro_batch_size))

    def seconds_of(layout: ParallelLayout, mfu: float) -> float:
        """The time of a step. Gathering block by block overlaps with computation."""
        comm = comm_of(layout)
        recompute = 4 / 3 if layout.activation_checkpointing else 1
        busy = batch_flops / (cluster_flops * mfu) * recompute + comm.tensor_parallel_seconds
        return busy + comm.fsdp_seconds if layout.strategy == "fsdp-no-reshard" else max(busy, comm.fsdp_seconds)

    layout = min(fitting, key=lambda layout: seconds_of(layout, TYPICAL_MFU))
    comm, step_seconds = comm_of(layout), seconds_of(layout, TYPICAL_MFU)
    steps = math.ceil(tokens / batch)
    gpu_hours = steps * step_seconds * cluster.num_gpus / 3600
    return ClusterEstimate(
        parameters=config.parameters,
        tokens=tokens,
        flops=tokens * config.flops_per_token,
        batch_tokens=batch,
        steps=steps,
        parallel=layout.strategy,
        tensor=layout.tp_size,
        recompute=layout.activation_checkpointing,
        memory_bytes=memory_per_gpu(config, cluster, layout),
        sent_bytes=comm.total_bytes,
        sending_seconds=comm.fsdp_seconds + comm.tensor_parallel_seconds,
        step_seconds=step_seconds,
        utilisation=batch_flops / (step_seconds * cluster_flops),
        seconds=steps * step_seconds,
        low_seconds=steps * seconds_of(layout, HIGH_MFU),
        high_seconds=steps * seconds_of(layout, LOW_MFU),
        gpu_hours=gpu_hours,
        kilowatt_hours=gpu_hours * cluster.gpu.watts * POWER_USAGE_EFFECTIVENESS / 1000,
        money=None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour,
        gpu=cluster.gpu.name,
        gpus=cluster.num_gpus,
        machines=cluster.machines,
        model=config.to_dict(),
    )


# ---------------------------------------------------------------- from a recipe


def estimate_cluster_run(
    recipe: Recipe,
    gpu: str,
    *,
    machines: int = 1,
    gpus_per_machine: int = 8,
    parameters: int | None = None,
    price_per_gpu_hour: float | None = None,
) -> ClusterEstimate:
    """Estimate a recipe on GPUs that are known by their datasheets.

    Args:
        recipe: the recipe. Its length is one of tokens, operations and time.
        gpu: a key of `GPU_SPECS`, in any case.
        machines: the number of machines.
        gpus_per_machine: the number of GPUs of each.
        parameters: the approximate number of parameters. None for the recipe's size, or for the compute-optimal
            one.
        price_per_gpu_hour: in any currency.

    Raises:
        UsageError: unknown GPU, no valid model, or a model that does not fit.
    """
    if gpu.lower() not in GPU_SPECS:
        raise UsageError(f"--gpu {gpu}: unknown; choose one of {', '.join(GPU_SPECS)}")
    if parameters is not None and recipe.size is not None:
        raise UsageError("--parameters and --size exclude each other")
    cluster = Cluster(GPU_SPECS[gpu.lower()], machines, gpus_per_machine)
    tokens, flops, settings = recipe.tokens, recipe.flops, recipe.model
    if flops is None and tokens is None and recipe.budget is not None:
        flops = recipe.budget * cluster.num_gpus * cluster.gpu.peak_flops * TYPICAL_MFU
    if recipe.size is None:
        if parameters is not None:
            num_parameters = float(parameters)
        elif flops:  # compute-optimal: C = 6 N D operations with D = 20 N tokens
            num_parameters = math.sqrt(flops / 6 / TOKENS_PER_PARAMETER)
        else:
            num_parameters = (tokens or 0) / TOKENS_PER_PARAMETER
        if parameters is None and num_parameters < 1e5:
            raise UsageError("set the size of the model (--parameters 7B) or the length of the run (--tokens 2T)")
        n_layers, n_heads, d_model = model_shape_for(num_parameters)
        shape = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "context_length": CONTEXT_LENGTH}
        settings = shape | settings
    try:
        vocab_size = recipe.vocab_size or DEFAULT_VOCAB_SIZE
        config = build_config(recipe.preset, recipe.size or "125m", vocab_size=vocab_size, **settings)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    tokens = tokens or (flops / config.flops_per_token if flops else TOKENS_PER_PARAMETER * config.parameters)
    return estimate(
        config, tokens, cluster, batch_tokens=recipe.training.batch_tokens, price_per_gpu_hour=price_per_gpu_hour
    )
