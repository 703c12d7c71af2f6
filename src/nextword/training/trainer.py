"""A run in progress, whatever it learns: its loop, its looks at held-out data, its checkpoints, its way back.

A subclass says what the model, the data and the objective are (`_build`), how held-out data is looked at (`look`) and how
the model is kept (`keep`); beginning, going on and finishing are stories of its own. Everything else is here once.
"""

import math
import time
from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nextword.common import fs
from nextword.common.console import Console, TrainingProgress
from nextword.common.energy import EnergyMeter
from nextword.common.run_dir import (
    RunDir,
    RunInterruptedError,
    catch_signals,
    open_tensorboard_writer,
    peak_memory_bytes,
)
from nextword.training.checkpoint import AsyncCheckpointer
from nextword.training.remote_sync import CheckpointUploader
from nextword.training.setup import TrainingSetup
from nextword.training.spike_recovery import RollbackManager
from nextword.training.step import MAX_NONFINITE_STEPS, StepMetrics, training_steps
from nextword.training.step_budget import (
    StepBudgetDecision,
    StepSchedule,
    TimeBudgetController,
    read_decisions,
)

SAMPLE_AT_VALIDATIONS = (1, 2, 4, 8, 12, 16, 20)  # of twenty evaluations, those after which the model writes something
REPORT_MODULE = "nextword.reporting.report"
FINALIZE_SECONDS = 2.5  # the report, the card and the last files


@dataclass(frozen=True)
class ValidationResult:
    """A look at held-out data: what decides which weights are kept (higher is better), and what is told of it."""

    score: float
    metrics: dict[str, Any]  # goes into metrics.jsonl as "validation"
    summary: str


@dataclass
class BestCheckpoint:
    """The best look so far; `since` counts the ones after it."""

    score: float | None = None
    step: int = 0
    since: int = 0


