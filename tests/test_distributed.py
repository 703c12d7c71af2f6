"""Several processes, one run: the same tokens, the same model, and through the loss of one of them. Real processes under
torchrun, as a person starts them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nextword.training.sharing import balance_by_cost, check_tp_divisibility
from safetensors.torch import load_file

from nextword.common.errors import UsageError
from nextword.data.dataset import InMemoryTokens, TokenDataset
from nextword.model.config import build_config
from nextword.training import checkpoint
from nextword.training.distributed import DistContext
from nextword.training.parallel import build_mesh
from processes import PATIENCE, start_process, wait_until
from test_checkpoints import free_port
from test_pretraining import state_hashes

STEPS = 40
FITTED = "as many windows at once as memory holds"
SIZES = [
    "--model.n-layers", "2", "--model.n-heads", "2", "--model.d-model", "32", "--model.context-length", "32",
    "--training.batch-tokens", "256", "--training.save-every", "5", "--seed", "3",
]  # fmt: skip

# ---------------------------------------------------------------- who does what


@given(st.integers(2, 300), st.integers(1, 17), st.integers(1, 3), st.integers(0, 30), st.integers(0, 2**32))
def test_the_processes_together_have_the_batch_of_one(length, context, rows, step, seed):
    dataset = TokenDataset(InMemoryTokens(np.arange(length)), context, 4 * rows, seed)
    alone = dataset.batch(step)
    for world in (2, 4):
        parts = [dataset.batch(step, rank, world) for rank in range(world)]
        assert [row for part in parts for row in part.row_ids] == alone.row_ids
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), alone.tokens)
        assert np.array_equal(np.concatenate([part.targets for part in parts]), alone.targets)
        assert {(part.n_tokens, part.loss_denominators["next_word"]) for part in parts} == {
            (alone.n_tokens, alone.loss_denominators["next_word"])
        }


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="3 rows"):
        TokenDataset(InMemoryTokens(np.arange(100)), 8, 3, seed=0).batch(0, 0, 2)


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_work_is_spread_evenly(costs, size):
    owners = balance_by_cost(costs, size)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == process) for process in range(size)
    ]
    assert max(loads) - min(loads) <= max(costs) + 1e-6, (
        "else the last piece of the fullest would lie with the emptiest"
    )


# ---------------------------------------------------------------- runs


def start(
    world: int, *arguments: str | Path, restarts: int = 0, program: Sequence[str] = ("-m", "nextword")
) -> "subprocess.Popen[str]":
    """The program under torchrun, or alone in a world of one."""
    launcher = [
        "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts", str(restarts),
        "--monitor-interval", "0.1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()),
    ]  # fmt: skip
    command = [sys.executable, *(launcher if world > 1 else []), *program, *map(str, arguments)]
    return start_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def pretrain(run: Path, shards: Path, world: int, *more: str, restarts: int = 0) -> "subprocess.Popen[str]":
    """A run of a small model; two windows at a time, or as many as fit where `more` says so."""
    rows = [] if FITTED in more else ["--training.micro-batch-rows", "2"]
    said = [*SIZES, *rows, *(one for one in more if one != FITTED)]
    return start(world, "pretrain", shards, "--out", run, "--steps", str(STEPS), *said, restarts=restarts)


def end(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    return out, err


def written(path: Path, program: str) -> str:
    path.write_text(program)
    return str(path)


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def workers(process: "subprocess.Popen[str]") -> dict[int, int]:
    """Process numbers of torchrun's children, by rank."""
    found = {}
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                pairs = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            ranks = [pair[5:] for pair in pairs if pair.startswith(b"RANK=")]
            found |= {int(rank): int(child) for rank in ranks}
    return found


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    end(pretrain(run, shards, 1))
    return run


@pytest.fixture(scope="module")
def two(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    out, _ = end(pretrain(run, shards, 2, "--json"))
    assert json.loads(out)["steps"] == STEPS, "one of the two speaks"
    return run


def test_two_processes_make_the_model_that_one_makes(alone, two):
    assert_alike(two, alone)


def assert_alike(run: Path, alone: Path) -> None:
    """Losses, looks at held-out text, the kept model and its result: within rounding the same."""
    assert losses(run) == pytest.approx(losses(alone), abs=2e-5)
    ours, longest_held_out = (load_file(one / "model" / "model.safetensors") for one in (run, alone))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-4, rtol=0, msg=name)
    looks = [[r["validation"]["loss"] for r in records(one) if "validation" in r] for one in (run, alone)]
    assert looks[0] == pytest.approx(looks[1], abs=2e-5)
    results = [json.loads((one / "result.json").read_text()) for one in (run, alone)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=2e-5)
    assert results[0]["tokens"] == results[1]["tokens"]


