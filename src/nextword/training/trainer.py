"""The trainer: steps, validation, checkpoints, rollbacks and early stopping in one loop, for every training command."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from nextword.common import fs
from nextword.common.console import TrainingProgress
from nextword.common.environment import peak_memory_bytes
from nextword.common.errors import CorruptFileError, TrainingDivergedError, import_optional
from nextword.common.format import format_duration
from nextword.common.run_dir import RunInterruptedError, catch_signals
from nextword.training.checkpoint import AsyncCheckpointer, load_metadata
from nextword.training.config import RunConfig
from nextword.training.launch import RunContext, TrainingSetup
from nextword.training.spike_recovery import RollbackManager, summarize_names
from nextword.training.step import MAX_NONFINITE_STEPS, BestCheckpoint, StepMetrics, train_step
from nextword.training.step_budget import StepBudgetDecision, StepSchedule, TimeBudgetController, read_decisions

SAMPLE_AT_VALIDATIONS = (1, 2, 4, 8, 12, 16, 20)  # validations, of 20, after which a sample is generated
FINALIZE_SECONDS = 2.5  # report, model card and other last files
REPLAN_RATIO = 1.5  # of the training speed to the last one reported, from which on the expectation is renewed
MIN_MEASURED_SECONDS = 10.0  # of training, before its speed is compared with the plan
BUSY_SHARE = 0.75  # of the processor time that its threads could use, below which a process competes with others
FEW_STEPS = 50  # a model trained for fewer steps has hardly learned anything


@dataclass(frozen=True)
class ValidationResult:
    """Metrics of the model on the validation set.

    Attributes:
        score: Decides which weights are the best; higher is better.
        loss: Decides between equal scores. Early stopping waits while the score or the loss improves.
        metrics: The "validation" record of metrics.jsonl.
        summary: The metrics in one line.
        predictions: What was predicted for each validation example, if all of them were evaluated.
        is_constant: Whether all examples have the same predicted label. Early stopping waits.
        standard_error: That of the score. The latest weights within one standard error of the highest score are the best.
    """

    score: float
    loss: float
    metrics: dict[str, Any]
    summary: str
    predictions: list[Any] | None = None
    is_constant: bool = False
    standard_error: float = 0.0


class Evaluator(Protocol):
    """What differs between commands: validation, samples and the best model."""

    def validate(self, steps_between: float) -> ValidationResult | None:
        """Evaluate the model on the validation set, if there is one; every `steps_between` steps."""

    def save_best(self, metadata: dict[str, Any]) -> None:
        """Write the present weights to RUN/model, with `metadata` in the manifest."""

    def log_sample(self, step: int) -> None:
        """Generate a sample."""

    def describe_batch(self, index: int) -> list[str]:
        """Name the documents in a batch."""
        ...

    def finalize_seconds(self) -> float:
        """Estimate the time after the last step."""
        ...

    def loss_to_bits_per_byte(self, loss: float) -> float | None:
        """Convert a training loss to bits per byte of text, if it has that meaning."""


@dataclass(frozen=True)
class Expectation:
    """The plan of a run, as far as the trainer compares the run with it.

    Attributes:
        tokens_per_second: The planned speed, validation and checkpoints included.
        bits_per_byte: The prediction for a number of training tokens, in words.
    """

    tokens_per_second: float
    bits_per_byte: Callable[[float], str]


class Trainer:
    """Trains a model until its step budget ends, early stopping ends the run, or a signal arrives.

    All ranks of a distributed run construct it and call its methods together.

    Args:
        run: The run directory, the process group and the console.
        setup: Model, optimizer, dataset and step, from `setup_training`.
        config: The options of the run.
        evaluator: Validation, samples and the best model.
        detect_spikes: Whether to roll back after loss spikes. Non-finite losses are always rolled back.
        overfitting_advice: What to do when the validation loss rises while training continues; None to report nothing.
        expectation: The plan. If the training speed differs from it, the expected loss is predicted again.
        min_steps_without_improvement: Steps that early stopping waits at least, besides the number of validations.
    """

    def __init__(
        self,
        run: RunContext,
        setup: TrainingSetup,
        config: RunConfig,
        evaluator: Evaluator,
        *,
        detect_spikes: bool = False,
        overfitting_advice: str | None = None,
        expectation: Expectation | None = None,
        min_steps_without_improvement: int = 0,
    ):
        self.run, self.setup, self.state = run, setup, setup.state
        self.config, self.evaluator, self.overfitting_advice = config, evaluator, overfitting_advice
        self.min_steps_without_improvement = min_steps_without_improvement
        self.rollbacks = RollbackManager(run, detect_spikes, evaluator.describe_batch)
        self.tensorboard: Any = None
        if run.tensorboard and run.dist.is_main:
            tensorboard = import_optional("torch.utils.tensorboard", "--tensorboard", "tensorboard")
            self.tensorboard = tensorboard.SummaryWriter(run.run_dir.path / "tensorboard")
        self.budget_controller: TimeBudgetController | None = None
        self.schedule = self._build_step_schedule()
        self.recent_seconds_per_step = setup.seconds_per_step
        self.step_times = [run.now()]
        self.expectation = expectation
        self.expected_speed = 0.0 if expectation is None else expectation.tokens_per_second
        self.cpu_clock = (time.monotonic(), time.process_time())
        self._apply_skipped_ranges()

    def _build_step_schedule(self) -> StepSchedule:
        """A fixed number of steps, or the decisions of the time budget so far."""
        run, log = self.run, self.run.run_dir.decisions_path
        if self.config.steps is not None:
            return StepSchedule([StepBudgetDecision(0, self.config.steps)])
        assert self.config.budget is not None
        started = run.start_time - run.seconds_before_resume
        self.budget_controller = TimeBudgetController(
            self.config.budget, log, started=started, ctx=run.dist, now=run.now
        )
        self.budget_controller.reserved_seconds = self.evaluator.finalize_seconds()
        saved = {} if run.checkpoint is None else load_metadata(run.checkpoint)
        min_count = saved.get("decisions", int(self.state.step > 0))
        decisions = read_decisions(log, min_count) if run.dist.is_main else []
        decisions = run.dist.broadcast_object([asdict(decision) for decision in decisions])
        return StepSchedule(StepBudgetDecision(**decision) for decision in decisions)

    # ------------------------------------------------------------ the loop

    def train(self) -> None:
        """Run the training loop.

        Raises:
            RunInterruptedError: SIGINT or SIGTERM, after a checkpoint.
            TrainingDivergedError: the loss stayed non-finite or kept spiking.
        """
        run, dist, state, schedule, uploader = self.run, self.run.dist, self.state, self.schedule, self.run.uploader
        with (
            catch_signals() as signals,
            AsyncCheckpointer(run.run_dir.path, dist, self.config.training.save_every) as checkpointer,
        ):
            while not state.stopped_early and (not schedule.decisions or state.step < schedule.total_steps):
                step_start, tokens_before = time.monotonic(), state.tokens
                self._update_step_budget()
                index = self.rollbacks.batch_index(state.step)
                batch = self.setup.dataset.batch(index, dist.dp_rank, dist.dp_size)
                progress = schedule.progress(state.step)
                metrics = train_step(state, self.setup.step_module, batch, self.setup.step_settings, progress, dist)
                self._log_step(metrics, (state.tokens - tokens_before) / max(1e-9, time.monotonic() - step_start))
                validation_start = run.now()
                if self._validate_if_due(metrics) and self.budget_controller is not None:
                    last_validation = run.now() - validation_start  # the last step is validated, too
                    self.budget_controller.reserved_seconds = self.evaluator.finalize_seconds() + last_validation

                is_last = metrics.progress >= 1 or state.stopped_early
                detector, signal_number = self.rollbacks.detector, signals[0] if signals else 0
                is_suspicious = detector.is_suspicious or state.nonfinite_streak > 0
                save_due = checkpointer.should_save(metrics.step)
                flags = [save_due, signal_number, detector.is_spiking, is_suspicious, checkpointer.status]
                # All ranks act together.
                save_due, signal_number, is_spike, is_suspicious, status = map(int, dist.all_reduce_max(flags))
                checkpointer.advance(status)
                if uploader is not None:
                    uploader.maybe_upload(run.run_dir, checkpointer.last_committed)
                has_diverged = state.nonfinite_streak >= MAX_NONFINITE_STEPS
                if (is_spike or has_diverged) and self._roll_back(checkpointer, bool(is_spike)):
                    self.step_times.append(run.now())
                    continue
                if (save_due or is_last or signal_number) and not is_suspicious:  # suspicious states are never saved
                    self._save_checkpoint(checkpointer)
                if is_last or signal_number:
                    checkpointer.wait()
                if signal_number and uploader is not None:
                    uploader.maybe_upload(run.run_dir, checkpointer.last_committed, urgent=True)
                if signal_number and not is_last:
                    suspicious_note = "the loss is unstable, so no new checkpoint is saved"
                    note = suspicious_note if is_suspicious else "checkpoint saved"
                    raise RunInterruptedError(
                        f"stopped at step {metrics.step:,}: {note}. To continue, add --resume to the same command",
                        signal_number,
                    )
                if has_diverged and not state.stopped_early:
                    raise TrainingDivergedError(
                        f"the loss was not a finite number in {state.nonfinite_streak} steps in a row, the last of them step "
                        f"{state.step}. None of them changed the weights. A lower --training.lr or a longer --training.warmup "
                        "may help."
                    )
                if not state.nonfinite_streak:
                    self.last_finite = state.counters()
                self.step_times.append(run.now())
        run.console.close()

    def _update_step_budget(self) -> None:
        """Let the time budget choose the number of steps, from the more recent half of the step times.

        Validation and checkpoints between the steps count.
        """
        times = self.step_times
        if len(times) > 4:
            half = len(times) // 2
            self.recent_seconds_per_step = max(1e-9, (times[-1] - times[half]) / (len(times) - 1 - half))
        if self.budget_controller is None:
            return
        self.budget_controller.update(self.schedule, self.state.step, self.recent_seconds_per_step)

    def _log_step(self, metrics: StepMetrics, tokens_per_second: float) -> None:
        run = self.run
        self.rollbacks.observe(metrics.loss)
        if not run.dist.is_main:
            return
        seconds = run.elapsed_seconds()
        record = {name: value for name, value in vars(metrics).items() if name != "progress"}
        run.log(record | {"seconds": round(seconds, 3), "tokens_per_second": round(tokens_per_second, 1)})
        self._log_scalars("training", metrics.step, {name: record[name] for name in ("loss", "lr", "gradient_norm")})
        if metrics.skipped:
            names = summarize_names(self.evaluator.describe_batch(self.rollbacks.batch_index(metrics.step - 1)))
            message = f"the loss is not finite; the step is skipped. In its batch: {names}"
            run.log_event(metrics.step, f"step {metrics.step:,}: {message}")
        run.console.training_progress(
            TrainingProgress(
                step=metrics.step,
                total_steps=round(metrics.step / metrics.progress),
                loss=metrics.loss,
                elapsed=seconds,
                total=self.config.budget or seconds / metrics.progress,
                tokens_per_second=tokens_per_second,
                bits_per_byte=self.evaluator.loss_to_bits_per_byte(metrics.loss),
            )
        )

    def _log_scalars(self, group: str, step: int, values: dict[str, Any]) -> None:
        """Write TensorBoard events."""
        for name, value in values.items():
            if self.tensorboard is not None and isinstance(value, int | float):
                self.tensorboard.add_scalar(f"{group}/{name}", value, step)

    # ------------------------------------------------------------ validation

    def _validate_if_due(self, metrics: StepMetrics) -> bool:
        """Validate at equal intervals, at least ten steps apart. The best weights become RUN/model.

        Returns:
            Whether the model was validated.
        """
        run, state, step = self.run, self.state, metrics.step
        total_steps = self.schedule.decisions[0].total_steps
        num_validations = min(self.config.training.evaluations, max(1, total_steps // 10))
        previous_progress = self.schedule.progress(step - 2) if step > 1 else 0.0
        number = math.floor(metrics.progress * num_validations + 1e-9)
        if number == math.floor(previous_progress * num_validations + 1e-9):
            return False
        self._compare_with_plan(step)
        result = self.evaluator.validate(total_steps / num_validations)
        if result is None:  # without a validation set the latest weights are the best
            state.best = BestCheckpoint(step=step)
            self.evaluator.save_best({"step": step, "validation": None})
            return False
        run.log({"step": step, "validation": result.metrics})
        if result.predictions is not None:
            run.log({"step": step, "predictions": result.predictions})
        self._log_scalars("validation", step, result.metrics)
        run.info(f"step {step:,}: {result.summary}")
        best = state.best
        is_suspicious = state.nonfinite_streak > 0 and best.score is not None
        if best.update(step, result.score, math.inf if is_suspicious else result.loss, result.standard_error):
            self.evaluator.save_best({"step": step, "validation": result.metrics})
        else:
            count, patience = best.validations_without_improvement, self.config.training.patience
            has_waited = step - best.last_improvement >= self.min_steps_without_improvement and not result.is_constant
            if patience is not None and count >= patience and has_waited:
                state.stopped_early = True
                message = f"no improvement in {count} validations; step {best.step:,} is the best"
                run.log_event(step, f"early stopping: {message}")
            else:
                self._report_overfitting(step, result.score)
        if round(20 * number / num_validations) in SAMPLE_AT_VALIDATIONS:
            self.evaluator.log_sample(step)
        return True

    def _compare_with_plan(self, step: int) -> None:
        """Predict the loss again if the training speed differs from the expected one, and report the cause."""
        is_measured = self.step_times[-1] - self.step_times[0] >= MIN_MEASURED_SECONDS
        if self.expectation is None or not self.run.dist.is_main or not is_measured:
            return
        tokens_per_step = self.state.tokens / self.state.step
        speed, planned = tokens_per_step / self.recent_seconds_per_step, self.expected_speed
        if 1 / REPLAN_RATIO < speed / planned < REPLAN_RATIO:
            return
        self.expected_speed = speed
        now, before = (time.monotonic(), time.process_time()), self.cpu_clock
        share = (now[1] - before[1]) / max(1e-9, now[0] - before[0]) / torch.get_num_threads()
        cause = ""
        if speed < planned and self.run.device.type == "cpu" and share < BUSY_SHARE:
            cause = f" This process gets {share:.0%} of the processor time of its threads: other programs use it."
        prediction = self.expectation.bits_per_byte(self.schedule.total_steps * tokens_per_step)
        self.run.log_event(
            step, f"speed: {speed:,.0f} tokens/s instead of {planned:,.0f}.{cause} Now expected: {prediction}"
        )

    def _report_overfitting(self, step: int, score: float) -> None:
        """Report once that the validation loss, which is minus the score, has risen by 1 % after two validations."""
        best = self.state.best
        has_risen = best.validations_without_improvement >= 2 and -score > 1.01 * -(best.score or score)
        if self.overfitting_advice is not None and has_risen:
            self.run.log_event(
                step,
                f"overfitting: the validation loss has been rising since step {best.step:,}, while training continues. The "
                f"weights of that step are kept. {self.overfitting_advice}",
            )
            self.overfitting_advice = None

    # ------------------------------------------------------------ checkpoints and rollbacks

    def _save_checkpoint(self, checkpointer: AsyncCheckpointer) -> None:
        state = self.state
        weights = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
        metadata = {"decisions": len(self.schedule.decisions), "seconds": round(self.run.elapsed_seconds(), 3)}
        checkpointer.save_async(state.step, weights, state.optimizer.state_tensors(), {**state.counters(), **metadata})

    def _roll_back(self, checkpointer: AsyncCheckpointer, is_spike: bool) -> bool:
        """Undo the bad steps. The next steps skip the batches that led to them. Returns whether that was possible."""
        checkpointer.wait()  # the checkpoint being written may be the one to go back to
        rollback = self.rollbacks.plan_rollback(self.state, is_spike, self.last_finite["step"])
        if rollback is None:
            return False
        path, step = rollback
        if path is None:  # steps with a non-finite loss do not change the weights
            self.state.set_counters(self.last_finite)
        else:
            self.state.restore(path, self.run.dist)
        self._apply_skipped_ranges()
        self.schedule.rollback(step)
        if self.budget_controller is not None:
            self.budget_controller.reset(self.schedule)
        if self.run.dist.is_main:
            self.run.run_dir.truncate_metrics(step)
        self.rollbacks.resume()
        return True

    def _apply_skipped_ranges(self) -> None:
        """Apply the ranges that the restored state does not know: weights that a spike may have affected are not the best."""
        entries = self.rollbacks.skipped
        if len(entries) < self.state.num_rollbacks:
            raise CorruptFileError(
                f"{self.run.run_dir.skipped_ranges_path}: {len(entries)} skipped ranges, and the checkpoint was saved after "
                f"{self.state.num_rollbacks}"
            )
        if any(entry.forgets for entry in entries[self.state.num_rollbacks :]):
            self.state.best = BestCheckpoint()
        self.state.num_rollbacks = len(entries)
        self.last_finite = self.state.counters()

    # ------------------------------------------------------------ the result

    def write_results(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write result.json and the reports, on the main rank.

        Args:
            metrics: The metrics of the best weights.

        Returns:
            The content of result.json; empty on worker ranks.
        """
        run = self.run
        if not run.dist.is_main:
            return {}
        if self.config.budget is not None and self.state.step < FEW_STEPS:
            run.warn(
                f"only {self.state.step} training steps fit into the budget of {format_duration(self.config.budget)}: "
                "the model has hardly learned anything. Use a longer --budget or a smaller model"
            )
        seconds = run.elapsed_seconds()
        result = {
            "run": str(run.run_dir.path),
            "model": str(run.run_dir.model_dir),
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "best_step": self.state.best.step,
            **metrics,
            "seconds": round(seconds, 3),
            "memory_bytes": peak_memory_bytes(run.device),
            "energy": run.energy_meter.energy(seconds),
        }
        fs.write_sealed_json(run.run_dir.result_path, result)
        run.write_reports(run.run_dir.path)
        return result
