"""The base class of results: dataclasses that convert to the JSON that ``--json`` prints."""

import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from typing import Any, Self

from nextword.commands.command import to_json_value


def _deprecated(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def warn_and_call(self: "Result", *args: Any) -> Any:
        warnings.warn(
            f"using a {type(self).__name__} as a dictionary is deprecated: use its attributes or to_dict()",
            DeprecationWarning,
            stacklevel=2,
        )
        return method(self, *args)

    return warn_and_call


@dataclass(frozen=True)
class Result(dict[str, Any]):
    """Base class of results.

    A result has attributes. Until the next release it also works as the dictionary that it used to be, with a
    `DeprecationWarning` at each access.
    """

    def __post_init__(self) -> None:
        self.update(self.legacy_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A result from its JSON form, which `to_dict` gives back unchanged. Only declared fields become attributes."""
        result = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        result.update(values)
        return result

    def to_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return dict(dict.items(self))

    def legacy_dict(self) -> dict[str, Any]:
        """The dictionary that the command returned before it returned an object. Optional values that are None are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        optional = {f.name for f in fields(self) if f.default is not MISSING}
        return {
            name: to_json_value(value) for name, value in values.items() if not (value is None and name in optional)
        }

    __getitem__ = _deprecated(dict.__getitem__)
    __contains__ = _deprecated(dict.__contains__)
    __iter__ = _deprecated(dict.__iter__)
    get = _deprecated(dict.get)
    keys = _deprecated(dict.keys)
    values = _deprecated(dict.values)
    items = _deprecated(dict.items)


@dataclass(frozen=True)
class RunResult(Result):
    """The result of a training run, as RUN/result.json has it. Values of the validation set are None without one.

    Attributes:
        run: Run directory.
        model: Model directory.
        steps: Optimizer steps.
        tokens: Training tokens.
        best_step: Step of the weights that were kept.
        seconds: Duration of the run.
        memory_bytes: Peak memory.
        energy: watt_hours, mean watts and whether they are measured.
        parameters: Number of parameters.
        loss: Validation loss, in nats per token.
        bits_per_byte: Validation loss in bits per byte of text.
        perplexity: exp(loss).
        validation_tokens: Tokens of the validation set.
        by_position: Validation loss by position in the window.
        prompt: First words of the validation set.
        task: Task of a fine-tuning run.
        before: Scores of the model before fine-tuning.
        forgetting: Bits per byte on the pre-training text before and after fine-tuning.
    """

    run: str
    model: str
    steps: int
    tokens: int
    best_step: int
    seconds: float
    memory_bytes: int
    energy: dict[str, Any]
    parameters: int
    loss: float | None = None
    bits_per_byte: float | None = None
    perplexity: float | None = None
    validation_tokens: int | None = None
    by_position: list[float] | None = None
    prompt: str | None = None
    task: str | None = None
    before: dict[str, Any] | None = None
    forgetting: dict[str, Any] | None = None
