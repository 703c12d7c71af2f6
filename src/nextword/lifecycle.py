"""From a request to a result: a run begun, gone on with, or found finished; by one process, or by several that one leads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nextword import files
from nextword.console import Console, Mute
from nextword.errors import NextwordError, UsageError
from nextword.job import REPORT, Job, draw
from nextword.runs import Onlooker, RunFolder, command_line, differences, open_run
from nextword.training import checkpoint
from nextword.training.distributed import World, finding_others, joined

REST = 2**22  # bytes of records, of samples, of the tokenizer, of the report


def carry_out(
    make: Callable[[RunFolder, dict[str, Any], Console], Job],
    out: Path,
    request: dict[str, Any],
    *,
    resume: bool,
    tensorboard: bool,
    console: Console | None,
) -> dict[str, Any]:
    """Begin a run or go on with it, and see it through; its result.

    Args:
        make: the run of a request, in its folder.
        request: what the person said, by name; what was not said is None. A resume takes the request that the run began with.
    """
    with console or Console(quiet=True) as console, joined() as world:
        if not world.leads:
            return follow(make, out, world)
        with open_run(out, resume=resume or world.again) as run, reporting_failure(world) as tell:
            if run.begun:
                refuse_changes(run, request)
                if run.finished:
                    console.say(f"{run.path}: this run is finished")
                    draw(run.path)  # a kill may have come between the result and its report
                    return files.read_json(run.result)
                job = make(run, run.facts()["request"], console)
                refuse_company(job, world)
                job.go_on()
            else:
                job = make(run, request, console)
                refuse_company(job, world)
                job.begin(command_line(), request)
            needed = max(0, room(job) - files.used(out / "checkpoints", out / "model"))
            with files.with_room(out, needed), finding_others():
                tell({"facts": job.facts, "checkpoint": job.checkpoint and str(job.checkpoint)})
                import_module(REPORT)  # what draws takes a second to import: now, and not when the time is up
                job.spread()
                job.train(tensorboard=tensorboard)
                console.close()
                return job.finish()


def follow(make: Callable[[RunFolder, dict[str, Any], Console], Job], out: Path, world: World) -> dict[str, Any]:
    """Do one's part of a run that another process leads. Raises `NextwordError` where that one could not begin."""
    said = world.told()
    if "failed" in said:
        raise NextwordError(f"process {world.rank}: {said['failed']}")
    if said["facts"] is None:
        return {}
    run = Onlooker(out, said["facts"])
    job = make(run, run.facts()["request"], Mute())
    job.world, job.checkpoint = world, said["checkpoint"] and Path(said["checkpoint"])
    job.go_on()
    with finding_others():
        job.spread()
        job.train()
        return job.finish()


def room(job: Job) -> int:
    """Bytes that a run's folder has at most: the checkpoints that are kept and one aside, the model and one aside, the rest.

    A checkpoint has the weights that are trained and two averages of each, or Muon's one.
    """
    parameters = list(job.state.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    model = sum(4 * p.numel() for p in parameters)
    return (checkpoint.KEPT + 1) * 3 * trained + 2 * model + REST


@contextmanager
def reporting_failure(world: World) -> Iterator[Callable[[dict[str, Any]], None]]:
    """For a leader: `tell` lets the others begin. Where that is never reached, they are told that there is nothing to do."""
    begun = False

    def tell(said: dict[str, Any]) -> None:
        nonlocal begun
        begun = True
        world.told(said)

    try:
        yield tell
    except NextwordError as error:
        if not begun:
            world.told({"failed": str(error).splitlines()[0]})
        raise
    if not begun:
        world.told({"facts": None})


def refuse_company(job: Job, world: World) -> None:
    """Give a run its world. Raises `UsageError` where it cannot be shared."""
    if world.size > 1 and not job.in_company:
        raise UsageError("this verb runs in one process: start it without torchrun (pretrain is what runs in several)")
    job.world = world


def refuse_changes(run: RunFolder, request: dict[str, Any]) -> None:
    """A resume takes everything from the run; what is said anew must be the same. Raises `UsageError` with what differs."""
    before = run.facts()["request"]
    said = {name: value for name, value in request.items() if value not in (None, [], {})}
    changed = differences({name: before.get(name) for name in said}, said)
    if changed:
        raise UsageError(
            f"{run.path}: this run was begun with other settings, and a resume does not change them:\n  "
            + "\n  ".join(changed)
            + "\nLeave them out to go on, or begin a new run with another --out"
        )
