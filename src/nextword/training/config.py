"""What a run is: recipes, named, each a difference from another. Light to import; the help texts are made from here."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from nextword.common.errors import UsageError
from nextword.model.config import PRESETS, SIZES


def setting(default: Any, help: str) -> Any:
    """A field with what `--help` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Training:
    """How the weights are found."""

    optimizer: Literal["muon", "adamw"] = setting(
        "muon", "Muon for the matrices inside the blocks and AdamW for the rest, or AdamW for everything."
    )
    lr: float | None = setting(None, "Peak learning rate; where not given, from the model's width and the batch.")
    matrix_lr: float | None = setting(None, "Muon's peak learning rate; the same as lr where it is not given.")
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient.")
    beta2: float = setting(0.99, "AdamW's decay of the mean squared gradient.")
    momentum: float = setting(0.9, "Muon's momentum.")
    weight_decay: float = setting(0.1, "Decoupled weight decay of all matrices.")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = setting(
        "wsd", "The learning rate's way down: half a cosine, flat and then a line (wsd), a line, or none."
    )
    warmup: float = setting(0.02, "The share of the run in which the learning rate rises.")
    final_lr: float = setting(0.0, "The learning rate at the end, as a share of the peak.")
    clip: float = setting(1.0, "The gradient norm is cut to this; 0 for never.")
    batch_tokens: int | None = setting(None, "Tokens of one step; where not given, from the length of the run.")
    micro_batch_rows: int | None = setting(
        None,
        "Windows that go through the model at once; fitted to memory where not given. Changes the result by rounding at most.",
    )
    compile: Literal["auto", "yes", "no"] = setting(
        "auto",
        "torch.compile: where our compiled parts do not fit, a compiler is there and the run is long; always; never.",
    )
    parallel: Literal["data", "full", "hybrid"] = setting(
        "data",
        "How several processes share the weights: whole in each during a step (data), a block at a time (full), or that within "
        "each machine and a copy in each (hybrid).",
    )
    tensor: int = setting(
        1,
        "So many processes work on the same windows and on each matrix together: for a model so wide that a block's weights or "
        "its activations are too much for one. Divides the heads and the feed-forward width.",
    )
    checkpoint_activations: bool = setting(
        False,
        "Keep only what goes into each block for the backward pass, and make the rest again: less memory, a third more work.",
    )
    evaluations: int = setting(20, "How often the held-out text is looked at in the course of the run.")
    patience: int | None = setting(None, "Stop after so many evaluations without a better one; never where not given.")
    save_every: int | None = setting(
        None, "Steps between checkpoints; by the clock (about every minute) where not given."
    )


LENGTHS = ("steps", "tokens", "flops", "budget")  # the ways to say how long a run is


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
    training: Training = field(default_factory=Training)
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    budget: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        return cls(**{**values, "training": Training(**values["training"])})


@dataclass(frozen=True)
class Tuning:
    """What fine-tuning adds to training."""

    epochs: float | None = setting(None, "Times over the examples; where not given, three for many and more for few.")
    batch_examples: int | None = setting(None, "Examples of one step; 32, or fewer where there are few.")
    auxiliary: float = setting(
        0.5, "λ, the weight of the next-word loss on the examples' own text beside the task's; 0 for none."
    )
    dropout: float = setting(0.1, "Share of the residual stream that is dropped; none in preference tuning.")
    balance: Literal["auto", "yes", "no"] = setting(
        "auto",
        "Let rare labels count more: where the commonest is three times as common as the rarest, always, or never.",
    )
    rank: int = setting(8, "LoRA's rank.")
    alpha: float = setting(16.0, "LoRA's scale: its products count alpha / rank.")
    beta: float = setting(0.1, "How closely preference tuning keeps to the model it begins with.")


