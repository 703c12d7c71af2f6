"""What a run is: recipes, named, each a difference from another. Light to import; the help texts are made from here."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from nextword.common.errors import UsageError
from nextword.model.config import PRESETS, SIZES


def option_field(default: Any, help: str) -> Any:
    """A field with what `--help` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """How the weights are found."""

    optimizer: Literal["muon", "adamw"] = option_field(
        "muon", "Muon for the matrices inside the blocks and AdamW for the rest, or AdamW for everything."
    )
    lr: float | None = option_field(None, "Peak learning rate; where not given, from the model's width and the batch.")
    matrix_lr: float | None = option_field(None, "Muon's peak learning rate; the same as lr where it is not given.")
    beta1: float = option_field(0.9, "AdamW's decay of the mean gradient.")
    beta2: float = option_field(0.99, "AdamW's decay of the mean squared gradient.")
    momentum: float = option_field(0.9, "Muon's momentum.")
    weight_decay: float = option_field(0.1, "Decoupled weight decay of all matrices.")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = option_field(
        "wsd", "The learning rate's way down: half a cosine, flat and then a line (wsd), a line, or none."
    )
    warmup: float = option_field(0.02, "The share of the run in which the learning rate rises.")
    final_lr: float = option_field(0.0, "The learning rate at the end, as a share of the peak.")
    clip: float = option_field(1.0, "The gradient norm is cut to this; 0 for never.")
    batch_tokens: int | None = option_field(None, "Tokens of one step; where not given, from the length of the run.")
    micro_batch_rows: int | None = option_field(
        None,
        "Windows that go through the model at once; fitted to memory where not given. Changes the result by rounding at most.",
    )
    compile: Literal["auto", "yes", "no"] = option_field(
        "auto",
        "torch.compile: where our compiled parts do not fit, a compiler is there and the run is long; always; never.",
    )
    parallel: Literal["data", "full", "hybrid"] = option_field(
        "data",
        "How several processes share the weights: whole in each during a step (data), a block at a time (full), or that within "
        "each machine and a copy in each (hybrid).",
    )
    tensor: int = option_field(
        1,
        "So many processes work on the same windows and on each matrix together: for a model so wide that a block's weights or "
        "its activations are too much for one. Divides the heads and the feed-forward width.",
    )
    checkpoint_activations: bool = option_field(
        False,
        "Keep only what goes into each block for the backward pass, and make the rest again: less memory, a third more work.",
    )
    evaluations: int = option_field(20, "How often the held-out text is looked at in the course of the run.")
    patience: int | None = option_field(
        None, "Stop after so many evaluations without a better one; never where not given."
    )
    save_every: int | None = option_field(
        None, "Steps between checkpoints; by the clock (about every minute) where not given."
    )


RUN_LENGTH_FIELDS = ("steps", "tokens", "flops", "budget")  # the ways to say how long a run is


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a run but the text: the model, the tokenizer, the training.

    `size` None: chosen from the amount of text and the time there is. `model` holds single settings of `ModelConfig`.
    """

    name: str
    preset: str = "modern"
    size: str | None = None
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    budget: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        return cls(**{**values, "training": TrainingConfig(**values["training"])})


@dataclass(frozen=True)
class FinetuneHyperparameters:
    """What fine-tuning adds to training."""

    epochs: float | None = option_field(
        None, "Times over the examples; where not given, three for many and more for few."
    )
    batch_examples: int | None = option_field(None, "Examples of one step; 32, or fewer where there are few.")
    auxiliary: float = option_field(
        0.5, "λ, the weight of the next-word loss on the examples' own text beside the task's; 0 for none."
    )
    dropout: float = option_field(0.1, "Share of the residual stream that is dropped; none in preference tuning.")
    balance: Literal["auto", "yes", "no"] = option_field(
        "auto",
        "Let rare labels count more: where the commonest is three times as common as the rarest, always, or never.",
    )
    rank: int = option_field(8, "LoRA's rank.")
    alpha: float = option_field(16.0, "LoRA's scale: its products count alpha / rank.")
    beta: float = option_field(0.1, "How closely preference tuning keeps to the model it begins with.")


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that makes a fine-tuning but the model and the data. `training.lr` None: chosen from the model's width.

    The schedule is GPT-1's (Radford et al. 2018, section 4.1): AdamW, a line down to nothing, hardly any warm-up.
    """

    task: str | None = None
    lora: bool = False
    scratch: bool = False
    steps: int | None = None
    budget: float | None = None
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            optimizer="adamw", beta2=0.999, schedule="linear", warmup=0.002, final_lr=0.0, weight_decay=0.01,
            evaluations=10, patience=5,
        )
    )  # fmt: skip
    tuning: FinetuneHyperparameters = field(default_factory=FinetuneHyperparameters)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuneConfig":
        return cls(
            **{
                **values,
                "training": TrainingConfig(**values["training"]),
                "tuning": FinetuneHyperparameters(**values["tuning"]),
            }
        )


