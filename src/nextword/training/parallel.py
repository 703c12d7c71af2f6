"""How the processes of a run share its weights, gradients and the optimizer's state: which numbers each keeps, and the few
moments when somebody needs those of the others.

It is PyTorch's own sharing: `fully_shard` (FSDP2) deals out the rows of every weight, and `parallelize_module` splits the
blocks' matrices between processes that work on them together (tensor parallelism: Shoeybi et al. 2019, section 3).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nextword.common.errors import UsageError
from nextword.training.distributed import SINGLE_PROCESS, DistContext, ParallelStrategy, translate_dist_errors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from nextword.model.config import ModelConfig
    from nextword.model.gpt import GPT, Cache
    from nextword.training.losses import LossModule


def apply_parallelism(
    world: DistContext, loss_module: "LossModule", parallel: ParallelStrategy, bf16: bool, device: torch.device
) -> None:
    """Give each process its part of every weight, and of its gradient: the sums over all processes, not their mean, for
    each loss is divided by its count over the whole batch already. A hollow model gets its memory on `device` thereby, and
    never more than a part of it.

    Args:
        parallel: "data": the whole step is one unit, whose weights are gathered once a step and are whole until the
            backward pass is done, so that several micro-batches cost no more communication than one. "full": each block
            is one, gathered when it works. "hybrid": the same, among the processes of one machine, with a copy in each.
            Where several processes work on each matrix together, what is gathered is their slice of it.
        bf16: gather the blocks' weights in bfloat16, in which their products are made then; gradients stay in float32.

    Raises:
        UsageError: the processes of a machine cannot be grouped as the run wants it.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = build_mesh(world, parallel, device)
    if world.tp_size > 1:
        apply_tensor_parallel(loss_module.model, mesh["tensor"])
        mesh = mesh["copies", "parts"] if parallel == "hybrid" else mesh["parts"]
    world.by_block = parallel != "data"
    if world.fsdp_per_block:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in loss_module.model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy if bf16 else MixedPrecisionPolicy())
    root = loss_module.model if world.fsdp_per_block else loss_module  # which runs by itself too, between two steps
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    for module in loss_module.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if loss_module.model.token_embedding.weight.is_meta:
        root.to_empty(device=device)
        loss_module.model.tabulate()


def build_mesh(world: DistContext, parallel: ParallelStrategy, device: torch.device) -> "DeviceMesh":
    """Let the processes stand in rows: those that work on a matrix together side by side (`tensor`), then those that have
    different parts of the weights (`parts`), then those that have equal ones (`copies`)."""
    from torch.distributed.device_mesh import init_device_mesh

    shard_group_size = world.local_world_size if parallel == "hybrid" else world.world_size
    if shard_group_size % world.tp_size:
        raise UsageError(
            f"--training.tensor {world.tp_size} does not divide the {shard_group_size} processes of a machine"
        )
    copies, world.parts = world.world_size // shard_group_size, shard_group_size // world.tp_size
    world.copy, world.part = divmod(world.dp_rank, world.row_shard_count)
    lengths = {"parts": world.row_shard_count}
    if parallel == "hybrid":
        lengths = {"copies": copies, **lengths}
    if world.tp_size > 1:
        lengths["tensor"] = world.tp_size
    mesh = init_device_mesh(device.type, tuple(lengths.values()), mesh_dim_names=tuple(lengths))
    if world.tp_size == 1:
        world.keepers = mesh.get_group("parts")
    else:
        flat = init_device_mesh(device.type, (copies, shard_group_size), mesh_dim_names=("copies", "keepers"))
        world.keepers = flat.get_group("keepers")
    return mesh


# ---------------------------------------------------------------- matrices that several work on


