"""What the verbs of the command line share: the options that every one takes, and results in words."""

import json as json_module
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter

from nextword.common.console import Console, format_duration
from nextword.common.errors import UsageError
from nextword.model.config import PRESETS, SIZES, ModelConfig
from nextword.training.config import RECIPES, FinetuneHyperparameters, TrainingConfig


@Parameter(name="*")
@dataclass(frozen=True)
class CommonOptions:
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


def make_optional_fields_class(cls: type, name: str, exclude: tuple[str, ...] = ()) -> Any:
    """A settings class with every field optional, for options such as --training.lr; what is not said is None."""
    hints = get_type_hints(cls)
    options_class = make_dataclass(
        name,
        [
            (f.name, Annotated[hints[f.name] | None, Parameter(help=f.metadata["help"], show_default=False)], None)
            for f in fields(cls)
            if f.name not in exclude
        ],
        frozen=True,
    )
    options_class.__module__ = (
        __name__  # without a module of its own, Cyclopts takes it for a type of the standard library
    )
    return options_class


ModelOptions: Any = make_optional_fields_class(ModelConfig, "ModelOptions", exclude=("vocab_size", "n_labels"))
TrainingOptions: Any = make_optional_fields_class(TrainingConfig, "TrainingOptions")
TuningOptions: Any = make_optional_fields_class(FinetuneHyperparameters, "TuningOptions", exclude=("epochs",))
PrecisionOption = Annotated[
    Literal["float32", "int8", "int4"],
    Parameter(help="Of the weights: fewer bits are faster and take less memory, and cost a little quality."),
]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
ModelGroup: Any = Annotated[ModelOptions, Parameter(group="Single settings of the model")]
TuningGroup: Any = Annotated[TuningOptions, Parameter(group="Single settings of the fine-tuning")]
TrainingGroup: Any = Annotated[TrainingOptions, Parameter(group="Single settings of the training")]


@Parameter(name="*")
@dataclass(frozen=True)
class RunOptions:
    """What a pre-training is to be, as far as the person says; a plan takes the same."""

    recipe: Annotated[str | None, Parameter(help=f"A named recipe: {', '.join(RECIPES)}.")] = None
    preset: Annotated[str | None, Parameter(help=f"The kind of model: {', '.join(PRESETS)}. [default: modern]")] = None
    size: Annotated[
        str | None, Parameter(help=f"{', '.join(SIZES)}. Chosen from the text and the time where not given.")
    ] = None
    tokenizer: Annotated[
        str | None,
        Parameter(
            help="bpe (byte-level, trained on this text), char (one token a character), or a tokenizer.json's path."
        ),
    ] = None
    vocab_size: Annotated[int | None, Parameter(help="Of a new BPE; chosen to suit the text where not given.")] = None
    budget: Annotated[
        str | None,
        Parameter(help="Wall time of the whole run, such as 90s, 30m or 2h; ten minutes where nothing is said."),
    ] = None
    steps: Annotated[int | None, Parameter(help="Train so many steps instead.")] = None
    tokens: Annotated[str | None, Parameter(help="Train on so many tokens instead, such as 5M.")] = None
    flops: Annotated[str | None, Parameter(help="Train with so many floating-point operations instead: 1e15.")] = None
    text_column: Annotated[str | None, Parameter(help="The column of tables that holds the text.")] = None
    strict: Annotated[
        Flag,
        Parameter(
            help="Stop at the first thing that is wrong in the text, or at a damaged newest checkpoint, instead of telling and "
            "going on."
        ),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True)
