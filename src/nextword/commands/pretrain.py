"""``nextword pretrain``: a GPT from text."""

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nextword.commands import shared
from nextword.commands.command import Context, command, stored_options
from nextword.commands.members import Member, check_members, describe_members, load_members, train_members
from nextword.common.errors import UsageError
from nextword.common.format import format_duration, quote_command
from nextword.common.fs import MANIFEST
from nextword.common.options import argument, option, options
from nextword.common.run_dir import RunDir, diff_settings, fail_if_locked
from nextword.model.config import ModelConfig
from nextword.training.config import DEFAULT_WEIGHT_DECAY, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from nextword.commands.finetune import FinetuneConfig
    from nextword.data.corpus import Corpus
    from nextword.pipeline.language_model import BaseModel
    from nextword.training.launch import RunContext, TrainFn
    from nextword.training.trainer import Expectation

RunResultT = TypeVar("RunResultT", bound=shared.RunResult)
TEACHER_WEIGHT = 0.5  # of the averaged predictions of the members, beside the text
OVERFITTING_ADVICE = "More text, --model.dropout or a smaller size help."


@options
class PretrainConfig(shared.RecipeOptions, shared.RunOptions):
    """Train a GPT from scratch on your own text.

    The model size, the batch size and the learning rate are chosen for the text, the time and this machine, and printed with
    the reasons. A GPU with bfloat16 trains in mixed precision. Use finetune --task continue to train an existing model on more
    text, and plan to see the choices first.

    Attributes:
        corpora: Files, directories, shards from nextword prepare, or built-in datasets (python-docs, tinystories, wikitext,
            fineweb-edu).
        out: Run directory: the model, its checkpoints, metrics and report.
        keep_members: Keep the runs of --members in RUN/members.
    """

    corpora: tuple[str, ...] = argument(default=(), converter=shared.input_paths, deprecated="corpus")
    out: Path = option(default=None, converter=shared.run_path, kw_only=False, required=True, stored=False)
    keep_members: bool = option(default=False, stored=False)


def format_run(result: shared.RunResult) -> str:
    """The summary of a pre-training run for a person."""
    details: list[str] = []
    if result.loss is not None:
        details.append(
            f"validation loss {result.loss:.4f} · {result.bits_per_byte:.4f} bits/byte · perplexity {result.perplexity:.2f} "
            f"({format_sample(result)}; it also selected the weights, those of step {result.best_step:,})"
        )
    if result.test_loss is not None:
        sample = format_sample(result, "test")
        details.append(
            f"test loss {result.test_loss:.4f} · {result.test_bits_per_byte:.4f} bits/byte ({sample}; it selected nothing)"
        )
    if members := result.members:
        values = ", ".join(f"{value:.4f}" for value in members["bits_per_byte"])
        spread = members["standard_deviation"]
        noise = "" if spread is None else f"; standard deviation over seeds {spread:.4f}"
        details.append(f"distilled from {len(members['seeds'])} members with {values} bits/byte{noise}")
    if interval := result.test_interval or result.interval:
        bounds = "" if interval["low"] is None else f"95 % CI {interval['low']:.4f}–{interval['high']:.4f} bits/byte "
        details.append(f"{bounds}{interval['basis']}")
    return format_summary(result, details, "generate", result.prompt or "")


def format_sample(result: shared.RunResult, split: Literal["validation", "test"] = "validation") -> str:
    """How much of the validation or test set the loss was computed on, with the interval of a sample."""
    prefix, tokens = ("test_", result.test_tokens) if split == "test" else ("", result.validation_tokens)
    loss, bits_per_byte, margin = (getattr(result, prefix + name) for name in ("loss", "bits_per_byte", "loss_margin"))
    if not margin or not loss or not bits_per_byte:
        return f"all {tokens:,} tokens of the {split} set"
    return (
        f"± {margin * bits_per_byte / loss:.4f}, 95 % confidence: the budget allowed {tokens:,} tokens of the {split} set; "
        "nextword evaluate reads all"
    )