class Trainer(TrainingSetup):
    """One run in progress: begun or gone on with by its subclass, settled, then `train`, then `finish`."""

    now = staticmethod(time.time)  # reads the time of a run with a budget, in seconds
    detects_loss_spikes = False  # whether a loss far above the recent ones means that the run goes astray
    batch_tokens: int  # of a step, about; the subclass sets it
    checkpoint_uploader: CheckpointUploader | None = None  # where checkpoints are copied to, beyond this machine
    rollback_manager: RollbackManager
    checkpointer: AsyncCheckpointer
    last_finite_state: tuple[
        int, int, BestCheckpoint, bool
    ]  # step, tokens, best and stopped after the last step whose loss was a number

    def __init__(self, run_dir: RunDir, console: Console, device: torch.device, start_time: float):
        super().__init__(run_dir, console, device, start_time)
        self.energy_meter = EnergyMeter(device)
        self.best = BestCheckpoint()
        self.budget_controller: TimeBudgetController | None = None
        self.stopped_early = False
        self.tensorboard: Any = None  # TensorBoard's writer, where it is asked for

    # ------------------------------------------------------------ what a subclass says

    @abstractmethod
    def initialize(self, command: list[str], request: dict[str, Any]) -> None:
        """Decide once what the run fixes: `facts`, which `settle` completes and writes down."""

    @abstractmethod
    def resume(self) -> None:
        """Take everything from the run folder; `settle` then stands where its newest whole checkpoint stands."""

    @abstractmethod
    def finalize(self) -> dict[str, Any]:
        """Measure the kept weights; the result, written down with the card and the report."""

    @abstractmethod
    def validate(self, step_schedule: StepSchedule) -> ValidationResult | None:
        """The model as it stands, on held-out data; None where nothing is held out. The same data at each look."""

    @abstractmethod
    def save_best_model(self, metadata: dict[str, Any]) -> None:
        """Write the model as it stands to RUN/model."""

    @abstractmethod
    def log_sample(self, step: int) -> None:
        """Let the model show what it can, where it can write."""

    def estimate_finalize_seconds(self) -> float:
        """How long what follows the last step will take."""
        return FINALIZE_SECONDS

    def loss_to_bits_per_byte(self, loss: float) -> float | None:
        """A training loss in bits per byte of the text, where it means that."""
        return None

    @abstractmethod
    def documents_in_batch(self, batch_index: int) -> list[str]:
        """What the batch of an index is made of: a name for each text, by which a person finds it."""

    @abstractmethod
    def on_no_improvement(self, step: int, result: ValidationResult) -> None:
        """After a look that was not the best: a word to the person, where one is due."""

    # ------------------------------------------------------------ train

    def _restore_metadata(self, path: Path) -> dict[str, Any]:
        saved = super()._restore_metadata(path)
        self.best, self.stopped_early = BestCheckpoint(**saved["best"]), saved["stopped"]
        return saved

    def elapsed_seconds(self) -> float:
        """Wall time that the run has used, in all of its processes."""
        return self.now() - self.start_time + self.seconds_before_resume

    def build_step_schedule(self) -> StepSchedule:
        """The run's length: said beforehand, or the clock's decisions so far."""
        if self.target_steps is not None:
            return StepSchedule([StepBudgetDecision(0, self.target_steps)])
        assert self.budget_seconds is not None
        self.budget_controller = TimeBudgetController(
            self.budget_seconds,
            self.run_dir.decisions_path,
            started=self.start_time,
            seconds_before_resume=self.seconds_before_resume,
            ctx=self.world,
            now=self.now,
        )
        self.budget_controller.reserved_seconds = self.estimate_finalize_seconds()
        decisions = read_decisions(self.run_dir.decisions_path) if self.world.is_main else []
        decisions = self.world.broadcast_object([asdict(decision) for decision in decisions])
        return StepSchedule(StepBudgetDecision(**decision) for decision in decisions)

    def train(self, tensorboard: bool = False) -> None:
        """The loop: a step, its line, and now and then a look at held-out data, a sample, a checkpoint.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
            Diverged: see `steps` and `Course.turn`.
        """
        self.rollback_manager = RollbackManager(
            self.run_dir, self.console, self.world, self.detects_loss_spikes, self.documents_in_batch
        )
        self._apply_skipped_ranges()
        self.tensorboard = open_tensorboard_writer(self.run_dir.path) if tensorboard and self.world.is_main else None
        step_schedule = self.build_step_schedule()
        interval_start, interval_start_tokens = time.monotonic(), self.state.tokens
        with (
            catch_signals() as caught_signals,
            AsyncCheckpointer(self.run_dir.path, self.world, self.training.save_every) as self.checkpointer,
        ):
            if self.stopped_early:
                return
            step_iterator = training_steps(
                self.state, self.dataset, self.step_module, self.step_settings, step_schedule, self.budget_controller, self.seconds_per_step, self.world,
                self.rollback_manager.skipped_ranges.batch_index, self.now,
            )  # fmt: skip
            for metrics in step_iterator:
                rate = (self.state.tokens - interval_start_tokens) / max(1e-9, time.monotonic() - interval_start)
                self._log_step(metrics, rate)
                self._validate_if_due(metrics, step_schedule)
                is_last_step = metrics.progress >= 1 or self.stopped_early
                spike_detector, checkpointer = self.rollback_manager.spike_detector, self.checkpointer
                checkpoint_due, signal, spike, is_suspicious, stage = map(int, self.world.all_reduce_max([
                    checkpointer.should_save(metrics.step), caught_signals[0] if caught_signals else 0, spike_detector.is_spiking, spike_detector.is_suspicious or self.state.nonfinite_streak > 0,
                    checkpointer.status,
                ]))  # fmt: skip
                checkpointer.advance(stage)
                if self.checkpoint_uploader is not None:
                    self.checkpoint_uploader.maybe_upload(self.run_dir, checkpointer.last_committed)
                should_rollback = spike or self.state.nonfinite_streak >= MAX_NONFINITE_STEPS
                if should_rollback and self._rollback(step_schedule, bool(spike)):
                    interval_start, interval_start_tokens = time.monotonic(), self.state.tokens
                    continue
                if (checkpoint_due or is_last_step or signal) and not is_suspicious:  # what is in doubt is not saved
                    self._save_checkpoint()
                if is_last_step or signal:
                    checkpointer.wait()
                if signal and self.checkpoint_uploader is not None:
                    self.checkpoint_uploader.maybe_upload(self.run_dir, checkpointer.last_committed, force=True)
                if signal and not is_last_step:
                    checkpoint_note = (
                        "its loss is in doubt, so that the last checkpoint stands" if is_suspicious else "and saved"
                    )
                    raise RunInterruptedError(
                        f"stopped at step {metrics.step:,}, {checkpoint_note}. Go on with the same command and --resume",
                        signal,
                    )
                if self.stopped_early:
                    break
                if not self.state.nonfinite_streak:
                    self._record_finite_state()
                interval_start, interval_start_tokens = time.monotonic(), self.state.tokens

    def _rollback(self, step_schedule: StepSchedule, is_spike: bool) -> bool:
        """Undo the steps that went astray, and go past their batches from where the run stands then; False where it
        cannot be. Raises `Diverged` as `Course.turn`."""
        self.checkpointer.wait()  # what is under way may be what to go back to
        rollback = self.rollback_manager.plan_rollback(
            self.state, is_spike, self.last_finite_state[0], self.best.step, self.elapsed_seconds()
        )
        if rollback is None:
            return False
        path, step = rollback
        if path is None:
            self.state.step, self.state.tokens, self.best, self.stopped_early = self.last_finite_state
            self.state.nonfinite_streak = 0
        else:
            self._restore_weights(path)
            self._restore_metadata(path)
        self._apply_skipped_ranges()
        step_schedule.rollback(step)
        if self.budget_controller is not None:
            self.budget_controller.reset(step_schedule)
        self.run_dir.truncate_metrics(step)
        self.rollback_manager.resume()
        return True

    def _apply_skipped_ranges(self) -> None:
        """What those detours change that the state does not know of: weights that a spike may be in are no measure."""
        skipped_ranges = self.rollback_manager.skipped_ranges.entries
        if any(detour.forgets for detour in skipped_ranges[self.state.num_rollbacks :]):
            self.best = BestCheckpoint()
        self.state.num_rollbacks = len(skipped_ranges)
        self._record_finite_state()

    def _record_finite_state(self) -> None:
        """Where the run stands: what to go back to where there is no checkpoint yet."""
        self.last_finite_state = self.state.step, self.state.tokens, replace(self.best), self.stopped_early

    def _log_step(self, metrics: StepMetrics, tokens_per_second: float) -> None:
        seconds = self.elapsed_seconds()
        self.run_dir.append_metrics(
            {
                "step": metrics.step,
                "loss": metrics.loss,
                "lr": metrics.lr,
                "tokens": metrics.tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(tokens_per_second, 1),
                "gradient_norm": metrics.gradient_norm,
                "skipped": metrics.skipped,
            }
        )
        if self.tensorboard is not None:
            for name in ("loss", "lr", "gradient_norm"):
                self.tensorboard.add_scalar(f"training/{name}", getattr(metrics, name), metrics.step)
        if warning := self.rollback_manager.observe(metrics):
            self.log_event(metrics.step, warning)
        estimated_total = seconds / metrics.progress if self.budget_seconds is None else self.budget_seconds
        self.console.training_progress(
            TrainingProgress(
                step=metrics.step,
                total_steps=round(metrics.step / metrics.progress),
                loss=metrics.loss,
                elapsed=seconds,
                total=estimated_total,
                tokens_per_second=tokens_per_second,
                bits_per_byte=self.loss_to_bits_per_byte(metrics.loss),
            )
        )

    def num_validations(self, step_schedule: StepSchedule) -> int:
        """How many looks at held-out data: as many as the recipe says, but at least ten steps apart."""
        return min(self.training.evaluations, max(1, step_schedule.decisions[0].total_steps // 10))

    def _validate_if_due(self, metrics: StepMetrics, step_schedule: StepSchedule) -> None:
        """A look at equal parts of the run; the best weights are kept as RUN/model."""
        total_validations = self.num_validations(step_schedule)
        index = metrics.step - 1
        validation_index = math.floor(metrics.progress * total_validations + 1e-9)
        if validation_index == math.floor(
            (step_schedule.progress(index - 1) if index else 0.0) * total_validations + 1e-9
        ):
            return
        result = self.validate(step_schedule)
        if result is None:  # nothing is held out: the newest weights are the ones that are kept
            self._update_best(metrics.step, None)
            return
        if self.budget_controller is not None:
            self.budget_controller.reserved_seconds = self.estimate_finalize_seconds()
        self.run_dir.append_metrics({"step": metrics.step, "validation": result.metrics})
        if self.tensorboard is not None:
            for name, value in result.metrics.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(f"validation/{name}", value, metrics.step)
        self.console.info(f"step {metrics.step:,}: {result.summary}")
        is_better = self.best.score is None or (result.score > self.best.score and not self.state.nonfinite_streak)
        if math.isfinite(result.score) and is_better:
            self._update_best(metrics.step, result)
        else:
            self.best.since += 1
            patience = self.training.patience
            if patience is not None and self.best.since >= patience:
                self.stopped_early = True
                self.log_event(
                    metrics.step,
                    f"no better evaluation in {self.best.since}: stopped early, step {self.best.step:,} is kept",
                )
            else:
                self.on_no_improvement(metrics.step, result)
        if round(20 * validation_index / total_validations) in SAMPLE_AT_VALIDATIONS:
            self.log_sample(metrics.step)

    def _update_best(self, step: int, result: ValidationResult | None) -> None:
        self.best = BestCheckpoint(None if result is None else result.score, step)
        self.save_best_model({"step": step, "validation": None if result is None else result.metrics})

    def log_event(self, step: int, text: str) -> None:
        self.run_dir.append_metrics({"step": step, "message": text})
        self.console.info(text)

    def _save_checkpoint(self) -> None:
        state = self.state
        metadata = {**state.to_dict(), "best": asdict(self.best), "stopped": self.stopped_early}
        weights = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
        self.checkpointer.save_async(state.step, weights, state.optimizer.state_tensors(), metadata)

    # ------------------------------------------------------------ finish

    def write_results(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result, the card and the report; the result as it was written, and nothing where another process leads."""
        if not self.world.is_main:
            return {}
        full_result = {
            "run": str(self.run_dir.path), "model": str(self.run_dir.model_dir), "steps": self.state.step,
            "tokens": self.state.tokens, "best_step": self.best.step, **result, "seconds": round(self.elapsed_seconds(), 3),
            "memory_bytes": peak_memory_bytes(self.device), "energy": self.energy_meter.mean_power().to_dict(self.elapsed_seconds()),
        }  # fmt: skip
        fs.atomic_write(self.run_dir.result_path, fs.to_json(full_result))
        write_reports(self.run_dir.path, overwrite=True)
        return full_result


def write_reports(run_path: Path, overwrite: bool = False) -> None:
    """The report and the card of a finished run; where they are there already, only if they are to be made anew."""
    from nextword.reporting.report import write_card, write_report

    if overwrite or not (run_path / "README.md").is_file():
        write_card(run_path)
    if overwrite or not (run_path / "report.html").is_file():
        write_report(run_path)