def apply_tensor_parallel(model: "GPT", mesh: "DeviceMesh") -> None:
    """Let the processes of a mesh work on a model together: each has some of a block's heads and of its feed-forward width, and
    some of the vocabulary; and between the matrices some of the positions, so that of all that a block keeps each has a part
    (sequence parallelism: Korthikanti et al. 2022, section 4.2.2). All positions are gathered at the door of attention and of
    feed-forward, and what comes out is added up and dealt out again. The logits stay where they are made, see
    `split_cross_entropies`."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def gather_sequence(*others: None) -> PrepareModuleInput:
        return PrepareModuleInput(input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others))

    rowwise_sequence, norm = RowwiseParallel(output_layouts=Shard(1)), SequenceParallel(use_local_output=True)
    plan: dict[str, Any] = {"attention_norm": norm, "feed_forward_norm": norm}
    plan |= {"attention": gather_sequence(None, None, None), "feed_forward": gather_sequence()}
    plan |= {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    plan |= {
        "attention.output": rowwise_sequence,
        "feed_forward.down": rowwise_sequence,
        "feed_forward.up": ColwiseParallel(),
    }
    if model.config.activation == "swiglu":
        plan["feed_forward.gate"] = ColwiseParallel()
    if model.config.qk_norm:  # of each head by itself, and heads are dimension 1
        plan |= {f"attention.{name}_norm": norm for name in ("query", "key")}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    model_plan: dict[str, Any] = {
        "token_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    }
    if model.config.positions == "learned":
        model_plan["position_embedding"] = SequenceParallel(sequence_dim=0, use_local_output=True)
    if model.config.norm_position == "pre":
        model_plan["final_norm"] = norm
    if model.head is not None:
        model_plan["head"] = ColwiseParallel()
    parallelize_module(model, mesh, model_plan)
    model.forward = partial(sequence_parallel_forward, model.forward, model.config.positions, mesh)


def sequence_parallel_forward(
    forward: Callable[..., Tensor],
    position_encoding: str,
    mesh: "DeviceMesh",
    tokens: Tensor,
    *,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    cache: "Cache | None" = None,
    dropout_masks: Tensor | None = None,
) -> Tensor:
    """Hidden states [B, T, D] of tokens [B, T] that all processes of a mesh have, by the `forward` of a model of which each has
    T / processes positions between the matrices. Each gets all hidden states, and gives its part of their gradient.

    Where T is no multiple of the processes there is more at the end, which none before it sees.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    assert positions is None and segments is None and cache is None, "a row is a window of one text"
    length, size = tokens.shape[1], mesh.size()
    local_length = -(-length // size)
    tokens = nn.functional.pad(tokens, (0, local_length * size - length))
    local_slice = slice(local_length * mesh.get_local_rank(), local_length * (mesh.get_local_rank() + 1))
    if dropout_masks is not None:
        dropout_masks = nn.functional.pad(dropout_masks, (0, 0, 0, local_length * size - length))[..., local_slice, :]
    positions = torch.arange(local_length * size, device=tokens.device).clamp(max=length - 1)
    if position_encoding != "rope":  # else attention turns by them, where all are
        positions = positions[local_slice]
    hidden = forward(tokens, positions=positions, keep=dropout_masks)  # [B, T / processes, D]
    hidden = DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
    return hidden.to_local(grad_placements=[Partial()])[:, :length]


def vocab_parallel_cross_entropy(hidden: Tensor, unembedding: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """−log softmax(hidden · unembeddingᵀ)[target] at each position [N], 0 where it is the one `ignored`, in every process of
    those that have some rows each of the unembedding [V, D]; none makes more than its columns of the logits [N, V].

    log Σ exp over the vocabulary is that of each process's own log Σ exp. The target's logit is known to one of them. All have
    the same hidden states [N, D]; the gradient that each gives them is its part of a sum, see `forward_by_positions`.
    """
    from torch.distributed.tensor import DTensor, Partial, Shard

    assert isinstance(unembedding, DTensor)
    mesh, local_unembedding = unembedding.device_mesh, unembedding.to_local()
    logits = nn.functional.linear(hidden, local_unembedding).float()  # [N, V / processes]
    shard_logsumexp = DTensor.from_local(logits.logsumexp(1)[None], mesh, [Shard(0)], run_check=False).full_tensor()
    local_targets = targets - chunk_bounds(len(unembedding), mesh.get_local_rank(), mesh.size())[0]
    is_local = (local_targets >= 0) & (local_targets < len(local_unembedding))
    target_logits = logits.gather(1, local_targets.clamp(0, len(local_unembedding) - 1)[:, None])[:, 0].where(
        is_local, 0.0
    )
    target_logits = DTensor.from_local(target_logits, mesh, [Partial()], run_check=False).full_tensor()
    return (shard_logsumexp.logsumexp(0) - target_logits).where(targets != ignore_index, 0.0)


def check_tp_divisibility(config: "ModelConfig", tp_size: int) -> None:
    """Raises `UsageError` where a model's matrices cannot be split between so many processes: heads and feed-forward width
    equally, and of the vocabulary something for each."""
    widths = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "d_ff": config.d_ff}
    for name, width in widths.items():
        if width % tp_size:
            raise UsageError(
                f"--training.tensor {tp_size} does not divide the model's {name}, {width}: say another number of "
                f"processes, or another --model.{name.replace('_', '-')}"
            )
    if not chunk_bounds(config.vocab_size, tp_size - 1, tp_size)[1]:
        raise UsageError(f"--training.tensor {tp_size} leaves nothing for some of a vocabulary of {config.vocab_size}")


def tp_shard_dim(weight: Tensor) -> int | None:
    """In which dimension a weight is split between processes that work on it together; None where each has all of it."""
    placements = getattr(weight, "placements", ())
    if not placements or weight.device_mesh.mesh_dim_names[-1] != "tensor":  # pyright: ignore[reportAttributeAccessIssue]
        return None
    return placements[-1].dim if placements[-1].is_shard() else None


# ---------------------------------------------------------------- whose numbers


def to_local(tensor: Tensor) -> Tensor:
    """This process's own part of a tensor, or the tensor itself where it is whole."""
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]
    return local.wait() if hasattr(local, "wait") else local  # a sum may be under way


