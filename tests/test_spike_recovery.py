"""Rollbacks after non-finite losses and loss spikes, with real kills, and the same bits at the end."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nextword
import nextword.planning.planner  # imported before its loss is replaced
import runs
from nextword.common.console import Console
from nextword.common.errors import CorruptFileError, TrainingDivergedError
from nextword.common.fs import read_jsonl, read_records, write_records
from nextword.common.run_dir import RunInterruptedError
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenDataset
from nextword.training import checkpoint
from nextword.training.losses import DeviceBatch, LossTerm, causal_lm_loss
from nextword.training.spike_recovery import (
    LOSS_WINDOW,
    SPIKE_STREAK,
    LossSpikeDetector,
    SkippedRange,
    attempts_near,
    batch_index,
)
from nextword.training.step_budget import StepBudgetDecision, StepSchedule, TimeBudgetController, read_decisions
from nextword.training.trainer import Trainer
from processes import PATIENCE
from runs import state_hashes

MODEL = {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 16, "dropout": 0.1}
TRAINING: dict[str, Any] = {"batch_tokens": 128, "evaluations": 3, "save_every": 10}
ROWS, SEED, STEPS = 8, 3, 45
BAD_BATCHES = range(22, 27)
LOSS = "nextword.training.losses.causal_lm_loss"


def windows(shards: Path) -> TokenDataset:
    return TokenDataset(Corpus.open(shards).tokens("train"), MODEL["context_length"], ROWS, SEED)


def infinite(loss: LossTerm) -> LossTerm:
    return LossTerm(loss.total * math.inf, loss.weight)


def tripled(loss: LossTerm) -> LossTerm:
    return LossTerm(3 * loss.total, loss.weight)


def poisoned(shards: Path, indices: Iterable[int], change: Callable[[LossTerm], LossTerm] = infinite) -> Any:
    """The pre-training loss, changed for the windows of some batches."""
    data = windows(shards)
    bad = {row.tobytes() for index in indices for row in data.batch(index).tokens}

    def loss_fn(model: Any, batch: DeviceBatch, kernels: bool) -> dict[str, LossTerm]:
        losses = causal_lm_loss(model, batch, kernels)
        if any(row.tobytes() in bad for row in batch.tokens.numpy()):
            return {name: change(loss) for name, loss in losses.items()}
        return losses

    return loss_fn


def pretrain(run: Path, shards: Path, steps: int = STEPS, **training: Any) -> Any:
    merged = {**TRAINING, **training}
    return nextword.pretrain(shards, run, steps=steps, model=MODEL, training=merged, seed=SEED, resume=True)


def delay_checkpoint(replace: Callable[[Any, str, Any], None]) -> list[int]:
    """Let the checkpoint of step 20 last until the run rolls back. Returns the status of the checkpointer at each rollback."""
    rolling_back, statuses = threading.Event(), []
    roll_back, write = Trainer._roll_back, checkpoint.write_safetensors

    def write_late(path: Path, *arguments: Any) -> Any:
        if path.parent.name == ".step-00000020.partial":
            assert rolling_back.wait(PATIENCE)
            time.sleep(0.2)  # longer than the search for the latest checkpoint
        return write(path, *arguments)

    def noted(self: Trainer, checkpointer: checkpoint.AsyncCheckpointer, is_spike: bool) -> bool:
        statuses.append(checkpointer.status)
        rolling_back.set()
        return roll_back(self, checkpointer, is_spike)

    replace(checkpoint, "write_safetensors", write_late)
    replace(Trainer, "_roll_back", noted)
    return statuses


def replay(run: Path, copy: Path) -> None:
    """Repeat a run from run.json and detours.jsonl alone."""
    copy.mkdir()
    for name in ("run.json", "detours.jsonl"):
        shutil.copy(run / name, copy)
    nextword.pretrain(out=copy, resume=True)


def records(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run / "metrics.jsonl") if key in record]


def skipped_in(run: Path) -> list[SkippedRange]:
    return read_records(run / "detours.jsonl", SkippedRange)


@pytest.fixture(scope="module")
def rolled_back(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("rolled-back") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOSS, poisoned(shards, BAD_BATCHES))
        pretrain(run, shards)
    return run


# ---------------------------------------------------------------- skipped ranges


def skipped_range(begin: int, end: int) -> SkippedRange:
    return SkippedRange(1, 1, begin, end, back=0, reason="spike", forgets=False, seconds=0.0, documents=[])


RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda r: skipped_range(r[0], r[0] + r[1])), max_size=6
)


@given(RANGES)
def test_steps_take_the_batches_that_are_not_skipped(entries):
    remaining = [i for i in range(300) if not any(entry.begin <= i < entry.end for entry in entries)]
    assert [batch_index(entries, step) for step in range(100)] == remaining[:100]


def test_attempts_at_one_place_are_counted():
    entries = [skipped_range(10, 15), skipped_range(500, 505), skipped_range(505, 510), skipped_range(560, 565)]
    counts = [attempts_near(entries[:n], entries[n - 1].end) for n in (1, 2, 3, 4)]
    assert counts == [1, 1, 2, 3]
    assert attempts_near(entries, 565 + 100) == 0
    assert attempts_near(entries, 520) == 3, "before the end of the last range"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["first", "last", "begin", "end", "back", "reason", "forgets", "seconds", "documents"]


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(FIELDS, JUNK)) | JUNK, max_size=3))
@settings(max_examples=50)
def test_invalid_records_are_refused_by_line(tmp_path_factory, values):
    log = tmp_path_factory.getbasetemp() / "detours.jsonl"
    log.write_text("".join(json.dumps(value) + "\n" for value in values))
    try:
        ranges = read_records(log, SkippedRange)
    except CorruptFileError as error:
        assert "detours.jsonl line " in str(error)
        return
    write_records(log, map(asdict, ranges))
    assert read_records(log, SkippedRange) == ranges
    assert all(batch_index(ranges, step) >= step for step in range(20))


# ---------------------------------------------------------------- the spike detector


def noise(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [4 * math.exp(-i / 300) + rng.gauss(0, 0.15) for i in range(count)]


def test_noise_and_short_streaks_are_not_spikes():
    for seed in range(5):
        detector = LossSpikeDetector()
        for i, loss in enumerate(noise(600, seed)):
            detector.update(9.0 if i % 100 in (50, 51, 52, 53) else loss)
            assert not detector.is_spiking


def test_a_spike_is_detected_once_and_again_on_resume():
    losses = [*noise(150, 0), *[9.0] * 30, *noise(20, 1)]
    detector, spikes = LossSpikeDetector(), []
    for i, loss in enumerate(losses):
        detector.update(loss)
        spikes += [i] if detector.is_spiking else []
        assert detector.is_suspicious == (150 <= i < 154)
        resumed = LossSpikeDetector(losses[: i + 1])
        assert (resumed.high_streak, list(resumed.recent_losses)) == (
            detector.high_streak,
            list(detector.recent_losses),
        )
    assert spikes == [150 + SPIKE_STREAK - 1]
    assert not LossSpikeDetector([*noise(LOSS_WINDOW - 1, 0), 90.0]).high_streak, "too few losses to compare with"


# ---------------------------------------------------------------- names of documents


def test_tokens_are_traced_to_their_documents(texts, tmp_path):
    """The text of each window is found in the documents that it is traced to."""
    table = tmp_path / "in" / "rows.jsonl"
    table.parent.mkdir()
    paths = sorted(texts.glob("*.txt"))
    table.write_text("".join(json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n" for path in paths[:20]))
    for path in paths[20:]:
        shutil.copy(path, table.parent)
    corpus = nextword.prepare(table.parent, tmp_path / "shards", vocab_size=300)
    tokens, eos_id = corpus.tokens("train"), corpus.tokenizer.eos_id
    contents = {f"rows.jsonl line {i}": path.read_text(encoding="utf-8") for i, path in enumerate(paths[:20], start=1)}
    contents |= {path.name: path.read_text(encoding="utf-8") for path in paths[20:]}
    rng = random.Random(0)
    for start in [0, len(tokens) - 40, *(rng.randrange(len(tokens) - 40) for _ in range(40))]:
        ids = tokens.read(start, 40).tolist()
        parts = [corpus.tokenizer.decode(part).strip("\ufffd") for part in split(ids, eos_id)]
        for name, part in zip(corpus.document_names([(start, 40)]), parts, strict=True):
            assert part in contents[name]


def split(ids: list[int], eos_id: int) -> list[list[int]]:
    """The ids of each document; one of which only the end token is in the window is empty."""
    parts: list[list[int]] = [[]]
    for i, token in enumerate(ids):
        if token != eos_id:
            parts[-1].append(token)
        elif i + 1 < len(ids):
            parts.append([])
    return parts


# ---------------------------------------------------------------- rollbacks


def test_a_run_skips_batches_with_an_infinite_loss(rolled_back, shards):
    [entry] = skipped_in(rolled_back)
    assert (entry.first, entry.last, entry.begin, entry.end, entry.back) == (23, 27, 22, 27, 20)
    assert entry.reason == "not finite"
    data, corpus = windows(shards), Corpus.open(shards)
    names = {name for i in BAD_BATCHES for name in corpus.document_names(data.token_spans(i))}
    assert set(entry.documents) == names
    steps = records(rolled_back)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(record["loss"]) and not record["skipped"] for record in steps)
    [message] = [record["message"] for record in records(rolled_back, "message")]
    assert entry.documents[0] in message
    assert "steps 23 to 27" in message
    assert (rolled_back / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}\n"
    assert "rolls back to step 20" in (rolled_back / "report.html").read_text(encoding="utf-8")


def test_a_rolled_back_run_equals_one_that_skips_the_batches_from_the_start(rolled_back, tmp_path):
    replay(rolled_back, tmp_path / "replayed")
    assert state_hashes(tmp_path / "replayed") == state_hashes(rolled_back)


def test_a_rollback_waits_for_the_checkpoint_being_written(rolled_back, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(LOSS, poisoned(shards, BAD_BATCHES))
    statuses = delay_checkpoint(monkeypatch.setattr)
    pretrain(tmp_path / "run", shards)
    assert statuses == [1], "the checkpoint was being written when the run rolled back"
    assert [entry.back for entry in skipped_in(tmp_path / "run")] == [20]
    assert state_hashes(tmp_path / "run") == state_hashes(rolled_back)


PROGRAM = """
import os, signal, sys
from pathlib import Path
import nextword.common.run_dir, nextword.reporting.charts, nextword.training.losses
from markupsafe import Markup
from test_spike_recovery import BAD_BATCHES, delay_checkpoint, poisoned, pretrain

