"""One step, and the loop: equal to a plain loop, whatever the micro-batch, and never a weight that is no number."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nextword.common.errors import CorruptFileError, TrainingDivergedError
from nextword.data.dataset import IGNORE_INDEX, Batch, InMemoryTokens, TokenDataset
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.training import losses as loss_functions
from nextword.training.losses import DeviceBatch, causal_lm_loss
from nextword.training.optimizer import Optimizer, lr_multiplier
from nextword.training.step import (
    StepSettings,
    TrainState,
    build_loss_module,
    fit_micro_batch_rows,
    should_compile,
    time_step,
    training_steps,
)
from nextword.training.step_budget import StepBudgetDecision, StepSchedule, TimeBudgetController, read_decisions


def text_like(length: int = 3000) -> InMemoryTokens:
    """Numbers with something to learn: each follows from the one before, most of the time."""
    rng = np.random.default_rng(0)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append((3 * tokens[-1] + 1) % 40 if rng.random() < 0.8 else int(rng.integers(40)))
    return InMemoryTokens(np.asarray(tokens))


def setup(kind: Any = "adamw", preset="gpt2", rows=6, lr=3e-3, **overrides):
    torch.manual_seed(0)
    config = build_config(
        preset, "tiny", **{"vocab_size": 40, "n_layers": 2, "d_model": 32, "context_length": 16, **overrides}
    )
    model = GPT(config)
    state = TrainState(model, Optimizer(model, kind=kind, lr=lr))
    dataset = TokenDataset(text_like(), 16, rows, seed=4)
    step_module, _ = build_loss_module(model, causal_lm_loss, "plain")
    return state, dataset, step_module


def run(n: int, micro: int = 2**30, **options):
    state, dataset, step_module = setup(**options)
    pace = StepSchedule([StepBudgetDecision(0, n)])
    losses = [m.loss for m in training_steps(state, dataset, step_module, StepSettings(micro_batch_rows=micro), pace)]
    return losses, state


def test_the_loop_is_a_plain_loop():
    """Against torch alone: the mean cross entropy, clipping, AdamW with decay on matrices, a cosine, twelve steps."""
    state, dataset, step_module = setup()
    torch.manual_seed(0)
    model = GPT(state.model.config)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.99)
    )
    pace = StepSchedule([StepBudgetDecision(0, 12)])
    for step, metrics in enumerate(training_steps(state, dataset, step_module, StepSettings(warmup=0.25), pace)):
        batch = dataset.batch(step)
        logits = model.unembed(model(torch.from_numpy(batch.tokens)))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = metrics.lr
        optimizer.step()
        assert metrics.loss == pytest.approx(loss.item(), abs=1e-4)
        assert metrics.gradient_norm == pytest.approx(norm.item(), rel=1e-3)
        assert metrics.lr == pytest.approx(3e-3 * lr_multiplier((step + 1) / 12, "cosine", 0.25, 0.1))
        assert metrics.step == step + 1
    assert state.step == 12
    for ours, theirs in zip(state.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_model_learns(kind):
    losses, _ = run(150, kind=kind, lr=6e-3, preset="modern")
    assert losses[0] == pytest.approx(math.log(40), abs=0.15)
    assert np.mean(losses[-10:]) < 2.2


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_micro_batch_changes_the_result_by_rounding_at_most(micro, dropout):
    whole, one = run(10, dropout=dropout)
    parts, other = run(10, micro=micro, dropout=dropout)
    assert parts == pytest.approx(whole, abs=2e-5)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_bfloat16_products_keep_float32_weights():
    """What a GPU does, done on the CPU: the same losses within bfloat16's three digits, and weights that stay float32."""
    state, dataset, step_module = setup()
    pace = StepSchedule([StepBudgetDecision(0, 10)])
    losses = [m.loss for m in training_steps(state, dataset, step_module, StepSettings(bf16=True), pace)]
    assert losses == pytest.approx(run(10)[0], rel=5e-3)
    assert losses != run(10)[0]
    assert all(p.dtype == torch.float32 for p in state.model.parameters())
    assert all(t.dtype == torch.float32 for t in state.optimizer.state_tensors().values())


