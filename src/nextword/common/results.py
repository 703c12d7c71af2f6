"""Results of `evaluate` and `audit` that a run directory keeps beside the metrics of its training.

    RUN/measured/evaluation.json   {"weights", "texts": {NAME: …}, "suites": {NAME: …}}: results of `nextword evaluate --json`,
                                   each with its date and arguments under "measured"
    RUN/measured/audit.json        {"model", "findings": […], "seconds"}: the result of `nextword audit --json`

Evaluation and audit write these files; reports and model cards read them. People may edit them, so every field is validated.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeGuard, TypeVar

import msgspec

from nextword.common.errors import CorruptFileError
from nextword.common.fs import MANIFEST, read_json, read_manifest
from nextword.common.statistics import ScoreWithCI

EVALUATION_FILE, AUDIT_FILE = Path("measured") / "evaluation.json", Path("measured") / "audit.json"

Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]  # neither NaN nor infinite
Count = Annotated[int, msgspec.Meta(ge=0)]
T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """When a result was measured (ISO 8601), and with which arguments."""

    date: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class TextResult:
    """The perplexity evaluation of a text: bits per byte, loss in nats per token, and the size of the text."""

    name: str
    bits_per_byte: ScoreWithCI
    loss: float
    tokens: int
    bytes: int
    provenance: Provenance


@dataclass(frozen=True)
class BenchmarkResult:
    """The score of a benchmark by its primary metric.

    Attributes:
        name: Name of the benchmark.
        metric: Name of the primary metric.
        score: The score on `score.n` evaluated items.
        total_items: Number of items that the benchmark has.
        chance: Score of random guessing.
        chance_side: "above" or "below" if the whole confidence interval lies on that side of chance.
        shuffled_control: The score with shuffled words.
        order_matters: Whether the score with shuffled words differs.
        groups: The score of each group of items.
        provenance: When and how it was measured.
    """

    name: str
    metric: str
    score: ScoreWithCI
    total_items: int | None
    chance: float | None
    chance_side: str | None
    shuffled_control: ScoreWithCI | None
    order_matters: bool
    groups: Mapping[str, ScoreWithCI]
    provenance: Provenance


@dataclass(frozen=True)
class AuditFinding:
    """One finding of an audit; the fields are those of `nextword.audit.findings.Finding`."""

    section: str
    name: str
    score: ScoreWithCI
    unit: str
    reference: float | None
    flagged: bool
    note: str
    examples: tuple[Mapping[str, str], ...]


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
        findings: tuple[AuditFinding, ...] = ()
        if (run_dir / AUDIT_FILE).is_file():
            audit = _convert(read_json(run_dir / AUDIT_FILE), _AuditFile, run_dir / AUDIT_FILE)
            findings = tuple(entry.to_finding() for entry in audit.findings)
        if not (run_dir / EVALUATION_FILE).is_file():
            return cls(findings=findings)
        path = run_dir / EVALUATION_FILE
        evaluation = _convert(read_json(path), _EvaluationFile, path)
        return cls(
            texts=tuple(
                _convert(entry, _TextEntry, path, f"texts.{name}").to_result(name)
                for name, entry in (evaluation.texts or {}).items()
            ),
            benchmarks=tuple(
                _convert(entry, _BenchmarkEntry, path, f"suites.{name}").to_result(name)
                for name, entry in (evaluation.suites or {}).items()
            ),
            findings=findings,
            stale=evaluation.weights is not None and evaluation.weights != weights_digest(run_dir),
        )


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


# ---------------------------------------------------------------- file format


class _Interval(msgspec.Struct, kw_only=True):
    low: Number | None = None
    high: Number | None = None
    n: Count | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("`low` is greater than `high`")

    def with_value(self, value: float) -> ScoreWithCI:
        return ScoreWithCI(value, self.low, self.high, self.n)


class _ScoreEntry(_Interval, kw_only=True):
    score: Number
    order_matters: bool | None = None  # of the control with shuffled words

    def to_score(self) -> ScoreWithCI:
        return self.with_value(self.score)


class _BenchmarkEntry(_ScoreEntry, kw_only=True):
    metric: str
    of: Count | None = None
    chance: Number | None = None
    above_chance: bool | None = None
    below_chance: bool | None = None
    scrambled: _ScoreEntry | None = None
    groups: dict[str, _ScoreEntry] | None = None
    measured: Provenance

    def to_result(self, name: str) -> BenchmarkResult:
        return BenchmarkResult(
            name=name,
            metric=self.metric,
            score=self.to_score(),
            total_items=self.of,
            chance=self.chance,
            chance_side="above" if self.above_chance else "below" if self.below_chance else None,
            shuffled_control=None if self.scrambled is None else self.scrambled.to_score(),
            order_matters=self.scrambled is not None and bool(self.scrambled.order_matters),
            groups={group: entry.to_score() for group, entry in (self.groups or {}).items()},
            provenance=self.measured,
        )


class _TextEntry(msgspec.Struct):
    bits_per_byte: Number
    interval: _Interval
    loss: Number
    measured: Provenance
    tokens: Count | None = None
    bytes: Count | None = None

    def to_result(self, name: str) -> TextResult:
        score = ScoreWithCI(self.bits_per_byte, self.interval.low, self.interval.high)
        return TextResult(name, score, self.loss, self.tokens or 0, self.bytes or 0, self.measured)


class _FindingEntry(_Interval, kw_only=True):
    section: str
    name: str
    value: Number
    unit: str = ""
    reference: Number | None = None
    notable: bool | None = None
    note: str = ""
    examples: list[dict[str, str]] | None = None

    def to_finding(self) -> AuditFinding:
        return AuditFinding(
            section=self.section,
            name=self.name,
            score=self.with_value(self.value),
            unit=self.unit,
            reference=self.reference,
            flagged=bool(self.notable),
            note=self.note,
            examples=tuple(self.examples or ()),
        )


class _AuditFile(msgspec.Struct):
    findings: list[_FindingEntry]


class _EvaluationFile(msgspec.Struct):
    weights: Any = None
    texts: dict[str, Any] | None = None
    suites: dict[str, Any] | None = None


def _convert(value: Any, struct: type[T], path: Path, json_path: str = "$") -> T:
    """Validate a JSON value; an error names the file and the field."""
    try:
        return msgspec.convert(value, struct)
    except msgspec.ValidationError as error:
        message = str(error)
        message = message.replace("`$", f"`{json_path}") if "`$" in message else f"{message} - at `{json_path}`"
        raise CorruptFileError(f"{path}: {message}. Correct the file, or remove it and evaluate again") from error
