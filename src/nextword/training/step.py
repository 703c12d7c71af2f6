"""The training step and the training loop, and what a run measures before its first step.

Batch, learning rate and dropout are computed from (seed, step). The state is the step, the weights and the optimizer. The
trainer evaluates and saves between two steps.
"""

import contextlib
import math
import os
import shutil
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nextword.data.dataset import Batch, derive_seed, segment_positions
from nextword.model.gpt import GPT, sample_dropout_masks
from nextword.training.distributed import SINGLE_PROCESS, DistContext
from nextword.training.losses import DeviceBatch, LabelTensors, LossFn, LossModule, LossTerm
from nextword.training.optimizer import LRSchedule, Optimizer, lr_multiplier
from nextword.training.parallel import clip_grad_norm_, set_grad_sync, to_local

# "plain": PyTorch's eager operators. "fused": the compiled CPU kernels of `model.ops`. "compiled": torch.compile.
StepKind = Literal["plain", "fused", "compiled"]
MAX_NONFINITE_STEPS = 5


@dataclass
class TrainState:
    """What changes during training.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        step: the number of finished steps.
        tokens: the number of tokens trained on.
        nonfinite_streak: the number of last steps that were skipped because their loss was not finite.
        num_rollbacks: how often the run was rolled back after a loss spike.
    """

    model: GPT
    optimizer: Optimizer
    step: int = 0
    tokens: int = 0
    nonfinite_streak: int = 0
    num_rollbacks: int = 0

    def to_dict(self) -> dict[str, int]:
        """The counters, as a checkpoint stores them."""
        return {"step": self.step, "tokens": self.tokens, "bad": self.nonfinite_streak, "detours": self.num_rollbacks}


@dataclass(frozen=True)
class StepMetrics:
    """The result of a step.

    Attributes:
        step: the number of the step, from 1.
        loss: nats per token, before the update.
        lr: the learning rate of the update.
        gradient_norm: the global norm before clipping.
        tokens: the tokens trained on so far.
        skipped: whether the update was skipped because loss or gradient were not finite.
        progress: the fraction of the run that is done.
    """

    step: int
    loss: float
    lr: float
    gradient_norm: float
    tokens: int
    skipped: bool
    progress: float


@dataclass(frozen=True)
class StepSettings:
    """The settings of a step.

    Attributes:
        seed: the seed of dropout.
        max_grad_norm: the norm that gradients are clipped to; 0 for no clipping.
        schedule: the learning rate schedule, with `warmup` and `final_lr` as fractions of the run and of the peak.
        micro_batch_rows: rows per forward pass.
        bf16: whether matrix products are in bfloat16.
    """

    seed: int = 0
    max_grad_norm: float = 1.0
    schedule: LRSchedule = "cosine"
    warmup: float = 0.05
    final_lr: float = 0.1
    micro_batch_rows: int = 2**30
    bf16: bool = False


class Dataset(Protocol):
    """Training data, addressed by step."""

    @property
    def max_length(self) -> int:
        """The tokens of the longest row."""
        ...

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The part of a step's batch that one of `world_size` ranks trains on."""
        ...


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[object]:
    """Matrix products in bfloat16 if `bf16`; the weights stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def to_device(batch: Batch, model: GPT, seed: int) -> DeviceBatch:
    """A micro-batch on the model's device, with its dropout masks."""
    device = model.token_embedding.weight.device
    row_seeds = [derive_seed(seed, 2, row) for row in batch.row_ids]

    def to_tensor(array: np.ndarray | None) -> Any:
        return None if array is None else torch.from_numpy(array).to(device)

    labels, positions = None, None
    if batch.labels is not None:
        labels = LabelTensors(*(to_tensor(getattr(batch.labels, name)) for name in LabelTensors._fields))
    if batch.segment_ids is not None:
        positions = to_tensor(segment_positions(batch.segment_ids))
    return DeviceBatch(
        tokens=to_tensor(batch.tokens),
        targets=to_tensor(batch.targets),
        dropout_masks=sample_dropout_masks(model.config, row_seeds, batch.tokens.shape[1], device),
        segments=to_tensor(batch.segment_ids),
        positions=positions,
        labels=labels,
    )