def test_a_run_is_repeatable_bit_for_bit():
    first, one = run(8, dropout=0.1, kind="muon")
    second, other = run(8, dropout=0.1, kind="muon")
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_logits_in_pieces_are_the_whole(monkeypatch):
    """A large vocabulary goes piece by piece; loss and gradients stay the same."""
    torch.manual_seed(0)
    hidden, matrix = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (50,))
    targets[::7] = IGNORE_INDEX
    whole = loss_functions.token_nll(hidden, matrix, targets).sum()
    gradients = torch.autograd.grad(whole, (hidden, matrix))
    monkeypatch.setattr(loss_functions, "LOGIT_BYTES", 4 * 30 * 8)
    pieces = loss_functions.token_nll(hidden, matrix, targets).sum()
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(pieces, (hidden, matrix)), strict=True):
        torch.testing.assert_close(a, b)


def test_targets_that_are_not_there_do_not_count():
    model = GPT(build_config("gpt2", "tiny", vocab_size=40, d_model=32, context_length=16))
    tokens = torch.randint(0, 40, (2, 16))
    targets = torch.randint(0, 40, (2, 16))
    targets[1, 5:] = IGNORE_INDEX
    loss = causal_lm_loss(model, DeviceBatch(tokens, targets, None))["next_word"]
    alone = causal_lm_loss(model, DeviceBatch(tokens[1:, :5], targets[1:, :5], None))["next_word"]
    first = causal_lm_loss(model, DeviceBatch(tokens[:1], targets[:1], None))["next_word"]
    assert loss.total.item() == pytest.approx(alone.total.item() + first.total.item(), rel=1e-5)


# ---------------------------------------------------------------- losses that are no number


class Poisoned:
    """Data whose given steps drive the model to a loss that is no number."""

    def __init__(self, dataset, model, bad):
        self.dataset, self.model, self.nonfinite_streak = dataset, model, bad
        self.keepalive = None

    @property
    def longest(self) -> int:
        return self.dataset.longest_passage_tokens

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        weight = self.model.token_embedding.weight
        if self.keepalive is not None:  # mend it after the bad step
            weight.data.copy_(self.keepalive)
            self.keepalive = None
        if step in self.nonfinite_streak:
            self.keepalive = weight.detach().clone()
            weight.data[:] = math.inf
        return self.dataset.batch(step, rank, world)


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    state, dataset, step_module = setup(kind="muon", preset="modern")
    poisoned = Poisoned(dataset, state.model, bad={3, 4})
    before = None
    for metrics in training_steps(
        state, poisoned, step_module, StepSettings(), StepSchedule([StepBudgetDecision(0, 8)])
    ):
        assert metrics.skipped == (metrics.step - 1 in {3, 4})
        if metrics.step == 3:
            before = [p.detach().clone() for p in state.optimizer.state_tensors().values()]
        if metrics.step == 5:
            assert before is not None
            after = state.optimizer.state_tensors().values()
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    poisoned.batch(0)
    assert all(p.isfinite().all() for p in state.model.parameters())


def test_a_run_that_stays_bad_ends():
    state, dataset, step_module = setup()
    poisoned = Poisoned(dataset, state.model, bad=set(range(2, 100)))
    with pytest.raises(TrainingDivergedError, match=r"5 steps in a row.*--training\.lr"):
        list(training_steps(state, poisoned, step_module, StepSettings(), StepSchedule([StepBudgetDecision(0, 50)])))
    assert state.step == 7


# ---------------------------------------------------------------- pace and clock


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), max_size=6))
@settings(deadline=None)
def test_progress_rises_to_one_whatever_the_clock_decides(changes):
    pace, step = StepSchedule([StepBudgetDecision(0, 50)]), 0
    for ahead, more in changes:
        step += ahead
        if step >= pace.total_steps:
            break
        pace.update(StepBudgetDecision(step, step + more))
    seen = [pace.progress(i) for i in range(pace.total_steps)]
    assert all(0 < a <= b <= 1 for a, b in itertools.pairwise(seen))
    assert seen[-1] == 1.0
    assert all(p < 1 for p in seen[:-1])


