"""Batches that a run skips after a loss spike or non-finite losses.

Which batch a step takes is a pure function of the skipped ranges. They are on disk before a step is undone, so a resume takes
the same batches.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from nextword.common.errors import CorruptFileError
from nextword.common.fs import atomic_write, read_jsonl

NEARBY_BATCHES = 100  # a range that begins so soon after another is a further attempt at the same place

Count = Annotated[int, msgspec.Meta(ge=0)]


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


class SkippedRanges:
    """The skipped ranges of a run, oldest first."""

    def __init__(self, entries: Iterable[SkippedRange] = ()):
        self.entries = list(entries)

    def batch_index(self, step: int) -> int:
        """Return the batch that a step takes, both counted from 0: batch number `step` of those that are not skipped."""
        index, covered = step, 0
        for begin, end in sorted((entry.begin, entry.end) for entry in self.entries):
            begin = max(begin, covered)  # ranges may overlap
            if index < begin:
                break
            index += max(0, end - begin)
            covered = max(covered, end)
        return index

    def attempts_near(self, index: int) -> int:
        """Count the latest ranges near batch `index`, each less than `NEARBY_BATCHES` batches before the next."""
        count = 0
        for entry in reversed(self.entries):
            if index - entry.end >= NEARBY_BATCHES:
                break
            count, index = count + 1, entry.begin
        return count


def write_skipped_ranges(path: Path, ranges: SkippedRanges) -> None:
    """Write detours.jsonl atomically."""
    atomic_write(path, "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in ranges.entries))


def read_skipped_ranges(path: Path) -> SkippedRanges:
    """Read detours.jsonl; a missing file has no ranges.

    Raises:
        CorruptFileError: a line is not a skipped range.
    """
    entries: list[SkippedRange] = []
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            entries.append(msgspec.convert(record, SkippedRange))
        except msgspec.ValidationError as error:
            raise CorruptFileError(f"{path} line {number}: not a skipped range ({error})") from error
    return SkippedRanges(entries)
