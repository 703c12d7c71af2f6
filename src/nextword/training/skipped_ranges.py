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

from nextword.common.errors import CorruptFile
from nextword.common.fs import read_json_lines, write_durably

SPAN = 100  # recent losses that a new one is held against; before there are so many, none is called high
HIGH_IN_A_ROW = 5  # so many high losses, one after the other, are a spike
FACTOR, DEVIATIONS = 1.5, 10.0  # a high one is above both: so many medians, and the median and so many deviations
NEAR = 100  # batches: what begins so soon after a detour has not got past it
TRIES = 3  # detours at one place


@dataclass(frozen=True)
class Detour:
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


class Detours:
    """The detours of a run, the oldest first."""

    def __init__(self, made: Iterable[Detour] = ()):
        self.made = list(made)

    def index_of(self, step: int) -> int:
        """The batch that step `step` takes, both from 0: the one at that place among those that no detour leaves out."""
        index, passed = step, 0
        for begin, end in sorted((detour.begin, detour.end) for detour in self.made):
            begin = max(begin, passed)  # what an earlier one leaves out already
            if index < begin:
                break
            index += max(0, end - begin)
            passed = max(passed, end)
        return index

    def tries(self, index: int) -> int:
        """How many of the last detours were at the place of batch `index`: each less than `NEAR` batches before the next."""
        count = 0
        for detour in reversed(self.made):
            if index - detour.end >= NEAR:
                break
            count, index = count + 1, detour.begin
        return count


class Watch:
    """Tells a spike from noise: `HIGH_IN_A_ROW` losses, each above 1.5 times the median of the `SPAN` before it, and above
    that median by ten standard deviations, which are taken as 1.4826 times the median distance from the median, as for a
    normal distribution. A function of the losses alone, so that a resume sees what the run saw."""

    def __init__(self, losses: Iterable[float] = ()):
        self.recent: deque[float] = deque(maxlen=SPAN)
        self.high = 0  # how many of the last losses, one after the other, were high
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """One more loss; one that is no number is none of ours."""
        if math.isfinite(loss):
            self.high = self.high + 1 if self.is_high(loss) else 0
            self.recent.append(loss)

    def is_high(self, loss: float) -> bool:
        if len(self.recent) < SPAN:
            return False
        middle = median(self.recent)
        if loss <= FACTOR * middle:
            return False
        return loss > middle + DEVIATIONS * 1.4826 * median(abs(other - middle) for other in self.recent)

    @property
    def doubts(self) -> bool:
        """Whether this may become a spike. A long one is told of once, and what follows it is the run's new course."""
        return 0 < self.high < HIGH_IN_A_ROW

    @property
    def spikes(self) -> bool:
        return self.high == HIGH_IN_A_ROW


def write_detours(log: Path, detours: Detours) -> None:
    """Put all of them on disk, as a whole: a crash leaves the old ones or the new ones."""
    write_durably(log, "".join(json.dumps(asdict(detour), ensure_ascii=False) + "\n" for detour in detours.made))


def read_detours(log: Path) -> Detours:
    """The detours of a run so far. Raises `CorruptFile` where the log is not one."""
    made = []
    for number, record in enumerate(read_json_lines(log), start=1):
        try:
            detour = Detour(**record)
            numbers = (detour.first, detour.last, detour.begin, detour.end, detour.back)
            sound = all(type(value) is int and value >= 0 for value in numbers) and detour.begin < detour.end
            sound = sound and math.isfinite(detour.seconds)
        except TypeError as error:
            raise CorruptFile(f"{log} line {number}: not a detour ({error})") from error
        if not sound:
            raise CorruptFile(f"{log} line {number}: not a detour: batches {detour.begin} to {detour.end}")
        made.append(detour)
    return Detours(made)


def in_words(names: list[str], shown: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")
