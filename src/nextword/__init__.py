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
    "demo": "nextword.commands.demo",
    "plan": "nextword.commands.api",
    "prepare": "nextword.commands.api",
    "pretrain": "nextword.commands.api",
    "finetune": "nextword.commands.api",
    "predict": "nextword.commands.api",
    "transfer": "nextword.commands.api",
    "generate": "nextword.commands.api",
    "evaluate": "nextword.commands.api",
    "audit": "nextword.commands.api",
    "explain": "nextword.commands.api",
    "export": "nextword.commands.api",
    "report": "nextword.commands.api",
    "serve": "nextword.commands.api",
    "verify": "nextword.commands.api",
    "load": "nextword.pipeline.language_model",
    "Model": "nextword.pipeline.language_model",
    "Completion": "nextword.inference.engine",
    "Sampling": "nextword.inference.sampling",
    "Likelihood": "nextword.inference.perplexity",
    "GPT": "nextword.model.gpt",
    "ModelConfig": "nextword.model.config",
    "build_config": "nextword.model.config",
    "Tokenizer": "nextword.data.tokenizer",
    "Corpus": "nextword.data.corpus",
    "NextwordError": "nextword.common.errors",
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
    from nextword.commands.api import audit as audit
    from nextword.commands.api import evaluate as evaluate
    from nextword.commands.api import explain as explain
    from nextword.commands.api import export as export
    from nextword.commands.api import finetune as finetune
    from nextword.commands.api import generate as generate
    from nextword.commands.api import plan as plan
    from nextword.commands.api import predict as predict
    from nextword.commands.api import prepare as prepare
    from nextword.commands.api import pretrain as pretrain
    from nextword.commands.api import report as report
    from nextword.commands.api import serve as serve
    from nextword.commands.api import transfer as transfer
    from nextword.commands.api import verify as verify
    from nextword.commands.demo import demo as demo
    from nextword.common.errors import NextwordError as NextwordError
    from nextword.data.corpus import Corpus as Corpus
    from nextword.data.tokenizer import Tokenizer as Tokenizer
    from nextword.inference.engine import Completion as Completion
    from nextword.inference.perplexity import Likelihood as Likelihood
    from nextword.inference.sampling import Sampling as Sampling
    from nextword.model.config import ModelConfig as ModelConfig
    from nextword.model.config import build_config as build_config
    from nextword.model.gpt import GPT as GPT
    from nextword.pipeline.language_model import Model as Model
    from nextword.pipeline.language_model import load as load


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'nextword' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
