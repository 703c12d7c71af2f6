"""From a request to a result: a run begun, gone on with, or found finished; by one process, or by several that one leads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nextword.common import fs
from nextword.common.console import Console, NullConsole
from nextword.common.errors import NextwordError, UsageError
from nextword.common.run_dir import ROUNDING_NOTE, RunDir, WorkerRunDir, command_line, diff_settings, open_run
from nextword.training import checkpoint
from nextword.training.distributed import DistContext, init_distributed, translate_dist_errors
from nextword.training.remote_sync import CheckpointUploader
from nextword.training.trainer import REPORT_MODULE, Trainer, write_reports

OTHER_FILES_BYTES = 2**22  # bytes of records, of samples, of the tokenizer, of the report
PARALLELISM_FIELDS = ("parallel", "tensor")  # of the settings of training, those that say how processes share it


def run_training(
    build_trainer: Callable[[RunDir, dict[str, Any], Console], Trainer],
    out: Path,
    request: dict[str, Any],
    *,
    resume: bool,
    tensorboard: bool,
    console: Console | None,
    mirror_url: str | None = None,
) -> dict[str, Any]:
    """Begin a run or go on with it, and see it through; its result.

    Args:
        make: the run of a request, in its folder.
        request: what the person said, by name; what was not said is None. A resume takes the request that the run began with.
        mirror: a place beyond this machine that checkpoints are copied to, and brought from where the run is there alone.
    """
    with console or Console(quiet=True) as console, init_distributed() as world:
        if not world.is_main:
            return run_worker_rank(build_trainer, out, world)
        with broadcast_failure(world) as broadcast_start:
            uploader = None if mirror_url is None else CheckpointUploader(mirror_url, console)
            if uploader is not None:
                uploader.restore(out, resume or world.restarted)
            with open_run(out, resume=resume or world.restarted) as run:
                return run_main_rank(
                    build_trainer,
                    run,
                    request,
                    world,
                    broadcast_start,
                    uploader,
                    console=console,
                    tensorboard=tensorboard,
                )


def run_main_rank(
    build_trainer: Callable[[RunDir, dict[str, Any], Console], Trainer],
    run: RunDir,
    request: dict[str, Any],
    world: DistContext,
    broadcast_start: Callable[[dict[str, Any]], None],
    uploader: CheckpointUploader | None,
    *,
    console: Console,
    tensorboard: bool,
) -> dict[str, Any]:
    """A run in its folder, by the process that holds it; the others begin when `tell` tells them."""
    if run.exists:
        check_resume_config(run, request, mutable_fields=PARALLELISM_FIELDS)
        if run.is_complete:
            console.info(f"{run.path}: this run is finished")
            write_reports(run.path)  # a kill may have come between the result and its report
            if uploader is not None:
                uploader.upload_final(run)
            return fs.read_json(run.result_path)
        update_parallelism(run, request, console)
        trainer = build_trainer(run, run.metadata()["request"], console)
        require_single_process(trainer, world)
        trainer.resume()
    else:
        trainer = build_trainer(run, request, console)
        require_single_process(trainer, world)
        trainer.initialize(command_line(), request)
    trainer.checkpoint_uploader = uploader
    with fs.require_free_space(run.path, required_disk_bytes(trainer)), translate_dist_errors():
        broadcast_start(
            {"facts": trainer.run_metadata, "checkpoint": trainer.resume_checkpoint and str(trainer.resume_checkpoint)}
        )
        import_module(REPORT_MODULE)  # what draws takes a second to import: now, and not when the time is up
        trainer.setup_training()
        trainer.train(tensorboard=tensorboard)
        console.close()
        result = trainer.finalize()
    if uploader is not None:
        uploader.upload_final(run)
    return result


def run_worker_rank(
    build_trainer: Callable[[RunDir, dict[str, Any], Console], Trainer], out: Path, world: DistContext
) -> dict[str, Any]:
    """Do one's part of a run that another process leads. Raises `NextwordError` where that one could not begin."""
    start_message = world.broadcast_object()
    if "failed" in start_message:
        raise NextwordError(f"process {world.rank}: {start_message['failed']}")
    if start_message["facts"] is None:
        return {}
    run = WorkerRunDir(out, start_message["facts"])
    trainer = build_trainer(run, run.metadata()["request"], NullConsole())
    trainer.world, trainer.resume_checkpoint = world, start_message["checkpoint"] and Path(start_message["checkpoint"])
    trainer.resume()
    with fs.require_free_space(out, required_disk_bytes(trainer), check_now=False), translate_dist_errors():
        trainer.setup_training()
        trainer.train()
        return trainer.finalize()


