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
from nextword.common.console import Console, duration
from nextword.common.run_dir import ROUNDING, RunFolder, machine, versions
from nextword.model import fused
from nextword.model.gpt import GPT
from nextword.training import checkpoint
from nextword.training.config import Training
from nextword.training.distributed import ALONE, World
from nextword.training.losses import Objective, Step
from nextword.training.optimizer import Optimizer
from nextword.training.parallel import fill, share
from nextword.training.step import (
    StepKind,
    StepSettings,
    TrainState,
    build_step_module,
    failure_to_compile,
    fit_micro_batch,
    probe,
    worth_compiling,
)


class Machinery(ABC):
    """The part of a run that its subclasses do not tell apart by what they learn."""

    rows_differ = False  # in length, so that compiled code would be made anew again and again
    in_company = False  # whether several processes can do it together
    strict = False  # whether a damaged checkpoint stops a resume, instead of being passed over
    world: World = ALONE
    checkpoint: Path | None = None  # where the run stood when this process took it up

    # Set by the subclass when it begins or goes on.
    training: Training
    steps_wanted: int | None
    budget: float | None
    model: GPT  # hollow, where `first_weights` says what it begins with
    objective: Objective
    data: Any  # a Dataset, of a kind that the subclass knows
    settings: StepSettings
    facts: dict[str, Any]
    seconds_per_step: float = 0.0  # of one step, as far as it is known; the leader's to know
    # Set by `settle`.
    state: TrainState
    plain_step: Step
    step_module: nn.Module

    def __init__(self, run: RunFolder, console: Console, device: torch.device, started: float):
        self.run, self.console, self.device, self.started = run, console, device, started
        self.spent = 0.0

    def first_weights(self) -> Iterable[tuple[str, Tensor]]:
        """What a model that is hollow begins with, one tensor after the other."""
        return ()

    def make_optimizer(self) -> Optimizer:
        t = self.training
        assert t.lr is not None, "a run settles its learning rate before it begins"
        return Optimizer(
            self.model, kind=t.optimizer, lr=t.lr, matrix_lr=t.matrix_lr, betas=(t.beta1, t.beta2),
            weight_decay=t.weight_decay, momentum=t.momentum, world=self.world,
        )  # fmt: skip

    def make_settings(self, seed: int) -> StepSettings:
        t = self.training
        return StepSettings(
            seed=seed, clip=t.clip, schedule=t.schedule, warmup=t.warmup, final_lr=t.final_lr,
            bf16=self.device.type == "cuda" and torch.cuda.is_bf16_supported(),
        )  # fmt: skip

    # ------------------------------------------------------------ what is decided beforehand

    def placed(self) -> dict[str, Any]:
        """What run.json says is fixed, before anything is measured."""
        return {"threads": torch.get_num_threads(), "world_size": self.world.size, "device": self.device.type}

    def common_facts(self) -> dict[str, Any]:
        return {"versions": versions(), "machine": machine(self.device)}

    def threads(self) -> int:
        """As many as the run began with, where it goes on in as many processes."""
        fixed = self.facts["fixed"]
        return fixed["threads"] if fixed["world_size"] == self.world.size else torch.get_num_threads()

    def find_checkpoint(self) -> None:
        """For who leads a run that goes on: its newest whole checkpoint, and what will not be as it was."""
        fixed = self.facts["fixed"]
        if fixed["device"] != self.device.type:
            self.console.warn(f"this run began on {fixed['device']} and goes on on {self.device.type}: {ROUNDING}")
        if (begun := self.facts["versions"]["torch"]) != torch.__version__:
            self.console.warn(f"this run began with torch {begun} and goes on with {torch.__version__}: {ROUNDING}")
        if (begun := fixed["world_size"]) != self.world.size:
            self.console.warn(
                f"this run began in a world of {begun} and goes on in one of {self.world.size}: {ROUNDING}"
            )
        if self.world.leads:
            self.checkpoint = checkpoint.newest_whole(self.run.path, self.console.warn, self.strict)

    # ------------------------------------------------------------ all processes of a run together

    def settle(self) -> None:
        """Take one's part of the weights and stand where the run stands; then, in a run that begins, measure what stays
        the same for the whole run (bit-equality is promised where it does), and write down what it is."""
        fixed = self.facts["fixed"]
        goes_on = "step_kind" in fixed
        kind: StepKind = fixed["step_kind"] if goes_on else self._quickest_kind()
        if kind == "fused" and not (self._whole and fused.available(self.model, self.device)):
            why = fused.library()[1] if self._whole else "no process has all of the weights at once"
            self.console.warn(f"this run began with compiled parts that are not to be had here ({why}): {ROUNDING}")
            kind = "plain"
        self.plain_step, self.step_module = build_step_module(
            self.model, self.objective, "fused" if kind == "fused" else "plain", self.training.checkpoint_activations
        )
        self._furnish()
        if self.checkpoint is not None:
            self._take_facts(self.checkpoint)
        if goes_on:
            self.settings = replace(self.settings, micro_batch_rows=fixed["micro_batch_rows"])
            self.spent = self.run.cut_back(self.state.step)
        else:
            kind = self._fix(kind)
        if kind == "compiled":
            kind = self._compile()
        if goes_on:
            self.seconds_per_step = self._measured_seconds(self.step_module)
            self.console.say(f"going on from step {self.state.step:,}, {duration(self.spent)} in")
            return
        self.facts["fixed"] = {**fixed, "micro_batch_rows": self.settings.micro_batch_rows, "step_kind": kind}
        if self.world.leads:
            self.run.write_facts(self.facts)
            fs.write_durably(self.run.metrics, "")

    def _furnish(self) -> None:
        """Memory, weights and an optimizer; in company for one's own part of them alone."""
        hollow = self.model.token_embedding.weight.is_meta
        if self.world.size > 1:
            share(self.world, self.plain_step, self.training.parallel, self.settings.bf16, self.device)
        elif hollow:
            self.model.to_empty(device=self.device)
            self.model.tabulate()
        self.state = TrainState(self.model, self.make_optimizer())
        if self.checkpoint is not None:
            self._take_weights(self.checkpoint)
        elif hollow:
            fill(self.model, self.first_weights(), self.world)

    def _take_weights(self, path: Path) -> None:
        """Take the weights and the optimizer's state from a checkpoint; where they are shared, one's own rows."""
        weights, optimizer = checkpoint.load(path, dict(self.model.named_parameters()))
        fill(self.model, weights.items(), self.world)
        self.state.optimizer.load_state_tensors(optimizer)

    def _take_facts(self, path: Path) -> dict[str, Any]:
        """Take from a checkpoint what it says beside its tensors; all that it says."""
        saved = checkpoint.facts_of(path)
        self.state.step, self.state.tokens, self.state.bad = saved["step"], saved["tokens"], saved["bad"]
        self.state.detours = saved.get("detours", 0)
        return saved

    @property
    def _whole(self) -> bool:
        """Whether a process has all of the weights at once in a step, as our own compiled parts want them."""
        return self.world.size == 1 or (self.training.parallel == "data" and self.world.tensor_size == 1)

    def _quickest_kind(self) -> StepKind:
        """The kind of step that costs no time to begin with. Our own compiled parts keep what the backward pass needs."""
        t = self.training
        fitting = self._whole and not t.checkpoint_activations and t.compile != "yes"
        return "fused" if fitting and fused.available(self.model, self.device) else "plain"

    def _fix(self, kind: StepKind) -> StepKind:
        """How many rows go through the model at once, and whether a plain step is to be compiled: the leader says."""
        t = self.training
        rows = t.micro_batch_rows or fit_micro_batch(self.plain_step, self.data, self.settings, self.world)
        self.settings = replace(self.settings, micro_batch_rows=-int(self.world.most([-rows])[0]))
        [guess] = self.world.numbers([self.seconds_per_step])
        self.seconds_per_step = guess or self._measured_seconds(self.plain_step)
        length = self.budget if self.budget is not None else (self.steps_wanted or 0) * self.seconds_per_step
        if kind == "plain" and self.device.type == "cpu" and (why := fused.library()[1]):
            self.console.say(f"trained by PyTorch's own operations: {why}")
        if t.compile == "yes":
            kind = "compiled"
        elif t.compile == "auto" and kind == "plain" and not self.rows_differ:
            compiled, why = worth_compiling(self.device, length)
            kind = "compiled" if compiled else "plain"
            self.console.say(why)
        return self.world.told(kind)

    def _compile(self) -> StepKind:
        """Let the steps be compiled, or plain where that fails here, which is said; the kind that they are."""
        compiled = torch.compile(self.plain_step)
        assert isinstance(compiled, nn.Module)
        self.step_module = compiled
        if why := failure_to_compile(self.state, self.step_module, self.data, self.settings, self.world):
            self.console.warn(f"trained by PyTorch's own operations, since torch.compile fails here: {why}")
            self.step_module = self.plain_step
            return "plain"
        return "compiled"

    def _measured_seconds(self, step_module: nn.Module) -> float:
        """Of one step, by gradients that are thrown away."""
        return probe(self.state, step_module, self.data, self.settings, self.world)