run, shards, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
nextword.training.losses.causal_lm_loss = poisoned(shards, BAD_BATCHES)
nextword.reporting.charts.draw_svg = lambda *_: Markup("<svg></svg>")
RunDir = nextword.common.run_dir.RunDir

def killed_in_rollback(function):
    def wrapper(self, *args):
        if moment == "rollback" and self.skipped_ranges_path.exists():
            os.kill(os.getpid(), signal.SIGKILL)  # the skipped range is on disk, and nothing is undone yet
        return function(self, *args)
    return wrapper

def killed_after_rollback(function):
    def wrapper(self, record):
        if moment == "repeating" and self.skipped_ranges_path.exists() and record["step"] == 24:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(self, record)
    return wrapper

if moment == "saving":
    delay_checkpoint(setattr)
RunDir.truncate_metrics = killed_in_rollback(RunDir.truncate_metrics)
RunDir.append_metrics = killed_after_rollback(RunDir.append_metrics)
pretrain(run, shards)
"""


def start(program: Path, *arguments: str | Path, world_size: int = 1) -> "subprocess.Popen[str]":
    program.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{PROGRAM}")
    return runs.start(world_size, *arguments, program=[program])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(
    ("moment", "num_records"), [("rollback", 27), pytest.param("repeating", 23, marks=pytest.mark.needs("more time"))]
)
def test_killed_during_a_rollback_and_resumed_equals_uninterrupted(
    rolled_back, shards, tmp_path, monkeypatch, moment, num_records
):
    run = tmp_path / "run"
    process = start(tmp_path / "program.py", run, shards, moment)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, err
    assert len(skipped_in(run)) == 1
    assert len(records(run)) == num_records
    monkeypatch.setattr(LOSS, poisoned(shards, BAD_BATCHES))
    pretrain(run, shards)
    assert state_hashes(run) == state_hashes(rolled_back)


def test_without_a_checkpoint_the_run_continues_from_its_last_finite_step(shards, tmp_path, monkeypatch):
    run, replayed = tmp_path / "run", tmp_path / "replayed"
    monkeypatch.setattr(LOSS, poisoned(shards, range(3, 8)))
    pretrain(run, shards, steps=12, save_every=50)
    [entry] = skipped_in(run)
    assert (entry.back, entry.begin, entry.end) == (3, 3, 8)
    monkeypatch.undo()
    replay(run, replayed)
    assert state_hashes(replayed) == state_hashes(run)
    assert [record["tokens"] for record in records(replayed)] == [record["tokens"] for record in records(run)]


def test_a_spike_is_skipped_with_the_batches_before_it(shards, tmp_path, monkeypatch):
    """Without a checkpoint to go back to, it is only reported."""
    run, unsaved, replayed = tmp_path / "run", tmp_path / "unsaved", tmp_path / "replayed"
    monkeypatch.setattr(LOSS, poisoned(shards, range(118, 123), tripled))
    pretrain(run, shards, steps=130, save_every=50)
    [entry] = skipped_in(run)
    assert (entry.reason, entry.back, entry.begin, entry.end) == ("spike", 100, 113, 123)
    losses = [record["loss"] for record in records(run)]
    assert len(losses) == 130
    assert max(losses[100:]) < 1.5 * losses[100]
    pretrain(unsaved, shards, steps=130, save_every=1000)
    assert not (unsaved / "detours.jsonl").exists()
    assert any("no checkpoint to go back to" in record["message"] for record in records(unsaved, "message"))
    monkeypatch.undo()
    replay(run, replayed)
    assert state_hashes(replayed) == state_hashes(run)


# ---------------------------------------------------------------- what is not saved


def test_a_single_non_finite_step_is_skipped_reported_and_not_saved(shards, tmp_path, monkeypatch):
    saved: list[tuple[int, int]] = []
    save_async = checkpoint.AsyncCheckpointer.save_async

    def noted(self: Any, step: int, weights: Any, optimizer: Any, metadata: dict[str, Any]) -> None:
        saved.append((step, metadata["bad"]))
        save_async(self, step, weights, optimizer, metadata)

    monkeypatch.setattr(checkpoint.AsyncCheckpointer, "save_async", noted)
    monkeypatch.setattr(LOSS, poisoned(shards, [4, 5]))
    run = tmp_path / "run"
    pretrain(run, shards, steps=10, save_every=5)
    assert saved == [(7, 0), (10, 0)], "the checkpoint that was due at step 5 has waited"
    assert not (run / "detours.jsonl").exists()
    assert [record["step"] for record in records(run) if record["skipped"]] == [5, 6]
    names = Corpus.open(shards).document_names(windows(shards).token_spans(4))
    messages = {record["step"]: record["message"] for record in records(run, "message")}
    assert messages[5].endswith(f"In its batch: {', '.join(names[:3])} and {len(names) - 3} more")


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers this signal otherwise")
def test_a_signal_during_a_suspicious_loss_saves_nothing(shards, tmp_path, monkeypatch):
    def stopping(loss: LossTerm) -> LossTerm:
        os.kill(os.getpid(), signal.SIGTERM)
        return infinite(loss)

    monkeypatch.setattr(LOSS, poisoned(shards, [12], stopping))
    with pytest.raises(RunInterruptedError, match=r"step 13: .* no new checkpoint is saved.*--resume"):
        pretrain(tmp_path / "run", shards)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000010"]


def test_a_run_that_stays_non_finite_after_three_rollbacks_fails(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LOSS, poisoned(shards, range(22, 80)))
    run = tmp_path / "run"
    with pytest.raises(
        TrainingDivergedError, match=r"not a finite number in 5 steps in a row, the last of them step 27\."
    ):
        options = {"steps": 60, "model": MODEL, "training": TRAINING, "seed": SEED, "console": Console()}
        nextword.pretrain(shards, run, **options)
    assert [(entry.begin, entry.end) for entry in skipped_in(run)] == [(22, 27), (27, 32), (32, 37)]
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step-00000010", "step-00000020"]
    assert set(nextword.verify(run).whole.values()) >= {"checkpoint"}
    assert capsys.readouterr().err.count("The run rolls back to step 20") == 3


# ---------------------------------------------------------------- the time budget


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), max_size=6), st.integers(0, 100))
def test_a_rollback_restores_the_schedule(changes, back):
    schedule, step = StepSchedule([StepBudgetDecision(0, 50)]), 0
    for ahead, more in changes:
        step += ahead
        if step >= schedule.total_steps:
            break
        schedule.update(StepBudgetDecision(step, step + more))
    expected = StepSchedule([decision for decision in schedule.decisions if decision.step <= back])
    schedule.rollback(back)
    assert (schedule.decisions, schedule.start_progress) == (expected.decisions, expected.start_progress)


def test_the_time_budget_is_kept_after_a_rollback(tmp_path):
    """Half of the time is spent on steps that are undone: the rest is planned anew at once."""
    controller = TimeBudgetController(10.0, tmp_path / "decisions.jsonl", started=-1.0, now=lambda: 0.0)
    schedule = StepSchedule([])
    controller.update(schedule, 0, 0.01)
    for step, elapsed in ((200, 3.5), (450, 5.0)):
        controller.started, controller.next_update_time = -elapsed, 0.0
        controller.update(schedule, step, 0.01)
    assert [decision.step for decision in schedule.decisions] == [0, 200, 450]
    controller.update(schedule, 250, 0.01)
    assert len(schedule.decisions) == 3, "there is no decision before the last one"
    schedule.rollback(250)
    controller.reset(schedule)
    assert read_decisions(controller.log) == schedule.decisions
    controller.update(schedule, 250, 0.01)
    assert [decision.step for decision in schedule.decisions] == [0, 200, 250]
    assert schedule.total_steps == pytest.approx(250 + 500, abs=60)
    assert read_decisions(controller.log) == schedule.decisions


# ---------------------------------------------------------------- two processes


@pytest.mark.parametrize("moment", [pytest.param("never", marks=pytest.mark.needs("more time")), "saving"])
def test_two_processes_roll_back_together(rolled_back, shards, tmp_path, moment):
    """They skip the same batches as one process, and the losses are equal within rounding.

    Also if neither has written its part of the checkpoint yet.
    """
    run = tmp_path / "run"
    process = start(tmp_path / "program.py", run, shards, moment, world_size=2)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    skipped = [[(e.begin, e.end, e.back, e.documents) for e in skipped_in(r)] for r in (run, rolled_back)]
    assert skipped[0] == skipped[1]
    losses = [[record["loss"] for record in records(r)] for r in (run, rolled_back)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
