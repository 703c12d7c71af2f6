"""Distributed training: several processes under torchrun train the model that a single process trains.

Ordinary tests start as few processes as the contracts allow. The rest is marked `needs("more time")`: make test-all.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import nextword
from nextword.common.errors import UsageError
from nextword.data.dataset import InMemoryTokens, TokenDataset
from nextword.model.config import build_config
from nextword.training import checkpoint
from nextword.training.distributed import DistContext
from nextword.training.parallel import balance_by_cost, build_mesh, check_tp_divisibility
from processes import PATIENCE, wait_until
from runs import finish, free_port, losses, metrics, start, state_hashes

STEPS = 20
MODEL = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32}
TRAINING = {"batch_tokens": 256, "save_every": 5, "micro_batch_rows": 2}
TENSOR_PARALLEL = ("--training.tensor", "2")
FIT_MEMORY = "fit the micro-batch to memory"
more_time = pytest.mark.needs("more time")


def options(**settings: dict[str, Any]) -> list[str]:
    """Settings as command line options: model={"n_layers": 2} is --model.n-layers=2."""
    return [
        f"--{group}.{name.replace('_', '-')}={value}"
        for group, values in settings.items()
        for name, value in values.items()
    ]


def start_pretraining(num_processes: int, shards: Path, run: Path, *more: str, **launch: Any) -> Any:
    training = dict(TRAINING)
    if FIT_MEMORY in more:
        del training["micro_batch_rows"]
    arguments = [*options(model=MODEL, training=training), *(option for option in more if option != FIT_MEMORY)]
    return start(
        num_processes, "pretrain", shards, "--out", run, "--steps", str(STEPS), "--seed", "3", *arguments, **launch
    )


def pretrain(num_processes: int, shards: Path, run: Path, *more: str) -> tuple[str, str]:
    return finish(start_pretraining(num_processes, shards, run, *more))


@pytest.fixture(scope="module")
def single(shards, tmp_path_factory) -> Path:
    """The run of a single process."""
    run = tmp_path_factory.mktemp("single") / "run"
    nextword.pretrain(shards, run, steps=STEPS, seed=3, model=MODEL, training=TRAINING)
    return run


@pytest.fixture(scope="module")
def two(shards, tmp_path_factory) -> Path:
    """The same run by two processes, with sharded weights."""
    run = tmp_path_factory.mktemp("two") / "run"
    out, _ = pretrain(2, shards, run, "--json")
    assert json.loads(out)["steps"] == STEPS, "only the main process prints"
    return run


@pytest.fixture(scope="module")
def tensor_parallel(shards, tmp_path_factory) -> Path:
    """The same run by two processes with tensor parallelism."""
    run = tmp_path_factory.mktemp("tensor_parallel") / "run"
    pretrain(2, shards, run, *TENSOR_PARALLEL)
    return run


def assert_same_run(run: Path, single: Path) -> None:
    """Training losses, validation losses, final model and result are equal up to rounding."""
    assert losses(run) == pytest.approx(losses(single), abs=2e-5)
    weights, expected = (load_file(path / "model" / "model.safetensors") for path in (run, single))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-4, rtol=0, msg=name)
    validation = [[r["validation"]["loss"] for r in metrics(path) if "validation" in r] for path in (run, single)]
    assert validation[0] == pytest.approx(validation[1], abs=2e-5)
    results = [json.loads((path / "result.json").read_text()) for path in (run, single)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=2e-5)
    assert results[0]["tokens"] == results[1]["tokens"]


# ---------------------------------------------------------------- division of the work


@given(st.integers(2, 300), st.integers(1, 17), st.integers(1, 3), st.integers(0, 30), st.integers(0, 2**32))
def test_ranks_divide_the_batch_of_a_single_process(length, context, rows, step, seed):
    dataset = TokenDataset(InMemoryTokens(np.arange(length)), context, 4 * rows, seed)
    whole = dataset.batch(step)
    for world_size in (2, 4):
        parts = [dataset.batch(step, rank, world_size) for rank in range(world_size)]
        assert [row for part in parts for row in part.row_ids] == whole.row_ids
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
        assert np.array_equal(np.concatenate([part.targets for part in parts]), whole.targets)
        assert all(part.n_tokens == whole.n_tokens for part in parts)
        assert all(part.loss_denominators == whole.loss_denominators for part in parts)


def test_a_batch_that_ranks_cannot_divide_is_rejected():
    with pytest.raises(ValueError, match="3 rows"):
        TokenDataset(InMemoryTokens(np.arange(100)), 8, 3, seed=0).batch(0, 0, 2)


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_work_is_balanced_by_cost(costs, num_workers):
    owners = balance_by_cost(costs, num_workers)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == w) for w in range(num_workers)]
    assert max(loads) - min(loads) <= max(costs) + 1e-6


def test_tensor_parallelism_must_divide_processes_heads_and_width():
    with pytest.raises(UsageError, match=r"--training\.tensor 2 must divide the number of processes, and there is one"):
        DistContext().with_tensor_parallel(2)
    with pytest.raises(UsageError, match="and there are 3"):
        DistContext(world_size=3).with_tensor_parallel(2)
    six = DistContext(world_size=6, local_world_size=3, tp_size=2, strategy="hsdp")
    with pytest.raises(UsageError, match="does not divide the 3 processes of a machine"):
        build_mesh(six, torch.device("cpu"))
    config = build_config("modern", "tiny", vocab_size=100, n_heads=4, n_kv_heads=1)
    with pytest.raises(UsageError, match=r"--training\.tensor 2 does not divide the model's n_kv_heads, 1"):
        check_tp_divisibility(config, 2)


@given(st.integers(2, 9), st.integers(1, 20))
def test_tensor_parallelism_gives_every_process_a_part_of_the_vocabulary(tp_size, vocab_size):
    width = 2520  # divisible by every tp_size
    config = build_config("gpt2", n_layers=1, n_heads=width, d_model=width, context_length=8, vocab_size=vocab_size)
    if len(torch.arange(vocab_size).chunk(tp_size)) == tp_size:
        check_tp_divisibility(config, tp_size)
    else:
        with pytest.raises(UsageError, match=f"no part of the {vocab_size} tokens"):
            check_tp_divisibility(config, tp_size)


# ---------------------------------------------------------------- the model of a single process


@more_time  # the resumed run below does too
def test_sharded_training_equals_training_in_a_single_process(single, two):
    assert_same_run(two, single)


@more_time
def test_tensor_parallel_training_equals_training_in_a_single_process(single, tensor_parallel):
    assert_same_run(tensor_parallel, single)
    weights = load_file(checkpoint.list_checkpoints(tensor_parallel)[-1] / "weights-00002-of-00002.safetensors")
    assert weights["blocks.0.attention.query.weight"].shape == (16, 32), "one head of two"
    assert weights["blocks.0.attention.output.weight"].shape == (32, 16)
    assert weights["token_embedding.weight"].shape == (200, 32), "half of the vocabulary"


@more_time
def test_four_processes_with_fsdp_and_tensor_parallelism(shards, single, tmp_path):
    """With activation checkpointing and a micro-batch that is fitted to memory."""
    settings = ("--training.parallel", "fsdp", "--training.checkpoint-activations")
    pretrain(4, shards, tmp_path / "run", *TENSOR_PARALLEL, FIT_MEMORY, *settings)
    assert_same_run(tmp_path / "run", single)


@more_time
@pytest.mark.parametrize("more", [(), TENSOR_PARALLEL])
def test_two_machines_with_hsdp(shards, single, tmp_path, more):
    run, port = tmp_path / "run", str(free_port())
    launch = {rank: ["--nnodes", "2", "--node-rank", rank, "--master-port", port] for rank in ("0", "1")}
    settings = ("--training.parallel", "hsdp", *more)
    nodes = [
        start_pretraining(2 if more else 1, shards, run, *settings, torchrun_options=options)
        for options in launch.values()
    ]
    for node in nodes:
        finish(node)
    assert_same_run(run, single)


@more_time
def test_continued_pretraining_with_tensor_parallelism(base, tmp_path):
    text = tmp_path / "more.txt"
    text.write_text("\n\n".join(f"The {n}th ship came home, and {n * n} people saw it." for n in range(400)))
    single, parallel = tmp_path / "single", tmp_path / "parallel"
    arguments = ["--task", "continue", "--steps", "6", "--training.batch-tokens", "256"]
    finish(start(1, "finetune", base, text, "--out", single, *arguments))
    finish(start(2, "finetune", base, text, "--out", parallel, *arguments, *TENSOR_PARALLEL))
    assert len(losses(single)) == 6
    assert_same_run(parallel, single)


# One program for what two processes check without a run: its start-up takes longer than the checks.
CHECKS = """
import resource
import numpy as np, torch
from nextword.data.dataset import InMemoryTokens, TokenDataset
from nextword.model.config import build_config
from nextword.model.gpt import GPT, sample_dropout_masks
from nextword.training.config import TrainingConfig
from nextword.training.distributed import init_distributed
from nextword.training.losses import DeviceBatch, LossModule, causal_lm_loss
from nextword.training.parallel import load_weights_, parallelize, to_full
from nextword.training.step import StepSettings, activation_bytes_per_row, training_state_bytes

