"""From a request to a result: a run begun, gone on with, or found finished; by one process, or by several that one leads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nextword.common import fs
from nextword.common.console import Console, Mute
from nextword.common.errors import NextwordError, UsageError
from nextword.common.run_dir import ROUNDING, Onlooker, RunFolder, command_line, differences, open_run
from nextword.training import checkpoint
from nextword.training.distributed import World, finding_others, joined
from nextword.training.remote_sync import Mirror
from nextword.training.trainer import REPORT, Job, draw

REST = 2**22  # bytes of records, of samples, of the tokenizer, of the report
SHARING = ("parallel", "tensor")  # of the settings of training, those that say how processes share it


def carry_out(
    make: Callable[[RunFolder, dict[str, Any], Console], Job],
    out: Path,
    request: dict[str, Any],
    *,
    resume: bool,
    tensorboard: bool,
    console: Console | None,
    mirror: str | None = None,
) -> dict[str, Any]:
    """Begin a run or go on with it, and see it through; its result.

    Args:
        make: the run of a request, in its folder.
        request: what the person said, by name; what was not said is None. A resume takes the request that the run began with.
        mirror: a place beyond this machine that checkpoints are copied to, and brought from where the run is there alone.
    """
    with console or Console(quiet=True) as console, joined() as world:
        if not world.leads:
            return follow(make, out, world)
        with reporting_failure(world) as tell:
            place = None if mirror is None else Mirror(mirror, console)
            if place is not None:
                place.bring(out, resume or world.again)
            with open_run(out, resume=resume or world.again) as run:
                return lead(make, run, request, world, tell, place, console=console, tensorboard=tensorboard)


def lead(
    make: Callable[[RunFolder, dict[str, Any], Console], Job],
    run: RunFolder,
    request: dict[str, Any],
    world: World,
    tell: Callable[[dict[str, Any]], None],
    place: Mirror | None,
    *,
    console: Console,
    tensorboard: bool,
) -> dict[str, Any]:
    """A run in its folder, by the process that holds it; the others begin when `tell` tells them."""
    if run.begun:
        refuse_changes(run, request, free=SHARING)
        if run.finished:
            console.say(f"{run.path}: this run is finished")
            draw(run.path)  # a kill may have come between the result and its report
            if place is not None:
                place.close(run)
            return fs.read_json(run.result)
        share_anew(run, request, console)
        job = make(run, run.facts()["request"], console)
        refuse_company(job, world)
        job.go_on()
    else:
        job = make(run, request, console)
        refuse_company(job, world)
        job.begin(command_line(), request)
    job.mirror = place
    with fs.with_room(run.path, room(job)), finding_others():
        tell({"facts": job.facts, "checkpoint": job.checkpoint and str(job.checkpoint)})
        import_module(REPORT)  # what draws takes a second to import: now, and not when the time is up
        job.settle()
        job.train(tensorboard=tensorboard)
        console.close()
        result = job.finish()
    if place is not None:
        place.close(run)
    return result


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
    with fs.with_room(out, room(job), refuse=False), finding_others():
        job.settle()
        job.train()
        return job.finish()


def room(job: Job) -> int:
    """Bytes that a run's folder still wants at most: the checkpoints that are kept and one aside (and one that is
    copied elsewhere), the model and one aside, the rest, less what is there of them.

    A checkpoint has the weights that are trained and two averages of each, or Muon's one.
    """
    parameters = list(job.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    model = sum(4 * p.numel() for p in parameters)
    held = checkpoint.KEPT + 1 + (job.mirror is not None)
    most = held * 3 * trained + 2 * model + REST
    return max(0, most - fs.used(job.run.path / "checkpoints", job.run.model))


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


def refuse_changes(run: RunFolder, request: dict[str, Any], free: Sequence[str] = ()) -> None:
    """A resume takes everything from the run; what is said anew must be the same, but for the settings of training that are
    `free`. Raises `UsageError` with what differs."""
    before, changed = run.facts()["request"], []
    for name, value in request.items():
        was = before.get(name)
        if isinstance(value, dict) and isinstance(was, dict | None):  # what is not said in it stays as it was
            value = {key: one for key, one in value.items() if name != "training" or key not in free}
            was = {key: (was or {}).get(key) for key in value}
        changed += [] if value in (None, [], {}) else differences(was, value, name)
    if changed:
        raise UsageError(
            f"{run.path}: this run was begun with other settings, and a resume does not change them:\n  "
            + "\n  ".join(changed)
            + "\nLeave them out to go on, or begin a new run with another --out"
        )


def share_anew(run: RunFolder, request: dict[str, Any], console: Console) -> None:
    """How its processes share a run changes what it computes by rounding alone: what is said anew of it holds from here on."""
    facts, said = run.facts(), request.get("training") or {}
    before = facts["recipe"].get("training", {})
    anew = {name: said[name] for name in SHARING if name in before and said.get(name) not in (None, before[name])}
    if anew:
        changes = ", ".join(f"--training.{name} {before[name]} → {value}" for name, value in anew.items())
        console.warn(f"{changes}: {ROUNDING} from here on")
        before.update(anew)
        run.write_facts(facts)
