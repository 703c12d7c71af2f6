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

from nextword.common.errors import CorruptFile, NextwordError
from nextword.common.fs import (
    check_seal,
    flush_to_disk,
    read_json,
    read_manifest,
    seal,
    to_json,
    write_durably,
    writing,
)
from nextword.model.hf import read_parts
from nextword.training.distributed import ALONE, World
from nextword.training.parallel import block_of, is_first, part

KEPT = 2
SECONDS = 60.0  # from one save to the next, by the clock
REST = 40.0  # and at least so many times what a save takes from the steps
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
}  # fmt: skip

Block = tuple[tuple[int, ...], Tensor]  # where in a tensor a part of it begins, in each dimension, and the part
Hashes = dict[str, dict[str, Any]]  # of each file its size and SHA-256


# ---------------------------------------------------------------- one process's part


def snapshot(tensors: Mapping[str, Tensor], world: World = ALONE) -> dict[str, Block]:
    """A copy, in the machine's memory, of what this process has to write; no later step changes it.

    Of a weight that is shared, those are its own numbers; of several equal copies, the first is written. What every process
    has as a whole goes into the first part.
    """
    found = {}
    for name, tensor in tensors.items():
        own = part(tensor.detach())
        if own.numel() and is_first(tensor, world):
            begins = tuple(one.start for one in block_of(tensor, world))
            found[name] = begins, own.to("cpu", copy=True).contiguous()
    return found


def write_tensors(path: Path, tensors: Mapping[str, Block], beside: Executor) -> Future[tuple[dict[str, Any], float]]:
    """Write a safetensors file, and return when it is on the disk; what is to come is what `digest` says of it.

    The format has the length of a header in 8 bytes, the header in JSON, padded with spaces, and the tensors without a gap,
    those of the widest numbers first. The same memory is hashed `beside`, while this file is written and the next one.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    places = {name: {"saved_offsets": begins} for name, (begins, _) in tensors.items()}
    said = {"format": "pt", "DCP_SHARDING_INFO": json.dumps({name: places[name] for name in names})}
    header: dict[str, Any] = {"__metadata__": said}
    end = 0
    for name in names:
        tensor = tensors[name][1]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blocks = [memoryview(len(text).to_bytes(8, "little") + text)]
    blocks += [tensors[name][1].reshape(-1).view(torch.uint8).numpy().data for name in names]
    hashed = beside.submit(digest, blocks)
    with writing(path), path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        flush_to_disk(path)
    return hashed


def digest(blocks: list[memoryview]) -> tuple[dict[str, Any], float]:
    """Size and SHA-256 of blocks of memory in a row, and the seconds of the processor that the hash took."""
    begin, found = time.thread_time(), hashlib.sha256()
    for block in blocks:
        found.update(block)
    return {"bytes": sum(map(len, blocks)), "sha256": found.hexdigest()}, time.thread_time() - begin


# ---------------------------------------------------------------- a save


class Saver:
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

    def __init__(self, run: Path, world: World = ALONE, every: int | None = None):
        self.folder, self.world, self.every, self.cost = run / "checkpoints", world, every, 0.0
        self.begun, self.late = time.monotonic(), False
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.work: Future[None] | None = None  # of the last save, until it was waited for
        self.unsealed: tuple[int, dict[str, Any]] | None = None  # step and facts of parts that wait for the others
        self.hashes: Hashes = {}
        self.sealed: Path | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        """Let this process's own work come to its end; nobody waits for a process that may be gone."""
        self.threads.shutdown()

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved, which is the leader's to say. What is due and is put off remains
        so until a save begins or the run turns back."""
        if self.every is not None:
            due = step % self.every == 0
        else:  # while one is under way its cost is not known yet
            due = self.stage == 0 and time.monotonic() - self.begun > max(SECONDS, REST * self.cost)
        self.late = self.world.leads and (self.late or due)
        return self.late

    @property
    def stage(self) -> int:
        """0: nothing is under way here; 1: something is; above: it failed, with the exit code that is one less."""
        if self.work is None or not self.work.done():
            return int(self.work is not None)
        error = self.work.exception()
        return 0 if error is None else 1 + getattr(error, "exit_code", 1)

    def begin(
        self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> None:
        """Save the state after `step` steps; return when it is copied, and an earlier save is done.

        Raises:
            NextwordError: the earlier save failed; the same error as there.
        """
        self.wait()
        begin = time.perf_counter()
        held = {"weights": snapshot(weights, self.world), "optimizer": snapshot(optimizer, self.world)}
        self.cost, self.begun = time.perf_counter() - begin, time.monotonic()
        self.work = self.threads.submit(self._write, step, held, facts)
        if self.world.size > 1:
            self.unsealed = step, facts

    def go_on(self, stage: int) -> None:
        """The latest stage of any process is known now: seal what all have written, or raise what went wrong."""
        if stage > 1:
            work, self.work, self.unsealed = self.work, None, None
            if work is not None and work.done():
                work.result()
            error = NextwordError("another process could not write its part of a checkpoint, and says why")
            error.exit_code = stage - 1
            raise error
        if stage == 0 and self.unsealed is not None:
            if self.world.leads:
                self.work = self.threads.submit(self._seal, *self.unsealed)
            self.unsealed = None

    def wait(self) -> None:
        """Until the last save is in its place, and `latest` names it; nothing is late then. All processes wait together.

        Raises:
            NextwordError: that save failed, here or in another process.
        """
        self.late = False
        for _ in range(2 if self.world.size > 1 else 1):  # for the parts, then for the seal
            if self.work is None:
                return
            wait_for([self.work])
            self.go_on(int(self.world.most([self.stage])[0]))
        if self.work is not None:
            wait_for([self.work])
        self.work = None

    # ------------------------------------------------------------ in the thread

    def _aside(self, step: int) -> Path:
        return self.folder / f".{name_of(step)}.partial"

    def _write(self, step: int, held: dict[str, dict[str, Block]], facts: dict[str, Any]) -> None:
        """This process's part; and the seal, where there is no other."""
        number = f"-{self.world.place + 1:05d}-of-{self.world.places:05d}" if self.world.places > 1 else ""
        aside, self.hashes = self._aside(step), {}
        with writing(aside):
            aside.mkdir(parents=True, exist_ok=True)
            # What processes that were killed have left would take the room of this one.
            for left in self.folder.glob(".step-*.partial") if self.world.leads else ():
                if left != aside:
                    shutil.rmtree(left)
        begin = time.thread_time()
        with ThreadPoolExecutor(1) as beside:
            names = {f"{kind}{number}.safetensors": tensors for kind, tensors in held.items() if tensors}
            hashed = {name: write_tensors(aside / name, tensors, beside) for name, tensors in names.items()}
        for name, found in hashed.items():
            self.hashes[name], seconds = found.result()
            self.cost += seconds
        self.cost += time.thread_time() - begin
        if self.world.size == 1:
            self._seal(step, facts)
        elif self.hashes and not self.world.leads:
            write_durably(aside / f"hashes{number}.json", to_json(self.hashes))

    def _seal(self, step: int, facts: dict[str, Any]) -> None:
        """Make a checkpoint of parts that are on the disk, name it, and only then remove what is older."""
        begin = time.thread_time()
        aside, final = self._aside(step), self.folder / name_of(step)
        hashes = dict(self.hashes)
        for number in range(2, self.world.places + 1):
            others = aside / f"hashes-{number:05d}-of-{self.world.places:05d}.json"
            hashes |= read_json(others) if others.is_file() else {}
        with writing(final):
            for path in aside.iterdir():
                if path.name not in hashes:  # and what a process left here that was killed
                    path.unlink()
        seal(aside, {"step": step, "state": facts}, hashes)
        with writing(final):
            shutil.rmtree(final, ignore_errors=True)  # the same step, saved by a process that was then killed
            aside.rename(final)
            flush_to_disk(self.folder)
        write_durably(self.folder / "latest", final.name + "\n")
        for old in checkpoints(self.folder.parent)[:-KEPT]:
            shutil.rmtree(old)
        self.cost += time.thread_time() - begin
        self.sealed = final


