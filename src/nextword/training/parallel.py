"""Parallelism: FSDP2 and tensor parallelism with sequence parallelism, on PyTorch's `fully_shard` and `parallelize_module`.

Read from top to bottom: `parallelize` shards a model, `apply_tensor_parallel` splits its matrices, and what follows is used
during training: which slice of a weight a process holds, gradient clipping, and whole matrices for Muon.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nextword.common.errors import UsageError
from nextword.training.config import ParallelStrategy
from nextword.training.distributed import SINGLE_PROCESS, DistContext, all_reduce_, translate_dist_errors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from nextword.model.config import ModelConfig
    from nextword.model.gpt import GPT
    from nextword.training.losses import LossModule


def parallelize(
    ctx: DistContext, loss_module: "LossModule", strategy: ParallelStrategy, *, bf16: bool, device: torch.device
) -> DistContext:
    """Shard the weights of a model, and with them its gradients and optimizer state.

    A model on the meta device gets memory for this process's shards only. Gradients are summed over the processes, not
    averaged, because each loss term is already divided by its count over the global batch.

    Args:
        ctx: the processes, in tensor-parallel groups of `ctx.tp_size`.
        loss_module: the model with its loss, changed in place.
        strategy: "fsdp-no-reshard" gathers all weights once a step and keeps them until the backward pass is done, so that
            gradient accumulation costs no more communication than a single micro-batch. "fsdp" gathers each block when it
            runs. "hsdp" does the same among the processes of a machine, and replicates the weights on every machine.
        bf16: gather the blocks' weights in bfloat16 and compute in it. Gradients are reduced in float32.
        device: where the shards are allocated.

    Returns:
        The context with its strategy and shard group.

    Raises:
        UsageError: the tensor-parallel size does not divide the processes of a shard group.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    ctx = replace(ctx, strategy=strategy)
    mesh, shard_group = build_mesh(ctx, device)
    model = loss_module.model
    if ctx.tp_size > 1:
        apply_tensor_parallel(model, mesh["tp"])
        mesh = mesh["replicate", "shard"] if strategy == "hsdp" else mesh["shard"]
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks if ctx.fsdp_per_block else ():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root = model if ctx.fsdp_per_block else loss_module  # `unsharded` runs the model without its loss
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    for module in loss_module.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if model.token_embedding.weight.is_meta:
        root.to_empty(device=device)
        model.init_buffers()
    return replace(ctx, shard_group=shard_group)


def build_mesh(ctx: DistContext, device: torch.device) -> "tuple[DeviceMesh, dist.ProcessGroup]":
    """The device mesh ([replicate,] shard[, tp]), and the group of the processes that hold one copy of all weights."""
    from torch.distributed.device_mesh import init_device_mesh

    if ctx.shard_count % ctx.tp_size:
        raise UsageError(
            f"--training.tensor {ctx.tp_size} does not divide the {ctx.shard_count} processes of a machine"
        )
    replicas = ctx.world_size // ctx.shard_count
    shape = {"replicate": replicas} if ctx.strategy == "hsdp" else {}
    shape["shard"] = ctx.shard_count // ctx.tp_size
    if ctx.tp_size > 1:
        shape["tp"] = ctx.tp_size
    mesh = init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    if ctx.tp_size == 1:
        return mesh, mesh.get_group("shard")
    flat = init_device_mesh(device.type, (replicas, ctx.shard_count), mesh_dim_names=("replicate", "shard_and_tp"))
    return mesh, flat.get_group("shard_and_tp")


# ---------------------------------------------------------------- tensor and sequence parallelism


