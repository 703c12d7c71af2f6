"""The process group of a distributed run: ranks, collectives and the errors of a lost peer.

torchrun, or whatever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, starts the processes. Rank 0 is the main process: it
alone writes the run directory, follows the clock and logs. `nextword.training.parallel` shards the model among the processes.
"""

import json
import math
import os
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError
from nextword.training.config import ParallelStrategy

DEFAULT_COLLECTIVE_TIMEOUT = 30 * 60.0  # seconds
TIMEOUT_ENV_VAR = "NEXTWORD_PATIENCE"
SHUTDOWN_GRACE_SECONDS = 0.1
MAX_PEERS_NAMED = 8
PEER_LOST = "a process of this run is gone or does not answer"
_peers: list[str] = []  # "process 1 on its host", for error messages; filled by `init_distributed`


@dataclass(frozen=True)
class DistContext:
    """The position of this process in a distributed run. The default is a run of a single process.

    The ranks form a grid: first along the tensor-parallel dimension, then along the sharded one, then along the replicas.

    Attributes:
        rank: the rank of this process, from 0.
        world_size: the number of processes.
        local_world_size: the number of processes on this machine.
        restarted: whether torchrun restarted the processes after a failure.
        tp_size: the number of processes that hold a slice of each matrix (tensor parallelism).
        strategy: how the weights are sharded, see `nextword.training.parallel.parallelize`.
        shard_group: the processes that together hold one copy of all weights. Set by `parallelize`.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    restarted: bool = False
    tp_size: int = 1
    strategy: ParallelStrategy = "fsdp-no-reshard"
    shard_group: dist.ProcessGroup | None = None

    def with_tensor_parallel(self, tp_size: int) -> "DistContext":
        """The same processes in groups of `tp_size` consecutive ranks, which train on the same rows.

        Raises:
            UsageError: `tp_size` does not divide the number of processes.
        """
        if self.world_size % tp_size:
            there_are = f"are {self.world_size}" if self.world_size > 1 else "is one: start several with torchrun"
            raise UsageError(f"--training.tensor {tp_size} must divide the number of processes, and there {there_are}")
        return replace(self, tp_size=tp_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run directory and logs."""
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        """The slice of each matrix that this process holds, from 0 to `tp_size` - 1."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """The part of each batch that this process trains on, from 0 to `dp_size` - 1."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        """The number of parts that a batch is divided into."""
        return self.world_size // self.tp_size

    @property
    def shard_count(self) -> int:
        """The number of processes in `shard_group`."""
        return self.local_world_size if self.strategy == "hsdp" else self.world_size

    @property
    def shard_index(self) -> int:
        """The rank of this process in `shard_group`."""
        return self.rank % self.shard_count

    @property
    def fsdp_per_block(self) -> bool:
        """Whether weights are gathered block by block, so that no process ever holds all of them."""
        return self.strategy != "fsdp-no-reshard"

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass needs several processes at the same time."""
        return self.world_size > 1 and (self.fsdp_per_block or self.tp_size > 1)

    def broadcast_object(self, value: Any = None) -> Any:
        """The main process's `value`, which must be JSON, on every rank."""
        if self.world_size == 1:
            return value
        encoded = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(encoded)])
        with translate_dist_errors():
            dist.broadcast(length, src=0)
            buffer = torch.frombuffer(bytearray(encoded or int(length)), dtype=torch.uint8)
            dist.broadcast(buffer, src=0)
        return json.loads(bytes(buffer.numpy()))

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The elementwise maximum of `values` over all ranks."""
        if self.world_size == 1:
            return list(values)
        maxima = all_reduce_(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX)
        return [float(value) for value in maxima]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all parts of the batch, in place. Ranks that train on the same rows count once."""
        if self.world_size > 1:
            all_reduce_(tensor.zero_() if self.tp_rank else tensor)
        return tensor


SINGLE_PROCESS = DistContext()


def all_reduce_(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over all ranks, in place."""
    with translate_dist_errors():
        dist.all_reduce(tensor, op)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    return tensor


# ---------------------------------------------------------------- start and end


@contextmanager
def init_distributed() -> Generator[DistContext]:
    """Join the process group that the environment describes, and leave it at the end.

    Raises:
        NextwordError: the other processes could not be reached.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if dist.is_initialized():  # by the caller, for example Ray Train
        yield DistContext(dist.get_rank(), dist.get_world_size(), local_world_size)
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    with translate_dist_errors():
        join_process_group(rank, world_size, attempt)
    try:
        yield DistContext(rank, world_size, local_world_size, restarted=attempt > 0)
    finally:
        _peers.clear()
        dist.destroy_process_group()
        # Gloo's threads outlive the group, since PyTorch's caches keep a reference to it. A thread that still holds a tensor
        # when the interpreter ends aborts the process. The command line leaves without that (`nextword.__main__`); a script
        # that calls the Python API gets this pause.
        time.sleep(SHUTDOWN_GRACE_SECONDS)


def join_process_group(rank: int, world_size: int, attempt: int) -> None:
    """Initialise torch.distributed and exchange host names."""
    has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store
    address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), collective_timeout()
    is_server = rank == 0 and not has_agent_store
    store = dist.TCPStore(address, port, world_size, is_server, timeout)  # pyright: ignore[reportPrivateImportUsage]  (public in the documentation)
    # The store keeps the keys of earlier attempts after a restart; the prefix keeps them apart.
    store = dist.PrefixStore(f"nextword/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]  (as above)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    store.set(f"host/{rank}", socket.gethostname())
    named = [peer for peer in range(world_size) if peer != rank][:MAX_PEERS_NAMED]
    _peers[:] = [f"process {peer} on {store.get(f'host/{peer}').decode()}" for peer in named]


def collective_timeout() -> timedelta:
    """How long a collective waits for the other processes: 30 minutes, or NEXTWORD_PATIENCE in seconds.

    Raises:
        UsageError: the environment variable is not a number from 1 to a million.
    """
    value = os.environ.get(TIMEOUT_ENV_VAR, str(DEFAULT_COLLECTIVE_TIMEOUT))
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 10**6:
        raise UsageError(f"{TIMEOUT_ENV_VAR}={value}: must be a number of seconds, at least 1")
    return timedelta(seconds=seconds)


@contextmanager
def translate_dist_errors() -> Generator[None]:
    """Turn errors of torch.distributed into a `NextwordError` that names the processes that may be lost."""
    try:
        yield
    except RuntimeError as error:
        from_gloo = any(word in str(error) for word in ("gloo", "Connection"))
        if not from_gloo and not isinstance(error, dist.DistError):
            raise
        names = f" ({' or '.join(_peers)})" if _peers else ""
        raise NextwordError(
            f"{PEER_LOST}{names}: {str(error).splitlines()[0]}. The checkpoints are complete: restart all processes with the "
            "same command and --resume"
        ) from error
