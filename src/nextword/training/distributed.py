"""Several processes, one run: who they are, what they agree on, and how they share the weights.

The process of rank 0 leads. It alone holds the run folder, follows the clock, measures the machine and speaks to a person; the
others take from it what was decided, and do their part of every step. torchrun (or whoever sets RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT) starts them. The weights are PyTorch's own to share: `fully_shard` (FSDP2).
"""

import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nextword.errors import NextwordError, UsageError

if TYPE_CHECKING:
    from nextword.model.gpt import GPT
    from nextword.training.objectives import Step

Parallel = Literal["data", "full", "hybrid"]
PATIENCE = 30 * 60.0  # seconds that one waits for another, as in the preparation of a text
VARIABLE = "NEXTWORD_PATIENCE"  # of the environment: another number of seconds
NAMED = 8  # so many others at most are named where one does not answer
others: list[str] = []  # "process 1 on its host", of every other process of the run
LOST = "another process of this run is gone, or does not answer"


class World:
    """The processes of a run, as one of them sees them; alone, where it is the only one.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        local_size: how many of them are on this machine.
        again: whether torchrun started them anew after one had failed.
        part, parts: which part of every weight this process keeps, from 0, of how many; the whole, where it is the only one.
        copy: which of several equal copies of that part, from 0, where the weights are shared within each machine only.
        in_step: whether the model's forward pass takes all processes at the same time, since none ever has all of the weights.
    """

    part, parts, copy, in_step = 0, 1, 0, False

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1, again: bool = False):
        self.rank, self.size, self.local_size, self.again = rank, size, local_size, again

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def told(self, value: Any = None) -> Any:
        """What the leader says, anything that JSON holds; the others wait for it."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.leads else b""
        length = self._from_leader(torch.tensor([len(text)]))
        letters = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8)
            if text
            else torch.zeros(int(length), dtype=torch.uint8)
        )
        return json.loads(bytes(self._from_leader(letters).numpy()))

    def numbers(self, values: Sequence[float]) -> list[float]:
        """A few numbers as the leader has them."""
        return list(values) if self.size == 1 else self._from_leader(torch.tensor(values, dtype=torch.float64)).tolist()

    def most(self, values: Sequence[float]) -> list[float]:
        """Of each number the greatest that any process has."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with finding_others():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in the tensor itself."""
        if self.size > 1:
            with finding_others():
                dist.all_reduce(tensor)
        return tensor

    def _from_leader(self, tensor: Tensor) -> Tensor:
        with finding_others():
            dist.broadcast(tensor, src=0)
        return tensor

    # ------------------------------------------------------------ weights

    def share(self, step: "Step", parallel: Parallel, bf16: bool, device: torch.device) -> None:
        """Give each process its part of every weight, and of its gradient: the sums over all processes, not their mean, for
        each loss is divided by its count over the whole batch already. A hollow model gets its memory on `device` thereby, and
        never more than a part of it.

        Args:
            parallel: "data": the whole step is one unit, whose weights are gathered once a step and are whole until the
                backward pass is done, so that several micro-batches cost no more communication than one. "full": each block
                is one, gathered when it works. "hybrid": the same, among the processes of one machine, with a copy in each.
            bf16: gather the blocks' weights in bfloat16, in which their products are made then; gradients stay in float32.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        shape, names = ((self.size,), ("parts",))
        if parallel == "hybrid":
            shape, names = (self.size // self.local_size, self.local_size), ("copies", "parts")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        *copies, self.part = mesh.get_coordinate() or [0]
        self.parts, self.copy = shape[-1], copies[0] if copies else 0
        self.in_step = parallel != "data"
        if self.in_step:
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            for block in step.model.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy if bf16 else MixedPrecisionPolicy())
        root = step.model if self.in_step else step  # which runs by itself too, between two steps
        fully_shard(root, mesh=mesh, reshard_after_forward=False)
        for module in step.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if step.model.token_embedding.weight.is_meta:
            root.to_empty(device=device)
            step.model.tabulate()

    @contextmanager
    def between_steps(self, step: "Step") -> Iterator["GPT"]:
        """The model of a step as it can be used between two steps, in all processes together: with all of its weights, or where
        none ever has them all (`in_step`) with those that it runs by, and then all have to run it at the same time."""
        units = [module for module in (step, step.model) if hasattr(module, "reshard")]
        for unit in [] if self.in_step else units:
            unit.unshard()  # pyright: ignore[reportCallIssue]
        try:
            yield step.model
        finally:
            for unit in units:
                unit.reshard()  # pyright: ignore[reportCallIssue]


ALONE = World()


def patience() -> timedelta:
    """How long one waits for another. Raises `UsageError` where the environment says no number of seconds."""
    said = os.environ.get(VARIABLE, str(PATIENCE))
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 10**6:
        raise UsageError(f"{VARIABLE}={said}: how long a process waits for another is a number of seconds, from 1")
    return timedelta(seconds=seconds)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that the other processes have; all of them ask together."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with finding_others():
        return tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]


def part(tensor: Tensor) -> Tensor:
    """This process's own part of a tensor, or the tensor itself where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def rows_before(rows: int, process: int, size: int) -> int:
    """How many of a tensor's rows lie with the processes before this one, as `fully_shard` (torch.chunk) deals them out."""
    return min(rows, process * -(-rows // size))


@torch.no_grad()
def fill(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Put weights, whole or shared as the model's own are, in the place of those that are trained."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in weights:
        if (parameter := parameters.get(name)) is not None:
            part(parameter).copy_(part(tensor) if hasattr(tensor, "placements") else own_rows(parameter, tensor))


def own_rows(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole tensor what this process keeps of it, if it is shared as the parameter is."""
    if not hasattr(parameter, "placements"):
        return tensor
    mesh = parameter.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    first = rows_before(len(tensor), mesh.get_coordinate()[-1], mesh.size(-1))
    return tensor[first : first + len(part(parameter))]


def accumulating(step: nn.Module, model: nn.Module, more: bool) -> None:
    """Before a micro-batch: whether others of the same step follow, so that its gradients need not be sent yet."""
    for unit in (step, model):
        if hasattr(unit, "set_requires_gradient_sync"):
            unit.set_requires_gradient_sync(not more)  # pyright: ignore[reportCallIssue]


def at_owners(shared: Sequence[Tensor], parts: Sequence[Tensor], change: Any) -> list[Tensor]:
    """Let each matrix be changed as a whole by one process, its owner, and give back this process's part of each.

    A part holds the rows that `fully_shard` gave to this process. Owners are chosen so that all have about the same work. Two
    exchanges of as many numbers as the matrices have, and nobody ever holds more than their own.

    Args:
        shared: the weights [R, C] that say how a matrix is shared.
        parts: this process's rows of each matrix.
        change: from a list of whole matrices to a list of as many.
    """
    shapes = [weight.shape for weight in shared]
    group = shared[0].device_mesh.get_group(-1)  # pyright: ignore[reportAttributeAccessIssue]
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    owners = spread_evenly([rows * columns * min(rows, columns) for rows, columns in shapes], size)
    theirs = [[i for i, owner in enumerate(owners) if owner == process] for process in range(size)]
    own = theirs[rank]

    def rows_of(i: int, process: int) -> int:
        return rows_before(shapes[i][0], process + 1, size) - rows_before(shapes[i][0], process, size)

    def exchanged(pieces: list[list[Tensor]], counts: list[int]) -> list[Tensor]:
        """Send a list of tensors to each process; what each has sent, as one row of numbers."""
        outgoing = [torch.cat([p.flatten() for p in some]) if some else parts[0].new_zeros(0) for some in pieces]
        incoming = parts[0].new_empty(sum(counts))
        with finding_others():
            dist.all_to_all_single(incoming, torch.cat(outgoing), counts, [len(one) for one in outgoing], group)
        return list(incoming.split(counts))

    sent = [[parts[i] for i in some] for some in theirs]
    heard = exchanged(sent, [sum(rows_of(i, process) * shapes[i][1] for i in own) for process in range(size)])
    pieces = [list(row.split([rows_of(i, p) * shapes[i][1] for i in own])) for p, row in enumerate(heard)]
    matrices = [torch.cat([pieces[p][k] for p in range(size)]).view(shapes[i]) for k, i in enumerate(own)]
    changed = change(matrices)
    rows = [c.split([rows_of(i, process) for process in range(size)]) for c, i in zip(changed, own, strict=True)]
    sent = [[of_one[process] for of_one in rows] for process in range(size)]
    heard = exchanged(sent, [sum(parts[i].numel() for i in some) for some in theirs])
    found: dict[int, Tensor] = {}
    for some, row in zip(theirs, heard, strict=True):
        for i, numbers in zip(some, row.split([parts[i].numel() for i in some]), strict=True):
            found[i] = numbers.view(parts[i].shape)
    return [found[i] for i in range(len(parts))]


def spread_evenly(costs: Sequence[float], size: int) -> list[int]:
    """Which of `size` processes takes each piece of work: the costliest first, each to the one that has least."""
    loads, owners = [0.0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(size), key=lambda process: (loads[process], process))
        loads[owners[i]] += costs[i]
    return owners


# ---------------------------------------------------------------- coming together


@contextmanager
def joined() -> Iterator[World]:
    """The world that this process was started in; it is left at the end.

    Raises:
        NextwordError: the others could not be reached.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if dist.is_initialized():  # whoever started us has brought us together already, as Ray does
        yield World(dist.get_rank(), dist.get_world_size(), local_size) if dist.get_world_size() > 1 else ALONE
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store that they meet at
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = patience()
    with finding_others():
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            size,
            is_master=rank == 0 and not agent,
            timeout=wait,
        )
        # Keys of an earlier attempt are still there after a restart, and must not be taken for this one's.
        own = dist.PrefixStore(f"nextword/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=wait)
        own.set(f"host/{rank}", socket.gethostname())
        ranks = [other for other in range(size) if other != rank][:NAMED]
        others[:] = [f"process {other} on {own.get(f'host/{other}').decode()}" for other in ranks]
    try:
        yield World(rank, size, local_size, attempt > 0)
    finally:
        others.clear()
        dist.destroy_process_group()


@contextmanager
def finding_others() -> Iterator[None]:
    """What goes wrong between processes, said to a person."""
    try:
        yield
    except dist.DistError as error:
        raise NextwordError(lost(error)) from error
    except RuntimeError as error:  # gloo's own
        if "gloo" not in str(error) and "Connection" not in str(error):
            raise
        raise NextwordError(lost(error)) from error


def lost(error: Exception) -> str:
    """What a person is told: which process it may be, what the library says of it, and how to go on."""
    which = f" ({' or '.join(others)})" if others else ""
    return (
        f"{LOST}{which}: {str(error).splitlines()[0]}. What was saved is whole: start all of them again by the same command "
        "and --resume"
    )
