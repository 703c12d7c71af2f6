"""What was measured on a run's model after its training, kept in the run folder beside what the training measured.

RUN/measured/evaluation.json   {"weights", "texts": {NAME: …}, "suites": {NAME: …}}, each as `nextword evaluate --json` has it,
                               with `measured`: its date and the arguments that matter
RUN/measured/audit.json        {"model", "findings": […], "seconds"}, as `nextword audit --json` has it

Both are files that people may open and change: what cannot be what was written is refused by its name and place.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from nextword.common.errors import CorruptFileError
from nextword.common.fs import MANIFEST, atomic_write, read_json, read_manifest

EVALUATION_FILE, AUDIT_FILE = Path("measured") / "evaluation.json", Path("measured") / "audit.json"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite int or float of a size that arithmetic and plots can handle."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 <= value <= 1e100


def short_path_name(path: str) -> str:
    """The last part of a path, or the name of the run for its `model` directory."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if len(parts) > 1 and parts[-1] == "model":
        return parts[-2]
    return parts[-1] if parts else path


@dataclass(frozen=True)
class ScoreWithCI:
    """A number with its 95 % interval and on how much it rests, as far as these are known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Provenance:
    """When something was measured (an ISO date), and by which arguments."""

    date: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class TextResult:
    """How well a text was predicted: bits per byte with their interval, nats per token, tokens and bytes."""

    name: str
    bits_per_byte: ScoreWithCI
    loss: float
    tokens: int
    bytes: int
    provenance: Provenance


@dataclass(frozen=True)
class BenchmarkResult:
    """A suite's score by its first metric.

    Attributes:
        of: items there are, of which `score.n` were asked.
        chance: what guessing scores, and on which side of it the whole interval is, if on any: "above" or "below".
        scrambled: the same with the words scrambled, and whether their order matters.
        groups: the score of each group of items.
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
    """One finding of an audit, as `auditing.findings.Finding` has it."""

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
    """Everything that was measured on a run's model; `stale` where the texts and suites were measured on other weights than
    those that the run has now."""

    texts: tuple[TextResult, ...] = ()
    benchmarks: tuple[BenchmarkResult, ...] = ()
    findings: tuple[AuditFinding, ...] = ()
    stale: bool = False

    @classmethod
    def load(cls, run_dir: Path) -> "StoredResults":
        """Raises `CorruptFile` where one of the files is not what was written."""
        texts, suites, stale = _load_evaluation(run_dir)
        return cls(texts, suites, _load_findings(run_dir / AUDIT_FILE), stale)


# ---------------------------------------------------------------- keeping


def save_results(
    run_dir: Path,
    result: Mapping[str, Any],
    text_name: str,
    text_provenance: Provenance,
    benchmark_provenance: Provenance,
) -> None:
    """Put a result of `nextword evaluate` into the run folder, in place of an older one of the same name. What was measured on
    other weights than the run's present ones goes.

    Args:
        text: the name of the text that was measured, where one was.
        of_text, of_suites: when, and by which arguments.

    Raises:
        CorruptFile: what is there already is not what was written.
    """
    previous = read_json(run_dir / EVALUATION_FILE) if (run_dir / EVALUATION_FILE).is_file() else {}
    _load_evaluation(run_dir)  # refuses what is damaged, rather than writing over it
    weights = weights_digest(run_dir)
    retained = previous if previous.get("weights") == weights else {}
    texts, suites = dict(retained.get("texts", {})), dict(retained.get("suites", {}))
    if "loss" in result:
        texts[text_name] = {key: value for key, value in result.items() if key != "suites"} | _provenance_to_dict(
            text_provenance
        )
    suites |= {
        name: suite | _provenance_to_dict(benchmark_provenance) for name, suite in result.get("suites", {}).items()
    }
    (run_dir / EVALUATION_FILE).parent.mkdir(exist_ok=True)
    document = {"weights": weights, "texts": texts, "suites": suites}
    atomic_write(
        run_dir / EVALUATION_FILE, json.dumps(document, indent=2) + "\n"
    )  # in ASCII: names of files may hold any bytes


def _provenance_to_dict(provenance: Provenance) -> dict[str, Any]:
    return {"measured": {"date": provenance.date, "arguments": dict(provenance.arguments)}}


def weights_digest(run_dir: Path) -> str | None:
    """The SHA-256 of the run's weights, by their manifest."""
    if not (run_dir / "model" / MANIFEST).is_file():
        return None
    files = read_manifest(run_dir / "model")["files"]
    return next((one["sha256"] for name, one in files.items() if name.endswith(".safetensors")), None)


# ---------------------------------------------------------------- reading