# ---------------------------------------------------------------- what was saved


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Every finished checkpoint of a run, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def newest_whole(run: Path, say: Any = None, strict: bool = False) -> Path | None:
    """The newest checkpoint that is whole, None where there is none at all.

    Raises:
        CorruptFile: there are checkpoints, and each of them is damaged; every file is named. With `strict` the newest alone.
    """
    found = checkpoints(run)[::-1]
    damage = []
    for path in found:
        try:
            check(path)
            return path
        except CorruptFile as error:
            if strict:
                raise
            damage.append(str(error))
            if say is not None:
                say(f"{path.name} is damaged and passed over:\n{error}")
    if damage:
        raise CorruptFile("every checkpoint is damaged:\n" + "\n".join(damage))
    return None


def check(path: Path) -> None:
    """Raises `CorruptFile` where a checkpoint is not what was sealed: each file that differs, and tensors that nobody sealed,
    which would be read with the others."""
    sealed = check_seal(path)["files"]
    if strange := sorted(str(file) for file in path.glob("*.safetensors") if file.name not in sealed):
        raise CorruptFile("\n".join(f"{file}: is not of this checkpoint" for file in strange))


def facts_of(path: Path) -> dict[str, Any]:
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
        return read_parts(path, "weights", device), read_parts(path, "optimizer", device)
    tensors = own_parts(path, parameters)
    weights = {name: tensors.pop(name) for name in parameters if name in tensors}
    return weights, tensors


def own_parts(path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of every tensor of a checkpoint, by PyTorch's own reader, whatever files they are in. What has the
    shape of the parameter that it is, or that its name ends with, is shared as that is; the rest is read as a whole."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as read_into

    reader = HuggingFaceStorageReader(str(path))
    tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        own = parameters.get(name, parameters.get(name.split(".", 2)[-1]))  # "adamw.exp_avg.NAME"
        if own is not None and own.shape == stored.size:
            tensors[name] = torch.zeros_like(own.detach())
        else:
            tensors[name] = torch.zeros(stored.size)
    with warnings.catch_warnings():  # of what is meant here: each process reads for itself
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        read_into(tensors, storage_reader=reader, no_dist=True)
    return tensors