def build_finetune_config(
    *, training: dict[str, Any] | None = None, tuning: dict[str, Any] | None = None, **settings: Any
) -> FinetuneConfig:
    """The fine-tuning recipe with single settings changed; None leaves one as it is.

    Raises:
        UsageError: an unknown setting, one out of its range, or both `steps` and `budget`.
    """
    defaults = FinetuneConfig()
    if settings.get("steps") is not None and settings.get("budget") is not None:
        raise UsageError("--steps and --budget exclude each other: say one")
    training = {name: value for name, value in (training or {}).items() if value is not None}
    tuning = {name: value for name, value in (tuning or {}).items() if value is not None}
    for config_class, overrides in ((TrainingConfig, training), (FinetuneHyperparameters, tuning)):
        if unknown := set(overrides) - {f.name for f in fields(config_class)}:
            raise UsageError(f"unknown {config_class.__name__.lower()} settings: {', '.join(sorted(unknown))}")
    changed = {name: value for name, value in settings.items() if value is not None}
    recipe = replace(
        defaults, **changed, training=replace(defaults.training, **training), tuning=replace(defaults.tuning, **tuning)
    )
    t = recipe.tuning
    ranges = {
        "epochs": t.epochs is None or t.epochs > 0, "batch_examples": t.batch_examples is None or t.batch_examples >= 1,
        "auxiliary": t.auxiliary >= 0, "dropout": 0 <= t.dropout < 1, "balance": t.balance in ("auto", "yes", "no"),
        "rank": t.rank >= 1, "alpha": t.alpha > 0, "beta": t.beta > 0,
    }  # fmt: skip
    check_ranges("tuning", t, ranges)
    validate_training(recipe.training)
    validate_run_length(recipe, ("steps", "budget"))
    return recipe


def default() -> Recipe:
    """A modern block under Muon, for ten minutes."""
    return Recipe("default", budget=600.0)


def adamw_cosine() -> Recipe:
    """What the older presets were trained with: AdamW and a cosine (Radford et al. 2018, section 4.1)."""
    training = TrainingConfig(
        optimizer="adamw", lr=1e-3, beta2=0.99, schedule="cosine", warmup=0.05, final_lr=0.1, weight_decay=0.1
    )
    return replace(default(), name="plain", preset="gpt2", training=training)


def post_norm() -> Recipe:
    """Post-norm models: AdamW with a long warm-up, without which they do not start (Xiong et al. 2020, section 3)."""
    base = adamw_cosine()
    return replace(base, name="post-norm", preset="gpt1", training=replace(base.training, lr=5e-4, warmup=0.2))


def continued_pretrain() -> Recipe:
    """More text for a model that is trained already."""
    return replace(default(), name="continue")


def reference_char() -> Recipe:
    """The field's reference run on one small machine: a GPT-2 of 0.8 million parameters on characters, 2,000 steps."""
    base = adamw_cosine()
    return replace(
        base,
        name="reference-char",
        tokenizer="char",
        model={"n_layers": 4, "n_heads": 4, "d_model": 128, "context_length": 64, "dropout": 0.0},
        training=replace(base.training, batch_tokens=12 * 64, warmup=100 / 2000),
        steps=2000,
        budget=None,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "default": default,
    "plain": adamw_cosine,
    "post-norm": post_norm,
    "reference-char": reference_char,
}


def get_recipe(name: str | None, preset: str | None = None) -> Recipe:
    """A recipe by name; without one, the one that suits the preset.

    Raises:
        UsageError: no such recipe.
    """
    if name is None:
        preset_recipe = {"gpt2": adamw_cosine, "gpt1": post_norm, "tutorial": post_norm}.get(preset or "", default)()
        return replace(preset_recipe, preset=preset or preset_recipe.preset)
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    return replace(recipe, preset=preset or recipe.preset)


