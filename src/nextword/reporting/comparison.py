"""Several runs side by side on one page: what they reached, how they learned, what differs between them, what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.common.errors import UsageError
from nextword.common.fs import atomic_write
from nextword.common.results import AuditFinding, ScoreWithCI, StoredResults
from nextword.reporting.charts import Points, moving_average, plot_run_comparison
from nextword.reporting.results_sections import (
    format_number,
    group_by_section,
    number_cell,
    section_title,
)
from nextword.reporting.run_data import (
    RunData,
    as_mapping,
    escape_html,
    flatten_values,
    format_count,
    format_duration,
    format_perplexity,
    get_nested,
    is_number,
    render_figure,
    render_section,
)
from nextword.reporting.task_results import METRICS, TaskResults, base_model_name
from nextword.reporting.templates import (
    BASE_CSS,
    COMPARISON_CSS,
    COMPARISON_FOOTER,
    PAGE_TEMPLATE,
    RESULTS_CSS,
    TASK_CSS,
)

MAX_RUNS = 6  # runs that can be told apart by colour, and that a table has room for
COMPARED_METADATA_KEYS = (
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
X_AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds"}


@dataclass(frozen=True)
class ComparedRun:
    """A run in a comparison, by the name that tells it apart."""

    name: str
    data: RunData
    results: StoredResults


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write a page that sets runs side by side; its path.

    Raises:
        UsageError: more runs than can be told apart, the same one twice, or one of `nextword transfer`.
        NextwordError: not a run folder.
        CorruptFile: a file of one is damaged.
    """
    if len(run_dirs) > MAX_RUNS:
        raise UsageError(f"{len(run_dirs)} runs are too many for one page: name {MAX_RUNS} at most")
    names = shortest_names([folder.resolve() for folder in run_dirs])
    runs = [
        ComparedRun(name, RunData.load(folder), StoredResults.load(folder))
        for name, folder in zip(names, run_dirs, strict=True)
    ]
    for one, folder in zip(runs, run_dirs, strict=True):
        if one.data.metadata.get("task") == "transfer":
            raise UsageError(
                f"{folder}: a comparison itself, of nextword transfer; its own page is {folder / 'report.html'}"
            )
    sections = [
        _outcomes_section(runs), _curves_section(runs), _settings_section(runs), _texts_section(runs), _benchmarks_section(runs), _audit_section(runs), _samples_section(runs),
    ]  # fmt: skip
    page = PAGE_TEMPLATE.substitute(
        title=escape_html(" · ".join(names)), kind="runs compared", heading=f"{len(runs)} runs, side by side",
        subtitle=_legend(runs), headline="", parts="\n".join(sections), footer=COMPARISON_FOOTER,
        style=BASE_CSS + TASK_CSS + RESULTS_CSS + COMPARISON_CSS,
    )  # fmt: skip
    atomic_write(out, page)
    return out


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell folders apart: their last parts, as many as that takes."""
    if len(set(paths)) < len(paths):
        raise UsageError("the same run is named twice")
    for depth in range(1, max(len(folder.parts) for folder in paths) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in paths]


# ---------------------------------------------------------------- tables with a column a run


def _comparison_table(caption: str, runs: Sequence[ComparedRun], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of (what, in HTML; a cell for each run, whole)."""
    header_cells = "".join(f'<th scope="col">{_color_dot(i)}{escape_html(one.name)}</th>' for i, one in enumerate(runs))
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in rows)
    table_html = (
        f'<table class="scores several of{len(runs)}"><caption>{escape_html(caption)}</caption>'
        f"<thead><tr><td></td>{header_cells}</tr></thead><tbody>{body}</tbody></table>"
    )
    return f'<div class="sideways" tabindex="0" role="group" aria-label="{escape_html(caption)}">{table_html}</div>'


def _color_dot(index: int) -> str:
    return f'<span class="dot s{index + 1}"></span>'


def _legend(runs: Sequence[ComparedRun]) -> str:
    return " ".join(f'<span class="name">{_color_dot(i)}{escape_html(one.name)}</span>' for i, one in enumerate(runs))


def _number_cells(values: Sequence[Any], formatter: Callable[[Any], str]) -> list[str]:
    return [f"<td>{escape_html(formatter(value)) if is_number(value) else '–'}</td>" for value in values]


