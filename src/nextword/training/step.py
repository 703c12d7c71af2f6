"""One step of training, then the loop.

Batch, learning rate and dropout are computed from (seed, step); what is left as state is the step, the weights and the
optimizer. A caller iterates over `steps`, and shows, evaluates and saves between two of them.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nextword.common.errors import TrainingDivergedError
from nextword.data.dataset import Batch, derive_seed, segment_positions
from nextword.model.gpt import GPT, sample_dropout_masks
from nextword.training.distributed import SINGLE_PROCESS, DistContext
from nextword.training.losses import DeviceBatch, LabelTensors, LossFn, LossModule, LossTerm
from nextword.training.optimizer import LRSchedule, Optimizer, lr_multiplier
from nextword.training.parallel import clip_grad_norm_, set_grad_sync, to_local
from nextword.training.step_budget import DistributedTimeBudgetController, StepSchedule, TimeBudgetController

# How a step's operations are done: PyTorch's one by one; with our own compiled parts (see `fused`); by torch.compile.
StepKind = Literal["plain", "fused", "compiled"]
MAX_NONFINITE_STEPS = 5  # so many losses that are no number, one after the other, end a run


@dataclass
class TrainState:
    """All that changes in training; `step` is how many steps are done, `bad` how many of the last ones were skipped,
    `detours` how many times the run has turned back to go past some batches."""

    model: GPT
    optimizer: Optimizer
    step: int = 0
    tokens: int = 0
    nonfinite_streak: int = 0
    num_rollbacks: int = 0

    def to_dict(self) -> dict[str, int]:
        return {"step": self.step, "tokens": self.tokens, "bad": self.nonfinite_streak, "detours": self.num_rollbacks}


@dataclass(frozen=True)
class StepMetrics:
    """What one step did. Loss in nats per token before the step's update, gradient norm before clipping."""

    step: int
    loss: float
    lr: float
    gradient_norm: float
    tokens: int
    skipped: bool
    progress: float


@dataclass(frozen=True)
class StepSettings:
    """What a step needs beside state and data. `seed` is for dropout; rows are windows of the batch."""

    seed: int = 0
    max_grad_norm: float = 1.0
    schedule: LRSchedule = "cosine"
    warmup: float = 0.05
    final_lr: float = 0.1
    micro_batch_rows: int = 2**30
    bf16: bool = False


class Dataset(Protocol):
    @property
    def max_length(self) -> int: ...  # tokens of the longest row
    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch: ...


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[object]:
    """bfloat16 for the products on a GPU, float32 weights everywhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def to_device(batch: Batch, model: GPT, seed: int) -> DeviceBatch:
    """A micro-batch on the model's device, with its dropout masks."""
    device = model.token_embedding.weight.device
    masks = sample_dropout_masks(
        model.config, [derive_seed(seed, 2, row) for row in batch.row_ids], batch.tokens.shape[1], device
    )

    def to_tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array).to(device)

    labels = None
    if batch.labels is not None:
        labels = LabelTensors(*(to_tensor(getattr(batch.labels, name)) for name in LabelTensors._fields))  # pyright: ignore[reportArgumentType]
    positions = None if batch.segment_ids is None else torch.from_numpy(segment_positions(batch.segment_ids)).to(device)
    tokens, targets = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.targets).to(device)
    return DeviceBatch(tokens, targets, masks, to_tensor(batch.segment_ids), positions, labels)


def normalize_loss(loss_terms: dict[str, LossTerm], counts: dict[str, float]) -> Tensor:
    """Σ weight · sum / count: each term divided once, by its count over the whole batch of the step."""
    return torch.stack([loss.weight * loss.total / max(counts[name], 1e-9) for name, loss in loss_terms.items()]).sum()


