"""Each option of a command is declared once: for the command line, the Python function and run.json."""

import dataclasses
import inspect
import json
from typing import Any

import pytest

import nextword
from nextword.commands.cli import GROUPS, OutputOptions, build_app, summary
from nextword.commands.cli import run as run_command
from nextword.commands.command import COMMANDS, declared_fields, describe, parse_docstring, stored_options
from nextword.commands.finetune import FinetuneConfig
from nextword.commands.pretrain import PretrainConfig
from nextword.common.options import info_of
from nextword.model.config import PRESETS, SIZES, ModelConfig
from nextword.training.config import RECIPES, FinetuneHyperparameters, TrainingConfig

build_app(0.0)  # registers all commands
NAMES = sorted(COMMANDS)
CLASSES = [
    *(command.config for _, command in sorted(COMMANDS.items())),
    OutputOptions,
    ModelConfig,
    TrainingConfig,
    FinetuneHyperparameters,
]


def test_every_command_is_in_one_group_and_in_one_file():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == NAMES
    assert [summary(name) for name in NAMES] == [
        describe(COMMANDS[name].config)[0].partition("\n")[0] for name in NAMES
    ]
    for name in NAMES:
        module = f"nextword.commands.{name}"
        assert COMMANDS[name].config.__module__ == COMMANDS[name].run.__module__ == module


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_is_declared_once_with_help_and_default(cls):
    described = [name for base in cls.__mro__[:-1] for name in parse_docstring(base)[1]]
    assert len(described) == len(set(described)), "an option is described in two classes"
    descriptions = describe(cls)[1]
    declared = [f for f in dataclasses.fields(cls) if not (cls is ModelConfig and f.name == "vocab_size")]
    assert set(descriptions) - {"vocab_size"} == {f.name for f in declared} - {"vocab_size"}
    for f in declared:
        text, info = descriptions[f.name], info_of(f)
        assert text.endswith("."), f"{f.name}: {text}"
        chosen_elsewhere = f.default is None or f.default == ()
        if (
            cls is not ModelConfig
            and chosen_elsewhere
            and not (info.positional or info.required or info.settings or info.python_only)
        ):
            assert "Default: " in text, f"--{f.name} does not state its default: {text}"


