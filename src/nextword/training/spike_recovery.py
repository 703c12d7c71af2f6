"""Whether a run keeps its course, and where it turns back to when its loss goes astray (see `training.detours`)."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from nextword.common.console import Console
from nextword.common.errors import Diverged
from nextword.common.fs import read_json_lines, read_manifest
from nextword.common.run_dir import RunFolder
from nextword.training import checkpoint
from nextword.training.distributed import World
from nextword.training.skipped_ranges import (
    HIGH_IN_A_ROW,
    TRIES,
    Detour,
    Detours,
    Watch,
    in_words,
    read_detours,
    write_detours,
)
from nextword.training.step import StepMetrics, TrainState


class Course:
    """The detours of a run in progress, the same in each of its processes, and the leader's watch for spikes.

    Args:
        watching: whether a finite loss can be too high.
        documents: what the batch of an index is made of, by name.
    """

    def __init__(
        self, run: RunFolder, console: Console, world: World, watching: bool, documents: Callable[[int], list[str]]
    ):
        self.run, self.console, self.world, self.documents = run, console, world, documents
        self.watching = watching and world.leads
        known = read_detours(run.detours).made if world.leads else []
        self.detours = Detours(Detour(**said) for said in world.told([asdict(replace(d, documents=[])) for d in known]))
        self.detours.made = known if world.leads else self.detours.made
        self.watch = self._watch()

    def _watch(self) -> Watch:
        """As it stands after the steps that the run's lines tell of."""
        if not self.watching:
            return Watch()
        records = read_json_lines(self.run.metrics)
        return Watch(record["loss"] for record in records if "loss" in record)

    def see(self, metrics: StepMetrics) -> str:
        """What a step did; words for the person where it was left out."""
        if self.watching:
            self.watch.add(metrics.loss)
        if not (metrics.skipped and self.world.leads):
            return ""
        names = in_words(self.documents(self.detours.index_of(metrics.step - 1)))
        return f"step {metrics.step:,}: the loss is not finite; this step is left out. In its batch: {names}"

    def turn(
        self, state: TrainState, spike: bool, sound: int, best: int, seconds: float
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
        first = state.step - (HIGH_IN_A_ROW if spike else state.bad)
        if self.detours.tries(self.detours.index_of(first)) >= TRIES:
            if not spike:
                return None
            raise Diverged(
                f"the loss rises far above what it was, after {TRIES} detours at one place once more, at step {state.step}. "
                "What was saved before it is whole. A lower --training.lr or a longer --training.warmup may help."
            )
        found = checkpoint.newest_whole(self.run.path, self.console.warn) if self.world.leads else None
        said = self.world.told(None if found is None else str(found))
        if said is None and spike:
            text = (
                f"the loss is far above what it was since step {first + 1:,}, and no checkpoint is there to go back to"
            )
            self._say(state.step, text)
            return None
        back: int = sound if said is None else read_manifest(Path(said))["step"]
        # What makes the loss rise was learned before the loss shows it.
        from_step = max(back, first - HIGH_IN_A_ROW if spike else first)
        begin, end = self.detours.index_of(from_step), self.detours.index_of(state.step - 1) + 1
        names = [name for index in range(begin, end) for name in self.documents(index)] if self.world.leads else []
        self.detours.made.append(
            Detour(
                first=first + 1, last=state.step, begin=begin, end=end, back=back, reason="spike" if spike else "not finite",
                forgets=spike and best > from_step, seconds=round(seconds, 3), documents=list(dict.fromkeys(names)),
            )
        )  # fmt: skip
        if self.world.leads:
            write_detours(self.run.detours, self.detours)
        return (None if said is None else Path(said)), back

    def go_on(self) -> None:
        """After the turn: see only what is left of the run, and say what was done."""
        self.watch = self._watch()
        detour = self.detours.made[-1]
        what = "was not a finite number" if detour.reason == "not finite" else "was far above what it had been"
        self._say(
            detour.back,
            f"steps {detour.first:,} to {detour.last:,}: the loss {what}. The run goes back to step {detour.back:,} and from "
            f"there past the batches that led to it. In them: {in_words(detour.documents)}. {self.run.detours} names them all: "
            "look at them, and take what is no text out of what a next run learns from",
        )

    def _say(self, step: int, text: str) -> None:
        self.run.append({"step": step, "message": text})
        self.console.warn(text)
