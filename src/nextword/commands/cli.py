"""The command line: ``nextword COMMAND ...``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed, 2 usage, 3 corrupt file, 4 disk
full, 5 diverged, 6 run locked, 130 and 143 interrupted, 141 the reader of the output has left.
"""

import errno
import inspect
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, make_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast, get_origin, get_type_hints

from cyclopts import App, Argument, ArgumentCollection, CycloptsError, Group, Parameter, Token

from nextword._version import __version__
from nextword.commands.command import COMMANDS, STDIN, Command, Context, declared_fields, describe, replace_deprecated
from nextword.common.console import Console, StandardError, discard_unwritten_output, to_json_line, write_result
from nextword.common.errors import DiskFullError, NextwordError, UsageError, is_out_of_memory
from nextword.common.options import info_of, option, options
from nextword.training.config import setting_name

GROUPS = {
    "Data and training": ("demo", "plan", "prepare", "pretrain"),
    "Fine-tuning": ("finetune", "transfer"),
    "Inference": ("generate", "chat", "predict", "serve", "export"),
    "Evaluation": ("evaluate", "audit", "report"),
    "Inspection": ("explain", "verify", "info"),
}
BROKEN_PIPE = 128 + 13  # as if SIGPIPE had ended the process
OUT_OF_MEMORY = "not enough memory: choose a smaller model or batch, or a machine with more. What was saved is intact"
# Options that every command took, with effect or not; accepted until the next release.
FORMERLY_UNIVERSAL = {"device", "seed"}
# Options that take a hyphen for standard input.
READ_FROM_STDIN = {"prompts", "text", "texts", "data", "search_texts", "passages", "file"}
OPTIONS, COMMON_OPTIONS = Group("Options", sort_key=1), Group("Common options", sort_key=2)
DESCRIPTION = (
    "From a folder of text to a GPT that is trained, fine-tuned, evaluated and served, on the machine you have.\n\n"
    "Start with: nextword demo"
)
EXIT_CODES = (
    "Exit codes: 0 done · 1 failed · 2 usage · 3 corrupt file · 4 disk full\n"
    "            5 diverged · 6 run locked · 130, 143 interrupted\n"
    "            141 the reader of the output has left\n"
)


@options
class OutputOptions:
    """The options of every command on the command line.

    Attributes:
        json: Print the result as one JSON object on standard output.
        quiet: Print only the result and warnings.
        config: YAML or JSON file with values for the options, for example the run.json of a run. Options on the command line
            take precedence. Default: none.
    """

    json: bool = False
    quiet: bool = False
    config: Path | None = option(default=None, metavar="FILE")


def build_app(started: float, selected: str | None = None) -> App:
    """The commands in their groups.

    Args:
        started: Time from which a budget counts, in seconds since the epoch.
        selected: The only command that is used. The others are not imported, since that takes time. Default: all are.
    """
    app = App(
        name="nextword",
        version=__version__,
        help=DESCRIPTION,
        help_epilogue=EXIT_CODES,
        help_format="plaintext",  # the Markdown parser takes longer to import than everything else
        result_action="return_value",
        config=options_from_file,
    )
    for position, (title, names) in enumerate(GROUPS.items()):
        group = Group(title, sort_key=position)
        for name in names:
            if selected in (name, None):
                import_module(f"nextword.commands.{name}")
                function = command_line_function(name, COMMANDS[name], started)
                help = f"{describe(COMMANDS[name].config)[0]}\n\nExample: {COMMANDS[name].example}"
            else:
                function, help = placeholder_command, summary(name)
            app.command(function, name=name, help=help, group=group, sort_key=names.index(name))
    app["--help"].group = app["--version"].group = Group("Options", sort_key=len(GROUPS))
    return app


def placeholder_command() -> None:
    """The function of a command that the help lists but this process does not run."""


