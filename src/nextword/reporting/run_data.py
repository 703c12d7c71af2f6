"""What reports and model cards are made of: a run folder as it is read, blocks of a page, and values as text.

Everything that came from a corpus or a model is escaped here, for a sample may hold anything.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import read_json, read_jsonl

if TYPE_CHECKING:
    from nextword.reporting.charts import Points  # what draws takes half a second to import


@dataclass(frozen=True)
class RunData:
    """What a run folder says; any part may be missing but `facts` (run.json).

    Attributes:
        name: the folder's own name.
        records: the lines of metrics.jsonl.
        result: result.json; empty while the run is not finished.
    """

    name: str
    metadata: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any]

    @classmethod
    def load(cls, run_dir: Path) -> "Run":
        """Raises `NextwordError` where this is no run folder, `CorruptFile` where a file of it is damaged."""
        if not (run_dir / "run.json").is_file():
            raise NextwordError(
                f"{run_dir}: not a run folder (it has no run.json). Name one that `nextword pretrain` wrote"
            )
        facts = read_json(run_dir / "run.json")
        result = read_json(run_dir / "result.json") if (run_dir / "result.json").exists() else {}
        for name, value in (("run.json", facts), ("result.json", result)):
            if not isinstance(value, dict):
                raise CorruptFileError(f"{run_dir / name}: not an object")
        records = read_jsonl(run_dir / "metrics.jsonl")
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                raise CorruptFileError(f"{run_dir / 'metrics.jsonl'} line {number}: not an object")
        return cls(run_dir.resolve().name, facts, records, result)

    def series(self, *keys: str) -> "Points":
        """(step, number) of every record that has a finite number there, as in series("validation", "loss")."""
        values = ((record.get("step"), get_nested(record, *keys)) for record in self.records)
        return [(float(step), float(value)) for step, value in values if is_number(step) and is_number(value)]

    @property
    def best_validation(self) -> tuple[float, float] | None:
        """Step and loss of the lowest validation loss."""
        return min(self.series("validation", "loss"), key=lambda point: point[1], default=None)

    @property
    def bits_per_byte(self) -> float | None:
        value = get_nested(self.result, "bits_per_byte")
        return (
            value if is_number(value) else min((y for _, y in self.series("validation", "bits_per_byte")), default=None)
        )

    @property
    def loss(self) -> float | None:
        value = get_nested(self.result, "loss")
        return value if is_number(value) else self.best_validation[1] if self.best_validation else None

    @property
    def task(self) -> str | None:
        """The task that the run learned from examples, or "continue"; None of pre-training."""
        task = get_nested(self.metadata, "task", "task")
        return task if isinstance(task, str) else None

    def last_value(self, key: str) -> float | None:
        """The last finite number of that name in the records."""
        return next((y for _, y in reversed(self.series(key))), None)


# ---------------------------------------------------------------- blocks of a page


def render_section(heading: str, content: str, visible: bool = True) -> str:
    """A part of the page under its heading; nothing where it is not `present`."""
    return f"<section><h2>{heading}</h2>{content}</section>" if visible else ""


def render_headline(numbers: Iterable[tuple[str, Any, Any]]) -> str:
    """The page's largest numbers: (label, value, note); those without a value are left out."""
    return "\n".join(
        f"<div><dt>{label}</dt><dd>{escape_html(value)}<small>{escape_html(note)}</small></dd></div>"
        for label, value, note in numbers
        if value
    )


def render_figure(content: str, alt_text: str, caption: str) -> str:
    """A picture under its caption, and in words for whoever does not see it."""
    described = f'<div role="img" aria-label="{escape_html(alt_text)}">{content}</div>'
    return f"<figure><figcaption>{caption}</figcaption>{described}</figure>"


def render_table(caption: str, rows: list[tuple[str, str]]) -> str:
    """Two columns: names and values."""
    body = "".join(
        f'<tr><th scope="row">{escape_html(name)}</th><td>{escape_html(value)}</td></tr>' for name, value in rows
    )
    return f"<table><caption>{caption}</caption><tbody>{body}</tbody></table>"


def code_block(text: str) -> str:
    """A block of code whose fence is longer than any run of backticks in it."""
    text, fence = sanitize_text(text), "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def escape_markdown(text: str) -> str:
    """Text as itself: nothing in it is HTML, a table's border, emphasis or a link."""
    plain = html.escape(" ".join(sanitize_text(text).split()), quote=False)
    return "".join(f"\\{character}" if character in "\\`*_[]|#~" else character for character in plain)


# ---------------------------------------------------------------- values as text


def escape_html(value: Any) -> str:
    """A value as text that is no HTML, in an attribute too."""
    return html.escape(sanitize_text(str(value)), quote=True)


def sanitize_text(text: str) -> str:
    """Text without what no file of text can hold: control characters and half characters become U+FFFD."""
    decoded = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in decoded)


def get_nested(value: Any, *keys: str) -> Any:
    """value[key][key]…, or None where that is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty table where it is none."""
    return value if isinstance(value, Mapping) else {}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it can be calculated with and drawn: an int or a float, far enough from what floats cannot hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 <= value <= 1e100


def flatten_values(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of a table, what is inside of what written as "train tokens"; what is None or not finite is left out."""
    rows = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flatten_values(value, f"{name} ")
        elif value is not None and (not isinstance(value, float) or math.isfinite(value)):
            rows.append((name, format_value(value)))
    return rows


def format_value(value: Any) -> str:
    """A value as a person reads it: digits grouped, five of a fraction."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:z,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def format_count(value: float) -> str:
    """1,234,567 as 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def format_duration(seconds: float) -> str:
    """259 as 4 min 19 s."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:z.1f} s"


def format_perplexity(loss: float) -> str:
    """exp(loss), for a loss in nats per token."""
    return f"{math.exp(loss):,.4g}" if loss < 14 else f"{math.exp(min(loss, 700)):.2e}"
