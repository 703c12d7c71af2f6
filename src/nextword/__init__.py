"""From a folder of text to a GPT that is trained, fine-tuned, evaluated and served, on the machine you have.

    import nextword
    nextword.pretrain("my-texts/", out="runs/mine", budget="30m")
    nextword.load("runs/mine").generate("Once upon a time")

The commands of the command line are functions here, with the same options. Nothing heavy is imported before one of the names
below is used.
"""

import ast
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# The public names are declared once, by the imports in __init__.pyi, which type checkers read.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {
    alias.name: str(node.module)
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.asname
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]  # type checkers read the stub
_DEPRECATED = {"Model": "LanguageModel", "Likelihood": "PerplexityResult"}


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        old_name, name = name, _DEPRECATED[name]
        warnings.warn(f"nextword.{old_name} is deprecated: use nextword.{name}", DeprecationWarning, stacklevel=2)
    if name == "LMEval":  # a subclass of a class of lm-eval, which is an optional dependency
        return import_module("nextword.evaluation.lm_eval_adapter").lm_eval_model_class()
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'nextword' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "LMEval"])


class _NextwordModule(ModuleType):
    """Keeps the functions `audit` and `export` where Python would put the packages of the same names, once imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


class _JudgingModule(ModuleType):
    """The former package ``nextword.judging``, until the next release."""

    def __getattr__(self, name: str) -> Any:
        if name != "LMEval":
            raise AttributeError(f"module 'nextword.judging' has no attribute {name!r}")
        message = "nextword.judging.LMEval is deprecated: use nextword.LMEval"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return __getattr__("LMEval")


sys.modules[__name__].__class__ = _NextwordModule
judging = sys.modules["nextword.judging"] = _JudgingModule("nextword.judging")