@pytest.mark.parametrize("name", NAMES)
def test_the_python_function_has_the_options_of_the_command(name):
    config = COMMANDS[name].config
    function = getattr(nextword, name, None)
    if function is None:
        assert name == "chat"
        return
    parameters = inspect.signature(function).parameters
    assert set(parameters) == {f.name for f in dataclasses.fields(config)}
    for f in declared_fields(config):
        default = inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default
        assert parameters[f.name].default == default
        assert f"    {f.name}: " in function.__doc__
    assert COMMANDS[name].example.startswith(f"nextword {name}")
    assert COMMANDS[name].example in function.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_the_help_shows_every_option(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    build_app(0.0)([name, "--help"])
    shown = capsys.readouterr().out
    assert COMMANDS[name].example in shown
    for cls in (COMMANDS[name].config, OutputOptions):
        for f in declared_fields(cls):
            info = info_of(f)
            if info.python_only or info.settings is not None:
                continue
            flag = info.flag or f"--{f.name}"
            word = f.name.upper() if info.positional else flag if isinstance(flag, str) else flag[0]
            assert word.replace("_", "-") in shown
    for f in declared_fields(COMMANDS[name].config):
        if info_of(f).deprecated:
            assert f"--{info_of(f).deprecated} " not in shown


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("name", ["", *NAMES])
def test_the_help_fits_the_terminal(name, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    build_app(0.0)([name, "--help"] if name else ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    if not name and width == 80:  # one line per command
        assert sum(line.startswith(f"│ {command} ") for command in NAMES for line in lines) == len(NAMES)
        assert not [line for line in lines if line.startswith("│    ")]


def test_an_option_means_the_same_in_every_command():
    by_name: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for name, text in describe(command.config)[1].items():
            by_name.setdefault(name, set()).add(text)
    for name in ("limit", "text_column", "device", "training", "mirror", "tensorboard"):
        assert len(by_name[name]) <= 2 if name == "training" else len(by_name[name]) == 1, by_name[name]
    assert not by_name.keys() & set("price seeds whole against noise intensity suites passages scratch grace".split())


def test_choices_are_named_in_the_help():
    descriptions = describe(PretrainConfig)[1]
    for option, names in (("recipe", RECIPES), ("preset", PRESETS), ("size", SIZES)):
        assert not [name for name in names if name not in descriptions[option]]


def test_run_json_stores_the_options_that_belong_to_the_run():
    pretraining = stored_options(PretrainConfig((), "run", budget="30m", training={"lr": 0.1, "warmup": None}))
    assert set(pretraining) == {
        *("corpora", "recipe", "preset", "size", "tokenizer", "vocab_size", "normalize", "text_column", "seed"),
        *("validation", "test", "validation_fraction"),
        *("steps", "budget", "tokens", "flops", "members", "model", "training"),
    }
    assert (pretraining["budget"], pretraining["training"]) == (1800.0, {"lr": 0.1})
    finetuning = stored_options(FinetuneConfig("model", (), "run", max_examples=5))
    assert set(finetuning) == {
        *("model", "data", "task", "columns", "label_map", "lora", "scratch", "limit", "seed"),
        *("validation", "test", "validation_fraction"),
        *("steps", "budget", "training", "tuning", "metric"),
    }
    assert (finetuning["limit"], finetuning["lora"]) == (5, None)
    json.dumps([pretraining, finetuning])


@pytest.mark.parametrize(
    ("command", "arguments", "old", "value", "new"),
    [
        ("evaluate", ["nowhere"], "whole", True, "no_limit"),
        ("evaluate", ["nowhere"], "against", "nothing", "compare_to"),
        ("evaluate", ["nowhere"], "noise", ["nothing"], "seed_runs"),
        ("evaluate", ["nowhere"], "suites", ["blimp=nothing"], "benchmarks"),
        ("audit", ["nowhere"], "suites", ["nothing"], "benchmarks"),
        ("audit", ["nowhere"], "passages", ["text"], "search_texts"),
        ("audit", ["nowhere"], "texts", 3, "num_samples"),
        ("audit", ["nowhere"], "prefixes", 3, "num_prefixes"),
        ("audit", ["nowhere"], "price", 0.3, "electricity_price"),
        ("audit", ["nowhere"], "intensity", 300.0, "carbon_intensity"),
        ("plan", ["nowhere"], "price", 2.0, "gpu_hour_price"),
        ("finetune", ["nowhere", "nothing.csv", "run"], "limit", 3, "max_examples"),
        ("finetune", ["nowhere", "nothing.csv", "run"], "scratch", True, "from_scratch"),
        ("serve", ["nowhere"], "grace", 3.0, "shutdown_timeout"),
        ("transfer", ["nowhere", "nothing.csv", "run"], "seeds", 2, "num_seeds"),
    ],
)
def test_former_parameters_work_with_a_warning(command, arguments, old, value, new):
    function: Any = getattr(nextword, command)
    with (
        pytest.warns(DeprecationWarning, match=f"'{old}' is deprecated: use '{new}'"),
        pytest.raises(nextword.NextwordError),
    ):
        function(*arguments, **{old: value})


def test_former_values_of_parallel_work_with_a_warning():
    from nextword.training.config import get_recipe, with_overrides

    for old, new in (("data", "fsdp-no-reshard"), ("full", "fsdp"), ("hybrid", "hsdp")):
        with pytest.warns(DeprecationWarning, match=f"use '{new}'"):
            assert with_overrides(get_recipe(None), training={"parallel": old}).training.parallel == new
        assert TrainingConfig(parallel=old).parallel == new  # type: ignore[arg-type]  # as an old run.json has it


def test_results_are_objects_that_still_work_as_dictionaries():
    result: Any = nextword.plan(gpu="h100", tokens="2B")
    assert result.gpus == 8
    with pytest.warns(DeprecationWarning, match="use its attributes or to_dict"):
        assert result["gpus"] == result.gpus
    with pytest.warns(DeprecationWarning):
        assert result.get("colour", 1) == 1
    with pytest.warns(DeprecationWarning):
        assert "gpus" in result
    with pytest.warns(DeprecationWarning):
        assert set(result) == set(result.to_dict())
    assert json.dumps(result.to_dict())


@pytest.mark.parametrize(
    ("arguments", "old", "new"),
    [
        (["evaluate", "nowhere", "--suite", "blimp"], "--suite", "--benchmark"),
        (["audit", "nowhere", "--passage", "text"], "--passage", "--search-text"),
        (["serve", "nowhere", "--grace", "3"], "--grace", "--shutdown-timeout"),
        (
            ["pretrain", "python-docs", "--out", "nowhere", "--training.final-lr", "7"],
            "--training.final-lr",
            "--training.final-lr-ratio",
        ),
        (
            ["pretrain", "python-docs", "--out", "nowhere", "--training.matrix-lr", "0"],
            "--training.matrix-lr",
            "--training.muon-lr",
        ),
    ],
)
def test_former_options_of_the_command_line_work_with_a_warning(arguments, old, new, capsys):
    assert run_command(arguments) > 0
    assert f"{old} is deprecated: use {new}\n" in capsys.readouterr().err


def test_settings_have_their_new_names_in_python_and_their_old_ones_in_run_json():
    settings = {"muon_lr": 0.02, "final_lr_ratio": 0.1}
    config = PretrainConfig((), "run", training=settings)
    assert stored_options(config)["training"] == {"matrix_lr": 0.02, "final_lr": 0.1}
    assert config.resolved_recipe().training.final_lr == 0.1
