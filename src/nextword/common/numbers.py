"""The number types of options and settings. The range stands in the type, and one function checks it for all of them."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, cast, get_args, get_type_hints

from nextword.common.errors import UsageError

DURATION_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

# ---------------------------------------------------------------- text


def parse_duration(text: str | float) -> float:
    """Seconds from text such as 90, 90s, 30m, 1h30m, 1.5h or 2d. Raises `UsageError`."""
    if isinstance(text, (int, float)):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    parsed = "".join(number + unit for number, unit in parts)
    if not parts or parsed != re.sub(r"\s", "", text.lower()) or any(unit not in DURATION_UNITS for _, unit in parts):
        raise UsageError(f"{text!r} is not a duration: write for example 90s, 30m, 2h or 1h30m")
    return sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)


def parse_float(text: str | float) -> float:
    """A number from text such as 1e17. Raises `UsageError`."""
    try:
        return float(text)
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r} is not a number: write for example 1e17") from None


def parse_count(text: str | int) -> int:
    """A whole number from text such as 2000, 100k, 1.5M, 2B or 1.4T. Raises `UsageError`."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", text.strip().lower().replace(",", "").replace("_", ""))
    if match is None:
        raise UsageError(f"{text!r} is not a number: write for example 2000, 100k, 1.5M, 2B or 1.4T")
    value = float(match[1]) * COUNT_UNITS[match[2]]
    if not value.is_integer():
        raise UsageError(f"{text!r} is not a whole number")
    return int(value)


def text_or_number(value: str | float | None) -> Any:
    """The value. As the converter of a field, it tells type checkers that the type of the field also parses text."""
    return value


# ---------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Range:
    """The numbers of a type, as ``Annotated[float, Range(0, 1)]``.

    Attributes:
        low: The smallest number.
        high: The largest number.
        excluded: The end that does not belong to the range.
        parse: Reads a number from text.
    """

    low: float
    high: float
    excluded: Literal["low", "high"] | None = None
    parse: Callable[[str], float] | None = None

    def __str__(self) -> str:
        ends = [f"{end:,}" if abs(end) < 10**7 else f"{float(end):.3g}" for end in (self.low, self.high)]
        low, high = (
            f"{end} (excluded)" if name == self.excluded else end
            for name, end in zip(("low", "high"), ends, strict=True)
        )
        return f"from {low} to {high}"

    def check(self, value: object, kind: type, name: str) -> int | float:
        """The number as an int or a float. Raises `UsageError`, which names the option, for anything else."""
        number: Any = value
        if self.parse is not None and isinstance(value, str):
            try:
                number = self.parse(value)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None
        is_number = isinstance(number, int if kind is int else (int, float)) and not isinstance(number, bool)
        is_inside = is_number and self.low <= number <= self.high
        if not is_inside or (self.excluded and number == getattr(self, self.excluded)):
            noun = "a whole number" if kind is int else "a number"
            raise UsageError(f"{name} must be {noun} {self}, not {value!r}")
        return kind(number)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The range as pydantic's constraints, for request bodies."""
        ends = "gt" if self.excluded == "low" else "ge", "lt" if self.excluded == "high" else "le"
        return {**handler(source), **dict(zip(ends, (self.low, self.high), strict=True))}


@cache
def number_types(cls: type) -> dict[str, tuple[type, Range, bool]]:
    """The fields of a dataclass that have a range: int or float, the range, and whether the value may be None."""

    def find(hint: Any) -> tuple[type, Range] | None:
        ranges = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)]
        if ranges:
            return hint.__origin__, ranges[0]
        return next(filter(None, map(find, get_args(hint))), None)

    hints = get_type_hints(cls, include_extras=True)
    return {name: (*found, NoneType in get_args(hint)) for name, hint in hints.items() if (found := find(hint))}


def check_numbers(cls: type, values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The numbers of a dataclass within their ranges, by field.

    Args:
        cls: The dataclass.
        values: Values of its fields. Some may be missing.
        prefix: Of the option of a field, such as ``--training.``, for messages. Default: they name the field.

    Raises:
        UsageError: A value is not a number of the field's type.
    """
    names = {f.name: f.metadata.get("name", f.name).replace("_", "-") for f in fields(cls)}
    flags = {f.name: f.metadata.get("flag", prefix + names[f.name]) if prefix else f.name for f in fields(cls)}
    for name, (kind, numbers, is_optional) in number_types(cls).items():
        value, option = values.get(name), flags[name]
        if isinstance(value, tuple):
            yield name, tuple(numbers.check(item, kind, option) for item in cast(tuple[Any, ...], value))
        elif name in values and not (value is None and is_optional):
            yield name, numbers.check(value, kind, option)


def set_checked_numbers(instance: object, prefix: str = "") -> None:
    """Replace the numbers of a dataclass, frozen or not, by those of `check_numbers`, which says what it raises."""
    for name, number in check_numbers(type(instance), vars(instance), prefix):
        object.__setattr__(instance, name, number)


# ---------------------------------------------------------------- types

Count = Annotated[int, Range(1, 10**15)]  # of steps, tokens or items that are processed one after another
CountOrZero = Annotated[int, Range(0, 10**15)]
TokenCount = Annotated[int, Range(1, 10**15, parse=parse_count)]
SmallCount = Annotated[int, Range(1, 2**16)]  # of what is held in memory at once
Size = Annotated[int, Range(1, 2**24)]  # of a dimension of a model
Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]
Port = Annotated[int, Range(0, 2**16 - 1)]
Positive = Annotated[float, Range(0, 10**6, excluded="low")]
NonNegative = Annotated[float, Range(0, 10**6)]
Temperature = Annotated[float, Range(0, 10**308)]
Share = Annotated[float, Range(0, 1)]
HeldOutShare = Annotated[float, Range(0, 0.5, excluded="low")]
PositiveShare = Annotated[float, Range(0, 1, excluded="low")]
Decay = Annotated[float, Range(0, 1, excluded="high")]  # also of dropout
Penalty = Annotated[float, Range(-(10**6), 10**6)]
RepetitionPenalty = Annotated[float, Range(0.01, 100)]  # smaller values make logits infinite
Duration = Annotated[float, Range(0, 10**9, excluded="low", parse=parse_duration)]  # in seconds
Flops = Annotated[float, Range(0, 10**30, excluded="low", parse=parse_float)]
