"""The model that a fine-tuning starts from: its directory, its task, and the corpus it was pre-trained on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.common import fs
from nextword.common.errors import CorruptFileError, NextwordError
from nextword.data.corpus import Corpus
from nextword.data.tokenizer import Tokenizer
from nextword.inference.perplexity import evaluate_perplexity
from nextword.model.gpt import GPT
from nextword.model.hf import load_model
from nextword.tasks.templates import TaskSpec

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


def pretraining_corpus_of(run_path: Path) -> Path | None:
    """Return the corpus that the model of a run was pre-trained on, by this run or an earlier one; None if it is gone."""
    metadata = fs.read_json(run_path / "run.json")
    name = (metadata.get("old_text") or metadata.get("shards")) if fs.is_json_object(metadata) else None
    if not isinstance(name, str):  # not a nextword run
        return None
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
    windows = max(1, FORGETTING_TOKENS // model.config.context_length)
    before, after = (
        evaluate_perplexity(m, validation, corpus.validation.bytes, max_windows=windows).bits_per_byte
        for m in (load_model(base_model.directory, model.unembedding.device), model)
    )
    return {"text": str(base_model.pretraining_corpus), "before": before, "after": after, "windows": windows}
