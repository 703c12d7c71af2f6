"""What the verbs of the command line share: the options that every one takes, and results in words."""

import json as json_module
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter

from nextword.console import Console, duration
from nextword.errors import UsageError
from nextword.model.config import PRESETS, SIZES, ModelConfig
from nextword.recipes import RECIPES, Training, Tuning


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every verb takes."""

    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print one result object on standard output.")
    ] = False
    quiet: Annotated[bool, Parameter(negative="", show_default=False, help="Say nothing but results and warnings.")] = (
        False
    )
    seed: Annotated[int | None, Parameter(help="Makes every draw repeatable.")] = None
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"

    def console(self) -> Console:
        return Console(quiet=self.quiet)


def optional(cls: type, name: str, leave_out: tuple[str, ...] = ()) -> Any:
    """A settings class with every field optional, for options such as --training.lr; what is not said is None."""
    hints = get_type_hints(cls)
    made = make_dataclass(
        name,
        [
            (f.name, Annotated[hints[f.name] | None, Parameter(help=f.metadata["help"], show_default=False)], None)
            for f in fields(cls)
            if f.name not in leave_out
        ],
        frozen=True,
    )
    made.__module__ = __name__  # without a module of its own, Cyclopts takes it for a type of the standard library
    return made


ModelOptions: Any = optional(ModelConfig, "ModelOptions", leave_out=("vocab_size", "n_labels"))
TrainingOptions: Any = optional(Training, "TrainingOptions")
TuningOptions: Any = optional(Tuning, "TuningOptions", leave_out=("epochs",))
Precisions = Annotated[
    Literal["float32", "int8", "int4"],
    Parameter(help="Of the weights: fewer bits are faster and take less memory, and cost a little quality."),
]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Recipes = Annotated[str | None, Parameter(help=f"A named recipe: {', '.join(RECIPES)}.")]
Presets = Annotated[str | None, Parameter(help=f"The kind of model: {', '.join(PRESETS)}. [default: modern]")]
Sizes = Annotated[str | None, Parameter(help=f"{', '.join(SIZES)}. Chosen from the text and the time where not given.")]


def said(options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) is not None}


def show(result: dict[str, Any], common: Common, text: Callable[[], str]) -> None:
    """One JSON object, or lines for a person."""
    print(json_module.dumps(result, ensure_ascii=False) if common.json else text())


def summary(result: dict[str, Any]) -> str:
    lines = [f"{result['steps']:,} steps in {duration(result['seconds'])}: {result['model']}"]
    if "loss" in result:
        lines.append(
            f"validation loss {result['loss']:.4f} · {result['bits_per_byte']:.4f} bits/byte · "
            f"perplexity {result['perplexity']:.2f} (all {result['validation_tokens']:,} held-out tokens, "
            f"weights of step {result['best_step']:,})"
        )
    return "\n".join([*lines, f"report: {Path(result['run']) / 'report.html'}"])


def next_commands(result: dict[str, Any]) -> str:
    return f"nextword generate {result['run']} {shlex.quote(result['prompt'])}"


def roles(columns: list[str]) -> dict[str, str]:
    """ROLE=NAME, as --column has it. Raises `UsageError` for anything else."""
    pairs = [column.partition("=") for column in columns]
    if wrong := [column for column, (role, _, name) in zip(columns, pairs, strict=True) if not role or not name]:
        raise UsageError(f"--column {wrong[0]!r}: write the role and the column's name, as in --column text=review")
    return {role: name for role, _, name in pairs}


def tuned_summary(result: dict[str, Any]) -> str:
    """What a fine-tuning has come to, with what needs no model beside it."""
    lines = [f"{result['steps']:,} steps in {duration(result['seconds'])}: {result['model']}"]
    metric = result.get("metric", "")
    if metric in result.get("scores", {}):
        lines.append(f"{metric.replace('_', ' ')} {in_words(result['scores'][metric])}, held-out examples")
        for name, scores in {**result.get("baselines", {}), "before": result.get("before", {})}.items():
            if metric in scores:
                lines.append(f"  {name}: {in_words(scores[metric])}")
    if result.get("bits_per_byte") is not None:
        before = result.get("before", {}).get("bits_per_byte")
        lines.append(
            f"{result['bits_per_byte']:.4f} bits/byte of the held-out {'text' if result['task'] == 'continue' else 'answers'}"
            + (f" ({before:.4f} before)" if isinstance(before, float) else "")
        )
    if forgotten := result.get("forgetting"):
        lines.append(f"{forgotten['after']:.4f} bits/byte on the old text ({forgotten['before']:.4f} before)")
    lines.append(f"report: {Path(result['run']) / 'report.html'}")
    return "\n".join([*lines, f"Try it: {next_for(result)}"])


def transfer_summary(result: dict[str, Any]) -> str:
    """A line for each number of examples, and the sentence."""
    name = result["metric"].replace("_", " ")
    lines = [f"{'examples':>10}  {name + ', pre-trained':>30}  {'from scratch':>26}"]
    for point in result["points"]:
        both = (
            f"{point[kind]['value']:.3f} ({point[kind]['low']:.3f} to {point[kind]['high']:.3f})"
            for kind in ("pretrained", "scratch")
        )
        lines.append("{:>10,}  {:>30}  {:>26}".format(point["examples"], *both))
    return "\n".join([*lines, result["sentence"], f"page: {Path(result['run']) / 'report.html'}"])


def next_for(result: dict[str, Any]) -> str:
    task, run = result["task"], result["run"]
    if task in ("chat", "prefer"):
        return f"nextword chat {run}"
    if task == "continue":
        return next_commands(result)
    texts = {"classify": "a text", "rewrite": "a text", "entail": "premise|hypothesis", "similarity": "one|the other"}
    words = texts.get(task, "question|one choice|another").split("|")
    return f"nextword predict {run} {' '.join(map(shlex.quote, words))}"


def in_words(score: dict[str, Any]) -> str:
    """0.898 (0.870 to 0.922; 500)."""
    digits = 1 if score["value"] > 1 else 3
    value, low, high = (f"{score[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high}; {score['n']:,})"
