"""What a run works with on the machine that it runs on: weights and optimizer, and in company this process's part of them; a
micro-batch that fits; the kind of step that is quickest. What is decided once is decided here, and what was saved is taken up.
"""

from abc import ABC
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.format import format_duration
from nextword.common.run_dir import ROUNDING_NOTE, RunDir, library_versions, machine_info
from nextword.model import fused
from nextword.model.gpt import GPT
from nextword.training import checkpoint
from nextword.training.config import TrainingConfig
from nextword.training.distributed import SINGLE_PROCESS, DistContext
from nextword.training.losses import LossFn, LossModule
from nextword.training.optimizer import Optimizer
from nextword.training.parallel import load_weights_, parallelize
from nextword.training.step import (
    StepKind,
    StepSettings,
    TrainState,
    build_loss_module,
    fit_micro_batch_rows,
    should_compile,
    time_step,
    try_compile,
)


class TrainingSetup(ABC):
    """The part of a run that its subclasses do not tell apart by what they learn."""

    dynamic_shapes = False  # in length, so that compiled code would be made anew again and again
    supports_distributed = False  # whether several processes can do it together
    fail_on_corrupt_checkpoint = False  # whether a damaged checkpoint stops a resume, instead of being passed over
    world: DistContext = SINGLE_PROCESS
    resume_checkpoint: Path | None = None  # where the run stood when this process took it up

    # Set by the subclass when it begins or goes on.
    training: TrainingConfig
    target_steps: int | None
    budget_seconds: float | None
    model: GPT  # hollow, where `first_weights` says what it begins with
    loss_fn: LossFn
    dataset: Any  # a Dataset, of a kind that the subclass knows
    step_settings: StepSettings
    run_metadata: dict[str, Any]
    seconds_per_step: float = 0.0  # of one step, as far as it is known; the leader's to know
    # Set by `settle`.
    state: TrainState
    eager_step: LossModule
    step_module: nn.Module

    def __init__(self, run_dir: RunDir, console: Console, device: torch.device, start_time: float):
        self.run_dir, self.console, self.device, self.start_time = run_dir, console, device, start_time
        self.seconds_before_resume = 0.0

    def iter_init_weights(self) -> Iterable[tuple[str, Tensor]]:
        """What a model that is hollow begins with, one tensor after the other."""
        return ()

    def build_optimizer(self) -> Optimizer:
        t = self.training
        assert t.lr is not None, "a run settles its learning rate before it begins"
        return Optimizer(
            self.model, kind=t.optimizer, lr=t.lr, matrix_lr=t.matrix_lr, betas=(t.beta1, t.beta2),
            weight_decay=t.weight_decay, momentum=t.momentum, ctx=self.world,
        )  # fmt: skip

    def build_step_settings(self, seed: int) -> StepSettings:
        t = self.training
        return StepSettings(
            seed=seed, max_grad_norm=t.clip, schedule=t.schedule, warmup=t.warmup, final_lr=t.final_lr,
            bf16=self.device.type == "cuda" and torch.cuda.is_bf16_supported(),
        )  # fmt: skip

    # ------------------------------------------------------------ what is decided beforehand

    def reproducibility_metadata(self) -> dict[str, Any]:
        """What run.json says is fixed, before anything is measured."""
        return {"threads": torch.get_num_threads(), "world_size": self.world.world_size, "device": self.device.type}

    def environment_metadata(self) -> dict[str, Any]:
        return {"versions": library_versions(), "machine": machine_info(self.device)}

    def resume_num_threads(self) -> int:
        """As many as the run began with, where it goes on in as many processes."""
        fixed = self.run_metadata["fixed"]
        return fixed["threads"] if fixed["world_size"] == self.world.world_size else torch.get_num_threads()

    def select_checkpoint(self) -> None:
        """For who leads a run that goes on: its newest whole checkpoint, and what will not be as it was."""
        fixed = self.run_metadata["fixed"]
        if fixed["device"] != self.device.type:
            self.console.warn(f"this run began on {fixed['device']} and goes on on {self.device.type}: {ROUNDING_NOTE}")
        if (original := self.run_metadata["versions"]["torch"]) != torch.__version__:
            self.console.warn(
                f"this run began with torch {original} and goes on with {torch.__version__}: {ROUNDING_NOTE}"
            )
        if (original := fixed["world_size"]) != self.world.world_size:
            self.console.warn(
                f"this run began in a world of {original} and goes on in one of {self.world.world_size}: {ROUNDING_NOTE}"
            )
        if self.world.is_main:
            self.resume_checkpoint = checkpoint.latest_valid(
                self.run_dir.path, self.console.warn, self.fail_on_corrupt_checkpoint
            )

    # ------------------------------------------------------------ all processes of a run together

    def setup_training(self) -> None:
        """Take one's part of the weights and stand where the run stands; then, in a run that begins, measure what stays
        the same for the whole run (bit-equality is promised where it does), and write down what it is."""
        fixed = self.run_metadata["fixed"]
        is_resume = "step_kind" in fixed
        step_kind: StepKind = fixed["step_kind"] if is_resume else self._default_step_kind()
        if step_kind == "fused" and not (self._has_full_weights and fused.is_available(self.model, self.device)):
            reason = fused.load_kernels()[1] if self._has_full_weights else "no process has all of the weights at once"
            self.console.warn(
                f"this run began with compiled parts that are not to be had here ({reason}): {ROUNDING_NOTE}"
            )
            step_kind = "plain"
        self.eager_step, self.step_module = build_loss_module(
            self.model, self.loss_fn, "fused" if step_kind == "fused" else "plain", self.training.checkpoint_activations
        )
        self._materialize()
        if self.resume_checkpoint is not None:
            self._restore_metadata(self.resume_checkpoint)
        if is_resume:
            self.step_settings = replace(self.step_settings, micro_batch_rows=fixed["micro_batch_rows"])
            self.seconds_before_resume = self.run_dir.truncate_metrics(self.state.step)
        else:
            step_kind = self._autotune(step_kind)
        if step_kind == "compiled":
            step_kind = self._compile_step()
        if is_resume:
            self.seconds_per_step = self._time_step(self.step_module)
            self.console.info(
                f"going on from step {self.state.step:,}, {format_duration(self.seconds_before_resume)} in"
            )
            return
        self.run_metadata["fixed"] = {
            **fixed,
            "micro_batch_rows": self.step_settings.micro_batch_rows,
            "step_kind": step_kind,
        }
        if self.world.is_main:
            self.run_dir.write_metadata(self.run_metadata)
            fs.atomic_write(self.run_dir.metrics_path, "")

    def _materialize(self) -> None:
        """Memory, weights and an optimizer; in company for one's own part of them alone."""
        on_meta = self.model.token_embedding.weight.is_meta
        if self.world.world_size > 1:
            self.world = parallelize(
                self.world,
                self.eager_step,
                self.training.parallel,
                bf16=self.step_settings.bf16,
                device=self.device,
            )
        elif on_meta:
            self.model.to_empty(device=self.device)
            self.model.tabulate()
        self.state = TrainState(self.model, self.build_optimizer())
        if self.resume_checkpoint is not None:
            self._restore_weights(self.resume_checkpoint)
        elif on_meta:
            load_weights_(self.model, self.iter_init_weights(), self.world)

    def _restore_weights(self, path: Path) -> None:
        """Take the weights and the optimizer's state from a checkpoint; where they are shared, one's own rows."""
        weights, optimizer = checkpoint.load(path, dict(self.model.named_parameters()))
        load_weights_(self.model, weights.items(), self.world)
        self.state.optimizer.load_state_tensors(optimizer)

    def _restore_metadata(self, path: Path) -> dict[str, Any]:
        """Take from a checkpoint what it says beside its tensors; all that it says."""
        saved = checkpoint.load_metadata(path)
        self.state.step, self.state.tokens, self.state.nonfinite_streak = saved["step"], saved["tokens"], saved["bad"]
        self.state.num_rollbacks = saved.get("detours", 0)
        return saved

    @property
    def _has_full_weights(self) -> bool:
        """Whether a process has all of the weights at once in a step, as our own compiled parts want them."""
        return self.world.world_size == 1 or (self.training.parallel == "fsdp-no-reshard" and self.world.tp_size == 1)

    def _default_step_kind(self) -> StepKind:
        """The kind of step that costs no time to begin with. Our own compiled parts keep what the backward pass needs."""
        t = self.training
        fitting = self._has_full_weights and not t.checkpoint_activations and t.compile != "yes"
        return "fused" if fitting and fused.is_available(self.model, self.device) else "plain"

    def _autotune(self, step_kind: StepKind) -> StepKind:
        """How many rows go through the model at once, and whether a plain step is to be compiled: the leader says."""
        t = self.training
        micro_batch_rows = t.micro_batch_rows or fit_micro_batch_rows(
            self.eager_step, self.dataset, self.step_settings, self.world
        )
        self.step_settings = replace(
            self.step_settings, micro_batch_rows=-int(self.world.all_reduce_max([-micro_batch_rows])[0])
        )
        estimated_seconds = self.world.broadcast_object(self.seconds_per_step)
        self.seconds_per_step = estimated_seconds or self._time_step(self.eager_step)
        run_seconds = (
            self.budget_seconds if self.budget_seconds is not None else (self.target_steps or 0) * self.seconds_per_step
        )
        if step_kind == "plain" and self.device.type == "cpu" and (reason := fused.load_kernels()[1]):
            self.console.info(f"trained by PyTorch's own operations: {reason}")
        if t.compile == "yes":
            step_kind = "compiled"
        elif t.compile == "auto" and step_kind == "plain" and not self.dynamic_shapes:
            compiled, reason = should_compile(self.device, run_seconds)
            step_kind = "compiled" if compiled else "plain"
            self.console.info(reason)
        return self.world.broadcast_object(step_kind)

    def _compile_step(self) -> StepKind:
        """Let the steps be compiled, or plain where that fails here, which is said; the kind that they are."""
        compiled = torch.compile(self.eager_step)
        assert isinstance(compiled, nn.Module)
        self.step_module = compiled
        if error := try_compile(self.state, self.step_module, self.dataset, self.step_settings, self.world):
            self.console.warn(f"trained by PyTorch's own operations, since torch.compile fails here: {error}")
            self.step_module = self.eager_step
            return "plain"
        return "compiled"

    def _time_step(self, step_module: nn.Module) -> float:
        """Of one step, by gradients that are thrown away."""
        return time_step(self.state, step_module, self.dataset, self.step_settings, self.world)
