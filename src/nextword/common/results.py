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
from typing import Any

from nextword.common.errors import CorruptFile
from nextword.common.fs import MANIFEST, read_json, read_manifest, write_durably
from nextword.reporting.run_data import is_number

EVALUATION, AUDIT = Path("measured") / "evaluation.json", Path("measured") / "audit.json"


@dataclass(frozen=True)
class Mark:
    """A number with its 95 % interval and on how much it rests, as far as these are known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class When:
    """When something was measured (an ISO date), and by which arguments."""

    date: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class TextMeasured:
    """How well a text was predicted: bits per byte with their interval, nats per token, tokens and bytes."""

    name: str
    bits_per_byte: Mark
    loss: float
    tokens: int
    bytes: int
    when: When


@dataclass(frozen=True)
class SuiteMeasured:
    """A suite's score by its first metric.

    Attributes:
        of: items there are, of which `score.n` were asked.
        chance: what guessing scores, and on which side of it the whole interval is, if on any: "above" or "below".
        scrambled: the same with the words scrambled, and whether their order matters.
        groups: the score of each group of items.
    """

    name: str
    metric: str
    score: Mark
    of: int | None
    chance: float | None
    side: str | None
    scrambled: Mark | None
    order_matters: bool
    groups: Mapping[str, Mark]
    when: When


@dataclass(frozen=True)
class FindingMeasured:
    """One finding of an audit, as `auditing.findings.Finding` has it."""

    section: str
    name: str
    mark: Mark
    unit: str
    reference: float | None
    notable: bool
    note: str
    examples: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured on a run's model; `stale` where the texts and suites were measured on other weights than
    those that the run has now."""

    texts: tuple[TextMeasured, ...] = ()
    suites: tuple[SuiteMeasured, ...] = ()
    findings: tuple[FindingMeasured, ...] = ()
    stale: bool = False

    @classmethod
    def read(cls, run: Path) -> "Measurements":
        """Raises `CorruptFile` where one of the files is not what was written."""
        texts, suites, stale = _evaluation(run)
        return cls(texts, suites, _findings(run / AUDIT), stale)


# ---------------------------------------------------------------- keeping


def keep(run: Path, result: Mapping[str, Any], text: str, of_text: When, of_suites: When) -> None:
    """Put a result of `nextword evaluate` into the run folder, in place of an older one of the same name. What was measured on
    other weights than the run's present ones goes.

    Args:
        text: the name of the text that was measured, where one was.
        of_text, of_suites: when, and by which arguments.

    Raises:
        CorruptFile: what is there already is not what was written.
    """
    before = read_json(run / EVALUATION) if (run / EVALUATION).is_file() else {}
    _evaluation(run)  # refuses what is damaged, rather than writing over it
    weights = weights_of(run)
    kept = before if before.get("weights") == weights else {}
    texts, suites = dict(kept.get("texts", {})), dict(kept.get("suites", {}))
    if "loss" in result:
        texts[text] = {key: value for key, value in result.items() if key != "suites"} | _told(of_text)
    suites |= {name: suite | _told(of_suites) for name, suite in result.get("suites", {}).items()}
    (run / EVALUATION).parent.mkdir(exist_ok=True)
    whole = {"weights": weights, "texts": texts, "suites": suites}
    write_durably(run / EVALUATION, json.dumps(whole, indent=2) + "\n")  # in ASCII: names of files may hold any bytes


def _told(when: When) -> dict[str, Any]:
    return {"measured": {"date": when.date, "arguments": dict(when.arguments)}}


def weights_of(run: Path) -> str | None:
    """The SHA-256 of the run's weights, by their manifest."""
    if not (run / "model" / MANIFEST).is_file():
        return None
    files = read_manifest(run / "model")["files"]
    return next((one["sha256"] for name, one in files.items() if name.endswith(".safetensors")), None)


# ---------------------------------------------------------------- reading