def _outcomes_section(runs: Sequence[ComparedRun]) -> str:
    """What each run has reached; the metrics of their tasks with intervals."""
    task_results = [TaskResults.from_run(one.data) for one in runs]
    rows: list[tuple[str, Sequence[str]]] = []
    for metric in dict.fromkeys(name for outcome in task_results for name in outcome.metric_names):
        scores = [as_mapping(outcome.by_system.get("this model")).get(metric) for outcome in task_results]
        shown = [None if one is None else ScoreWithCI(one.value, one.low, one.high) for one in scores]
        rows.append((METRICS[metric].name, [number_cell(one) for one in shown]))
    lm_losses = [one.data.loss if one.data.task in (None, "continue", "chat", "rewrite") else None for one in runs]
    numeric_rows: list[tuple[str, list[Any], Callable[[Any], str]]] = [
        ("validation loss", [one.data.loss for one in runs], lambda x: f"{x:.3f}"),
        ("perplexity", lm_losses, format_perplexity),
        ("parameters", [one.data.metadata.get("parameters") for one in runs], format_count),
        ("tokens seen", [one.data.last_value("tokens") for one in runs], format_count),
        ("steps", [one.data.result.get("steps") or one.data.last_value("step") for one in runs], lambda x: f"{x:,.0f}"),
        ("time", [one.data.result.get("seconds") or one.data.last_value("seconds") for one in runs], format_duration),
        ("energy, Wh", [get_nested(one.data.result, "energy", "watt_hours") for one in runs], lambda x: f"{x:.3g}"),
    ]
    rows += [(name, _number_cells(values, form)) for name, values, form in numeric_rows if any(map(is_number, values))]
    fingerprints = {get_nested(one.data.metadata, "data", "fingerprint") for one in runs}
    note = (
        ""
        if len(fingerprints) == 1
        else "<p>They learned from different texts, so their held-out texts differ too.</p>"
    )
    return render_section("What they reached", note + _comparison_table("Outcome", runs, rows), bool(rows))


# ---------------------------------------------------------------- curves


def _curves_section(runs: Sequence[ComparedRun]) -> str:
    """The held-out text's bits per byte (or the loss) of all runs in one figure, against steps, tokens or seconds."""
    metric = next(
        (name for name in ("bits_per_byte", "loss") if all(one.data.series("validation", name) for one in runs)), None
    )
    curves = [
        one.data.series("validation", metric) if metric else moving_average(one.data.series("loss")) for one in runs
    ]
    if not any(curves):
        return ""
    label = {"bits_per_byte": "bits per byte", "loss": "held-out loss"}.get(str(metric), "training loss")
    figures, controls = [], []
    for number, (axis, axis_name) in enumerate(X_AXES.items()):
        lines = [(one.name, curve_over_axis(one.data, points, axis)) for one, points in zip(runs, curves, strict=True)]
        if not any(points for _, points in lines):
            continue
        wide, narrow = (plot_run_comparison(lines, axis_name, label, f"by-{axis}", wide=wide) for wide in (True, False))
        checked = "" if number else " checked"
        controls.append(
            f'<input type="radio" name="axis" id="axis-{axis}"{checked}><label for="axis-{axis}">by {axis_name}</label>'
        )
        end_values = "; ".join(f"{name} ends at {points[-1][1]:.3f}" for name, points in lines if points)
        picture = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        caption = f"{label[0].upper()}{label[1:]} by {axis_name}. Lower is better."
        figures.append(f'<div class="by by-{axis}">{render_figure(picture, f"{caption} {ends}.", caption)}</div>')
    choice = f'<legend class="unseen">Against what</legend>{"".join(controls)}{"".join(figures)}'
    return render_section("How they learned", f'<fieldset class="axes">{choice}</fieldset>')


def curve_over_axis(run: RunData, points: Points, axis: str) -> list[tuple[float, float]]:
    """(step, y) as (what `axis` was at that step, y); points for which that is not known are left out."""
    if axis == "step":
        return list(points)
    axis_by_step = dict(run.series(axis))
    return [(axis_by_step[step], y) for step, y in points if step in axis_by_step]


# ---------------------------------------------------------------- recipes


def flatten_settings(run: RunData) -> dict[str, str]:
    """Everything that was decided of a run, a name a value; what only tells where its files lay is left out."""
    metadata = run.metadata
    data = {key: value for key, value in as_mapping(metadata.get("data")).items() if key != "fingerprint"}
    settings: dict[str, Any] = {name: metadata.get(name) for name in COMPARED_METADATA_KEYS} | {"data": data}
    settings["fingerprint of the text"] = str(get_nested(metadata, "data", "fingerprint") or "")[:12] or None
    settings["began with"] = base_model_name(run)
    settings |= {
        name: get_nested(metadata, "recipe", name) for name in ("budget", "steps", "tokens", "lora", "scratch")
    }
    settings["seed"] = metadata.get("seed")
    return dict(flatten_values(settings))


