"""Results of `evaluate` and `audit` that a run directory keeps beside the metrics of its training.

    RUN/measured/evaluation.json   {"weights", "texts": {NAME: …}, "suites": {NAME: …}}: results of `nextword evaluate --json`,
                                   each with its date and arguments under "measured"
    RUN/measured/audit.json        {"model", "findings": […], "seconds"}: the result of `nextword audit --json`

Evaluation and audit write these files; reports and model cards read them. People may edit them, so every field is validated.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeGuard, TypeVar

import msgspec

from nextword.common.errors import CorruptFileError
from nextword.common.fs import MANIFEST, Count, read_manifest, read_sealed_json
from nextword.common.statistics import ScoreWithCI, holm

EVALUATION_FILE, AUDIT_FILE = Path("measured") / "evaluation.json", Path("measured") / "audit.json"

Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]  # neither NaN nor infinite
T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """When a result was measured (ISO 8601), and with which arguments."""

    date: str
    arguments: Mapping[str, Any]


class _Interval(msgspec.Struct, kw_only=True):
    low: Number | None = None
    high: Number | None = None
    n: Count | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("`low` is greater than `high`")


class _Score(_Interval, kw_only=True):
    value: Number = msgspec.field(name="score")
    differs: bool | None = msgspec.field(default=None, name="order_matters")  # of the control with shuffled words
    p_value: Number | None = None

    @property
    def score(self) -> ScoreWithCI:
        """The score with its confidence interval."""
        return ScoreWithCI(self.value, self.low, self.high, self.n)


class _TextInterval(_Interval, kw_only=True):
    basis: str = "over blocks of the text, by an earlier version: too narrow, evaluate again"


class TextResult(msgspec.Struct, kw_only=True):
    """The perplexity evaluation of a text: bits per byte, loss in nats per token, and the size of the text."""

    name: str = ""
    value: Number = msgspec.field(name="bits_per_byte")
    interval: _TextInterval
    loss: Number
    provenance: Provenance = msgspec.field(name="measured")
    tokens: Count | None = None
    bytes: Count | None = None

    @property
    def bits_per_byte(self) -> ScoreWithCI:
        """Bits per byte with their confidence interval."""
        return ScoreWithCI(self.value, self.interval.low, self.interval.high, self.interval.n)


class BenchmarkResult(_Score, kw_only=True):
    """The score of a benchmark by its primary metric.

    Attributes:
        name: Name of the benchmark.
        metric: Name of the primary metric.
        total_items: Number of items that the benchmark has; `score.n` of them were evaluated.
        chance: Score of random guessing.
        above_chance, below_chance: Whether the score is significantly on that side of chance.
        p_value: The p-value of the difference from chance.
        control: The score with shuffled words.
        group_scores: The score of each group of items.
        provenance: When and how it was measured.
    """

    name: str = ""
    metric: str
    total_items: Count | None = msgspec.field(default=None, name="of")
    chance: Number | None = None
    above_chance: bool | None = None
    below_chance: bool | None = None
    control: _Score | None = msgspec.field(default=None, name="scrambled")
    group_scores: dict[str, _Score] | None = msgspec.field(default=None, name="groups")
    provenance: Provenance = msgspec.field(name="measured")

    @property
    def chance_side(self) -> str | None:
        """The side of chance on which the score significantly is: "above", "below" or neither."""
        return "above" if self.above_chance else "below" if self.below_chance else None

    @property
    def shuffled_control(self) -> ScoreWithCI | None:
        """The score with shuffled words."""
        return self.control and self.control.score

    @property
    def order_matters(self) -> bool:
        """Whether the score with shuffled words differs."""
        return self.control is not None and bool(self.control.differs)

    @property
    def groups(self) -> dict[str, ScoreWithCI]:
        """The score of each group of items."""
        return {name: group.score for name, group in (self.group_scores or {}).items()}


class AuditFinding(_Interval, kw_only=True):
    """One finding of an audit; the fields are those of `nextword.audit.findings.Finding`."""

    section: str
    name: str
    value: Number
    unit: str = ""
    reference: Number | None = None
    flagged: bool | None = msgspec.field(default=None, name="notable")
    note: str = ""
    examples: list[dict[str, str]] | None = None
    p_value: Number | None = None

    @property
    def score(self) -> ScoreWithCI:
        """The value with its confidence interval."""
        return ScoreWithCI(self.value, self.low, self.high, self.n)


class _AuditFile(msgspec.Struct):
    findings: list[AuditFinding]


class _EvaluationFile(msgspec.Struct):
    weights: Any = None
    texts: dict[str, Any] | None = None
    suites: dict[str, Any] | None = None


@dataclass(frozen=True)
class StoredResults:
    """All results measured on a run's model.

    Attributes:
        texts: Perplexity evaluations.
        benchmarks: Benchmark results.
        findings: Findings of the audit.
        stale: Whether texts and benchmarks were evaluated on other weights than the run has now.
    """

    texts: tuple[TextResult, ...] = ()
    benchmarks: tuple[BenchmarkResult, ...] = ()
    findings: tuple[AuditFinding, ...] = ()
    stale: bool = False

    @classmethod
    def load(cls, run_dir: Path) -> "StoredResults":
        """Read the results of a run directory; empty if nothing was measured.

        Raises:
            CorruptFileError: A file is not valid; the message names the file and the field.
        """
        audit, evaluation, path = _AuditFile([]), _EvaluationFile(), run_dir / EVALUATION_FILE
        if os.path.lexists(run_dir / AUDIT_FILE):
            audit = _convert(read_sealed_json(run_dir / AUDIT_FILE), _AuditFile, run_dir / AUDIT_FILE)
        if os.path.lexists(path):
            evaluation = _convert(read_sealed_json(path), _EvaluationFile, path)
            if evaluation.texts is None and evaluation.suites is None:
                raise CorruptFileError(f"{path}: neither `texts` nor `suites`. Correct or remove the file")
        texts, benchmarks = evaluation.texts or {}, evaluation.suites or {}
        results = cls(
            texts=tuple(_convert(entry, TextResult, path, f"texts.{name}") for name, entry in texts.items()),
            benchmarks=tuple(
                _convert(entry, BenchmarkResult, path, f"suites.{name}") for name, entry in benchmarks.items()
            ),
            findings=tuple(audit.findings),
            stale=evaluation.weights is not None and evaluation.weights != weights_digest(run_dir),
        )
        for result, name in zip((*results.texts, *results.benchmarks), (*texts, *benchmarks), strict=True):
            result.name = name
        results._correct_for_multiple_comparisons()
        return results

    def _correct_for_multiple_comparisons(self) -> None:
        """Mark only those benchmarks that are significant together: evaluations at other times are on the same page."""
        significant = holm([benchmark.p_value for benchmark in self.benchmarks])
        controls = [benchmark.control for benchmark in self.benchmarks if benchmark.control is not None]
        for benchmark, is_significant in zip(self.benchmarks, significant, strict=True):
            if benchmark.p_value is not None and not is_significant:
                benchmark.above_chance = benchmark.below_chance = False
        for control, is_significant in zip(controls, holm([c.p_value for c in controls]), strict=True):
            if control.p_value is not None and not is_significant:
                control.differs = False


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite int or float of a size that arithmetic and plots can handle."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 <= value <= 1e100


def short_path_name(path: str) -> str:
    """The last part of a path, or the name of the run for its `model` directory."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if len(parts) > 1 and parts[-1] == "model":
        return parts[-2]
    return parts[-1] if parts else path


def weights_digest(run_dir: Path) -> str | None:
    """The SHA-256 of the run's weights from their manifest; None if the run has no model yet."""
    if not (run_dir / "model" / MANIFEST).is_file():
        return None
    files = read_manifest(run_dir / "model")["files"]
    return next((entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")), None)


def _convert(value: Any, struct: type[T], path: Path, json_path: str = "$") -> T:
    """Validate a JSON value; an error names the file and the field."""
    try:
        return msgspec.convert(value, struct)
    except msgspec.ValidationError as error:
        message = str(error)
        message = message.replace("`$", f"`{json_path}") if "`$" in message else f"{message} - at `{json_path}`"
        raise CorruptFileError(f"{path}: {message}. Correct the file, or remove it and evaluate again") from error