def test_a_decision_leaves_the_past_as_it_is():
    pace = StepSchedule([StepBudgetDecision(0, 100)])
    before = [pace.progress(i) for i in range(40)]
    pace.update(StepBudgetDecision(40, 60))
    assert [pace.progress(i) for i in range(40)] == before
    assert pace.progress(40) == pytest.approx(0.4 + 0.6 / 20)
    with pytest.raises(ValueError, match="cannot change"):
        pace.update(StepBudgetDecision(39, 80))
    with pytest.raises(ValueError, match="cannot end before"):
        pace.update(StepBudgetDecision(50, 50))


def test_the_clock_ends_near_its_budget_and_a_replay_is_exact(tmp_path):
    """A machine that becomes three times slower half-way: the run ends in time, and its log replays to the same steps."""
    log = tmp_path / "decisions.jsonl"
    time = 0.0
    clock, pace = TimeBudgetController(2.0, log, started=0.0, now=lambda: time), StepSchedule([])
    clock.update(pace, 0, 0.002)
    step, progress = 0, []
    while step < pace.total_steps:
        time += 0.002 if step < 300 else 0.006
        progress.append(pace.progress(step))
        step += 1
        clock.next_update_time = min(clock.next_update_time, 0.0)
        if step % 25 == 0:
            clock.update(pace, step, 0.0023 if step < 300 else 0.0065)
    assert time == pytest.approx(2.0, abs=0.1)
    assert len(read_decisions(log)) > 3

    again = StepSchedule(read_decisions(log))
    assert [again.progress(i) for i in range(step)] == progress
    assert again.total_steps == step
    # Another clock on the same log leaves what is decided alone, however late it is.
    TimeBudgetController(2.0, log, started=-100.0, now=lambda: time).update(again, again.decisions[-1].step - 1, 1.0)
    assert again.total_steps == step


def test_a_spent_budget_ends_at_once_and_a_bad_first_guess_still_trains(tmp_path):
    """Steps that take longer than there is time for; then a first guess of a step's time that is 1,000 times too long."""
    state, dataset, step_module = setup()
    clock = TimeBudgetController(5.0, tmp_path / "spent.jsonl", started=-4.9, now=lambda: 0.0)
    done = list(
        training_steps(
            state,
            dataset,
            step_module,
            StepSettings(),
            StepSchedule([StepBudgetDecision(0, 50)]),
            clock,
            seconds_per_step=9.0,
        )
    )
    assert len(done) == 1, "the one step that every decision leaves"

    state, dataset, step_module = setup()
    time = itertools.count(0, 0.01).__next__  # it goes on each time that it is read
    clock = TimeBudgetController(2.0, tmp_path / "slow.jsonl", started=0.0, now=time)
    done = list(
        training_steps(
            state, dataset, step_module, StepSettings(), StepSchedule([]), clock, seconds_per_step=10.0, now=time
        )
    )
    assert len(done) > 60
    assert done[10].lr > 0
    assert done[-1].progress == 1.0


def test_a_broken_log_is_named(tmp_path):
    (tmp_path / "decisions.jsonl").write_text('{"step": 1, "colour": 2}\n')
    with pytest.raises(CorruptFileError, match=r"decisions\.jsonl: not a log"):
        read_decisions(tmp_path / "decisions.jsonl")


# ---------------------------------------------------------------- what a run fixes at its start


def test_the_micro_batch_fits_itself_to_memory(monkeypatch):
    state, dataset, step_module = setup(rows=12)
    settings_ = StepSettings()
    assert fit_micro_batch_rows(step_module, dataset, settings_) == 12
    rng = torch.get_rng_state()
    before = [p.detach().clone() for p in state.model.parameters()]
    monkeypatch.setattr("nextword.training.step.available_memory", lambda device: 3_000_000)
    fitted = fit_micro_batch_rows(step_module, dataset, settings_)
    assert 1 <= fitted < 12
    monkeypatch.setattr("nextword.training.step.available_memory", lambda device: 0)
    assert fit_micro_batch_rows(step_module, dataset, settings_) == 1
    assert time_step(state, step_module, dataset, settings_) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert all(p.grad is None for p in state.model.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_compiling_is_refused_in_words(monkeypatch):
    cpu = torch.device("cpu")
    assert should_compile(cpu, 60)[0] is False
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C++ compiler" in should_compile(cpu, 1e6)[1]
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    assert should_compile(cpu, 1e6)[0] is True
