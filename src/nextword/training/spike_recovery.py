"""Recovery from loss spikes and non-finite losses.

The run returns to a checkpoint, repeats the same batches up to the first bad step, and skips those that follow. PaLM was
trained this way (Chowdhery et al. 2022, section 5.1): back by about 100 steps, past 200 to 500 batches.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from nextword.common.errors import TrainingDivergedError
from nextword.common.fs import read_jsonl, read_manifest
from nextword.training import checkpoint
from nextword.training.launch import RunContext
from nextword.training.skipped_ranges import SkippedRange, SkippedRanges, read_skipped_ranges, write_skipped_ranges
from nextword.training.step import TrainState

LOSS_WINDOW = 100  # recent losses that a loss is compared with; no loss is high before there are so many
SPIKE_STREAK = 5  # consecutive high losses that make a spike
SPIKE_MEDIAN_RATIO = 1.5
SPIKE_DEVIATIONS = 10.0
MAX_ATTEMPTS = 3  # rollbacks at one place


class LossSpikeDetector:
    """Tells spikes from noise.

    A loss is high if it is above `SPIKE_MEDIAN_RATIO` medians of the last `LOSS_WINDOW` losses, and above the median by
    `SPIKE_DEVIATIONS` standard deviations, estimated as 1.4826 median absolute deviations. `SPIKE_STREAK` consecutive high
    losses are a spike. The result depends on the losses alone, so a resume detects the same spikes.

    Args:
        losses: The losses of the run so far.
    """

    def __init__(self, losses: Iterable[float] = ()):
        self.recent_losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self.high_streak = 0
        for loss in losses:
            self.update(loss)

    def update(self, loss: float) -> None:
        """Add a loss. Non-finite losses are ignored."""
        if math.isfinite(loss):
            self.high_streak = self.high_streak + 1 if self.is_high(loss) else 0
            self.recent_losses.append(loss)

    def is_high(self, loss: float) -> bool:
        """Whether a loss is high compared with the recent ones."""
        if len(self.recent_losses) < LOSS_WINDOW:
            return False
        center = median(self.recent_losses)
        if loss <= SPIKE_MEDIAN_RATIO * center:
            return False
        deviation = median(abs(recent - center) for recent in self.recent_losses)
        return loss > center + SPIKE_DEVIATIONS * 1.4826 * deviation

    @property
    def is_suspicious(self) -> bool:
        """Whether the high losses so far may become a spike."""
        return 0 < self.high_streak < SPIKE_STREAK

    @property
    def is_spiking(self) -> bool:
        """True once per spike, at its last required step."""
        return self.high_streak == SPIKE_STREAK


@dataclass(frozen=True)
class Rollback:
    """Where a run returns to.

    Attributes:
        checkpoint: The checkpoint to restore; None if the weights have not changed since `step`.
        step: Number of completed steps there.
    """

    checkpoint: Path | None
    step: int


class RollbackManager:
    """The skipped ranges of a run, equal on all ranks, and the spike detector of the main rank.

    Args:
        run: The run.
        detect_spikes: Whether a finite loss can be too high.
        describe_batch: Names of the documents in a batch.
    """

    def __init__(self, run: RunContext, detect_spikes: bool, describe_batch: Callable[[int], list[str]]):
        self.run, self.describe_batch = run, describe_batch
        self.detect_spikes = detect_spikes and run.dist.is_main
        self.skipped = SkippedRanges()
        shared: list[dict[str, Any]] = []
        if run.dist.is_main:
            self.skipped = read_skipped_ranges(run.run_dir.skipped_ranges_path)
            shared = [asdict(replace(entry, documents=[])) for entry in self.skipped.entries]
        shared = run.dist.broadcast_object(shared)
        if not run.dist.is_main:
            self.skipped = SkippedRanges(SkippedRange(**entry) for entry in shared)
        self.detector = self._replay_losses()

    def _replay_losses(self) -> LossSpikeDetector:
        """The detector after the steps in metrics.jsonl."""
        if not self.detect_spikes:
            return LossSpikeDetector()
        return LossSpikeDetector(r["loss"] for r in read_jsonl(self.run.run_dir.metrics_path) if "loss" in r)

    def observe(self, loss: float) -> None:
        """Add the loss of a step."""
        if self.detect_spikes:
            self.detector.update(loss)

    def plan_rollback(
        self, state: TrainState, is_spike: bool, last_finite_step: int, best_step: int
    ) -> Rollback | None:
        """Choose the checkpoint and the batches to skip, and write them to detours.jsonl. All ranks call this together.

        Args:
            state: The state after the last bad step.
            is_spike: Whether the loss spiked; else it was not finite.
            last_finite_step: The last step with a finite loss.
            best_step: The step of the best weights.

        Returns:
            Where to go back to; None if the run cannot go back.

        Raises:
            TrainingDivergedError: the loss spikes again after `MAX_ATTEMPTS` rollbacks at the same place.
        """
        first = state.step - (SPIKE_STREAK if is_spike else state.nonfinite_streak)
        if self.skipped.attempts_near(self.skipped.batch_index(first)) >= MAX_ATTEMPTS:
            if not is_spike:
                return None
            raise TrainingDivergedError(
                f"the loss spikes again at step {state.step} after {MAX_ATTEMPTS} rollbacks at the same place. The checkpoints "
                "before it are valid. A lower --training.lr or a longer --training.warmup may help."
            )
        is_main = self.run.dist.is_main
        latest = checkpoint.latest_valid(self.run.run_dir.path, self.run.warn) if is_main else None
        name = self.run.dist.broadcast_object(None if latest is None else str(latest))
        if name is None and is_spike:
            self.run.log_event(
                state.step,
                f"the loss has spiked since step {first + 1:,}, and there is no checkpoint to go back to",
                warning=True,
            )
            return None
        path = None if name is None else Path(name)
        step: int = last_finite_step if path is None else read_manifest(path)["step"]
        # The batches before a spike contributed to it.
        skip_from = max(step, first - SPIKE_STREAK if is_spike else first)
        begin, end = self.skipped.batch_index(skip_from), self.skipped.batch_index(state.step - 1) + 1
        names = [name for index in range(begin, end) for name in self.describe_batch(index)] if is_main else []
        entry = SkippedRange(
            first=first + 1,
            last=state.step,
            begin=begin,
            end=end,
            back=step,
            reason="spike" if is_spike else "not finite",
            forgets=is_spike and best_step > skip_from,
            seconds=round(self.run.elapsed_seconds(), 3),
            documents=list(dict.fromkeys(names)),
        )
        self.skipped.entries.append(entry)
        if is_main:
            write_skipped_ranges(self.run.run_dir.skipped_ranges_path, self.skipped)
        return Rollback(path, step)

    def resume(self) -> None:
        """After the rollback: reset the detector to the remaining steps, and log what was skipped."""
        self.detector = self._replay_losses()
        entry = self.skipped.entries[-1]
        problem = "was not finite" if entry.reason == "not finite" else "spiked"
        self.run.log_event(
            entry.back,
            f"the loss {problem} in steps {entry.first:,} to {entry.last:,}. The run goes back to step {entry.back:,} and "
            f"skips the batches that led to it. Documents in them: {summarize_names(entry.documents)}. "
            f"{self.run.run_dir.skipped_ranges_path} lists all: check them, and remove what is not text before the next run",
            warning=True,
        )


def summarize_names(names: list[str], shown: int = 3) -> str:
    """Join the first names, and say how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")