def summary(name: str) -> str:
    """The first line of the description of a command, from its source."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    description = re.search(r'^@options\nclass \w+.*\n    """(.*?)("""|\n)', source, re.MULTILINE)
    return description[1] if description else ""


def command_line_function(name: str, command: Command, started: float) -> Callable[..., None]:
    """The function that cyclopts calls: the options of the command and `OutputOptions` are its parameters."""
    declared = declared_fields(command.config)
    names = {f.name for f in declared}
    positional = [f.name for f in declared if info_of(f).positional]

    def run(*args: Any, **values: Any) -> None:
        output = OutputOptions(**{f.name: values.pop(f.name) for f in fields(OutputOptions) if f.name in values})
        values |= dict(zip(positional, args, strict=False))
        with Console(quiet=output.quiet) as console:
            for f in declared:
                if info_of(f).settings and f.name in values:
                    values[f.name] = current_settings(f, vars(cast(object, values[f.name])), console)
            for option_name in (FORMERLY_UNIVERSAL - names) & values.keys():
                console.warn(f"--{option_name} has no effect on nextword {name} and is deprecated")
                del values[option_name]
            values = {name: value if name in READ_FROM_STDIN else hyphen(name, value) for name, value in values.items()}
            config = command.config(**replace_deprecated(command.config, values, partial(warn_deprecated, console)))
            result = command.run(config, Context(console, started, "json" if output.json else "text"))
            if result is None:  # of a server, and of a worker process of torchrun
                return
            if output.json:
                write_result(to_json_line(command.to_dict(result)))
            elif text := command.to_text(result):
                write_result(f"{text}\n")

    hidden = [hidden_parameter(option_name, str) for option_name in sorted(FORMERLY_UNIVERSAL - names)]
    run.__name__ = name
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what cyclopts reads
        [*parameters(command.config), *parameters(OutputOptions), *hidden]
    )
    return run


def hyphen(name: str, value: Any) -> Any:
    """The value of an option for which a lone hyphen is a hyphen. Raises `UsageError` if it would be the name of a file."""
    if isinstance(value, Path) and str(value) == STDIN:
        raise UsageError(f"{name} -: a hyphen stands for standard input, where the name of a file is needed")
    if isinstance(value, (list, tuple)):
        return tuple("-" if item == STDIN else item for item in cast(Sequence[Any], value))
    return "-" if value == STDIN else value


def parameters(cls: type) -> Iterator[inspect.Parameter]:
    """The fields of an options class as cyclopts reads them, followed by the deprecated names."""
    hints, descriptions = get_type_hints(cls), describe(cls)[1]
    deprecated: list[inspect.Parameter] = []
    for f in declared_fields(cls):
        info = info_of(f)
        if info.python_only:
            continue
        hint: Any = hints[f.name]
        details: dict[str, Any] = {"help": descriptions[f.name], "negative": "", "env_var": info.env_var}
        if not info.positional:
            details["group"] = COMMON_OPTIONS if cls is OutputOptions else OPTIONS
        if info.settings is not None:
            hint = settings_class(info.settings, info.exclude) | None
            details = {"group": Group(f"{f.name.capitalize()} settings", help=descriptions[f.name], sort_key=3)}
        elif info.metavar is not None:
            hint = (tuple[str, ...] if get_origin(hint) is dict else str) | None  # ROLE=COLUMN may be given again
            details["metavar"] = info.metavar
        if info.flag is not None:
            details["name"] = info.flag
        if f.default in (False, None, ()):
            details["show_default"] = False
        kind = inspect.Parameter.POSITIONAL_ONLY if info.positional else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if f.default is MISSING or info.required else f.default
        yield inspect.Parameter(f.name, kind, default=default, annotation=Annotated[hint, Parameter(**details)])
        if info.deprecated is not None:
            deprecated.append(hidden_parameter(info.deprecated, hint, info.deprecated_flag))
    yield from deprecated


def hidden_parameter(name: str, hint: Any, flag: str | None = None) -> inspect.Parameter:
    """An option that the help does not show."""
    annotation = Annotated[hint | None, Parameter(name=flag, show=False, negative="")]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def settings_class(settings: Any, exclude: tuple[str, ...]) -> Any:
    """A configuration class with every field optional, for options such as ``--training.lr``.

    Args:
        settings: The class, or an instance that has the defaults for the help.
        exclude: Fields without an option.
    """
    cls = settings if isinstance(settings, type) else type(settings)
    hints, descriptions = get_type_hints(cls), describe(cls)[1]
    optional: list[tuple[str, Any, None]] = []
    for f in fields(cls):
        if f.name not in exclude:
            old_values = f.metadata.get("deprecated_values")
            converter = old_values and partial(convert_choice, old_values)
            default = None if settings is cls else getattr(settings, f.name)
            note = "" if default is None or default is False else f" [default: {default}]"
            parameter = Parameter(name=f.metadata.get("flag"), help=descriptions[f.name] + note, converter=converter)
            optional.append((setting_name(f), Annotated[hints[f.name] | None, parameter], None))
            if setting_name(f) != f.name:
                optional.append((f.name, Annotated[hints[f.name] | None, Parameter(show=False)], None))
    optional_settings = make_dataclass(cls.__name__, optional, frozen=True)
    optional_settings.__module__ = __name__  # otherwise cyclopts takes it for a type of the standard library
    return optional_settings


def current_settings(group: "Field[Any]", values: dict[str, Any], console: Console) -> dict[str, Any]:
    """The settings of a group by their current names. Warns about deprecated ones."""
    for f in fields(info_of(group).settings):
        name = setting_name(f)
        if name != f.name and values.get(f.name) is not None:
            console.warn(f"--{group.name}.{f.name} is deprecated: use --{group.name}.{name}".replace("_", "-"))
            values[name] = values.pop(f.name)
    return {name: value for name, value in values.items() if value is not None}


def convert_choice(deprecated_values: dict[str, str], hint: Any, tokens: Sequence[Token]) -> str:
    """A choice that also has deprecated names. The settings check its value."""
    value = tokens[0].value
    if value in deprecated_values:
        print(f"nextword: {value} is deprecated: use {deprecated_values[value]}", file=sys.stderr)
    return deprecated_values.get(value, value)


def warn_deprecated(console: Console, f: "Field[Any]") -> None:
    """Warn about an option with a deprecated name."""
    info = info_of(f)
    flag = info.flag or (f.name.upper() if info.positional else f"--{f.name}")
    console.warn(f"{info.deprecated_flag or f'--{info.deprecated}'} is deprecated: use {flag}".replace("_", "-"))


# ---------------------------------------------------------------- configuration files


def options_from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give cyclopts the options of the YAML or JSON file ``--config``, or those that a run.json stores.

    Raises:
        UsageError: The file cannot be read, is not a mapping of options, or has unknown options.
    """
    path = next((Path(token.value) for a in arguments if a.name == "--config" for token in a.tokens), None)
    if path is None:
        return
    import yaml

    try:
        content: Any = yaml.safe_load(path.read_bytes())  # with any byte order mark
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    stored = cast(dict[str, Any], content).get("request", content) if isinstance(content, dict) else None
    if not isinstance(stored, dict):
        raise UsageError(f"--config {path}: not a mapping of options to values")
    values = cast(dict[str, Any], stored)
    renamed = {info_of(f).stored: f.name for f in fields(COMMANDS[commands[0]].config)}
    given: dict[str, Any] = {}
    for name, value in (values | values.get("settings", {})).items():
        name = str(name).replace("-", "_")
        given[renamed.get(name, name)] = value
    names = [(a.field_info.name, a.name.strip("-").replace("-", "_")) for a in arguments]
    unknown = given.keys() - {name for pair in names for name in pair}
    if unknown and stored is content:
        raise UsageError(f"--config {path}: unknown options {', '.join(sorted(unknown))}")
    for argument, (field_name, option_name) in zip(arguments, names, strict=True):
        value = given.get(field_name, given.get(option_name))
        for child in argument.children:
            set_default(child, value and value.get(child.field_info.name), path)
        if not argument.children and not argument.keys:
            set_default(argument, value, path)


def set_default(argument: Argument, value: Any, source: Path) -> None:
    """Give a value to an option that the command line does not set."""
    if value is None or argument.tokens:
        return
    if isinstance(value, dict):
        value = [f"{name}={item}" for name, item in cast(dict[str, Any], value).items()]
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    for index, item in enumerate(items):
        argument.append(Token(keyword=argument.name, value=str(item), source=str(source), index=index))


# ---------------------------------------------------------------- running


def run(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """Run one command line.

    Args:
        arguments: The command line. Default: that of the process.
        started: Time from which a budget counts, in seconds since the epoch. Default: now.

    Returns:
        The exit code.
    """
    tokens = [STDIN if token == "-" else token for token in (sys.argv[1:] if arguments is None else arguments)]
    code, message = 0, ""
    try:
        app = build_app(started or time.time(), tokens[0] if tokens else "")
        app(tokens, exit_on_error=False, print_error=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except CycloptsError as error:
        code, message = UsageError.exit_code, f"{error}\nSee: nextword --help"
    except NextwordError as error:
        code, message = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # its reader has left, for example `head`
        code = BROKEN_PIPE
    except SystemExit as error:  # so ends rich, which prints the help
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = BROKEN_PIPE
    except OSError as error:
        code = DiskFullError.exit_code if error.errno == errno.ENOSPC else 1
        message = f"{error.filename or 'standard output'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, message = 1, f"{OUT_OF_MEMORY} ({str(error).splitlines()[0] if str(error) else 'out of memory'})"
    if message:
        StandardError().write(f"nextword: {message.replace(STDIN, '-')}\n")
    if (lost := discard_unwritten_output()) and not code:
        code = BROKEN_PIPE if lost == errno.EPIPE else 1
    return code
