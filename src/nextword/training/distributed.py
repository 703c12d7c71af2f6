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

ParallelStrategy = Literal["data", "full", "hybrid"]
DEFAULT_COLLECTIVE_TIMEOUT = 30 * 60.0  # seconds that one waits for another, as in the preparation of a text
TIMEOUT_ENV_VAR = "NEXTWORD_PATIENCE"  # of the environment: another number of seconds
SHUTDOWN_GRACE_SECONDS = 0.1  # seconds that a process leaves to the library's threads, once it has left the others
MAX_PEERS_NAMED = 8  # so many others at most are named where one does not answer
peers: list[str] = []  # "process 1 on its host", of every other process of the run
PEER_LOST = "another process of this run is gone, or does not answer"


class DistContext:
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

    tp_rank, tp_size, row_shard, row_shard_count, replica_rank, fsdp_per_block = 0, 1, 0, 1, 0, False
    shard_group: Any = None

    def __init__(self, rank: int = 0, world_size: int = 1, local_world_size: int = 1, restarted: bool = False):
        self.rank, self.world_size, self.local_world_size, self.restarted = (
            rank,
            world_size,
            local_world_size,
            restarted,
        )

    def init_tensor_parallel(self, tp_size: int) -> None:
        """Let each `tensor_size` processes in a row work together on the same windows. Raises `UsageError` if some are left."""
        if self.world_size % tp_size:
            there = "there is one: torchrun starts several" if self.world_size == 1 else f"there are {self.world_size}"
            raise UsageError(f"--training.tensor {tp_size} must divide the number of processes, and {there}")
        self.tp_rank, self.tp_size = self.rank % tp_size, tp_size

    @property
    def dp_rank(self) -> int:
        """Which equal part of a batch is this process's, of `data_size`."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tp_size

    @property
    def shard_index(self) -> int:
        """Which of the `keepers` this one is, of `places`."""
        return self.row_shard * self.tp_size + self.tp_rank

    @property
    def shard_count(self) -> int:
        return self.row_shard_count * self.tp_size

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass of the model takes several processes at the same time."""
        return self.fsdp_per_block or self.tp_size > 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast_object(self, value: Any = None) -> Any:
        """What the leader says, anything that JSON holds; the others wait for it."""
        if self.world_size == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""
        length = self._broadcast_from_main(torch.tensor([len(text)]))
        payload = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8)
            if text
            else torch.zeros(int(length), dtype=torch.uint8)
        )
        return json.loads(bytes(self._broadcast_from_main(payload).numpy()))

    def broadcast_floats(self, values: Sequence[float]) -> list[float]:
        """A few numbers as the leader has them."""
        return (
            list(values)
            if self.world_size == 1
            else self._broadcast_from_main(torch.tensor(values, dtype=torch.float64)).tolist()
        )

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """Of each number the greatest that any process has."""
        if self.world_size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with translate_dist_errors():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in the tensor itself; those that work on the same windows count once."""
        if self.world_size > 1:
            if self.tp_rank:
                tensor.zero_()
            with translate_dist_errors():
                dist.all_reduce(tensor)
        return tensor

    def _broadcast_from_main(self, tensor: Tensor) -> Tensor:
        with translate_dist_errors():
            dist.broadcast(tensor, src=0)
        return tensor


SINGLE_PROCESS = DistContext()


def collective_timeout() -> timedelta:
    """How long one waits for another. Raises `UsageError` where the environment says no number of seconds."""
    value = os.environ.get(TIMEOUT_ENV_VAR, str(DEFAULT_COLLECTIVE_TIMEOUT))
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 10**6:
        raise UsageError(
            f"{TIMEOUT_ENV_VAR}={value}: how long a process waits for another is a number of seconds, from 1"
        )
    return timedelta(seconds=seconds)


# ---------------------------------------------------------------- coming together


@contextmanager
def init_distributed() -> Iterator[DistContext]:
    """The world that this process was started in; it is left at the end.

    Raises:
        NextwordError: the others could not be reached.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if dist.is_initialized():  # whoever started us has brought us together already, as Ray does
        yield (
            DistContext(dist.get_rank(), dist.get_world_size(), local_size)
            if dist.get_world_size() > 1
            else SINGLE_PROCESS
        )
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store that they meet at
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = collective_timeout()
    with translate_dist_errors():
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            size,
            is_master=rank == 0 and not agent,
            timeout=timeout,
        )
        # Keys of an earlier attempt are still there after a restart, and must not be taken for this one's.
        run_store = dist.PrefixStore(f"nextword/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=run_store, rank=rank, world_size=size, timeout=timeout)
        run_store.set(f"host/{rank}", socket.gethostname())
        ranks = [other for other in range(size) if other != rank][:MAX_PEERS_NAMED]
        peers[:] = [f"process {other} on {run_store.get(f'host/{other}').decode()}" for other in ranks]
    try:
        yield DistContext(rank, size, local_size, attempt > 0)
    finally:
        peers.clear()
        dist.destroy_process_group()
        # Gloo's threads live on, as PyTorch's caches hold the groups. One that has not let go of its last tensor when a
        # caller's script ends would abort the process (the program itself ends otherwise: see `__main__`).
        time.sleep(SHUTDOWN_GRACE_SECONDS)


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """What goes wrong between processes, said to a person."""
    try:
        yield
    except dist.DistError as error:
        raise NextwordError(peer_lost_message(error)) from error
    except RuntimeError as error:  # gloo's own
        if "gloo" not in str(error) and "Connection" not in str(error):
            raise
        raise NextwordError(peer_lost_message(error)) from error


def peer_lost_message(error: Exception) -> str:
    """What a person is told: which process it may be, what the library says of it, and how to go on."""
    which = f" ({' or '.join(peers)})" if peers else ""
    return (
        f"{PEER_LOST}{which}: {str(error).splitlines()[0]}. What was saved is whole: start all of them again by the same command "
        "and --resume"
    )
