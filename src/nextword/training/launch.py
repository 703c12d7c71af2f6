"""Starts, resumes and finishes training runs, in one process or in the ranks of a distributed run.

The main rank holds the run directory and decides. Worker ranks wait until it broadcasts the metadata of the run, then build the
same run from that.

`setup_training` prepares a run for this machine: it shards the model, restores a checkpoint, and chooses the micro-batch and
the kind of step. These choices are stored in run.json and apply to the whole run. Bitwise equality requires that they stay the
same.
"""

import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.environment import EnergyMeter, library_versions, machine_info
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.format import format_duration
from nextword.common.native_build import load_native_library
from nextword.common.run_dir import LOCATION_OPTIONS, ROUNDING_NOTE, RunDir, diff_settings, open_run
from nextword.model import ops
from nextword.model.config import ModelConfig
from nextword.model.gpt import GPT
from nextword.training import checkpoint
from nextword.training.config import DEPRECATED_PARALLEL, RunConfig
from nextword.training.distributed import SINGLE_PROCESS, DistContext, init_distributed, translate_dist_errors
from nextword.training.losses import LossFn, LossModule
from nextword.training.optimizer import Optimizer
from nextword.training.parallel import check_tp_divisibility, load_weights_, parallelize
from nextword.training.remote_sync import CheckpointUploader
from nextword.training.step import Dataset, StepSettings, TrainState, fit_micro_batch_rows, micro_batch_loss, time_step

PARALLELISM_FIELDS = ("parallel", "tensor")  # settings that a resume may change
OTHER_FILES_BYTES = 2**22  # metrics, samples, tokenizer, report

# "plain": PyTorch's eager operators. "fused": the compiled CPU kernels of `model.ops`. "compiled": torch.compile.
StepKind = Literal["plain", "fused", "compiled"]


