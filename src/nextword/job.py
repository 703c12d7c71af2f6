"""A run in progress, whatever it learns: its loop, its looks at held-out data, its checkpoints, its way back.

A subclass says what the model, the data and the objective are (`_build`), how held-out data is looked at (`look`) and how
the model is kept (`keep`); beginning, going on and finishing are stories of its own. Everything else is here once.
"""

import math
import time
from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nextword import files
from nextword.console import Console
from nextword.course import Course
from nextword.energy import Meter
from nextword.machinery import Machinery
from nextword.mirror import Mirror
from nextword.runs import Interrupted, RunFolder, catching_signals, open_tensorboard, peak_memory
from nextword.training.checkpoint import Saver
from nextword.training.pace import Clock, Decision, Pace, SharedClock, read_decisions
from nextword.training.train import BAD_STEPS_IN_A_ROW, StepMetrics, steps

SAMPLED = (1, 2, 4, 8, 12, 16, 20)  # of twenty evaluations, those after which the model writes something
REPORT = "nextword.evaluation.report"
FINISHING_SECONDS = 2.5  # the report, the card and the last files


@dataclass(frozen=True)
class Look:
    """A look at held-out data: what decides which weights are kept (higher is better), and what is told of it."""

    score: float
    record: dict[str, Any]  # goes into metrics.jsonl as "validation"
    text: str


@dataclass
class Best:
    """The best look so far; `since` counts the ones after it."""

    score: float | None = None
    step: int = 0
    since: int = 0