def format_summary(result: shared.RunResult, details: list[str], command: str, *inputs: str) -> str:
    """The length of a run, its results, and a command that uses its model, with inputs."""
    length = f"{result.steps:,} steps in {format_duration(result.seconds)}: {result.model}"
    example = quote_command("nextword", command, result.run, *inputs)
    return "\n".join([length, *details, f"report: {Path(result.run) / 'report.html'}", f"Try it: {example}"])


@command(PretrainConfig, example="nextword pretrain my-texts/ --out runs/mine --budget 30m", to_text=format_run)
def pretrain(config: PretrainConfig, context: Context) -> shared.RunResult:
    """Train on the text of a new run, or continue a run."""
    if not RunDir(config.out).exists:
        shared.require_inputs(config.corpora)
    recipe = config.resolved_recipe()

    def train(run: "RunContext") -> dict[str, Any]:
        from nextword.planning.planner import check_memory

        check_members(config, recipe.members, run.dist.world_size)
        if run.metadata is None:
            check_memory(recipe, run.device, run.dist.world_size)
        corpus = open_or_prepare_corpus(
            run,
            run.request["corpora"],
            tokenizer=recipe.tokenizer,
            vocab_size=recipe.vocab_size,
            normalize=config.normalize or "none",
            text_column=config.text_column,
            **shared.held_out_options(run.request),
            strict=config.strict,
        )
        if run.metadata is None:
            run.info(shared.format_corpus(corpus))
        members: list[Member] = []
        if run.metadata is not None:
            members = [Member(**member) for member in run.metadata.get("members", [])]
        elif recipe.members > 1:
            members = train_members(run, config, corpus, recipe, pretrain.run)
        result = train_language_model(run, corpus, recipe, members=members)
        if not config.keep_members:
            shutil.rmtree(run.run_dir.path / "members", ignore_errors=True)
        return result

    return start_run(shared.RunResult, train, config, context)


def start_run(
    result_type: type[RunResultT], train: "TrainFn", config: "PretrainConfig | FinetuneConfig", context: Context
) -> RunResultT:
    """Start or resume a training run with the options of a command.

    Args:
        result_type: The class of the result.
        train: Builds, trains and evaluates the run.
        config: The options.
        context: The console and the start time.

    Returns:
        The content of result.json. A worker process of torchrun returns None.
    """
    fail_if_locked(config.out)  # before anything heavy is imported
    from nextword.common.environment import resolve_device
    from nextword.reporting.report import write_run_reports
    from nextword.training.launch import RunContext, run_training

    run = RunContext(
        RunDir(config.out),
        stored_options(config),
        context.console,
        resolve_device(config.device),
        context.started,
        write_run_reports,
        resume=config.resume,
        strict=config.strict,
        tensorboard=config.tensorboard,
        mirror_url=config.mirror,
        command=context.call,
    )
    result = run_training(train, run)
    return result_type.from_dict(result) if result else None  # type: ignore[return-value]  # of a worker process


def open_or_prepare_corpus(run: "RunContext", texts: Sequence[str], **settings: Any) -> "Corpus":
    """The corpus of a run: when it is resumed, the one that it started with.

    Args:
        run: The run.
        texts: Shards from nextword prepare, or other text, which is tokenized into RUN/data.
        settings: How it is tokenized, see `nextword.data.prepare.prepare`.

    Raises:
        UsageError: shards are mixed with other inputs.
    """
    from nextword.data.corpus import Corpus
    from nextword.data.prepare import prepare

    if run.metadata is not None:
        return Corpus.open(run.run_dir.path / run.metadata["shards"])
    shards = [path for path in texts if (Path(path) / MANIFEST).is_file()]
    if not shards:
        return prepare(texts, run.run_dir.data_dir, **settings, progress=run.console.progress, log=run.console.info)
    if len(texts) > 1:
        raise UsageError(f"{shards[0]}: shards cannot be mixed with other inputs; prepare all text together")
    if chosen := [name for name in shared.HELD_OUT_OPTIONS if settings.get(name)]:
        flag = f"--{chosen[0].replace('_', '-')}"
        raise UsageError(f"{flag} does not apply to {shards[0]}: shards hold out what nextword prepare was given")
    if settings.get("normalize", "none") != "none":
        raise UsageError(f"--normalize does not apply to {shards[0]}: shards are normalized by nextword prepare")
    return Corpus.open(Path(shards[0]))


