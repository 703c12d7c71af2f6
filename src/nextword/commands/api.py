"""The commands as Python functions, for tests that have not yet moved to the public names of `nextword`."""

from nextword.commands.audit import audit as audit
from nextword.commands.demo import demo as demo
from nextword.commands.evaluate import evaluate as evaluate
from nextword.commands.explain import explain as explain
from nextword.commands.export import export as export
from nextword.commands.finetune import finetune as finetune
from nextword.commands.generate import generate as generate
from nextword.commands.plan import plan as plan
from nextword.commands.predict import predict as predict
from nextword.commands.prepare import prepare as prepare
from nextword.commands.pretrain import pretrain as pretrain
from nextword.commands.report import report as report
from nextword.commands.serve import serve as serve
from nextword.commands.transfer import transfer as transfer
from nextword.commands.verify import verify as verify
from nextword.pipeline.language_model import load as load
