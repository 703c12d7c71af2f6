"""The length of a run in steps: fixed in advance, or adjusted to a wall-clock budget while the run goes on.

Learning rate and evaluations follow `StepSchedule.progress(step)`, a pure function of the decisions so far. Each decision is
logged durably before it is applied, so that a run with a time budget resumes exactly, too.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from nextword.common.errors import CorruptFileError
from nextword.common.fs import Count, append_line, read_records, to_json_line, write_records
from nextword.training.distributed import SINGLE_PROCESS, DistContext

MIN_INITIAL_STEPS = 50


@dataclass(frozen=True)
class StepBudgetDecision:
    """From `step` on, the run is planned to end after `total_steps`; decided `seconds` after the start of the run."""

    step: Count
    total_steps: Annotated[int, msgspec.Meta(ge=1)]
    seconds: Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)] = 0.0


class StepSchedule:
    """The progress of the run at each step, from the decisions so far.

    Progress is linear between two decisions. A decision changes the progress of the steps from its own on, never of earlier
    ones.
    """

    def __init__(self, decisions: Iterable[StepBudgetDecision] = ()):
        self.decisions: list[StepBudgetDecision] = []
        self.start_progress: list[float] = []  # at the step of each decision
        for decision in decisions:
            self.update(decision)

    def update(self, decision: StepBudgetDecision) -> None:
        """Apply a decision.

        Raises:
            ValueError: it comes before an earlier decision, or ends the run before its next step.
        """
        if self.decisions and decision.step < self.decisions[-1].step:
            raise ValueError("a decision cannot change the steps before an earlier one")
        if decision.total_steps <= decision.step:
            raise ValueError("a run cannot end before its next step")
        self.start_progress.append(self.progress(decision.step - 1) if decision.step else 0.0)
        self.decisions.append(decision)

    def rollback(self, step: int) -> None:
        """Drop the decisions after `step`. The first decision is never dropped, because it is made at step 0."""
        while self.decisions[-1].step > step:
            self.decisions.pop()
            self.start_progress.pop()

    def progress(self, step: int) -> float:
        """The fraction of the run, in (0, 1], that is done after step `step`, counted from 0. The last step has 1."""
        n = max(i for i, decision in enumerate(self.decisions) if decision.step <= step)
        decision, start = self.decisions[n], self.start_progress[n]
        if step + 1 >= decision.total_steps:
            return 1.0
        return start + (1 - start) * (step + 1 - decision.step) / (decision.total_steps - decision.step)

    @property
    def total_steps(self) -> int:
        """The end of the run according to the last decision."""
        return self.decisions[-1].total_steps


class TimeBudgetController:
    """Adjusts the number of steps to a wall-clock budget during the run.

    The main process decides; every process applies the decision before the same step. A resumed run replays the logged
    decisions and decides again only after the last of them.

    Args:
        budget: the wall-clock time of the whole run, in seconds.
        log: the file that the main process appends decisions to.
        started: start time of the run on the clock `now`, shifted by the time between interruption and resume.
        ctx: the processes.
        now: returns the time in seconds.

    Attributes:
        reserved_seconds: the time that evaluation and reports need after the last step.
    """

    def __init__(
        self,
        budget: float,
        log: Path,
        *,
        started: float,
        ctx: DistContext = SINGLE_PROCESS,
        now: Callable[[], float] = time.time,
    ):
        self.budget, self.log, self.started, self.ctx, self.now = budget, log, started, ctx, now
        self.next_update_time = 0.0
        self.first_update_time = math.inf
        self.reserved_seconds = 0.0

    def update(self, schedule: StepSchedule, step: int, seconds_per_step: float) -> None:
        """Before step `step`: log and apply a new decision if one is due.

        Args:
            schedule: the schedule to update.
            step: the next step, from 0.
            seconds_per_step: the recent speed, everything between two steps included.
        """
        decision = self._decide(schedule, step, seconds_per_step) if self.ctx.is_main else None
        if decision is not None:
            append_line(self.log, to_json_line(asdict(decision)), durable=True)
        values = self.ctx.broadcast_object(None if decision is None else asdict(decision))
        if values is not None:
            schedule.update(StepBudgetDecision(**values))

    def _decide(self, schedule: StepSchedule, step: int, seconds_per_step: float) -> StepBudgetDecision | None:
        elapsed = self.now() - self.started  # data preparation and earlier processes of the run included
        self.first_update_time = min(self.first_update_time, elapsed)
        remaining = self.budget - self.reserved_seconds - elapsed
        if schedule.decisions:
            ends_early = step + 1 >= schedule.total_steps and remaining > 0.03 * self.budget
            if step < schedule.decisions[-1].step or (elapsed < self.next_update_time and not ends_early):
                return None
        steps_left = max(1, int(remaining / seconds_per_step))
        if not schedule.decisions:
            # An estimate that is too long is corrected later; one that is too short would end the schedule at once.
            steps_left = max(steps_left, MIN_INITIAL_STEPS)
        elif remaining > 0.1 * self.budget:
            # A decision at most halves the remaining steps, so that one slow moment does not end the run.
            steps_left = max(steps_left, (schedule.total_steps - step) // 2, 1)
        # Often at first, when the speed is hardly known, and later after each twentieth of the remaining time.
        self.next_update_time = elapsed + max(0.5, min(0.05 * remaining, elapsed - self.first_update_time))
        if schedule.decisions and step + steps_left == schedule.total_steps:
            return None
        return StepBudgetDecision(step, step + steps_left, round(elapsed, 3))

    def reset(self, schedule: StepSchedule) -> None:
        """After a rollback of the schedule: rewrite the log, and decide again before the next step.

        The time that the undone steps took stays spent.
        """
        if self.ctx.is_main:
            write_records(self.log, map(asdict, schedule.decisions))
        self.next_update_time = 0.0


def read_decisions(log: Path, min_count: int = 0) -> list[StepBudgetDecision]:
    """The logged decisions of a run.

    Args:
        log: the file.
        min_count: the number of decisions when the checkpoint was saved that the run resumes from.

    Raises:
        CorruptFileError: the file is not a log of decisions, or some are missing.
    """
    decisions = read_records(log, StepBudgetDecision)
    if len(decisions) < min_count:
        raise CorruptFileError(f"{log}: {len(decisions)} decisions, and the checkpoint was saved after {min_count}")
    try:
        if decisions and decisions[0].step:
            raise ValueError("the first decision is made at step 0")
        StepSchedule(decisions)
    except ValueError as error:
        raise CorruptFileError(f"{log}: not a log of step budget decisions ({error})") from error
    return decisions
