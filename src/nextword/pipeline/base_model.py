"""The model that a fine-tuning begins with: where it is, what it was made for, and what it may forget."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.common import fs
from nextword.common.errors import CorruptFile, NextwordError
from nextword.data.corpus import Corpus
from nextword.data.tokenizer import Tokenizer
from nextword.inference.perplexity import likelihood
from nextword.model.gpt import GPT
from nextword.model.hf import load_model
from nextword.tasks.dataset import Form

OLD_TOKENS = 2**14  # of the text that a model was pre-trained on, to see what it has forgotten


def model_path(path: str | Path) -> Path:
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
class Base:
    """A model directory as a beginning: its tokenizer, the task it was made for, and the shards it was pre-trained on,
    where its run folder tells."""

    given: Path
    directory: Path
    tokenizer: Tokenizer
    form: Form | None
    old_text: Path | None

    @classmethod
    def open(cls, given: Path) -> "Base":
        directory = model_path(given)
        run = next((path for path in (given, directory.parent) if (path / "run.json").is_file()), None)
        return cls(given, directory, Tokenizer.open(directory), form_of(directory), old_text_of(run) if run else None)

    def fingerprint(self) -> str:
        """A hash of every weight file."""
        weights = sorted(self.directory.glob("*.safetensors"))
        return hashlib.sha256("".join(fs.sha256(path) for path in weights).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "base": {"model": str(self.given.resolve()), "weights": self.fingerprint()},
            "old_text": None if self.old_text is None else str(self.old_text.resolve()),
        }


def old_text_of(run: Path) -> Path | None:
    """The shards that a run's model was pre-trained on, by itself or by the run it began with; None where they are gone."""
    facts = fs.read_json(run / "run.json")
    named = (facts.get("old_text") or facts.get("shards")) if isinstance(facts, dict) else None
    if not isinstance(named, str):  # not a run of nextword's
        return None
    return run / named if (run / named / fs.MANIFEST).is_file() else None


def form_of(directory: Path) -> Form | None:
    """What task a model directory was fine-tuned for, where it was. Raises `CorruptFile` where that cannot be read."""
    if not (directory / fs.MANIFEST).is_file():
        return None
    facts = fs.read_manifest(directory).get("task")
    if facts is None:
        return None
    try:
        return Form.from_dict(facts)
    except (TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{directory / fs.MANIFEST}: says of no task that nextword knows ({error})") from error


def forgetting(base: Base, model: GPT) -> dict[str, Any] | None:
    """Bits per byte on the text that the base was pre-trained on, its held-out part, before and after; None where that
    text is not known. It is part of the text, evenly spread, and the same windows both times."""
    if base.old_text is None:
        return None
    corpus = Corpus.open(base.old_text)
    held_out = corpus.tokens("validation")
    if len(held_out) < 2:
        return None
    windows = max(1, OLD_TOKENS // model.config.context_length)
    before, after = (
        likelihood(one, held_out, corpus.validation.bytes, limit_windows=windows).bits_per_byte
        for one in (load_model(base.directory, model.unembedding.device), model)
    )
    return {"text": str(base.old_text), "before": before, "after": after, "windows": windows}
