"""Several runs on one page: their results, training curves, settings, evaluations, audits and samples side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from nextword.common.errors import UsageError
from nextword.common.format import format_count, format_duration
from nextword.common.fs import atomic_write
from nextword.common.results import StoredResults
from nextword.common.statistics import ScoreWithCI
from nextword.reporting import formatting as fmt
from nextword.reporting.charts import Chart, Points, moving_average, plot_run_comparison, responsive_chart
from nextword.reporting.rendering import render_html
from nextword.reporting.run_data import LM_LOSS_TASKS, RunData, as_mapping, get_nested, is_number
from nextword.reporting.task_results import METRICS, THIS_MODEL, TaskResults

MAX_RUNS = 6  # as many as there are colours
SETTINGS = (
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
    """A run of a comparison, with the name that distinguishes it from the others."""

    name: str
    data: RunData
    results: StoredResults


@dataclass(frozen=True)
class Row:
    """A row of a table with a column for each run.

    Attributes:
        cells: A score, a text, or None where a run has no value.
        note: Small print under the label.
        flagged: The columns that are flagged.
    """

    label: str
    cells: Sequence[ScoreWithCI | str | None]
    note: str = ""
    unit: str | None = None
    flagged: tuple[int, ...] = ()


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write a page that compares runs.

    Returns:
        The path of the page.

    Raises:
        UsageError: More than `MAX_RUNS` runs, the same run twice, or a run of `nextword transfer`.
        NextwordError: Not a run directory.
        CorruptFileError: A file of a run is damaged.
    """
    if len(run_dirs) > MAX_RUNS:
        raise UsageError(f"cannot compare {len(run_dirs)} runs on one page: pass at most {MAX_RUNS}")
    names = shortest_names([run_dir.resolve() for run_dir in run_dirs])
    runs = [
        ComparedRun(name, RunData.load(run_dir), StoredResults.load(run_dir))
        for name, run_dir in zip(names, run_dirs, strict=True)
    ]
    for run, run_dir in zip(runs, run_dirs, strict=True):
        if run.data.metadata.get("task") == "transfer":
            raise UsageError(
                f"{run_dir}: a label-efficiency study cannot be compared with other runs; see {run_dir / 'report.html'}"
            )
    settings = [_flatten_settings(run.data) for run in runs]
    setting_names = list(dict.fromkeys(name for values in settings for name in values))
    different = [name for name in setting_names if len({values.get(name) for values in settings}) > 1]
    page = render_html(
        "comparison.html",
        title=" · ".join(names),
        names=names,
        outcomes=_outcome_rows(runs),
        different_data=len({run.data.get("data", "fingerprint") for run in runs}) > 1,
        charts=_charts(runs),
        settings=[Row(name, [values.get(name) for values in settings]) for name in different],
        equal_settings=len(setting_names) - len(different),
        texts=_text_rows(runs),
        benchmarks=_benchmark_rows(runs),
        audits=_audit_rows(runs),
        samples=_last_samples(runs),
    )
    atomic_write(out, page)
    return out


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """The shortest suffixes of some paths that distinguish them."""
    if len(set(paths)) < len(paths):
        raise UsageError("the same run was passed twice")
    suffixes = (["/".join(path.parts[-depth:]) for path in paths] for depth in count(1))
    return next(names for names in suffixes if len(set(names)) == len(paths))


def _outcome_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    task_results = [TaskResults.from_run(run.data) for run in runs]
    metrics = dict.fromkeys(name for results in task_results for name in results.metric_names)
    rows = [
        Row(METRICS[name].name, [results.by_system.get(THIS_MODEL, {}).get(name) for results in task_results])
        for name in metrics
    ]
    lm_losses = [run.data.loss if run.data.task in LM_LOSS_TASKS else None for run in runs]
    numeric_rows: list[tuple[str, list[Any], Callable[[float], str]]] = [
        ("validation loss", [run.data.loss for run in runs], fmt.number),
        ("perplexity", lm_losses, fmt.perplexity),
        ("parameters", [run.data.metadata.get("parameters") for run in runs], format_count),
        ("training tokens", [run.data.last_value("tokens") for run in runs], format_count),
        ("steps", [run.data.result.get("steps") or run.data.last_value("step") for run in runs], fmt.readable),
        ("time", [run.data.seconds for run in runs], format_duration),
        ("energy, Wh", [get_nested(run.data.result, "energy", "watt_hours") for run in runs], fmt.readable),
    ]
    for label, values, formatter in numeric_rows:
        if any(map(is_number, values)):
            rows.append(Row(label, [formatter(value) if is_number(value) else None for value in values]))
    return rows


# ---------------------------------------------------------------- curves


