"""Recovery from loss spikes and non-finite losses.

The run returns to a checkpoint, repeats the same batches up to the first bad step, and skips those that follow. PaLM was
trained this way (Chowdhery et al. 2022, section 5.1): back by about 100 steps, past 200 to 500 batches.

Which batch a step takes is a pure function of the skipped ranges. They are on disk before a step is undone, so a resume takes
the same batches.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from nextword.common.errors import TrainingDivergedError
from nextword.common.fs import Count, read_manifest, read_records, write_records
from nextword.training import checkpoint
from nextword.training.launch import RunContext
from nextword.training.step import TrainState

NEARBY_BATCHES = 100  # ranges closer than this count as attempts at the same place
LOSS_WINDOW = 100  # recent losses that a loss is compared with; no loss is high before there are so many
SPIKE_STREAK = 5  # consecutive high losses that make a spike
SPIKE_MEDIAN_RATIO = 1.5
SPIKE_DEVIATIONS = 10.0
MAX_ATTEMPTS = 3  # rollbacks at one place
MAX_NAMES_SHOWN = 3  # documents in a message

# ---------------------------------------------------------------- skipped batches


@dataclass(frozen=True)
class SkippedRange:
    """A range of batches that a run skips; one record of detours.jsonl.

    Attributes:
        first: First step with a bad loss, counted from 1 as in metrics.jsonl.
        last: Last step with a bad loss.
        begin: First skipped batch, counted from 0.
        end: One past the last skipped batch.
        back: Number of steps the run had done after the rollback.
        reason: "not finite" or "spike".
        forgets: Whether the best weights so far may come from an undone step, and are no longer the best.
        seconds: Time that the run had used when it rolled back.
        documents: Names of the documents in the skipped batches.
    """

    first: Count
    last: Count
    begin: Count
    end: Count
    back: Count
    reason: str
    forgets: bool
    seconds: float
    documents: list[str]

    def __post_init__(self) -> None:
        if self.begin >= self.end or not math.isfinite(self.seconds):
            raise ValueError(f"batches {self.begin} to {self.end}, {self.seconds} s")


def batch_index(skipped: Iterable[SkippedRange], step: int) -> int:
    """Return the batch that a step takes, both counted from 0: batch number `step` of those that are not skipped."""
    index, covered = step, 0
    for begin, end in sorted((entry.begin, entry.end) for entry in skipped):
        begin = max(begin, covered)  # ranges may overlap
        if index < begin:
            break
        index += max(0, end - begin)
        covered = max(covered, end)
    return index


def attempts_near(skipped: Sequence[SkippedRange], index: int) -> int:
    """Count the latest ranges near batch `index`, each less than `NEARBY_BATCHES` batches before the next."""
    count = 0
    for entry in reversed(skipped):
        if index - entry.end >= NEARBY_BATCHES:
            break
        count, index = count + 1, entry.begin
    return count


# ---------------------------------------------------------------- the spike detector


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


# ---------------------------------------------------------------- rollbacks


class RollbackManager:
    """The skipped ranges of a run, equal on all ranks, and the spike detector of the main rank.

    Args:
        run: The run.
        detect_spikes: Whether to detect spikes of finite losses.
        describe_batch: Names of the documents in a batch.
    """

    def __init__(self, run: RunContext, detect_spikes: bool, describe_batch: Callable[[int], list[str]]):
        self.run, self.describe_batch = run, describe_batch
        self.detect_spikes = detect_spikes and run.dist.is_main
        ranges = read_records(run.run_dir.skipped_ranges_path, SkippedRange) if run.dist.is_main else []
        shared = run.dist.broadcast_object([asdict(entry) for entry in ranges])
        self.skipped = [SkippedRange(**entry) for entry in shared]
        self.detector = self._replay_losses()

    def _replay_losses(self) -> LossSpikeDetector:
        """The detector after the steps in metrics.jsonl."""
        return LossSpikeDetector(self.run.run_dir.losses() if self.detect_spikes else ())

    def batch_index(self, step: int) -> int:
        """Return the batch that a step takes, both counted from 0."""
        return batch_index(self.skipped, step)

    def observe(self, loss: float) -> None:
        """Add the loss of a step."""
        if self.detect_spikes:
            self.detector.update(loss)

    def plan_rollback(self, state: TrainState, is_spike: bool, last_finite_step: int) -> tuple[Path | None, int] | None:
        """Choose the checkpoint and the batches to skip, and write them to detours.jsonl. All ranks call this together.

        Args:
            state: The state after the last bad step.
            is_spike: Whether the loss spiked; else it was not finite.
            last_finite_step: The last step with a finite loss.

        Returns:
            The checkpoint to restore (None if the weights have not changed since), and the number of completed steps there.
            None if the run cannot go back.

        Raises:
            TrainingDivergedError: the loss spikes again after `MAX_ATTEMPTS` rollbacks at the same place.
        """
        run, is_main = self.run, self.run.dist.is_main
        first = state.step - (SPIKE_STREAK if is_spike else state.nonfinite_streak)
        if attempts_near(self.skipped, self.batch_index(first)) >= MAX_ATTEMPTS:
            if not is_spike:
                return None
            raise TrainingDivergedError(
                f"the loss spikes again at step {state.step} after {MAX_ATTEMPTS} rollbacks at the same place. The checkpoints "
                "before it are valid. A lower --training.lr or a longer --training.warmup may help."
            )
        latest = checkpoint.latest_valid(run.run_dir.path, run.warn) if is_main else None
        name = run.dist.broadcast_object(None if latest is None else str(latest))
        if name is None and is_spike:
            message = f"the loss has spiked since step {first + 1:,}, and there is no checkpoint to go back to"
            run.log_event(state.step, message, warning=True)
            return None
        path = None if name is None else Path(name)
        step: int = last_finite_step if path is None else read_manifest(path)["step"]
        # The batches before a spike contributed to it.
        skip_from = max(step, first - SPIKE_STREAK if is_spike else first)
        begin, end = self.batch_index(skip_from), self.batch_index(state.step - 1) + 1
        names = [name for index in range(begin, end) for name in self.describe_batch(index)] if is_main else []
        entry = SkippedRange(
            first=first + 1,
            last=state.step,
            begin=begin,
            end=end,
            back=step,
            reason="spike" if is_spike else "not finite",
            forgets=is_spike and state.best.step > skip_from,
            seconds=round(run.elapsed_seconds(), 3),
            documents=list(dict.fromkeys(names)),
        )
        self.skipped.append(entry)
        if is_main:
            write_records(run.run_dir.skipped_ranges_path, map(asdict, self.skipped))
        return path, step

    def resume(self) -> None:
        """After the rollback: reset the detector to the remaining steps, and log what was skipped."""
        self.detector = self._replay_losses()
        entry = self.skipped[-1]
        problem = "was not finite" if entry.reason == "not finite" else "spiked"
        self.run.log_event(
            entry.back,
            f"the loss {problem} in steps {entry.first:,} to {entry.last:,}. The run rolls back to step {entry.back:,} and "
            f"skips the batches that led to it. Documents in them: {summarize_names(entry.documents)}. "
            f"{self.run.run_dir.skipped_ranges_path} lists all: check them, and remove what is not text before the next run",
            warning=True,
        )


def summarize_names(names: list[str]) -> str:
    """Join the first names, and say how many more there are."""
    more = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
