"""A run folder as one page that can be sent to somebody (`report.html`), and as a model card (`README.md`).

Only the run folder's files are read. The page is self-contained: no script, no outside address. Everything that came from a
corpus or a model is escaped, for a sample may hold anything.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from nextword.errors import CorruptFile, NextwordError
from nextword.evaluation.figures import Points, loss_curve, small_curve, smoothed
from nextword.evaluation.templates import CARD, PAGE, STYLE
from nextword.files import read_json, read_json_lines, write_durably

SHOWN_SAMPLES = 8  # steps whose samples are shown at once; the others can be unfolded


@dataclass(frozen=True)
class Run:
    """What a run folder says; any part may be missing but `facts` (run.json)."""

    name: str
    facts: dict[str, Any]
    records: list[dict[str, Any]]  # metrics.jsonl
    result: dict[str, Any]  # result.json; empty while the run is not finished

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises `NextwordError` where this is no run folder, `CorruptFile` where a file of it is damaged."""
        if not (folder / "run.json").is_file():
            raise NextwordError(
                f"{folder}: not a run folder (it has no run.json). Name one that `nextword pretrain` wrote"
            )
        facts = read_json(folder / "run.json")
        result = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
        for name, value in (("run.json", facts), ("result.json", result)):
            if not isinstance(value, dict):
                raise CorruptFile(f"{folder / name}: not an object")
        records = read_json_lines(folder / "metrics.jsonl")
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                raise CorruptFile(f"{folder / 'metrics.jsonl'} line {number}: not an object")
        return cls(folder.resolve().name, facts, records, result)

    def series(self, *keys: str) -> Points:
        """(step, number) of every record that has a finite number there, as in series("validation", "loss")."""
        values = ((record.get("step"), _at(record, *keys)) for record in self.records)
        return [(float(step), float(value)) for step, value in values if _is_number(step) and _is_number(value)]

    @property
    def best(self) -> tuple[float, float] | None:
        """Step and loss of the lowest validation loss."""
        return min(self.series("validation", "loss"), key=lambda point: point[1], default=None)

    @property
    def bits_per_byte(self) -> float | None:
        value = _at(self.result, "bits_per_byte")
        return (
            value
            if _is_number(value)
            else min((y for _, y in self.series("validation", "bits_per_byte")), default=None)
        )

    @property
    def loss(self) -> float | None:
        value = _at(self.result, "loss")
        return value if _is_number(value) else self.best[1] if self.best else None

    def last(self, key: str) -> float | None:
        return next((y for _, y in reversed(self.series(key))), None)


def write_report(run: Path) -> Path:
    """Write RUN/report.html from RUN/run.json, metrics.jsonl and result.json; its path.

    Raises:
        NextwordError: not a run folder.
        CorruptFile: a file of it is damaged.
    """
    data = Run.read(run)
    command = data.facts.get("command")
    page = PAGE.substitute(
        title=_text(data.name),
        subtitle=_subtitle(data),
        headline=_headline(data),
        figures=_figures(data),
        samples=_samples(data),
        tables=_tables(data),
        command=_section("The command", f"<pre><code>{_text(command)}</code></pre>", bool(command)),
        messages=_messages(data),
        style=STYLE,
    )
    write_durably(run / "report.html", page)
    return run / "report.html"


# ---------------------------------------------------------------- the parts of the page


def _subtitle(run: Run) -> str:
    steps = max((step for step, _ in run.series("loss")), default=0)
    state = "finished" if run.result else f"not finished: at step {steps:,.0f}" if steps else "not started"
    created = str(run.facts.get("created") or "")[:16].replace("T", " ")
    parts = (run.facts.get("preset"), run.facts.get("size"), state, created)
    return " · ".join(_text(part) for part in parts if part)


def _headline(run: Run) -> str:
    loss, seconds, tokens = run.loss, _at(run.result, "seconds"), run.last("tokens")
    seconds = seconds if _is_number(seconds) else run.last("seconds")
    parameters = run.facts.get("parameters")
    numbers = [
        ("validation loss", loss and f"{loss:.3f}", loss and f"nats per token · perplexity {_perplexity(loss)}"),
        ("bits per byte", run.bits_per_byte and f"{run.bits_per_byte:.3f}", "of the validation text"),
        ("parameters", _is_number(parameters) and _count(parameters), "numbers that were trained"),
        ("tokens seen", tokens and _count(tokens), "in training, repeats counted"),
        ("time", seconds and _duration(seconds), "from start to end"),
    ]
    return "\n".join(
        f"<div><dt>{label}</dt><dd>{_text(value)}<small>{_text(note)}</small></dd></div>"
        for label, value, note in numbers
        if value
    )