CPU = torch.device("cpu")

def initialized(ctx, config):
    loss_module = LossModule(GPT.on_meta(config), causal_lm_loss)
    ctx = parallelize(ctx, loss_module, "fsdp", bf16=False, device=CPU)
    torch.manual_seed(5)
    load_weights_(loss_module.model, loss_module.model.iter_init_weights(), ctx)
    return loss_module

def loss_of(loss_module, batch):
    loss = sum(term.total for term in loss_module(batch).values())
    loss.backward()
    return loss

def check_initialization(ctx):
    small = build_config("modern", d_model=64, n_layers=2, n_heads=2, vocab_size=64, context_length=64)
    config = build_config("modern", d_model=512, n_layers=8, n_heads=8, vocab_size=2048, context_length=64)
    initialized(ctx, small)  # all imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss_module = initialized(ctx, config)
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert growth < 0.7 * 4 * config.parameters, (growth, 4 * config.parameters)
    weights = {name: to_full(p.detach()) for name, p in loss_module.model.named_parameters()}
    torch.manual_seed(5)
    for name, p in GPT(config).named_parameters():
        assert torch.equal(weights[name], p), name

def check_gradients(ctx, preset, overrides):
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "vocab_size": 61, "context_length": 15, "dropout": 0.1}
    config = build_config(preset, **sizes, **overrides)
    tokens = torch.randint(config.vocab_size, (2, 3, 15))
    batch = DeviceBatch(tokens[0], tokens[1], sample_dropout_masks(config, [1, 2, 3], 15, "cpu"))
    single = LossModule(GPT(config), causal_lm_loss)
    with torch.no_grad():  # initial zeros and ones would hide errors
        for parameter in single.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    parallel = LossModule(GPT.on_meta(config), causal_lm_loss)
    ctx = parallelize(ctx, parallel, "fsdp-no-reshard", bf16=False, device=CPU)
    load_weights_(parallel.model, single.model.named_parameters(), ctx)
    torch.testing.assert_close(loss_of(parallel, batch), loss_of(single, batch), rtol=1e-5, atol=0)
    gradients = {name: p.grad for name, p in single.model.named_parameters()}
    for name, p in parallel.model.named_parameters():
        torch.testing.assert_close(to_full(p.grad), gradients[name], rtol=1e-4, atol=1e-5, msg=f"{preset} {name}")

