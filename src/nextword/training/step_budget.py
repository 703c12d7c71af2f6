"""How long a run is, in steps: said beforehand, or decided on the way by the clock and written down before it counts.

Everything that follows a schedule asks `Pace.progress(step)`. It is a pure function of the decisions, and the decisions are
on disk, so that a run that followed the clock resumes exactly all the same.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from nextword.common.errors import CorruptFileError
from nextword.common.fs import append_line_durably, atomic_write, read_jsonl
from nextword.training.distributed import DistContext

MIN_INITIAL_STEPS = 50  # the least that a clock begins with


@dataclass(frozen=True)
class StepBudgetDecision:
    """From `step` on, the run is to end after `total_steps`. `seconds` is when this was decided."""

    step: int
    total_steps: int
    seconds: float = 0.0


class StepSchedule:
    """The share of the run that is done at each step, from the decisions so far.

    Between two decisions progress grows by equal parts; a decision changes what is still ahead, never what is behind.
    """

    def __init__(self, decisions: list[StepBudgetDecision]):
        self.decisions: list[StepBudgetDecision] = []
        self.start_progress: list[float] = []  # the progress that was reached where each decision begins
        for decision in decisions:
            self.update(decision)

    def update(self, decision: StepBudgetDecision) -> None:
        if self.decisions and decision.step < self.decisions[-1].step:
            raise ValueError("a decision cannot change the steps before an earlier one")
        if decision.total_steps <= decision.step:
            raise ValueError("a run cannot end before its next step")
        self.start_progress.append(self.progress(decision.step - 1) if decision.step else 0.0)
        self.decisions.append(decision)

    def rollback(self, step: int) -> None:
        """Forget what was decided after `step`, which the run goes back to. The first decision is never later."""
        while self.decisions[-1].step > step:
            self.decisions.pop()
            self.start_progress.pop()

    def progress(self, step: int) -> float:
        """In (0, 1]: how much of the run is done once step `step` (from 0) is; 1 at the last step."""
        n = max(i for i, decision in enumerate(self.decisions) if decision.step <= step)
        decision, start = self.decisions[n], self.start_progress[n]
        if step + 1 >= decision.total_steps:
            return 1.0
        return start + (1 - start) * (step + 1 - decision.step) / (decision.total_steps - decision.step)

    @property
    def total_steps(self) -> int:
        """The end of the run as the last decision has it."""
        return self.decisions[-1].total_steps


class TimeBudgetController:
    """Decides how many steps fit into a budget of wall time, again and again while the run goes on.

    Each decision is appended durably to `log` before it is applied. A resume takes up the whole log, and the clock speaks
    again only from the last decision on. `spent` is the time that earlier processes of the same run have used; `now` reads
    the time, in seconds.
    """

    def __init__(
        self,
        budget: float,
        log: Path,
        *,
        started: float,
        seconds_before_resume: float = 0.0,
        now: Callable[[], float] = time.time,
    ):
        self.budget = budget
        self.log = log
        self.now = now
        self.started = started - seconds_before_resume
        self.next_update_time = 0.0
        self.first_update_time = math.inf
        self.reserved_seconds = 0.0  # what must still be done after the last step: a last evaluation, the report

    def elapsed(self) -> float:
        """Seconds of the budget that are used, preparation and earlier processes included."""
        return self.now() - self.started

    def update(self, schedule: StepSchedule, step: int, seconds_per_step: float) -> None:
        """Before step `step`: decide anew, where it is time to."""
        elapsed = self.elapsed()
        self.first_update_time = min(self.first_update_time, elapsed)
        remaining = self.budget - self.reserved_seconds - elapsed
        if schedule.decisions:
            # A run that is about to end with time to spare asks as well.
            ends_early = step + 1 >= schedule.total_steps and remaining > 0.03 * self.budget
            if step < schedule.decisions[-1].step or (elapsed < self.next_update_time and not ends_early):
                return
        steps_left = max(1, int(remaining / seconds_per_step))
        if not schedule.decisions:
            # A first guess that is too long is mended on the way; one that is too short ends the schedule at once.
            steps_left = max(steps_left, MIN_INITIAL_STEPS)
        elif remaining > 0.1 * self.budget:
            # One slow moment does not end a run: what is left is at most halved at a time.
            steps_left = max(steps_left, (schedule.total_steps - step) // 2, 1)
        total_steps = step + steps_left
        # Often at first, when the speed is hardly known, and then each time that a twentieth of what is left has gone by.
        self.next_update_time = elapsed + max(0.5, min(0.05 * remaining, elapsed - self.first_update_time))
        if schedule.decisions and total_steps == schedule.total_steps:
            return
        decision = StepBudgetDecision(step, total_steps, round(elapsed, 3))
        append_line_durably(self.log, json.dumps(asdict(decision)))
        schedule.update(decision)

    def reset(self, schedule: StepSchedule) -> None:
        """After the pace was cut back: its decisions are the log, and the next step is one to decide at. What the undone
        steps took has been spent."""
        atomic_write(self.log, "".join(json.dumps(asdict(decision)) + "\n" for decision in schedule.decisions))
        self.next_update_time = 0.0


class DistributedTimeBudgetController:
    """What the leader's clock decides, heard by every process of a run before the same step."""

    def __init__(self, world: DistContext, controller: TimeBudgetController | None):
        self.world, self.controller = world, controller

    def update(self, schedule: StepSchedule, step: int, seconds_per_step: float) -> None:
        num_known = len(schedule.decisions)
        if self.controller is not None:
            self.controller.update(schedule, step, seconds_per_step)
        new_decisions = schedule.decisions[num_known:]
        payload = (
            [1.0, new_decisions[0].step, new_decisions[0].total_steps, new_decisions[0].seconds]
            if new_decisions
            else [0.0] * 4
        )
        has_decision, at_step, total_steps, seconds = self.world.broadcast_floats(payload)
        if has_decision and self.controller is None:
            schedule.update(StepBudgetDecision(int(at_step), int(total_steps), seconds))


def read_decisions(log: Path) -> list[StepBudgetDecision]:
    """The decisions of a run so far. Raises `CorruptFile` where the log is not one."""
    try:
        return [StepBudgetDecision(**record) for record in read_jsonl(log)]
    except TypeError as error:
        raise CorruptFileError(f"{log}: not a log of decisions ({error})") from error
