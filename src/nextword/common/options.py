"""The declaration of options: a frozen dataclass whose fields have a type, a default, a range, a description and these details.

Nothing here imports a heavy package, so that the classes of options can be read without one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform

from nextword.common import numbers

T = TypeVar("T")
Paths = str | Path | Sequence[str | Path]
Precision = Literal["float32", "int8", "int4"]


@dataclass(frozen=True)
class OptionInfo:
    """Details of a field beyond its name, type, default and description.

    Attributes:
        converter: Applied to the value when the dataclass is constructed.
        positional: The command line takes the value by position.
        required: The command line requires the value, although the dataclass has a default for it.
        flag: Name of the command-line option, if it differs from the field's name.
        metavar: Placeholder in the help. The command line then passes the text to the converter unparsed.
        deprecated: Former name, accepted with a warning.
        deprecated_flag: Former command-line option, if it differs from the former name.
        settings: Configuration class, or an instance with the defaults, whose fields become options such as
            ``--training.lr``.
        exclude: Fields of `settings` without an option.
        stored: The value belongs to the run: run.json stores it, under another name if one is given, and a resume compares
            it.
        python_only: The command line has no such option.
        env_var: Environment variable that sets the option.
    """

    converter: Callable[[Any], Any] | None = None
    positional: bool = False
    required: bool = False
    flag: str | tuple[str, ...] | None = None
    metavar: str | None = None
    deprecated: str | None = None
    deprecated_flag: str | None = None
    settings: Any = None
    exclude: tuple[str, ...] = ()
    stored: bool | str = True
    python_only: bool = False
    env_var: str | None = None


def option(*, default: Any = dataclasses.MISSING, kw_only: bool = True, **info: Any) -> Any:
    """A keyword-only field (positional in Python with ``kw_only=False``) with the details of `OptionInfo`."""
    return field(default=default, kw_only=kw_only, metadata={"info": OptionInfo(**info)})


def argument(*, default: Any = dataclasses.MISSING, kw_only: Literal[False] = False, **info: Any) -> Any:
    """A field that is positional in Python and on the command line, with the details of `OptionInfo`."""
    return field(default=default, kw_only=kw_only, metadata={"info": OptionInfo(positional=True, **info)})


def info_of(f: "dataclasses.Field[Any]") -> OptionInfo:
    """The details of a field."""
    return f.metadata.get("info", OptionInfo())


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option, argument))
def options(cls: type[T]) -> type[T]:
    """Turn a class into a frozen, keyword-only dataclass that converts its fields and checks its numbers on construction."""

    def convert_fields(self: Any) -> None:
        for f in fields(self):
            info = info_of(f)
            if info.converter:
                object.__setattr__(self, f.name, info.converter(getattr(self, f.name)))
            if settings := info.settings and (
                info.settings if isinstance(info.settings, type) else type(info.settings)
            ):
                group = getattr(self, f.name)
                group.update(numbers.check_numbers(settings, group, f"--{f.name}."))
        numbers.set_checked_numbers(self, "--")

    cls.__post_init__ = convert_fields  # type: ignore[attr-defined]  # dataclass looks it up by this name
    return dataclass(frozen=True, kw_only=True)(cls)


def as_strings(values: Paths | None) -> tuple[str, ...]:
    """One value or several as strings."""
    if values is None or isinstance(values, (str, Path)):
        return () if values is None else (str(values),)
    return tuple(map(str, values))


# ---------------------------------------------------------------- groups that several classes have


@options
class ModelArgument:
    """The model of a command.

    Attributes:
        model: A run directory, or a model directory from nextword or Hugging Face transformers.
    """

    model: Path = argument(converter=Path)


@options
class DeviceOption:
    """The device of a command.

    Attributes:
        device: Device to compute on: auto, cpu, cuda, cuda:1 or mps.
    """

    device: str = option(default="auto", stored=False)


@options
class PrecisionOption:
    """The precision of a model's weights.

    Attributes:
        precision: Number format of the weights. Quantization to int8 or int4 is faster and takes less memory, at a small loss
            of quality.
    """

    precision: Precision = "float32"
