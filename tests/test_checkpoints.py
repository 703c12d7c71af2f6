"""Checkpoints beside the steps: what is saved is the state at its step, `latest` names only what is on the disk, the parts of
several processes are the whole, and what goes wrong in the thread is heard. Real files, real kills, real processes."""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nextword.training.resume_checkpoint import AsyncCheckpointer, latest_valid, list_checkpoints, write_safetensors
from nextword.training.sharing import apply_parallelism, chunk_bounds, load_weights_, local_slices, to_full, to_local
from safetensors.torch import load_file

import nextword as package
from nextword.common import fs
from nextword.common.errors import CorruptFileError, DiskFullError, NextwordError
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import load_shards
from nextword.training import checkpoint
from nextword.training.distributed import PEER_LOST, DistContext, init_distributed
from nextword.training.losses import LossModule, causal_lm_loss
from nextword.training.optimizer import Optimizer
from nextword.training.parallel import shard_slices
from processes import PATIENCE, kill, start_process
from test_pretraining import SETTINGS, state_hashes


def free_port() -> int:
    """One that nothing listens at, and that the system gives to no connection meanwhile, as it does with higher ones."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as opened, contextlib.suppress(OSError):
            opened.bind(("127.0.0.1", port))
            return port


SIZES: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 8, "vocab_size": 35}


def state(value: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"a": torch.full((50, 8), value), "b": torch.full((3,), value)}, {"adamw.step.a": torch.tensor(value)}


def saved(run: Path, step: int) -> Path:
    with AsyncCheckpointer(run) as saver:
        saver.begin(step, *state(float(step)), {"step": step})
        saver.wait()
    return run / "checkpoints" / f"step-{step:08d}"


def sha256s(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


# ---------------------------------------------------------------- files


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64])


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.lists(st.integers(1, 4), max_size=3), DTYPES), max_size=4))
def test_what_is_written_is_read_by_safetensors_and_its_hash_is_the_files(tmp_path_factory, shapes):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    shapes.pop("__metadata__", None)
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    with ThreadPoolExecutor(1) as beside:
        known, _ = write_safetensors(
            path, {name: ((0,) * tensor.ndim, tensor) for name, tensor in tensors.items()}, beside
        ).result()
    assert known == {"bytes": path.stat().st_size, "sha256": fs.sha256_file(path)}
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@given(st.integers(1, 20), st.integers(1, 6))
def test_rows_are_dealt_out_as_torch_chunk_does(rows, size):
    tensor = torch.randn(rows, 2)
    for place in range(size):
        begin, length = chunk_bounds(rows, place, size)
        assert torch.equal(tensor[begin : begin + length], (*tensor.chunk(size), *[tensor[:0]] * size)[place])


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.sampled_from([None, 0, 1]))
def test_the_parts_of_all_are_the_whole(tmp_path_factory, rows, columns, parts, tensor_size, split):
    """Of a matrix whose rows are dealt out, after it was split in one dimension or another: as each process writes its part."""
    folder = tmp_path_factory.mktemp("parts")
    tensor, world = torch.randn(rows, columns), DistContext()
    world.num_shards, world.tensor_size = parts, tensor_size
    for place in range(world.shard_count):
        own = {} if place else {"count": ((), torch.tensor(3.0))}
        numbers = tensor[where := shard_slices((rows, columns), split, world, place)]
        if numbers.numel() and (split is not None or place % tensor_size == 0):
            own["w"] = tuple(one.start for one in where), numbers.contiguous()
        with ThreadPoolExecutor(1) as beside:
            write_safetensors(folder / f"weights-{place + 1:05d}-of-{world.shard_count:05d}.safetensors", own, beside)
    found = load_shards(folder, "weights")
    assert torch.equal(found["w"], tensor)
    assert found["count"] == 3
    shutil.rmtree(folder)


# ---------------------------------------------------------------- beside the steps


def test_the_steps_that_follow_do_not_change_what_is_saved(tmp_path, monkeypatch):
    """The thread is held until the weights have changed."""
    expected = sha256s(saved(tmp_path / "before", 7))
    changed = threading.Event()

    def late(path: Path, tensors: Any, beside: Any) -> Any:
        assert changed.wait(60)
        return write_safetensors(path, tensors, beside)

    monkeypatch.setattr(checkpoint, "write_tensors", late)
    weights, optimizer = state(7.0)
    with AsyncCheckpointer(tmp_path / "beside") as saver:
        saver.begin(7, weights, optimizer, {"step": 7})
        assert saver.stage == 1, "the steps go on while it is written"
        for tensor in (*weights.values(), *optimizer.values()):
            tensor.zero_()
        changed.set()
        saver.wait()
        assert saver.stage == 0
    assert sha256s(tmp_path / "beside" / "checkpoints" / "step-00000007") == expected


def test_latest_moves_only_after_all_is_durable_and_the_old_goes_last(tmp_path, monkeypatch):
    for step in (1, 2):
        saved(tmp_path, step)
    happened = []

    def noted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(path: Path, *arguments: Any, **more: Any) -> Any:
            latest = (tmp_path / "checkpoints" / "latest").read_text().strip()
            happened.append((name, Path(path).name, latest))
            return real(path, *arguments, **more)

        monkeypatch.setattr(owner, name, call)

    noted(checkpoint, "write_tensors")
    noted(checkpoint, "seal")
    noted(Path, "rename")
    noted(checkpoint, "flush_to_disk")
    noted(checkpoint, "write_durably")
    noted(shutil, "rmtree")
    saved(tmp_path, 3)
    old, replacement = "step-00000002", "step-00000003"
    aside = f".{new}.partial"
    assert happened == [
        ("write_tensors", "weights.safetensors", old), ("flush_to_disk", "weights.safetensors", old),
        ("write_tensors", "optimizer.safetensors", old), ("flush_to_disk", "optimizer.safetensors", old),
        ("seal", aside, old), ("rmtree", new, old), ("rename", aside, old), ("flush_to_disk", "checkpoints", old),
        ("write_durably", "latest", old), ("rmtree", "step-00000001", new),
    ]  # fmt: skip
    assert [path.name for path in list_checkpoints(tmp_path)] == [old, new], "two are kept"


@pytest.mark.skipif(os.name == "nt", reason="this system has no SIGKILL")
def test_a_kill_inside_a_save_beside_the_steps_leaves_the_last_one_whole(tmp_path):
    code = (
        "import sys, time, pathlib; from test_checkpoints import *\n"
        "saved(pathlib.Path(sys.argv[1]), 1)\n"
        "def half(path, tensors, beside):\n"
        "    write_tensors(path, tensors, beside); os.truncate(path, 300); print('inside', flush=True); time.sleep(100_000)\n"
        "checkpoint.write_tensors = half\n"
        "saved(pathlib.Path(sys.argv[1]), 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    program = [sys.executable, "-c", code, str(tmp_path)]
    process = start_process(program, stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"inside\n"
    kill(process)
    folder = tmp_path / "checkpoints"
    assert (folder / ".step-00000002.partial" / "weights.safetensors").stat().st_size == 300
    assert (folder / "latest").read_text() == "step-00000001\n"
    assert latest_valid(tmp_path) == folder / "step-00000001"
    (folder / ".step-00000002.partial" / "weights-00002-of-00002.safetensors").write_bytes(b"of another world")
    (folder / ".step-00000003.partial").mkdir()
    again = saved(tmp_path, 2)
    assert latest_valid(tmp_path) == again
    assert {path.name for path in again.iterdir()} == {"weights.safetensors", "optimizer.safetensors", fs.MANIFEST}
    assert not list(folder.glob(".*")), "what the killed one left is gone"


def test_a_full_disk_in_the_thread_ends_the_run_with_its_code_and_the_resume_is_exact(shards, tmp_path, monkeypatch):
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "save_every": 5, "evaluations": 1}}
    package.pretrain(shards, tmp_path / "whole", steps=20, **settings)

    def full(path: Path, tensors: Any, beside: Any) -> Any:
        if path.parent.name != ".step-00000005.partial":
            with fs.map_disk_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        return write_safetensors(path, tensors, beside)

    with monkeypatch.prefix_offset() as patched:
        patched.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(DiskFullError, match=r"step-00000010.*the disk is full") as error:
            package.pretrain(shards, tmp_path / "run", steps=20, **settings)
    assert error.value.exit_code == 4
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000005"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) <= 15, "heard before the next save"
    package.pretrain(out=tmp_path / "run", resume=True)
    assert state_hashes(tmp_path / "run") == state_hashes(tmp_path / "whole")


def test_what_another_process_could_not_write_ends_this_one_with_the_same_code(tmp_path):
    with (
        AsyncCheckpointer(tmp_path) as saver,
        pytest.raises(NextwordError, match="another process could not write") as error,
    ):
        saver.resume(1 + DiskFullError.exit_code)
    assert error.value.exit_code == DiskFullError.exit_code


# ---------------------------------------------------------------- several processes


def model_and_optimizer(seed: int) -> tuple[LossModule, Optimizer]:
    torch.manual_seed(seed)
    model = GPT(build_config("gpt2", **SIZES))
    return LossModule(model, causal_lm_loss), Optimizer(model, kind="muon", lr=0.01)


def shared_step(world: DistContext, way: str) -> LossModule:
    """A model that is shared in a way ("data", "full", "hybrid"), its matrices split where it is said so ("full tensor")."""
    parallel, *split = way.split()
    world.init_tensor_parallel(2 if split else 1)
    step, _ = model_and_optimizer(0)
    apply_parallelism(world, step, parallel, bf16=False, device=torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    return step


def wholes(step: LossModule, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    tensors = {**dict(step.model.named_parameters()), **optimizer.state_tensors()}
    return {name: to_full(tensor.detach()).clone() for name, tensor in tensors.items()}


def take(path: Path, step: LossModule, optimizer: Optimizer, world: DistContext) -> None:
    weights, moments = checkpoint.load(path, dict(step.model.named_parameters()))
    load_weights_(step.model, weights.items(), world)
    optimizer.load_state_tensors(moments)


def all_one_all(folder: Path, way: str) -> None:
    """What each of several processes does: save in all, put together in one, save in one, and share that again."""
    with init_distributed() as world:
        step = shared_step(world, way)
        optimizer = Optimizer(step.model, kind="muon", lr=0.01, world=world)
        expected, is_unique = model_and_optimizer(0)
        for (name, p), q in zip(step.model.named_parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(to_local(p), q[local_slices(p, world)]), (
                f"{name}: PyTorch keeps what we say that it does"
            )
            assert torch.equal(to_full(p.detach()), q), name
            p.grad = p.detach() * 0.5 + 0.1
            q.grad = q.detach() * 0.5 + 0.1
        optimizer.step(1.0)
        alone.step(1.0)
        before, after = wholes(step, optimizer), wholes(expected, alone)
        for name in after:
            torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-6, msg=f"{name}: one step of one")
        with AsyncCheckpointer(folder / "all", world) as saver:
            saver.begin(1, dict(step.model.named_parameters()), optimizer.state_tensors(), {"step": 1})
            saver.wait()
        several, one = (folder / name / "checkpoints" / "step-00000001" for name in ("all", "one"))
        if world.is_main:
            alone, moments = model_and_optimizer(1)
            take(several, alone, moments, DistContext())
            after = wholes(alone, moments)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)
            with AsyncCheckpointer(folder / "one") as saver:
                saver.begin(1, dict(alone.model.named_parameters()), moments.state_tensors(), {"step": 1})
                saver.wait()
        world.max_remaining([0])
        for path in (one, several):
            with torch.no_grad():
                for p in step.model.parameters():
                    p.zero_()
            optimizer = Optimizer(step.model, kind="muon", lr=0.01, world=world)
            take(path, step, optimizer, world)
            after = wholes(step, optimizer)
            assert all(torch.equal(after[name], before[name]) for name in before), path
            assert after.keys() == before.keys()


def killed_inside(folder: Path, way: str) -> None:
    """What each of two processes does, of which the second is killed as it writes its part."""
    with init_distributed() as world:
        step = shared_step(world, way)
        optimizer = Optimizer(step.model, kind="muon", lr=0.01, world=world)
        with AsyncCheckpointer(folder, world) as saver:
            saver.begin(1, dict(step.model.named_parameters()), optimizer.state_tensors(), {"step": 1})
            saver.wait()
            if not world.is_main:
                checkpoint.write_safetensors = half_and_killed
            saver.begin(2, dict(step.model.named_parameters()), optimizer.state_tensors(), {"step": 2})
            saver.wait()


def half_and_killed(path: Path, tensors: Any, beside: Any) -> Any:
    write_safetensors(path, tensors, beside)
    os.truncate(path, 300)
    os.kill(os.getpid(), signal.SIGKILL)


def in_several(
    folder: Path, way: str, local: int, what: Any = all_one_all, codes: tuple[int, ...] = (0, 0)
) -> list[str]:
    """As many processes as there are exit codes, which do the same; what they say on their way out."""
    code = (
        f"import sys, pathlib; from test_checkpoints import *; {what.__name__}(pathlib.Path(sys.argv[1]), sys.argv[2])"
    )
    environment = {
        **os.environ, "WORLD_SIZE": str(len(codes)), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }  # fmt: skip
    program = [sys.executable, "-W", "error::UserWarning:nextword", "-c", code, str(folder), way]
    processes = [
        start_process(program, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(len(codes))
    ]
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert tuple(process.returncode for process in processes) == codes, said
    return said


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    in_several(folder, "data", 2)
    return folder


def test_each_process_writes_its_rows_and_they_open_in_one_process_and_in_several(shared):
    last = latest_valid(shared / "all")
    assert last is not None
    names = {f"{kind}-0000{to_local}-of-00002.safetensors" for kind in ("weights", "optimizer") for to_local in (1, 2)}
    assert {path.name for path in last.iterdir()} == {*names, fs.MANIFEST}
    first, second = (load_file(last / f"weights-0000{to_local}-of-00002.safetensors") for to_local in (1, 2))
    embedding = "token_embedding.weight"
    assert (len(first[embedding]), len(second[embedding])) == (18, 17), "nobody wrote more than their rows"


def test_a_copy_in_each_machine_is_written_once(tmp_path):
    in_several(tmp_path, "hybrid", 1)
    two, one = (tmp_path / name / "checkpoints" / "step-00000001" for name in ("all", "one"))
    assert sha256s(two) == sha256s(one), "the same files as of one process"


@pytest.mark.parametrize(
    ("way", "local", "processes"), [("data tensor", 2, 2), ("full tensor", 4, 4), ("hybrid tensor", 2, 4)]
)
def test_split_matrices_are_saved_and_opened_in_one_process_and_in_several(tmp_path, way, local, processes):
    in_several(tmp_path, way, local, codes=(0,) * processes)
    last = latest_valid(tmp_path / "all")
    assert last is not None
    parts = local if processes > local else processes
    assert len([*last.glob("weights-*")]) == parts, "of two machines with a copy each, one has written"
    name = "blocks.0.feed_forward.down.weight"  # [16, 64]
    shapes = {load_file(path)[name].shape for path in last.glob("weights-*")}
    assert shapes == {(16 * 2 // parts, 32)}, "nobody wrote more than their part of their slice"


@pytest.mark.skipif(os.name == "nt", reason="this system has no SIGKILL")
def test_a_process_that_is_killed_as_it_writes_its_part_leaves_the_last_checkpoint_whole(tmp_path):
    said = in_several(tmp_path, "data", 2, killed_inside, (1, -signal.SIGKILL))
    assert PEER_LOST in said[0]
    folder = tmp_path / "checkpoints"
    sizes = {
        path.name: path.stat().st_size for path in (folder / ".step-00000002.partial").glob("weights-*.safetensors")
    }
    assert sizes.keys() == {f"weights-0000{to_local}-of-00002.safetensors" for to_local in (1, 2)}
    assert sizes["weights-00002-of-00002.safetensors"] == 300
    assert (folder / "latest").read_text() == "step-00000001\n"
    assert latest_valid(tmp_path) == folder / "step-00000001"


def test_a_damaged_part_is_named(shared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(shared / "all", run)
    to_local = run / "checkpoints" / "step-00000001" / "optimizer-00002-of-00002.safetensors"
    data = bytearray(to_local.read_bytes())
    data[len(data) // 2] ^= 1
    to_local.write_bytes(bytes(data))
    with pytest.raises(CorruptFileError, match=r"optimizer-00002-of-00002\.safetensors: the content does not match"):
        latest_valid(run)
    with pytest.raises(CorruptFileError, match=r"optimizer-00002-of-00002\.safetensors: the content does not match"):
        package.verify_tree(run)
    to_local.unlink()
    with pytest.raises(CorruptFileError, match=r"optimizer-00002-of-00002\.safetensors: missing"):
        latest_valid(run)


def test_tensors_that_nobody_sealed_are_not_read_with_the_others(shared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(shared / "all", run)
    stray = run / "checkpoints" / "step-00000001" / "weights-00003-of-00003.safetensors"
    shutil.copy(stray.with_name("weights-00001-of-00002.safetensors"), stray)
    with pytest.raises(CorruptFileError, match=r"weights-00003-of-00003\.safetensors: is not of this checkpoint"):
        latest_valid(run)