def _figures(run: Run) -> str:
    train, validation = run.series("loss"), run.series("validation", "loss")
    parts = []
    if train or validation:
        bits = dict(run.series("validation", "bits_per_byte"))
        ratio = next((bits[step] / loss for step, loss in validation if loss and bits.get(step)), None)
        wide, narrow = (loss_curve(train, validation, ratio, wide=wide) for wide in (True, False))
        picture = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        caption = (
            "Training loss at each step (faint) and smoothed, and the loss on text that was held out. Lower is better."
        )
        parts.append(_figure(picture, _loss_in_words(train, validation), caption) + _validation_table(run))
    small = []
    for keys, caption, zero in (
        (("lr",), "Learning rate", True),
        (("gradient_norm",), "Gradient norm, before it is clipped", True),
        (("tokens_per_second",), "Tokens per second", True),
    ):
        if points := run.series(*keys):
            low, high, end = min(y for _, y in points), max(y for _, y in points), points[-1][1]
            words = f"{caption}: between {low:.3g} and {high:.3g}, {end:.3g} at the end."
            small.append(_figure(small_curve(points, f"small-{keys[0]}", zero=zero), words, caption))
    by_position = run.result.get("by_position") or _at(run.facts, "evaluation", "by_position")
    if isinstance(by_position, list) and len(by_position) > 1 and all(map(_is_number, by_position)):
        points = [(float(position), loss) for position, loss in enumerate(by_position, start=1)]
        words = (
            f"Validation loss by position: {points[0][1]:.2f} at the first, {smoothed(points)[-1][1]:.2f} at the last."
        )
        picture = small_curve(points, "small-position", x_label="position in the window", log=True)
        small.append(_figure(picture, words, "Validation loss by position: how much the words before help"))
    grid = f'<div class="grid">{"".join(small)}</div>' if small else ""
    return _section("How it learned", "".join(parts) + grid, bool(parts or small))


def _figure(picture: str, words: str, caption: str) -> str:
    described = f'<div role="img" aria-label="{_text(words)}">{picture}</div>'
    return f"<figure><figcaption>{caption}</figcaption>{described}</figure>"


def _loss_in_words(train: Points, validation: Points) -> str:
    sentences = []
    if train:
        sentences.append(f"The training loss goes from {train[0][1]:.2f} to {smoothed(train)[-1][1]:.2f}.")
    if validation:
        step, loss = min(validation, key=lambda point: point[1])
        sentences.append(f"The lowest validation loss is {loss:.3f}, at step {step:,.0f}.")
    return " ".join(sentences)


def _validation_table(run: Run) -> str:
    validation, bits = run.series("validation", "loss"), dict(run.series("validation", "bits_per_byte"))
    if not validation:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{step:,.0f}</th><td>{loss:.4f}</td><td>{f"{bits[step]:.4f}" if step in bits else "–"}</td></tr>'
        for step, loss in validation
    )
    head = '<tr><th scope="col">step</th><th scope="col">validation loss</th><th scope="col">bits per byte</th></tr>'
    table = f'<table class="numbers"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    return f"<details><summary>The numbers of the validation curve</summary>{table}</details>"


def _samples(run: Run) -> str:
    by_step: dict[Any, list[dict[str, Any]]] = {}
    for record in run.records:
        if isinstance(record.get("sample"), dict):
            by_step.setdefault(record.get("step"), []).append(record["sample"])
    items = [
        f"<li><h3>{_text(_value(step))}</h3><div>{_quotes(samples)}</div></li>" for step, samples in by_step.items()
    ]
    spread = {round(i * (len(items) - 1) / (SHOWN_SAMPLES - 1)) for i in range(SHOWN_SAMPLES)}
    shown = [item for i, item in enumerate(items) if i in spread]
    others = [item for i, item in enumerate(items) if i not in spread]
    more = f"<details><summary>{len(others)} more</summary><ol>{''.join(others)}</ol></details>" if others else ""
    intro = "<p>How the model went on as it learned. The number is the step; the prompt is set in bold.</p>"
    return _section("What it wrote", f'{intro}<ol class="samples">{"".join(shown)}</ol>{more}', bool(items))


def _quotes(samples: Iterable[Mapping[str, Any]]) -> str:
    return "".join(
        f'<blockquote dir="auto"><b>{_text(sample.get("prompt") or "")}</b>{_text(sample.get("text") or "")}</blockquote>'
        for sample in samples
    )


