"""``nextword pretrain``: a GPT from text."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextword.training.launch import RunContext

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
from nextword.common.format import format_duration


@options
class PretrainConfig(RecipeOptions, RunOptions):
    """Train a GPT from scratch on your own text.

    The model size, the batch size and the learning rate are chosen for the text, the time and this machine, and printed with
    the reasons. Use finetune --task continue to train an existing model on more text, and plan to see the choices first.

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
    from nextword.common.run_lock import fail_if_locked

    fail_if_locked(config.out)
    from nextword.commands.pretrain import train_language_model, write_missing_reports
    from nextword.common.environment import resolve_device
    from nextword.common.run_dir import RunDir
    from nextword.data.corpus import Corpus
    from nextword.training.launch import run_training

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

    result = run_training(
        train,
        config.out,
        stored_options(config),
        device=resolve_device(config.device),
        start_time=context.started,
        resume=config.resume,
        tensorboard=config.tensorboard,
        console=context.console,
        mirror_url=config.mirror,
        strict=config.strict,
        write_reports=write_missing_reports,
    )
    if not result:  # a worker process of torchrun; the main process returns the result
        return None  # type: ignore[return-value]
    return RunResult.from_dict(result)
