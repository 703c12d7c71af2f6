"""A model opened from a run directory or a model directory, with its tokenizer and task."""

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
from nextword.inference.perplexity import PerplexityResult, evaluate_perplexity
from nextword.inference.quantization import PRECISION_CODES, Precision
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT
from nextword.model.hf import load_model, load_shards
from nextword.pipeline.base_model import load_task_spec, resolve_model_dir
from nextword.pipeline.predictor import Predictor
from nextword.tasks.examples import example_from_texts
from nextword.tasks.templates import TaskSpec

Paths = str | Path | Sequence[str | Path]


def as_list(paths: Paths) -> list[str | Path]:
    """One path, or several, as a list."""
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


class LanguageModel:
    """A model with its tokenizer, ready for inference. Use `load` to open one.

    Attributes:
        path: The path that it was opened from.
        directory: The model directory. It differs from `path` for a checkpoint of a run.
        gpt: The model with its original weights.
        tokenizer: The tokenizer.
        precision: The precision of generation and evaluation: float32, or weights quantised to 8 or 4 bits, which is faster and
            needs less memory (see `nextword.inference.quantization`).
    """

    def __init__(self, path: Path, device: torch.device, precision: Precision = "float32"):
        self.path = self.directory = path
        load_task_spec(path)  # report an invalid task before hashing the weights
        self.gpt = load_model(path, device).eval()
        self.tokenizer = Tokenizer.open(path)
        self.precision: Precision = precision

    @cached_property
    def runner(self) -> ModelRunner:
        """Runs the model for generation, at its precision."""
        return build_runner(self.gpt, self.precision)

    @cached_property
    def dequantized(self) -> GPT:
        """The model with its weights rounded to its precision."""
        return self.gpt if self.precision == "float32" else fake_quantize(self.gpt, self.precision)

    @cached_property
    def task_spec(self) -> TaskSpec | None:
        """The task that the model was fine-tuned for; None for a language model."""
        return load_task_spec(self.directory)

    @property
    def engine(self) -> Engine:
        """A new generation engine."""
        return Engine(self.gpt, self.tokenizer, runner=self.runner)

    @property
    def predictor(self) -> Predictor:
        """A predictor for the task of the model.

        Raises:
            UsageError: The model was not fine-tuned for a task.
        """
        if self.task_spec is None:
            raise UsageError(
                f"{self.path}: this model was not fine-tuned for a task. Generate text with nextword generate, or "
                f"fine-tune it: nextword finetune {self.path} DATA --out RUN"
            )
        return Predictor(self.gpt, self.tokenizer, self.task_spec)

    def generate(
        self, prompts: str | Sequence[str], sampling: Sampling | None = None, **settings: Any
    ) -> list[Completion]:
        """Generate a completion of each prompt.

        Args:
            prompts: One prompt or several, which are processed together.
            sampling: How tokens are sampled.
            settings: Fields of `Sampling`, instead of `sampling`.
        """
        sampling = sampling or Sampling(**settings)
        return self.engine.generate([prompts] if isinstance(prompts, str) else list(prompts), sampling)

    def stream(self, prompt: str, sampling: Sampling | None = None, **settings: Any) -> Iterator[str]:
        """Generate the completion of a prompt piece by piece. Arguments are those of `generate`."""
        return self.engine.stream(prompt, sampling or Sampling(**settings))

    def predict(self, *texts: str) -> dict[str, Any]:
        """The prediction of a fine-tuned model for one example.

        Args:
            texts: The texts of the example: one to classify or rewrite, two to compare, or a question and its choices.

        Returns:
            `label`, `labels`, `score` or `text`, and `probabilities`.
        """
        predictor = self.predictor
        return predictor.predict([example_from_texts(predictor.task_spec.task, texts)])[0]

    def evaluate(
        self, texts: Paths, text_column: str | None = None, console: Console | None = None, stride: int | None = None
    ) -> PerplexityResult:
        """Evaluate the loss and perplexity on texts, concatenated to one sequence.

        Args:
            texts: Files, folders or named corpora.
            text_column: The column of the text in tables.
            console: Where progress and warnings go.
            stride: Stride of the window, in tokens; default: half a window.
        """
        console = console or Console(quiet=True)
        tokens, num_bytes = self.read_tokens(texts, text_column, console)
        return self.evaluate_tokens(tokens, num_bytes, console, stride)

    def read_tokens(self, texts: Paths, text_column: str | None, console: Console) -> tuple[InMemoryTokens, int]:
        """The tokens of texts, concatenated with end-of-text tokens, and the number of bytes.

        Raises:
            NextwordError: There is no text.
        """
        issues = IssueLog()
        chunks: list[np.ndarray] = []
        num_bytes = 0
        for source in find_sources(as_list(texts), issues, text_column):
            for document in source.read(issues):
                for piece in document.chunks:
                    chunks.append(np.asarray(self.tokenizer.encode(piece), dtype=np.int64))
                    num_bytes += len(piece.encode())
                chunks.append(np.asarray([self.tokenizer.eos_id], dtype=np.int64))
        for line in issues.summary_lines():
            console.warn(line)
        if not chunks:
            raise NextwordError(f"there is no text in {', '.join(map(str, as_list(texts)))}")
        return InMemoryTokens(np.concatenate(chunks)), num_bytes

    def evaluate_tokens(
        self,
        tokens: TokenSource,
        num_bytes: int,
        console: Console,
        stride: int | None = None,
        token_nll_out: np.ndarray | None = None,
    ) -> PerplexityResult:
        """Evaluate the loss and perplexity on tokens, with the weights at the precision of the model.

        Args:
            tokens: The tokens.
            num_bytes: The bytes of their text.
            console: Where progress goes.
            stride: Stride of the window, in tokens; default: half a window.
            token_nll_out: Array that receives the loss of each token after the first, in nats.
        """
        return evaluate_perplexity(
            self.dequantized,
            tokens,
            num_bytes,
            stride=max(1, self.gpt.config.context_length // 2) if stride is None else stride,
            progress=lambda done, total: console.progress("evaluating", done, total),
            token_nll_out=token_nll_out,
        )


def load(path: str | Path, device: str = "auto", precision: Precision = "float32") -> LanguageModel:
    """Open the model of a run directory, one of its checkpoints, or any model directory of a supported family.

    Args:
        path: A run directory, a checkpoint directory or a Hugging Face model directory.
        device: "cpu", "cuda", "mps" or "auto".
        precision: "float32", "int8" or "int4".

    Raises:
        UsageError: The precision or the device does not exist.
        NextwordError: There is no model, or the checkpoint does not hold all weights.
    """
    if precision not in PRECISION_CODES:
        raise UsageError(f"unknown precision {precision!r}: choose from {', '.join(PRECISION_CODES)}")
    path = Path(path)
    if path.parent.name == "checkpoints" and any(path.glob("weights*.safetensors")):
        return _load_checkpoint(path, resolve_device(device), precision)
    return LanguageModel(resolve_model_dir(path), resolve_device(device), precision)


def _load_checkpoint(path: Path, device: torch.device, precision: Precision) -> LanguageModel:
    """The model of a run with the weights of a checkpoint."""
    verify_manifest(path)
    model = LanguageModel(resolve_model_dir(path.resolve().parents[1]), device, precision)
    weights, expected = load_shards(path, "weights", device), model.gpt.state_dict()
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
        raise NextwordError(
            f"{path}: does not hold all weights of the model (it may be a LoRA's); open the run directory"
        )
    model.gpt.load_state_dict(weights)
    model.path = path
    return model