SPLIT = ("--training.tensor", "2")


@pytest.fixture(scope="module")
def split(shards, tmp_path_factory) -> Path:
    """Two processes that work on each matrix together."""
    run = tmp_path_factory.mktemp("split") / "run"
    end(pretrain(run, shards, 2, *SPLIT))
    return run


def test_processes_that_work_on_each_matrix_together_make_the_model_that_one_makes(alone, split):
    assert_alike(split, alone)
    weights = load_file(checkpoint.list_checkpoints(split)[-1] / "weights-00002-of-00002.safetensors")
    assert weights["blocks.0.attention.query.weight"].shape == (16, 32), "one head of two"
    assert weights["blocks.0.attention.output.weight"].shape == (32, 16)
    assert weights["token_embedding.weight"].shape == (200, 32), "half of the vocabulary"


def test_four_processes_as_two_pairs_make_it_too(shards, alone, tmp_path):
    """The weights gathered by block, the blocks' activations made again, and a micro-batch that is fitted to memory."""
    run = tmp_path / "run"
    end(pretrain(run, shards, 4, *SPLIT, FITTED, "--training.parallel", "full", "--training.checkpoint-activations"))
    assert_alike(run, alone)


@pytest.mark.parametrize(
    ("world", "settings", "word"),
    [
        (
            1,
            SPLIT,
            "--training.tensor 2 must divide the number of processes, and there is one: torchrun starts several",
        ),
        (3, SPLIT, "--training.tensor 2 must divide the number of processes, and there are 3"),
        (2, (*SPLIT, "--model.n-kv-heads", "1"), "--training.tensor 2 does not divide the model's n_kv_heads, 1"),
    ],
)
def test_matrices_that_cannot_be_split_are_refused(shards, tmp_path, world, settings, word):
    process = pretrain(tmp_path / "run", shards, world, *settings)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert word in err
    assert not re.search(r'File ".*src/nextword', err), "no traceback of ours"


@given(st.integers(2, 9), st.integers(1, 20))
def test_a_vocabulary_is_split_so_that_each_has_some_or_refused(tensor_size, vocab_size):
    width = 2520  # what all of them divide
    config = build_config("gpt2", n_layers=1, n_heads=width, d_model=width, context_length=8, vocab_size=vocab_size)
    rows = [len(part) for part in torch.arange(vocab_size).chunk(tensor_size)]
    if len(rows) == tensor_size:
        check_tp_divisibility(config, tensor_size)
    else:
        with pytest.raises(UsageError, match=f"leaves nothing for some of a vocabulary of {vocab_size}"):
            check_tp_divisibility(config, tensor_size)


def test_the_processes_of_a_matrix_are_on_one_machine_where_each_has_a_copy():
    world = DistContext(rank=0, world_size=6, local_world_size=3)
    world.init_tensor_parallel(2)
    with pytest.raises(UsageError, match="does not divide the 3 processes of a machine"):
        build_mesh(world, "hybrid", torch.device("cpu"))


def test_weights_that_are_gathered_by_block(shards, alone, tmp_path):
    run = tmp_path / "run"
    end(pretrain(run, shards, 2, "--training.parallel", "full"))
    assert_alike(run, alone)


