"""The training step, and what a run measures before its first one.

Batch, learning rate and dropout are computed from (seed, step). The state is the step, the weights and the optimizer. The
trainer evaluates and saves between two steps.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nextword.data.dataset import Batch, TokenArray, derive_seed, segment_positions
from nextword.model.gpt import GPT, sample_dropout_masks
from nextword.training import checkpoint
from nextword.training.config import TrainingConfig
from nextword.training.distributed import SINGLE_PROCESS, DistContext
from nextword.training.losses import DeviceBatch, LabelTensors, LossModule, LossTerm
from nextword.training.optimizer import Optimizer, lr_multiplier
from nextword.training.parallel import clip_grad_norm_, load_weights_, set_grad_sync, to_local

MAX_NONFINITE_STEPS = 5


@dataclass
class BestCheckpoint:
    """The validation whose weights are kept, and the state of early stopping.

    Attributes:
        score: its score.
        loss: its loss.
        step: its step.
        highest_score: the highest score of all validations.
        lowest_loss: the lowest loss of all validations.
        last_improvement: the step of the last validation with a new highest score or lowest loss.
        validations_without_improvement: the number of validations after that.
    """

    score: float | None = None
    loss: float | None = None
    step: int = 0
    highest_score: float | None = None
    lowest_loss: float | None = None
    last_improvement: int = 0
    validations_without_improvement: int = 0

    def update(self, step: int, score: float, loss: float, standard_error: float = 0.0) -> bool:
        """Take a validation into account.

        With a standard error, the latest weights are kept whose score is within one standard error of the highest (Breiman et
        al. 1984, "Classification and regression trees", section 3.4.3): the learning rate decays to the end of a run, and few
        examples do not tell later weights from earlier ones. Otherwise the highest score decides, among equal ones the lowest
        loss.

        Args:
            step: the step of the validation.
            score: its score; higher is better.
            loss: its loss.
            standard_error: that of the score.

        Returns:
            Whether its weights are kept.
        """
        self.validations_without_improvement += 1
        if not (math.isfinite(score) and math.isfinite(loss)):
            return False
        is_higher = self.highest_score is None or score > self.highest_score
        is_lower = self.lowest_loss is None or loss < self.lowest_loss
        if is_higher or is_lower:
            self.last_improvement, self.validations_without_improvement = step, 0
        self.highest_score = score if self.highest_score is None else max(score, self.highest_score)
        self.lowest_loss = loss if self.lowest_loss is None else min(loss, self.lowest_loss)
        if self.score is None or standard_error > 0:
            is_kept = score >= self.highest_score - standard_error
        else:
            is_kept = (score, -loss) > (self.score, -math.inf if self.loss is None else -self.loss)
        if is_kept:
            self.score, self.loss, self.step = score, loss, step
        return is_kept


@dataclass
class TrainState:
    """What changes during training.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        step: the number of finished steps.
        tokens: the number of tokens trained on.
        nonfinite_streak: the number of consecutive steps skipped up to now because their loss was not finite.
        num_rollbacks: how often the run was rolled back after a loss spike.
        best: the best validation so far.
        stopped_early: whether early stopping has ended the run.
    """

    model: GPT
    optimizer: Optimizer
    step: int = 0
    tokens: int = 0
    nonfinite_streak: int = 0
    num_rollbacks: int = 0
    best: BestCheckpoint = field(default_factory=BestCheckpoint)
    stopped_early: bool = False

    def counters(self) -> dict[str, Any]:
        """All but the tensors, as a checkpoint stores it."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "bad": self.nonfinite_streak,
            "detours": self.num_rollbacks,
            "best": asdict(self.best),
            "stopped": self.stopped_early,
        }

    def set_counters(self, saved: dict[str, Any]) -> None:
        """Restore the `counters()` of an earlier state."""
        self.step, self.tokens = saved["step"], saved["tokens"]
        self.nonfinite_streak, self.num_rollbacks = saved["bad"], saved.get("detours", 0)
        best, self.stopped_early = dict(saved["best"]), saved["stopped"]
        if "since" in best:  # of an earlier version
            best["validations_without_improvement"], best["highest_score"] = best.pop("since"), best["score"]
        self.best = BestCheckpoint(**best)

    def restore(self, path: Path, ctx: DistContext = SINGLE_PROCESS) -> None:
        """Restore weights, optimizer and counters from a checkpoint. In a distributed run each rank reads its shards."""
        weights, optimizer_state = checkpoint.load(path, dict(self.model.named_parameters()))
        load_weights_(self.model, weights.items(), ctx)
        self.optimizer.load_state_tensors(optimizer_state)
        self.set_counters(checkpoint.load_metadata(path))


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
        config: the learning rate schedule and the clipping of gradients.
        seed: the seed of dropout.
        micro_batch_rows: rows per forward pass.
        bf16: whether matrix products are in bfloat16.
    """

    config: TrainingConfig
    seed: int = 0
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

    def to_tensor(array: TokenArray | None) -> Any:
        return None if array is None else torch.as_tensor(array, device=device)

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


def micro_batch_loss(loss_module: nn.Module, model: GPT, micro_batch: Batch, settings: StepSettings) -> Tensor:
    """The part of the loss that comes from a micro-batch."""
    with autocast(model.token_embedding.weight.device, settings.bf16):
        loss_terms = loss_module(to_device(micro_batch, model, settings.seed))
    return normalize_loss(loss_terms, micro_batch.loss_denominators)


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
    model, config = state.model, settings.config
    total_loss = torch.zeros((), device=model.token_embedding.weight.device)
    micro_batches = batch.split_micro_batches(settings.micro_batch_rows)
    for number, micro_batch in enumerate(micro_batches, start=1):
        set_grad_sync(ctx, loss_module, number == len(micro_batches))
        loss = micro_batch_loss(loss_module, model, micro_batch, settings)
        torch.autograd.backward(loss)
        total_loss += loss.detach()
    gradient_norm = float(clip_grad_norm_(model, config.clip or math.inf, ctx))
    loss_value = float(ctx.all_reduce_sum(total_loss))
    is_finite = math.isfinite(loss_value) and math.isfinite(gradient_norm)
    lr_scale = lr_multiplier(progress, config.schedule, config.warmup, config.final_lr)
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
    for name, share in {"SC_AVPHYS_PAGES": 1.0, "SC_PHYS_PAGES": 0.5}.items():
        if name in getattr(os, "sysconf_names", ()):
            return int(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") * share)
    return 4 * 2**30


def activation_bytes_per_row(loss_module: LossModule, dataset: Dataset, settings: StepSettings) -> int:
    """The memory that a row (for labeled data, an example) takes in a training step, in bytes.

    Measured on the first row and extrapolated to the longest one: twice what is saved for the backward pass, to account for
    the gradients.
    """
    model, saved_storages = loss_module.model, dict[int, torch.UntypedStorage]()

    def record_storage(tensor: Tensor) -> Tensor:
        storage = to_local(tensor).untyped_storage()
        saved_storages[storage.data_ptr()] = storage
        return tensor

    row = dataset.batch(0).split_micro_batches(1)[0]
    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        micro_batch_loss(loss_module, model, row, settings)
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
    batch, model = dataset.batch(state.step, ctx.dp_rank, ctx.dp_size), state.model

    def forward_and_backward() -> None:
        for micro_batch in batch.split_micro_batches(settings.micro_batch_rows):
            torch.autograd.backward(micro_batch_loss(loss_module, model, micro_batch, settings))
        model.zero_grad(set_to_none=True)

    return fastest_seconds(forward_and_backward, model.token_embedding.weight.device, repeats=3)


def fastest_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of some repeats, because other programs may use the machine."""
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
