"""From a folder of text to a GPT that is trained, measured and used, on the machine you have.

    import nextword
    nextword.pretrain("my-texts/", out="runs/mine", budget="30m")
    nextword.load("runs/mine").generate("Once upon a time")

The verbs of the command line are functions here, with the same names for the same things. Nothing heavy is imported until one
of the names below is used.
"""

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

STARTED = time.time()  # a budget counts from here when nextword is the program
__version__ = "0.1.0"

PUBLIC = {
    "demo": "nextword.demonstrating",
    "plan": "nextword.api",
    "prepare": "nextword.api",
    "pretrain": "nextword.api",
    "finetune": "nextword.api",
    "predict": "nextword.api",
    "transfer": "nextword.api",
    "generate": "nextword.api",
    "evaluate": "nextword.api",
    "audit": "nextword.api",
    "explain": "nextword.api",
    "export": "nextword.api",
    "report": "nextword.api",
    "serve": "nextword.api",
    "verify": "nextword.api",
    "load": "nextword.loading",
    "Model": "nextword.loading",
    "Completion": "nextword.inference.engine",
    "Sampling": "nextword.inference.sampling",
    "Likelihood": "nextword.evaluation.likelihood",
    "GPT": "nextword.model.gpt",
    "ModelConfig": "nextword.model.config",
    "build_config": "nextword.model.config",
    "Tokenizer": "nextword.text.tokenizer",
    "Corpus": "nextword.text.corpus",
    "NextwordError": "nextword.errors",
}
__all__ = [
    "GPT",
    "Completion",
    "Corpus",
    "Likelihood",
    "Model",
    "ModelConfig",
    "NextwordError",
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
    from nextword.api import audit as audit
    from nextword.api import evaluate as evaluate
    from nextword.api import explain as explain
    from nextword.api import export as export
    from nextword.api import finetune as finetune
    from nextword.api import generate as generate
    from nextword.api import plan as plan
    from nextword.api import predict as predict
    from nextword.api import prepare as prepare
    from nextword.api import pretrain as pretrain
    from nextword.api import report as report
    from nextword.api import serve as serve
    from nextword.api import transfer as transfer
    from nextword.api import verify as verify
    from nextword.demonstrating import demo as demo
    from nextword.errors import NextwordError as NextwordError
    from nextword.evaluation.likelihood import Likelihood as Likelihood
    from nextword.inference.engine import Completion as Completion
    from nextword.inference.sampling import Sampling as Sampling
    from nextword.loading import Model as Model
    from nextword.loading import load as load
    from nextword.model.config import ModelConfig as ModelConfig
    from nextword.model.config import build_config as build_config
    from nextword.model.gpt import GPT as GPT
    from nextword.text.corpus import Corpus as Corpus
    from nextword.text.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'nextword' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
