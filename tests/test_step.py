"""The training step and the loop: equal to a plain PyTorch loop, for any micro-batch, and skipped if a loss is not finite."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nextword.common.errors import CorruptFileError
from nextword.data.dataset import IGNORE_INDEX, Batch, InMemoryTokens, TokenDataset
from nextword.model.config import build_config
from nextword.model.cross_entropy import token_nll
from nextword.model.gpt import GPT
from nextword.training import step
from nextword.training.config import TrainingConfig
from nextword.training.launch import should_compile
from nextword.training.losses import DeviceBatch, LossModule, causal_lm_loss
from nextword.training.optimizer import Optimizer, lr_multiplier
from nextword.training.step import (
    StepMetrics,
    StepSettings,
    TrainState,
    fit_micro_batch_rows,
    time_step,
    train_step,
)
from nextword.training.step_budget import StepBudgetDecision, StepSchedule, TimeBudgetController, read_decisions


def learnable_tokens(length: int = 3000) -> InMemoryTokens:
    """Tokens that mostly follow from the one before."""
    rng = np.random.default_rng(0)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append((3 * tokens[-1] + 1) % 40 if rng.random() < 0.8 else int(rng.integers(40)))
    return InMemoryTokens(np.asarray(tokens))


class Training:
    """A small model with optimizer, dataset and loss."""

    def __init__(
        self,
        kind: Any = "adamw",
        preset: str = "gpt2",
        rows: int = 6,
        lr: float = 3e-3,
        dropout: float = 0.0,
        warmup: float = 0.05,
    ):
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "n_layers": 2, "d_model": 32, "context_length": 16}
        self.model = GPT(build_config(preset, "tiny", dropout=dropout, **sizes))
        self.config = TrainingConfig(optimizer=kind, lr=lr, schedule="cosine", warmup=warmup, final_lr=0.1)
        self.state = TrainState(self.model, Optimizer(self.model, self.config))
        self.dataset: Any = TokenDataset(learnable_tokens(), 16, rows, seed=4)
        self.loss_module = LossModule(self.model, causal_lm_loss)

    def iter_steps(self, num_steps: int, **settings: Any) -> Iterator[StepMetrics]:
        schedule = StepSchedule([StepBudgetDecision(0, num_steps)])
        while self.state.step < num_steps:
            batch, progress = self.dataset.batch(self.state.step), schedule.progress(self.state.step)
            yield train_step(self.state, self.loss_module, batch, StepSettings(self.config, **settings), progress)

    def steps(self, num_steps: int, **settings: Any) -> list[StepMetrics]:
        return list(self.iter_steps(num_steps, **settings))

    def losses(self, num_steps: int, **settings: Any) -> list[float]:
        return [metrics.loss for metrics in self.steps(num_steps, **settings)]


def test_the_loop_is_a_plain_pytorch_loop():
    """Mean cross entropy, clipping, AdamW with weight decay on matrices, a cosine schedule, twelve steps."""
    training = Training(warmup=0.25)
    torch.manual_seed(0)
    model = GPT(training.model.config)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99))
    for index, metrics in enumerate(training.steps(12)):
        batch = training.dataset.batch(index)
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
        assert metrics.lr == pytest.approx(3e-3 * lr_multiplier((index + 1) / 12, "cosine", 0.25, 0.1))
        assert metrics.step == index + 1
    assert training.state.step == 12
    for ours, expected in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_model_learns(kind):
    losses = Training(kind=kind, lr=6e-3, preset="modern").losses(150)
    assert losses[0] == pytest.approx(math.log(40), abs=0.15)
    assert np.mean(losses[-10:]) < 2.2


@pytest.mark.parametrize("micro_batch_rows", [1, 4])
def test_gradient_accumulation_changes_the_result_by_rounding_only(micro_batch_rows):
    whole, parts = Training(dropout=0.2), Training(dropout=0.2)
    assert parts.losses(10, micro_batch_rows=micro_batch_rows) == pytest.approx(whole.losses(10), abs=2e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_mixed_precision_keeps_float32_weights():
    """bfloat16 products, here on the CPU: the same losses within three digits, and weights and optimizer in float32."""
    training, expected = Training(), Training().losses(10)
    losses = training.losses(10, bf16=True)
    assert losses == pytest.approx(expected, rel=5e-3)
    assert losses != expected
    tensors = [*training.model.parameters(), *training.state.optimizer.state_tensors().values()]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)


def test_training_is_reproducible_bit_for_bit():
    first, second = Training(dropout=0.1, kind="muon"), Training(dropout=0.1, kind="muon")
    assert first.losses(8) == second.losses(8)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_logits_in_chunks_have_the_same_loss_and_gradients():
    torch.manual_seed(0)
    hidden, matrix = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (50,))
    targets[::7] = IGNORE_INDEX
    whole = token_nll(hidden, matrix, targets).sum()
    gradients = torch.autograd.grad(whole, (hidden, matrix))
    chunked = token_nll(hidden, matrix, targets, max_logits=30 * 8).sum()
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(chunked, (hidden, matrix)), strict=True):
        torch.testing.assert_close(a, b)


def test_ignored_targets_have_no_loss():
    model = GPT(build_config("gpt2", "tiny", vocab_size=40, d_model=32, context_length=16))
    tokens, targets = torch.randint(0, 40, (2, 2, 16))
    targets[1, 5:] = IGNORE_INDEX

    def loss(*rows_and_length: slice) -> float:
        return causal_lm_loss(model, DeviceBatch(tokens[rows_and_length], targets[rows_and_length]))[
            "next_word"
        ].total.item()

    assert loss(slice(2)) == pytest.approx(loss(slice(1)) + loss(slice(1, 2), slice(5)), rel=1e-5)


# ---------------------------------------------------------------- losses that are not finite


class PoisonedDataset:
    """At some steps an infinite weight makes the loss not finite."""

    def __init__(self, training: Training, poisoned_steps: set[int]):
        self.dataset, self.weight = training.dataset, training.model.token_embedding.weight
        self.poisoned_steps, self.saved_weight = poisoned_steps, None
        self.max_length = training.dataset.max_length

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        if self.saved_weight is not None:
            self.weight.data.copy_(self.saved_weight)
            self.saved_weight = None
        if step in self.poisoned_steps:
            self.saved_weight = self.weight.detach().clone()
            self.weight.data[:] = math.inf
        return self.dataset.batch(step, rank, world_size)


def test_a_step_with_a_loss_that_is_not_finite_is_skipped():
    training = Training(kind="muon", preset="modern")
    training.dataset = PoisonedDataset(training, {3, 4})
    snapshots = {}
    for metrics in training.iter_steps(8):
        assert metrics.skipped == (metrics.step - 1 in {3, 4})
        snapshots[metrics.step] = [t.clone() for t in training.state.optimizer.state_tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(snapshots[3], snapshots[5], strict=True))
    training.dataset.batch(0)
    assert all(p.isfinite().all() for p in training.model.parameters())


# ---------------------------------------------------------------- schedule and time budget


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), max_size=6))
def test_progress_rises_to_one_for_any_decisions(changes):
    schedule, step = StepSchedule([StepBudgetDecision(0, 50)]), 0
    for ahead, more in changes:
        step += ahead
        if step >= schedule.total_steps:
            break
        schedule.update(StepBudgetDecision(step, step + more))
    progress = [schedule.progress(i) for i in range(schedule.total_steps)]
    assert all(0 < a <= b <= 1 for a, b in itertools.pairwise(progress))
    assert progress[-1] == 1.0
    assert all(p < 1 for p in progress[:-1])


def test_a_decision_does_not_change_the_past():
    schedule = StepSchedule([StepBudgetDecision(0, 100)])
    before = [schedule.progress(i) for i in range(40)]
    schedule.update(StepBudgetDecision(40, 60))
    assert [schedule.progress(i) for i in range(40)] == before
    assert schedule.progress(40) == pytest.approx(0.4 + 0.6 / 20)
    with pytest.raises(ValueError, match="cannot change"):
        schedule.update(StepBudgetDecision(39, 80))
    with pytest.raises(ValueError, match="cannot end before"):
        schedule.update(StepBudgetDecision(50, 50))


def test_a_time_budget_is_kept_and_its_log_replays_exactly(tmp_path):
    """The machine becomes three times slower half-way: the run ends in time, and its log gives the same schedule again."""
    log = tmp_path / "decisions.jsonl"
    time = 0.0
    controller, schedule = TimeBudgetController(2.0, log, started=0.0, now=lambda: time), StepSchedule()
    controller.update(schedule, 0, 0.002)
    step, progress = 0, []
    while step < schedule.total_steps:
        time += 0.002 if step < 300 else 0.006
        progress.append(schedule.progress(step))
        step += 1
        controller.next_update_time = min(controller.next_update_time, 0.0)
        if step % 25 == 0:
            controller.update(schedule, step, 0.0023 if step < 300 else 0.0065)
    assert time == pytest.approx(2.0, abs=0.1)
    assert len(read_decisions(log)) > 3

    replayed = StepSchedule(read_decisions(log))
    assert [replayed.progress(i) for i in range(step)] == progress
    assert replayed.total_steps == step
    # A late controller on the same log does not change what is decided.
    late = TimeBudgetController(2.0, log, started=-100.0, now=lambda: time)
    late.update(replayed, replayed.decisions[-1].step - 1, 1.0)
    assert replayed.total_steps == step


def test_a_used_up_budget_ends_after_a_step(tmp_path):
    schedule = StepSchedule([StepBudgetDecision(0, 50)])
    controller = TimeBudgetController(5.0, tmp_path / "log.jsonl", started=-4.9, now=lambda: 0.0)
    controller.update(schedule, 0, 9.0)
    assert schedule.total_steps == 1


def test_a_wrong_first_estimate_is_corrected(tmp_path):
    clock = itertools.count(0, 0.01).__next__  # advances with every reading
    controller, schedule = TimeBudgetController(2.0, tmp_path / "log.jsonl", started=0.0, now=clock), StepSchedule()
    step = 0
    controller.update(schedule, step, 10.0)  # 1,000 times too long
    while step + 1 < schedule.total_steps:
        step += 1
        controller.update(schedule, step, 10.0 if step < 4 else 0.01)
    assert step > 60


def test_a_broken_log_of_decisions_is_named(tmp_path):
    log: Path = tmp_path / "decisions.jsonl"
    log.write_text('{"step": 1, "colour": 2}\n')
    with pytest.raises(CorruptFileError, match=r"decisions\.jsonl line 1: Object missing required field"):
        read_decisions(log)


# ---------------------------------------------------------------- measured before the first step


def test_the_micro_batch_fits_in_memory(monkeypatch):
    training = Training(rows=12)
    settings = StepSettings(training.config)
    before, rng = [p.detach().clone() for p in training.model.parameters()], torch.get_rng_state()

    def fitted() -> int:
        return fit_micro_batch_rows(training.loss_module, training.dataset, settings)

    assert fitted() == 12
    monkeypatch.setattr(step, "available_memory", lambda device: 3_000_000)
    assert 1 <= fitted() < 12
    monkeypatch.setattr(step, "available_memory", lambda device: 0)
    assert fitted() == 1
    assert time_step(training.state, training.loss_module, training.dataset, settings) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
    assert all(p.grad is None for p in training.model.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_should_compile_gives_a_reason(monkeypatch):
    cpu = torch.device("cpu")
    assert should_compile(cpu, 60)[0] is False
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C++ compiler" in should_compile(cpu, 1e6)[1]
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    assert should_compile(cpu, 1e6)[0] is True
