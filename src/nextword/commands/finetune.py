"""``nextword finetune``: a model adapted to a task."""

import math
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextword.commands import shared
from nextword.commands.command import Context, command
from nextword.commands.pretrain import format_summary, open_or_prepare_corpus, start_run, train_language_model
from nextword.common.errors import UsageError
from nextword.common.numbers import Count
from nextword.common.options import argument, option, options
from nextword.common.run_dir import RunDir
from nextword.training.config import CONTINUED_PRETRAINING, FinetuneRecipe, with_overrides

if TYPE_CHECKING:
    from nextword.pipeline.language_model import BaseModel
    from nextword.tasks.dataset import TaskData
    from nextword.training.launch import RunContext
    from nextword.training.losses import LossFn

LORA_LR_MULTIPLIER = 3.0  # learning rate of a LoRA adapter relative to that of all weights
MIN_STEPS = 300  # few examples are repeated for more epochs
EXAMPLE_INPUTS = {
    "classify": ("a text",),
    "rewrite": ("a text",),
    "entail": ("a premise", "a hypothesis"),
    "similarity": ("a sentence", "another sentence"),
}


@options
class FinetuneConfig(shared.FinetuneOptions, shared.RunOptions):
    """Adapt a model to a task with labeled examples.

    The scores on the validation set are compared with simple baselines, and generative tasks also with the pre-training text,
    to measure forgetting. Use transfer to measure how many labeled examples pre-training saves.

    Attributes:
        model: A run directory, or a model directory from nextword or Hugging Face transformers.
        data: Tables of examples: .csv .tsv .jsonl .json .parquet, plain, .gz or .zst. For the task continue, text.
        out: Run directory: the model, its checkpoints, metrics, scores and report.
        from_scratch: Start from random weights of the same architecture, for comparison with the pre-trained model.
        max_examples: Train on this many of the examples. Default: all.
    """

    model: str | None = argument(default=None, converter=shared.absolute_path)
    data: tuple[str, ...] = argument(default=(), converter=shared.input_paths)
    out: Path = option(default=None, converter=shared.run_path, kw_only=False, required=True, stored=False)
    from_scratch: bool = option(default=False, deprecated="scratch", stored="scratch")
    max_examples: Count | None = option(default=None, deprecated="limit", stored="limit")


@dataclass(frozen=True)
class FinetuneResult(shared.RunResult):
    """The result of a fine-tuning run.

    Attributes:
        metric: The task's main metric.
        trained_parameters: Number of trained parameters.
        labels: Labels of a classifier.
        scores: Metrics on the test set, or else on the validation set, each with value, confidence interval (low, high) and n.
        scored_on: What `scores` are of, and whether it also selected the weights.
        calibration: Expected calibration error (error), mean confidence, accuracy and bins of the probabilities, and the
            temperature that the weights of the head are divided by.
        unfinished: How many of how many (n) generated answers did not end within max_tokens.
        ensemble: The scores of the model and the linear TF-IDF baseline together (predict --ensemble), and the weight of that
            baseline.
        baselines: The same of baselines that need no language model.
        baseline_difference: By how much the model scores above the best baseline, with a paired confidence interval.
    """

    metric: str | None = None
    trained_parameters: int | None = None
    labels: list[str] | None = None
    scores: dict[str, dict[str, Any]] | None = None
    scored_on: str | None = None
    calibration: dict[str, Any] | None = None
    unfinished: dict[str, int] | None = None
    ensemble: dict[str, Any] | None = None
    baselines: dict[str, dict[str, dict[str, Any]]] | None = None
    baseline_difference: dict[str, Any] | None = None


