"""The members of an ensemble that a pre-training run distills into one model (`pretrain --members N`)."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nextword.commands.command import Context
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunDir
from nextword.training.config import Recipe

if TYPE_CHECKING:
    from nextword.commands.pretrain import PretrainConfig
    from nextword.commands.shared import RunResult
    from nextword.data.corpus import Corpus
    from nextword.model.gpt import GPT
    from nextword.training.launch import RunContext


@dataclass(frozen=True)
class Member:
    """A trained member.

    Attributes:
        name: Name of its run directory in RUN/members.
        seed: Its seed.
        bits_per_byte: On the validation set; None without one.
        weights: SHA-256 of its weights.
    """

    name: str
    seed: int
    bits_per_byte: float | None
    weights: str | None


def check_members(config: "PretrainConfig", members: int, world_size: int) -> None:
    """Raise `UsageError` for options that members do not support."""
    if members == 1:
        if config.keep_members:
            raise UsageError("--keep-members needs --members")
    elif world_size > 1:
        raise UsageError("--members trains in one process: start it without torchrun")
    elif config.mirror:
        raise UsageError("--members cannot be combined with --mirror")


def train_members(
    run: "RunContext",
    config: "PretrainConfig",
    corpus: "Corpus",
    recipe: Recipe,
    pretrain: Callable[["PretrainConfig", Context], "RunResult"],
) -> list[Member]:
    """Train the members, each in a run directory of its own, or continue where an earlier process stopped.

    They differ by their seed: initial weights, data order and dropout. With a budget, each has its share of the time.

    Args:
        run: The run of the distilled model.
        config: Its options.
        corpus: The prepared text.
        recipe: Its recipe.
        pretrain: Trains a member.
    """
    from nextword.common.results import weights_digest

    first_seed = (run.request["seed"] or 0) + 1
    budget = None if recipe.budget is None else recipe.member_share * run.remaining_seconds(recipe.budget)
    members: list[Member] = []
    for i in range(recipe.members):
        directory = RunDir(run.run_dir.path / "members" / str(i + 1))
        is_complete, seed = directory.is_complete, first_seed + i
        run.info(f"member {i + 1} of {recipe.members}{': complete' if is_complete else ''}")
        options = replace(
            config,
            corpora=(str(corpus.path.resolve()),),
            out=directory.path,
            validation=(),
            test=(),
            validation_fraction=None,
            text_column=None,
            tokenizer=None,
            vocab_size=None,
            normalize=None,
            budget=None if directory.exists else budget,
            members=None,
            keep_members=False,
            seed=seed,
            resume=directory.exists,
            tensorboard=False,
        )
        started = time.time()
        result = pretrain(options, Context(Console(quiet=run.console.quiet), started=started, call=run.command))
        # What earlier processes have spent on this member belongs to the budget, too.
        run.seconds_before_resume += max(0.0, result.seconds - (time.time() - started))
        members.append(Member(directory.path.name, seed, result.bits_per_byte, weights_digest(directory.path)))
    return members


def load_members(run: "RunContext", members: Sequence[Member]) -> "list[GPT]":
    """The models of the members, for the distillation.

    Raises:
        UsageError: A member is gone, or is not the one that the run started with.
    """
    from nextword.common.results import weights_digest
    from nextword.model.hf import load_model

    models: list[GPT] = []
    for member in members:
        path = run.run_dir.path / "members" / member.name
        if weights_digest(path) != member.weights:
            raise UsageError(
                f"{path}: not the member that the run started with. Restore it, or start a new run with another --out"
            )
        models.append(load_model(RunDir(path).model_dir, run.device).eval().requires_grad_(False))
    return models


def describe_members(members: Sequence[Member]) -> dict[str, Any]:
    """The members in result.json: the bits per byte of each, and their sample standard deviation, the noise of the seed."""
    values = [member.bits_per_byte for member in members if member.bits_per_byte is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"bits_per_byte": values, "seeds": [member.seed for member in members], "standard_deviation": spread}