class TaskOptions:
    """What labelled examples are for, and what learns from them."""

    task: Annotated[str | None, Parameter(help="Guessed from the columns where not given, and said.")] = None
    validation: Annotated[
        list[str] | None,
        Parameter(negative="", help="Tables of held-out examples; a tenth of the data where not given."),
    ] = None
    column: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="Names a column that goes by another name: --column prompt=english --column completion=french.",
        ),
    ] = None
    lora: Annotated[
        Flag,
        Parameter(
            help="Train a small adapter and leave the model's own weights alone (RUN/adapter; RUN/model is merged)."
        ),
    ] = False

    def to_kwargs(self) -> dict[str, Any]:
        """As the functions of the package take them."""
        return {
            "task": self.task, "validation": self.validation or [], "columns": parse_columns(self.column or []), "lora": self.lora
        }  # fmt: skip


def given_options(options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) is not None}


def print_result(result: dict[str, Any], options: CommonOptions, format_text: Callable[[], str]) -> None:
    """One JSON object, or lines for a person; nothing of an empty result, for which another process speaks."""
    if result:
        print(json_module.dumps(result, ensure_ascii=False) if options.json else format_text())


def format_pretrain_summary(result: dict[str, Any]) -> str:
    lines = [f"{result['steps']:,} steps in {format_duration(result['seconds'])}: {result['model']}"]
    if "loss" in result:
        lines.append(
            f"validation loss {result['loss']:.4f} · {result['bits_per_byte']:.4f} bits/byte · "
            f"perplexity {result['perplexity']:.2f} (all {result['validation_tokens']:,} held-out tokens, "
            f"weights of step {result['best_step']:,})"
        )
    return "\n".join([*lines, f"report: {Path(result['run']) / 'report.html'}"])


def format_plan(plan: dict[str, Any]) -> str:
    """What was chosen and why, and what to expect, for a person."""
    text, energy = plan["text"], plan["energy"]
    watt_hours = f"{energy['watt_hours']:.3g} Wh, {'measured' if energy['measured'] else 'estimated'}"
    prepared = (
        f", {format_duration(plan['preparation_seconds'])} of it for the text"
        if plan["preparation_seconds"] >= 1
        else ""
    )
    rows = {
        "text": f"{text['bytes'] / 1e6:,.2f} MB to learn from, {text['documents']:,} documents, {text['tokens']:,} tokens"
        + (", by a sample" if text["sampled"] else ""),
        "model": f"{plan['parameters']:,} parameters · vocabulary {text['vocab_size']:,} · "
        f"context {plan['model']['context_length']:,}",
        "training": f"{plan['tokens']:,} tokens, {plan['epochs']:.1f} times over the text · {plan['steps']:,} steps of "
        f"{plan['batch_tokens']:,}",
        "time": format_duration(plan["seconds"]) + prepared,
        "memory": f"{plan['memory_bytes'] / 1e9:.1f} GB",
        "energy": watt_hours,
        "operations": f"{plan['flops']:.2g}",
        "bits/byte": f"{plan['bits_per_byte']:.2f}, and four times in five {plan['low']:.2f} to {plan['high']:.2f}",
    }  # fmt: skip
    return "\n".join([*plan["why"], "", *(f"{name:<11}{value}" for name, value in rows.items())])


