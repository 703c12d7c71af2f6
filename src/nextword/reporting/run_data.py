"""The files of a run directory, as reports and model cards read them.

Any of them may be incomplete, from an older version, or edited by hand: values of an unexpected type are treated as missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import read_json, read_jsonl
from nextword.common.results import is_number as is_number
from nextword.common.results import short_path_name as short_path_name

LM_LOSS_TASKS = (None, "continue", "chat", "rewrite")  # the training and the validation loss are the same quantity

IMBALANCE_RATIO = 2.0  # of the most to the least frequent label, from which on labels count as imbalanced

Point = tuple[float, float]


class Sample(NamedTuple):
    """A text that the model generated during training, with its prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class RunData:
    """The contents of a run directory.

    Attributes:
        name: Name of the directory.
        metadata: Contents of run.json.
        records: Lines of metrics.jsonl.
        result: Contents of result.json. Empty while the run is not finished.
    """

    name: str
    metadata: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any]

    @classmethod
    def load(cls, run_dir: Path) -> "RunData":
        """Read a run directory.

        Raises:
            NextwordError: `run_dir` is not a run directory.
            CorruptFileError: One of its files is not valid JSON or has the wrong shape.
        """
        if not (run_dir / "run.json").is_file():
            raise NextwordError(
                f"{run_dir}: not a run directory (run.json is missing). Pass the --out directory of a training command"
            )
        metadata: Any = read_json(run_dir / "run.json")
        result: Any = read_json(run_dir / "result.json") if (run_dir / "result.json").exists() else {}
        for name, value in (("run.json", metadata), ("result.json", result)):
            if not isinstance(value, dict):
                raise CorruptFileError(f"{run_dir / name}: expected a JSON object")
        records = read_jsonl(run_dir / "metrics.jsonl")
        for line, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                raise CorruptFileError(f"{run_dir / 'metrics.jsonl'} line {line}: expected a JSON object")
        return cls(run_dir.resolve().name, metadata, records, result)

    # ---------------------------------------------------------------- metrics.jsonl

    def series(self, *keys: str) -> list[Point]:
        """(step, value) of every record with a finite number at `keys`, for example `series("validation", "loss")`."""
        values = ((record.get("step"), get_nested(record, *keys)) for record in self.records)
        return [(float(step), float(value)) for step, value in values if is_number(step) and is_number(value)]

    def last_value(self, key: str) -> float | None:
        """The last finite number under `key`."""
        return next((y for _, y in reversed(self.series(key))), None)

    @property
    def best_validation(self) -> Point | None:
        """Step and value of the lowest validation loss."""
        return min(self.series("validation", "loss"), key=lambda point: point[1], default=None)

    @property
    def samples_by_step(self) -> dict[Any, list[Sample]]:
        """The generated samples, grouped by step."""
        by_step: dict[Any, list[Sample]] = {}
        for record in self.records:
            if isinstance(record.get("sample"), dict):
                sample = as_mapping(record["sample"])
                entry = Sample(str(sample.get("prompt") or ""), str(sample.get("text") or ""))
                step = record.get("step")
                by_step.setdefault(step if is_number(step) else str(step), []).append(entry)
        return by_step

    # ---------------------------------------------------------------- results

    @property
    def loss(self) -> float | None:
        """Final validation loss, or the lowest one so far."""
        value = self.result.get("loss")
        return value if is_number(value) else self.best_validation[1] if self.best_validation else None

    @property
    def bits_per_byte(self) -> float | None:
        """Final bits per byte on the validation set, or the lowest value so far."""
        value = self.result.get("bits_per_byte")
        return (
            value if is_number(value) else min((y for _, y in self.series("validation", "bits_per_byte")), default=None)
        )

    @property
    def seconds(self) -> float | None:
        """Wall time of the run so far."""
        value = self.result.get("seconds")
        return value if is_number(value) else self.last_value("seconds")

    @property
    def forgetting(self) -> tuple[float, float] | None:
        """Bits per byte on the pre-training corpus before and after a fine-tuning."""
        before, after = (get_nested(self.result, "forgetting", key) for key in ("before", "after"))
        known = is_number(before) and is_number(after) and before > 0 and not self.get("recipe", "scratch")
        return (before, after) if known else None

    # ---------------------------------------------------------------- run.json

    def get(self, *keys: str) -> Any:
        """A value of run.json by its path, or None."""
        return get_nested(self.metadata, *keys)

    @property
    def task(self) -> str | None:
        """Fine-tuning task, "continue" for continued pre-training, None for pre-training."""
        task = self.get("task", "task")
        return task if isinstance(task, str) else None

    @property
    def task_kind(self) -> str:
        """What the model predicts: "label", "labels", "score", "choice", "answer" or "preference"."""
        return str(self.get("task", "kind"))

    @property
    def labels(self) -> list[str]:
        """The labels of a classification task."""
        return [str(label) for label in as_list(self.get("task", "labels"))]

    @property
    def label_counts(self) -> list[tuple[str, int]]:
        """(label, number of training examples), the most frequent label first."""
        counts = as_mapping(self.get("data", "labels")).items()
        pairs = [(str(label), int(n)) for label, n in counts if is_number(n) and n >= 0]
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))

    @property
    def base_model(self) -> str | None:
        """Name of the model that the run started from, without its directory."""
        path = self.get("base", "model")
        return short_path_name(path) if isinstance(path, str) and path else None


def validation_loss_unit(run: RunData) -> str:
    """What the validation loss of the run's task is."""
    return {
        "label": "nats per example",
        "labels": "binary cross-entropy, nats per label",
        "score": "squared error",
        "choice": "nats per example",
        "preference": "nats per token of the chosen answer",
    }.get(run.task_kind, "nats per token")


def is_imbalanced(run: RunData) -> bool:
    """Whether the label distribution deserves a section of its own."""
    counts = run.label_counts
    return len(counts) > 1 and counts[0][1] >= IMBALANCE_RATIO * counts[-1][1]


def task_metadata(run: RunData) -> dict[str, Any]:
    """What was trained on what, by display name; unknown values are left out."""
    rank, counts = run.get("tuning", "rank"), run.label_counts
    weights = "all weights"
    if run.get("recipe", "lora"):
        weights = f"LoRA, rank {int(rank)}" if is_number(rank) else "LoRA"
    columns = as_mapping(run.get("task", "columns")).items()
    values: dict[str, Any] = {
        "task": run.task,
        "base model": run.base_model,
        "columns": ", ".join(role if role == name else f"{role} ({name})" for role, name in columns) or None,
        "labels": len(run.labels) or None,
        "trained": f"{weights}, from random initialisation" if run.get("recipe", "scratch") else weights,
    }
    if counts and not is_imbalanced(run):
        values["examples per label"] = f"{counts[-1][1]:,} to {counts[0][1]:,}"
    return {name: value for name, value in values.items() if value is not None}


def get_nested(value: Any, *keys: str) -> Any:
    """value[key][key]…, or None if a key is missing."""
    for key in keys:
        value = as_mapping(value).get(key)
    return value


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping if it is not one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """The value, or an empty list if it is not one."""
    return cast("list[Any]", value) if isinstance(value, list) else []
