"""The model that a fine-tuning begins with: where it is, what it was made for, and what it may forget."""

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
from nextword.tasks.dataset import TaskSpec

FORGETTING_TOKENS = 2**14  # of the text that a model was pre-trained on, to see what it has forgotten


def resolve_model_dir(path: str | Path) -> Path:
    """The model directory that a path means: itself, or the one in a run folder."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "run.json").is_file():
        raise NextwordError(
            f"{path}: this run has no model yet; go on with it by the command that began it and --resume"
        )
    raise NextwordError(f"{path}: neither a model directory nor a run folder (no config.json in it)")


@dataclass(frozen=True)
class BaseModel:
    """A model directory as a beginning: its tokenizer, the task it was made for, and the shards it was pre-trained on,
    where its run folder tells."""

    source_path: Path
    directory: Path
    tokenizer: Tokenizer
    task_spec: TaskSpec | None
    pretraining_corpus: Path | None

    @classmethod
    def open(cls, source_path: Path) -> "BaseModel":
        directory = resolve_model_dir(source_path)
        run_path = next((path for path in (source_path, directory.parent) if (path / "run.json").is_file()), None)
        return cls(
            source_path,
            directory,
            Tokenizer.open(directory),
            load_task_spec(directory),
            pretraining_corpus_of(run_path) if run_path else None,
        )

    def fingerprint(self) -> str:
        """A hash of every weight file."""
        weights = sorted(self.directory.glob("*.safetensors"))
        return hashlib.sha256("".join(fs.sha256_file(path) for path in weights).encode()).hexdigest()

    def metadata(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "base": {"model": str(self.source_path.resolve()), "weights": self.fingerprint()},
            "old_text": None if self.pretraining_corpus is None else str(self.pretraining_corpus.resolve()),
        }


def pretraining_corpus_of(run_path: Path) -> Path | None:
    """The shards that a run's model was pre-trained on, by itself or by the run it began with; None where they are gone."""
    metadata = fs.read_json(run_path / "run.json")
    corpus_path = (metadata.get("old_text") or metadata.get("shards")) if isinstance(metadata, dict) else None
    if not isinstance(corpus_path, str):  # not a run of nextword's
        return None
    return run_path / corpus_path if (run_path / corpus_path / fs.MANIFEST).is_file() else None


def load_task_spec(directory: Path) -> TaskSpec | None:
    """What task a model directory was fine-tuned for, where it was. Raises `CorruptFile` where that cannot be read."""
    if not (directory / fs.MANIFEST).is_file():
        return None
    task_metadata = fs.read_manifest(directory).get("task")
    if task_metadata is None:
        return None
    try:
        return TaskSpec.from_dict(task_metadata)
    except (TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{directory / fs.MANIFEST}: says of no task that nextword knows ({error})") from error


def evaluate_forgetting(base_model: BaseModel, model: GPT) -> dict[str, Any] | None:
    """Bits per byte on the text that the base was pre-trained on, its held-out part, before and after; None where that
    text is not known. It is part of the text, evenly spread, and the same windows both times."""
    if base_model.pretraining_corpus is None:
        return None
    corpus = Corpus.open(base_model.pretraining_corpus)
    held_out = corpus.tokens("validation")
    if len(held_out) < 2:
        return None
    windows = max(1, FORGETTING_TOKENS // model.config.context_length)
    before, after = (
        evaluate_perplexity(one, held_out, corpus.validation.bytes, max_windows=windows).bits_per_byte
        for one in (load_model(base_model.directory, model.unembedding.device), model)
    )
    return {"text": str(base_model.pretraining_corpus), "before": before, "after": after, "windows": windows}