def train_step(
    state: TrainState,
    loss_module: nn.Module,
    batch: Batch,
    settings: StepSettings,
    progress: float,
    world: DistContext = SINGLE_PROCESS,
) -> StepMetrics:
    """Gradients over all micro-batches and processes, each term divided once by its global count; clipped; applied at the
    step's rate.

    Where the loss or the gradient is not finite the weights and the optimizer stay as they were, in every process.
    """
    model = state.model
    device = model.token_embedding.weight.device
    total = torch.zeros((), device=device)
    micro_batches = batch.split_micro_batches(settings.micro_batch_rows)
    for number, micro_batch in enumerate(micro_batches, start=1):
        set_grad_sync(loss_module, model, number < len(micro_batches))
        with autocast(device, settings.bf16):
            loss_terms = loss_module(to_device(micro_batch, model, settings.seed))
        normalized_loss = normalize_loss(loss_terms, batch.loss_denominators)
        normalized_loss.backward()
        total += normalized_loss.detach()
    gradient_norm = float(
        clip_grad_norm_(model, settings.max_grad_norm if settings.max_grad_norm > 0 else math.inf, world)
    )
    loss = float(world.all_reduce_sum(total))
    finite = math.isfinite(loss) and math.isfinite(gradient_norm)
    lr_scale = lr_multiplier(progress, settings.schedule, settings.warmup, settings.final_lr)
    if finite:
        state.optimizer.step(lr_scale)
    model.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += batch.n_tokens
    state.nonfinite_streak = 0 if finite else state.nonfinite_streak + 1
    return StepMetrics(
        step=state.step,
        loss=loss,
        lr=state.optimizer.lr * lr_scale,
        gradient_norm=gradient_norm,
        tokens=state.tokens,
        skipped=not finite,
        progress=progress,
    )