class Job(Machinery):
    """One run in progress: begun or gone on with by its subclass, settled, then `train`, then `finish`."""

    can_spike = False  # whether a loss far above the recent ones means that the run goes astray
    batch_tokens: int  # of a step, about; the subclass sets it
    now = staticmethod(time.time)  # reads the time of a run with a budget, in seconds
    mirror: Mirror | None = None  # where checkpoints are copied to, beyond this machine
    course: Course
    saver: Saver
    sound: tuple[int, int, Best, bool]  # step, tokens, best and stopped after the last step whose loss was a number

    def __init__(self, run: RunFolder, console: Console, device: torch.device, started: float):
        super().__init__(run, console, device, started)
        self.meter = Meter(device)
        self.best = Best()
        self.clock: Clock | None = None
        self.stopped = False
        self.curves: Any = None  # TensorBoard's writer, where it is asked for

    # ------------------------------------------------------------ what a subclass says

    @abstractmethod
    def begin(self, command: list[str], request: dict[str, Any]) -> None:
        """Decide once what the run fixes: `facts`, which `settle` completes and writes down."""

    @abstractmethod
    def go_on(self) -> None:
        """Take everything from the run folder; `settle` then stands where its newest whole checkpoint stands."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Measure the kept weights; the result, written down with the card and the report."""

    @abstractmethod
    def look(self, pace: Pace) -> Look | None:
        """The model as it stands, on held-out data; None where nothing is held out. The same data at each look."""

    @abstractmethod
    def keep(self, facts: dict[str, Any]) -> None:
        """Write the model as it stands to RUN/model."""

    @abstractmethod
    def sample(self, step: int) -> None:
        """Let the model show what it can, where it can write."""

    def finishing_seconds(self) -> float:
        """How long what follows the last step will take."""
        return FINISHING_SECONDS

    def bits_per_byte(self, loss: float) -> float | None:
        """A training loss in bits per byte of the text, where it means that."""
        return None

    @abstractmethod
    def documents(self, index: int) -> list[str]:
        """What the batch of an index is made of: a name for each text, by which a person finds it."""

    @abstractmethod
    def got_worse(self, step: int, look: Look) -> None:
        """After a look that was not the best: a word to the person, where one is due."""

    # ------------------------------------------------------------ train

    def _take_facts(self, path: Path) -> dict[str, Any]:
        saved = super()._take_facts(path)
        self.best, self.stopped = Best(**saved["best"]), saved["stopped"]
        return saved

    def seconds(self) -> float:
        """Wall time that the run has used, in all of its processes."""
        return self.now() - self.started + self.spent

    def make_pace(self) -> Pace:
        """The run's length: said beforehand, or the clock's decisions so far."""
        if self.steps_wanted is not None:
            return Pace([Decision(0, self.steps_wanted)])
        assert self.budget is not None
        decisions = []
        if self.world.leads:
            self.clock = Clock(self.budget, self.run.decisions, started=self.started, spent=self.spent, now=self.now)
            self.clock.reserve = self.finishing_seconds()
            decisions = [asdict(decision) for decision in read_decisions(self.run.decisions)]
        return Pace([Decision(**decision) for decision in self.world.told(decisions)])

    def train(self, tensorboard: bool = False) -> None:
        """The loop: a step, its line, and now and then a look at held-out data, a sample, a checkpoint.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
            Diverged: see `steps` and `Course.turn`.
        """
        self.course = Course(self.run, self.console, self.world, self.can_spike, self.documents)
        self._take_up_detours()
        self.curves = open_tensorboard(self.run.path) if tensorboard and self.world.leads else None
        pace = self.make_pace()
        shared = self.world.size > 1 and self.budget is not None
        clock = SharedClock(self.world, self.clock) if shared else self.clock
        before, tokens_before = time.monotonic(), self.state.tokens
        with catching_signals() as caught, Saver(self.run.path, self.world, self.training.save_every) as self.saver:
            if self.stopped:
                return
            loop = steps(
                self.state, self.data, self.step_module, self.settings, pace, clock, self.seconds_per_step, self.world,
                self.course.detours.index_of, self.now,
            )  # fmt: skip
            for metrics in loop:
                rate = (self.state.tokens - tokens_before) / max(1e-9, time.monotonic() - before)
                self._record(metrics, rate)
                self._look_when_due(metrics, pace)
                last = metrics.progress >= 1 or self.stopped
                watch, saver = self.course.watch, self.saver
                due, signal, spike, doubt, stage = map(int, self.world.most([
                    saver.is_due(metrics.step), caught[0] if caught else 0, watch.spikes, watch.doubts or self.state.bad > 0,
                    saver.stage,
                ]))  # fmt: skip
                saver.go_on(stage)
                if self.mirror is not None:
                    self.mirror.offer(self.run, saver.sealed)
                astray = spike or self.state.bad >= BAD_STEPS_IN_A_ROW
                if astray and self._turn_back(pace, bool(spike)):
                    before, tokens_before = time.monotonic(), self.state.tokens
                    continue
                if (due or last or signal) and not doubt:  # what is in doubt is not saved
                    self._save()
                if last or signal:
                    saver.wait()
                if signal and self.mirror is not None:
                    self.mirror.offer(self.run, saver.sealed, urgent=True)
                if signal and not last:
                    kept = "its loss is in doubt, so that the last checkpoint stands" if doubt else "and saved"
                    raise Interrupted(
                        f"stopped at step {metrics.step:,}, {kept}. Go on with the same command and --resume", signal
                    )
                if self.stopped:
                    break
                if not self.state.bad:
                    self._remember()
                before, tokens_before = time.monotonic(), self.state.tokens

    def _turn_back(self, pace: Pace, spike: bool) -> bool:
        """Undo the steps that went astray, and go past their batches from where the run stands then; False where it
        cannot be. Raises `Diverged` as `Course.turn`."""
        self.saver.wait()  # what is under way may be what to go back to
        turn = self.course.turn(self.state, spike, self.sound[0], self.best.step, self.seconds())
        if turn is None:
            return False
        path, step = turn
        if path is None:
            self.state.step, self.state.tokens, self.best, self.stopped = self.sound
            self.state.bad = 0
        else:
            self._take_weights(path)
            self._take_facts(path)
        self._take_up_detours()
        pace.cut_back(step)
        if self.clock is not None:
            self.clock.begin_anew(pace)
        self.run.cut_back(step)
        self.course.go_on()
        return True

    def _take_up_detours(self) -> None:
        """What those detours change that the state does not know of: weights that a spike may be in are no measure."""
        made = self.course.detours.made
        if any(detour.forgets for detour in made[self.state.detours :]):
            self.best = Best()
        self.state.detours = len(made)
        self._remember()

    def _remember(self) -> None:
        """Where the run stands: what to go back to where there is no checkpoint yet."""
        self.sound = self.state.step, self.state.tokens, replace(self.best), self.stopped

    def _record(self, metrics: StepMetrics, rate: float) -> None:
        seconds = self.seconds()
        self.run.append(
            {
                "step": metrics.step,
                "loss": metrics.loss,
                "lr": metrics.lr,
                "tokens": metrics.tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(rate, 1),
                "gradient_norm": metrics.gradient_norm,
                "skipped": metrics.skipped,
            }
        )
        if self.curves is not None:
            for name in ("loss", "lr", "gradient_norm"):
                self.curves.add_scalar(f"training/{name}", getattr(metrics, name), metrics.step)
        if words := self.course.see(metrics):
            self.message(metrics.step, words)
        whole = seconds / metrics.progress if self.budget is None else self.budget
        bits = self.bits_per_byte(metrics.loss)
        self.console.training(
            metrics, bits_per_byte=bits, tokens_per_second=rate, seconds_left=max(0.0, whole - seconds)
        )

    def looks(self, pace: Pace) -> int:
        """How many looks at held-out data: as many as the recipe says, but at least ten steps apart."""
        return min(self.training.evaluations, max(1, pace.decisions[0].total_steps // 10))

    def _look_when_due(self, metrics: StepMetrics, pace: Pace) -> None:
        """A look at equal parts of the run; the best weights are kept as RUN/model."""
        wanted = self.looks(pace)
        index = metrics.step - 1
        number = math.floor(metrics.progress * wanted + 1e-9)
        if number == math.floor((pace.progress(index - 1) if index else 0.0) * wanted + 1e-9):
            return
        look = self.look(pace)
        if look is None:  # nothing is held out: the newest weights are the ones that are kept
            self._keep_best(metrics.step, None)
            return
        if self.clock is not None:
            self.clock.reserve = self.finishing_seconds()
        self.run.append({"step": metrics.step, "validation": look.record})
        if self.curves is not None:
            for name, value in look.record.items():
                if isinstance(value, (int, float)):
                    self.curves.add_scalar(f"validation/{name}", value, metrics.step)
        self.console.say(f"step {metrics.step:,}: {look.text}")
        better = self.best.score is None or (look.score > self.best.score and not self.state.bad)
        if math.isfinite(look.score) and better:
            self._keep_best(metrics.step, look)
        else:
            self.best.since += 1
            patience = self.training.patience
            if patience is not None and self.best.since >= patience:
                self.stopped = True
                self.message(
                    metrics.step,
                    f"no better evaluation in {self.best.since}: stopped early, step {self.best.step:,} is kept",
                )
            else:
                self.got_worse(metrics.step, look)
        if round(20 * number / wanted) in SAMPLED:
            self.sample(metrics.step)

    def _keep_best(self, step: int, look: Look | None) -> None:
        self.best = Best(None if look is None else look.score, step)
        self.keep({"step": step, "validation": None if look is None else look.record})

    def message(self, step: int, text: str) -> None:
        self.run.append({"step": step, "message": text})
        self.console.say(text)

    def _save(self) -> None:
        state = self.state
        facts = {**state.facts(), "best": asdict(self.best), "stopped": self.stopped}
        weights = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
        self.saver.begin(state.step, weights, state.optimizer.state_tensors(), facts)

    # ------------------------------------------------------------ finish

    def conclude(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result, the card and the report; the result as it was written, and nothing where another process leads."""
        if not self.world.leads:
            return {}
        whole = {
            "run": str(self.run.path), "model": str(self.run.model), "steps": self.state.step,
            "tokens": self.state.tokens, "best_step": self.best.step, **result, "seconds": round(self.seconds(), 3),
            "memory_bytes": peak_memory(self.device), "energy": self.meter.power().to_dict(self.seconds()),
        }  # fmt: skip
        files.write_durably(self.run.result, files.to_json(whole))
        draw(self.run.path, anew=True)
        return whole


def draw(run: Path, anew: bool = False) -> None:
    """The report and the card of a finished run; where they are there already, only if they are to be made anew."""
    from nextword.evaluation.report import write_card, write_report

    if anew or not (run / "README.md").is_file():
        write_card(run)
    if anew or not (run / "report.html").is_file():
        write_report(run)