def normalize_loss(loss_terms: dict[str, LossTerm], counts: dict[str, float]) -> Tensor:
    """The weighted sum of the loss terms, each divided by its count over the global batch."""
    terms = [term.weight * term.total / max(counts[name], 1e-9) for name, term in loss_terms.items()]
    return torch.stack(terms).sum()


def micro_batch_loss(
    loss_module: nn.Module, model: GPT, micro_batch: Batch, counts: dict[str, float], settings: StepSettings
) -> Tensor:
    """The part of the loss that comes from a micro-batch."""
    with autocast(model.token_embedding.weight.device, settings.bf16):
        loss_terms = loss_module(to_device(micro_batch, model, settings.seed))
    return normalize_loss(loss_terms, counts)


def train_step(
    state: TrainState,
    loss_module: nn.Module,
    batch: Batch,
    settings: StepSettings,
    progress: float,
    ctx: DistContext = SINGLE_PROCESS,
) -> StepMetrics:
    """One optimizer step: gradient accumulation over micro-batches and processes, clipping, update.

    If the loss or the gradient is not finite, weights and optimizer stay unchanged in every process.

    Args:
        state: changed in place.
        loss_module: the model with its loss, perhaps compiled.
        batch: this process's part of the batch, with the counts of the global batch.
        settings: the settings.
        progress: the fraction of the run that is done after this step, for the learning rate.
        ctx: the processes.
    """
    model = state.model
    total_loss = torch.zeros((), device=model.token_embedding.weight.device)
    micro_batches = batch.split_micro_batches(settings.micro_batch_rows)
    for number, micro_batch in enumerate(micro_batches, start=1):
        set_grad_sync(ctx, loss_module, number == len(micro_batches))
        loss = micro_batch_loss(loss_module, model, micro_batch, batch.loss_denominators, settings)
        loss.backward()
        total_loss += loss.detach()
    gradient_norm = float(clip_grad_norm_(model, settings.max_grad_norm or math.inf, ctx))
    loss_value = float(ctx.all_reduce_sum(total_loss))
    is_finite = math.isfinite(loss_value) and math.isfinite(gradient_norm)
    lr_scale = lr_multiplier(progress, settings.schedule, settings.warmup, settings.final_lr)
    if is_finite:
        state.optimizer.step(lr_scale)
    model.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += batch.n_tokens
    state.nonfinite_streak = 0 if is_finite else state.nonfinite_streak + 1
    return StepMetrics(
        step=state.step,
        loss=loss_value,
        lr=state.optimizer.lr * lr_scale,
        gradient_norm=gradient_norm,
        tokens=state.tokens,
        skipped=not is_finite,
        progress=progress,
    )


# ---------------------------------------------------------------- before the first step


