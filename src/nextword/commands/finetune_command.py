"""``nextword finetune``: a model adapted to a task."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextword.training.launch import RunContext

from nextword.commands.command import Context, argument, command, option, options, stored_options
from nextword.commands.results import RunResult
from nextword.commands.shared import (
    FinetuneOptions,
    RunOptions,
    absolute_path,
    format_corpus,
    format_metric,
    format_score,
    input_paths,
    open_or_prepare_corpus,
    run_path,
)
from nextword.common.errors import UsageError
from nextword.common.format import format_duration
from nextword.training.config import CONTINUED_PRETRAINING, FinetuneRecipe, with_overrides


@options
class FinetuneConfig(FinetuneOptions, RunOptions):
    """Adapt a model to a task with labeled examples.

    The scores on the validation set are compared with simple baselines, and generative tasks also with the pre-training text,
    to measure forgetting. Use transfer to measure how many labeled examples pre-training saves.

    Attributes:
        model: A run directory, or a model directory from nextword or Hugging Face transformers.
        data: Tables of examples: .csv .tsv .jsonl .json .parquet, plain, .gz or .zst. For the task continue, text.
        out: Run directory: the model, its checkpoints, metrics, scores and report.
        scratch: Start from random weights of the same architecture, to see what pre-training is worth.
        max_examples: Train on this many of the examples. Default: all.
    """

    model: str | None = argument(default=None, converter=absolute_path)
    data: tuple[str, ...] = argument(default=(), converter=input_paths)
    out: Path = option(default=None, converter=run_path, kw_only=False, required=True, stored=False)
    scratch: bool = False
    max_examples: int | None = option(default=None, deprecated="limit", stored="limit")


@dataclass(frozen=True)
class FinetuneResult(RunResult):
    """The result of a fine-tuning run.

    Attributes:
        metric: The task's main metric.
        trained_parameters: Number of trained parameters.
        labels: Labels of a classifier.
        scores: Metrics on the validation set, each with value, confidence interval (low, high) and n.
        baselines: The same of baselines that need no language model.
    """

    metric: str | None = None
    trained_parameters: int | None = None
    labels: list[str] | None = None
    scores: dict[str, dict[str, Any]] | None = None
    baselines: dict[str, dict[str, dict[str, Any]]] | None = None


def format_finetuning(result: FinetuneResult) -> str:
    """The summary of a fine-tuning run for a person."""
    lines = [f"{result.steps:,} steps in {format_duration(result.seconds)}: {result.model}"]
    metric, before, scores = result.metric or "", result.before or {}, result.scores or {}
    if metric in scores:
        lines.append(f"{format_metric(metric, scores[metric])} on the validation set")
        systems = {**(result.baselines or {}), "before fine-tuning": before}
        lines += [f"  {name}: {format_score(system[metric])}" for name, system in systems.items() if metric in system]
    if result.bits_per_byte is not None:
        text = "validation text" if result.task == "continue" else "validation answers"
        start = before.get("bits_per_byte")
        change = f" ({start:.4f} before)" if isinstance(start, float) else ""
        lines.append(f"{result.bits_per_byte:.4f} bits/byte of the {text}{change}")
    if forgetting := result.forgetting:
        lines.append(
            f"{forgetting['after']:.4f} bits/byte on the pre-training text ({forgetting['before']:.4f} before: forgetting)"
        )
    lines.append(f"report: {Path(result.run) / 'report.html'}")
    return "\n".join([*lines, f"Try it: {example_command(result)}"])


def example_command(result: FinetuneResult) -> str:
    """A command that uses the fine-tuned model."""
    if result.task in ("chat", "prefer"):
        return f"nextword chat {result.run}"
    if result.task == "continue":
        return f"nextword generate {result.run} {shlex.quote(result.prompt or '')}"
    inputs = {
        "classify": ("a text",),
        "rewrite": ("a text",),
        "entail": ("a premise", "a hypothesis"),
        "similarity": ("a sentence", "another sentence"),
    }
    return f"nextword predict {result.run} {shlex.join(inputs.get(result.task or '', ('a question', 'choice 1', 'choice 2')))}"


def run_finetuning(run: "RunContext") -> dict[str, Any]:
    """Train on labeled examples, or on more text for the task continue."""
    from nextword.commands.finetune import train_on_examples
    from nextword.commands.pretrain import train_language_model
    from nextword.common.fs import MANIFEST
    from nextword.data.corpus import Corpus
    from nextword.data.issues import IssueLog
    from nextword.pipeline.base_model import BaseModel
    from nextword.tasks.examples import read_examples

    request, run_dir = run.request, run.run_dir
    base_model = BaseModel.open(Path(request["model"]))
    settings = {name: request[name] for name in ("steps", "budget", "training")}
    task = request["task"] or read_examples(request["data"], None, IssueLog(), request["columns"]).task
    if task != "continue":
        recipe = with_overrides(
            FinetuneRecipe(),
            task=task,
            lora=request["lora"],
            scratch=request["scratch"],
            tuning=request["tuning"],
            **settings,
        )
        return train_on_examples(run, base_model, recipe)
    flags = {"lora": "lora", "scratch": "scratch", "limit": "max-examples", "validation": "validation"}
    for name, flag in flags.items():
        if request[name]:
            raise UsageError(f"--{flag} does not apply to --task continue, which continues pre-training")
    if unknown := set(request["tuning"]) - {"dropout"}:
        raise UsageError(f"--tuning.{min(unknown).replace('_', '-')} does not apply to --task continue")
    recipe = with_overrides(CONTINUED_PRETRAINING, model=request["tuning"], **settings)
    if (run_dir.data_dir / MANIFEST).is_file():
        corpus = Corpus.open(run_dir.data_dir)
    else:
        corpus = open_or_prepare_corpus(
            request["data"],
            run_dir.data_dir,
            tokenizer=str(base_model.directory),
            text_column=(request["columns"] or {}).get("text"),
            strict=bool(request["strict"]),
            console=run.console,
        )
    run.info(f"task continue: {format_corpus(corpus)}")
    return train_language_model(run, corpus, recipe, base_model)


@command(
    FinetuneConfig,
    example="nextword finetune runs/mine reviews.csv --out runs/reviews",
    to_text=format_finetuning,
)
def finetune(config: FinetuneConfig, context: Context) -> FinetuneResult:
    from nextword.common.run_lock import fail_if_locked

    fail_if_locked(config.out)
    from nextword.commands.pretrain import write_missing_reports
    from nextword.common.environment import resolve_device
    from nextword.common.run_dir import RunDir
    from nextword.training.launch import run_training

    if not RunDir(config.out).exists:
        if config.model is None:
            raise UsageError("the model is missing: nextword finetune MODEL DATA --out RUN")
        if not config.data:
            raise UsageError("the data is missing: give a table of examples (CSV, TSV, JSONL, JSON or Parquet)")
    result = run_training(
        run_finetuning,
        config.out,
        stored_options(config),
        device=resolve_device(config.device),
        start_time=context.started,
        resume=config.resume,
        tensorboard=config.tensorboard,
        console=context.console,
        mirror_url=config.mirror,
        write_reports=write_missing_reports,
    )
    if not result:  # a worker process of torchrun; the main process returns the result
        return None  # type: ignore[return-value]
    return FinetuneResult.from_dict(result)