def apply_tensor_parallel(model: "GPT", mesh: "DeviceMesh") -> None:
    """Split a model between the processes of a mesh, in place.

    Tensor parallelism (Shoeybi et al. 2019, section 3): each process holds some heads, some of the feed-forward width and some
    rows of the vocabulary. Sequence parallelism (Korthikanti et al. 2022, section 4.2.2): outside the linear layers it holds
    some positions. The positions are all-gathered before attention and feed-forward, and reduce-scattered after them. Logits
    stay split by vocabulary, see `model.cross_entropy.vocab_parallel_cross_entropy`.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    def gather_sequence(num_other_inputs: int) -> tp.PrepareModuleInput:
        others = (None,) * num_other_inputs
        return tp.PrepareModuleInput(input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others))

    norm, scatter_sequence = tp.SequenceParallel(use_local_output=True), tp.RowwiseParallel(output_layouts=Shard(1))
    block_plan: dict[str, Any] = {
        "attention_norm": norm,
        "attention": gather_sequence(num_other_inputs=2),
        "attention.query": tp.ColwiseParallel(),
        "attention.key": tp.ColwiseParallel(),
        "attention.value": tp.ColwiseParallel(),
        "attention.output": scatter_sequence,
        "feed_forward_norm": norm,
        "feed_forward": gather_sequence(num_other_inputs=0),
        "feed_forward.up": tp.ColwiseParallel(),
        "feed_forward.down": scatter_sequence,
    }
    if model.config.activation == "swiglu":
        block_plan["feed_forward.gate"] = tp.ColwiseParallel()
    if model.config.qk_norm:  # normalizes each head by itself; dimension 1 is the heads
        block_plan |= {"attention.query_norm": norm, "attention.key_norm": norm}
    embedding = tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    model_plan: dict[str, Any] = {"token_embedding": embedding}
    if model.config.positions == "learned":
        model_plan["position_embedding"] = tp.SequenceParallel(sequence_dim=0, use_local_output=True)
    if model.config.norm_position == "pre":
        model_plan["final_norm"] = norm
    if model.head is not None:
        model_plan["head"] = tp.ColwiseParallel()
    register_sequence_parallel_hooks(model, mesh)
    for block in model.blocks:
        tp.parallelize_module(block, mesh, block_plan)
    tp.parallelize_module(model, mesh, model_plan)


def register_sequence_parallel_hooks(model: "GPT", mesh: "DeviceMesh") -> None:
    """Let every process of a mesh call the model with all tokens [B, T], and get all hidden states [B, T, D].

    Between the hooks each process computes T / N of the positions. A length that N does not divide is padded at the end, where
    the causal mask hides it.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    size, rank, uses_rope = mesh.size(), mesh.get_local_rank(), model.config.positions == "rope"

    def padded_length(length: int) -> int:
        return -(-length // size) * size

    def pad_tokens(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        (tokens,) = args
        return nn.functional.pad(tokens, (0, padded_length(tokens.shape[1]) - tokens.shape[1]))

    def shard_inputs(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        unsupported = {name for name in ("positions", "segments", "cache") if kwargs.get(name) is not None}
        assert not unsupported, f"sequence parallelism does not support {unsupported}"
        length, masks = args[0].shape[1], kwargs.get("dropout_masks")
        padded = padded_length(length)
        local = slice(rank * padded // size, (rank + 1) * padded // size)
        positions = torch.arange(padded, device=args[0].device).clamp(max=length - 1)
        if masks is not None:  # [1 + 2·n_layers, B, T, D]
            masks = nn.functional.pad(masks, (0, 0, 0, padded - length))[..., local, :]
        # RoPE is applied inside attention, where every process has all positions.
        return args, {**kwargs, "positions": positions if uses_rope else positions[local], "dropout_masks": masks}

    def gather_output(module: nn.Module, args: tuple[Tensor], hidden: Tensor) -> Tensor:
        hidden = DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
        hidden = hidden.to_local(grad_placements=[Partial()])[:, : args[0].shape[1]]
        return hidden.clone()  # FSDP2 must not get a view, whose in-place change would drop its backward hook

    model.token_embedding.register_forward_pre_hook(pad_tokens)
    model.register_forward_pre_hook(shard_inputs, with_kwargs=True)
    model.register_forward_hook(gather_output)


def check_tp_divisibility(config: "ModelConfig", tp_size: int) -> None:
    """Check that heads and feed-forward width divide evenly, and that every process gets a part of the vocabulary.

    Raises:
        UsageError: They are not divisible.
    """
    for name, width in {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "d_ff": config.d_ff}.items():
        if width % tp_size:
            advice = f"choose another number of processes or another --model.{name.replace('_', '-')}"
            raise UsageError(f"--training.tensor {tp_size} does not divide the model's {name}, {width}: {advice}")
    _, rows_of_last = chunk_bounds(config.vocab_size, tp_size - 1, tp_size)
    if not rows_of_last:
        raise UsageError(f"--training.tensor {tp_size} leaves some processes no part of the {config.vocab_size} tokens")


# ---------------------------------------------------------------- shards


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """`isinstance(tensor, DTensor)`, without the import, which a run of a single process does not need."""
    return hasattr(tensor, "placements")


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, or the tensor itself if it is not sharded."""
    if not is_dtensor(tensor):
        return tensor
    local: Any = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local  # its reduction may still be running


def to_full(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process. A collective if the tensor is sharded."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    with translate_dist_errors():
        if tp_shard_dim(tensor) is not None:  # rows first, then slices: PyTorch warns of the cost of both at once
            rows = [Replicate()] * (len(tensor.placements) - 1)
            tensor = tensor.redistribute(placements=[*rows, tensor.placements[-1]])
        return tensor.full_tensor()


def tp_shard_dim(weight: Tensor) -> int | None:
    """The dimension that tensor parallelism splits a weight in, or None."""
    if not is_dtensor(weight) or (weight.device_mesh.mesh_dim_names or ())[-1:] != ("tp",):
        return None
    placement: Any = weight.placements[-1]
    return placement.dim if placement.is_shard() else None


def is_shard_owner(tensor: Tensor, ctx: DistContext) -> bool:
    """Whether this process is the first of those that hold the same shard of a tensor."""
    if not is_dtensor(tensor):
        return ctx.is_main
    is_first_replica = ctx.rank < ctx.shard_count
    return is_first_replica and (ctx.tp_rank == 0 or tp_shard_dim(tensor) is not None)


def chunk_bounds(length: int, index: int, num_chunks: int) -> tuple[int, int]:
    """The start and the length of a chunk, as `torch.chunk`, and so FSDP2, divides `length` rows."""
    chunk_length = -(-length // num_chunks)
    start = min(length, index * chunk_length)
    return start, min(chunk_length, length - start)


def shard_slices(shape: Sequence[int], tp_dim: int | None, ctx: DistContext, shard_index: int) -> tuple[slice, ...]:
    """The part of a sharded weight that one process of the shard group holds, as a slice for each dimension.

    Args:
        shape: the shape of the whole weight.
        tp_dim: the dimension that tensor parallelism splits, or None.
        ctx: the processes.
        shard_index: the process, from 0 to `ctx.shard_count` - 1.
    """
    row_shard, tp_rank = divmod(shard_index, ctx.tp_size)
    starts, lengths = [0] * len(shape), list(shape)
    if tp_dim is not None:
        starts[tp_dim], lengths[tp_dim] = chunk_bounds(lengths[tp_dim], tp_rank, ctx.tp_size)
    offset, lengths[0] = chunk_bounds(lengths[0], row_shard, ctx.shard_count // ctx.tp_size)
    starts[0] += offset
    return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))


def local_slices(weight: Tensor, ctx: DistContext, shard_index: int | None = None) -> tuple[slice, ...]:
    """`shard_slices` of a weight for this process, or for another one of the shard group."""
    if not is_dtensor(weight):
        return tuple(slice(0, length) for length in weight.shape)
    index = ctx.shard_index if shard_index is None else shard_index
    return shard_slices(weight.shape, tp_shard_dim(weight), ctx, index)


@torch.no_grad()
def load_weights_(model: nn.Module, weights: Iterable[tuple[str, Tensor]], ctx: DistContext = SINGLE_PROCESS) -> None:
    """Copy weights into the trainable parameters of the same names, in place.

    Args:
        model: the model, sharded or not.
        weights: names and tensors: whole ones, or DTensors that are sharded like the model's parameters.
        ctx: the processes.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in weights:
        if (parameter := parameters.get(name)) is not None:
            local = to_local(tensor) if is_dtensor(tensor) else tensor[local_slices(parameter, ctx)]
            to_local(parameter).copy_(local)


# ---------------------------------------------------------------- during and between steps


def set_grad_sync(ctx: DistContext, loss_module: nn.Module, enabled: bool) -> None:
    """Reduce the gradients after the next backward pass, or only accumulate them locally."""
    if ctx.world_size == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in loss_module.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled, recurse=False)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, ctx: DistContext = SINGLE_PROCESS) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`.

    Returns:
        The norm before clipping, the same on every process.
    """
    if ctx.world_size == 1:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local_norm = nn.utils.get_total_norm([to_local(g) for g in gradients if is_shard_owner(g, ctx)])
    norm = all_reduce_(local_norm.square()).sqrt()
    for gradient in gradients:
        to_local(gradient).mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextmanager
def unsharded(ctx: DistContext, loss_module: "LossModule") -> Generator["GPT"]:
    """The model of a loss module for use between two steps, on every process at the same time.

    Its weights are gathered, except for the slices of tensor parallelism and for blocks that are gathered when they run.
    """
    if ctx.world_size == 1:
        yield loss_module.model
        return
    from torch.distributed.fsdp import FSDPModule

    roots = [module for module in (loss_module, loss_module.model) if isinstance(module, FSDPModule)]
    for root in () if ctx.fsdp_per_block else roots:
        root.unshard()
    try:
        yield loss_module.model
    finally:
        for root in roots:
            root.reshard()


# ---------------------------------------------------------------- whole matrices for Muon


def run_on_owner_rank(
    local_shards: Mapping[Tensor, Tensor], transform: Callable[[list[Tensor]], list[Tensor]], ctx: DistContext
) -> list[Tensor]:
    """Apply a function to whole matrices, each on one process, its owner.

    Two all-to-all exchanges, each of as many numbers as the shards have. Owners are chosen so that the work is balanced.

    Args:
        local_shards: this process's shard of each matrix, by the sharded weight [R, C] that the matrix is sharded like.
        transform: maps a list of whole matrices to a list of as many of the same shapes.
        ctx: the processes.

    Returns:
        This process's shard of each transformed matrix.
    """
    weights, shards = list(local_shards), list(local_shards.values())
    costs = [weight.numel() * min(weight.shape) for weight in weights]
    owners, ranks = balance_by_cost(costs, ctx.shard_count), range(ctx.shard_count)
    owned_by = [[i for i, owner in enumerate(owners) if owner == rank] for rank in ranks]
    own_weights = [weights[i] for i in owned_by[ctx.shard_index]]
    own_shards = [[shards[i] for i in indices] for indices in owned_by]  # by owner

    def split(matrices: list[Tensor]) -> list[list[Tensor]]:
        """The shards of each process, as views of the matrices that this process owns."""
        pairs = list(zip(matrices, own_weights, strict=True))
        return [[matrix[local_slices(weight, ctx, rank)] for matrix, weight in pairs] for rank in ranks]

    matrices = [shards[0].new_empty(weight.shape) for weight in own_weights]
    views = split(matrices)
    received = _all_to_all(own_shards, views, ctx.shard_group)
    for view, shard in zip(chain(*views), chain(*received), strict=True):
        view.copy_(shard)
    returned = _all_to_all(split(transform(matrices)), own_shards, ctx.shard_group)
    results = dict(zip(chain(*owned_by), chain(*returned), strict=True))
    return [results[i] for i in range(len(shards))]


def _all_to_all(
    outgoing: list[list[Tensor]], like: list[list[Tensor]], group: dist.ProcessGroup | None
) -> list[list[Tensor]]:
    """Send a list of tensors to each process of a group; the tensors received from each, shaped `like` these."""
    empty = next(chain(*outgoing, *like)).new_empty(0)
    sent = torch.cat([empty, *(tensor.flatten() for tensor in chain(*outgoing))])
    counts = [[tensor.numel() for tensor in tensors] for tensors in like]
    received = sent.new_empty(sum(map(sum, counts)))
    sent_counts = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    with translate_dist_errors():
        dist.all_to_all_single(  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
            received, sent, list(map(sum, counts)), sent_counts, group
        )
    parts = iter(torch.split(received, list(chain(*counts))))
    return [[next(parts).view(tensor.shape) for tensor in tensors] for tensors in like]


def balance_by_cost(costs: Sequence[float], num_workers: int) -> list[int]:
    """A worker for each task: the costliest tasks first, each to the worker with the least load (Graham 1969)."""
    loads, owners = [0.0] * num_workers, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(num_workers), key=lambda worker: (loads[worker], worker))
        loads[owners[i]] += costs[i]
    return owners
