"""The base class of what commands return: dataclasses that convert to the JSON that ``--json`` prints."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Self, cast


@dataclass(frozen=True)
class Result(dict[str, Any]):
    """Base class of results.

    A result has attributes. Until the next release it also works as the dictionary that it used to be, with a
    `DeprecationWarning` at each access.
    """

    def __post_init__(self) -> None:
        """Fill the dictionary. Optional values that are None are left out."""
        optional = {f.name for f in fields(self) if f.default is not MISSING}
        values = {name: value for name, value in vars(self).items() if not (value is None and name in optional)}
        self.update(to_json_value(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A result from its JSON form, which `to_dict` gives back unchanged. Only declared fields become attributes."""
        result = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        result.update(values)
        return result

    def to_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return dict(dict[str, Any].items(self))


def _deprecated(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def warn_and_call(self: Result, *args: Any) -> Any:
        warnings.warn(
            f"using a {type(self).__name__} as a dictionary is deprecated: use its attributes or to_dict()",
            DeprecationWarning,
            stacklevel=2,
        )
        return method(self, *args)

    return warn_and_call


for _name in ("__getitem__", "__contains__", "__iter__", "get", "keys", "values", "items"):
    setattr(Result, _name, _deprecated(getattr(dict, _name)))


def to_json_value(value: Any) -> Any:
    """A value as JSON has it: dataclasses and mappings as dictionaries, sequences as lists, paths as strings."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return {f.name: to_json_value(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json_value(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item) for item in cast(list[Any], value)]
    return str(value) if isinstance(value, Path) else value