def memory(ctx):
    config = build_config("modern", d_model=512, n_layers=2, n_heads=8, vocab_size=512, context_length=64)
    loss_module = LossModule(GPT.on_meta(config), causal_lm_loss)
    ctx = parallelize(ctx, loss_module, "fsdp", bf16=False, device=CPU)
    dataset = TokenDataset(InMemoryTokens(np.arange(4096) % 512), 64, 4, seed=0)
    return (
        activation_bytes_per_row(loss_module, dataset, StepSettings(TrainingConfig())),
        training_state_bytes(loss_module.model, ctx),
    )

with init_distributed() as ctx:
    check_initialization(ctx)
    tensor_parallel = ctx.with_tensor_parallel(2)
    torch.manual_seed(7)
    for preset in ("tutorial", "gpt1", "gpt2", "modern"):
        check_gradients(tensor_parallel, preset, {})
    check_gradients(tensor_parallel, "modern", {"n_kv_heads": 2})
    whole, split = memory(ctx), memory(tensor_parallel)
    if ctx.is_main:
        print(split[0] / whole[0], split[1] / whole[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count a process's memory in other units")
def test_initialization_gradients_and_memory_of_two_processes(tmp_path):
    """A process never has more than its shards of the initial weights. Every preset has the gradients of a single process with
    tensor parallelism: odd vocabulary and window, untied head, few key-value heads, dropout. And tensor parallelism saves
    memory: of the 34 bytes per number of the residual stream (Korthikanti et al. 2022, table 2) all but 4 are halved, 19 / 34 =
    0.56, and what is gathered of the weights is halved."""
    (tmp_path / "checks.py").write_text(CHECKS)
    out, _ = finish(start(2, program=[tmp_path / "checks.py"]))
    activations, state = map(float, out.split())
    assert activations < 0.6
    assert 0.5 < state < 0.85


# ---------------------------------------------------------------- failures and restarts


def worker_pids(torchrun: Any) -> dict[int, int]:
    """The process IDs of torchrun's workers, by rank."""
    pids = {}
    for task in Path(f"/proc/{torchrun.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # just ended
                continue
            ranks = [variable[5:] for variable in variables if variable.startswith(b"RANK=")]
            pids |= {int(rank): int(child) for rank in ranks}
    return pids


def kill_a_worker(shards: Path, run: Path, undisturbed: Path, rank: int, at_step: int, *settings: str) -> None:
    """Kill one of two workers; torchrun restarts both, and the run ends with the same bits as an undisturbed one."""
    torchrun = start_pretraining(2, shards, run, *settings, max_restarts=1)
    wait_until(lambda: len(losses(run)) >= at_step, torchrun)
    before = set(worker_pids(torchrun).values())
    os.kill(worker_pids(torchrun)[rank], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: len(pids := set(worker_pids(torchrun).values())) == 2 and not pids & before, torchrun)
    last = checkpoint.list_checkpoints(run)[-1].name
    wait_until(lambda: checkpoint.list_checkpoints(run)[-1].name > last, torchrun)
    print(f"\nfrom the kill to the next checkpoint: {time.monotonic() - killed:.1f} s")
    finish(torchrun)
    assert state_hashes(run) == state_hashes(undisturbed)


has_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system has no /proc")


@more_time
@has_proc
@pytest.mark.parametrize(("rank", "settings"), [(0, ()), (1, ()), (1, TENSOR_PARALLEL)])
@pytest.mark.parametrize(
    "at_step", [6 + n % 8 for n in range(max(1, int(os.environ.get("NEXTWORD_RESTARTS", "2")) // 2))]
)
def test_a_killed_process_is_restarted_and_the_run_is_exact(
    shards, two, tensor_parallel, tmp_path, rank, settings, at_step
):
    kill_a_worker(shards, tmp_path / "run", tensor_parallel if settings else two, rank, at_step, *settings)


@more_time
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no idle scheduling class")
@pytest.mark.parametrize("more", [(), TENSOR_PARALLEL])
def test_a_process_with_late_communication_threads_exits_cleanly(shards, tmp_path, more):
    """PyTorch's communication threads live as long as the process. A thread that still held a tensor at the end of the
    interpreter aborted the process after training, once in dozens of runs, and in most of these."""
    program = [Path(__file__).parent / "lagging_threads.py"]
    arguments = [*options(model=MODEL, training=TRAINING), "--steps", "3", *more]
    finish(start(2, "pretrain", shards, "--out", tmp_path / "run", *arguments, program=program))


@pytest.mark.parametrize(
    ("fixture", "num_processes", "settings", "message"),
    [
        ("single", 2, ("--training.parallel", "fsdp"), "--training.parallel fsdp-no-reshard → fsdp"),
        pytest.param("tensor_parallel", 1, (), "--training.tensor 2 does not divide 1 process", marks=more_time),
        pytest.param("two", 1, (), "", marks=more_time),
        pytest.param("single", 2, TENSOR_PARALLEL, "--training.tensor 1 → 2", marks=more_time),
        pytest.param(
            "tensor_parallel", 4, (*TENSOR_PARALLEL, "--training.parallel", "fsdp"), "→ fsdp", marks=more_time
        ),
    ],
)
def test_a_run_resumes_with_other_processes_and_another_strategy(
    request, shards, single, tmp_path, fixture, num_processes, settings, message
):
    finished: Path = request.getfixturevalue(fixture)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    shutil.rmtree(checkpoint.list_checkpoints(run)[-1])
    (run / "checkpoints" / "latest").write_text(checkpoint.list_checkpoints(run)[-1].name + "\n")
    _, err = pretrain(num_processes, shards, run, "--resume", *settings)
    assert "resuming from step 15" in err, err
    assert message in err
    assert_same_run(run, single)


def test_an_error_at_the_start_is_reported_by_every_process(base, tmp_path):
    table = tmp_path / "few.csv"
    table.write_text("text,label\n" + "one,a\ntwo,b\n" * 20)
    process = start(2, "finetune", base, table, "--out", tmp_path / "run", "--task", "classify", "--steps", "3")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "nextword: process 1: " in err
    assert len(re.findall("in one process|a single process", err)) >= 2, err
    assert not re.search(r'File ".*src/nextword', err), "no traceback of ours"
