"""``nextword pretrain``: a GPT from text."""

import math
import shlex
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextword.commands.command import Context, argument, command, option, options, stored_options
from nextword.commands.results import RunResult
from nextword.commands.shared import (
    RecipeOptions,
    RunOptions,
    format_corpus,
    input_paths,
    open_or_prepare_corpus,
    require_inputs,
    run_path,
)
from nextword.common.errors import UsageError
from nextword.common.format import format_duration
from nextword.common.run_dir import diff_settings

if TYPE_CHECKING:
    from torch import Tensor

    from nextword.data.corpus import Corpus
    from nextword.pipeline.language_model import BaseModel
    from nextword.training.config import Recipe
    from nextword.training.launch import RunContext, TrainFn

OVERFITTING_ADVICE = "More text, --model.dropout or a smaller size help."


@options
class PretrainConfig(RecipeOptions, RunOptions):
    """Train a GPT from scratch on your own text.

    The model size, the batch size and the learning rate are chosen for the text, the time and this machine, and printed with
    the reasons. A GPU with bfloat16 trains in mixed precision. Use finetune --task continue to train an existing model on more
    text, and plan to see the choices first.

    Attributes:
        corpora: Files, directories, shards from nextword prepare, or built-in datasets (python-docs, tinystories, wikitext,
            fineweb-edu).
        out: Run directory: the model, its checkpoints, metrics and report.
    """

    corpora: tuple[str, ...] = argument(default=(), converter=input_paths, deprecated="corpus")
    out: Path = option(default=None, converter=run_path, kw_only=False, required=True, stored=False)


def format_run(result: RunResult) -> str:
    """The summary of a pre-training run for a person."""
    lines = [f"{result.steps:,} steps in {format_duration(result.seconds)}: {result.model}"]
    if result.loss is not None:
        lines.append(
            f"validation loss {result.loss:.4f} · {result.bits_per_byte:.4f} bits/byte · perplexity {result.perplexity:.2f} "
            f"(all {result.validation_tokens:,} tokens of the validation set, weights of step {result.best_step:,})"
        )
    lines.append(f"report: {Path(result.run) / 'report.html'}")
    return "\n".join([*lines, f"Try it: nextword generate {result.run} {shlex.quote(result.prompt or '')}"])


@command(PretrainConfig, example="nextword pretrain my-texts/ --out runs/mine --budget 30m", to_text=format_run)
def pretrain(config: PretrainConfig, context: Context) -> RunResult:
    from nextword.common.run_dir import fail_if_locked

    fail_if_locked(config.out)
    from nextword.common.run_dir import RunDir
    from nextword.data.corpus import Corpus

    if not RunDir(config.out).exists:
        require_inputs(config.corpora)
    recipe = config.resolved_recipe()

    def train(run: "RunContext") -> dict[str, Any]:
        if run.metadata is not None:
            return train_language_model(run, Corpus.open(run.run_dir.path / run.metadata["shards"]))
        corpus = open_or_prepare_corpus(
            run.request["corpora"],
            run.run_dir.data_dir,
            tokenizer=recipe.tokenizer,
            vocab_size=recipe.vocab_size,
            text_column=config.text_column,
            strict=config.strict,
            console=run.console,
        )
        run.info(format_corpus(corpus))
        return train_language_model(run, corpus, recipe)

    result = start_run(train, config, config.out, context, strict=config.strict)
    if not result:  # a worker process of torchrun; the main process returns the result
        return None  # type: ignore[return-value]
    return RunResult.from_dict(result)


def start_run(
    train: "TrainFn", config: RunOptions, out: Path, context: Context, strict: bool = False
) -> dict[str, Any]:
    """Start or resume a training run with the options of a command.

    Args:
        train: Builds, trains and evaluates the run.
        config: The options.
        out: The run directory.
        context: The console and the start time.
        strict: Fail if the newest checkpoint is corrupt, instead of using the one before it.

    Returns:
        The content of result.json; empty on worker ranks.
    """
    from nextword.common.environment import resolve_device
    from nextword.common.run_dir import RunDir
    from nextword.reporting.report import write_run_reports
    from nextword.training.launch import RunContext, run_training

    run = RunContext(
        RunDir(out),
        stored_options(config),
        context.console,
        resolve_device(config.device),
        context.started,
        write_run_reports,
        resume=config.resume,
        strict=strict,
        tensorboard=config.tensorboard,
        mirror_url=config.mirror,
    )
    return run_training(train, run)