def format_finetuning(result: FinetuneResult) -> str:
    """The summary of a fine-tuning run for a person."""
    details: list[str] = []
    metric, before, scores = result.metric or "", result.before or {}, result.scores or {}
    if metric in scores:
        details.append(f"{shared.format_metric(metric, scores[metric])} on {result.scored_on or 'the validation set'}")
        systems = {**(result.baselines or {}), "before fine-tuning": before}
        details += [
            f"  {name}: {shared.format_score(system[metric])}" for name, system in systems.items() if metric in system
        ]
        if result.ensemble and metric in result.ensemble["scores"]:
            score = shared.format_score(result.ensemble["scores"][metric])
            details.append(f"  ensemble with TF-IDF (predict --ensemble): {score}")
        if result.baseline_difference:
            details.append(compare_with_baseline(metric, result.baseline_difference))
    if calibration := result.calibration:
        details.append(f"{shared.format_calibration(calibration)} (temperature {calibration['temperature']:.2f})")
    if (unfinished := result.unfinished) and unfinished["count"]:
        details.append(
            f"{unfinished['count']:,} of {unfinished['n']:,} answers did not end within {unfinished['max_tokens']:,} tokens"
        )
    if result.bits_per_byte is not None:
        text = "validation text" if result.task == "continue" else "validation answers"
        start = before.get("bits_per_byte")
        change = f" ({start:.4f} before)" if isinstance(start, float) else ""
        details.append(f"{result.bits_per_byte:.4f} bits/byte of the {text}{change}")
    if forgetting := result.forgetting:
        details.append(
            f"{forgetting['after']:.4f} bits/byte on the pre-training text ({forgetting['before']:.4f} before: forgetting)"
        )
    if result.task in ("chat", "prefer"):
        return format_summary(result, details, "chat")
    if result.task == "continue":
        return format_summary(result, details, "generate", result.prompt or "")
    inputs = EXAMPLE_INPUTS.get(result.task or "", ("a question", "choice 1", "choice 2"))
    return format_summary(result, details, "predict", *inputs)


def compare_with_baseline(metric: str, difference: dict[str, Any]) -> str:
    """Whether the model is better than the best baseline, and what would help if it is not."""
    from nextword.tasks.metrics import LOWER_IS_BETTER_METRICS

    sign, name = -1 if metric in LOWER_IS_BETTER_METRICS else 1, difference["baseline"]
    value: float = difference["value"]
    low: float | None = difference.get("low")
    high: float | None = difference.get("high")
    shown, is_clear = f"{value:+.3f}", False
    if low is not None and high is not None:
        shown, is_clear = f"{shown} ({low:+.3f} to {high:+.3f})", low > 0 or high < 0
    if sign * value > 0:
        return f"better than {name}, the best baseline: {shown}{'' if is_clear else ', which may be chance'}"
    comparison = "worse than" if value else "no better than"
    chance = "" if is_clear or not value else ", which may be chance"
    advice = "More pre-training, more examples or a longer context would help"
    return f"{comparison} {name}, a baseline that needs no language model: {shown}{chance}. {advice}"


@command(
    FinetuneConfig, example="nextword finetune runs/mine reviews.csv --out runs/reviews", to_text=format_finetuning
)
def finetune(config: FinetuneConfig, context: Context) -> FinetuneResult:
    """Train on the data of a new run, or continue a run."""
    if not RunDir(config.out).exists:
        if config.model is None:
            raise UsageError("the model is missing: nextword finetune MODEL DATA --out RUN")
        if not config.data:
            raise UsageError("the data is missing: give a table of examples (CSV, TSV, JSONL, JSON or Parquet)")
    return start_run(FinetuneResult, run_finetuning, config, context)


def run_finetuning(run: "RunContext") -> dict[str, Any]:
    """Train on labeled examples, or on more text for the task continue."""
    from nextword.data.issues import IssueLog
    from nextword.pipeline.language_model import BaseModel
    from nextword.tasks.examples import read_examples

    request = run.request
    base = BaseModel.open(Path(request["model"]))
    settings = {name: request[name] for name in ("steps", "budget", "training")}
    with suggest_command(run):
        task: str | None = request["task"]
        examples = None if task else read_examples(request["data"], None, IssueLog(), request["columns"])
        task = examples.task if examples is not None else task
        if task != "continue":
            settings |= {name: request[name] for name in ("lora", "scratch", "tuning")}
            return train_on_examples(run, base, with_overrides(FinetuneRecipe(), task=task, **settings))
    flags = {"lora": "lora", "scratch": "from-scratch", "limit": "max-examples", "metric": "metric"}
    given = [f"--{flag}" for name, flag in flags.items() if request[name]]
    given += [f"--tuning.{name.replace('_', '-')}" for name in sorted(set(request["tuning"]) - {"dropout"})]
    if given:
        raise UsageError(f"{given[0]} does not apply to --task continue, which continues pre-training")
    corpus = open_or_prepare_corpus(
        run,
        request["data"],
        tokenizer=str(base.directory),
        text_column=request["columns"].get("text"),
        **shared.held_out_options(request),
        strict=run.strict,
    )
    reason = (
        f"the task is inferred: {examples.reason or 'it is text'}; for another: --task TASK\n"
        if examples is not None
        else ""
    )
    run.info(f"task continue: {shared.format_corpus(corpus)}\n{reason}".rstrip())
    recipe = with_overrides(CONTINUED_PRETRAINING, model=request["tuning"], **settings)
    return train_language_model(run, corpus, recipe, base)