@dataclass
class RunContext:
    """A run in progress, as one of its ranks sees it.

    Attributes:
        run_dir: The files of the run. Only the main rank writes them.
        request: The options of the command, None for those not given. Later those that the run started with.
        console: Output of the main rank.
        device: The device of this rank.
        start_time: When this process started, in seconds since the epoch.
        write_reports: Writes the report and the model card of a complete run; with `overwrite=False`, if they are missing.
        resume: Whether to continue a run that exists.
        strict: Whether to fail if the newest checkpoint is corrupt, instead of using the one before it.
        tensorboard: Whether to write TensorBoard events.
        mirror_url: Remote storage for copies of the checkpoints, from which a missing run directory is restored.
        command: The command line or the call from Python, as run.json records it.
        dist: The process group.
        metadata: run.json; None in the main rank of a new run, which chooses it.
        checkpoint: The checkpoint to resume from.
        uploader: Copies checkpoints to remote storage.
        seconds_before_resume: Time that earlier processes have used, up to the checkpoint.
        workers_started: Whether the worker ranks have received the metadata.
    """

    run_dir: RunDir
    request: dict[str, Any]
    console: Console
    device: torch.device
    start_time: float
    write_reports: Callable[..., object]
    resume: bool = False
    strict: bool = False
    tensorboard: bool = False
    mirror_url: str | None = None
    command: str = ""
    dist: DistContext = SINGLE_PROCESS
    metadata: dict[str, Any] | None = None
    checkpoint: Path | None = None
    uploader: CheckpointUploader | None = None
    seconds_before_resume: float = 0.0
    workers_started: bool = False

    def __post_init__(self) -> None:
        self.energy_meter = EnergyMeter(self.device)

    now = staticmethod(time.time)

    def elapsed_seconds(self) -> float:
        """Wall time of the run, earlier processes included."""
        return self.now() - self.start_time + self.seconds_before_resume

    def remaining_seconds(self, budget: float) -> float:
        """The time left of a budget for the whole run."""
        return budget - self.elapsed_seconds()

    def info(self, text: str) -> None:
        """Print a line, on the main rank."""
        if self.dist.is_main:
            self.console.info(text)

    def warn(self, text: str) -> None:
        """Print a warning, on the main rank."""
        if self.dist.is_main:
            self.console.warn(text)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, on the main rank."""
        if self.dist.is_main:
            self.run_dir.append_metrics(record)

    def log_event(self, step: int, text: str, warning: bool = False, **fields: Any) -> None:
        """Print a message and append it to metrics.jsonl with further fields, on the main rank."""
        self.log({"step": step, "message": text, **fields})
        (self.warn if warning else self.info)(text)

    def start_workers(self, metadata: dict[str, Any] | None) -> None:
        """On the main rank: let the worker ranks build the run that `metadata` describes, or return if it is None."""
        self.workers_started = True
        path = None if self.checkpoint is None else str(self.checkpoint)
        self.dist.broadcast_object({"facts": metadata, "checkpoint": path})


# Builds a run, trains and evaluates it. Returns the result on the main rank, and an empty dictionary elsewhere.
TrainFn = Callable[[RunContext], dict[str, Any]]


def run_training(train: TrainFn, run: RunContext) -> dict[str, Any]:
    """Start or resume a run and finish it.

    Returns:
        The result of the run; empty on worker ranks.

    Raises:
        UsageError: the run exists and `run.resume` is false, or the options differ from those of the run.
        RunInterruptedError: a signal stopped the run after a checkpoint.
        TrainingDivergedError: the loss stayed non-finite or kept spiking.
    """
    path = run.run_dir.path
    with run.console, init_distributed() as run.dist:
        if not run.dist.is_main:
            return run_worker_rank(train, run)
        run.resume |= run.dist.restarted
        try:
            if run.mirror_url is not None:
                run.uploader = CheckpointUploader(run.mirror_url, run.console)
                run.uploader.restore(path, run.resume)
            with open_run(path, resume=run.resume):
                result = run_main_rank(train, run)
                if run.uploader is not None:
                    run.uploader.close(run.run_dir)
                return result
        except NextwordError as error:
            if not run.workers_started:
                run.dist.broadcast_object({"failed": str(error).splitlines()[0]})
            raise


def run_main_rank(train: TrainFn, run: RunContext) -> dict[str, Any]:
    """Start or resume a run in the rank that holds the run directory."""
    run_dir = run.run_dir
    if run_dir.exists:
        metadata = metadata_for_resume(run)
        checkpoint.mark_latest(run_dir.path)
        if run_dir.is_complete:
            run.info(f"{run_dir.path}: the run is complete")
            run.start_workers(None)
            run.write_reports(run_dir.path, overwrite=False)  # missing after a kill between the result and the report
            return run_dir.result()
        resume_environment(run, metadata)
    return train(run)


def run_worker_rank(train: TrainFn, run: RunContext) -> dict[str, Any]:
    """Take part in a run that the main rank starts.

    Raises:
        NextwordError: the main rank failed before it started the run.
    """
    start: dict[str, Any] = run.dist.broadcast_object()
    if "failed" in start:
        raise NextwordError(f"process {run.dist.rank}: {start['failed']}")
    if start["facts"] is None:
        return {}
    run.metadata, run.request = start["facts"], start["facts"]["request"]
    run.checkpoint = None if start["checkpoint"] is None else Path(start["checkpoint"])
    set_num_threads(run, start["facts"]["fixed"])
    return train(run)


def resume_environment(run: RunContext, metadata: dict[str, Any]) -> None:
    """Choose the checkpoint of a run, and warn if this environment differs from the original one."""
    run.metadata, run.request = metadata, metadata["request"]
    fixed = metadata.get("fixed")
    if fixed is None or not {"seed", "model", "versions"} <= metadata.keys():
        raise CorruptFileError(f"{run.run_dir.path / 'run.json'}: not the run.json of a training run")
    for name, before, now in (
        ("device", fixed["device"], run.device.type),
        ("torch", metadata["versions"]["torch"], torch.__version__),
        ("world size", fixed["world_size"], run.dist.world_size),
    ):
        if before != now:
            run.warn(f"the run started with {name} {before} and continues with {now}: {ROUNDING_NOTE}")
    set_num_threads(run, fixed)
    run.checkpoint = checkpoint.latest_valid(run.run_dir.path, run.warn, run.strict)


def set_num_threads(run: RunContext, fixed: dict[str, Any]) -> None:
    """Use as many threads as the run started with, unless the world size has changed."""
    if fixed["world_size"] == run.dist.world_size:
        torch.set_num_threads(fixed["threads"])


def check_resume_config(
    run_dir: RunDir, original: dict[str, Any], request: dict[str, Any], mutable_fields: Collection[str] = ()
) -> None:
    """Check that the options of a resume equal those of the run. Options that are not given are not compared.

    Args:
        run_dir: The run.
        original: The options of the run.
        request: The options of the resume.
        mutable_fields: Options, and training settings, that may differ.

    Raises:
        UsageError: with the options that differ.
    """
    mismatches: list[str] = []
    for name, value in request.items():
        if name in mutable_fields:
            continue
        previous = original.get(name)
        if fs.is_json_object(value) and (previous is None or fs.is_json_object(previous)):
            value = {key: value[key] for key in value if name != "training" or key not in mutable_fields}
            previous = {key: (previous or {}).get(key) for key in value}
        if value not in (None, [], {}):
            mismatches += diff_settings(previous, value, name)
    if mismatches:
        raise UsageError(
            f"{run_dir.path}: the run started with other settings, and a resume cannot change them:\n  "
            + "\n  ".join(mismatches)
            + "\nOmit them to continue, or start a new run with another --out"
        )


def metadata_for_resume(run: RunContext) -> dict[str, Any]:
    """run.json with what a resume may change: the parallelism, and the places of the inputs. It is not written here.

    Raises:
        UsageError: the options differ from those of the run, or the parallelism does not suit the model.
    """
    run_dir, metadata = run.run_dir, run.run_dir.metadata()
    request = metadata["request"]
    # Text of which the run has its own copy is not read again, so another place could not be checked.
    has_copy = metadata.get("shards") == "data"
    locations = {
        name: given
        for name in LOCATION_OPTIONS
        if (given := run.request.get(name)) and (isinstance(given, str) or (fs.is_json_array(given) and not has_copy))
    }
    check_resume_config(run_dir, request, run.request, (*PARALLELISM_FIELDS, *locations))
    request |= locations
    for name in {"corpora", "data"} & locations.keys() if "shards" in metadata else ():
        metadata["shards"] = locations[name][0]
    original, changes = metadata["recipe"].get("training", {}), list[str]()
    requested: dict[str, Any] = run.request.get("training") or {}
    for name in PARALLELISM_FIELDS:  # they change the result by rounding only
        now, recorded = requested.get(name), original.get(name)
        before = DEPRECATED_PARALLEL.get(str(recorded), recorded)
        if now not in (None, before) and name in original:
            original[name] = now
            changes.append(f"--training.{name} {before} → {now}")
    if changes:
        check_tp_divisibility(ModelConfig.from_dict(metadata["model"]), original["tensor"])
        run.warn(f"{', '.join(changes)}: {ROUNDING_NOTE} from here on")
    return {**metadata, "directory": str(run_dir.path.resolve())}


# ---------------------------------------------------------------- setup


@dataclass
class TrainingSetup:
    """What the trainer needs on this machine.

    Attributes:
        state: Model, optimizer and counters; in a distributed run, this rank's shards.
        dataset: The batches, by index.
        step_module: Computes the losses of a micro-batch.
        eager_step: The same without compilation.
        step_settings: Schedule, clipping, seed, micro-batch size and precision of a step.
        seconds_per_step: Estimated or measured time of a step; 0 if not known.
    """

    state: TrainState
    dataset: Dataset
    step_module: nn.Module
    eager_step: LossModule
    step_settings: StepSettings
    seconds_per_step: float


def new_metadata(
    run: RunContext, config: RunConfig, model_config: ModelConfig, seed: int, **specific: Any
) -> dict[str, Any]:
    """Return the content of run.json for a new run. "fixed" is what the run keeps when it is resumed."""
    return {
        "command": run.command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "directory": str(run.run_dir.path.resolve()),
        "request": run.request,
        "recipe": config.to_dict(),
        "model": model_config.to_dict(),
        "parameters": model_config.parameters,
        "training": asdict(config.training),
        "seed": seed,
        **specific,
        "fixed": {"threads": torch.get_num_threads(), "world_size": run.dist.world_size, "device": run.device.type},
        "versions": library_versions(),
        "machine": machine_info(run.device),
    }


@contextmanager
def setup_training(
    run: RunContext,
    metadata: dict[str, Any],
    model: GPT,
    loss_fn: LossFn,
    dataset: Dataset,
    config: RunConfig,
    *,
    init_weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    seconds_per_step: float = 0.0,
    dynamic_shapes: bool = False,
) -> Generator[TrainingSetup, None, None]:
    """Prepare a run for training. All ranks call this together.

    Within the context, errors of other ranks and a full disk are reported as such.

    Args:
        run: The run. Its `metadata` is None if this is the main rank of a new run.
        metadata: run.json. In a new run, the choices made here are added and the file is written.
        model: The model; on the meta device if `init_weights` is given.
        loss_fn: The losses of a batch.
        dataset: The batches.
        config: The options of the run; `training.lr` must be set.
        init_weights: Yields the initial weights one by one, so that no rank holds all of them.
        seconds_per_step: An estimate of the time of a step; 0 to measure it.
        dynamic_shapes: Whether rows differ in length, so that compiled code would be compiled again and again.

    Raises:
        DiskFullError: the disk has no room for the checkpoints and the model.
    """
    device, fixed, training = run.device, metadata["fixed"], config.training
    is_main, is_resume, on_meta = run.dist.is_main, "step_kind" in fixed, model.token_embedding.weight.is_meta
    with (
        fs.require_free_space(run.run_dir.path, required_disk_bytes(run, model), check_now=is_main),
        translate_dist_errors(),
    ):
        if is_main:
            run.start_workers(metadata)
        is_collective = replace(run.dist, strategy=training.parallel).forward_is_collective
        can_fuse = not is_collective and model.supports_kernels(device)
        step_kind: StepKind = fixed["step_kind"] if is_resume else "fused"
        if not is_resume and (training.checkpoint_activations or training.compile == "yes"):
            step_kind = "plain"
        if step_kind == "fused" and not can_fuse:
            step_kind = "plain"
            if is_resume:
                no_kernels = load_native_library(ops.SOURCE)[1]
                reason = "no process holds all weights at once" if is_collective else no_kernels
                run.warn(
                    f"the run started with fused kernels, which are not available here ({reason}): {ROUNDING_NOTE}"
                )
        model.set_activation_checkpointing(training.checkpoint_activations)
        eager_step = LossModule(model, loss_fn, kernels=step_kind == "fused")
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if run.dist.world_size > 1:
            run.dist = parallelize(run.dist, eager_step, training.parallel, bf16=bf16, device=device)
        elif on_meta:
            # `to_empty` would import sympy, which takes a second.
            shapes = model.state_dict().items()
            weights = {name: torch.empty(tuple(t.shape), dtype=t.dtype, device=device) for name, t in shapes}
            model.load_state_dict(weights, assign=True)
            model.init_buffers()
        state = TrainState(model, Optimizer(model, training, run.dist))
        settings = StepSettings(training, metadata["seed"], bf16=bf16)
        setup = TrainingSetup(state, dataset, eager_step, eager_step, settings, seconds_per_step)
        if run.checkpoint is not None:
            state.restore(run.checkpoint, run.dist)
        elif init_weights is not None and on_meta:
            load_weights_(model, init_weights(), run.dist)
        if is_resume:
            setup.step_settings = replace(settings, micro_batch_rows=fixed["micro_batch_rows"])
        else:
            step_kind = autotune(run, setup, config, step_kind, dynamic_shapes)
        if step_kind == "compiled":
            step_kind = compile_step(run, setup)
        if is_resume:
            if is_main:
                resume_metrics(run, state.step)
                if metadata != fs.read_sealed_json(run.run_dir.path / "run.json"):
                    run.run_dir.write_metadata(metadata)
            setup.seconds_per_step = time_step(state, setup.step_module, dataset, setup.step_settings, run.dist)
            elapsed = format_duration(run.seconds_before_resume)
            run.log_event(state.step, f"resuming from step {state.step:,}, after {elapsed}", resumed=True)
        else:
            fixed |= {"micro_batch_rows": setup.step_settings.micro_batch_rows, "step_kind": step_kind}
            if is_main:
                run.run_dir.write_metadata(metadata)
                fs.atomic_write(run.run_dir.metrics_path, "")
        yield setup


def resume_metrics(run: RunContext, step: int) -> None:
    """Truncate metrics.jsonl to the checkpoint, and read the time that the run has used."""
    seconds = run.run_dir.truncate_metrics(step)
    if seconds is None:
        run.warn(
            f"{run.run_dir.metrics_path}: the records before step {step:,} are missing; the report will have a gap"
        )
        seconds = 0.0 if run.checkpoint is None else float(checkpoint.load_metadata(run.checkpoint).get("seconds", 0.0))
    run.seconds_before_resume = seconds


def required_disk_bytes(run: RunContext, model: GPT) -> int:
    """The room for the checkpoints, one more being written and one being uploaded, the model and its replacement.

    A checkpoint holds the trainable weights and at most two optimizer tensors for each. What is used already does not count.
    """
    trainable_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    model_bytes = sum(4 * p.numel() for p in model.parameters())
    num_checkpoints = checkpoint.MAX_TO_KEEP + 1 + (run.uploader is not None)
    peak_bytes = num_checkpoints * 3 * trainable_bytes + 2 * model_bytes + OTHER_FILES_BYTES
    return max(0, peak_bytes - fs.directory_size(run.run_dir.path / "checkpoints", run.run_dir.model_dir))


def autotune(
    run: RunContext, setup: TrainingSetup, config: RunConfig, step_kind: StepKind, dynamic_shapes: bool
) -> StepKind:
    """Choose the micro-batch and whether to compile, for all ranks. Returns the kind of step."""
    dist, training, step = run.dist, config.training, setup.eager_step
    rows = training.micro_batch_rows or fit_micro_batch_rows(step, setup.dataset, setup.step_settings, dist)
    smallest = -int(dist.all_reduce_max([-rows])[0])
    setup.step_settings = replace(setup.step_settings, micro_batch_rows=smallest)
    estimate: float = dist.broadcast_object(setup.seconds_per_step)
    setup.seconds_per_step = estimate or time_step(setup.state, step, setup.dataset, setup.step_settings, dist)
    if step_kind == "plain" and run.device.type == "cpu" and (reason := load_native_library(ops.SOURCE)[1]):
        run.info(f"training with PyTorch operations instead of fused kernels: {reason}")
    if training.compile == "yes":
        step_kind = "compiled"
    elif training.compile == "auto" and step_kind == "plain" and not dynamic_shapes:
        run_seconds = (config.steps or 0) * setup.seconds_per_step if config.budget is None else config.budget
        compile_pays, reason = should_compile(run.device, run_seconds)
        step_kind = "compiled" if compile_pays else "plain"
        run.info(reason)
    return dist.broadcast_object(step_kind)


def should_compile(device: torch.device, run_seconds: float) -> tuple[bool, str]:
    """Whether `torch.compile` pays off in a run of `run_seconds`, and the reason in words.

    A cold compilation takes 35 to 45 s on two cores and makes steps a tenth faster there; a GPU gains far more.
    """
    if device.type == "mps":
        return False, "not compiled: torch.compile is experimental on this device"
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return False, "not compiled: no C++ compiler was found (with one, long runs are faster)"
    if run_seconds < (60.0 if device.type == "cuda" else 900.0):
        return False, f"not compiled: in a run of {run_seconds:.0f} s the compilation would take longer than it saves"
    return True, "compiled: the first step takes about a minute"


def compile_step(run: RunContext, setup: TrainingSetup) -> StepKind:
    """Compile the step by a micro-batch whose gradients are dropped. Returns the kind of step.

    If `torch.compile` fails here, warn and keep the eager step.
    """
    from torch._dynamo.exc import TorchDynamoException  # the base of all compilation errors

    state, dist = setup.state, run.dist
    compiled: Any = torch.compile(setup.eager_step)  # pyright: ignore[reportUnknownMemberType]  (partly untyped)
    setup.step_module = compiled
    batch = setup.dataset.batch(state.step, dist.dp_rank, dist.dp_size)
    micro_batch = batch.split_micro_batches(setup.step_settings.micro_batch_rows)[0]
    try:
        torch.autograd.backward(micro_batch_loss(compiled, state.model, micro_batch, setup.step_settings))
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        run.warn(f"training with PyTorch operations, because torch.compile fails here: {reason}")
        setup.step_module = setup.eager_step
        return "plain"
    finally:
        state.model.zero_grad(set_to_none=True)
    return "compiled"