@dataclass(frozen=True)
class Finetune:
    """Everything that makes a fine-tuning but the model and the data. `training.lr` None: chosen from the model's width.

    The schedule is GPT-1's (Radford et al. 2018, section 4.1): AdamW, a line down to nothing, hardly any warm-up.
    """

    task: str | None = None
    lora: bool = False
    scratch: bool = False
    steps: int | None = None
    budget: float | None = None
    training: Training = field(
        default_factory=lambda: Training(
            optimizer="adamw", beta2=0.999, schedule="linear", warmup=0.002, final_lr=0.0, weight_decay=0.01,
            evaluations=10, patience=5,
        )
    )  # fmt: skip
    tuning: Tuning = field(default_factory=Tuning)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Finetune":
        return cls(**{**values, "training": Training(**values["training"]), "tuning": Tuning(**values["tuning"])})


def finetune(
    *, training: dict[str, Any] | None = None, tuning: dict[str, Any] | None = None, **settings: Any
) -> Finetune:
    """The fine-tuning recipe with single settings changed; None leaves one as it is.

    Raises:
        UsageError: an unknown setting, one out of its range, or both `steps` and `budget`.
    """
    base = Finetune()
    if settings.get("steps") is not None and settings.get("budget") is not None:
        raise UsageError("--steps and --budget exclude each other: say one")
    training = {name: value for name, value in (training or {}).items() if value is not None}
    tuning = {name: value for name, value in (tuning or {}).items() if value is not None}
    for kind, given in ((Training, training), (Tuning, tuning)):
        if unknown := set(given) - {f.name for f in fields(kind)}:
            raise UsageError(f"unknown {kind.__name__.lower()} settings: {', '.join(sorted(unknown))}")
    changed = {name: value for name, value in settings.items() if value is not None}
    recipe = replace(
        base, **changed, training=replace(base.training, **training), tuning=replace(base.tuning, **tuning)
    )
    t = recipe.tuning
    ranges = {
        "epochs": t.epochs is None or t.epochs > 0, "batch_examples": t.batch_examples is None or t.batch_examples >= 1,
        "auxiliary": t.auxiliary >= 0, "dropout": 0 <= t.dropout < 1, "balance": t.balance in ("auto", "yes", "no"),
        "rank": t.rank >= 1, "alpha": t.alpha > 0, "beta": t.beta > 0,
    }  # fmt: skip
    refuse_out_of_range("tuning", t, ranges)
    check_training(recipe.training)
    check_length(recipe, ("steps", "budget"))
    return recipe


def default() -> Recipe:
    """A modern block under Muon, for ten minutes."""
    return Recipe("default", budget=600.0)


def plain() -> Recipe:
    """What the older presets were trained with: AdamW and a cosine (Radford et al. 2018, section 4.1)."""
    training = Training(
        optimizer="adamw", lr=1e-3, beta2=0.99, schedule="cosine", warmup=0.05, final_lr=0.1, weight_decay=0.1
    )
    return replace(default(), name="plain", preset="gpt2", training=training)


def post_norm() -> Recipe:
    """Post-norm models: AdamW with a long warm-up, without which they do not start (Xiong et al. 2020, section 3)."""
    base = plain()
    return replace(base, name="post-norm", preset="gpt1", training=replace(base.training, lr=5e-4, warmup=0.2))


def continuing() -> Recipe:
    """More text for a model that is trained already."""
    return replace(default(), name="continue")


def reference_char() -> Recipe:
    """The field's reference run on one small machine: a GPT-2 of 0.8 million parameters on characters, 2,000 steps."""
    base = plain()
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
    "plain": plain,
    "post-norm": post_norm,
    "reference-char": reference_char,
}


def recipe_named(name: str | None, preset: str | None = None) -> Recipe:
    """A recipe by name; without one, the one that suits the preset.

    Raises:
        UsageError: no such recipe.
    """
    if name is None:
        suited = {"gpt2": plain, "gpt1": post_norm, "tutorial": post_norm}.get(preset or "", default)()
        return replace(suited, preset=preset or suited.preset)
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    return replace(recipe, preset=preset or recipe.preset)