def to_full(tensor: Tensor) -> Tensor:
    """A tensor with the parts that the other processes have; all of them ask together."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Replicate

    with translate_dist_errors():
        # The rows of each slice, then the slices: in one go PyTorch does it too, and warns of what it costs.
        if tp_shard_dim(tensor) is not None:
            rows = [Replicate()] * (len(tensor.placements) - 1)  # pyright: ignore[reportAttributeAccessIssue]
            tensor = tensor.redistribute(placements=[*rows, tensor.placements[-1]])  # pyright: ignore[reportAttributeAccessIssue]
        return tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]


def chunk_bounds(length: int, index: int, num_chunks: int) -> tuple[int, int]:
    """Where one of `size` parts of so many rows begins, and how long it is: as torch.chunk, and so PyTorch, deals them out."""
    chunk_length = -(-length // num_chunks)
    begin = min(length, index * chunk_length)
    return begin, min(chunk_length, length - begin)


def local_slices(weight: Tensor, world: DistContext, shard_index: int | None = None) -> tuple[slice, ...]:
    """Which of a weight's numbers this process keeps, or another one by its place among `world.keepers`: a slice for each
    dimension."""
    if not hasattr(weight, "placements"):
        return tuple(slice(0, length) for length in weight.shape)
    return shard_slices(
        weight.shape, tp_shard_dim(weight), world, world.shard_index if shard_index is None else shard_index
    )


def shard_slices(shape: Sequence[int], tp_dim: int | None, world: DistContext, shard_index: int) -> tuple[slice, ...]:
    """The same of a weight of this shape that is split in that dimension: of its slice, a part of the rows."""
    row_shard, tensor_rank = divmod(shard_index, world.tp_size)
    starts, lengths = [0] * len(shape), list(shape)
    if tp_dim is not None:
        starts[tp_dim], lengths[tp_dim] = chunk_bounds(lengths[tp_dim], tensor_rank, world.tp_size)
    offset, length = chunk_bounds(lengths[0], row_shard, world.row_shard_count)
    starts[0], lengths[0] = starts[0] + offset, length
    return tuple(slice(begin, begin + length) for begin, length in zip(starts, lengths, strict=True))


def is_shard_owner(tensor: Tensor, world: DistContext) -> bool:
    """Whether this process is the first of those that keep the same part of a tensor."""
    if not hasattr(tensor, "placements"):
        return world.is_main
    return not world.replica_rank and (not world.tp_rank or tp_shard_dim(tensor) is not None)


@torch.no_grad()
def load_weights_(model: nn.Module, weights: Iterable[tuple[str, Tensor]], world: DistContext = SINGLE_PROCESS) -> None:
    """Put weights, whole or shared as the model's own are, in the place of those that are trained."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in weights:
        if (parameter := parameters.get(name)) is not None:
            local = to_local(tensor) if hasattr(tensor, "placements") else tensor[local_slices(parameter, world)]
            to_local(parameter).copy_(local)


# ---------------------------------------------------------------- in a step, and between two


