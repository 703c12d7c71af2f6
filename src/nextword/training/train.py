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

from nextword.errors import Diverged
from nextword.model.gpt import GPT, dropout_masks
from nextword.text.batches import Batch, places, seed_for
from nextword.training.distributed import ALONE, World
from nextword.training.objectives import Inputs, LabelTensors, Loss, Objective, Step
from nextword.training.optimizer import Optimizer, Schedule, learning_rate
from nextword.training.pace import Clock, Pace, SharedClock
from nextword.training.sharing import accumulating, clip, part

# How a step's operations are done: PyTorch's one by one; with our own compiled parts (see `fused`); by torch.compile.
StepKind = Literal["plain", "fused", "compiled"]
BAD_STEPS_IN_A_ROW = 5  # so many losses that are no number, one after the other, end a run


@dataclass
class TrainState:
    """All that changes in training; `step` is how many steps are done, `bad` how many of the last ones were skipped,
    `detours` how many times the run has turned back to go past some batches."""

    model: GPT
    optimizer: Optimizer
    step: int = 0
    tokens: int = 0
    bad: int = 0
    detours: int = 0

    def facts(self) -> dict[str, int]:
        return {"step": self.step, "tokens": self.tokens, "bad": self.bad, "detours": self.detours}


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
    clip: float = 1.0
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    final_lr: float = 0.1
    micro_batch_rows: int = 2**30
    bf16: bool = False


class Dataset(Protocol):
    @property
    def longest(self) -> int: ...  # tokens of the longest row
    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch: ...


def precision(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[object]:
    """bfloat16 for the products on a GPU, float32 weights everywhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def to_inputs(batch: Batch, model: GPT, seed: int) -> Inputs:
    """A micro-batch on the model's device, with its dropout masks."""
    device = model.token_embedding.weight.device
    keep = dropout_masks(model.config, [seed_for(seed, 2, row) for row in batch.rows], batch.tokens.shape[1], device)

    def put(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array).to(device)

    labels = None
    if batch.labels is not None:
        labels = LabelTensors(*(put(getattr(batch.labels, name)) for name in LabelTensors._fields))  # pyright: ignore[reportArgumentType]
    positions = None if batch.segments is None else torch.from_numpy(places(batch.segments)).to(device)
    tokens, targets = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.targets).to(device)
    return Inputs(tokens, targets, keep, put(batch.segments), positions, labels)


def weigh(losses: dict[str, Loss], counts: dict[str, float]) -> Tensor:
    """Σ weight · sum / count: each term divided once, by its count over the whole batch of the step."""
    return torch.stack([loss.weight * loss.total / max(counts[name], 1e-9) for name, loss in losses.items()]).sum()


def train_step(
    state: TrainState,
    step_module: nn.Module,
    batch: Batch,
    settings: StepSettings,
    progress: float,
    world: World = ALONE,
) -> StepMetrics:
    """Gradients over all micro-batches and processes, each term divided once by its global count; clipped; applied at the
    step's rate.

    Where the loss or the gradient is not finite the weights and the optimizer stay as they were, in every process.
    """
    model = state.model
    device = model.token_embedding.weight.device
    total = torch.zeros((), device=device)
    micro_batches = batch.split(settings.micro_batch_rows)
    for number, micro_batch in enumerate(micro_batches, start=1):
        accumulating(step_module, model, number < len(micro_batches))
        with precision(device, settings.bf16):
            losses = step_module(to_inputs(micro_batch, model, settings.seed))
        weighed = weigh(losses, batch.counts)
        weighed.backward()
        total += weighed.detach()
    gradient_norm = float(clip(model, settings.clip if settings.clip > 0 else math.inf, world))
    loss = float(world.summed(total))
    finite = math.isfinite(loss) and math.isfinite(gradient_norm)
    factor = learning_rate(progress, settings.schedule, settings.warmup, settings.final_lr)
    if finite:
        state.optimizer.step(factor)
    model.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += batch.n_tokens
    state.bad = 0 if finite else state.bad + 1
    return StepMetrics(
        step=state.step,
        loss=loss,
        lr=state.optimizer.lr * factor,
        gradient_norm=gradient_norm,
        tokens=state.tokens,
        skipped=not finite,
        progress=progress,
    )