def with_overrides(
    recipe: Recipe, *, model: dict[str, Any] | None, training: dict[str, Any] | None, **settings: Any
) -> Recipe:
    """A recipe with single settings changed; None leaves one as it is.

    Raises:
        UsageError: an unknown setting, or more than one of the ways to say how long.
    """
    run_lengths = [name for name in RUN_LENGTH_FIELDS if settings.get(name) is not None]
    if len(run_lengths) > 1:
        raise UsageError(f"--{' and --'.join(run_lengths)} exclude each other: say one")
    if run_lengths:
        recipe = replace(recipe, **dict.fromkeys(RUN_LENGTH_FIELDS))
    training = {name: value for name, value in (training or {}).items() if value is not None}
    if unknown := set(training) - {f.name for f in fields(TrainingConfig)}:
        raise UsageError(f"unknown training settings: {', '.join(sorted(unknown))}")
    model = {name: value for name, value in (model or {}).items() if value is not None}
    changed = {name: value for name, value in settings.items() if value is not None}
    recipe = replace(recipe, **changed, model={**recipe.model, **model}, training=replace(recipe.training, **training))
    validate(recipe)
    return recipe


def validate(recipe: Recipe) -> None:
    """Refuse what cannot be meant. Raises `UsageError` with the setting and what it may be."""
    for name, value, choices in (("preset", recipe.preset, PRESETS), ("size", recipe.size, SIZES)):
        if value is not None and value not in choices:
            raise UsageError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
    validate_training(recipe.training)
    validate_run_length(recipe, RUN_LENGTH_FIELDS)


def validate_training(training: TrainingConfig) -> None:
    ranges = {
        "lr": training.lr is None or training.lr > 0, "warmup": 0 <= training.warmup <= 1, "final_lr": 0 <= training.final_lr <= 1, "clip": training.clip >= 0,
        "batch_tokens": training.batch_tokens is None or training.batch_tokens >= 1, "weight_decay": training.weight_decay >= 0,
        "evaluations": training.evaluations >= 1,
        "beta1": 0 <= training.beta1 < 1, "beta2": 0 <= training.beta2 < 1, "momentum": 0 <= training.momentum < 1,
        "matrix_lr": training.matrix_lr is None or training.matrix_lr > 0,
        "micro_batch_rows": training.micro_batch_rows is None or training.micro_batch_rows >= 1,
        "patience": training.patience is None or training.patience >= 1, "save_every": training.save_every is None or training.save_every >= 1,
        "optimizer": training.optimizer in ("muon", "adamw"), "schedule": training.schedule in ("cosine", "wsd", "linear", "constant"),
        "compile": training.compile in ("auto", "yes", "no"), "parallel": training.parallel in ("data", "full", "hybrid"),
        "tensor": training.tensor >= 1,
    }  # fmt: skip
    check_ranges("training", training, ranges)


def check_ranges(group: str, settings: Any, validity: dict[str, bool]) -> None:
    for name, is_valid in validity.items():
        if not is_valid:
            raise UsageError(f"--{group}.{name.replace('_', '-')} cannot be {getattr(settings, name)!r}")


def validate_run_length(recipe: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} must be more than 0, not {value}")


DURATION_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str | float) -> float:
    """A time as people write it, in seconds: 90, 90s, 30m, 1h30m, 1.5h, 2d. Raises `UsageError`."""
    if isinstance(text, (int, float)):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    normalized = "".join(number + unit for number, unit in parts)
    if (
        not parts
        or normalized != re.sub(r"\s", "", text.lower())
        or any(unit not in DURATION_UNITS for _, unit in parts)
    ):
        raise UsageError(f"{text!r} is no time: write 90s, 30m, 2h or 1h30m")
    return sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)


def parse_float(text: str | float) -> float:
    """A number as people write it: 1e17, 250000. Raises `UsageError`."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is no number: write 1e17") from None


def parse_count(text: str | int) -> int:
    """A number of things as people write it: 2000, 100k, 1.5M, 2B, 1.4T. Raises `UsageError`."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", text.strip().lower().replace(",", "").replace("_", ""))
    if match is None:
        raise UsageError(f"{text!r} is no number: write 2000, 100k, 1.5M, 2B or 1.4T")
    value = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2]]
    if value != int(value):
        raise UsageError(f"{text!r} is no whole number")
    return int(value)