def train_language_model(
    run: "RunContext", corpus: "Corpus", recipe: "Recipe | None" = None, base: "BaseModel | None" = None
) -> dict[str, Any]:
    """Train a language model on a corpus.

    Args:
        run: The run.
        corpus: The prepared text.
        recipe: The options of a new run. A resume uses those in run.json.
        base: The model to continue from; None to start from random weights.

    Returns:
        The content of result.json; empty on worker ranks.

    Raises:
        UsageError: the corpus is too small, is not the one that the run started with, or cannot be divided between the ranks.
    """
    import torch

    from nextword.data.dataset import TokenDataset, derive_seed
    from nextword.model.config import ModelConfig
    from nextword.model.gpt import GPT
    from nextword.model.hf import load_model
    from nextword.pipeline.evaluators import LanguageModelEvaluator
    from nextword.pipeline.language_model import evaluate_forgetting
    from nextword.training.config import Recipe
    from nextword.training.launch import setup_training
    from nextword.training.losses import causal_lm_loss
    from nextword.training.parallel import unsharded
    from nextword.training.trainer import Trainer

    seconds_per_step = 0.0
    if run.metadata is None:
        assert recipe is not None
        metadata, seconds_per_step = choose_settings(run, corpus, recipe, base)
    else:
        metadata = run.metadata
        check_resume(run, metadata, corpus)
    recipe, seed = Recipe.from_dict(metadata["recipe"]), metadata["seed"]
    model_config = ModelConfig.from_dict(metadata["model"])
    dataset = TokenDataset(corpus.tokens("train"), model_config.context_length, metadata["fixed"]["rows"], seed)
    if base is None:
        model = GPT.on_meta(model_config)
    else:
        weights = load_model(base.directory, run.device).state_dict()
        model = GPT.from_weights(model_config, {name: w for name, w in weights.items() if name != "score.weight"})

    def init_weights() -> Iterable[tuple[str, "Tensor"]]:
        torch.manual_seed(derive_seed(seed, 3))
        return model.iter_init_weights()

    with setup_training(
        run,
        metadata,
        model,
        causal_lm_loss,
        dataset,
        recipe,
        init_weights=init_weights,
        seconds_per_step=seconds_per_step,
    ) as setup:
        evaluator = LanguageModelEvaluator(run, setup, corpus, dataset, recipe)
        trainer = Trainer(run, setup, recipe, evaluator, detect_spikes=True, overfitting_advice=OVERFITTING_ADVICE)
        trainer.train()
        metrics = evaluator.evaluate_best()
        if base is not None:
            metrics["task"] = "continue"
            if len(corpus.tokens("validation")) >= 2:
                before = evaluator.evaluate_replicated(load_model(base.directory, run.device))
                metrics["before"] = {"loss": before.loss, "bits_per_byte": before.bits_per_byte}
            with unsharded(run.dist, setup.eager_step) as trained:
                metrics["forgetting"] = evaluate_forgetting(base, trained)
        return trainer.write_results(metrics)


