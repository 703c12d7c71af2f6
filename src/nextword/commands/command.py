"""The declaration of a command: one frozen dataclass is its command line, its Python signature and what run.json stores.

    @options
    class GenerateConfig(DeviceOption):
        '''Continue a text.

        Attributes:
            model: A run directory or a model directory.
            prompts: Texts to continue.
            max_tokens: Maximum number of new tokens.
        '''

        model: Path = argument(converter=Path)
        prompts: tuple[str, ...] = argument(default=(), converter=as_strings)
        max_tokens: int = 200

    @command(GenerateConfig, example="nextword generate runs/mine 'Once upon a time'")
    def generate(config: GenerateConfig, context: Context) -> list[Completion]: ...

The fields give ``nextword generate`` its options and ``nextword.generate(...)`` its parameters, with the same names, types,
defaults and descriptions. Nothing here imports a heavy package, and a command imports what it needs inside its function, so
that ``--help`` stays fast.
"""

import dataclasses
import inspect
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, get_type_hints

from nextword.common.command_result import to_json_value
from nextword.common.console import Console
from nextword.common.options import info_of

T = TypeVar("T")
P = ParamSpec("P")
ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")


# ---------------------------------------------------------------- fields


def stored_options(config: Any) -> dict[str, Any]:
    """The options that belong to the run, as run.json stores them. A flag that is not given is None."""
    keys = {f.name: f.name if stored is True else stored for f in fields(config) if (stored := info_of(f).stored)}
    values = {key: to_json_value(getattr(config, name)) for name, key in keys.items()}
    return {key: None if value is False else value for key, value in values.items()}


def declared_fields(cls: type) -> "list[dataclasses.Field[Any]]":
    """The fields of an options class: positional ones, its own, then those of the groups that it inherits."""
    by_name = {f.name: f for f in fields(cls)}
    names = [f.name for f in fields(cls) if info_of(f).positional]
    names += [name for base in cls.__mro__ for name in vars(base).get("__annotations__", ()) if name in by_name]
    return [by_name[name] for name in dict.fromkeys(names)]


def parse_docstring(cls: type) -> tuple[str, dict[str, str]]:
    """The description of a class in unwrapped paragraphs, and the entries of its section Attributes."""
    text, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes.partition("\n\n")[0], re.MULTILINE)
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]
    return "\n\n".join(paragraphs), {name: " ".join(description.split()) for name, description in entries}


def describe(cls: type) -> tuple[str, dict[str, str]]:
    """The description of a dataclass, and the descriptions of its fields, inherited ones included."""
    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        descriptions |= parse_docstring(base)[1]
    return parse_docstring(cls)[0], descriptions | {
        f.name: f.metadata["help"] for f in fields(cls) if "help" in f.metadata
    }


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Context:
    """What a command runs in.

    Attributes:
        console: Receives progress and warnings.
        started: Time from which a budget counts, in seconds since the epoch.
        output: How the command line prints the result. None in Python, where a command prints nothing by itself.
        call: The command line or the call from Python, as run.json records it.
    """

    console: Console = field(default_factory=lambda: Console(quiet=True))
    started: float = field(default_factory=time.time)
    output: Literal["text", "json"] | None = None
    call: str = field(default_factory=lambda: shlex.join(["nextword", *sys.argv[1:]]))


@dataclass(frozen=True)
class Command:
    """A registered command.

    Attributes:
        config: Its options class.
        run: The function of a configuration and a context.
        example: A command line that shows its use.
        to_dict: Gives the result as ``--json`` prints it.
        to_text: Gives the result for a person; empty if the command has printed it while it ran.
    """

    config: type
    run: Callable[[Any, Context], Any]
    example: str
    to_dict: Callable[[Any], dict[str, Any]]
    to_text: Callable[[Any], str]


COMMANDS: dict[str, Command] = {}
STDIN = "\0stdin"  # what the command line passes for a lone hyphen, which cyclopts would take for an option


class CommandFunction(Protocol[P, ConfigT, ResultT]):
    """A command as a Python function of its options; `run` takes a configuration and a context instead."""

    run: Callable[[ConfigT, Context], ResultT]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """Run the command with these options."""
        ...


def command(
    config: Callable[P, ConfigT],
    *,
    example: str,
    to_dict: Callable[[Any], dict[str, Any]] = lambda result: result.to_dict(),
    to_text: Callable[[Any], str] = str,
) -> Callable[[Callable[[ConfigT, Context], ResultT]], CommandFunction[P, ConfigT, ResultT]]:
    """Register a function of a configuration and a context as a command, and make it a Python function of the options.

    Args:
        config: An `options` class.
        example: A command line that shows the use of the command.
        to_dict: Gives the result as ``--json`` prints it.
        to_text: Gives the result for a person; empty if the command has printed it while it ran.

    Returns:
        A decorator. The decorated function also takes ``console``, which receives progress and warnings.
    """
    assert isinstance(config, type)
    description, descriptions = describe(config)
    arguments = [f"    {f.name}: {descriptions[f.name]}" for f in declared_fields(config)]

    def decorate(run: Callable[[ConfigT, Context], ResultT]) -> CommandFunction[P, ConfigT, ResultT]:
        def function(*args: Any, console: Console | None = None, **values: Any) -> ResultT:
            options = config(*args, **replace_deprecated(config, values, warn_deprecated))
            with console or Console(quiet=True) as console:
                arguments = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in values.items())])
                return run(options, Context(console, call=f"nextword.{run.__name__}({arguments})"))

        COMMANDS[run.__name__] = Command(config, run, example, to_dict, to_text)
        function.__name__ = function.__qualname__ = run.__name__
        function.__module__ = run.__module__
        function.__doc__ = "\n".join(
            [description, "", f"On the command line: ``{example}``", "", "Args:", *arguments, ""]
        )
        hints, signature = get_type_hints(config), inspect.signature(config)
        parameters = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]  # what help() and IDEs show
            parameters=parameters, return_annotation=inspect.signature(run).return_annotation
        )
        function.run = run  # type: ignore[attr-defined]  # declared by CommandFunction
        return function  # type: ignore[return-value]  # has `run` now

    return decorate


def replace_deprecated(
    config: type, values: Mapping[str, Any], warn: Callable[["dataclasses.Field[Any]"], None]
) -> dict[str, Any]:
    """Values by the current names of the options. `warn` is called for each option with a deprecated name."""
    current = {info_of(f).deprecated: f for f in fields(config) if info_of(f).deprecated}
    for name in current.keys() & values.keys():
        warn(current[name])
    return {current[name].name if name in current else name: value for name, value in values.items()}


def warn_deprecated(f: "dataclasses.Field[Any]") -> None:
    """Warn about a parameter with a deprecated name in a call from Python."""
    warnings.warn(f"{info_of(f).deprecated!r} is deprecated: use {f.name!r}", DeprecationWarning, stacklevel=4)
