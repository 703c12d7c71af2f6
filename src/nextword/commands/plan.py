"""``nextword plan``: what a pre-training run would take and reach."""

from typing import TYPE_CHECKING

from nextword.commands.command import Context, command
from nextword.commands.shared import HELD_OUT_OPTIONS, RecipeOptions, input_paths, require_inputs
from nextword.common.errors import UsageError
from nextword.common.numbers import NonNegative, SmallCount, TokenCount, text_or_number
from nextword.common.options import DeviceOption, argument, option, options

if TYPE_CHECKING:
    from nextword.planning.cluster_estimate import ClusterEstimate
    from nextword.planning.planner import PlanResult


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
    machines: SmallCount = 1
    gpus_per_machine: SmallCount = 8
    parameters: TokenCount | None = option(default=None, converter=text_or_number, metavar="COUNT")
    gpu_hour_price: NonNegative | None = option(default=None, deprecated="price")


@command(PlanConfig, example="nextword plan my-texts/ --budget 2h")
def plan(config: PlanConfig, context: Context) -> "PlanResult | ClusterEstimate":
    """Predict a run on this machine, or on the GPUs that `config` names."""
    if config.gpu is not None:
        from nextword.planning.cluster_estimate import estimate_cluster_run

        if config.corpora:
            raise UsageError("--gpu gives an estimate without text: leave the text out, and give --tokens")
        return estimate_cluster_run(
            config.resolved_recipe(),
            config.gpu,
            machines=config.machines,
            gpus_per_machine=config.gpus_per_machine,
            parameters=config.parameters,
            price_per_gpu_hour=config.gpu_hour_price,
        )
    from nextword.common.environment import resolve_device
    from nextword.planning.planner import plan_run

    require_inputs(config.corpora)
    return plan_run(
        config.corpora,
        config.resolved_recipe(),
        resolve_device(config.device),
        text_column=config.text_column,
        strict=config.strict,
        console=context.console,
        held_out={name: getattr(config, name) for name in HELD_OUT_OPTIONS},
    )
