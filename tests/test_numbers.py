"""Every number of every command is within the range of its type, however it is given."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import CLIRunner
from nextword.commands.cli import build_app
from nextword.commands.command import COMMANDS, declared_fields
from nextword.common import numbers
from nextword.common.errors import NextwordError, UsageError
from nextword.common.numbers import Range, number_types
from nextword.common.options import info_of
from nextword.model.config import ConfigError, build_config
from nextword.model.hf_config import parse_model_config
from nextword.training.config import TrainingConfig, setting_name

build_app(0.0)  # registers all commands
HOSTILE = (math.nan, math.inf, -math.inf, -1, -0.5, 0, 5e-324, 1e300, 10**30, 10**400, True, "", "nan", "1e999", [], {})
PATHS = {
    "model": "nowhere",
    "out": "nowhere-either",
    "data": (),
    "corpora": (),
    "paths": ("nowhere",),
    "runs": ("nowhere",),
}


def numeric_options() -> list[tuple[str, str, str | None, type, Range]]:
    """Command, field, group of settings, number type and range of every numeric option."""
    found = []
    for name, command in COMMANDS.items():
        found += [
            (name, field, None, kind, numbers) for field, (kind, numbers, _) in number_types(command.config).items()
        ]
        for f in declared_fields(command.config):
            if (settings := info_of(f).settings) is not None:
                cls = settings if isinstance(settings, type) else type(settings)
                found += [
                    (name, field, f.name, kind, numbers)
                    for field, (kind, numbers, _) in number_types(cls).items()
                    if field not in info_of(f).exclude
                ]
    return found


OPTIONS = numeric_options()


def test_every_number_of_an_option_has_a_range():
    for command in COMMANDS.values():
        for f in declared_fields(command.config):
            if isinstance(f.type, str):
                raise AssertionError(f"{f.name}: types are not strings here")
            if f.type in (int, float, int | None, float | None, tuple[int, ...], tuple[float, ...]):
                raise AssertionError(
                    f"{command.config.__name__}.{f.name} is any {f.type}: choose a type of common/numbers.py"
                )
    assert len(OPTIONS) > 150


def is_inside(value: Any, kind: type, range: Range) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    inside = range.low <= value <= range.high
    return inside and not (range.excluded and value == getattr(range, range.excluded))


def flag_of(field: str, group: str | None) -> str:
    names = {f.name: setting_name(f) for f in dataclasses.fields(TrainingConfig)}
    field = names.get(field, field) if group == "training" else field
    return "--epochs" if field == "epochs" else "--" + ".".join(filter(None, (group, field))).replace("_", "-")


@pytest.mark.parametrize("name", sorted({option[0] for option in OPTIONS}))
def test_from_python_a_number_is_refused_by_its_name_or_accepted(name):
    command = COMMANDS[name]
    required = {
        f.name: PATHS[f.name]
        for f in declared_fields(command.config)
        if f.name in PATHS and (info_of(f).positional or info_of(f).required or f.default is dataclasses.MISSING)
    }
    for (_, field, group, kind, range), value in itertools.product((o for o in OPTIONS if o[0] == name), HOSTILE):
        if is_inside(value, kind, range):
            continue
        if field == "counts":
            value = (value,)
        values = {**required, **({field: value} if group is None else {group: {field: value}})}
        with pytest.raises(UsageError) as caught:
            command.config(**values)
        assert flag_of(field, group) in str(caught.value), (field, value)


@pytest.mark.parametrize("name", sorted({option[0] for option in OPTIONS}))
def test_on_the_command_line_and_in_a_file_too(nextword: CLIRunner, tmp_path, texts, name):
    """Nothing else is wrong with the command, and nothing is written."""
    table = tmp_path / "table.csv"
    table.write_text("text,label\na,x\nb,y\n")
    (tmp_path / "model").mkdir()
    arguments = {
        "model": tmp_path / "model",
        "data": table,
        "corpora": texts,
        "out": tmp_path / "out",
        "prompts": "a",
        "texts": "a",
    }
    command = COMMANDS[name]
    given = [
        str(arguments[f.name]) for f in declared_fields(command.config) if info_of(f).positional and f.name in arguments
    ]
    if any(f.name == "out" for f in declared_fields(command.config)):
        given += ["--out", str(arguments["out"])]
    in_a_file: set[str | None] = set()
    values = itertools.cycle(("nan", "inf", "-inf", "1e400", "-7", "9" * 40))
    for _, field, group, _kind, range in (o for o in OPTIONS if o[0] == name):
        if any(f.name == field and info_of(f).python_only for f in declared_fields(command.config)):
            continue
        value = next(v for v in values if not is_inside(float(v), float, range))
        done = nextword(name, *given, f"{flag_of(field, group)}={value}")
        assert (done.returncode, done.stdout) == (2, ""), (field, value, done.stderr)
        assert flag_of(field, group) in done.stderr and "Traceback" not in done.stderr, (value, done.stderr)
        if group in in_a_file:
            continue  # a file is read by the same code for every option of a group
        in_a_file.add(group)
        file = tmp_path / "options.json"
        file.write_text(json.dumps({field: value} if group is None else {group: {field: value}}))
        done = nextword(name, *given, "--config", file)
        assert done.returncode == 2, (field, value, done.stderr)
        assert flag_of(field, group) in done.stderr, (value, done.stderr)
    assert not (tmp_path / "out").exists()


@given(st.floats() | st.integers() | st.booleans() | st.none() | st.text(max_size=3))
def test_a_number_is_what_its_type_says_or_refused(value):
    types = [t for t in vars(numbers).values() if getattr(t, "__metadata__", None)]
    assert len(types) > 15
    for t in types:
        kind, [range] = t.__origin__, t.__metadata__
        try:
            number = range.check(value, kind, "--it")
        except UsageError as error:
            assert str(error).startswith("--it")
            assert not is_inside(value, kind, range)
        else:
            assert type(number) is kind and is_inside(number, kind, range)


@given(
    st.dictionaries(
        st.sampled_from(["norm_eps", "rope_theta", "dropout", "context_length", "d_ff", "n_layers", "n_kv_heads"]),
        st.floats() | st.integers(-1, 2**70) | st.sampled_from([1e15, 2**24, 2**24 + 1, 1, 0.5]),
    )
)
def test_what_pretrain_accepts_every_command_opens(overrides):
    try:
        config = build_config("modern", "micro", vocab_size=300, **overrides)
    except ConfigError:
        return
    assert parse_model_config(json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_at_the_ends_of_their_ranges_work(texts: Path, tmp_path):
    """Zeros and negative seeds are allowed where they mean something."""
    import nextword

    sizes = {"n_layers": 1, "n_heads": 1, "d_model": 8, "context_length": 8}
    sizes |= {"dropout": 0, "rope_theta": 1, "norm_eps": 1}
    zeros = dict.fromkeys(("weight_decay", "warmup", "final_lr", "clip", "beta1", "beta2", "momentum"), 0)
    nextword.pretrain(
        texts,
        tmp_path / "run",
        steps=1,
        vocab_size=300,
        seed=-(2**63),
        model=sizes,
        training={
            **zeros,
            "lr": 5e-324,
            "evaluations": 10**15,
            "patience": 10**15,
            "save_every": 10**15,
            "batch_tokens": 1,
        },
    )
    for settings in (
        {"temperature": 1e300, "top_k": 10**15, "top_p": 5e-324, "min_p": 1, "repetition_penalty": 100, "seed": -1},
        {"temperature": 5e-324, "max_tokens": 0, "repetition_penalty": 0.01, "logprobs": 10**15},
        {"max_tokens": 3, "presence_penalty": -1e6, "frequency_penalty": 1e6, "seed": 2**63 - 1, "prompt_logprobs": 0},
    ):
        assert len(nextword.generate(tmp_path / "run", "The", **{"max_tokens": 3, **settings})) == 1
    assert nextword.evaluate(tmp_path / "run", stride=8, seed=-1).tokens
    rows = "".join(f"good {i},yes\nbad {i},no\n" for i in range(8))
    (tmp_path / "table.csv").write_text("text,label\n" + rows)
    tuning = {"epochs": 5e-324, "auxiliary": 0, "dropout": 0, "alpha": 5e-324, "rank": 1, "batch_examples": 1}
    nextword.finetune(
        tmp_path / "run",
        tmp_path / "table.csv",
        tmp_path / "tuned",
        lora=True,
        tuning=tuning,
        max_examples=10**15,
        seed=-1,
    )
    with pytest.raises(NextwordError):
        nextword.plan(gpu="h100", tokens="1", parameters=10**15, gpu_hour_price=0)
