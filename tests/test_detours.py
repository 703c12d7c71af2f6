"""Losses that go astray, for real: batches that make them so, real kills on the way back, and the same bits at the end."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nextword.training.detours import (
    LOSS_WINDOW,
    SPIKE_STREAK,
    LossSpikeDetector,
    SkippedRange,
    SkippedRanges,
    read_skipped_ranges,
    write_skipped_ranges,
)
from nextword.training.objectives import DeviceBatch, LossTerm, causal_lm_loss
from nextword.training.pace import StepBudgetDecision, StepSchedule, read_decisions

import nextword
from nextword.common.console import Console
from nextword.common.errors import CorruptFileError, TrainingDivergedError
from nextword.common.fs import read_jsonl
from nextword.common.run_dir import RunInterruptedError
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenDataset
from nextword.pipeline.item_scores import generate_texts
from nextword.training import checkpoint
from nextword.training.trainer import Trainer
from processes import PATIENCE, start_process
from test_distributed import free_port
from test_pretraining import state_hashes

MODEL = {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 16, "dropout": 0.1}
TRAINING: dict[str, Any] = {"batch_tokens": 128, "evaluations": 3, "save_every": 10}
ROWS, SEED, STEPS = 8, 3, 45
ASTRAY = range(22, 27)  # the batches that make the loss infinite
Change = Callable[[LossTerm], LossTerm]


def windows(shards: Path) -> TokenDataset:
    return TokenDataset(Corpus.open(shards).tokens("train"), MODEL["context_length"], ROWS, SEED)


def infinite(loss: LossTerm) -> LossTerm:
    return LossTerm(loss.total * math.inf, loss.weight)


def tripled(loss: LossTerm) -> LossTerm:
    return LossTerm(3 * loss.total, loss.weight)


def poisoned(shards: Path, indices: Iterable[int], change: Change = infinite) -> Any:
    """The objective of pre-training, but that the windows of some batches change the loss."""
    data = windows(shards)
    bad = {row.tobytes() for index in indices for row in data.batch(index).tokens}

    def objective(model: Any, inputs: DeviceBatch) -> dict[str, LossTerm]:
        losses = causal_lm_loss(model, inputs)
        if any(row.tobytes() in bad for row in inputs.tokens.numpy()):
            return {name: change(loss) for name, loss in losses.items()}
        return losses

    return objective


def pretrain(run: Path, shards: Path, steps: int = STEPS, **training: Any) -> dict[str, Any]:
    merged = {**TRAINING, **training}
    return nextword.pretrain(shards, run, steps=steps, model=MODEL, training=merged, seed=SEED, resume=True)


def hold(put: Callable[[Any, str, Any], None]) -> list[int]:
    """Let the save after step 20 last until the run turns back; how far it is at each turn (see `Saver.stage`)."""
    turning, stages = threading.Event(), []
    turn_back, generate = Trainer._rollback, checkpoint.write_safetensors

    def late(path: Path, tensors: Any, beside: Any) -> Any:
        if path.parent.name == ".step-00000020.partial":
            assert turning.wait(PATIENCE)
            time.sleep(0.2)  # longer than a look for the newest checkpoint takes
        return generate_texts(path, tensors, beside)

    def turned(self: Trainer, *arguments: Any) -> bool:
        stages.append(self.checkpointer.stage)
        turning.set()
        return turn_back(self, *arguments)

    put(checkpoint, "write_tensors", late)
    put(Trainer, "_turn_back", turned)
    return stages


def replay(run: Path, again: Path) -> None:
    """The run once more from what it was begun with and its log of detours alone."""
    again.mkdir()
    for name in ("run.json", "detours.jsonl"):
        shutil.copy(run / name, again)
    nextword.pretrain(out=again, resume=True)


@pytest.fixture(scope="module")
def astray(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("astray") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextword.commands.pretrain.next_word", poisoned(shards, ASTRAY))
        pretrain(run, shards)
    return run


# ---------------------------------------------------------------- which batch a step takes


def detour(begin: int, end: int, **more: Any) -> SkippedRange:
    return SkippedRange(**{
        "first": 1, "last": 1, "begin": begin, "end": end, "back": 0, "reason": "spike", "forgets": False, "seconds": 0.0,
        "documents": [], **more,
    })  # fmt: skip


RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda r: detour(r[0], r[0] + r[1])), max_size=6
)


@given(RANGES)
def test_a_step_takes_the_batch_at_its_place_among_those_that_are_left(made):
    left = [i for i in range(300) if not any(d.begin <= i < d.end for d in made)]
    assert [SkippedRanges(made).batch_index(step) for step in range(100)] == left[:100]


def test_detours_at_one_place_are_counted():
    made = [detour(10, 15), detour(500, 505), detour(505, 510), detour(560, 565)]
    assert [SkippedRanges(made[:n]).attempts_near(made[n - 1].end) for n in (1, 2, 3, 4)] == [1, 1, 2, 3]
    assert SkippedRanges(made).attempts_near(565 + 100) == 0
    assert SkippedRanges(made).attempts_near(520) == 3, "before its end is not past it"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["first", "last", "begin", "end", "back", "reason", "forgets", "seconds", "documents"]


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(FIELDS, JUNK)) | JUNK, max_size=3))
@settings(max_examples=50)
def test_a_log_is_read_as_it_was_written_or_refused_by_its_line(tmp_path_factory, records):
    log = tmp_path_factory.getbasetemp() / "detours.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    try:
        found = read_skipped_ranges(log)
    except CorruptFileError as error:
        assert "detours.jsonl line " in str(error)
        return
    write_skipped_ranges(log, found)
    assert read_skipped_ranges(log).entries == found.entries
    assert all(found.batch_index(step) >= step for step in range(20))


# ---------------------------------------------------------------- what a spike is


def noise(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [4 * math.exp(-i / 300) + rng.gauss(0, 0.15) for i in range(count)]


def test_noise_is_no_spike_and_neither_are_four_high_losses():
    for seed in range(5):
        watch, losses = LossSpikeDetector(), noise(600, seed)
        for i, loss in enumerate(losses):
            watch.add(9.0 if i % 100 in (50, 51, 52, 53) else loss)
            assert not watch.is_spiking


def test_five_high_losses_are_a_spike_once_and_a_resume_sees_the_same():
    losses = [*noise(150, 0), *[9.0] * 30, *noise(20, 1)]
    watch, spikes = LossSpikeDetector(), []
    for i, loss in enumerate(losses):
        watch.add(loss)
        spikes += [i] if watch.is_spiking else []
        assert watch.is_suspicious == (150 <= i < 154)
        again = LossSpikeDetector(losses[: i + 1])
        assert (again.high, list(again.recent_losses)) == (watch.high, list(watch.recent_losses))
    assert spikes == [150 + SPIKE_STREAK - 1]
    assert not LossSpikeDetector([*noise(LOSS_WINDOW - 1, 0), 90.0]).high, "too early to tell"


# ---------------------------------------------------------------- what the documents are called


def test_tokens_are_called_by_their_documents(texts, tmp_path):
    """Beside the texts themselves: each window's text stands in the documents that it is said to be of."""
    rows = tmp_path / "in" / "rows.jsonl"
    rows.parent.mkdir()
    names = sorted(texts.glob("*.txt"))
    rows.write_text("".join(json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n" for path in names[:20]))
    for path in names[20:]:
        shutil.copy(path, rows.parent)
    corpus = nextword.prepare(rows.parent, tmp_path / "shards", vocab_size=300)
    tokens, end = corpus.tokens("train"), corpus.tokenizer.eos_id
    contents = {f"rows.jsonl line {i}": path.read_text(encoding="utf-8") for i, path in enumerate(names[:20], start=1)}
    contents |= {path.name: path.read_text(encoding="utf-8") for path in names[20:]}
    rng = random.Random(0)
    for start in [0, len(tokens) - 40, *(rng.randrange(len(tokens) - 40) for _ in range(40))]:
        ids = tokens.read(start, 40).tolist()
        parts = [corpus.tokenizer.decode(part).strip("\ufffd") for part in split(ids, end)]
        found = corpus.document_names([(start, 40)])
        assert len(found) == len(parts)
        for name, part in zip(found, parts, strict=True):
            assert part in contents[name]


def split(ids: list[int], end: int) -> list[list[int]]:
    """The ids of each document; one that is all end is a document whose end alone is there."""
    parts: list[list[int]] = [[]]
    for i, token in enumerate(ids):
        if token != end:
            parts[-1].append(token)
        elif i + 1 < len(ids):
            parts.append([])
    return parts


# ---------------------------------------------------------------- there and back


def test_a_run_goes_past_what_made_its_loss_infinite(astray, shards):
    [made] = read_jsonl(astray / "detours.jsonl")
    assert (made["first"], made["last"], made["begin"], made["end"], made["back"]) == (23, 27, 22, 27, 20)
    assert made["reason"] == "not finite"
    data, corpus = windows(shards), Corpus.open(shards)
    assert set(made["documents"]) == {name for i in ASTRAY for name in corpus.document_names(data.token_spans(i))}
    lines = read_jsonl(astray / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and not line["skipped"] for line in lines if "loss" in line)
    [message] = [line["message"] for line in lines if "message" in line]
    assert made["documents"][0] in message
    assert "steps 23 to 27" in message
    assert (astray / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}\n"
    assert "goes back to step 20" in (astray / "report.html").read_text(encoding="utf-8")


def test_and_is_the_run_that_never_saw_it(astray, tmp_path):
    replay(astray, tmp_path / "again")
    assert state_hashes(tmp_path / "again") == state_hashes(astray)


def test_a_save_that_is_under_way_is_what_a_turn_goes_back_to(astray, shards, tmp_path, monkeypatch):
    """As where it was done before the loss went astray."""
    monkeypatch.setattr("nextword.commands.pretrain.next_word", poisoned(shards, ASTRAY))
    stages = hold(monkeypatch.setattr)
    pretrain(tmp_path / "run", shards)
    assert stages == [1], "it is written when the run turns back"
    assert [made.back for made in read_skipped_ranges(tmp_path / "run" / "detours.jsonl").entries] == [20]
    assert state_hashes(tmp_path / "run") == state_hashes(astray)


PROGRAM = """
import os, signal, sys
from pathlib import Path
import nextword.commands.pretrain, nextword.common.run_dir, nextword.training.trainer
from test_detours import ASTRAY, hold, poisoned, pretrain

run, shards, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
nextword.commands.pretrain.next_word = poisoned(shards, ASTRAY)

def dying(function):
    def until_now(self, *args):
        if moment == "turning" and self.detours.exists():
            os.kill(os.getpid(), signal.SIGKILL)  # the detour is on disk, and nothing is undone yet
        return function(self, *args)
    return until_now

def counting(function):
    def until_now(self, record):
        if moment == "redoing" and self.detours.exists() and record["step"] == 24:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(self, record)
    return until_now

if moment == "saving":
    hold(setattr)
nextword.common.run_dir.RunFolder.cut_back = dying(nextword.common.run_dir.RunFolder.cut_back)
nextword.common.run_dir.RunFolder.append = counting(nextword.common.run_dir.RunFolder.append)
pretrain(run, shards)
"""


def start(program: Path, *arguments: str | Path, world: int = 1) -> "subprocess.Popen[str]":
    program.write_text(PROGRAM)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-addr", "127.0.0.1", "--master-port",
              str(free_port())] if world > 1 else []  # fmt: skip
    return start_process(
        [sys.executable, *launch, str(program), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("moment", ["turning", "redoing"])
def test_killed_on_the_way_back_and_resumed_equals_uninterrupted(astray, shards, tmp_path, monkeypatch, moment):
    run = tmp_path / "run"
    process = start(tmp_path / "program.py", run, shards, moment)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, err
    assert len(read_skipped_ranges(run / "detours.jsonl").entries) == 1
    assert len([line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]) == (
        27 if moment == "turning" else 23
    )
    monkeypatch.setattr("nextword.commands.pretrain.next_word", poisoned(shards, ASTRAY))
    pretrain(run, shards)
    assert state_hashes(run) == state_hashes(astray)


def test_without_a_checkpoint_the_run_goes_on_from_its_last_sound_step(shards, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("nextword.commands.pretrain.next_word", poisoned(shards, range(3, 8)))
    pretrain(run, shards, steps=12, save_every=50)
    [made] = read_skipped_ranges(run / "detours.jsonl").entries
    assert (made.back, made.begin, made.end) == (3, 3, 8)
    monkeypatch.undo()
    replay(run, tmp_path / "again")
    assert state_hashes(tmp_path / "again") == state_hashes(run)
    tokens = [[line["tokens"] for line in read_jsonl(r / "metrics.jsonl") if "loss" in line]
              for r in (run, tmp_path / "again")]  # fmt: skip
    assert tokens[0] == tokens[1]


def test_a_spike_is_gone_past_with_what_came_before_it(shards, tmp_path, monkeypatch):
    """Without a checkpoint to go back to, it is only said."""
    monkeypatch.setattr("nextword.commands.pretrain.next_word", poisoned(shards, range(118, 123), tripled))
    pretrain(tmp_path / "run", shards, steps=130, save_every=50)
    [made] = read_skipped_ranges(tmp_path / "run" / "detours.jsonl").entries
    assert (made.reason, made.back, made.begin, made.end) == ("spike", 100, 113, 123)
    losses = [line["loss"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 130
    assert max(losses[100:]) < 1.5 * losses[100]
    pretrain(tmp_path / "none", shards, steps=130, save_every=1000)
    assert not (tmp_path / "none" / "detours.jsonl").exists()
    messages = [line["message"] for line in read_jsonl(tmp_path / "none" / "metrics.jsonl") if "message" in line]
    assert any("no checkpoint is there to go back to" in message for message in messages)
    monkeypatch.undo()
    replay(tmp_path / "run", tmp_path / "again")
    assert state_hashes(tmp_path / "again") == state_hashes(tmp_path / "run")


# ---------------------------------------------------------------- what is never saved


def test_a_single_bad_step_is_left_out_named_and_not_saved(shards, tmp_path, monkeypatch):
    saved: list[tuple[int, int]] = []
    save = Trainer._save_conversation

    def noting(self: Trainer) -> None:
        saved.append((self.state.step, self.state.nonfinite_streak))
        save(self)

    monkeypatch.setattr(Trainer, "_save", noting)
    monkeypatch.setattr("nextword.commands.pretrain.next_word", poisoned(shards, [4, 5]))
    pretrain(tmp_path / "run", shards, steps=10, save_every=5)
    assert saved == [(7, 0), (10, 0)], "what was due at step 5 has waited"
    assert not (tmp_path / "run" / "detours.jsonl").exists()
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("skipped")] == [5, 6]
    names = Corpus.open(shards).document_names(windows(shards).token_spans(4))
    messages = {line["step"]: line["message"] for line in lines if "message" in line}
    assert messages[5].endswith(f"In its batch: {', '.join(names[:3])} and {len(names) - 3} more")


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers this signal otherwise")
def test_a_signal_in_doubt_saves_nothing_and_says_so(shards, tmp_path, monkeypatch):
    def stopping(loss: LossTerm) -> LossTerm:
        os.kill(os.getpid(), signal.SIGTERM)
        return infinite(loss)

    monkeypatch.setattr("nextword.commands.pretrain.next_word", poisoned(shards, [12], stopping))
    with pytest.raises(RunInterruptedError, match=r"step 13, .* the last checkpoint stands.*--resume"):
        pretrain(tmp_path / "run", shards)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000010"]


def test_what_stays_bad_after_three_detours_ends_the_run(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nextword.commands.pretrain.next_word", poisoned(shards, range(22, 80)))
    with pytest.raises(
        TrainingDivergedError, match=r"not a finite number in 5 steps in a row, the last of them step 27\."
    ):
        nextword.pretrain(
            shards, tmp_path / "run", steps=60, model=MODEL, training=TRAINING, seed=SEED, console=Console()
        )
    ranges = [(made.begin, made.end) for made in read_skipped_ranges(tmp_path / "run" / "detours.jsonl").entries]
    assert ranges == [(22, 27), (27, 32), (32, 37)]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000010", "step-00000020"]
    assert set(nextword.verify_tree(tmp_path / "run").values()) >= {"checkpoint"}
    assert capsys.readouterr().err.count("The run goes back to step 20") == 3


# ---------------------------------------------------------------- the clock


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), max_size=6), st.integers(0, 100))
def test_a_pace_that_is_cut_back_is_as_it_was(changes, back):
    pace, step = StepSchedule([StepBudgetDecision(0, 50)]), 0
    for ahead, more in changes:
        step += ahead
        if step >= pace.total_steps:
            break
        pace.update(StepBudgetDecision(step, step + more))
    kept = StepSchedule([decision for decision in pace.decisions if decision.step <= back])
    pace.truncate_metrics(back)
    assert (pace.decisions, pace.start_progress) == (kept.decisions, kept.start_progress)


def test_the_clock_goes_on_after_a_turn_and_keeps_to_its_budget(tmp_path):
    """Half of the time is spent on steps that are undone: what is left is decided anew at once."""
    clock, pace = (
        StepBudgetDecision(10.0, tmp_path / "decisions.jsonl", started=-1.0, now=lambda: 0.0),
        StepSchedule([]),
    )
    clock.update(pace, 0, 0.01)
    for step, elapsed in ((200, 3.5), (450, 5.0)):
        clock.started, clock.next_update_time = -elapsed, 0.0
        clock.update(pace, step, 0.01)
    assert [decision.step for decision in pace.decisions] == [0, 200, 450]
    clock.update(pace, 250, 0.01)
    assert len(pace.decisions) == 3, "before its own last decision a clock is silent"
    pace.truncate_metrics(250)
    clock.reset(pace)
    assert read_decisions(clock.log) == pace.decisions
    clock.update(pace, 250, 0.01)
    assert [decision.step for decision in pace.decisions] == [0, 200, 250]
    assert pace.total_steps == pytest.approx(250 + 500, abs=60)
    assert read_decisions(clock.log) == pace.decisions


# ---------------------------------------------------------------- two processes


@pytest.mark.parametrize("moment", ["never", "saving"])
def test_two_processes_turn_back_together(astray, shards, tmp_path, moment):
    """The weights are shared by then; the same batches are left out as by one, and the model is the same within rounding.
    Also where neither has written its part of the checkpoint yet."""
    run = tmp_path / "run"
    process = start(tmp_path / "program.py", run, shards, moment, world=2)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    ours, longest_held_out = (read_skipped_ranges(r / "detours.jsonl").entries for r in (run, astray))
    assert [(d.begin, d.end, d.back, d.documents) for d in ours] == [
        (d.begin, d.end, d.back, d.documents) for d in theirs
    ]
    losses = [[line["loss"] for line in read_jsonl(r / "metrics.jsonl") if "loss" in line] for r in (run, astray)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
