"""Fine-tuning: a model learns a task from labelled examples."""

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from nextword.common.errors import UsageError

if TYPE_CHECKING:
    from nextword.pipeline.base_model import BaseModel
    from nextword.pipeline.task_evaluator import FinetuneData
    from nextword.training.config import FinetuneRecipe
    from nextword.training.launch import RunContext
    from nextword.training.losses import LossFn

LORA_LR_MULTIPLIER = 3.0  # learning rate of a LoRA adapter relative to that of all weights
MIN_STEPS = 300  # few examples are repeated for more epochs


def train_on_examples(run: "RunContext", base: "BaseModel", recipe: "FinetuneRecipe") -> dict[str, Any]:
    """Fine-tune a model on labelled examples.

    Args:
        run: The run.
        base: The model to start from.
        recipe: The options of the run. A resume uses those in run.json.

    Returns:
        The content of result.json.

    Raises:
        UsageError: the model or the examples are not those that the run started with, or there are several processes.
    """
    from nextword.pipeline.task_evaluator import (
        TaskEvaluator,
        build_finetune_model,
        build_task_dataset,
        load_finetune_data,
        load_start_model,
        selection_metric,
    )
    from nextword.reporting.report import write_run_reports
    from nextword.training.config import FinetuneRecipe
    from nextword.training.setup import new_metadata, setup_training
    from nextword.training.trainer import Trainer

    if run.dist.world_size > 1:
        raise UsageError("fine-tuning runs in one process: start it without torchrun (pretrain can be distributed)")
    resumed = run.metadata
    seed = run.request["seed"] or 0
    if resumed is not None:
        recipe, seed = FinetuneRecipe.from_dict(resumed["recipe"]), resumed["seed"]
        if resumed["base"]["weights"] != base.fingerprint():
            raise UsageError(
                f"{base.source_path}: not the model that the run started with. Start a new run with another --out"
            )
    start = load_start_model(base, recipe.scratch, seed, run.device)
    data = load_finetune_data(run, base, start.config.context_length)
    if resumed is None:
        recipe = choose_hyperparameters(recipe, data, start.config.d_model)
    model, lora_config = build_finetune_model(start, base, data, recipe, seed)
    dataset, label_counts = build_task_dataset(model, data, recipe, seed)
    is_balanced = dataset.sample_weights is not None
    spec = data.examples.task_spec
    metric = selection_metric(spec, is_balanced)
    recipe = choose_length(recipe, dataset.steps_per_epoch)
    run.info(summarize(recipe, data, label_counts, is_balanced))
    fingerprint = data.fingerprint()
    if resumed is not None:
        if resumed["data"]["fingerprint"] != fingerprint:
            raise UsageError(
                f"{run.run_dir.path}: the examples are not those that the run started with. Start a new run with another --out"
            )
        metadata = resumed
    else:
        data_metadata = {
            "fingerprint": fingerprint,
            "train": {"examples": len(data.train)},
            "validation": {"examples": len(data.validation)},
            "available": data.examples.num_available,
            "labels": label_counts,
            "problems": data.num_issues,
        }
        metadata = new_metadata(
            run,
            recipe,
            model.config,
            seed,
            task=spec.to_dict(),
            **base.metadata(),
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            tuning=asdict(recipe.tuning),
            metric=metric,
            data=data_metadata,
        )
    with setup_training(run, metadata, model, task_loss(recipe, data), dataset, recipe, dynamic_shapes=True) as setup:
        evaluator = TaskEvaluator(run, setup, base, data, dataset, recipe, metric, lora_config)
        trainer = Trainer(run, setup, recipe, evaluator, write_run_reports)
        trainer.train()
        return trainer.write_results(evaluator.evaluate_best())


def choose_hyperparameters(recipe: "FinetuneRecipe", data: "FinetuneData", d_model: int) -> "FinetuneRecipe":
    """Choose the batch size from the number of examples, and the learning rate from the width of the model."""
    batch_examples = recipe.tuning.batch_examples
    if batch_examples is None:
        batch_examples = min(32, max(4, len(data.train) // 8))
        if data.examples.task_spec.task == "chat":
            batch_examples = min(8, batch_examples)  # packed rows
    lr = recipe.training.lr or default_lr(d_model, recipe.lora)
    return replace(
        recipe,
        training=replace(recipe.training, lr=lr),
        tuning=replace(recipe.tuning, batch_examples=batch_examples),
    )


def default_lr(d_model: int, lora: bool) -> float:
    """Learning rate for a model width.

    GPT-1's 6.25e-5 at width 768 (Radford et al. 2018, section 4.1) and 1.5e-3 at width 128 (the best of four on two data sets),
    interpolated on logarithmic axes. A LoRA adapter takes more.
    """
    lr = 6.25e-5 * (768 / d_model) ** (math.log(24) / math.log(6))
    return min(1.5e-3, lr) * (LORA_LR_MULTIPLIER if lora else 1)


def choose_length(recipe: "FinetuneRecipe", steps_per_epoch: int) -> "FinetuneRecipe":
    """Choose the number of steps from the number of epochs, if neither steps nor a budget is given."""
    if recipe.steps is not None or recipe.budget is not None:
        return recipe
    epochs = recipe.tuning.epochs or min(30.0, max(3.0, MIN_STEPS / steps_per_epoch))
    steps = max(1, math.ceil(epochs * steps_per_epoch))
    return replace(recipe, steps=steps, tuning=replace(recipe.tuning, epochs=epochs))


def task_loss(recipe: "FinetuneRecipe", data: "FinetuneData") -> "LossFn":
    """The loss of a kind of task."""
    from nextword.tasks.dataset import HEAD_KINDS
    from nextword.training import losses

    kind = data.examples.task_spec.kind
    if kind in HEAD_KINDS:
        return losses.classification_loss(kind, recipe.tuning.auxiliary)
    return losses.dpo_loss(recipe.tuning.beta) if kind == "preference" else losses.completion_loss


def summarize(recipe: "FinetuneRecipe", data: "FinetuneData", label_counts: dict[str, int], is_balanced: bool) -> str:
    """Task, labels, method and length of a run, for the console."""
    spec = data.examples.task_spec
    columns = " · ".join(f"{role}: {column}" for role, column in spec.columns)
    lines = [
        f"task {spec.task} ({columns}): {len(data.train):,} training examples, {len(data.validation):,} validation examples"
    ]
    if spec.labels:
        shown = [f"{name} {label_counts[name]:,}" if label_counts else name for name in spec.labels[:12]]
        lines.append(f"{len(spec.labels)} labels: {', '.join(shown)}" + (", …" if len(spec.labels) > 12 else ""))
    if is_balanced:
        lines.append("labels are imbalanced: rare ones get more weight, and macro-F1 decides (--tuning.balance no)")
    length = f"{recipe.steps:,} steps" if recipe.steps else f"{recipe.budget:.0f} s"
    lines.append(
        f"{'LoRA' if recipe.lora else 'all weights'}{' from scratch' if recipe.scratch else ''}: {length} of "
        f"{recipe.tuning.batch_examples} {'rows' if spec.task == 'chat' else 'examples'}, "
        f"learning rate {recipe.training.lr:.2g}"
    )
    return "\n".join(lines)
