"""Whether a run keeps its course, and where it turns back to when its loss goes astray (see `training.detours`)."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from nextword.common.console import Console
from nextword.common.errors import TrainingDivergedError
from nextword.common.fs import read_jsonl, read_manifest
from nextword.common.run_dir import RunDir
from nextword.training import checkpoint
from nextword.training.distributed import DistContext
from nextword.training.skipped_ranges import (
    MAX_ATTEMPTS,
    SPIKE_STREAK,
    LossSpikeDetector,
    SkippedRange,
    SkippedRanges,
    read_skipped_ranges,
    summarize_names,
    write_skipped_ranges,
)
from nextword.training.step import StepMetrics, TrainState


class RollbackManager:
    """The detours of a run in progress, the same in each of its processes, and the leader's watch for spikes.

    Args:
        watching: whether a finite loss can be too high.
        documents: what the batch of an index is made of, by name.
    """

    def __init__(
        self,
        run_dir: RunDir,
        console: Console,
        world: DistContext,
        detect_spikes: bool,
        documents_in_batch: Callable[[int], list[str]],
    ):
        self.run_dir, self.console, self.world, self.documents_in_batch = run_dir, console, world, documents_in_batch
        self.detect_spikes = detect_spikes and world.is_main
        logged_ranges = read_skipped_ranges(run_dir.skipped_ranges_path).entries if world.is_main else []
        self.skipped_ranges = SkippedRanges(
            SkippedRange(**said)
            for said in world.broadcast_object([asdict(replace(d, documents=[])) for d in logged_ranges])
        )
        self.skipped_ranges.entries = logged_ranges if world.is_main else self.skipped_ranges.entries
        self.spike_detector = self._build_spike_detector()

    def _build_spike_detector(self) -> LossSpikeDetector:
        """As it stands after the steps that the run's lines tell of."""
        if not self.detect_spikes:
            return LossSpikeDetector()
        records = read_jsonl(self.run_dir.metrics_path)
        return LossSpikeDetector(record["loss"] for record in records if "loss" in record)

    def observe(self, metrics: StepMetrics) -> str:
        """What a step did; words for the person where it was left out."""
        if self.detect_spikes:
            self.spike_detector.update(metrics.loss)
        if not (metrics.skipped and self.world.is_main):
            return ""
        document_names = summarize_names(self.documents_in_batch(self.skipped_ranges.batch_index(metrics.step - 1)))
        return f"step {metrics.step:,}: the loss is not finite; this step is left out. In its batch: {document_names}"

    def plan_rollback(
        self, state: TrainState, is_spike: bool, last_finite_step: int, best_step: int, elapsed_seconds: float
    ) -> tuple[Path | None, int] | None:
        """Decide on a detour, and write it down before anything is undone.

        Args:
            sound: the step after which the loss was last a number.
            best: the step whose weights are kept.
            seconds: what the run has used.

        Returns:
            The checkpoint to go back to (None: the weights are as they were after the sound step) and its step; None
            where the run cannot be turned back.

        Raises:
            Diverged: a spike that comes back, however many batches are left out.
        """
        last_good_step = state.step - (SPIKE_STREAK if is_spike else state.nonfinite_streak)
        if self.skipped_ranges.attempts_near(self.skipped_ranges.batch_index(last_good_step)) >= MAX_ATTEMPTS:
            if not is_spike:
                return None
            raise TrainingDivergedError(
                f"the loss rises far above what it was, after {MAX_ATTEMPTS} detours at one place once more, at step {state.step}. "
                "What was saved before it is whole. A lower --training.lr or a longer --training.warmup may help."
            )
        latest_checkpoint = (
            checkpoint.latest_valid(self.run_dir.path, self.console.warn) if self.world.is_main else None
        )
        checkpoint_path = self.world.broadcast_object(None if latest_checkpoint is None else str(latest_checkpoint))
        if checkpoint_path is None and is_spike:
            text = f"the loss is far above what it was since step {last_good_step + 1:,}, and no checkpoint is there to go back to"
            self._log_event(state.step, text)
            return None
        rollback_step: int = (
            last_finite_step if checkpoint_path is None else read_manifest(Path(checkpoint_path))["step"]
        )
        # What makes the loss rise was learned before the loss shows it.
        first_skipped_step = max(rollback_step, last_good_step - SPIKE_STREAK if is_spike else last_good_step)
        first_batch, end_batch = (
            self.skipped_ranges.batch_index(first_skipped_step),
            self.skipped_ranges.batch_index(state.step - 1) + 1,
        )
        document_names = (
            [name for index in range(first_batch, end_batch) for name in self.documents_in_batch(index)]
            if self.world.is_main
            else []
        )
        self.skipped_ranges.entries.append(
            SkippedRange(
                first=last_good_step + 1, last=state.step, begin=first_batch, end=end_batch, back=rollback_step, reason="spike" if is_spike else "not finite",
                forgets=is_spike and best_step > first_skipped_step, seconds=round(elapsed_seconds, 3), documents=list(dict.fromkeys(document_names)),
            )
        )  # fmt: skip
        if self.world.is_main:
            write_skipped_ranges(self.run_dir.skipped_ranges_path, self.skipped_ranges)
        return (None if checkpoint_path is None else Path(checkpoint_path)), rollback_step

    def resume(self) -> None:
        """After the turn: see only what is left of the run, and say what was done."""
        self.spike_detector = self._build_spike_detector()
        skipped_range = self.skipped_ranges.entries[-1]
        reason = "was not a finite number" if skipped_range.reason == "not finite" else "was far above what it had been"
        self._log_event(
            skipped_range.back,
            f"steps {skipped_range.first:,} to {skipped_range.last:,}: the loss {reason}. The run goes back to step {skipped_range.back:,} and from "
            f"there past the batches that led to it. In them: {read_skipped_ranges(skipped_range.documents)}. {self.run_dir.skipped_ranges} names them all: "
            "look at them, and take what is no text out of what a next run learns from",
        )

    def _log_event(self, step: int, text: str) -> None:
        self.run_dir.append_metrics({"step": step, "message": text})
        self.console.warn(text)
