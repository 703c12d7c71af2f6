"""``nextword plan``: what a pre-training run would take and reach."""

from dataclasses import dataclass
from typing import Any

from nextword.commands.command import Context, argument, command, option, options
from nextword.commands.results import Result
from nextword.commands.shared import DeviceOption, RecipeOptions, input_paths, require_inputs
from nextword.common.errors import UsageError
from nextword.common.format import format_duration


@options
class PlanConfig(RecipeOptions, DeviceOption):
    """Predict size, time, memory, energy and loss of a training run.

    Measures the text and this machine for some seconds and writes nothing. Takes the options of pretrain. With --gpu and
    without text, it estimates a run on other machines instead: nextword plan --machines 8 --gpu h100 --parameters 7B --tokens
    140B

    Attributes:
        corpora: Files, directories, shards from nextword prepare, or built-in datasets (python-docs, tinystories, wikitext,
            fineweb-edu).
        gpu: Estimate for GPUs of this kind: v100, a100, h100, h200, b200, l4, l40s or rtx4090. Default: measure this machine.
        machines: Number of machines of the estimate.
        gpus_per_machine: Number of GPUs in each machine of the estimate.
        parameters: Approximate number of parameters of the estimate, for example 7B. Default: from --size, or chosen.
        gpu_hour_price: Price of a GPU hour, in any currency. Default: no costs are shown.
    """

    corpora: tuple[str, ...] = argument(default=(), converter=input_paths)
    gpu: str | None = None
    machines: int = 1
    gpus_per_machine: int = 8
    parameters: str | None = option(default=None, metavar="COUNT")
    gpu_hour_price: float | None = option(default=None, deprecated="price")


@dataclass(frozen=True)
class PlanResult(Result):
    """The prediction of a run on this machine.

    Attributes:
        size: Chosen size.
        model: Fields of the `ModelConfig`.
        parameters: Number of parameters.
        batch_tokens: Tokens per optimizer step.
        lr: Peak learning rate.
        dropout: Dropout rate.
        tokens: Training tokens.
        epochs: Passes over the text.
        steps: Optimizer steps.
        seconds: Duration of the run.
        seconds_per_token: Measured training speed.
        memory_bytes: Peak memory.
        flops: Floating-point operations.
        bits_per_byte: Expected loss on the validation set; 80 % of runs end between `low` and `high`.
        why: The reasons of the choices.
        preparation_seconds: Part of `seconds` that tokenization takes.
        text: tokens, bytes, documents, vocab_size and whether they are extrapolated from a sample.
        energy: watt_hours and whether they are measured.
    """

    size: str
    model: dict[str, Any]
    parameters: int
    batch_tokens: int
    lr: float
    dropout: float
    tokens: int
    epochs: float
    steps: int
    seconds: float
    seconds_per_token: float
    memory_bytes: int
    flops: float
    bits_per_byte: float
    low: float
    high: float
    why: list[str]
    preparation_seconds: float
    text: dict[str, Any]
    energy: dict[str, Any]

    def __str__(self) -> str:
        text, energy = self.text, self.energy
        preparation = (
            f", {format_duration(self.preparation_seconds)} of it for preparation"
            if self.preparation_seconds >= 1
            else ""
        )
        measured = "measured" if energy["measured"] else "estimated"
        rows = {
            "text": f"{text['bytes'] / 1e6:,.2f} MB of training text, {text['documents']:,} documents, "
            f"{text['tokens']:,} tokens{' (estimated from a sample)' if text['sampled'] else ''}",
            "model": f"{self.parameters:,} parameters, vocabulary {text['vocab_size']:,}, "
            f"context length {self.model['context_length']:,}",
            "training": f"{self.tokens:,} tokens ({self.epochs:.1f} epochs), {self.steps:,} steps of {self.batch_tokens:,}",
            "time": format_duration(self.seconds) + preparation,
            "memory": f"{self.memory_bytes / 1e9:.1f} GB",
            "energy": f"{energy['watt_hours']:.3g} Wh, {measured}",
            "compute": f"{self.flops:.2g} floating-point operations",
            "bits/byte": f"{self.bits_per_byte:.2f} on the validation set (80 % interval {self.low:.2f}–{self.high:.2f})",
        }
        return "\n".join([*self.why, "", *(f"{name:<11}{value}" for name, value in rows.items())])


