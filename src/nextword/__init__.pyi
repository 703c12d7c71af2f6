"""The public names of the package. `__init__.py` reads this file to know which module has a name."""

from typing import Any

from nextword._version import __version__ as __version__
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

def __getattr__(name: str) -> Any: ...  # pyright: ignore[reportIncompleteStub]  # LMEval, and the deprecated names