def set_grad_sync(loss_module: nn.Module, model: nn.Module, more_micro_batches: bool) -> None:
    """Before a micro-batch: whether others of the same step follow, so that its gradients need not be sent yet."""
    for unit in (loss_module, model):
        if hasattr(unit, "set_requires_gradient_sync"):
            unit.set_requires_gradient_sync(not more_micro_batches)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, world: DistContext = SINGLE_PROCESS) -> Tensor:
    """Scale all gradients down to a norm of `limit`, where it is more; the norm as it was, the same in every process."""
    if world.world_size == 1:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    square = nn.utils.get_total_norm([to_local(g) for g in gradients if is_shard_owner(g, world)]).square()
    with translate_dist_errors():
        dist.all_reduce(square)
    norm = square.sqrt()
    for gradient in gradients:
        to_local(gradient).mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextmanager
def unsharded(world: DistContext, loss_module: "LossModule") -> Iterator["GPT"]:
    """The model of a step as it can be used between two steps, in all processes together: with all of its weights (or this
    process's slices of them), or where they are gathered by block, with those that it runs by."""
    units = [module for module in (loss_module, loss_module.model) if hasattr(module, "reshard")]
    for unit in [] if world.fsdp_per_block else units:
        unit.unshard()  # pyright: ignore[reportCallIssue]
    try:
        yield loss_module.model
    finally:
        for unit in units:
            unit.reshard()  # pyright: ignore[reportCallIssue]


def run_on_owner_rank(
    weights: Sequence[Tensor],
    local_blocks: Sequence[Tensor],
    transform: Callable[[list[Tensor]], list[Tensor]],
    world: DistContext,
) -> list[Tensor]:
    """Let each matrix be changed as a whole by one process, its owner, and give back this process's part of each.

    Owners are chosen so that all have about the same work. Two exchanges of as many numbers as the matrices have, and nobody
    ever holds more than their own.

    Args:
        shared: the weights [R, C] that say how a matrix is shared.
        parts: this process's block of each matrix.
        change: from a list of whole matrices to a list of as many.
    """
    shapes = [weight.shape for weight in weights]
    size = world.shard_count
    owners = balance_by_cost([rows * columns * min(rows, columns) for rows, columns in shapes], size)
    indices_by_owner = [[i for i, owner in enumerate(owners) if owner == process] for process in range(size)]
    owned_indices = indices_by_owner[world.shard_index]
    slices_by_rank = [[local_slices(weights[i], world, process) for i in owned_indices] for process in range(size)]
    counts = [[math.prod(s.stop - s.start for s in block) for block in some] for some in slices_by_rank]

    def all_to_all(pieces: list[list[Tensor]], counts: list[list[int]]) -> list[tuple[Tensor, ...]]:
        """Send a list of tensors to each process; what each has sent, as rows of so many numbers."""
        outgoing = [torch.cat([p.flatten() for p in some]) if some else local_blocks[0].new_zeros(0) for some in pieces]
        totals = [sum(some) for some in counts]
        incoming = local_blocks[0].new_empty(sum(totals))
        with translate_dist_errors():
            dist.all_to_all_single(
                incoming, torch.cat(outgoing), totals, [len(one) for one in outgoing], world.shard_group
            )
        return [row.split(some) for row, some in zip(incoming.split(totals), counts, strict=True)]

    received = all_to_all([[local_blocks[i] for i in some] for some in indices_by_owner], counts)
    matrices = [local_blocks[0].new_empty(shapes[i]) for i in owned_indices]
    for of_one, numbers in zip(slices_by_rank, received, strict=True):
        for matrix, block, row in zip(matrices, of_one, numbers, strict=True):
            matrix[block] = row.view(matrix[block].shape)
    changed = transform(matrices)
    outgoing_blocks = [[matrix[block] for matrix, block in zip(changed, some, strict=True)] for some in slices_by_rank]
    received = all_to_all(outgoing_blocks, [[local_blocks[i].numel() for i in some] for some in indices_by_owner])
    results = {
        i: row.view(local_blocks[i].shape)
        for some, numbers in zip(indices_by_owner, received, strict=True)
        for i, row in zip(some, numbers, strict=True)
    }
    return [results[i] for i in range(len(local_blocks))]


def balance_by_cost(costs: Sequence[float], num_workers: int) -> list[int]:
    """Which of `size` processes takes each piece of work: the costliest first, each to the one that has least."""
    loads, owners = [0.0] * num_workers, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(num_workers), key=lambda process: (loads[process], process))
        loads[owners[i]] += costs[i]
    return owners
