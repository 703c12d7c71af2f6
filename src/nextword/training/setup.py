"""Prepares a run for this machine: shards the model, restores a checkpoint, and chooses the micro-batch and the kind of step.

The choices of a new run are stored in run.json and apply to the whole run. Bitwise equality requires that they stay the same.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextword.common import fs
from nextword.common.environment import command_line, library_versions, machine_info
from nextword.common.format import format_duration
from nextword.common.native_build import load_native_library
from nextword.common.run_dir import ROUNDING_NOTE
from nextword.model import ops
from nextword.model.config import ModelConfig
from nextword.model.gpt import GPT
from nextword.training import checkpoint
from nextword.training.config import FinetuneRecipe, Recipe, TrainingConfig
from nextword.training.distributed import DistContext, translate_dist_errors
from nextword.training.launch import RunContext
from nextword.training.losses import LossFn, LossModule
from nextword.training.optimizer import Optimizer
from nextword.training.parallel import load_weights_, parallelize
from nextword.training.step import (
    Dataset,
    StepKind,
    StepSettings,
    TrainState,
    build_loss_module,
    fit_micro_batch_rows,
    should_compile,
    time_step,
    try_compile,
)

OTHER_FILES_BYTES = 2**22  # metrics, samples, tokenizer, report

RunConfig = Recipe | FinetuneRecipe


@dataclass
class BestCheckpoint:
    """The best validation so far; stored in checkpoints.

    Attributes:
        score: Its score.
        step: Its step.
        since: Number of validations after it.
    """

    score: float | None = None
    step: int = 0
    since: int = 0


@dataclass
class TrainingSetup:
    """What the trainer needs on this machine.

    Attributes:
        state: Model, optimizer and counters; in a distributed run, this rank's shards.
        dataset: The batches, by index.
        step_module: Computes the losses of a micro-batch.
        eager_step: The same without compilation.
        step_settings: Seed, clipping, schedule, micro-batch size and precision of a step.
        seconds_per_step: Estimated or measured time of a step; 0 if not known.
        best: The best validation so far.
        stopped_early: Whether early stopping has ended the run.
    """

    state: TrainState
    dataset: Dataset
    step_module: nn.Module
    eager_step: LossModule
    step_settings: StepSettings
    seconds_per_step: float
    best: BestCheckpoint = field(default_factory=BestCheckpoint)
    stopped_early: bool = False

    def restore(self, path: Path, dist: DistContext) -> None:
        """Restore weights, optimizer and counters from a checkpoint. In a distributed run each rank reads its shards."""
        weights, optimizer = checkpoint.load(path, dict(self.state.model.named_parameters()))
        load_weights_(self.state.model, weights.items(), dist)
        self.state.optimizer.load_state_tensors(optimizer)
        saved = checkpoint.load_metadata(path)
        self.state.step, self.state.tokens = saved["step"], saved["tokens"]
        self.state.nonfinite_streak, self.state.num_rollbacks = saved["bad"], saved.get("detours", 0)
        self.best, self.stopped_early = BestCheckpoint(**saved["best"]), saved["stopped"]


def new_metadata(
    run: RunContext, config: RunConfig, model_config: ModelConfig, seed: int, **specific: Any
) -> dict[str, Any]:
    """Return the content of run.json for a new run. "fixed" is what the run keeps when it is resumed."""
    return {
        "command": " ".join(command_line()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
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
    dist, device, fixed, training = run.dist, run.device, metadata["fixed"], config.training
    is_resume = "step_kind" in fixed
    with require_disk_space(run, model), translate_dist_errors():
        if dist.is_main:
            run.start_workers(metadata)
        has_full_weights = dist.world_size == 1 or (training.parallel == "fsdp-no-reshard" and dist.tp_size == 1)
        can_fuse = has_full_weights and model.supports_kernels(device)
        step_kind: StepKind = "fused" if can_fuse and not training.checkpoint_activations else "plain"
        if training.compile == "yes":
            step_kind = "plain"
        if is_resume:
            step_kind = fixed["step_kind"]
            if step_kind == "fused" and not can_fuse:
                reason = (
                    load_native_library(ops.SOURCE)[1] if has_full_weights else "no process holds all weights at once"
                )
                run.warn(
                    f"the run started with fused kernels, which are not available here ({reason}): {ROUNDING_NOTE}"
                )
                step_kind = "plain"
        settings = StepSettings(
            seed=metadata["seed"],
            max_grad_norm=training.clip,
            schedule=training.schedule,
            warmup=training.warmup,
            final_lr=training.final_lr,
            bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        )
        eager_step, step_module = build_loss_module(
            model, loss_fn, "fused" if step_kind == "fused" else "plain", training.checkpoint_activations
        )
        on_meta = model.token_embedding.weight.is_meta
        if dist.world_size > 1:
            run.dist = dist = parallelize(dist, eager_step, training.parallel, bf16=settings.bf16, device=device)
        elif on_meta:
            model.to_empty(device=device)
            model.init_buffers()
        state = TrainState(model, build_optimizer(model, training, dist))
        setup = TrainingSetup(state, dataset, step_module, eager_step, settings, seconds_per_step)
        if run.checkpoint is not None:
            setup.restore(run.checkpoint, dist)
        elif init_weights is not None and on_meta:
            load_weights_(model, init_weights(), dist)
        if is_resume:
            setup.step_settings = replace(settings, micro_batch_rows=fixed["micro_batch_rows"])
        else:
            step_kind = autotune(run, setup, config, step_kind, dynamic_shapes)
        if step_kind == "compiled":
            step_kind = compile_step(run, setup)
        if is_resume:
            if dist.is_main:
                run.seconds_before_resume = run.run_dir.truncate_metrics(state.step)
            setup.seconds_per_step = measure_step(run, setup, setup.step_module)
            run.info(f"resuming from step {state.step:,}, after {format_duration(run.seconds_before_resume)}")
        else:
            rows = setup.step_settings.micro_batch_rows
            metadata["fixed"] = {**fixed, "micro_batch_rows": rows, "step_kind": step_kind}
            if dist.is_main:
                run.run_dir.write_metadata(metadata)
                fs.atomic_write(run.run_dir.metrics_path, "")
        yield setup


@contextmanager
def require_disk_space(run: RunContext, model: GPT) -> Generator[None, None, None]:
    """Require room for the checkpoints, one more being written and one being uploaded, the model and its replacement.

    A checkpoint holds the trainable weights and at most two optimizer tensors for each.
    """
    trainable_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    model_bytes = sum(4 * p.numel() for p in model.parameters())
    num_checkpoints = checkpoint.MAX_TO_KEEP + 1 + (run.uploader is not None)
    peak_bytes = num_checkpoints * 3 * trainable_bytes + 2 * model_bytes + OTHER_FILES_BYTES
    used = fs.directory_size(run.run_dir.path / "checkpoints", run.run_dir.model_dir)
    with fs.require_free_space(run.run_dir.path, max(0, peak_bytes - used), check_now=run.dist.is_main):
        yield


def build_optimizer(model: GPT, config: TrainingConfig, dist: DistContext) -> Optimizer:
    """The optimizer of a training configuration."""
    assert config.lr is not None, "the learning rate is chosen before the run starts"
    return Optimizer(
        model,
        kind=config.optimizer,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        ctx=dist,
    )


def measure_step(run: RunContext, setup: TrainingSetup, step_module: nn.Module) -> float:
    """Seconds of a step without the optimizer."""
    return time_step(setup.state, step_module, setup.dataset, setup.step_settings, run.dist)


def autotune(
    run: RunContext, setup: TrainingSetup, config: RunConfig, step_kind: StepKind, dynamic_shapes: bool
) -> StepKind:
    """Choose the micro-batch and whether to compile, for all ranks. Returns the kind of step."""
    dist = run.dist
    rows = config.training.micro_batch_rows or fit_micro_batch_rows(
        setup.eager_step, setup.dataset, setup.step_settings, dist
    )
    smallest = -int(dist.all_reduce_max([-rows])[0])
    setup.step_settings = replace(setup.step_settings, micro_batch_rows=smallest)
    estimate: float = dist.broadcast_object(setup.seconds_per_step)
    setup.seconds_per_step = estimate or measure_step(run, setup, setup.eager_step)
    if step_kind == "plain" and run.device.type == "cpu" and (reason := load_native_library(ops.SOURCE)[1]):
        run.info(f"training with PyTorch operations instead of fused kernels: {reason}")
    if config.training.compile == "yes":
        step_kind = "compiled"
    elif config.training.compile == "auto" and step_kind == "plain" and not dynamic_shapes:
        run_seconds = config.budget
        if run_seconds is None:
            run_seconds = (config.steps or 0) * setup.seconds_per_step
        compile_pays, reason = should_compile(run.device, run_seconds)
        step_kind = "compiled" if compile_pays else "plain"
        run.info(reason)
    return dist.broadcast_object(step_kind)


def compile_step(run: RunContext, setup: TrainingSetup) -> StepKind:
    """Compile the step. If `torch.compile` fails here, warn and keep the eager one. Returns the kind of step."""
    setup.step_module = torch.compile(setup.eager_step)  # pyright: ignore[reportAttributeAccessIssue]  # a module
    error = try_compile(setup.state, setup.step_module, setup.dataset, setup.step_settings, run.dist)
    if not error:
        return "compiled"
    run.warn(f"training with PyTorch operations, because torch.compile fails here: {error}")
    setup.step_module = setup.eager_step
    return "plain"