class Place:
    """A table inside a JSON file that knows its way there, so that what is wrong in it can be named."""

    def __init__(self, file: Path, value: Any, way: str = ""):
        self.file, self.way = file, way
        if not isinstance(value, dict):
            raise CorruptFile(f"{file}: {way or 'the whole'} is not an object")
        self.values: dict[str, Any] = value

    def wrong(self, name: str, what: str) -> CorruptFile:
        return CorruptFile(f"{self.file}: {f'{self.way}.{name}'.lstrip('.')} is not {what}")

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if not is_number(value) or not math.isfinite(value):
            raise self.wrong(name, "a number")
        return value

    def perhaps(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name)

    def count(self, name: str) -> int | None:
        value = self.perhaps(name)
        if value is not None and (value < 0 or value != int(value)):
            raise self.wrong(name, "a count")
        return None if value is None else int(value)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def inside(self, name: str) -> "Place":
        return Place(self.file, self.values.get(name), f"{self.way}.{name}".lstrip("."))

    def tables(self, name: str) -> Iterator[tuple[str, "Place"]]:
        """The tables of a table by their names; none where it is not there."""
        if self.values.get(name) is None:
            return
        inner = self.inside(name)
        for key in inner.values:
            yield key, inner.inside(key)

    def list(self, name: str) -> "list[Place]":
        value = self.values.get(name)
        if not isinstance(value, list | tuple):
            raise self.wrong(name, "a list")
        return [Place(self.file, one, f"{self.way}.{name}[{i}]".lstrip(".")) for i, one in enumerate(value)]

    def mark(self, value: str = "score") -> Mark:
        low, high = self.perhaps("low"), self.perhaps("high")
        if low is not None and high is not None and low > high:
            raise self.wrong("low", "below high")
        return Mark(self.number(value), low, high, self.count("n"))

    def when(self) -> When:
        measured = self.inside("measured")
        return When(measured.text("date"), measured.inside("arguments").values)


def _evaluation(run: Path) -> tuple[tuple[TextMeasured, ...], tuple[SuiteMeasured, ...], bool]:
    file = run / EVALUATION
    if not file.is_file():
        return (), (), False
    whole = Place(file, read_json(file))
    texts, suites = [], []
    for name, one in whole.tables("texts"):
        interval = one.inside("interval")
        bits = Mark(one.number("bits_per_byte"), interval.perhaps("low"), interval.perhaps("high"))
        sizes = one.count("tokens") or 0, one.count("bytes") or 0
        texts.append(TextMeasured(name, bits, one.number("loss"), *sizes, one.when()))
    for name, one in whole.tables("suites"):
        suites.append(_suite(name, one))
    weights = whole.values.get("weights")
    return tuple(texts), tuple(suites), weights is not None and weights != weights_of(run)


def _suite(name: str, one: Place) -> SuiteMeasured:
    mixed = one.inside("scrambled") if one.values.get("scrambled") is not None else None
    return SuiteMeasured(
        name=name,
        metric=one.text("metric"),
        score=one.mark(),
        of=one.count("of"),
        chance=one.perhaps("chance"),
        side="above" if one.flag("above_chance") else "below" if one.flag("below_chance") else None,
        scrambled=mixed and mixed.mark(),
        order_matters=bool(mixed and mixed.flag("order_matters")),
        groups={group: place.mark() for group, place in one.tables("groups")},
        when=one.when(),
    )


def _findings(file: Path) -> tuple[FindingMeasured, ...]:
    if not file.is_file():
        return ()
    found = []
    for one in Place(file, read_json(file)).list("findings"):
        examples = one.list("examples") if one.values.get("examples") is not None else []
        for example in examples:
            for name in example.values:
                example.text(name)
        found.append(
            FindingMeasured(
                section=one.text("section"),
                name=one.text("name"),
                mark=one.mark("value"),
                unit=one.text("unit", ""),
                reference=one.perhaps("reference"),
                notable=one.flag("notable"),
                note=one.text("note", ""),
                examples=tuple(example.values for example in examples),
            )
        )
    return tuple(found)
