"""Asynchronous checkpoints: a checkpoint is the state at its step, `latest` names only what is on disk, the shards of several
processes are the whole, and errors of the background thread reach the run. Real files, real kills, real processes."""

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import nextword
from nextword.common import fs
from nextword.common.errors import CorruptFileError, DiskFullError, NextwordError
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import load_shards
from nextword.training import checkpoint
from nextword.training.checkpoint import (
    AsyncCheckpointer,
    TensorShard,
    latest_valid,
    list_checkpoints,
    write_safetensors,
)
from nextword.training.config import TrainingConfig
from nextword.training.distributed import PEER_LOST, SINGLE_PROCESS, DistContext, init_distributed
from nextword.training.losses import LossModule, causal_lm_loss
from nextword.training.optimizer import Optimizer
from nextword.training.parallel import (
    chunk_bounds,
    load_weights_,
    local_slices,
    parallelize,
    shard_slices,
    to_full,
    to_local,
)
from processes import PATIENCE, kill, start_process
from runs import free_port, state_hashes

TRAINING = TrainingConfig(optimizer="muon", lr=0.01)
MODEL: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 8, "vocab_size": 35}
more_time = pytest.mark.needs("more time")


def state(value: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"a": torch.full((50, 8), value), "b": torch.full((3,), value)}, {"adamw.step.a": torch.tensor(value)}


def save(run: Path, step: int) -> Path:
    with AsyncCheckpointer(run) as checkpointer:
        checkpointer.save_async(step, *state(float(step)), {"step": step})
        checkpointer.wait()
    return run / "checkpoints" / f"step-{step:08d}"


def sha256s(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.safetensors")}


# ---------------------------------------------------------------- files


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64])


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.lists(st.integers(1, 4), max_size=3), DTYPES), max_size=4))
def test_safetensors_reads_the_files_and_their_hashes_are_right(tmp_path_factory, shapes):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    shapes.pop("__metadata__", None)
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    shards = {name: TensorShard((0,) * tensor.ndim, tensor) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(1) as executor:
        entry, _ = write_safetensors(path, shards, executor).result()
    assert entry == {"bytes": path.stat().st_size, "sha256": fs.sha256_file(path)}
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@given(st.integers(1, 20), st.integers(1, 6))
def test_rows_are_divided_as_torch_chunk_does(rows, num_chunks):
    tensor = torch.randn(rows, 2)
    for index in range(num_chunks):
        start, length = chunk_bounds(rows, index, num_chunks)
        expected = (*tensor.chunk(num_chunks), *[tensor[:0]] * num_chunks)[index]
        assert torch.equal(tensor[start : start + length], expected)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.sampled_from([None, 0, 1]))
def test_the_shards_of_all_processes_are_the_whole(tmp_path_factory, rows, columns, row_shards, tp_size, tp_dim):
    directory, tensor = tmp_path_factory.mktemp("shards"), torch.randn(rows, columns)
    ctx = DistContext(world_size=row_shards * tp_size, tp_size=tp_size)
    for index in range(ctx.shard_count):
        shards = {} if index else {"count": TensorShard((), torch.tensor(3.0))}
        slices = shard_slices((rows, columns), tp_dim, ctx, index)
        if tensor[slices].numel() and (tp_dim is not None or index % tp_size == 0):
            shards["w"] = TensorShard(tuple(s.start for s in slices), tensor[slices].contiguous())
        path = directory / f"weights-{index + 1:05d}-of-{ctx.shard_count:05d}.safetensors"
        with ThreadPoolExecutor(1) as executor:
            write_safetensors(path, shards, executor)
    loaded = load_shards(directory, "weights")
    assert torch.equal(loaded["w"], tensor)
    assert loaded["count"] == 3
    shutil.rmtree(directory)


# ---------------------------------------------------------------- in the background


def test_later_steps_do_not_change_what_is_saved(tmp_path, monkeypatch):
    """The background thread waits until the weights have changed."""
    expected = sha256s(save(tmp_path / "before", 7))
    changed = threading.Event()

    def late(*arguments: Any) -> Any:
        assert changed.wait(60)
        return write_safetensors(*arguments)

    monkeypatch.setattr(checkpoint, "write_safetensors", late)
    weights, optimizer_state = state(7.0)
    with AsyncCheckpointer(tmp_path / "async") as checkpointer:
        checkpointer.save_async(7, weights, optimizer_state, {"step": 7})
        assert checkpointer.status == 1, "training continues while it is written"
        for tensor in (*weights.values(), *optimizer_state.values()):
            tensor.zero_()
        changed.set()
        checkpointer.wait()
        assert checkpointer.status == 0
    assert sha256s(tmp_path / "async" / "checkpoints" / "step-00000007") == expected