def _tables(run: Run) -> str:
    facts = run.facts
    about = {key: facts[key] for key in ("preset", "size", "parameters") if key in facts}
    outcome = {key: value for key, value in run.result.items() if key not in ("by_position", "seconds")}
    if _is_number(seconds := run.result.get("seconds")):
        outcome["time"] = _duration(seconds)
    if not outcome and run.best:
        outcome = {"best validation loss": run.best[1], "best step": run.best[0]}
    tables = {
        "Outcome": outcome,
        "Model": {**about, **_mapping(facts.get("model"))},
        "Data": _mapping(facts.get("data")),
        "Training": _mapping(facts.get("training")),
        "Machine": _mapping(facts.get("machine")),
        "Versions": _mapping(facts.get("versions")),
    }
    parts = [_table(caption, _rows(values)) for caption, values in tables.items() if values]
    return _section("The facts", f'<div class="tables">{"".join(parts)}</div>', bool(parts))


def _table(caption: str, rows: list[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in rows)
    return f"<table><caption>{caption}</caption><tbody>{body}</tbody></table>"


def _messages(run: Run) -> str:
    lines = [(record.get("step"), record["message"]) for record in run.records if "message" in record]
    items = "".join(f"<li><b>{_text(_value(step))}</b> {_text(message)}</li>" for step, message in lines)
    return _section("What was said on the way", f'<ul class="messages">{items}</ul>', bool(lines))


def _section(heading: str, content: str, present: bool = True) -> str:
    return f"<section><h2>{heading}</h2>{content}</section>" if present else ""


# ---------------------------------------------------------------- the model card


def write_card(run: Path) -> Path:
    """Write RUN/README.md, a Hugging Face model card that says what was measured and nothing else; its path.

    Raises as `write_report` does.
    """
    data = Run.read(run)
    facts, loss = data.facts, data.loss
    measured = [
        ("parameters", facts.get("parameters")),
        ("context length", _at(facts, "model", "context_length")),
        ("vocabulary", _at(facts, "model", "vocab_size")),
        ("tokens seen in training", data.last("tokens")),
        ("training text", _data_in_words(facts, "train")),
        ("validation text", _data_in_words(facts, "validation")),
        ("validation loss, nats per token", loss and round(loss, 4)),
        ("perplexity", loss and _perplexity(loss)),
        ("bits per byte", data.bits_per_byte and round(data.bits_per_byte, 4)),
        ("training time", _is_number(_at(data.result, "seconds")) and _duration(data.result["seconds"])),
    ]
    rows = "\n".join(f"| {name} | {_markdown(_value(value))} |" for name, value in measured if value)
    kind = " ".join(str(facts[key]) for key in ("preset", "size") if facts.get(key))
    samples = [record["sample"] for record in data.records if isinstance(record.get("sample"), dict)]
    sample = f"{samples[-1].get('prompt') or ''}{samples[-1].get('text') or ''}" if samples else ""
    card = CARD.substitute(
        name=_markdown(data.name),
        kind=_markdown(f"a {kind} model" if kind else "a model"),
        state="" if data.result else "\nThe training has not finished; these are the figures so far.\n",
        rows=rows,
        sample=f"\n## What it writes\n\n{_fenced(sample)}\n" if sample else "",
        command=f"\n## How it was made\n\n{_fenced(str(facts['command']))}\n" if "command" in facts else "",
    )
    write_durably(run / "README.md", card)
    return run / "README.md"


def _data_in_words(facts: Mapping[str, Any], part: str) -> str | None:
    counts = _mapping(_at(facts, "data", part))
    names = [name for name in ("documents", "tokens", "bytes") if _is_number(counts.get(name))]
    return ", ".join(f"{counts[name]:,} {name}" for name in names) or None


def _fenced(text: str) -> str:
    """A block of code whose fence is longer than any run of backticks in it."""
    text, fence = _printable(text), "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _markdown(text: str) -> str:
    """Text as itself: nothing in it is HTML, a table's border, emphasis or a link."""
    escaped = html.escape(" ".join(_printable(text).split()), quote=False)
    return "".join(f"\\{character}" if character in "\\`*_[]|#~" else character for character in escaped)


# ---------------------------------------------------------------- values as text


def _text(value: Any) -> str:
    return html.escape(_printable(str(value)), quote=True)


def _printable(text: str) -> str:
    """Text without what no file of text can hold: control characters and half characters become U+FFFD."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in whole)


def _at(value: Any, *keys: str) -> Any:
    """value[key][key]…, or None where that is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of a table, what is inside of what written as "train tokens"; None is left out."""
    rows = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _rows(value, f"{name} ")
        elif value is not None:
            rows.append((name, _value(value)))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(value: float) -> str:
    """1,234,567 as 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.1f} s"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.4g}" if loss < 14 else f"{math.exp(min(loss, 700)):.2e}"