def available_memory(device: torch.device) -> int:
    """The available memory in bytes, as reported by the GPU or the system; 4 GiB if nothing is reported."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for name, share in (("SC_AVPHYS_PAGES", 1.0), ("SC_PHYS_PAGES", 0.5)):
        if hasattr(os, "sysconf") and name in os.sysconf_names:
            return int(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") * share)
    return 4 * 2**30


def activation_bytes_per_row(loss_module: LossModule, dataset: Dataset, settings: StepSettings) -> int:
    """The memory that a row (for labelled data, an example) takes in a training step, in bytes.

    Measured on the first row and extrapolated to the longest one: twice what is saved for the backward pass, to account for
    the gradients.
    """
    model, saved_storages = loss_module.model, dict[int, torch.UntypedStorage]()

    def record_storage(tensor: Tensor) -> Tensor:
        storage = to_local(tensor).untyped_storage()
        saved_storages[storage._cdata] = storage
        return tensor

    row = dataset.batch(0).split_micro_batches(1)[0]
    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        micro_batch_loss(loss_module, model, row, row.loss_denominators, settings)
    # Gathered weights of blocks are resharded by now: their storage has no bytes.
    weights = {to_local(p).untyped_storage().data_ptr() for p in model.parameters()}
    saved_bytes = sum(storage.nbytes() for storage in saved_storages.values() if storage.data_ptr() not in weights)
    return math.ceil(2 * saved_bytes * dataset.max_length / row.tokens.size)


def training_state_bytes(model: GPT, ctx: DistContext = SINGLE_PROCESS) -> int:
    """The memory that does not depend on the batch, in bytes: weights, gradients and moments.

    In a distributed run these are the local shards, and the weights and gradients that are gathered at the same time: all of
    them, or those of two blocks.
    """
    local_bytes = sum((16 if p.requires_grad else 4) * to_local(p).numel() for p in model.parameters())
    if ctx.world_size == 1:
        return local_bytes
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    non_block_parameters = sum(p.numel() for p in model.parameters()) - blocks
    gathered = non_block_parameters + (2 * blocks // model.config.n_layers if ctx.fsdp_per_block else blocks)
    return local_bytes + 8 * gathered // ctx.tp_size


def fit_micro_batch_rows(
    loss_module: LossModule, dataset: Dataset, settings: StepSettings, ctx: DistContext = SINGLE_PROCESS
) -> int:
    """The rows per forward pass that fit in half of the free memory, so that the micro-batches of a step are equal.

    On a CPU the processes of a machine share its memory.
    """
    model = loss_module.model
    device = model.token_embedding.weight.device
    processes_sharing_memory = ctx.local_world_size if device.type == "cpu" else 1
    free_bytes = 0.5 * available_memory(device) / processes_sharing_memory - training_state_bytes(model, ctx)
    batch_rows = len(dataset.batch(0, ctx.dp_rank, ctx.dp_size).row_ids)
    bytes_per_row = max(1, activation_bytes_per_row(loss_module, dataset, settings))
    rows = max(1, min(batch_rows, int(free_bytes / bytes_per_row)))
    return -(-batch_rows // -(-batch_rows // rows))


def time_step(
    state: TrainState,
    loss_module: nn.Module,
    dataset: Dataset,
    settings: StepSettings,
    ctx: DistContext = SINGLE_PROCESS,
) -> float:
    """Seconds of forward and backward pass of a step, the fastest of three. All processes call this together."""
    batch, model, seconds = dataset.batch(state.step, ctx.dp_rank, ctx.dp_size), state.model, []
    device = model.token_embedding.weight.device
    for _ in range(3):
        start = time.perf_counter()
        for micro_batch in batch.split_micro_batches(settings.micro_batch_rows):
            micro_batch_loss(loss_module, model, micro_batch, batch.loss_denominators, settings).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return min(seconds)


def should_compile(device: torch.device, run_seconds: float) -> tuple[bool, str]:
    """Whether `torch.compile` pays off in a run of `run_seconds`, and the reason in words."""
    if device.type == "mps":
        return False, "not compiled: torch.compile is experimental on this device"
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return False, "not compiled: no C++ compiler was found (with one, long runs are faster)"
    # A cold compilation takes 35 to 45 s on two cores and makes steps a tenth faster there; a GPU gains far more.
    min_run_seconds = 60.0 if device.type == "cuda" else 900.0
    if run_seconds < min_run_seconds:
        return False, f"not compiled: in a run of {run_seconds:.0f} s the compilation would take longer than it saves"
    return True, "compiled: the first step takes about a minute"


def try_compile(
    state: TrainState,
    compiled_module: nn.Module,
    dataset: Dataset,
    settings: StepSettings,
    ctx: DistContext = SINGLE_PROCESS,
) -> str:
    """Compile by running a micro-batch, whose gradients are dropped. Returns the error in one line, or ""."""
    from torch._dynamo.exc import TorchDynamoException  # the base of all compilation errors

    batch, model = dataset.batch(state.step, ctx.dp_rank, ctx.dp_size), state.model
    micro_batch = batch.split_micro_batches(settings.micro_batch_rows)[0]
    try:
        micro_batch_loss(compiled_module, model, micro_batch, batch.loss_denominators, settings).backward()
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:2]) or type(error).__name__
    finally:
        model.zero_grad(set_to_none=True)
    return ""


def build_loss_module(
    model: GPT, loss_fn: LossFn, kind: StepKind, activation_checkpointing: bool = False
) -> tuple[LossModule, nn.Module]:
    """The model with its loss, and the module that training runs: the same one, or compiled.

    Args:
        model: the model.
        loss_fn: the loss.
        kind: the implementation of a step.
        activation_checkpointing: whether the backward pass recomputes each block's activations.
    """
    model.set_activation_checkpointing(activation_checkpointing)
    loss_module = LossModule(model, loss_fn, kernels=kind == "fused")
    compiled_module = torch.compile(loss_module) if kind == "compiled" else loss_module
    assert isinstance(compiled_module, nn.Module)
    return loss_module, compiled_module