def steps(
    state: TrainState,
    dataset: Dataset,
    step_module: nn.Module,
    settings: StepSettings,
    pace: Pace,
    clock: Clock | SharedClock | None = None,
    seconds_per_step: float = 0.0,
    world: World = ALONE,
    index_of: Callable[[int], int] = int,
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
    while not pace.decisions or state.step < pace.total_steps:
        if clock is not None:
            if len(times) > 4:  # the younger half of this process's steps, evaluations and saves between them included
                half = len(times) // 2
                seconds_per_step = max(1e-9, (times[-1] - times[half]) / (len(times) - 1 - half))
            clock.decide(pace, state.step, seconds_per_step)
        batch = dataset.batch(index_of(state.step), world.data_rank, world.data_size)
        yield train_step(state, step_module, batch, settings, pace.progress(state.step), world)
        if state.bad >= BAD_STEPS_IN_A_ROW:
            raise Diverged(
                f"the loss was not a finite number in {state.bad} steps in a row, the last of them step {state.step}. "
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


def bytes_per_row(step_module: Step, dataset: Dataset, settings: StepSettings) -> int:
    """What one row (of labelled data, one example) takes in training: twice what is kept for the backward pass, once more
    for the gradients. One is taken through the model, and its bytes are taken to be those of the longest."""
    model = step_module.model
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = part(tensor).untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    device = model.token_embedding.weight.device
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), precision(device, settings.bf16):
        first = dataset.batch(0).split(1)[0]
        step_module(to_inputs(first, model, settings.seed))
    # What was gathered of a shared block is given back by now: its storage is there, with no bytes.
    weights = {part(p).untyped_storage().data_ptr() for p in model.parameters()}
    per_row = 2 * sum(storage.nbytes() for storage in kept.values() if storage.data_ptr() not in weights)
    return math.ceil(per_row * dataset.longest / first.tokens.size)


def bytes_of_weights(model: GPT, world: World = ALONE) -> int:
    """Weights, and of what is trained gradients and two averages: they are there whatever the batch. In company a part of them,
    and of what a step gathers, weights and gradients: all blocks or two of them, or a slice of these, and what is in none."""
    own = sum((16 if p.requires_grad else 4) * part(p).numel() for p in model.parameters())
    if world.size == 1:
        return own
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    rest = sum(p.numel() for p in model.parameters()) - blocks
    gathered = rest + (2 * blocks // model.config.n_layers if world.by_block else blocks)
    return own + 8 * gathered // world.tensor_size


def fit_micro_batch(step_module: Step, dataset: Dataset, settings: StepSettings, world: World = ALONE) -> int:
    """How many rows go through the model at once: as many as half of the free memory holds, in equal parts of the batch. On
    a CPU the processes of one machine have its memory together."""
    model = step_module.model
    device = model.token_embedding.weight.device
    neighbours = world.local_size if device.type == "cpu" else 1
    room = 0.5 * available_memory(device) / neighbours - bytes_of_weights(model, world)
    wanted = len(dataset.batch(0, world.data_rank, world.data_size).rows)
    rows = max(1, min(wanted, int(room / max(1, bytes_per_row(step_module, dataset, settings)))))
    return -(-wanted // -(-wanted // rows))


def probe(
    state: TrainState, step_module: nn.Module, dataset: Dataset, settings: StepSettings, world: World = ALONE
) -> float:
    """Seconds of one step, measured on gradients that are thrown away; the fastest of three. All processes do it together."""
    batch = dataset.batch(state.step, world.data_rank, world.data_size)
    device = state.model.token_embedding.weight.device
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for micro_batch in batch.split(settings.micro_batch_rows):
            with precision(device, settings.bf16):
                losses = step_module(to_inputs(micro_batch, state.model, settings.seed))
            weigh(losses, batch.counts).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - start)
        state.model.zero_grad(set_to_none=True)
    return seconds


def worth_compiling(device: torch.device, seconds: float) -> tuple[bool, str]:
    """Whether `torch.compile` pays for a run of about `seconds`, and why, in words for the person."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if device.type == "mps":
        return False, "not compiled: torch.compile is young on this kind of device"
    if compiler is None:
        return False, "not compiled: no C++ compiler was found (install one and long runs gain some speed)"
    # A cold compilation costs 35 to 45 s on two cores and saves about a tenth of a step there; a GPU gains far more.
    needed = 60.0 if device.type == "cuda" else 900.0
    if seconds < needed:
        return False, f"not compiled: a run of {seconds:.0f} s would not earn the compilation back"
    return True, "compiled: the first step takes about a minute"


def failure_to_compile(
    state: TrainState, runner: nn.Module, dataset: Dataset, settings: StepSettings, world: World = ALONE
) -> str:
    """Why `torch.compile` does not manage a step here (its compiler may be broken, or old), in a line; nothing where it does.
    What it makes for one part of a batch, whose gradients are thrown away, the steps then use."""
    from torch._dynamo.exc import TorchDynamoException  # of all that fails on the way to compiled code

    batch = dataset.batch(state.step, world.data_rank, world.data_size)
    micro_batch = next(iter(batch.split(settings.micro_batch_rows)))
    try:
        with precision(state.model.unembedding.device, settings.bf16):
            losses = runner(to_inputs(micro_batch, state.model, settings.seed))
        weigh(losses, batch.counts).backward()
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:2]) or type(error).__name__
    finally:
        state.model.zero_grad(set_to_none=True)
    return ""


def build_step_module(
    model: GPT, objective: Objective, kind: StepKind, recompute: bool = False
) -> tuple[Step, nn.Module]:
    """The model with its loss, as it is measured beforehand and as it is run; the same two where it is not compiled.

    With `recompute` each block's activations are made again in the backward pass, which a fused step knows nothing of.
    """
    for block in model.blocks:
        block.recompute = recompute
    step_module = Step(model, objective, fused=kind == "fused")
    runner = torch.compile(step_module) if kind == "compiled" else step_module
    assert isinstance(runner, nn.Module)
    return step_module, runner
