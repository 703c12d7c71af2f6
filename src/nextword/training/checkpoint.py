"""Asynchronous checkpoints: step, weights and optimizer state as safetensors and JSON under a SHA-256 manifest, no pickle.

A background thread writes a checkpoint from a copy in memory while training continues. It writes to a hidden directory, adds
the manifest, renames the directory, updates `latest`, and only then removes the oldest checkpoint, so that a crash at any
moment leaves a complete one. Two are kept.

In a distributed run each process writes its own shards. The files are those of `torch.distributed.checkpoint` with
HuggingFaceStorageWriter: the header of a shard has the offsets of its tensors in the whole ones. PyTorch's reader loads them in
any number of processes. Its writer is not used: it sends pickles between processes, its thread runs collectives at the same
time as the training steps, and hashing would read every file again.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
import torch
from torch import Tensor

from nextword.common import fs
from nextword.common.errors import CorruptFileError, NextwordError
from nextword.model.hf import load_shards
from nextword.training.distributed import SINGLE_PROCESS, DistContext
from nextword.training.parallel import is_dtensor, is_shard_owner, local_slices, to_local

MAX_TO_KEEP = 2
SAVE_INTERVAL_SECONDS = 60.0
MIN_INTERVAL_PER_SAVE_COST = 40.0  # a save that delays training by a second is followed by 40 seconds without one
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class TensorShard(NamedTuple):
    """A part of a tensor in CPU memory, and where it starts in the whole tensor, in each dimension."""

    offsets: tuple[int, ...]
    data: Tensor


class _Manifest(msgspec.Struct):
    step: int
    state: dict[str, Any]


# The entry of a file in a manifest, {"bytes": size, "sha256": hash}, and the CPU time that hashing took.
FileHash = tuple[dict[str, Any], float]


# ---------------------------------------------------------------- the shards of one process


def copy_shards_to_cpu(tensors: Mapping[str, Tensor], ctx: DistContext = SINGLE_PROCESS) -> dict[str, TensorShard]:
    """A copy of what this process has to write: its shards, unless an equal copy on an earlier rank is written instead."""
    shards: dict[str, TensorShard] = {}
    for name, tensor in tensors.items():
        local = to_local(tensor.detach())
        if local.numel() and is_shard_owner(tensor, ctx):
            offsets = tuple(s.start for s in local_slices(tensor, ctx))
            shards[name] = TensorShard(offsets, local.to("cpu", copy=True).contiguous())
    return shards


def write_safetensors(path: Path, shards: Mapping[str, TensorShard], hash_executor: Executor) -> Future[FileHash]:
    """Write a safetensors file and flush it to disk.

    The format: the length of the header in 8 bytes, the header in JSON padded with spaces, and the tensors without gaps, the
    widest data types first.

    Args:
        path: the file to write.
        shards: the tensors by name.
        hash_executor: runs the hash of the same memory, while this file and the next one are written.

    Returns:
        The future hash of the file.
    """
    names = sorted(shards, key=lambda name: (-shards[name].data.itemsize, name))
    sharding = {name: {"saved_offsets": shards[name].offsets} for name in names}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(sharding)}}
    end = 0
    for name in names:
        data = shards[name].data
        start, end = end, end + data.nbytes
        dtype = DTYPES[data.dtype]
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    buffers = [memoryview(len(encoded).to_bytes(8, "little") + encoded)]
    buffers += [shards[name].data.reshape(-1).view(torch.uint8).numpy().data for name in names]
    file_hash = hash_executor.submit(hash_buffers, buffers)
    with fs.map_disk_errors(path):
        path.unlink(missing_ok=True)  # of a killed process
    with fs.map_disk_errors(path), os.fdopen(fs.open_new(path), "wb") as file:
        for buffer in buffers:
            file.write(buffer)
        file.flush()
        fs.fsync_path(path)
    return file_hash


def hash_buffers(buffers: list[memoryview]) -> FileHash:
    """The size and SHA-256 of a file that consists of these buffers."""
    start, digest = time.thread_time(), hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return {"bytes": sum(map(len, buffers)), "sha256": digest.hexdigest()}, time.thread_time() - start


# ---------------------------------------------------------------- saving


class AsyncCheckpointer:
    """Writes checkpoints in the background, one at a time. Every process of a run has one.

    After each step the processes take the maximum of their `status` and pass it to `advance`. Once all of them have written
    their shards, the main process commits the checkpoint: manifest, rename, `latest`.

    Args:
        run: the run directory.
        ctx: the processes.
        save_every: steps between two saves; None to save by the clock.

    Attributes:
        overhead_seconds: what the last save cost training: the time that it waited, and the CPU time of the threads.
        overdue: whether a save is due and has not started. Only on the main process.
        last_committed: the latest complete checkpoint. Only on the main process.
    """

    def __init__(self, run: Path, ctx: DistContext = SINGLE_PROCESS, save_every: int | None = None):
        self.directory, self.ctx, self.save_every = run / "checkpoints", ctx, save_every
        self.overhead_seconds, self.last_save_time = 0.0, time.monotonic()
        self.overdue = False
        self.last_committed: Path | None = None
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending_write: Future[None] | None = None
        self.uncommitted: tuple[int, dict[str, Any]] | None = None  # a save that other processes may still be writing
        self.file_hashes: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the writes of this process. Do not wait for other processes: they may be gone."""
        self.executor.shutdown()

    def should_save(self, step: int) -> bool:
        """Whether to save the state after `step` steps. True until a save starts; always False on worker ranks."""
        if self.save_every is not None:
            due = step % self.save_every == 0
        else:  # the cost of a save in progress is not known yet
            interval = max(SAVE_INTERVAL_SECONDS, MIN_INTERVAL_PER_SAVE_COST * self.overhead_seconds)
            due = self.status == 0 and time.monotonic() - self.last_save_time > interval
        self.overdue = self.ctx.is_main and (self.overdue or due)
        return self.overdue

    @property
    def status(self) -> int:
        """0: idle. 1: writing. Above: failed, with the exit code `status` - 1."""
        if self.pending_write is None or not self.pending_write.done():
            return int(self.pending_write is not None)
        error = self.pending_write.exception()
        return 0 if error is None else 1 + getattr(error, "exit_code", 1)

    def save_async(
        self, step: int, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], metadata: dict[str, Any]
    ) -> None:
        """Start to save the state after `step` steps. Returns once the earlier save is complete and the tensors are copied.

        Args:
            step: the number of finished steps.
            weights: the model's parameters by name.
            optimizer_state: `Optimizer.state_tensors()`.
            metadata: anything else that a resume needs, as JSON.

        Raises:
            NextwordError: the earlier save failed.
        """
        self.wait()
        start = time.perf_counter()
        tensors_by_kind = {"weights": weights, "optimizer": optimizer_state}
        shards_by_kind = {kind: copy_shards_to_cpu(tensors, self.ctx) for kind, tensors in tensors_by_kind.items()}
        self.overhead_seconds, self.last_save_time = time.perf_counter() - start, time.monotonic()
        self.pending_write = self.executor.submit(self._write_shards, step, shards_by_kind, metadata)
        if self.ctx.world_size > 1:
            self.uncommitted = step, metadata

    def advance(self, status: int) -> None:
        """Commit a checkpoint whose shards are complete, given the maximum `status` of all processes.

        Raises:
            NextwordError: a process failed to write its shards. Its own error is raised on that process.
        """
        if status > 1:
            failed, self.pending_write, self.uncommitted = self.pending_write, None, None
            if failed is not None and failed.done():
                failed.result()
            error = NextwordError("another process could not write its shards of a checkpoint; see its own message")
            error.exit_code = status - 1
            raise error
        if status == 0 and self.uncommitted is not None:
            (step, metadata), self.uncommitted = self.uncommitted, None
            if self.ctx.is_main:
                self.pending_write = self.executor.submit(self._commit, step, metadata)

    def wait(self) -> None:
        """Wait until the last save is committed. All processes call this together.

        Raises:
            NextwordError: the save failed, here or in another process.
        """
        self.overdue = False
        for _ in range(2 if self.ctx.world_size > 1 else 1):  # first the shards, then the commit
            if self.pending_write is None:
                return
            wait_for([self.pending_write])
            self.advance(int(self.ctx.all_reduce_max([self.status])[0]))
        self.pending_write = None

    # ------------------------------------------------------------ in the background thread

    def _partial_path(self, step: int) -> Path:
        return self.directory / f".step-{step:08d}.partial"

    def _shard_suffix(self, index: int) -> str:
        count = self.ctx.shard_count
        return f"-{index + 1:05d}-of-{count:05d}" if count > 1 else ""

    def _write_shards(
        self, step: int, shards_by_kind: dict[str, dict[str, TensorShard]], metadata: dict[str, Any]
    ) -> None:
        """Write the shards of this process; with a single process also commit."""
        start = time.thread_time()
        suffix, partial_path = self._shard_suffix(self.ctx.shard_index), self._partial_path(step)
        with fs.map_disk_errors(partial_path):
            partial_path.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".step-*.partial") if self.ctx.is_main else ():
                if leftover != partial_path:  # from a killed process
                    shutil.rmtree(leftover)
        with ThreadPoolExecutor(1) as hash_executor:
            pending_hashes = {
                name: write_safetensors(partial_path / name, shards, hash_executor)
                for kind, shards in shards_by_kind.items()
                if shards and (name := f"{kind}{suffix}.safetensors")
            }
        hashes = {name: pending.result() for name, pending in pending_hashes.items()}
        self.file_hashes = {name: entry for name, (entry, _) in hashes.items()}
        if self.ctx.world_size == 1:
            self._commit(step, metadata)
        elif self.file_hashes and not self.ctx.is_main:
            fs.atomic_write(partial_path / f"hashes{suffix}.json", fs.to_json(self.file_hashes))
        hash_seconds = sum(cpu_seconds for _, cpu_seconds in hashes.values())
        self.overhead_seconds += hash_seconds + time.thread_time() - start

    def _commit(self, step: int, metadata: dict[str, Any]) -> None:
        """Turn complete shards into a checkpoint, point `latest` to it, then remove the oldest one."""
        partial_path, final_path = self._partial_path(step), self.directory / f"step-{step:08d}"
        file_hashes = dict(self.file_hashes)
        for index in range(1, self.ctx.shard_count):
            shard_hashes = partial_path / f"hashes{self._shard_suffix(index)}.json"
            file_hashes |= fs.read_json(shard_hashes) if shard_hashes.is_file() else {}
        with fs.map_disk_errors(final_path):
            for path in partial_path.iterdir():
                if path.name not in file_hashes:  # a hash file, or a leftover of a killed process
                    path.unlink()
        fs.write_manifest(partial_path, {"step": step, "state": metadata}, file_hashes)
        with fs.map_disk_errors(final_path):
            shutil.rmtree(final_path, ignore_errors=True)  # the same step, saved before a kill
            partial_path.rename(final_path)
            fs.fsync_path(self.directory)
        mark_latest(self.directory.parent)
        for old in list_checkpoints(self.directory.parent)[:-MAX_TO_KEEP]:
            shutil.rmtree(old)
        self.last_committed = final_path


