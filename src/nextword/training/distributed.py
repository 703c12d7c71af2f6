"""Several processes, one run: who they are, and what they agree on.

The process of rank 0 leads. It alone holds the run folder, follows the clock, measures the machine and speaks to a person; the
others take from it what was decided, and do their part of every step. torchrun (or whoever sets RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT) starts them. How they share the weights is said in `sharing`.
"""

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError

Parallel = Literal["data", "full", "hybrid"]
PATIENCE = 30 * 60.0  # seconds that one waits for another, as in the preparation of a text
VARIABLE = "NEXTWORD_PATIENCE"  # of the environment: another number of seconds
REST = 0.1  # seconds that a process leaves to the library's threads, once it has left the others
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
        tensor_rank, tensor_size: which one this is, of how many that work on the same windows, and on each matrix together.
        part, parts: which part of the rows of every weight this process keeps, from 0, of how many.
        copy: which of several equal copies of that part, from 0, where the weights are shared within each machine only.
        keepers: the group of processes that have one copy of all weights among them.
        by_block: whether the weights are gathered a block at a time, so that no process ever has all of them.
    """

    tensor_rank, tensor_size, part, parts, copy, by_block = 0, 1, 0, 1, 0, False
    keepers: Any = None

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1, again: bool = False):
        self.rank, self.size, self.local_size, self.again = rank, size, local_size, again

    def form_groups(self, tensor_size: int) -> None:
        """Let each `tensor_size` processes in a row work together on the same windows. Raises `UsageError` if some are left."""
        if self.size % tensor_size:
            there = "there is one: torchrun starts several" if self.size == 1 else f"there are {self.size}"
            raise UsageError(f"--training.tensor {tensor_size} must divide the number of processes, and {there}")
        self.tensor_rank, self.tensor_size = self.rank % tensor_size, tensor_size

    @property
    def data_rank(self) -> int:
        """Which equal part of a batch is this process's, of `data_size`."""
        return self.rank // self.tensor_size

    @property
    def data_size(self) -> int:
        return self.size // self.tensor_size

    @property
    def place(self) -> int:
        """Which of the `keepers` this one is, of `places`."""
        return self.part * self.tensor_size + self.tensor_rank

    @property
    def places(self) -> int:
        return self.parts * self.tensor_size

    @property
    def in_step(self) -> bool:
        """Whether a forward pass of the model takes several processes at the same time."""
        return self.by_block or self.tensor_size > 1

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
        """The sum over all processes, in the tensor itself; those that work on the same windows count once."""
        if self.size > 1:
            if self.tensor_rank:
                tensor.zero_()
            with finding_others():
                dist.all_reduce(tensor)
        return tensor

    def _from_leader(self, tensor: Tensor) -> Tensor:
        with finding_others():
            dist.broadcast(tensor, src=0)
        return tensor


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
        # Gloo's threads live on, as PyTorch's caches hold the groups. One that has not let go of its last tensor when a
        # caller's script ends would abort the process (the program itself ends otherwise: see `__main__`).
        time.sleep(REST)


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