class JSONReader:
    """A table inside a JSON file that knows its way there, so that what is wrong in it can be named."""

    def __init__(self, file: Path, value: Any, json_path: str = ""):
        self.file, self.json_path = file, json_path
        if not isinstance(value, dict):
            raise CorruptFileError(f"{file}: {json_path or 'the whole'} is not an object")
        self.values: dict[str, Any] = value

    def field_error(self, name: str, expected: str) -> CorruptFileError:
        return CorruptFileError(f"{self.file}: {f'{self.json_path}.{name}'.lstrip('.')} is not {expected}")

    def get_number(self, name: str) -> float:
        value = self.values.get(name)
        if not is_number(value) or not math.isfinite(value):
            raise self.field_error(name, "a number")
        return value

    def get_optional_number(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.get_number(name)

    def get_count(self, name: str) -> int | None:
        value = self.get_optional_number(name)
        if value is not None and (value < 0 or value != int(value)):
            raise self.field_error(name, "a count")
        return None if value is None else int(value)

    def get_string(self, name: str, default: str | None = None) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.field_error(name, "a text")
        return value

    def get_bool(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.field_error(name, "true or false")
        return bool(value)

    def get_object(self, name: str) -> "JSONReader":
        return JSONReader(self.file, self.values.get(name), f"{self.json_path}.{name}".lstrip("."))

    def iter_objects(self, name: str) -> Iterator[tuple[str, "JSONReader"]]:
        """The tables of a table by their names; none where it is not there."""
        if self.values.get(name) is None:
            return
        inner = self.get_object(name)
        for key in inner.values:
            yield key, inner.get_object(key)

    def get_list(self, name: str) -> "list[JSONReader]":
        value = self.values.get(name)
        if not isinstance(value, list | tuple):
            raise self.field_error(name, "a list")
        return [JSONReader(self.file, one, f"{self.json_path}.{name}[{i}]".lstrip(".")) for i, one in enumerate(value)]

    def get_score(self, value_key: str = "score") -> ScoreWithCI:
        low, high = self.get_optional_number("low"), self.get_optional_number("high")
        if low is not None and high is not None and low > high:
            raise self.field_error("low", "below high")
        return ScoreWithCI(self.get_number(value_key), low, high, self.get_count("n"))

    def get_provenance(self) -> Provenance:
        measured = self.get_object("measured")
        return Provenance(measured.get_string("date"), measured.get_object("arguments").values)


def _load_evaluation(run_dir: Path) -> tuple[tuple[TextResult, ...], tuple[BenchmarkResult, ...], bool]:
    file = run_dir / EVALUATION_FILE
    if not file.is_file():
        return (), (), False
    root = JSONReader(file, read_json(file))
    texts, suites = [], []
    for name, entry in root.iter_objects("texts"):
        interval = entry.get_object("interval")
        bits = ScoreWithCI(
            entry.get_number("bits_per_byte"), interval.get_optional_number("low"), interval.get_optional_number("high")
        )
        sizes = entry.get_count("tokens") or 0, entry.get_count("bytes") or 0
        texts.append(TextResult(name, bits, entry.get_number("loss"), *sizes, entry.get_provenance()))
    for name, entry in root.iter_objects("suites"):
        suites.append(_parse_benchmark_result(name, entry))
    weights = root.values.get("weights")
    return tuple(texts), tuple(suites), weights is not None and weights != weights_digest(run_dir)


def _parse_benchmark_result(name: str, entry: JSONReader) -> BenchmarkResult:
    shuffled = entry.get_object("scrambled") if entry.values.get("scrambled") is not None else None
    return BenchmarkResult(
        name=name,
        metric=entry.get_string("metric"),
        score=entry.get_score(),
        total_items=entry.get_count("of"),
        chance=entry.get_optional_number("chance"),
        chance_side="above" if entry.get_bool("above_chance") else "below" if entry.get_bool("below_chance") else None,
        shuffled_control=shuffled and shuffled.get_score(),
        order_matters=bool(shuffled and shuffled.get_bool("order_matters")),
        groups={group: place.get_score() for group, place in entry.iter_objects("groups")},
        provenance=entry.get_provenance(),
    )


def _load_findings(file: Path) -> tuple[AuditFinding, ...]:
    if not file.is_file():
        return ()
    findings = []
    for entry in JSONReader(file, read_json(file)).get_list("findings"):
        examples = entry.get_list("examples") if entry.values.get("examples") is not None else []
        for example in examples:
            for name in example.values:
                example.get_string(name)
        findings.append(
            AuditFinding(
                section=entry.get_string("section"),
                name=entry.get_string("name"),
                score=entry.get_score("value"),
                unit=entry.get_string("unit", ""),
                reference=entry.get_optional_number("reference"),
                flagged=entry.get_bool("notable"),
                note=entry.get_string("note", ""),
                examples=tuple(example.values for example in examples),
            )
        )
    return tuple(findings)