def training_steps(
    state: TrainState,
    dataset: Dataset,
    loss_module: nn.Module,
    settings: StepSettings,
    step_schedule: StepSchedule,
    budget_controller: TimeBudgetController | DistributedTimeBudgetController | None = None,
    seconds_per_step: float = 0.0,
    world: DistContext = SINGLE_PROCESS,
    batch_index: Callable[[int], int] = int,
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[StepMetrics]:
    """Train from where `state` is to the end of the pace. What the caller does between two steps counts on the clock. A caller
    may set the state back between two steps, and it goes on from there.

    Args:
        index_of: the batch that a step takes; the batch of its own number where no detour is taken.
        seconds_per_step: a first guess, for a run that follows the clock.
        now: reads the time, in seconds.

    Raises:
        Diverged: the loss was not finite for several steps in a row. None of them reached the weights.
    """
    times = [now()]
    while not step_schedule.decisions or state.step < step_schedule.total_steps:
        if budget_controller is not None:
            if len(times) > 4:  # the younger half of this process's steps, evaluations and saves between them included
                half = len(times) // 2
                seconds_per_step = max(1e-9, (times[-1] - times[half]) / (len(times) - 1 - half))
            budget_controller.update(step_schedule, state.step, seconds_per_step)
        batch = dataset.batch(batch_index(state.step), world.dp_rank, world.dp_size)
        yield train_step(state, loss_module, batch, settings, step_schedule.progress(state.step), world)
        if state.nonfinite_streak >= MAX_NONFINITE_STEPS:
            raise TrainingDivergedError(
                f"the loss was not a finite number in {state.nonfinite_streak} steps in a row, the last of them step {state.step}. "
                "None of them reached the weights. A lower --training.lr or a longer --training.warmup may help."
            )
        times.append(now())


# ---------------------------------------------------------------- what a run fixes once, at its start


def available_memory(device: torch.device) -> int:
    """Bytes that may be used, by what the device or the system says; 4 GiB where it says nothing."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for name, share in (("SC_AVPHYS_PAGES", 1.0), ("SC_PHYS_PAGES", 0.5)):
        if hasattr(os, "sysconf") and name in os.sysconf_names:
            return int(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") * share)
    return 4 * 2**30


def activation_bytes_per_row(loss_module: LossModule, dataset: Dataset, settings: StepSettings) -> int:
    """What one row (of labelled data, one example) takes in training: twice what is kept for the backward pass, once more
    for the gradients. One is taken through the model, and its bytes are taken to be those of the longest."""
    model = loss_module.model
    saved_storages: dict[int, torch.UntypedStorage] = {}

    def record_storage(tensor: Tensor) -> Tensor:
        storage = to_local(tensor).untyped_storage()
        saved_storages[storage._cdata] = storage
        return tensor

    device = model.token_embedding.weight.device
    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda t: t), autocast(device, settings.bf16):
        first = dataset.batch(0).split_micro_batches(1)[0]
        loss_module(to_device(first, model, settings.seed))
    # What was gathered of a shared block is given back by now: its storage is there, with no bytes.
    weights = {to_local(p).untyped_storage().data_ptr() for p in model.parameters()}
    per_row = 2 * sum(storage.nbytes() for storage in saved_storages.values() if storage.data_ptr() not in weights)
    return math.ceil(per_row * dataset.max_length / first.tokens.size)


def training_state_bytes(model: GPT, world: DistContext = SINGLE_PROCESS) -> int:
    """Weights, and of what is trained gradients and two averages: they are there whatever the batch. In company a part of them,
    and of what a step gathers, weights and gradients: all blocks or two of them, or a slice of these, and what is in none."""
    local_bytes = sum((16 if p.requires_grad else 4) * to_local(p).numel() for p in model.parameters())
    if world.world_size == 1:
        return local_bytes
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    non_block_parameters = sum(p.numel() for p in model.parameters()) - blocks
    gathered = non_block_parameters + (2 * blocks // model.config.n_layers if world.fsdp_per_block else blocks)
    return local_bytes + 8 * gathered // world.tp_size


def fit_micro_batch_rows(
    loss_module: LossModule, dataset: Dataset, settings: StepSettings, world: DistContext = SINGLE_PROCESS
) -> int:
    """How many rows go through the model at once: as many as half of the free memory holds, in equal parts of the batch. On
    a CPU the processes of one machine have its memory together."""
    model = loss_module.model
    device = model.token_embedding.weight.device
    processes_sharing_memory = world.local_world_size if device.type == "cpu" else 1
    free_bytes = 0.5 * available_memory(device) / processes_sharing_memory - training_state_bytes(model, world)
    batch_rows = len(dataset.batch(0, world.dp_rank, world.dp_size).row_ids)
    rows = max(1, min(batch_rows, int(free_bytes / max(1, activation_bytes_per_row(loss_module, dataset, settings)))))
    return -(-batch_rows // -(-batch_rows // rows))


def time_step(
    state: TrainState,
    loss_module: nn.Module,
    dataset: Dataset,
    settings: StepSettings,
    world: DistContext = SINGLE_PROCESS,
) -> float:
    """Seconds of one step, measured on gradients that are thrown away; the fastest of three. All processes do it together."""
    batch = dataset.batch(state.step, world.dp_rank, world.dp_size)
    device = state.model.token_embedding.weight.device
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for micro_batch in batch.split_micro_batches(settings.micro_batch_rows):
            with autocast(device, settings.bf16):
                losses = loss_module(to_device(micro_batch, state.model, settings.seed))
            normalize_loss(losses, batch.loss_denominators).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - start)
        state.model.zero_grad(set_to_none=True)
    return seconds


def should_compile(device: torch.device, run_seconds: float) -> tuple[bool, str]:
    """Whether `torch.compile` pays for a run of about `seconds`, and why, in words for the person."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if device.type == "mps":
        return False, "not compiled: torch.compile is young on this kind of device"
    if compiler is None:
        return False, "not compiled: no C++ compiler was found (install one and long runs gain some speed)"
    # A cold compilation costs 35 to 45 s on two cores and saves about a tenth of a step there; a GPU gains far more.
    min_run_seconds = 60.0 if device.type == "cuda" else 900.0
    if run_seconds < min_run_seconds:
        return False, f"not compiled: a run of {run_seconds:.0f} s would not earn the compilation back"
    return True, "compiled: the first step takes about a minute"


def try_compile(
    state: TrainState,
    compiled_module: nn.Module,
    dataset: Dataset,
    settings: StepSettings,
    world: DistContext = SINGLE_PROCESS,
) -> str:
    """Why `torch.compile` does not manage a step here (its compiler may be broken, or old), in a line; nothing where it does.
    What it makes for one part of a batch, whose gradients are thrown away, the steps then use."""
    from torch._dynamo.exc import TorchDynamoException  # of all that fails on the way to compiled code

    batch = dataset.batch(state.step, world.dp_rank, world.dp_size)
    micro_batch = next(iter(batch.split_micro_batches(settings.micro_batch_rows)))
    try:
        with autocast(state.model.unembedding.device, settings.bf16):
            losses = compiled_module(to_device(micro_batch, state.model, settings.seed))
        normalize_loss(losses, batch.loss_denominators).backward()
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:2]) or type(error).__name__
    finally:
        state.model.zero_grad(set_to_none=True)
    return ""


def build_loss_module(
    model: GPT, loss_fn: LossFn, kind: StepKind, activation_checkpointing: bool = False
) -> tuple[LossModule, nn.Module]:
    """The model with its loss, as it is measured beforehand and as it is run; the same two where it is not compiled.

    With `recompute` each block's activations are made again in the backward pass, which a fused step knows nothing of.
    """
    for block in model.blocks:
        block.recompute = activation_checkpointing
    loss_module = LossModule(model, loss_fn, fused=kind == "fused")
    compiled_module = torch.compile(loss_module) if kind == "compiled" else loss_module
    assert isinstance(compiled_module, nn.Module)
    return loss_module, compiled_module