def choose_settings(
    run: "RunContext", corpus: "Corpus", recipe: "Recipe", base: "BaseModel | None"
) -> tuple[dict[str, Any], float]:
    """Choose what the recipe leaves open: size, batch, learning rate, dropout. Returns run.json and the seconds per step."""
    from nextword.model.config import ModelConfig
    from nextword.model.hf import load_model
    from nextword.planning.planner import DEFAULT_BATCH_TOKENS, plan_corpus
    from nextword.planning.size_selection import default_peak_lr
    from nextword.training.launch import new_metadata
    from nextword.training.parallel import check_tp_divisibility

    seed, num_tokens = run.request["seed"] or 0, len(corpus.tokens("train"))
    if num_tokens < 2:
        raise UsageError(f"{corpus.path}: the training set has {num_tokens} tokens, too few to train on")
    run.dist = dist = run.dist.with_tensor_parallel(recipe.training.tensor)
    if base is None:
        budget_left = None if recipe.budget is None else recipe.budget - run.elapsed_seconds()
        plan = plan_corpus(corpus, recipe, run.device, seconds=budget_left, num_processes=dist.world_size)
        for line in plan.summary_lines():
            run.info(line)
        batch_tokens, lr = plan.batch_tokens, plan.lr
        recipe = replace(recipe, size=plan.size)
        model_config = ModelConfig.from_dict({**plan.model, "dropout": recipe.model.get("dropout", plan.dropout)})
    else:  # the shape of the base model, and a third of the learning rate of a new one
        plan, training = None, recipe.training
        model_config = load_model(base.directory).config
        batch_tokens = training.batch_tokens or DEFAULT_BATCH_TOKENS
        lr = training.lr or default_peak_lr(model_config.d_model, batch_tokens, training.optimizer) / 3
        model_config = replace(model_config, n_labels=0, dropout=recipe.model.get("dropout", 0.0))
    recipe = replace(recipe, training=replace(recipe.training, batch_tokens=batch_tokens, lr=lr))
    check_tp_divisibility(model_config, dist.tp_size)
    rows = dist.dp_size * max(1, round(batch_tokens / model_config.context_length / dist.dp_size))
    tokens_per_step = rows * model_config.context_length
    if plan is not None and (recipe.tokens is not None or recipe.flops is not None):
        recipe = replace(recipe, steps=math.ceil(plan.tokens / tokens_per_step))
    specific: dict[str, Any] = {"preset": recipe.preset, "size": recipe.size}
    if plan is not None:
        specific["plan"] = plan.to_dict()
    if base is not None:
        specific = {"task": {"task": "continue"}, **base.metadata()}
    metadata = new_metadata(
        run,
        recipe,
        model_config,
        seed,
        data=corpus_metadata(corpus),
        shards="data" if corpus.path == run.run_dir.data_dir else str(corpus.path.resolve()),
        **specific,
    )
    metadata["fixed"]["rows"] = rows
    return metadata, 0.0 if plan is None else plan.seconds_per_token * tokens_per_step


def check_resume(run: "RunContext", metadata: dict[str, Any], corpus: "Corpus") -> None:
    """Check that the corpus is that of the run, and divide the batch between the ranks.

    Raises:
        UsageError: the corpus has changed, or the number of data-parallel ranks does not divide the batch.
    """
    path = run.run_dir.path
    if metadata["data"]["fingerprint"] != corpus.fingerprint:
        differences = diff_settings(metadata["data"], corpus_metadata(corpus), "data")
        raise UsageError(
            f"{path}: the text is not the one that the run started with:\n  "
            + "\n  ".join(differences)
            + "\nStart a new run with another --out"
        )
    tp_size = metadata["recipe"]["training"]["tensor"]
    run.dist = dist = run.dist.with_tensor_parallel(math.gcd(tp_size, run.dist.world_size))
    if dist.tp_size != tp_size:
        run.warn(f"--training.tensor {tp_size} does not divide {dist.world_size} processes: using {dist.tp_size}")
    rows = metadata["fixed"]["rows"]
    if rows % dist.dp_size:
        raise UsageError(f"{path}: a batch of {rows} rows cannot be divided equally between {dist.dp_size} ranks")


def corpus_metadata(corpus: "Corpus") -> dict[str, Any]:
    """What run.json records of a corpus."""
    return {
        "fingerprint": corpus.fingerprint,
        "documents": corpus.documents,
        "duplicates": corpus.duplicates,
        "train": asdict(corpus.train),
        "validation": asdict(corpus.validation),
        "problems": corpus.problems["total"],
        "tokenizer": {"kind": corpus.tokenizer.kind, "vocab_size": corpus.tokenizer.vocab_size},
    }
