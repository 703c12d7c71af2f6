"""Several runs side by side on one page: what they reached, how they learned, what differs between them, what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.common.errors import UsageError
from nextword.common.fs import write_durably
from nextword.common.results import FindingMeasured, Mark, Measurements
from nextword.reporting.charts import Points, compared_curves, smoothed
from nextword.reporting.results_sections import MARK, as_number, by_section, cell, section_name
from nextword.reporting.run_data import (
    Run,
    at,
    duration,
    escaped,
    figure,
    is_number,
    mapping,
    named_values,
    perplexity,
    section,
    short_count,
)
from nextword.reporting.task_results import METRICS, Outcome, base_name
from nextword.reporting.templates import COMPARISON_STYLE, FOOTERS, MEASURED_STYLE, PAGE, STYLE, TASK_STYLE

MOST = 6  # runs that can be told apart by colour, and that a table has room for
COMPARED = (
    "preset",
    "size",
    "parameters",
    "task",
    "model",
    "training",
    "tuning",
    "data",
    "fixed",
    "machine",
    "versions",
)
AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds"}


@dataclass(frozen=True)
class Compared:
    """A run in a comparison, by the name that tells it apart."""

    name: str
    run: Run
    found: Measurements


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that sets runs side by side; its path.

    Raises:
        UsageError: more runs than can be told apart, the same one twice, or one of `nextword transfer`.
        NextwordError: not a run folder.
        CorruptFile: a file of one is damaged.
    """
    if len(folders) > MOST:
        raise UsageError(f"{len(folders)} runs are too many for one page: name {MOST} at most")
    names = apart([folder.resolve() for folder in folders])
    runs = [
        Compared(name, Run.read(folder), Measurements.read(folder)) for name, folder in zip(names, folders, strict=True)
    ]
    for one, folder in zip(runs, folders, strict=True):
        if one.run.facts.get("task") == "transfer":
            raise UsageError(
                f"{folder}: a comparison itself, of nextword transfer; its own page is {folder / 'report.html'}"
            )
    parts = [
        _outcomes(runs), _curves(runs), _recipes(runs), _texts(runs), _suites(runs), _findings(runs), _samples(runs),
    ]  # fmt: skip
    page = PAGE.substitute(
        title=escaped(" · ".join(names)), kind="runs compared", heading=f"{len(runs)} runs, side by side",
        subtitle=_legend(runs), headline="", parts="\n".join(parts), footer=FOOTERS,
        style=STYLE + TASK_STYLE + MEASURED_STYLE + COMPARISON_STYLE,
    )  # fmt: skip
    write_durably(out, page)
    return out


def apart(folders: Sequence[Path]) -> list[str]:
    """The shortest names that tell folders apart: their last parts, as many as that takes."""
    if len(set(folders)) < len(folders):
        raise UsageError("the same run is named twice")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


# ---------------------------------------------------------------- tables with a column a run


