"""Recipes: the settings of a training run. Light to import, since the command line reads them for its help."""

import warnings
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from nextword.common import numbers
from nextword.common.errors import UsageError
from nextword.model.config import PRESETS, SIZES

RUN_LENGTH_FIELDS = ("steps", "tokens", "flops", "budget")  # at most one of them is set
ParallelStrategy = Literal["fsdp-no-reshard", "fsdp", "hsdp"]
LRSchedule = Literal["cosine", "wsd", "linear", "constant"]
DEPRECATED_PARALLEL = {"data": "fsdp-no-reshard", "full": "fsdp", "hybrid": "hsdp"}


DEFAULT_WEIGHT_DECAY = 0.1


def setting_name(f: Field[Any]) -> str:
    """The name of a setting for users. Where it differs from the field's, that one is deprecated, but stays in run.json."""
    return f.metadata.get("name", f.name)


def check_settings(settings: Any, group: str) -> None:
    """Raise `UsageError` for the first setting that is not of its type, by the name of its option."""
    numbers.set_checked_numbers(settings, f"--{group}.")
    for f in fields(settings):
        choices = get_args(f.type) if get_origin(f.type) is Literal else ()
        if choices and getattr(settings, f.name) not in choices:
            value, names = getattr(settings, f.name), ", ".join(choices)
            raise UsageError(
                f"--{group}.{setting_name(f).replace('_', '-')} cannot be {value!r}: choose one of {names}"
            )


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the optimization.

    Attributes:
        optimizer: muon uses Muon for the matrices inside the blocks and AdamW for everything else.
        lr: Peak learning rate. Default: chosen from the width of the model and the batch size.
        matrix_lr: Peak learning rate of the matrices that Muon trains. Default: lr.
        beta1: Decay rate of AdamW's first moment.
        beta2: Decay rate of AdamW's second moment.
        momentum: Muon's momentum.
        weight_decay: Decoupled weight decay of all matrices. Default: 0.1, and more for text that is read many times.
        schedule: Learning rate decay: cosine, wsd (warmup, stable, then linear decay), linear, or constant.
        warmup: Warmup, as a fraction of the run: the learning rate rises linearly to its peak.
        final_lr: Learning rate at the end, as a fraction of the peak.
        clip: Gradient clipping: the maximum gradient norm. 0 disables it.
        batch_tokens: Tokens per optimizer step (the global batch size). Default: chosen from the length of the run.
        micro_batch_rows: Sequences per forward pass; gradients are accumulated over the rest of the batch (gradient
            accumulation). Changes the result by rounding at most. Default: as many as fit into memory.
        compile: When to use torch.compile: auto (for long runs without the built-in CPU kernels), yes or no.
        parallel: Data parallelism: fsdp-no-reshard (sharded state, weights gathered once a step), fsdp (weights gathered
            block by block, least memory) or hsdp (fsdp within a machine, replicated across machines).
        tensor: Tensor parallelism: the number of processes that share each matrix. Must divide the number of heads, the number
            of key-value heads and the feed-forward width.
        checkpoint_activations: Activation checkpointing: keep only the input of each block and recompute the rest in the
            backward pass. Less memory, about a third more compute.
        evaluations: Number of evaluations on the validation set during the run.
        patience: Early stopping: stop after this many evaluations without improvement, neither of the metric nor of the
            validation loss. Fine-tuning also waits for a whole epoch. Default: never.
        save_every: Steps between checkpoints. Default: about one checkpoint a minute.
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    lr: numbers.Positive | None = None
    matrix_lr: numbers.Positive | None = field(default=None, metadata={"name": "muon_lr"})
    beta1: numbers.Decay = 0.9
    beta2: numbers.Decay = 0.99
    momentum: numbers.Decay = 0.9
    weight_decay: numbers.NonNegative | None = None
    schedule: LRSchedule = "wsd"
    warmup: numbers.Share = 0.02
    final_lr: numbers.Share = field(default=0.0, metadata={"name": "final_lr_ratio"})
    clip: numbers.NonNegative = 1.0
    batch_tokens: numbers.Size | None = None
    micro_batch_rows: numbers.Count | None = None
    compile: Literal["auto", "yes", "no"] = "auto"
    parallel: ParallelStrategy = field(default="fsdp-no-reshard", metadata={"deprecated_values": DEPRECATED_PARALLEL})
    tensor: numbers.SmallCount = 1
    checkpoint_activations: bool = False
    evaluations: numbers.Count = 20
    patience: numbers.Count | None = None
    save_every: numbers.Count | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value out of its range."""
        object.__setattr__(self, "parallel", DEPRECATED_PARALLEL.get(self.parallel, self.parallel))
        check_settings(self, "training")


@dataclass(frozen=True)
class FinetuneHyperparameters:
    """Settings of fine-tuning beyond those of the optimization.

    Attributes:
        epochs: Passes over the examples. Default: 3, and more for small datasets.
        batch_examples: Examples per optimizer step. Default: 32, and fewer for small datasets.
        auxiliary: Weight λ of the auxiliary language-modeling loss on the text of the examples. 0 disables it.
        dropout: Dropout rate of the residual stream. Preference tuning uses none.
        balance: Class weights (inverse label frequency) in the loss: auto (if the most frequent label is at least three times
            as frequent as the rarest), yes or no.
        rank: Rank r of the LoRA matrices.
        alpha: LoRA scale: the update is multiplied by alpha / rank.
        beta: DPO's β: how strongly preference tuning stays close to the initial model.
    """

    epochs: numbers.Positive | None = field(default=None, metadata={"flag": "--epochs"})
    batch_examples: numbers.Size | None = None
    auxiliary: numbers.NonNegative = 0.5
    dropout: numbers.Decay = 0.1
    balance: Literal["auto", "yes", "no"] = "auto"
    rank: numbers.SmallCount = 8
    alpha: numbers.Positive = 16.0
    beta: numbers.Positive = 0.1

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value out of its range."""
        check_settings(self, "tuning")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a training run of any kind.

    Attributes:
        steps: Length of the run in optimizer steps.
        budget: Length of the run in seconds of wall-clock time. At most one length is set.
        training: Settings of the optimization.

    Raises:
        UsageError: A value is out of its range.
    """

    steps: numbers.Count | None = None
    budget: numbers.Duration | None = None
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value that is not of its type."""
        numbers.set_checked_numbers(self, "--")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The settings from `to_dict()`."""
        groups = {"training": TrainingConfig, "tuning": FinetuneHyperparameters}
        settings: dict[str, Any] = {name: groups[name](**values[name]) for name in groups if name in values}
        return cls(**{**values, **settings})


@dataclass(frozen=True)
class Recipe(RunConfig):
    """Everything that defines a pre-training run except the text.

    Attributes:
        name: Name of the recipe that it started from.
        preset: Architecture.
        size: Named size. None: chosen from the amount of text and the time.
        tokenizer: bpe, char or the path of a tokenizer.json.
        vocab_size: Vocabulary size of a new BPE tokenizer. None: chosen from the text.
        model: Overrides of single fields of `ModelConfig`.
        tokens, flops: Length of the run in training tokens or floating-point operations.
        members: Models that are distilled into one; 1 for a single model.
    """

    name: str
    preset: str = "modern"
    size: str | None = None
    tokenizer: str = "bpe"
    vocab_size: numbers.Size | None = None
    model: dict[str, Any] = field(default_factory=dict[str, Any])
    tokens: numbers.TokenCount | None = None
    flops: numbers.Flops | None = None
    members: numbers.SmallCount = 1

    @property
    def step_cost(self) -> float:
        """The cost of a step relative to that of a single model: the forward pass of each member is a third of a step."""
        return 1 + self.members / 3 if self.members > 1 else 1.0

    @property
    def member_share(self) -> float:
        """The share of a budget for each member, and for as many tokens of the distilled model at its `step_cost`."""
        return 1 / (self.members + self.step_cost) if self.members > 1 else 1.0

    def __post_init__(self) -> None:
        """Raises `UsageError` for an unknown preset or size, or a number that is not of its type."""
        for name, value, choices in (("preset", self.preset, PRESETS), ("size", self.size, SIZES)):
            if value is not None and value not in choices:
                raise UsageError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
        super().__post_init__()


@dataclass(frozen=True)
class FinetuneRecipe(RunConfig):
    """Everything that defines a fine-tuning run except the model and the data.

    The schedule is GPT-1's (Radford et al. 2018, section 4.1): AdamW, linear decay to zero, a very short warmup.

    Attributes:
        task: classify, entail, similarity, choose, rewrite, chat, prefer or continue. None: inferred from the columns.
        lora: Train LoRA matrices instead of the weights.
        scratch: Start from random weights.
        training: Settings of the optimization. Without `training.lr` it is chosen from the width of the model.
        tuning: Settings of fine-tuning.
    """

    task: str | None = None
    lora: bool = False
    scratch: bool = False
    training: TrainingConfig = TrainingConfig(
        optimizer="adamw", beta2=0.999, schedule="linear", warmup=0.002, weight_decay=0.01, evaluations=10
    )
    tuning: FinetuneHyperparameters = FinetuneHyperparameters()


# ---------------------------------------------------------------- named recipes

ADAMW_COSINE = TrainingConfig(
    optimizer="adamw", lr=1e-3, weight_decay=0.1, schedule="cosine", warmup=0.05, final_lr=0.1
)  # Radford et al. 2018, 4.1
RECIPES = {
    # A modern block with Muon and a WSD schedule, for ten minutes.
    "default": Recipe("default", budget=600.0),
    # Pre-norm models as they were trained first: AdamW and a cosine.
    "plain": Recipe("plain", preset="gpt2", training=ADAMW_COSINE, budget=600.0),
    # Post-norm models do not start without a long warmup (Xiong et al. 2020, section 3).
    "post-norm": Recipe("post-norm", preset="gpt1", training=replace(ADAMW_COSINE, lr=5e-4, warmup=0.2), budget=600.0),
    # The reference run on one small machine: a GPT-2 of 0.8 million parameters on characters.
    "reference-char": Recipe(
        "reference-char",
        preset="gpt2",
        tokenizer="char",
        model={"n_layers": 4, "n_heads": 4, "d_model": 128, "context_length": 64, "dropout": 0.0},
        training=replace(ADAMW_COSINE, batch_tokens=12 * 64),
        steps=2000,
    ),
}
CONTINUED_PRETRAINING = Recipe("continue", budget=600.0)
PRESET_RECIPES = {"gpt2": "plain", "gpt1": "post-norm", "tutorial": "post-norm"}  # of the others: default


def get_recipe(name: str | None, preset: str | None = None) -> Recipe:
    """A recipe by name, or the one that suits the preset. Raises `UsageError` for an unknown name."""
    name = name or PRESET_RECIPES.get(preset or "", "default")
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return replace(RECIPES[name], preset=preset or RECIPES[name].preset)


RecipeT = TypeVar("RecipeT", bound=RunConfig)


def with_overrides(
    recipe: RecipeT,
    *,
    model: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    tuning: Mapping[str, Any] | None = None,
    **settings: Any,
) -> RecipeT:
    """A recipe with single settings replaced. None leaves a setting as it is.

    Raises:
        UsageError: A setting is unknown or out of its range, or more than one run length is given.
    """
    changes = given(settings)
    lengths = [name for name in RUN_LENGTH_FIELDS if name in changes]
    if len(lengths) > 1:
        raise UsageError(f"--{' and --'.join(lengths)} exclude each other: give only one")
    if lengths:
        changes = {name: None for name in RUN_LENGTH_FIELDS if hasattr(recipe, name)} | changes
    changes["training"] = replace_settings(recipe.training, "training", given(training))
    if isinstance(recipe, Recipe):
        changes["model"] = recipe.model | given(model)
    elif isinstance(recipe, FinetuneRecipe):
        changes["tuning"] = replace_settings(recipe.tuning, "tuning", given(tuning))
    return replace(recipe, **changes)


def given(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that have a value."""
    return {name: value for name, value in (settings or {}).items() if value is not None}


def replace_settings(settings: Any, group: str, changes: dict[str, Any]) -> Any:
    """Settings with some fields replaced. Raises `UsageError` for an unknown field."""
    if unknown := set(changes) - {f.name for f in fields(settings)}:
        raise UsageError(f"unknown {group} settings: {', '.join(sorted(unknown))}")
    if (parallel := changes.get("parallel")) in DEPRECATED_PARALLEL:
        replacement = DEPRECATED_PARALLEL[parallel]
        warnings.warn(f"parallel={parallel!r} is deprecated: use {replacement!r}", DeprecationWarning, stacklevel=2)
    return replace(settings, **changes)
