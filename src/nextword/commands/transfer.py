"""``nextword transfer``: what pre-training is worth on a task."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nextword.commands.command import Context, command, stored_options
from nextword.commands.finetune import FinetuneConfig, finetune
from nextword.commands.shared import FinetuneOptions, format_score, input_paths, run_path
from nextword.common.command_result import Result
from nextword.common.console import Console
from nextword.common.numbers import Count, SmallCount
from nextword.common.options import DeviceOption, ModelArgument, argument, option, options


def sorted_counts(counts: Sequence[int] | None) -> tuple[int, ...]:
    """Numbers in ascending order."""
    return tuple(sorted(counts or ()))


@options
class TransferConfig(ModelArgument, FinetuneOptions, DeviceOption):
    """Measure how many labeled examples pre-training saves.

    A study of label efficiency: fine-tunes the model, and trains the same architecture from random weights, on
    increasing numbers of examples with several seeds each.

    Attributes:
        data: Tables of examples, as for nextword finetune.
        out: Directory of the results and their page.
        counts: Number of training examples. May be given more than once; all examples are always added. Default: 32, 128, 512
            and 2048.
        num_seeds: Number of seeds per number of examples.
        resume: Continue an interrupted study. A study that does not exist is started.
    """

    data: tuple[str, ...] = argument(converter=input_paths)
    out: Path = option(converter=run_path, kw_only=False, stored=False)
    counts: tuple[Count, ...] = option(default=(), converter=sorted_counts)
    num_seeds: SmallCount = option(default=3, deprecated="seeds", stored="seeds")
    resume: bool = option(default=False, stored=False)


@dataclass(frozen=True)
class TransferResult(Result):
    """Scores with and without pre-training by the number of examples.

    Attributes:
        task: The task.
        metric: Its main metric.
        higher_is_better: Whether higher values of the metric are better.
        points: For each number of examples the scores `pretrained` and `scratch`, with confidence intervals over the seeds.
        baselines: Scores of baselines on all examples.
        worth: Ratio of the numbers of examples that reach the same score.
        sentence: The conclusion.
        cells: The single runs.
        run: Directory of the results.
        model: Path of the model.
        data: The tables.
        seconds: Duration.
    """

    task: str
    metric: str
    higher_is_better: bool
    points: list[dict[str, Any]]
    baselines: dict[str, float]
    worth: dict[str, Any]
    sentence: str
    cells: list[dict[str, Any]]
    run: str
    model: str
    data: list[str]
    seconds: float

    def __str__(self) -> str:
        name = self.metric.replace("_", " ")
        lines = [f"{'examples':>10}  {name + ', pre-trained':>36}  {'from random weights':>36}"]
        for point in self.points:
            scores = (format_score(point[start]) for start in ("pretrained", "scratch"))
            lines.append("{:>10,}  {:>36}  {:>36}".format(point["examples"], *scores))
        return "\n".join([*lines, self.sentence, f"page: {Path(self.run) / 'report.html'}"])


@command(TransferConfig, example="nextword transfer runs/mine reviews.csv --out runs/transfer")
def transfer(config: TransferConfig, context: Context) -> TransferResult:
    """Run the study, each run of it as `finetune` does."""
    from nextword.common.environment import resolve_device
    from nextword.evaluation.label_efficiency import run_study
    from nextword.reporting.report import write_report

    resolve_device(config.device)
    settings = {f.name: getattr(config, f.name) for f in fields(FinetuneOptions) if getattr(config, f.name)}
    stored = stored_options(config)
    request = {name: stored.pop(name) for name in ("model", "data", "seeds", "counts")}
    request |= {"model": str(config.model.resolve()), "settings": {k: v for k, v in stored.items() if v is not None}}

    def run_finetune(*, limit: int | None, scratch: bool, console: Console, **cell: Any) -> dict[str, Any]:
        cell_config = FinetuneConfig(
            config.model,
            config.data,
            device=config.device,
            max_examples=limit,
            from_scratch=scratch,
            **settings,
            **cell,
        )
        return finetune.run(cell_config, Context(console, call=context.call)).to_dict()

    result = run_study(run_finetune, config.out, request, context.call, resume=config.resume, console=context.console)
    write_report(config.out)
    return TransferResult.from_dict(result)