@contextmanager
def suggest_command(run: "RunContext") -> Generator[None]:
    """Add to a `SuggestionError` the whole command with the options that it suggests."""
    from nextword.tasks.schema import SuggestionError

    try:
        yield
    except SuggestionError as error:
        request = run.request
        columns: dict[str, str] = request["columns"] or {}
        label_map: dict[str, str] = request.get("label_map") or {}
        words = ["nextword", "finetune", request["model"], *request["data"]]
        words += [f"--{name}={path}" for name in ("validation", "test") for path in request.get(name) or ()]
        if "--task" not in error.options:
            words += ["--task", request["task"]] if request["task"] else []
            words += [f"--column={role}={column}" for role, column in columns.items()]
        words += [f"--map-label={label}={name}" for label, name in label_map.items()]
        words += [*error.options, "--out", str(run.run_dir.path)]
        raise UsageError(f"{error}\nFor example: {shlex.join(words)}") from error


def train_on_examples(run: "RunContext", base: "BaseModel", recipe: FinetuneRecipe) -> dict[str, Any]:
    """Fine-tune a model on labeled examples.

    Args:
        run: The run.
        base: The model to start from.
        recipe: The options of the run. A resume uses those in run.json.

    Returns:
        The content of result.json.

    Raises:
        UsageError: the model or the examples are not those that the run started with, or there are several processes.
    """
    from nextword.model.gpt import with_context_length
    from nextword.pipeline import evaluators
    from nextword.tasks.dataset import SPLIT_VERSION
    from nextword.training.launch import new_metadata, setup_training
    from nextword.training.trainer import Trainer

    if run.dist.world_size > 1:
        raise UsageError("fine-tuning runs in one process: start it without torchrun (pretrain can be distributed)")
    metadata, seed = run.metadata, run.request["seed"] or 0
    other_run = "that the run started with. Start a new run with another --out"
    if metadata is not None:
        recipe, seed = FinetuneRecipe.from_dict(metadata["recipe"]), metadata["seed"]
        if metadata["base"]["weights"] != base.fingerprint():
            raise UsageError(f"{base.source_path}: not the model {other_run}")
    start = evaluators.load_start_model(base, recipe.scratch, seed, run.device)
    if metadata is None:
        data, num_issues = evaluators.load_finetune_data(run, base, evaluators.max_context_length(start.config))
        start = evaluators.with_context_for(start, data, run)
    else:
        data, num_issues = evaluators.load_finetune_data(run, base, metadata["model"]["context_length"])
        start = with_context_length(start, metadata["model"]["context_length"])
    recipe = choose_hyperparameters(recipe, data, start.config.d_model)
    model, lora_config = evaluators.build_finetune_model(start, base, data, recipe, seed)
    dataset, label_counts, is_balanced = evaluators.build_task_dataset(model, data, recipe, seed)
    metric = evaluators.selection_metric(data.task_spec, is_balanced, run.request.get("metric"))
    recipe = choose_length(recipe, dataset.steps_per_epoch)
    run.info(summarize(recipe, data, label_counts, is_balanced))
    fingerprint = data.fingerprint()
    if metadata is None:
        metadata = new_metadata(
            run,
            recipe,
            model.config,
            seed,
            task=data.task_spec.to_dict(),
            **base.metadata(),
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            tuning=asdict(recipe.tuning),
            metric=metric,
            data={
                "fingerprint": fingerprint,
                "split_version": SPLIT_VERSION,
                "train": {"examples": len(data.train)},
                "validation": {"examples": len(data.validation)},
                "test": {"examples": len(data.test)},
                "available": data.num_available,
                "labels": label_counts,
                "problems": num_issues,
            },
        )
    elif metadata["data"]["fingerprint"] != fingerprint:
        raise UsageError(f"{run.run_dir.path}: the examples are not those {other_run}")
    with setup_training(run, metadata, model, task_loss(recipe, data), dataset, recipe, dynamic_shapes=True) as setup:
        evaluator = evaluators.TaskEvaluator(run, setup, base, data, dataset, recipe, metric, lora_config)
        trainer = Trainer(run, setup, recipe, evaluator, min_steps_without_improvement=dataset.steps_per_epoch)
        trainer.train()
        return trainer.write_results(evaluator.evaluate_best())


