"""From a folder of text to a GPT that is trained, fine-tuned, evaluated and served, on the machine you have.

    import nextword
    nextword.pretrain("my-texts/", out="runs/mine", budget="30m")
    nextword.load("runs/mine").generate("Once upon a time")

The commands of the command line are functions here, with the same options. Nothing heavy is imported before one of the names
below is used.
"""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nextword._version import __version__ as __version__

__all__ = [
    "GPT",
    "Completion",
    "Corpus",
    "LanguageModel",
    "ModelConfig",
    "NextwordError",
    "PerplexityResult",
    "Sampling",
    "Tokenizer",
    "__version__",
    "audit",
    "build_config",
    "demo",
    "evaluate",
    "explain",
    "export",
    "finetune",
    "generate",
    "info",
    "load",
    "plan",
    "predict",
    "prepare",
    "pretrain",
    "report",
    "serve",
    "transfer",
    "verify",
]

if TYPE_CHECKING:
    from nextword.commands.audit import audit as audit
    from nextword.commands.demo import demo as demo
    from nextword.commands.evaluate import evaluate as evaluate
    from nextword.commands.explain import explain as explain
    from nextword.commands.export import export as export
    from nextword.commands.finetune import finetune as finetune
    from nextword.commands.generate import generate as generate
    from nextword.commands.info import info as info
    from nextword.commands.plan import plan as plan
    from nextword.commands.predict import predict as predict
    from nextword.commands.prepare import prepare as prepare
    from nextword.commands.pretrain import pretrain as pretrain
    from nextword.commands.report import report as report
    from nextword.commands.serve import serve as serve
    from nextword.commands.transfer import transfer as transfer
    from nextword.commands.verify import verify as verify
    from nextword.common.errors import NextwordError as NextwordError
    from nextword.data.corpus import Corpus as Corpus
    from nextword.data.tokenizer import Tokenizer as Tokenizer
    from nextword.inference.engine import Completion as Completion
    from nextword.inference.perplexity import PerplexityResult as PerplexityResult
    from nextword.inference.sampling import Sampling as Sampling
    from nextword.model.config import ModelConfig as ModelConfig
    from nextword.model.config import build_config as build_config
    from nextword.model.gpt import GPT as GPT
    from nextword.pipeline.language_model import LanguageModel as LanguageModel
    from nextword.pipeline.language_model import load as load

_MODULES = {
    "GPT": "model.gpt",
    "Completion": "inference.engine",
    "Corpus": "data.corpus",
    "LanguageModel": "pipeline.language_model",
    "ModelConfig": "model.config",
    "NextwordError": "common.errors",
    "PerplexityResult": "inference.perplexity",
    "Sampling": "inference.sampling",
    "Tokenizer": "data.tokenizer",
    "build_config": "model.config",
    "load": "pipeline.language_model",
}
_DEPRECATED = {"Model": "LanguageModel", "Likelihood": "PerplexityResult"}


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        warnings.warn(
            f"nextword.{name} is deprecated: use nextword.{_DEPRECATED[name]}", DeprecationWarning, stacklevel=2
        )
        name = _DEPRECATED[name]
    if name == "LMEval":  # a subclass of a class of lm-eval, which is an optional dependency
        return import_module("nextword.evaluation.lm_eval_adapter").lm_eval_model_class()
    if name in __all__:
        return getattr(import_module(f"nextword.{_MODULES.get(name, f'commands.{name}')}"), name)
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