def _settings_section(runs: Sequence[ComparedRun]) -> str:
    """What differs between the runs' settings, a row each."""
    settings = [flatten_settings(one.data) for one in runs]
    names = list(dict.fromkeys(name for one in settings for name in one))
    differing = [name for name in names if len({one.get(name) for one in settings}) > 1]
    same = f"<p>The other {len(names) - len(differing):,} settings and facts are the same.</p>"
    if not differing:
        return render_section(
            "What differs", f"<p>Nothing: all {len(names):,} settings and facts are the same.</p>", bool(names)
        )
    rows = [
        (escape_html(name), [f"<td>{escape_html(one.get(name, '–'))}</td>" for one in settings]) for name in differing
    ]
    return render_section("What differs", _comparison_table("Settings and facts that differ", runs, rows) + same)


# ---------------------------------------------------------------- what was measured


def _texts_section(runs: Sequence[ComparedRun]) -> str:
    by_run = [{one.name: one.bits_per_byte for one in run.results.texts} for run in runs]
    names = dict.fromkeys(name for found in by_run for name in found)
    rows = [(escape_html(name), [number_cell(found.get(name)) for found in by_run]) for name in names]
    return render_section("Texts", _comparison_table("Bits per byte, with 95 % intervals", runs, rows), bool(rows))


def _benchmarks_section(runs: Sequence[ComparedRun]) -> str:
    """A row a suite and metric; a score that rests on another number of items than the others' says so."""
    by_run = [{(one.name, one.metric): one for one in run.results.benchmarks} for run in runs]
    rows: list[tuple[str, Sequence[str]]] = []
    for name, metric in dict.fromkeys(key for found in by_run for key in found):
        benchmarks = [found.get((name, metric)) for found in by_run]
        counts = {one.score.n for one in benchmarks if one is not None}
        chance = next((one.chance for one in benchmarks if one is not None and one.chance is not None), None)
        details = [metric, *([f"chance {format_number(chance)}"] if chance is not None else [])]
        if len(counts) > 1:
            details.append("items: " + ", ".join("–" if one is None else f"{one.score.n}" for one in benchmarks))
        label = f"{escape_html(name)}<small>{escape_html(' · '.join(details))}</small>"
        rows.append((label, [number_cell(None if one is None else one.score) for one in benchmarks]))
    test = "<code>nextword evaluate RUN --against OTHER</code>"
    note = f"<p>Intervals that overlap do not yet say that two runs are equal: {test} puts it to the test.</p>"
    return render_section("Suites", _comparison_table("Scores, with 95 % intervals", runs, rows) + note, bool(rows))


def _audit_section(runs: Sequence[ComparedRun]) -> str:
    by_run = [{(one.section, one.name): one for one in run.results.findings} for run in runs]
    tables = []
    for name in group_by_section([one for run in runs for one in run.results.findings]):
        keys = dict.fromkeys(key for found in by_run for key in found if key[0] == name)
        rows = []
        for key in keys:
            findings = [found.get(key) for found in by_run]
            first_finding = next(one for one in findings if one is not None)
            reference = (
                None
                if first_finding.reference is None
                else f"{format_number(first_finding.reference, first_finding.unit)} where nothing is amiss"
            )
            reference_html = "" if reference is None else f"<small>{reference}</small>"
            rows.append((f"{escape_html(key[1])}{reference_html}", [_finding_cell(one) for one in findings]))
        tables.append(_comparison_table(section_title(name), runs, rows))
    flagged_note = "<p>What is marked <span class='mark'>▲</span> is to be read before that model is used.</p>"
    return render_section("Audits", flagged_note + "".join(tables), bool(tables))


def _finding_cell(finding: AuditFinding | None) -> str:
    cell_html = number_cell(None) if finding is None else number_cell(finding.score, finding.unit)
    return cell_html.replace("<td>", f"<td>{MARK}", 1) if finding is not None and finding.flagged else cell_html


def _samples_section(runs: Sequence[ComparedRun]) -> str:
    """The last sample of each run to each prompt, beside each other."""
    last_samples: list[Mapping[str, str]] = []
    for one in runs:
        samples = [record["sample"] for record in one.data.records if isinstance(record.get("sample"), dict)]
        last_samples.append({str(sample.get("prompt") or ""): str(sample.get("text") or "") for sample in samples})
    prompts = list(dict.fromkeys(prompt for found in last_samples for prompt in found))
    blocks = []
    for prompt in prompts:
        cells = "".join(
            f'<div><h4>{_color_dot(i)}{escape_html(one.name)}</h4><blockquote dir="auto"><b>{escape_html(prompt)}</b>{escape_html(found[prompt])}'
            "</blockquote></div>"
            for i, (one, found) in enumerate(zip(runs, last_samples, strict=True))
            if prompt in found
        )
        title = escape_html(" ".join(prompt.split())[:80]) or "From nothing"
        blocks.append(f'<h3>{title}</h3><div class="beside">{cells}</div>')
    intro = "<p>What each wrote last, at the end of its training.</p>"
    return render_section("What they write", intro + "".join(blocks), bool(blocks))