def required_disk_bytes(trainer: Trainer) -> int:
    """Bytes that a run's folder still wants at most: the checkpoints that are kept and one aside (and one that is
    copied elsewhere), the model and one aside, the rest, less what is there of them.

    A checkpoint has the weights that are trained and two averages of each, or Muon's one.
    """
    parameters = list(trainer.model.parameters())
    trainable_bytes = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    model_bytes = sum(4 * p.numel() for p in parameters)
    num_checkpoints = checkpoint.MAX_TO_KEEP + 1 + (trainer.checkpoint_uploader is not None)
    peak_bytes = num_checkpoints * 3 * trainable_bytes + 2 * model_bytes + OTHER_FILES_BYTES
    return max(0, peak_bytes - fs.directory_size(trainer.run_dir.path / "checkpoints", trainer.run_dir.model_dir))


@contextmanager
def broadcast_failure(world: DistContext) -> Iterator[Callable[[dict[str, Any]], None]]:
    """For a leader: `tell` lets the others begin. Where that is never reached, they are told that there is nothing to do."""
    started = False

    def broadcast_start(said: dict[str, Any]) -> None:
        nonlocal started
        started = True
        world.broadcast_object(said)

    try:
        yield broadcast_start
    except NextwordError as error:
        if not started:
            world.broadcast_object({"failed": str(error).splitlines()[0]})
        raise
    if not started:
        world.broadcast_object({"facts": None})


def require_single_process(trainer: Trainer, world: DistContext) -> None:
    """Give a run its world. Raises `UsageError` where it cannot be shared."""
    if world.world_size > 1 and not trainer.supports_distributed:
        raise UsageError("this verb runs in one process: start it without torchrun (pretrain is what runs in several)")
    trainer.world = world


def check_resume_config(run: RunDir, request: dict[str, Any], mutable_fields: Sequence[str] = ()) -> None:
    """A resume takes everything from the run; what is said anew must be the same, but for the settings of training that are
    `free`. Raises `UsageError` with what differs."""
    original_request, mismatches = run.metadata()["request"], []
    for name, value in request.items():
        previous = original_request.get(name)
        if isinstance(value, dict) and isinstance(previous, dict | None):  # what is not said in it stays as it was
            value = {key: one for key, one in value.items() if name != "training" or key not in mutable_fields}
            previous = {key: (previous or {}).get(key) for key in value}
        mismatches += [] if value in (None, [], {}) else diff_settings(previous, value, name)
    if mismatches:
        raise UsageError(
            f"{run.path}: this run was begun with other settings, and a resume does not change them:\n  "
            + "\n  ".join(mismatches)
            + "\nLeave them out to go on, or begin a new run with another --out"
        )


def update_parallelism(run: RunDir, request: dict[str, Any], console: Console) -> None:
    """How its processes share a run changes what it computes by rounding alone: what is said anew of it holds from here on."""
    metadata, requested = run.metadata(), request.get("training") or {}
    original = metadata["recipe"].get("training", {})
    updates = {
        name: requested[name]
        for name in PARALLELISM_FIELDS
        if name in original and requested.get(name) not in (None, original[name])
    }
    if updates:
        changes = ", ".join(f"--training.{name} {original[name]} → {value}" for name, value in updates.items())
        console.warn(f"{changes}: {ROUNDING_NOTE} from here on")
        original.update(updates)
        run.write_metadata(metadata)
