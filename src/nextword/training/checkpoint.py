"""Checkpoints: the step, the weights and the optimizer's state, sealed under SHA-256, no pickle.

A checkpoint is written aside, sealed, moved into place, and only then named by `latest`; only then is an older one removed,
and two are kept. So a crash at any moment leaves a whole one. A thread writes it, from a copy, while training goes on; each
process of a run writes what it keeps of the weights.

Where there are several parts, they are those of PyTorch's own distributed checkpoints in safetensors
(`torch.distributed.checkpoint`, HuggingFaceStorageWriter): a part's header says where each of its tensors begins in the whole
one. That package reads them, in any number of processes. It does not write them: its writer sends pickles between processes,
talks in its thread while the steps do the same, and all that it wrote would be read again to be hashed.
"""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import (
    atomic_write,
    fsync_path,
    map_disk_errors,
    read_json,
    read_manifest,
    to_json,
    verify_manifest,
    write_manifest,
)
from nextword.model.hf import load_shards
from nextword.training.distributed import SINGLE_PROCESS, DistContext
from nextword.training.parallel import is_shard_owner, local_slices, to_local

MAX_TO_KEEP = 2
SAVE_INTERVAL_SECONDS = 60.0  # from one save to the next, by the clock
MIN_INTERVAL_PER_SAVE_COST = 40.0  # and at least so many times what a save takes from the steps
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
}  # fmt: skip

TensorShard = tuple[tuple[int, ...], Tensor]  # where in a tensor a part of it begins, in each dimension, and the part
FileHashes = dict[str, dict[str, Any]]  # of each file its size and SHA-256


# ---------------------------------------------------------------- one process's part