def _table(caption: str, runs: Sequence[Compared], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of (what, in HTML; a cell for each run, whole)."""
    head = "".join(f'<th scope="col">{_dot(i)}{escaped(one.name)}</th>' for i, one in enumerate(runs))
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in rows)
    table = (
        f'<table class="scores several of{len(runs)}"><caption>{escaped(caption)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    return f'<div class="sideways" tabindex="0" role="group" aria-label="{escaped(caption)}">{table}</div>'


def _dot(number: int) -> str:
    return f'<span class="dot s{number + 1}"></span>'


def _legend(runs: Sequence[Compared]) -> str:
    return " ".join(f'<span class="name">{_dot(i)}{escaped(one.name)}</span>' for i, one in enumerate(runs))


def _cells(values: Sequence[Any], form: Callable[[Any], str]) -> list[str]:
    return [f"<td>{escaped(form(value)) if is_number(value) else '–'}</td>" for value in values]


def _outcomes(runs: Sequence[Compared]) -> str:
    """What each run has reached; the metrics of their tasks with intervals."""
    outcomes = [Outcome.of(one.run) for one in runs]
    rows: list[tuple[str, Sequence[str]]] = []
    for metric in dict.fromkeys(name for outcome in outcomes for name in outcome.names):
        marks = [mapping(outcome.by_who.get("this model")).get(metric) for outcome in outcomes]
        shown = [None if one is None else Mark(one.value, one.low, one.high) for one in marks]
        rows.append((METRICS[metric].name, [cell(one) for one in shown]))
    text = [one.run.loss if one.run.task in (None, "continue", "chat", "rewrite") else None for one in runs]
    figures: list[tuple[str, list[Any], Callable[[Any], str]]] = [
        ("validation loss", [one.run.loss for one in runs], lambda x: f"{x:.3f}"),
        ("perplexity", text, perplexity),
        ("parameters", [one.run.facts.get("parameters") for one in runs], short_count),
        ("tokens seen", [one.run.last("tokens") for one in runs], short_count),
        ("steps", [one.run.result.get("steps") or one.run.last("step") for one in runs], lambda x: f"{x:,.0f}"),
        ("time", [one.run.result.get("seconds") or one.run.last("seconds") for one in runs], duration),
        ("energy, Wh", [at(one.run.result, "energy", "watt_hours") for one in runs], lambda x: f"{x:.3g}"),
    ]
    rows += [(name, _cells(values, form)) for name, values, form in figures if any(map(is_number, values))]
    prints = {at(one.run.facts, "data", "fingerprint") for one in runs}
    said = "" if len(prints) == 1 else "<p>They learned from different texts, so their held-out texts differ too.</p>"
    return section("What they reached", said + _table("Outcome", runs, rows), bool(rows))


# ---------------------------------------------------------------- curves


def _curves(runs: Sequence[Compared]) -> str:
    """The held-out text's bits per byte (or the loss) of all runs in one figure, against steps, tokens or seconds."""
    what = next(
        (name for name in ("bits_per_byte", "loss") if all(one.run.series("validation", name) for one in runs)), None
    )
    found = [one.run.series("validation", what) if what else smoothed(one.run.series("loss")) for one in runs]
    if not any(found):
        return ""
    label = {"bits_per_byte": "bits per byte", "loss": "held-out loss"}.get(str(what), "training loss")
    pictures, controls = [], []
    for number, (axis, axis_name) in enumerate(AXES.items()):
        lines = [(one.name, against(one.run, points, axis)) for one, points in zip(runs, found, strict=True)]
        if not any(points for _, points in lines):
            continue
        wide, narrow = (compared_curves(lines, axis_name, label, f"by-{axis}", wide=wide) for wide in (True, False))
        checked = "" if number else " checked"
        controls.append(
            f'<input type="radio" name="axis" id="axis-{axis}"{checked}><label for="axis-{axis}">by {axis_name}</label>'
        )
        ends = "; ".join(f"{name} ends at {points[-1][1]:.3f}" for name, points in lines if points)
        picture = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        caption = f"{label[0].upper()}{label[1:]} by {axis_name}. Lower is better."
        pictures.append(f'<div class="by by-{axis}">{figure(picture, f"{caption} {ends}.", caption)}</div>')
    choice = f'<legend class="unseen">Against what</legend>{"".join(controls)}{"".join(pictures)}'
    return section("How they learned", f'<fieldset class="axes">{choice}</fieldset>')


def against(run: Run, points: Points, axis: str) -> list[tuple[float, float]]:
    """(step, y) as (what `axis` was at that step, y); points for which that is not known are left out."""
    if axis == "step":
        return list(points)
    known = dict(run.series(axis))
    return [(known[step], y) for step, y in points if step in known]


# ---------------------------------------------------------------- recipes


def flat(run: Run) -> dict[str, str]:
    """Everything that was decided of a run, a name a value; what only tells where its files lay is left out."""
    facts = run.facts
    data = {key: value for key, value in mapping(facts.get("data")).items() if key != "fingerprint"}
    chosen: dict[str, Any] = {name: facts.get(name) for name in COMPARED} | {"data": data}
    chosen["fingerprint of the text"] = str(at(facts, "data", "fingerprint") or "")[:12] or None
    chosen["began with"] = base_name(run)
    chosen |= {name: at(facts, "recipe", name) for name in ("budget", "steps", "tokens", "lora", "scratch")}
    chosen["seed"] = facts.get("seed")
    return dict(named_values(chosen))


def _recipes(runs: Sequence[Compared]) -> str:
    """What differs between the runs' settings, a row each."""
    settings = [flat(one.run) for one in runs]
    names = list(dict.fromkeys(name for one in settings for name in one))
    differing = [name for name in names if len({one.get(name) for one in settings}) > 1]
    same = f"<p>The other {len(names) - len(differing):,} settings and facts are the same.</p>"
    if not differing:
        return section(
            "What differs", f"<p>Nothing: all {len(names):,} settings and facts are the same.</p>", bool(names)
        )
    rows = [(escaped(name), [f"<td>{escaped(one.get(name, '–'))}</td>" for one in settings]) for name in differing]
    return section("What differs", _table("Settings and facts that differ", runs, rows) + same)


# ---------------------------------------------------------------- what was measured


def _texts(runs: Sequence[Compared]) -> str:
    by_run = [{one.name: one.bits_per_byte for one in run.found.texts} for run in runs]
    names = dict.fromkeys(name for found in by_run for name in found)
    rows = [(escaped(name), [cell(found.get(name)) for found in by_run]) for name in names]
    return section("Texts", _table("Bits per byte, with 95 % intervals", runs, rows), bool(rows))


def _suites(runs: Sequence[Compared]) -> str:
    """A row a suite and metric; a score that rests on another number of items than the others' says so."""
    by_run = [{(one.name, one.metric): one for one in run.found.suites} for run in runs]
    rows: list[tuple[str, Sequence[str]]] = []
    for name, metric in dict.fromkeys(key for found in by_run for key in found):
        suites = [found.get((name, metric)) for found in by_run]
        counts = {one.score.n for one in suites if one is not None}
        chance = next((one.chance for one in suites if one is not None and one.chance is not None), None)
        told = [metric, *([f"chance {as_number(chance)}"] if chance is not None else [])]
        if len(counts) > 1:
            told.append("items: " + ", ".join("–" if one is None else f"{one.score.n}" for one in suites))
        label = f"{escaped(name)}<small>{escaped(' · '.join(told))}</small>"
        rows.append((label, [cell(None if one is None else one.score) for one in suites]))
    test = "<code>nextword evaluate RUN --against OTHER</code>"
    note = f"<p>Intervals that overlap do not yet say that two runs are equal: {test} puts it to the test.</p>"
    return section("Suites", _table("Scores, with 95 % intervals", runs, rows) + note, bool(rows))


def _findings(runs: Sequence[Compared]) -> str:
    by_run = [{(one.section, one.name): one for one in run.found.findings} for run in runs]
    parts = []
    for name in by_section([one for run in runs for one in run.found.findings]):
        keys = dict.fromkeys(key for found in by_run for key in found if key[0] == name)
        rows = []
        for key in keys:
            ones = [found.get(key) for found in by_run]
            known = next(one for one in ones if one is not None)
            reference = (
                None if known.reference is None else f"{as_number(known.reference, known.unit)} where nothing is amiss"
            )
            under = "" if reference is None else f"<small>{reference}</small>"
            rows.append((f"{escaped(key[1])}{under}", [_finding(one) for one in ones]))
        parts.append(_table(section_name(name), runs, rows))
    marked = "<p>What is marked <span class='mark'>▲</span> is to be read before that model is used.</p>"
    return section("Audits", marked + "".join(parts), bool(parts))


def _finding(one: FindingMeasured | None) -> str:
    shown = cell(None) if one is None else cell(one.mark, one.unit)
    return shown.replace("<td>", f"<td>{MARK}", 1) if one is not None and one.notable else shown


def _samples(runs: Sequence[Compared]) -> str:
    """The last sample of each run to each prompt, beside each other."""
    last: list[Mapping[str, str]] = []
    for one in runs:
        samples = [record["sample"] for record in one.run.records if isinstance(record.get("sample"), dict)]
        last.append({str(sample.get("prompt") or ""): str(sample.get("text") or "") for sample in samples})
    prompts = list(dict.fromkeys(prompt for found in last for prompt in found))
    blocks = []
    for prompt in prompts:
        cells = "".join(
            f'<div><h4>{_dot(i)}{escaped(one.name)}</h4><blockquote dir="auto"><b>{escaped(prompt)}</b>{escaped(found[prompt])}'
            "</blockquote></div>"
            for i, (one, found) in enumerate(zip(runs, last, strict=True))
            if prompt in found
        )
        title = escaped(" ".join(prompt.split())[:80]) or "From nothing"
        blocks.append(f'<h3>{title}</h3><div class="beside">{cells}</div>')
    intro = "<p>What each wrote last, at the end of its training.</p>"
    return section("What they write", intro + "".join(blocks), bool(blocks))