def train_language_model(
    run: "RunContext", corpus: "Corpus", recipe: Recipe, base: "BaseModel | None" = None, members: Sequence[Member] = ()
) -> dict[str, Any]:
    """Train a language model on a corpus.

    Args:
        run: The run.
        corpus: The prepared text.
        recipe: The options of a new run. A resume uses those in run.json.
        base: The model to continue from; None to start from random weights.
        members: Models in RUN/members that are distilled into this one.

    Returns:
        The content of result.json; empty on worker ranks.

    Raises:
        UsageError: the corpus is too small, is not the one that the run started with, or cannot be divided between the ranks.
    """
    import torch

    from nextword.data.dataset import TokenDataset, derive_seed
    from nextword.model.gpt import GPT
    from nextword.model.hf import load_model
    from nextword.pipeline.evaluators import LanguageModelEvaluator
    from nextword.pipeline.language_model import evaluate_forgetting
    from nextword.training.launch import setup_training
    from nextword.training.losses import causal_lm_loss, distillation_loss
    from nextword.training.parallel import unsharded
    from nextword.training.trainer import Trainer

    metadata, seconds_per_step = run.metadata, 0.0
    if metadata is None:
        metadata, seconds_per_step = choose_settings(run, corpus, recipe, base)
        metadata["members"] = [asdict(member) for member in members]
    else:
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
        torch.manual_seed(derive_seed(seed, 3))  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
        return model.iter_init_weights()

    loss_fn = distillation_loss(load_members(run, members), TEACHER_WEIGHT) if members else causal_lm_loss
    with setup_training(
        run, metadata, model, loss_fn, dataset, recipe, init_weights=init_weights, seconds_per_step=seconds_per_step
    ) as setup:
        evaluator = LanguageModelEvaluator(run, setup, corpus, dataset, recipe, evaluates_base=base is not None)
        expectation = None if members else planned_expectation(metadata)
        trainer = Trainer(
            run,
            setup,
            recipe,
            evaluator,
            detect_spikes=True,
            overfitting_advice=OVERFITTING_ADVICE,
            expectation=expectation,
        )
        trainer.train()
        metrics = evaluator.evaluate_best()
        if members:
            metrics["members"] = describe_members(members)
        if base is not None:
            metrics["task"] = "continue"
            if len(corpus.tokens("validation")) >= 2:
                before = evaluator.evaluate(model=load_model(base.directory, run.device))
                metrics["before"] = {"loss": before.loss, "bits_per_byte": before.bits_per_byte}
            with unsharded(run.dist, setup.eager_step) as trained:
                metrics["forgetting"] = evaluate_forgetting(base, trained)
        return trainer.write_results(metrics)