@pytest.mark.parametrize("more", [(), SPLIT])
def test_two_machines_that_have_a_copy_of_the_weights_each(shards, alone, tmp_path, more):
    """Of one process each, or of two that work on each matrix together."""
    run, port, token_nll_out = tmp_path / "run", str(free_port()), "2" if more else "1"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", each, "--master-addr",
              "127.0.0.1", "--master-port", port]  # fmt: skip
    program = ["-m", "nextword", "pretrain", str(shards), "--out", str(run), "--steps", str(STEPS), *SIZES]
    processes = [
        start_process([*launch, "--node-rank", rank, *program, "--training.parallel", "hybrid", *more],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        for rank in ("0", "1")
    ]  # fmt: skip
    for process in processes:
        end(process)
    assert_alike(run, alone)


SHAPES = """
import numpy as np, torch
from nextword.model.config import build_config
from nextword.model.gpt import GPT, dropout_masks
from nextword.training.distributed import joined
from nextword.training.losses import Inputs, Step, next_word
from nextword.training.parallel import fill, share, whole

def loss_of(step):
    loss = sum(loss.total for loss in step(inputs).values())
    loss.backward()
    return loss

torch.manual_seed(7)
with joined() as world:
    world.form_groups(2)
    for preset, heads in [("tutorial", {}), ("gpt1", {}), ("gpt2", {}), ("modern", {}), ("modern", {"n_kv_heads": 2})]:
        sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "vocab_size": 61, "context_length": 15, "dropout": 0.1}
        config = build_config(preset, **sizes, **heads)
        tokens = torch.randint(config.vocab_size, (2, 3, 15))
        inputs = Inputs(tokens[0], tokens[1], dropout_masks(config, [1, 2, 3], 15, "cpu"))
        alone = Step(GPT(config), next_word)
        with torch.no_grad():  # what begins as nothing or as one would hide what is left out
            for parameter in alone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        split = Step(GPT.hollow(config), next_word)
        share(world, split, "data", False, torch.device("cpu"))
        fill(split.model, alone.model.named_parameters(), world)
        torch.testing.assert_close(loss_of(split), loss_of(alone), rtol=1e-5, atol=0)
        gradients = {name: p.grad for name, p in alone.model.named_parameters()}
        for name, parameter in split.model.named_parameters():
            torch.testing.assert_close(whole(parameter.grad), gradients[name], rtol=1e-4, atol=1e-5, msg=f"{preset} {name}")
"""


def test_a_model_of_every_preset_has_the_same_loss_and_gradients_where_its_matrices_are_split(tmp_path):
    """An uneven vocabulary, an uneven window, a head of its own, biases or none, as few heads for keys as there are processes,
    and dropout."""
    end(start(2, program=[written(tmp_path / "shapes.py", SHAPES)]))


def test_pre_training_that_goes_on_from_a_model_is_shared_too(base, tmp_path):
    text = tmp_path / "more.txt"
    text.write_text("\n\n".join(f"The {n}th ship came home, and {n * n} people saw it." for n in range(400)))
    runs = [tmp_path / "alone", tmp_path / "split"]
    said = ["--task", "continue", "--steps", "6", "--training.batch-tokens", "256"]
    end(start(1, "finetune", base, text, "--out", runs[0], *said))
    end(start(2, "finetune", base, text, "--out", runs[1], *said, *SPLIT))
    assert len(losses(runs[0])) == 6
    assert_alike(runs[1], runs[0])


BEGINNING = """
import resource, torch
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.training.distributed import joined
from nextword.training.losses import Step, next_word
from nextword.training.parallel import fill, part, share, whole

def begun(config):
    step = Step(GPT.hollow(config), next_word)
    share(world, step, "full", False, torch.device("cpu"))
    torch.manual_seed(5)
    fill(step.model, step.model.first_weights(), world)
    return step

small = build_config("modern", d_model=64, n_layers=2, n_heads=2, vocab_size=64, context_length=64)
config = build_config("modern", d_model=768, n_layers=8, n_heads=12, vocab_size=2048, context_length=64)
with joined() as world:
    begun(small)  # all that is imported on the way
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = begun(config)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 0.7 * 4 * config.parameters, (grown, 4 * config.parameters)
    found = {name: whole(p.detach()) for name, p in step.model.named_parameters()}
    torch.manual_seed(5)
    for name, p in GPT(config).named_parameters():
        assert torch.equal(found[name], p), name
"""


KEEPING = """
import torch
import numpy as np
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.data.dataset import InMemoryTokens, TokenDataset
from nextword.training.distributed import joined, ALONE
from nextword.training.losses import Step, next_word
from nextword.training.parallel import share
from nextword.training.step import StepSettings, bytes_of_weights, bytes_per_row

class Row:
    def __len__(self): return 4096
    def read(self, begin, end): return np.arange(begin, end, dtype=np.uint16) % 512

config = build_config("modern", d_model=512, n_layers=2, n_heads=8, vocab_size=512, context_length=64)
data = TokenDataset(Row(), 64, 4, seed=0)
kept, weights = [], []
with joined() as world:
    for tensor_size in (1, 2):
        step = Step(GPT.hollow(config), next_word)
        world.form_groups(tensor_size)
        share(world, step, "full", False, torch.device("cpu"))
        kept.append(bytes_per_row(step, data, StepSettings()))
        weights.append(bytes_of_weights(step.model, world))
    if world.leads:
        print(f"{kept[1] / kept[0]:.2f} {weights[1] / weights[0]:.2f}")
"""


def test_who_works_on_half_of_each_matrix_keeps_less(tmp_path):
    """Of 34 bytes that a block keeps for each number of the residual stream (Korthikanti et al. 2022, table 2) two processes
    have half each, but for the 4 of what goes into attention and into feed-forward: 19 / 34 = 0.56. What is gathered of the
    weights is half; one's own part is the same."""
    out, _ = end(start(2, program=[written(tmp_path / "keeping.py", KEEPING)]))
    kept, sample_weights = map(float, out.split())
    print(f"\n{kept} of what is kept for the backward pass, {weights} of the weights")
    assert kept < 0.6
    assert 0.5 < weights < 0.85


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count a process's memory otherwise")
def test_no_process_begins_with_more_than_its_part(tmp_path):
    end(start(2, program=[written(tmp_path / "beginning.py", BEGINNING)]))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system does not tell who is who")
@pytest.mark.parametrize(("rank", "settings"), [(0, ()), (1, ()), (1, SPLIT)])
@pytest.mark.parametrize("time_of_it", range(int(os.environ.get("NEXTWORD_RESTARTS", "2")) // 2))
def test_one_is_killed_and_torchrun_starts_both_anew(shards, two, split, tmp_path, rank, settings, time_of_it):
    run = tmp_path / "run"
    process = pretrain(run, shards, 2, *settings, restarts=1)
    wait_until(lambda: len(losses(run)) >= 12 + time_of_it, process)
    before = workers(process)
    killed = time.monotonic()
    os.kill(before[rank], signal.SIGKILL)
    wait_until(lambda: len(new := workers(process)) == 2 and not {*new.values()} & {*before.values()}, process)
    last = checkpoint.list_checkpoints(run)[-1].name
    wait_until(lambda: checkpoint.list_checkpoints(run)[-1].name > last, process)
    print(f"\na step further, and that saved, {time.monotonic() - killed:.1f} s after the kill")
    end(process)
    assert state_hashes(run) == state_hashes(split if settings else two), "as if nothing had happened, bit for bit"


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no threads that wait for all others")
@pytest.mark.parametrize("more", [(), SPLIT])
def test_a_process_whose_threads_are_late_ends_well(shards, tmp_path, more):
    """PyTorch's communication threads live as long as the process. One that still had to let go of a tensor when Python was
    taken down aborted it, after all was trained and saved: once in dozens of runs, and here in most."""
    program = [str(Path(__file__).parent / "lagging_threads.py")]
    end(start(2, "pretrain", shards, "--out", tmp_path / "run", "--steps", "3", *SIZES, *more, program=program))


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers this signal otherwise")
@pytest.mark.parametrize(
    ("first", "second", "anew"),
    [
        ((2,), (1,), ""),
        ((1,), (2,), ""),
        ((2, *SPLIT), (1,), "--training.tensor 2 does not divide 1 processes: 1 in its place"),
        ((2, *SPLIT), (4, "--training.parallel", "full"), "--training.parallel data → full"),
        ((1,), (2, *SPLIT), "--training.tensor 1 → 2"),
        ((1,), (2, "--training.parallel", "full"), "--training.parallel data → full"),
    ],
)
def test_a_checkpoint_of_one_world_opens_in_another(shards, alone, tmp_path, first, second, anew):
    """In another number of processes, and shared among them in another way."""
    run = tmp_path / "run"
    process = pretrain(run, shards, *first)
    wait_until(lambda: len(losses(run)) >= 8, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert 0 < len(checkpoint.list_checkpoints(run)) < STEPS
    at = len(losses(run))
    assert at < STEPS, "it was stopped on the way"
    _, err = end(pretrain(run, shards, *second, "--resume"))
    assert f"a world of {first[0]} and goes on in one of {second[0]}" in err
    assert anew in err
    assert losses(run) == pytest.approx(losses(alone), abs=2e-5)


def test_what_cannot_begin_ends_every_process_with_a_word(shards, base, tmp_path):
    table = tmp_path / "few.csv"
    table.write_text("text,label\n" + "one,a\ntwo,b\n" * 20)
    process = start(2, "finetune", base, table, "--out", tmp_path / "run", "--task", "classify", "--steps", "3")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "nextword: this verb runs in one process" in err
    assert "nextword: process 1: this verb runs in one process" in err
    assert not re.search(r'File ".*src/nextword', err), "no traceback of ours"