def format_cluster_estimate(plan: dict[str, Any]) -> str:
    """A plan on paper, for a person."""
    model = plan["model"]
    sharding = {
        "data": "weights whole in each while it works, state shared by all",
        "full": "each block's weights gathered as it works",
        "hybrid": "weights shared inside a machine, and a copy in each",
    }[plan["parallel"]]
    sharding += f"; {plan['tensor']} GPUs to a matrix" if plan["tensor"] > 1 else ""
    sharding += "; activations made again" if plan["recompute"] else ""
    times = [plan[key] for key in ("seconds", "low_seconds", "high_seconds")]
    times = [f"{t / 86400:,.3g} days" if times[0] > 2 * 86400 else format_duration(t) for t in times]
    rows = {
        "machines": f"{plan['machines']:,} with {plan['gpus'] // plan['machines']} × {plan['gpu']}",
        "model": f"{plan['parameters'] / 1e9:,.3g} billion parameters · {model['n_layers']} layers of {model['d_model']:,} · "
        f"context {model['context_length']:,} · vocabulary {model['vocab_size']:,}",
        "training": f"{plan['tokens'] / 1e9:,.4g} billion tokens · {plan['steps']:,} steps of {plan['batch_tokens']:,}",
        "sharing": sharding,
        "memory": f"{plan['memory_bytes'] / 1e9:,.1f} GB of a GPU",
        "sending": f"{plan['sent_bytes'] / 1e9:,.3g} GB a GPU and step, {format_duration(plan['sending_seconds'])} of "
        f"{format_duration(plan['step_seconds'])}",
        "use": f"{100 * plan['utilisation']:.0f} % of the datasheet's operations (MFU)",
        "time": "{} ({} to {})".format(*times),
        "GPU hours": f"{plan['gpu_hours']:,.0f}",
        "energy": f"{plan['kilowatt_hours']:,.0f} kWh, by the datasheet",
        "operations": f"{plan['flops']:.3g}",
        **({} if plan["money"] is None else {"money": f"{plan['money']:,.0f}"}),
    }
    return "\n".join(f"{name:<11}{value}" for name, value in rows.items())


def suggest_generate_command(result: dict[str, Any]) -> str:
    return f"nextword generate {result['run']} {shlex.quote(result['prompt'])}"


def parse_columns(columns: list[str]) -> dict[str, str]:
    """ROLE=NAME, as --column has it. Raises `UsageError` for anything else."""
    pairs = [column.partition("=") for column in columns]
    if wrong := [column for column, (role, _, name) in zip(columns, pairs, strict=True) if not role or not name]:
        raise UsageError(f"--column {wrong[0]!r}: write the role and the column's name, as in --column text=review")
    return {role: name for role, _, name in pairs}


def format_finetune_summary(result: dict[str, Any]) -> str:
    """What a fine-tuning has come to, with what needs no model beside it."""
    lines = [f"{result['steps']:,} steps in {format_duration(result['seconds'])}: {result['model']}"]
    metric = result.get("metric", "")
    if metric in result.get("scores", {}):
        lines.append(f"{metric.replace('_', ' ')} {format_metric(result['scores'][metric])}, held-out examples")
        for name, scores in {**result.get("baselines", {}), "before": result.get("before", {})}.items():
            if metric in scores:
                lines.append(f"  {name}: {format_metric(scores[metric])}")
    if result.get("bits_per_byte") is not None:
        before = result.get("before", {}).get("bits_per_byte")
        lines.append(
            f"{result['bits_per_byte']:.4f} bits/byte of the held-out {'text' if result['task'] == 'continue' else 'answers'}"
            + (f" ({before:.4f} before)" if isinstance(before, float) else "")
        )
    if forgetting := result.get("forgetting"):
        lines.append(f"{forgetting['after']:.4f} bits/byte on the old text ({forgetting['before']:.4f} before)")
    lines.append(f"report: {Path(result['run']) / 'report.html'}")
    return "\n".join([*lines, f"Try it: {suggest_next_command(result)}"])


def format_transfer_summary(result: dict[str, Any]) -> str:
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


def suggest_next_command(result: dict[str, Any]) -> str:
    task, run = result["task"], result["run"]
    if task in ("chat", "prefer"):
        return f"nextword chat {run}"
    if task == "continue":
        return suggest_generate_command(result)
    texts = {"classify": "a text", "rewrite": "a text", "entail": "premise|hypothesis", "similarity": "one|the other"}
    words = texts.get(task, "question|one choice|another").split("|")
    return f"nextword predict {run} {' '.join(map(shlex.quote, words))}"


def format_metric(score: dict[str, Any]) -> str:
    """0.898 (0.870 to 0.922; 500)."""
    digits = 1 if score["value"] > 1 else 3
    value, low, high = (f"{score[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high}; {score['n']:,})"
