"""Opens models: from a run directory or a model directory, with their tokenizer, task and pre-training corpus."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.environment import resolve_device
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.format import quote_command
from nextword.common.options import Paths, as_strings
from nextword.common.run_dir import RunDir
from nextword.data.builtin_datasets import find_sources
from nextword.data.corpus import Corpus
from nextword.data.dataset import InMemoryTokens, TokenSource
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer, lost_text_message
from nextword.inference.engine import Completion, Engine, check_tokenizer
from nextword.inference.model_runner import ModelRunner, build_runner, fake_quantize
from nextword.inference.perplexity import DocumentLosses, PerplexityResult, evaluate_perplexity
from nextword.inference.quantization import PRECISION_CODES, Precision
from nextword.inference.sampling import Sampling
from nextword.inference.sampling_options import read_sampling_defaults
from nextword.model.gpt import GPT, with_context_length
from nextword.model.hf import load_model, load_shards
from nextword.pipeline.predictor import Predictor
from nextword.tasks.dataset import TaskSpec
from nextword.tasks.examples import example_from_texts
from nextword.tasks.linear import LinearClassifier

FORGETTING_TOKENS = 2**14  # tokens of the pre-training corpus on which forgetting is measured


def resolve_model_dir(path: str | Path) -> Path:
    """Return the model directory of a path: the path itself, or the model of a run directory.

    Raises:
        NextwordError: there is no model.
    """
    path = Path(path)
    for directory in (path, path / "model"):
        if (directory / "config.json").is_file():
            return directory
    if (path / "run.json").is_file():
        raise NextwordError(
            f"{path}: the run has no model yet. Continue it with the command that started it and --resume"
        )
    raise NextwordError(f"{path}: not a model directory or a run directory (no config.json)")


def pretraining_corpus_of(run_path: Path) -> Path | None:
    """Return the corpus that the model of a run was pre-trained on, by this run or an earlier one; None if it is gone."""
    content = fs.read_json(run_path / "run.json")
    if not fs.is_json_object(content) or "recipe" not in content:  # not a nextword run
        return None
    metadata = RunDir(run_path).metadata()
    name = str(metadata.get("old_text") or metadata.get("shards") or "")
    return run_path / name if (run_path / name / fs.MANIFEST).is_file() else None


def load_task_spec(directory: Path) -> TaskSpec | None:
    """Return the task that a model directory was fine-tuned for.

    Raises:
        CorruptFileError: the manifest holds an invalid task.
    """
    task = fs.read_manifest(directory).get("task") if (directory / fs.MANIFEST).is_file() else None
    if task is None:
        return None
    try:
        return TaskSpec.from_dict(task)
    except (TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{directory / fs.MANIFEST}: not a valid task specification ({error})") from error


class LanguageModel:
    """A model with its tokenizer, ready for inference. Use `load` to open one.

    Attributes:
        path: The path that it was opened from.
        directory: The model directory. It differs from `path` for a checkpoint of a run.
        gpt: The model with its original weights.
        tokenizer: The tokenizer.
        sampling_defaults: The sampling parameters that are not given otherwise.
        precision: The precision of generation and evaluation: float32, or weights quantized to 8 or 4 bits, which is faster and
            needs less memory (see `nextword.inference.quantization`).
    """

    def __init__(self, path: Path, device: torch.device, precision: Precision = "float32"):
        self.path = self.directory = path
        load_task_spec(path)  # report an invalid task before hashing the weights
        self.gpt = load_model(path, device).eval()
        self.tokenizer = Tokenizer.open(path)
        check_tokenizer(self.gpt, self.tokenizer)
        self.sampling_defaults = read_sampling_defaults(path)
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
                f"fine-tune it: {quote_command('nextword', 'finetune', self.path, 'DATA')} --out RUN"
            )
        return Predictor(self.gpt, self.tokenizer, self.task_spec)

    def build_predictor(self, ensemble: bool, windows: bool) -> Predictor:
        """A predictor with options.

        Args:
            ensemble: Whether to combine the model with the linear classifier of its run.
            windows: Whether to read long texts in windows.

        Raises:
            UsageError: The run has no classifier, or the task no windows.
            CorruptFileError: The classifier is damaged.
        """
        task_spec, linear_dir = self.predictor.task_spec, RunDir(self.directory.parent).linear_dir
        if ensemble and not linear_dir.is_dir():
            raise UsageError(
                f"{self.path}: no linear classifier for an ensemble. nextword finetune writes one into the run directory of a "
                "classification of texts with one label each"
            )
        classifier = LinearClassifier.load(linear_dir) if ensemble else None
        return Predictor(self.gpt, self.tokenizer, task_spec, classifier, windows)

    def generate(
        self, prompts: str | Sequence[str], sampling: Sampling | None = None, **settings: Any
    ) -> list[Completion]:
        """Generate a completion of each prompt.

        Args:
            prompts: One prompt or several, which are processed together.
            sampling: How tokens are sampled.
            settings: Fields of `Sampling`, instead of `sampling`. Default: those of the model's generation_config.json.
        """
        sampling = sampling or replace(self.sampling_defaults, **settings)
        return self.engine.generate([prompts] if isinstance(prompts, str) else list(prompts), sampling)

    def stream(self, prompt: str, sampling: Sampling | None = None, **settings: Any) -> Iterator[str]:
        """Generate the completion of a prompt piece by piece. Arguments are those of `generate`."""
        return self.engine.stream(prompt, sampling or replace(self.sampling_defaults, **settings))

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
        """The tokens of texts, each after a begin or an end-of-text token and before an end-of-text token, and their bytes.

        Raises:
            NextwordError: There is no text, or the tokenizer cannot represent any of it.
        """
        issues, tokenizer = IssueLog(), self.tokenizer
        chunks: list[np.ndarray] = []
        num_bytes = lost_bytes = 0
        notes: set[str] = set()
        for source in find_sources(as_strings(texts), issues, text_column):
            for document in source.read(issues):
                # The first token is predicted, too: after the begin token, or else after an end-of-text token, as in training.
                begin = [id for id in tokenizer.bos_ids if id != tokenizer.eos_id]
                chunks.append(np.array(begin if chunks else tokenizer.bos_ids or [tokenizer.eos_id], np.int64))
                for piece in map(tokenizer.normalize, document.chunks):
                    notes.add(tokenizer.form_message([piece]))
                    chunks.append(np.asarray(tokenizer.encode(piece), dtype=np.int64))
                    num_bytes += len(piece.encode())
                    lost_bytes += len("".join(tokenizer.lost_text([piece])).encode())
                chunks.append(np.asarray([tokenizer.eos_id], dtype=np.int64))
        for line in [*issues.summary_lines(), *filter(None, notes)]:
            console.warn(line)
        if not chunks:
            raise NextwordError(f"there is no text in {', '.join(as_strings(texts))}")
        if lost_bytes:
            message = lost_text_message(lost_bytes, num_bytes)
            if lost_bytes == num_bytes:
                raise NextwordError(message)
            console.warn(message)
        return InMemoryTokens(np.concatenate(chunks)), num_bytes - lost_bytes

    def evaluate_tokens(
        self,
        tokens: TokenSource,
        num_bytes: int,
        console: Console,
        stride: int | None = None,
        documents: DocumentLosses | None = None,
    ) -> PerplexityResult:
        """Evaluate the loss and perplexity on tokens, with the weights at the precision of the model.

        Args:
            tokens: The tokens.
            num_bytes: The bytes of their text.
            console: Where progress goes.
            stride: Stride of the window, in tokens; default: half a window.
            documents: Receives the loss of each document.
        """
        return evaluate_perplexity(
            self.dequantized,
            tokens,
            num_bytes,
            bos_id=self.tokenizer.bos_id,
            stride=max(1, self.gpt.config.context_length // 2) if stride is None else stride,
            progress=lambda done, total: console.progress("evaluating", done, total),
            documents=documents,
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
    is_checkpoint = path.parent.name == "checkpoints" and any(path.glob("weights*.safetensors"))
    if is_checkpoint:
        fs.verify_manifest(path)
    directory = resolve_model_dir(path.resolve().parents[1] if is_checkpoint else path)
    model = LanguageModel(directory, resolve_device(device), precision)
    if is_checkpoint:
        weights, expected = load_shards(path, "weights", model.gpt.unembedding.device), model.gpt.state_dict()
        if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
            raise NextwordError(
                f"{path}: does not hold all weights of the model (it may be a LoRA's); open the run directory"
            )
        model.gpt.load_state_dict(weights)
        model.path = path
    return model


# ---------------------------------------------------------------- the start of a training run


@dataclass(frozen=True)
class BaseModel:
    """A model directory that a run starts from.

    Attributes:
        source_path: The path as given: a model directory or a run directory.
        directory: The model directory.
        tokenizer: The tokenizer of the model.
        task_spec: The task that the model was fine-tuned for.
        pretraining_corpus: The corpus that the model was pre-trained on, if its run names it and it still exists.
    """

    source_path: Path
    directory: Path
    tokenizer: Tokenizer
    task_spec: TaskSpec | None
    pretraining_corpus: Path | None

    @classmethod
    def open(cls, source_path: Path) -> "BaseModel":
        """Open a model directory or a run directory."""
        directory = resolve_model_dir(source_path)
        run_path = next((p for p in (source_path, directory.parent) if (p / "run.json").is_file()), None)
        corpus_path = None if run_path is None else pretraining_corpus_of(run_path)
        return cls(source_path, directory, Tokenizer.open(directory), load_task_spec(directory), corpus_path)

    def fingerprint(self) -> str:
        """Return a hash of all weight files."""
        weights = sorted(self.directory.glob("*.safetensors"))
        return hashlib.sha256("".join(fs.sha256_file(path) for path in weights).encode()).hexdigest()

    def metadata(self) -> dict[str, Any]:
        """What run.json records of the base model."""
        corpus = self.pretraining_corpus
        return {
            "base": {"model": str(self.source_path.resolve()), "weights": self.fingerprint()},
            "old_text": None if corpus is None else str(corpus.resolve()),
        }


def evaluate_forgetting(base_model: BaseModel, model: GPT) -> dict[str, Any] | None:
    """Bits per byte on the validation set of the pre-training corpus, before and after fine-tuning.

    Both models are evaluated on the same evenly spaced windows.

    Returns:
        The keys text, before, after and windows; None if the corpus is not known.
    """
    if base_model.pretraining_corpus is None:
        return None
    corpus = Corpus.open(base_model.pretraining_corpus)
    validation = corpus.tokens("validation")
    if len(validation) < 2:
        return None
    base = load_model(base_model.directory, model.unembedding.device)
    context_length = base.config.context_length
    windows = max(1, FORGETTING_TOKENS // context_length)
    before, after = (
        evaluate_perplexity(
            m, validation, corpus.validation.seen_bytes, bos_id=corpus.tokenizer.bos_id, max_windows=windows
        ).bits_per_byte
        for m in (base, with_context_length(model, context_length))
    )
    return {"text": str(base_model.pretraining_corpus), "before": before, "after": after, "windows": windows}