def test_latest_moves_after_the_files_are_durable_and_the_oldest_is_removed_last(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    calls = []

    def record(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(path: Path, *arguments: Any, **named: Any) -> Any:
            latest = (tmp_path / "checkpoints" / "latest").read_text().strip()
            calls.append((name, re.sub(r"\.[0-9a-f]{8}\.partial$", ".partial", Path(path).name), latest))
            return original(path, *arguments, **named)

        monkeypatch.setattr(owner, name, call)

    record(checkpoint, "write_safetensors")
    for name in ("write_manifest", "fsync_path", "atomic_write"):
        record(fs, name)
    record(Path, "rename")
    record(shutil, "rmtree")
    save(tmp_path, 3)
    old, new = "step-00000002", "step-00000003"
    partial = f".{new}.partial"
    assert calls == [
        ("write_safetensors", "weights.safetensors", old),
        ("fsync_path", "weights.safetensors", old),
        ("write_safetensors", "optimizer.safetensors", old),
        ("fsync_path", "optimizer.safetensors", old),
        ("write_manifest", partial, old),
        ("atomic_write", fs.MANIFEST, old),
        ("fsync_path", f".{fs.MANIFEST}.partial", old),
        ("fsync_path", partial, old),
        ("rmtree", new, old),
        ("rename", partial, old),
        ("fsync_path", "checkpoints", old),
        ("atomic_write", "latest", old),
        ("fsync_path", ".latest.partial", old),
        ("fsync_path", "checkpoints", new),
        ("rmtree", "step-00000001", new),
    ]
    assert [path.name for path in list_checkpoints(tmp_path)] == [old, new], "two are kept"


@pytest.mark.skipif(os.name == "nt", reason="this system has no SIGKILL")
def test_a_kill_during_a_save_leaves_the_last_checkpoint_complete(tmp_path):
    code = (
        "import sys, time, pathlib; from test_checkpoints import *\n"
        "save(pathlib.Path(sys.argv[1]), 1)\n"
        "def half(path, *arguments):\n"
        "    write_safetensors(path, *arguments); os.truncate(path, 300); print('inside', flush=True); time.sleep(10**6)\n"
        "checkpoint.write_safetensors = half\n"
        "save(pathlib.Path(sys.argv[1]), 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = start_process([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"inside\n"
    kill(process)
    directory = tmp_path / "checkpoints"
    assert (directory / ".step-00000002.partial" / "weights.safetensors").stat().st_size == 300
    assert (directory / "latest").read_text() == "step-00000001\n"
    assert latest_valid(tmp_path) == directory / "step-00000001"
    (directory / ".step-00000002.partial" / "weights-00002-of-00002.safetensors").write_bytes(b"of another world size")
    (directory / ".step-00000003.partial").mkdir()
    again = save(tmp_path, 2)
    assert latest_valid(tmp_path) == again
    assert {path.name for path in again.iterdir()} == {"weights.safetensors", "optimizer.safetensors", fs.MANIFEST}
    assert not list(directory.glob(".*")), "leftovers of the killed process are removed"


def test_a_full_disk_in_the_background_ends_the_run_and_the_resume_is_exact(shards, tmp_path, monkeypatch):
    model = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32, "dropout": 0.1}
    training = {"batch_tokens": 256, "save_every": 5, "evaluations": 1}
    settings: dict[str, Any] = {"steps": 20, "model": model, "training": training}
    nextword.pretrain(shards, tmp_path / "undisturbed", **settings)

    def full(path: Path, *arguments: Any) -> Any:
        if path.parent.name != ".step-00000005.partial":
            with fs.map_disk_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        return write_safetensors(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_safetensors", full)
        with pytest.raises(DiskFullError, match=r"step-00000010.*the disk is full") as error:
            nextword.pretrain(shards, tmp_path / "run", **settings)
    assert error.value.exit_code == 4
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000005"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) <= 15, "noticed before the next save"
    nextword.pretrain(out=tmp_path / "run", resume=True)
    assert state_hashes(tmp_path / "run") == state_hashes(tmp_path / "undisturbed")


def test_a_write_error_of_another_process_ends_this_one_with_the_same_exit_code(tmp_path):
    message = "another process could not write"
    with AsyncCheckpointer(tmp_path) as checkpointer, pytest.raises(NextwordError, match=message) as error:
        checkpointer.advance(1 + DiskFullError.exit_code)
    assert error.value.exit_code == DiskFullError.exit_code


# ---------------------------------------------------------------- several processes


def model_and_optimizer(seed: int) -> tuple[LossModule, Optimizer]:
    torch.manual_seed(seed)
    model = GPT(build_config("gpt2", **MODEL))
    return LossModule(model, causal_lm_loss), Optimizer(model, TRAINING)


def parallel_model(ctx: DistContext, layout: str) -> tuple[DistContext, LossModule, Optimizer]:
    """A sharded model. The layout is a strategy, followed by "tp" for tensor parallelism of two processes."""
    strategy, *tensor_parallel = layout.split()
    ctx = ctx.with_tensor_parallel(2 if tensor_parallel else 1)
    loss_module, _ = model_and_optimizer(0)
    ctx = parallelize(ctx, loss_module, strategy, bf16=False, device=torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    return ctx, loss_module, Optimizer(loss_module.model, TRAINING, ctx)


def full_tensors(loss_module: LossModule, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    tensors = {**dict(loss_module.model.named_parameters()), **optimizer.state_tensors()}
    return {name: to_full(tensor.detach()).clone() for name, tensor in tensors.items()}


def save_model(
    run: Path, step: int, loss_module: LossModule, optimizer: Optimizer, ctx: DistContext = SINGLE_PROCESS
) -> None:
    with AsyncCheckpointer(run, ctx) as checkpointer:
        weights = dict(loss_module.model.named_parameters())
        checkpointer.save_async(step, weights, optimizer.state_tensors(), {"step": step})
        checkpointer.wait()


def load_model(path: Path, loss_module: LossModule, optimizer: Optimizer, *ctx: DistContext) -> None:
    weights, optimizer_state = checkpoint.load(path, dict(loss_module.model.named_parameters()))
    load_weights_(loss_module.model, weights.items(), *ctx)
    optimizer.load_state_tensors(optimizer_state)


def save_and_load(ctx: DistContext, directory: Path, layout: str) -> None:
    """Run by each process: save sharded, load in one process, save there, and load both sharded again."""
    ctx, loss_module, optimizer = parallel_model(ctx, layout)
    single, single_optimizer = model_and_optimizer(0)
    for (name, p), q in zip(loss_module.model.named_parameters(), single.model.parameters(), strict=True):
        assert torch.equal(to_local(p), q[local_slices(p, ctx)]), f"{name}: sharded as `local_slices` says"
        assert torch.equal(to_full(p.detach()), q), name
        p.grad = p.detach() * 0.5 + 0.1
        q.grad = q.detach() * 0.5 + 0.1
    optimizer.step(1.0)
    single_optimizer.step(1.0)
    before, expected = full_tensors(loss_module, optimizer), full_tensors(single, single_optimizer)
    for name in expected:
        torch.testing.assert_close(before[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    save_model(directory / "sharded", 1, loss_module, optimizer, ctx)
    paths = [directory / name / "checkpoints" / "step-00000001" for name in ("sharded", "single")]
    if ctx.is_main:
        single, single_optimizer = model_and_optimizer(1)
        load_model(paths[0], single, single_optimizer)
        after = full_tensors(single, single_optimizer)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        save_model(directory / "single", 1, single, single_optimizer)
    ctx.all_reduce_max([0])  # barrier
    for path in paths:
        with torch.no_grad():
            for p in loss_module.model.parameters():
                p.zero_()
        optimizer = Optimizer(loss_module.model, TRAINING, ctx)
        load_model(path, loss_module, optimizer, ctx)
        after = full_tensors(loss_module, optimizer)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before), path


def killed_while_saving(ctx: DistContext, directory: Path, layout: str) -> None:
    """Run by each of two processes; the second one is killed while it writes its shards of the second checkpoint."""

    def half_and_killed(path: Path, *arguments: Any) -> Any:
        write_safetensors(path, *arguments)
        os.truncate(path, 300)
        os.kill(os.getpid(), signal.SIGKILL)

    ctx, loss_module, optimizer = parallel_model(ctx, layout)
    save_model(directory / "killed", 1, loss_module, optimizer, ctx)
    if not ctx.is_main:
        checkpoint.write_safetensors = half_and_killed
    save_model(directory / "killed", 2, loss_module, optimizer, ctx)


def run_programs(directory: Path, layout: str, *programs: Callable[[DistContext, Path, str], None]) -> None:
    with init_distributed() as ctx:
        for program in programs:
            program(ctx, directory, layout)


def run_in_processes(
    directory: Path,
    layout: str,
    *programs: Callable[[DistContext, Path, str], None],
    exit_codes: tuple[int, ...] = (0, 0),
    local_world_size: int | None = None,
) -> list[str]:
    """Run functions of this file in as many processes as there are exit codes; their standard error."""
    names = ", ".join(program.__name__ for program in programs)
    code = f"import sys, pathlib; from test_checkpoints import *; run_programs(Path(sys.argv[1]), sys.argv[2], {names})"
    environment = {
        **os.environ,
        "WORLD_SIZE": str(len(exit_codes)),
        "LOCAL_WORLD_SIZE": str(local_world_size or len(exit_codes)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-W", "error::UserWarning:nextword", "-c", code, directory, layout]
    processes = [
        start_process(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(len(exit_codes))
    ]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert tuple(process.returncode for process in processes) == exit_codes, errors
    return errors


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory) -> Path:
    """A checkpoint of two processes, `sharded`, and that of a run one of whose processes was killed, `killed`."""
    if os.name == "nt":
        pytest.skip("this system has no SIGKILL")
    directory = tmp_path_factory.mktemp("two")
    programs, exit_codes = (save_and_load, killed_while_saving), (1, -signal.SIGKILL)
    errors = run_in_processes(directory, "fsdp-no-reshard", *programs, exit_codes=exit_codes)
    assert PEER_LOST in errors[0]
    return directory


@pytest.fixture
def sharded(of_two_processes: Path) -> Path:
    return of_two_processes / "sharded"


def test_each_process_writes_its_rows(sharded):
    last = latest_valid(sharded)
    assert last is not None
    names = {f"{kind}-0000{shard}-of-00002.safetensors" for kind in ("weights", "optimizer") for shard in (1, 2)}
    assert {path.name for path in last.iterdir()} == {*names, fs.MANIFEST}
    first, second = (load_file(last / f"weights-0000{shard}-of-00002.safetensors") for shard in (1, 2))
    assert (len(first["token_embedding.weight"]), len(second["token_embedding.weight"])) == (18, 17)


@more_time
def test_one_replica_writes(tmp_path):
    run_in_processes(tmp_path, "hsdp", save_and_load, local_world_size=1)
    sharded, single = (tmp_path / name / "checkpoints" / "step-00000001" for name in ("sharded", "single"))
    assert sha256s(sharded) == sha256s(single), "the files of a single process"


@pytest.mark.parametrize(
    ("layout", "local_world_size", "world_size"),
    [
        pytest.param("fsdp-no-reshard tp", 2, 2, marks=more_time),
        pytest.param("fsdp tp", 4, 4, marks=more_time),
        pytest.param("hsdp tp", 2, 4, marks=more_time),
    ],
)
def test_tensor_parallel_checkpoints_load_in_one_process_and_in_several(tmp_path, layout, local_world_size, world_size):
    exit_codes = (0,) * world_size
    run_in_processes(tmp_path, layout, save_and_load, exit_codes=exit_codes, local_world_size=local_world_size)
    last = latest_valid(tmp_path / "sharded")
    assert last is not None
    files = list(last.glob("weights-*"))
    assert len(files) == local_world_size, "one replica writes"
    shapes = {load_file(path)["blocks.0.feed_forward.down.weight"].shape for path in files}  # of [16, 64]
    assert shapes == {(16 * 2 // local_world_size, 32)}, "no process writes more than its shard"


def test_a_process_killed_while_it_saves_leaves_the_last_checkpoint_complete(of_two_processes):
    directory = of_two_processes / "killed" / "checkpoints"
    partial = (directory / ".step-00000002.partial").glob("weights-*.safetensors")
    sizes = {path.name: path.stat().st_size for path in partial}
    assert sizes.keys() == {f"weights-0000{shard}-of-00002.safetensors" for shard in (1, 2)}
    assert sizes["weights-00002-of-00002.safetensors"] == 300
    assert (directory / "latest").read_text() == "step-00000001\n"
    assert latest_valid(of_two_processes / "killed") == directory / "step-00000001"


def test_a_damaged_or_missing_shard_is_named(sharded, tmp_path):
    run = shutil.copytree(sharded, tmp_path / "run")
    shard = run / "checkpoints" / "step-00000001" / "optimizer-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    for check in (latest_valid, nextword.verify):
        with pytest.raises(
            CorruptFileError, match=r"optimizer-00002-of-00002\.safetensors: the content does not match"
        ):
            check(run)
    shard.unlink()
    with pytest.raises(CorruptFileError, match=r"optimizer-00002-of-00002\.safetensors: missing"):
        latest_valid(run)


def test_a_tensor_file_that_the_manifest_does_not_list_is_rejected(sharded, tmp_path):
    run = shutil.copytree(sharded, tmp_path / "run")
    stray = run / "checkpoints" / "step-00000001" / "weights-00003-of-00003.safetensors"
    shutil.copy(stray.with_name("weights-00001-of-00002.safetensors"), stray)
    with pytest.raises(CorruptFileError, match=r"weights-00003-of-00003\.safetensors: not listed"):
        latest_valid(run)