def choose_settings(
    run: "RunContext", corpus: "Corpus", recipe: Recipe, base: "BaseModel | None"
) -> tuple[dict[str, Any], float]:
    """Choose what the recipe leaves open: size, batch, learning rate, dropout. Returns run.json and the seconds per step."""
    from nextword.model.hf import load_model
    from nextword.planning.planner import DEFAULT_BATCH_TOKENS, plan_corpus
    from nextword.planning.size_selection import default_peak_lr
    from nextword.training.launch import new_metadata
    from nextword.training.parallel import check_tp_divisibility

    seed, num_tokens, plan = run.request["seed"] or 0, len(corpus.tokens("train")), None
    if num_tokens < 2:
        raise UsageError(f"{corpus.path}: the training set has {num_tokens} tokens, too few to train on")
    run.dist = dist = run.dist.with_tensor_parallel(recipe.training.tensor)
    if base is None:
        budget = recipe.budget
        cost = recipe.step_cost
        remaining = None if budget is None else lambda: run.remaining_seconds(budget) / cost
        plan = plan_corpus(corpus, recipe, run.device, remaining=remaining, num_processes=dist.world_size)
        for line in (*plan.why, f"expected: {plan.interval}"):
            run.info(line)
        recipe, batch_tokens, lr = replace(recipe, size=plan.size), plan.batch_tokens, plan.lr
        recipe = replace(recipe, training=replace(recipe.training, weight_decay=plan.weight_decay))
        model_config = ModelConfig.from_dict({**plan.model, "dropout": recipe.model.get("dropout", plan.dropout)})
        details: dict[str, Any] = {"preset": recipe.preset, "size": recipe.size, "plan": plan.to_dict()}
    else:  # the shape of the base model, and a third of the learning rate of a new one
        dropout, training = recipe.model.get("dropout", 0.0), recipe.training
        model_config = replace(load_model(base.directory).config, n_labels=0, dropout=dropout)
        batch_tokens = training.batch_tokens or DEFAULT_BATCH_TOKENS
        lr = training.lr or default_peak_lr(model_config.d_model, batch_tokens, training.optimizer) / 3
        details = {"task": {"task": "continue"}, **base.metadata()}
    recipe = replace(recipe, training=replace(recipe.training, batch_tokens=batch_tokens, lr=lr))
    check_tp_divisibility(model_config, dist.tp_size)
    rows = dist.dp_size * max(1, round(batch_tokens / model_config.context_length / dist.dp_size))
    tokens_per_step = rows * model_config.context_length
    if plan is not None and (recipe.tokens is not None or recipe.flops is not None):
        recipe = replace(recipe, steps=math.ceil(plan.tokens / tokens_per_step))
    shards = "data" if corpus.path == run.run_dir.data_dir else str(corpus.path.resolve())
    data = corpus_metadata(corpus)
    metadata = new_metadata(run, recipe, model_config, seed, data=data, shards=shards, **details)
    metadata["fixed"]["rows"] = rows
    return metadata, 0.0 if plan is None else plan.seconds_per_token * tokens_per_step * recipe.step_cost


def planned_expectation(metadata: dict[str, Any]) -> "Expectation | None":
    """The plan of a run, for the trainer; None without a plan that can be renewed."""
    from nextword.planning.size_selection import TRAINING_OVERHEAD, TrainingPlan
    from nextword.training.trainer import Expectation

    if "difficulty" not in metadata.get("plan", {}):  # continued pre-training, or a run of an earlier version
        return None
    earlier = {"weight_decay": DEFAULT_WEIGHT_DECAY}  # plans of earlier versions do not name it
    plan, train_bytes = TrainingPlan.from_dict(earlier | metadata["plan"]), metadata["data"]["train"]["bytes"]
    speed = 1 / (plan.seconds_per_token * TRAINING_OVERHEAD)
    return Expectation(speed, lambda tokens: plan.with_tokens(tokens, train_bytes).interval)


def check_resume(run: "RunContext", metadata: dict[str, Any], corpus: "Corpus") -> None:
    """Check that the corpus is that of the run, and divide the batch between the ranks.

    Raises:
        UsageError: the corpus has changed, or the number of data-parallel ranks does not divide the batch.
    """
    path = run.run_dir.path
    if metadata["data"]["fingerprint"] != corpus.fingerprint:
        differences = diff_settings(metadata["data"], corpus_metadata(corpus), "data")
        message = "\n  ".join([f"{path}: the text is not the one that the run started with:", *differences])
        raise UsageError(f"{message}\nStart a new run with another --out")
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
        "test": asdict(corpus.test),
        "held_out": corpus.describe_held_out(),
        "problems": corpus.problems["total"],
        "tokenizer": {"kind": corpus.tokenizer.kind, "vocab_size": corpus.tokenizer.vocab_size},
    }
