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

from nextword.errors import CorruptFile
from nextword.files import append_durably, read_json_lines, write_durably
from nextword.training.distributed import World

FIRST_STEPS = 50  # the least that a clock begins with


@dataclass(frozen=True)
class Decision:
    """From `step` on, the run is to end after `total_steps`. `seconds` is when this was decided."""

    step: int
    total_steps: int
    seconds: float = 0.0


class Pace:
    """The share of the run that is done at each step, from the decisions so far.

    Between two decisions progress grows by equal parts; a decision changes what is still ahead, never what is behind.
    """

    def __init__(self, decisions: list[Decision]):
        self.decisions: list[Decision] = []
        self.starts: list[float] = []  # the progress that was reached where each decision begins
        for decision in decisions:
            self.decide(decision)

    def decide(self, decision: Decision) -> None:
        if self.decisions and decision.step < self.decisions[-1].step:
            raise ValueError("a decision cannot change the steps before an earlier one")
        if decision.total_steps <= decision.step:
            raise ValueError("a run cannot end before its next step")
        self.starts.append(self.progress(decision.step - 1) if decision.step else 0.0)
        self.decisions.append(decision)

    def cut_back(self, step: int) -> None:
        """Forget what was decided after `step`, which the run goes back to. The first decision is never later."""
        while self.decisions[-1].step > step:
            self.decisions.pop()
            self.starts.pop()

    def progress(self, step: int) -> float:
        """In (0, 1]: how much of the run is done once step `step` (from 0) is; 1 at the last step."""
        n = max(i for i, decision in enumerate(self.decisions) if decision.step <= step)
        decision, start = self.decisions[n], self.starts[n]
        if step + 1 >= decision.total_steps:
            return 1.0
        return start + (1 - start) * (step + 1 - decision.step) / (decision.total_steps - decision.step)

    @property
    def total_steps(self) -> int:
        """The end of the run as the last decision has it."""
        return self.decisions[-1].total_steps


class Clock:
    """Decides how many steps fit into a budget of wall time, again and again while the run goes on.

    Each decision is appended durably to `log` before it is applied. A resume takes up the whole log, and the clock speaks
    again only from the last decision on. `spent` is the time that earlier processes of the same run have used; `now` reads
    the time, in seconds.
    """

    def __init__(
        self, budget: float, log: Path, *, started: float, spent: float = 0.0, now: Callable[[], float] = time.time
    ):
        self.budget = budget
        self.log = log
        self.now = now
        self.started = started - spent
        self.next_time = 0.0
        self.first_time = math.inf
        self.reserve = 0.0  # what must still be done after the last step: a last evaluation, the report

    def elapsed(self) -> float:
        """Seconds of the budget that are used, preparation and earlier processes included."""
        return self.now() - self.started

    def decide(self, pace: Pace, step: int, seconds_per_step: float) -> None:
        """Before step `step`: decide anew, where it is time to."""
        elapsed = self.elapsed()
        self.first_time = min(self.first_time, elapsed)
        left = self.budget - self.reserve - elapsed
        if pace.decisions:
            # A run that is about to end with time to spare asks as well.
            early = step + 1 >= pace.total_steps and left > 0.03 * self.budget
            if step < pace.decisions[-1].step or (elapsed < self.next_time and not early):
                return
        steps_left = max(1, int(left / seconds_per_step))
        if not pace.decisions:
            # A first guess that is too long is mended on the way; one that is too short ends the schedule at once.
            steps_left = max(steps_left, FIRST_STEPS)
        elif left > 0.1 * self.budget:
            # One slow moment does not end a run: what is left is at most halved at a time.
            steps_left = max(steps_left, (pace.total_steps - step) // 2, 1)
        total_steps = step + steps_left
        # Often at first, when the speed is hardly known, and then each time that a twentieth of what is left has gone by.
        self.next_time = elapsed + max(0.5, min(0.05 * left, elapsed - self.first_time))
        if pace.decisions and total_steps == pace.total_steps:
            return
        decision = Decision(step, total_steps, round(elapsed, 3))
        append_durably(self.log, json.dumps(asdict(decision)))
        pace.decide(decision)

    def begin_anew(self, pace: Pace) -> None:
        """After the pace was cut back: its decisions are the log, and the next step is one to decide at. What the undone
        steps took has been spent."""
        write_durably(self.log, "".join(json.dumps(asdict(decision)) + "\n" for decision in pace.decisions))
        self.next_time = 0.0


class SharedClock:
    """What the leader's clock decides, heard by every process of a run before the same step."""

    def __init__(self, world: World, clock: Clock | None):
        self.world, self.clock = world, clock

    def decide(self, pace: Pace, step: int, seconds_per_step: float) -> None:
        known = len(pace.decisions)
        if self.clock is not None:
            self.clock.decide(pace, step, seconds_per_step)
        made = pace.decisions[known:]
        said = [1.0, made[0].step, made[0].total_steps, made[0].seconds] if made else [0.0] * 4
        decided, at, total_steps, seconds = self.world.numbers(said)
        if decided and self.clock is None:
            pace.decide(Decision(int(at), int(total_steps), seconds))


def read_decisions(log: Path) -> list[Decision]:
    """The decisions of a run so far. Raises `CorruptFile` where the log is not one."""
    try:
        return [Decision(**record) for record in read_json_lines(log)]
    except TypeError as error:
        raise CorruptFile(f"{log}: not a log of decisions ({error})") from error