@dataclass(frozen=True)
class ClusterEstimateResult(Result):
    """The estimate of a run on other machines.

    Attributes:
        parameters: Number of parameters.
        tokens: Training tokens.
        flops: Floating-point operations.
        batch_tokens: Tokens per optimizer step.
        steps: Optimizer steps.
        parallel: Data parallelism, a value of --training.parallel.
        tensor: Tensor parallelism, a value of --training.tensor.
        recompute: Whether activation checkpointing is on.
        memory_bytes: Memory of one GPU.
        sent_bytes: Bytes that one GPU sends in one step.
        sending_seconds: Seconds of communication in one step.
        step_seconds: Seconds of one step.
        utilisation: Model FLOPs utilization (MFU).
        seconds: Duration of the run, between `low_seconds` and `high_seconds`.
        gpu_hours: GPU hours.
        kilowatt_hours: Energy by the datasheet.
        money: Costs, if a price is given.
        gpu: Kind of GPU.
        gpus: Number of GPUs.
        machines: Number of machines.
        model: Fields of the `ModelConfig`.
    """

    parameters: int
    tokens: float
    flops: float
    batch_tokens: int
    steps: int
    parallel: str
    tensor: int
    recompute: bool
    memory_bytes: float
    sent_bytes: float
    sending_seconds: float
    step_seconds: float
    utilisation: float
    seconds: float
    low_seconds: float
    high_seconds: float
    gpu_hours: float
    kilowatt_hours: float
    money: float | None
    gpu: str
    gpus: int
    machines: int
    model: dict[str, Any]

    def __str__(self) -> str:
        times = [self.seconds, self.low_seconds, self.high_seconds]
        days = self.seconds > 2 * 86400
        expected, low, high = (f"{t / 86400:,.3g} days" if days else format_duration(t) for t in times)
        parallelism = f"--training.parallel {self.parallel} --training.tensor {self.tensor}"
        rows = {
            "machines": f"{self.machines:,} with {self.gpus // self.machines} × {self.gpu}",
            "model": f"{self.parameters / 1e9:,.3g} billion parameters, {self.model['n_layers']} layers, width "
            f"{self.model['d_model']:,}, context length {self.model['context_length']:,}, vocabulary "
            f"{self.model['vocab_size']:,}",
            "training": f"{self.tokens / 1e9:,.4g} billion tokens, {self.steps:,} steps of {self.batch_tokens:,}",
            "parallelism": parallelism + (", activation checkpointing" if self.recompute else ""),
            "memory": f"{self.memory_bytes / 1e9:,.1f} GB per GPU",
            "network": f"{self.sent_bytes / 1e9:,.3g} GB per GPU and step, {format_duration(self.sending_seconds)} of "
            f"{format_duration(self.step_seconds)}",
            "utilization": f"{100 * self.utilisation:.0f} % of the peak FLOPS (MFU)",
            "time": f"{expected} ({low}–{high})",
            "GPU hours": f"{self.gpu_hours:,.0f}",
            "energy": f"{self.kilowatt_hours:,.0f} kWh, by the datasheet",
            "compute": f"{self.flops:.3g} floating-point operations",
            **({} if self.money is None else {"costs": f"{self.money:,.0f}"}),
        }
        return "\n".join(f"{name:<13}{value}" for name, value in rows.items())


@command(PlanConfig, example="nextword plan my-texts/ --budget 2h")
def plan(config: PlanConfig, context: Context) -> PlanResult | ClusterEstimateResult:
    if config.gpu is not None:
        from nextword.planning.cluster_estimate import estimate_cluster_run

        if config.corpora:
            raise UsageError("--gpu gives an estimate without text: leave the text out, and give --tokens")
        return ClusterEstimateResult(
            **estimate_cluster_run(
                config.resolved_recipe(),
                config.gpu,
                machines=config.machines,
                gpus_per_machine=config.gpus_per_machine,
                parameters=config.parameters,
                price_per_gpu_hour=config.gpu_hour_price,
            )
        )
    from nextword.common.environment import resolve_device
    from nextword.planning.planner import plan_run

    require_inputs(config.corpora)
    return PlanResult(
        **plan_run(
            config.corpora,
            config.resolved_recipe(),
            resolve_device(config.device),
            text_column=config.text_column,
            strict=config.strict,
            console=context.console,
        )
    )
