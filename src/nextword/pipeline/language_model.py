"""A model in hand: opened from a run folder or a model directory, and used."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextword.common.console import Console
from nextword.common.environment import resolve_device
from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import verify_manifest
from nextword.data.builtin_datasets import find_sources
from nextword.data.dataset import InMemoryTokens, TokenSource
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Completion, Engine
from nextword.inference.model_runner import ModelRunner, build_runner, fake_quantize
from nextword.inference.perplexity import Likelihood, evaluate_perplexity
from nextword.inference.quantization import PRECISION_CODES, Precision
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT
from nextword.model.hf import load_model, load_shards
from nextword.pipeline.base_model import load_task_spec, resolve_model_dir
from nextword.pipeline.predictor import Predictor
from nextword.tasks.dataset import TaskSpec
from nextword.tasks.task_data import example_from_texts

Paths = str | Path | Sequence[str | Path]


def as_list(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


class Model:
    """A model with its tokenizer, ready to be used. Made by `load`.

    Attributes:
        precision: in which it writes and is evaluated: its weights as they are, or rounded to 8 or 4 bits, which is faster
            and takes less memory (see `inference.quantize`).
        path, directory: where it was opened, and the model directory that is; they differ for a run's checkpoint.
    """

    def __init__(self, path: Path, device: torch.device, precision: Precision = "float32"):
        self.path = self.directory = path
        load_task_spec(path)  # a task that is none is said by name, before the hashes are compared
        self.gpt = load_model(path, device).eval()
        self.tokenizer = Tokenizer.open(path)
        self.precision: Precision = precision

    @cached_property
    def runner(self) -> ModelRunner:
        return build_runner(self.gpt, self.precision)

    @cached_property
    def dequantized(self) -> GPT:
        """The model with its weights as the precision has them."""
        return self.gpt if self.precision == "float32" else fake_quantize(self.gpt, self.precision)

    @property
    def engine(self) -> Engine:
        return Engine(self.gpt, self.tokenizer, runner=self.runner)

    def generate(
        self, prompts: str | Sequence[str], sampling: Sampling | None = None, **settings: Any
    ) -> list[Completion]:
        """Continue one prompt or several together; `settings` are `Sampling`'s fields. In the order of the prompts."""
        sampling = sampling or Sampling(**settings)
        return self.engine.generate([prompts] if isinstance(prompts, str) else list(prompts), sampling)

    def predict(self, *texts: str) -> dict[str, Any]:
        """What a fine-tuned model answers to one example, given as its texts: one to classify or rewrite, two to compare, a
        question and its choices. `label`, `labels`, `score` or `text`, and `probabilities`."""
        predictor = self.predictor
        return predictor.predict([example_from_texts(predictor.task_spec.task, texts)])[0]

    @property
    def task_spec(self) -> TaskSpec | None:
        """The task that it was fine-tuned for, and how a text is given to it; None where it goes on with texts."""
        return load_task_spec(self.directory)

    @property
    def predictor(self) -> Predictor:
        task_spec = self.task_spec
        if task_spec is None:
            raise UsageError(
                f"{self.path}: a model that was fine-tuned for no task, so it has nothing to predict; let it go on from a "
                f"text by nextword generate, or fine-tune it: nextword finetune {self.path} DATA --out RUN"
            )
        return Predictor(self.gpt, self.tokenizer, task_spec)

    def stream(self, prompt: str, sampling: Sampling | None = None, **settings: Any) -> Iterator[str]:
        """The continuation of one prompt, as it is made."""
        return self.engine.stream(prompt, sampling or Sampling(**settings))

    def evaluate(
        self, texts: Paths, text_column: str | None = None, console: Console | None = None, stride: int | None = None
    ) -> Likelihood:
        """The loss on files, folders or named corpora, as one row of documents."""
        console = console or Console(quiet=True)
        tokens, n_bytes = self.read_tokens(texts, text_column, console)
        return self.evaluate_tokens(tokens, n_bytes, console, stride)

    def read_tokens(self, texts: Paths, text_column: str | None, console: Console) -> tuple[InMemoryTokens, int]:
        """Files, folders or named corpora as one row of tokens, and how many bytes of text they stand for.

        Raises:
            NextwordError: there is no text in them.
        """
        problems = IssueLog()
        row: list[np.ndarray] = []
        n_bytes = 0
        for source in find_sources(as_list(texts), problems, text_column):
            for document in source.read(problems):
                for piece in document.chunks:
                    row.append(np.asarray(self.tokenizer.encode(piece), dtype=np.int64))
                    n_bytes += len(piece.encode())
                row.append(np.asarray([self.tokenizer.eos_id], dtype=np.int64))
        for line in problems.summary_lines():
            console.warn(line)
        if not row:
            raise NextwordError(f"no text was found in {', '.join(map(str, as_list(texts)))}")
        return InMemoryTokens(np.concatenate(row)), n_bytes

    def evaluate_tokens(
        self, tokens: TokenSource, n_bytes: int, console: Console, stride: int | None = None,
        token_nll_out: np.ndarray | None = None,
    ) -> Likelihood:  # fmt: skip
        """The loss on tokens that stand for so many bytes, with the weights as the precision has them. Windows overlap by
        half where no stride is said."""
        stride = max(1, self.gpt.config.context_length // 2) if stride is None else stride

        def progress(done: int, total: int) -> None:
            console.progress("evaluating", done, total)

        return evaluate_perplexity(
            self.dequantized, tokens, n_bytes, stride=stride, progress=progress, token_nll_out=token_nll_out
        )


def load(path: str | Path, device: str = "auto", precision: Precision = "float32") -> Model:
    """Open a run folder's model, one of its checkpoints, or any model directory of a supported family, ours or stock.

    Raises:
        UsageError: there is no such precision.
        NextwordError: there is no model here, or a checkpoint that is none by itself.
    """
    if precision not in PRECISION_CODES:
        raise UsageError(f"there is no precision {precision!r}, only {', '.join(PRECISION_CODES)}")
    path = Path(path)
    if path.parent.name == "checkpoints" and any(path.glob("weights*.safetensors")):
        return _load_checkpoint(path, resolve_device(device), precision)
    return Model(resolve_model_dir(path), resolve_device(device), precision)


def _load_checkpoint(path: Path, device: torch.device, precision: Precision) -> Model:
    """The model of a run as it was at a checkpoint."""
    verify_manifest(path)
    model = Model(resolve_model_dir(path.resolve().parents[1]), device, precision)
    weights, expected = load_shards(path, "weights", device), model.gpt.state_dict()
    if {name: tensor.shape for name, tensor in weights.items()} != {name: expected[name].shape for name in expected}:
        raise NextwordError(f"{path}: not a whole model's weights (a LoRA's checkpoint is none); name the run folder")
    model.gpt.load_state_dict(weights)
    model.path = path
    return model