def _charts(runs: Sequence[ComparedRun]) -> dict[str, tuple[str, Chart]]:
    """X axis → (its name, the curves of all runs): validation bits per byte, else validation loss, else training loss."""
    metrics = {"bits_per_byte": "bits per byte", "loss": "validation loss"}
    metric = next((key for key in metrics if all(run.data.series("validation", key) for run in runs)), None)
    label = metrics[metric] if metric else "training loss"
    curves = [
        run.data.series("validation", metric) if metric else moving_average(run.data.series("loss")) for run in runs
    ]
    charts: dict[str, tuple[str, Chart]] = {}
    for axis, axis_name in X_AXES.items():
        lines = [(run.name, _curve_over_axis(run.data, points, axis)) for run, points in zip(runs, curves, strict=True)]
        if not any(points for _, points in lines):
            continue
        ends = "; ".join(f"{name} ends at {points[-1][1]:.3f}" for name, points in lines if points)
        caption = f"{label[0].upper()}{label[1:]} by {axis_name}. Lower is better."
        chart = responsive_chart(
            caption, f"{caption} {ends}.", plot_run_comparison, lines, axis_name, label, f"by-{axis}"
        )
        charts[axis] = (axis_name, chart)
    return charts


def _curve_over_axis(run: RunData, points: Points, axis: str) -> Points:
    """(step, y) as (value of `axis` at that step, y); points where that is unknown are left out."""
    if axis == "step":
        return points
    axis_by_step = dict(run.series(axis))
    return [(axis_by_step[step], y) for step, y in points if step in axis_by_step]


# ---------------------------------------------------------------- settings, evaluations, audits, samples


def _flatten_settings(run: RunData) -> dict[str, str]:
    """Every setting of a run as text; the locations of its files are left out."""
    data = {key: value for key, value in as_mapping(run.get("data")).items() if key != "fingerprint"}
    settings: dict[str, Any] = {name: run.metadata.get(name) for name in SETTINGS} | {"data": data}
    settings["data fingerprint"] = str(run.get("data", "fingerprint") or "")[:12] or None
    settings["base model"] = run.base_model
    settings |= {name: run.get("recipe", name) for name in ("budget", "steps", "tokens", "lora", "scratch")}
    settings["seed"] = run.metadata.get("seed")
    return dict(fmt.flatten(settings))


def _text_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    by_run = [{text.name: text.bits_per_byte for text in run.results.texts} for run in runs]
    return [
        Row(name, [texts.get(name) for texts in by_run]) for name in dict.fromkeys(name for t in by_run for name in t)
    ]


def _benchmark_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    by_run = [{(benchmark.name, benchmark.metric): benchmark for benchmark in run.results.benchmarks} for run in runs]
    rows: list[Row] = []
    for name, metric in dict.fromkeys(key for benchmarks in by_run for key in benchmarks):
        found = [benchmarks.get((name, metric)) for benchmarks in by_run]
        known = [benchmark for benchmark in found if benchmark is not None]
        details = [metric, *(f"chance {fmt.number(b.chance)}" for b in known if b.chance is not None)][:2]
        if len({benchmark.score.n for benchmark in known}) > 1:
            details.append("items: " + ", ".join("–" if b is None else f"{b.score.n}" for b in found))
        rows.append(Row(name, [benchmark and benchmark.score for benchmark in found], note=" · ".join(details)))
    return rows


def _audit_rows(runs: Sequence[ComparedRun]) -> dict[str, list[Row]]:
    """The findings of the audits by the title of their section."""
    by_run = [{(finding.section, finding.name): finding for finding in run.results.findings} for run in runs]
    sections: dict[str, list[Row]] = {}
    for section, findings in fmt.group_by_section(
        [finding for run in runs for finding in run.results.findings]
    ).items():
        rows: list[Row] = []
        for name in dict.fromkeys(finding.name for finding in findings):
            found = [findings_of_run.get((section, name)) for findings_of_run in by_run]
            first = next(finding for finding in found if finding is not None)
            reference = first.reference
            rows.append(
                Row(
                    name,
                    [finding and finding.score for finding in found],
                    note="" if reference is None else f"reference value {fmt.number(reference, first.unit)}",
                    unit=first.unit,
                    flagged=tuple(i for i, finding in enumerate(found) if finding is not None and finding.flagged),
                )
            )
        sections[fmt.SECTION_TITLES.get(section, section)] = rows
    return sections


def _last_samples(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str | None]]]:
    """(prompt, the last text that each run generated for it)."""
    by_run = [
        {sample.prompt: sample.text for group in run.data.samples_by_step.values() for sample in group} for run in runs
    ]
    prompts = dict.fromkeys(prompt for samples in by_run for prompt in samples)
    return [(prompt, [samples.get(prompt) for samples in by_run]) for prompt in prompts]