def choose_hyperparameters(recipe: FinetuneRecipe, data: "TaskData", d_model: int) -> FinetuneRecipe:
    """Choose the batch size from the number of examples, and the learning rate from the width of the model.

    The learning rate is GPT-1's 6.25e-5 at width 768 (Radford et al. 2018, section 4.1) and 1.5e-3 at width 128 (the best of
    four on two data sets), interpolated on logarithmic axes. A LoRA adapter takes more.
    """
    most = 8 if data.task_spec.task == "chat" else 32  # rows of a chat are packed
    batch_examples = recipe.tuning.batch_examples or min(most, max(4, len(data.train) // 8))
    lr = min(1.5e-3, 6.25e-5 * (768 / d_model) ** (math.log(24) / math.log(6)))
    lr = recipe.training.lr or lr * (LORA_LR_MULTIPLIER if recipe.lora else 1)
    tuning = replace(recipe.tuning, batch_examples=batch_examples)
    return replace(recipe, training=replace(recipe.training, lr=lr), tuning=tuning)


def choose_length(recipe: FinetuneRecipe, steps_per_epoch: int) -> FinetuneRecipe:
    """Choose the number of steps from the number of epochs, if neither steps nor a budget is given."""
    if recipe.steps is not None or recipe.budget is not None:
        return recipe
    epochs = recipe.tuning.epochs or min(30.0, max(3.0, MIN_STEPS / steps_per_epoch))
    steps = max(1, math.ceil(epochs * steps_per_epoch))
    return replace(recipe, steps=steps, tuning=replace(recipe.tuning, epochs=epochs))


def task_loss(recipe: FinetuneRecipe, data: "TaskData") -> "LossFn":
    """The loss of a kind of task."""
    from nextword.tasks.dataset import HEAD_KINDS
    from nextword.training import losses

    kind = data.task_spec.kind
    if kind in HEAD_KINDS:
        return losses.classification_loss(kind, recipe.tuning.auxiliary)
    return losses.dpo_loss(recipe.tuning.beta) if kind == "preference" else losses.completion_loss


def summarize(recipe: FinetuneRecipe, data: "TaskData", label_counts: dict[str, int], is_balanced: bool) -> str:
    """Task, labels, method and length of a run, for the console."""
    spec = data.task_spec
    held_out = f"{len(data.validation):,} validation examples" + (
        f", {len(data.test):,} test examples" if data.test else ""
    )
    columns = " · ".join(f"{role}: {column}" for role, column in spec.columns)
    columns += f"; answers are {spec.answer_format}" if spec.answer_format else ""
    lines = [f"task {spec.task} ({columns}): {len(data.train):,} training examples, {held_out}"]
    if data.reason:
        others = "--task TASK and --column ROLE=COLUMN"
        lines.append(f"the task is inferred ({data.reason}); for another, give {others} (see nextword finetune --help)")
    if spec.labels:
        shown = [f"{name} {label_counts[name]:,}" if label_counts else name for name in spec.labels[:12]]
        lines.append(f"{len(spec.labels)} labels: {', '.join(shown)}" + (", …" if len(spec.labels) > 12 else ""))
    if is_balanced:
        lines.append(
            "labels are imbalanced: rare ones have more weight, and macro-F1 selects the checkpoint "
            "(disable with --tuning.balance no)"
        )
    length = f"{recipe.steps:,} steps" if recipe.steps else f"{recipe.budget:.0f} s"
    lines.append(
        f"{'LoRA' if recipe.lora else 'all weights'}{' from scratch' if recipe.scratch else ''}: {length} of "
        f"{recipe.tuning.batch_examples} {'rows' if spec.task == 'chat' else 'examples'}, "
        f"learning rate {recipe.training.lr:.2g}"
    )
    return "\n".join(lines)