def change(recipe: Recipe, *, model: dict[str, Any] | None, training: dict[str, Any] | None, **settings: Any) -> Recipe:
    """A recipe with single settings changed; None leaves one as it is.

    Raises:
        UsageError: an unknown setting, or more than one of the ways to say how long.
    """
    lengths = [name for name in LENGTHS if settings.get(name) is not None]
    if len(lengths) > 1:
        raise UsageError(f"--{' and --'.join(lengths)} exclude each other: say one")
    if lengths:
        recipe = replace(recipe, **dict.fromkeys(LENGTHS))
    training = {name: value for name, value in (training or {}).items() if value is not None}
    if unknown := set(training) - {f.name for f in fields(Training)}:
        raise UsageError(f"unknown training settings: {', '.join(sorted(unknown))}")
    model = {name: value for name, value in (model or {}).items() if value is not None}
    changed = {name: value for name, value in settings.items() if value is not None}
    recipe = replace(recipe, **changed, model={**recipe.model, **model}, training=replace(recipe.training, **training))
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Refuse what cannot be meant. Raises `UsageError` with the setting and what it may be."""
    for name, value, known in (("preset", recipe.preset, PRESETS), ("size", recipe.size, SIZES)):
        if value is not None and value not in known:
            raise UsageError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    check_training(recipe.training)
    check_length(recipe, LENGTHS)


def check_training(t: Training) -> None:
    ranges = {
        "lr": t.lr is None or t.lr > 0, "warmup": 0 <= t.warmup <= 1, "final_lr": 0 <= t.final_lr <= 1, "clip": t.clip >= 0,
        "batch_tokens": t.batch_tokens is None or t.batch_tokens >= 1, "weight_decay": t.weight_decay >= 0,
        "evaluations": t.evaluations >= 1,
        "beta1": 0 <= t.beta1 < 1, "beta2": 0 <= t.beta2 < 1, "momentum": 0 <= t.momentum < 1,
        "matrix_lr": t.matrix_lr is None or t.matrix_lr > 0,
        "micro_batch_rows": t.micro_batch_rows is None or t.micro_batch_rows >= 1,
        "patience": t.patience is None or t.patience >= 1, "save_every": t.save_every is None or t.save_every >= 1,
        "optimizer": t.optimizer in ("muon", "adamw"), "schedule": t.schedule in ("cosine", "wsd", "linear", "constant"),
        "compile": t.compile in ("auto", "yes", "no"), "parallel": t.parallel in ("data", "full", "hybrid"),
        "tensor": t.tensor >= 1,
    }  # fmt: skip
    refuse_out_of_range("training", t, ranges)


def refuse_out_of_range(group: str, settings: Any, ranges: dict[str, bool]) -> None:
    for name, right in ranges.items():
        if not right:
            raise UsageError(f"--{group}.{name.replace('_', '-')} cannot be {getattr(settings, name)!r}")


def check_length(recipe: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} must be more than 0, not {value}")


UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str | float) -> float:
    """A time as people write it, in seconds: 90, 90s, 30m, 1h30m, 1.5h, 2d. Raises `UsageError`."""
    if isinstance(text, (int, float)):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    whole = "".join(number + unit for number, unit in parts)
    if not parts or whole != re.sub(r"\s", "", text.lower()) or any(unit not in UNITS for _, unit in parts):
        raise UsageError(f"{text!r} is no time: write 90s, 30m, 2h or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def number(text: str | float) -> float:
    """A number as people write it: 1e17, 250000. Raises `UsageError`."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is no number: write 1e17") from None


def count(text: str | int) -> int:
    """A number of things as people write it: 2000, 100k, 1.5M, 2B, 1.4T. Raises `UsageError`."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", text.strip().lower().replace(",", "").replace("_", ""))
    if match is None:
        raise UsageError(f"{text!r} is no number: write 2000, 100k, 1.5M, 2B or 1.4T")
    number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2]]
    if number != int(number):
        raise UsageError(f"{text!r} is no whole number")
    return int(number)