def copy_shards_to_cpu(tensors: Mapping[str, Tensor], world: DistContext = SINGLE_PROCESS) -> dict[str, TensorShard]:
    """A copy, in the machine's memory, of what this process has to write; no later step changes it.

    Of a weight that is shared, those are its own numbers; of several equal copies, the first is written. What every process
    has as a whole goes into the first part.
    """
    shards = {}
    for name, tensor in tensors.items():
        local = to_local(tensor.detach())
        if local.numel() and is_shard_owner(tensor, world):
            offsets = tuple(one.start for one in local_slices(tensor, world))
            shards[name] = offsets, local.to("cpu", copy=True).contiguous()
    return shards


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorShard], hash_executor: Executor
) -> Future[tuple[dict[str, Any], float]]:
    """Write a safetensors file, and return when it is on the disk; what is to come is what `digest` says of it.

    The format has the length of a header in 8 bytes, the header in JSON, padded with spaces, and the tensors without a gap,
    those of the widest numbers first. The same memory is hashed `beside`, while this file is written and the next one.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    offsets_by_name = {name: {"saved_offsets": begins} for name, (begins, _) in tensors.items()}
    metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps({name: offsets_by_name[name] for name in names})}
    header: dict[str, Any] = {"__metadata__": metadata}
    end_offset = 0
    for name in names:
        tensor = tensors[name][1]
        begin, end_offset = end_offset, end_offset + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end_offset],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    buffers = [memoryview(len(text).to_bytes(8, "little") + text)]
    buffers += [tensors[name][1].reshape(-1).view(torch.uint8).numpy().data for name in names]
    pending_hash = hash_executor.submit(hash_buffers, buffers)
    with map_disk_errors(path), path.open("wb") as file:
        for block in buffers:
            file.write(block)
        file.flush()
        fsync_path(path)
    return pending_hash


def hash_buffers(buffers: list[memoryview]) -> tuple[dict[str, Any], float]:
    """Size and SHA-256 of blocks of memory in a row, and the seconds of the processor that the hash took."""
    begin, found = time.thread_time(), hashlib.sha256()
    for block in buffers:
        found.update(block)
    return {"bytes": sum(map(len, buffers)), "sha256": found.hexdigest()}, time.thread_time() - begin


# ---------------------------------------------------------------- a save


class AsyncCheckpointer:
    """Saves of a run, one at a time, written while its steps go on; and in each process of a run one of these.

    The processes compare their `stage` after every step, which they do anyway to stop together, and tell it to `go_on`: once
    all have their part on the disk, the leader's thread seals the checkpoint and moves it into place.

    Args:
        every: steps from one save to the next; by the clock where None.

    Attributes:
        cost: the seconds that the last save took from the steps: those that they waited, and the processor's in its threads.
        late: whether a save was due and has not begun.
        sealed: the checkpoint that was finished last, for who leads.
    """

    def __init__(self, run: Path, world: DistContext = SINGLE_PROCESS, save_every: int | None = None):
        self.directory, self.world, self.save_every, self.overhead_seconds = run / "checkpoints", world, save_every, 0.0
        self.last_save_time, self.overdue = time.monotonic(), False
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending_write: Future[None] | None = None  # of the last save, until it was waited for
        self.uncommitted: tuple[int, dict[str, Any]] | None = None  # step and facts of parts that wait for the others
        self.file_hashes: FileHashes = {}
        self.last_committed: Path | None = None

    def __enter__(self) -> "AsyncCheckpointer":
        return self

    def __exit__(self, *_: object) -> None:
        """Let this process's own work come to its end; nobody waits for a process that may be gone."""
        self.executor.shutdown()

    def should_save(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved, which is the leader's to say. What is due and is put off remains
        so until a save begins or the run turns back."""
        if self.save_every is not None:
            due = step % self.save_every == 0
        else:  # while one is under way its cost is not known yet
            due = self.status == 0 and time.monotonic() - self.last_save_time > max(
                SAVE_INTERVAL_SECONDS, MIN_INTERVAL_PER_SAVE_COST * self.overhead_seconds
            )
        self.overdue = self.world.is_main and (self.overdue or due)
        return self.overdue

    @property
    def status(self) -> int:
        """0: nothing is under way here; 1: something is; above: it failed, with the exit code that is one less."""
        if self.pending_write is None or not self.pending_write.done():
            return int(self.pending_write is not None)
        error = self.pending_write.exception()
        return 0 if error is None else 1 + getattr(error, "exit_code", 1)

    def save_async(
        self, step: int, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], metadata: dict[str, Any]
    ) -> None:
        """Save the state after `step` steps; return when it is copied, and an earlier save is done.

        Raises:
            NextwordError: the earlier save failed; the same error as there.
        """
        self.wait()
        begin = time.perf_counter()
        tensors_by_kind = {
            "weights": copy_shards_to_cpu(weights, self.world),
            "optimizer": copy_shards_to_cpu(optimizer_state, self.world),
        }
        self.overhead_seconds, self.last_save_time = time.perf_counter() - begin, time.monotonic()
        self.pending_write = self.executor.submit(self._write_shards, step, tensors_by_kind, metadata)
        if self.world.world_size > 1:
            self.uncommitted = step, metadata

    def advance(self, status: int) -> None:
        """The latest stage of any process is known now: seal what all have written, or raise what went wrong."""
        if status > 1:
            work, self.pending_write, self.uncommitted = self.pending_write, None, None
            if work is not None and work.done():
                work.result()
            error = NextwordError("another process could not write its part of a checkpoint, and says why")
            error.exit_code = status - 1
            raise error
        if status == 0 and self.uncommitted is not None:
            if self.world.is_main:
                self.pending_write = self.executor.submit(self._commit, *self.uncommitted)
            self.uncommitted = None

    def wait(self) -> None:
        """Until the last save is in its place, and `latest` names it; nothing is late then. All processes wait together.

        Raises:
            NextwordError: that save failed, here or in another process.
        """
        self.overdue = False
        for _ in range(2 if self.world.world_size > 1 else 1):  # for the parts, then for the seal
            if self.pending_write is None:
                return
            wait_for([self.pending_write])
            self.advance(int(self.world.all_reduce_max([self.status])[0]))
        if self.pending_write is not None:
            wait_for([self.pending_write])
        self.pending_write = None

    # ------------------------------------------------------------ in the thread

    def _partial_path(self, step: int) -> Path:
        return self.directory / f".{checkpoint_name(step)}.partial"

    def _write_shards(
        self, step: int, tensors_by_kind: dict[str, dict[str, TensorShard]], metadata: dict[str, Any]
    ) -> None:
        """This process's part; and the seal, where there is no other."""
        shard_suffix = (
            f"-{self.world.shard_index + 1:05d}-of-{self.world.shard_count:05d}" if self.world.shard_count > 1 else ""
        )
        partial_path, self.file_hashes = self._partial_path(step), {}
        with map_disk_errors(partial_path):
            partial_path.mkdir(parents=True, exist_ok=True)
            # What processes that were killed have left would take the room of this one.
            for left in self.directory.glob(".step-*.partial") if self.world.is_main else ():
                if left != partial_path:
                    shutil.rmtree(left)
        begin = time.thread_time()
        with ThreadPoolExecutor(1) as beside:
            names = {
                f"{kind}{shard_suffix}.safetensors": tensors for kind, tensors in tensors_by_kind.items() if tensors
            }
            pending_hashes = {
                name: write_safetensors(partial_path / name, tensors, beside) for name, tensors in names.items()
            }
        for name, found in pending_hashes.items():
            self.file_hashes[name], seconds = found.result()
            self.overhead_seconds += seconds
        self.overhead_seconds += time.thread_time() - begin
        if self.world.world_size == 1:
            self._commit(step, metadata)
        elif self.file_hashes and not self.world.is_main:
            atomic_write(partial_path / f"hashes{shard_suffix}.json", to_json(self.file_hashes))

    def _commit(self, step: int, metadata: dict[str, Any]) -> None:
        """Make a checkpoint of parts that are on the disk, name it, and only then remove what is older."""
        begin = time.thread_time()
        partial_path, final = self._partial_path(step), self.directory / checkpoint_name(step)
        hashes = dict(self.file_hashes)
        for number in range(2, self.world.shard_count + 1):
            shard_hashes = partial_path / f"hashes-{number:05d}-of-{self.world.shard_count:05d}.json"
            hashes |= read_json(shard_hashes) if shard_hashes.is_file() else {}
        with map_disk_errors(final):
            for path in partial_path.iterdir():
                if path.name not in hashes:  # and what a process left here that was killed
                    path.unlink()
        write_manifest(partial_path, {"step": step, "state": metadata}, hashes)
        with map_disk_errors(final):
            shutil.rmtree(final, ignore_errors=True)  # the same step, saved by a process that was then killed
            partial_path.rename(final)
            fsync_path(self.directory)
        atomic_write(self.directory / "latest", final.name + "\n")
        for old in list_checkpoints(self.directory.parent)[:-MAX_TO_KEEP]:
            shutil.rmtree(old)
        self.overhead_seconds += time.thread_time() - begin
        self.last_committed = final


# ---------------------------------------------------------------- what was saved


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Every finished checkpoint of a run, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def latest_valid(run: Path, warn: Any = None, fail_on_corrupt: bool = False) -> Path | None:
    """The newest checkpoint that is whole, None where there is none at all.

    Raises:
        CorruptFile: there are checkpoints, and each of them is damaged; every file is named. With `strict` the newest alone.
    """
    newest_first = list_checkpoints(run)[::-1]
    errors = []
    for path in newest_first:
        try:
            verify(path)
            return path
        except CorruptFileError as error:
            if fail_on_corrupt:
                raise
            errors.append(str(error))
            if warn is not None:
                warn(f"{path.name} is damaged and passed over:\n{error}")
    if errors:
        raise CorruptFileError("every checkpoint is damaged:\n" + "\n".join(errors))
    return None


def verify(path: Path) -> None:
    """Raises `CorruptFile` where a checkpoint is not what was sealed: each file that differs, and tensors that nobody sealed,
    which would be read with the others."""
    listed_files = verify_manifest(path)["files"]
    if unlisted := sorted(str(file) for file in path.glob("*.safetensors") if file.name not in listed_files):
        raise CorruptFileError("\n".join(f"{file}: is not of this checkpoint" for file in unlisted))


def load_metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run beside its tensors: steps, tokens, the best look."""
    return read_manifest(path)["state"]


def load(path: Path, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer state of a checkpoint that was checked, by name: of one process or of several, opened in one or in
    several.

    Args:
        parameters: the model's own. Where they are shared among processes, so is what is read, and no process reads or holds
            more than its part.
    """
    if not any(hasattr(p, "placements") for p in parameters.values()):
        device = next(iter(parameters.values())).device
        return load_shards(path, "weights", device), load_shards(path, "optimizer", device)
    tensors = load_local_shards(path, parameters)
    weights = {name: tensors.pop(name) for name in parameters if name in tensors}
    return weights, tensors


def load_local_shards(path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of every tensor of a checkpoint, by PyTorch's own reader, whatever files they are in. What has the
    shape of the parameter that it is, or that its name ends with, is shared as that is; the rest is read as a whole."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as read_into

    reader = HuggingFaceStorageReader(str(path))
    tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        parameter = parameters.get(name, parameters.get(name.split(".", 2)[-1]))  # "adamw.exp_avg.NAME"
        if parameter is not None and parameter.shape == stored.size:
            tensors[name] = torch.zeros_like(parameter.detach())
        else:
            tensors[name] = torch.zeros(stored.size)
    with warnings.catch_warnings():  # of what is meant here: each process reads for itself
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        read_into(tensors, storage_reader=reader, no_dist=True)
    return tensors