# ---------------------------------------------------------------- loading


def list_checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints of a run, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def mark_latest(run: Path) -> None:
    """Write the name of the latest checkpoint of a run to checkpoints/latest, for people and `verify`."""
    if checkpoints := list_checkpoints(run):
        fs.atomic_write(run / "checkpoints" / "latest", checkpoints[-1].name + "\n")


def latest_valid(run: Path, warn: Callable[[str], object] | None = None, fail_on_corrupt: bool = False) -> Path | None:
    """The latest undamaged checkpoint of a run, or None if there is no checkpoint.

    Args:
        run: the run directory.
        warn: called with a message for each damaged checkpoint.
        fail_on_corrupt: raise at the first damaged checkpoint instead of trying an older one.

    Raises:
        CorruptFileError: all checkpoints are damaged; names every damaged file.
    """
    errors: list[str] = []
    for path in reversed(list_checkpoints(run)):
        try:
            verify(path)
            return path
        except CorruptFileError as error:
            if fail_on_corrupt:
                raise
            errors.append(str(error))
            if warn is not None:
                warn(f"{path.name} is damaged; trying an older checkpoint:\n{error}")
    if errors:
        raise CorruptFileError("every checkpoint is damaged:\n" + "\n".join(errors))
    return None


def verify(path: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CorruptFileError: a file differs, or there is a tensor file that the manifest does not list.
    """
    fs.convert(fs.verify_manifest(path), _Manifest, path / fs.MANIFEST)


def load_metadata(path: Path) -> dict[str, Any]:
    """The `metadata` that the checkpoint was saved with."""
    return fs.read_manifest(path)["state"]


def load(path: Path, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load a verified checkpoint, written by any number of processes.

    Args:
        path: the checkpoint.
        parameters: the model's parameters by name. Where they are sharded, the loaded tensors are sharded alike, and no
            process reads more than its own shards.

    Returns:
        Weights and optimizer state, by name.
    """
    if not any(is_dtensor(p) for p in parameters.values()):
        device = next(iter(parameters.values())).device
        return load_shards(path, "weights", device), load_shards(path, "optimizer", device)
    tensors = load_local_shards(path, parameters)
    weights = {name: tensors.pop(name) for name in parameters if name in tensors}
    return weights, tensors


def load_local_shards(path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's shards of every tensor of a checkpoint, by PyTorch's own reader.

    A tensor of the shape of its parameter is sharded like it; any other one is loaded whole.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = HuggingFaceStorageReader(str(path))
    tensors: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        parameter = parameters.get(name, parameters.get(name.split(".", 2)[-1]))  # "adamw.exp_avg.NAME"
        if parameter is not None and parameter.shape == stored.size:
            tensors[name] = torch.zeros_like(parameter.detach())
        else:
            tensors[name] = torch.zeros(stored.size)
    with warnings.catch_warnings():  # each process reads for itself, as intended
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)  # pyright: ignore[reportUnknownMemberType]  (untyped)
    return tensors
