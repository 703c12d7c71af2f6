"""A loss that goes astray: how it is noticed, and which batches a run then goes past.

A run whose loss was no number for several steps in a row, or far above what it was, goes back to a checkpoint, takes the
same batches again up to where it began, and leaves out those after. So was PaLM trained (Chowdhery et al. 2022, section 5.1):
back by about 100 steps, past 200 to 500 batches, which did no harm at another state of the weights. Here each detour is on disk
before a step is undone, and which batch a step takes is a pure function of the detours, so that a resume goes the same way.
"""

import json
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from nextword.common.errors import CorruptFileError
from nextword.common.fs import atomic_write, read_jsonl

LOSS_WINDOW = 100  # recent losses that a new one is held against; before there are so many, none is called high
SPIKE_STREAK = 5  # so many high losses, one after the other, are a spike
SPIKE_MEDIAN_RATIO, SPIKE_DEVIATIONS = (
    1.5,
    10.0,
)  # a high one is above both: so many medians, and the median and so many deviations
NEARBY_BATCHES = 100  # batches: what begins so soon after a detour has not got past it
MAX_ATTEMPTS = 3  # detours at one place


@dataclass(frozen=True)
class SkippedRange:
    """Batches that a run goes past, and why.

    Attributes:
        first, last: the steps whose loss went astray, from 1 as in metrics.jsonl.
        begin, end: the batches that are left out, begin … end−1, numbered from 0 in the order of the data.
        back: after how many steps the run stood when it went on.
        reason: "not finite" or "spike".
        forgets: whether the weights that were kept as the best may be of a step that was undone.
        seconds: how long the run had taken by then.
        documents: what the left out batches are made of.
    """

    first: int
    last: int
    begin: int
    end: int
    back: int
    reason: str
    forgets: bool
    seconds: float
    documents: list[str]


class SkippedRanges:
    """The detours of a run, the oldest first."""

    def __init__(self, entries: Iterable[SkippedRange] = ()):
        self.entries = list(entries)

    def batch_index(self, step: int) -> int:
        """The batch that step `step` takes, both from 0: the one at that place among those that no detour leaves out."""
        index, passed = step, 0
        for begin, end in sorted((detour.begin, detour.end) for detour in self.entries):
            begin = max(begin, passed)  # what an earlier one leaves out already
            if index < begin:
                break
            index += max(0, end - begin)
            passed = max(passed, end)
        return index

    def attempts_near(self, index: int) -> int:
        """How many of the last detours were at the place of batch `index`: each less than `NEAR` batches before the next."""
        count = 0
        for detour in reversed(self.entries):
            if index - detour.end >= NEARBY_BATCHES:
                break
            count, index = count + 1, detour.begin
        return count


class LossSpikeDetector:
    """Tells a spike from noise: `HIGH_IN_A_ROW` losses, each above 1.5 times the median of the `SPAN` before it, and above
    that median by ten standard deviations, which are taken as 1.4826 times the median distance from the median, as for a
    normal distribution. A function of the losses alone, so that a resume sees what the run saw."""

    def __init__(self, losses: Iterable[float] = ()):
        self.recent_losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self.high_streak = 0  # how many of the last losses, one after the other, were high
        for loss in losses:
            self.update(loss)

    def update(self, loss: float) -> None:
        """One more loss; one that is no number is none of ours."""
        if math.isfinite(loss):
            self.high_streak = self.high_streak + 1 if self.is_high(loss) else 0
            self.recent_losses.append(loss)

    def is_high(self, loss: float) -> bool:
        if len(self.recent_losses) < LOSS_WINDOW:
            return False
        median_loss = median(self.recent_losses)
        if loss <= SPIKE_MEDIAN_RATIO * median_loss:
            return False
        return loss > median_loss + SPIKE_DEVIATIONS * 1.4826 * median(
            abs(other - median_loss) for other in self.recent_losses
        )

    @property
    def is_suspicious(self) -> bool:
        """Whether this may become a spike. A long one is told of once, and what follows it is the run's new course."""
        return 0 < self.high_streak < SPIKE_STREAK

    @property
    def is_spiking(self) -> bool:
        return self.high_streak == SPIKE_STREAK


def write_skipped_ranges(log: Path, skipped: SkippedRanges) -> None:
    """Put all of them on disk, as a whole: a crash leaves the old ones or the new ones."""
    atomic_write(log, "".join(json.dumps(asdict(detour), ensure_ascii=False) + "\n" for detour in skipped.entries))


def read_skipped_ranges(log: Path) -> SkippedRanges:
    """The detours of a run so far. Raises `CorruptFile` where the log is not one."""
    entries = []
    for number, record in enumerate(read_jsonl(log), start=1):
        try:
            entry = SkippedRange(**record)
            numbers = (entry.first, entry.last, entry.begin, entry.end, entry.back)
            is_valid = all(type(value) is int and value >= 0 for value in numbers) and entry.begin < entry.end
            is_valid = is_valid and math.isfinite(entry.seconds)
        except TypeError as error:
            raise CorruptFileError(f"{log} line {number}: not a detour ({error})") from error
        if not is_valid:
            raise CorruptFileError(f"{log} line {number}: not a detour: batches {entry.begin} to {entry.end}")
        entries.append(entry)
    return SkippedRanges(entries)


def summarize_names(names: list[str], limit: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")
