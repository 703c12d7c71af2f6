"""Several runs on one page: their results, training curves, settings, evaluations, audits and samples side by side."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from nextword.common.errors import UsageError
from nextword.common.format import format_count, format_duration
from nextword.common.fs import atomic_write
from nextword.common.results import StoredResults, is_number
from nextword.common.statistics import ScoreWithCI
from nextword.reporting import formatting as fmt
from nextword.reporting.charts import SERIES_COLORS, Chart, comparison_chart, moving_average
from nextword.reporting.run_data import THIS_MODEL, RunData, TaskResults, as_mapping

SETTINGS = (
    *("preset", "size", "parameters", "task", "model"),
    *("training", "tuning", "data", "fixed", "machine", "versions"),
)
X_AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds"}

K = TypeVar("K")
V = TypeVar("V")


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
    flagged: Sequence[int] = ()


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write a page that compares runs.

    Returns:
        The path of the page.

    Raises:
        UsageError: More runs than `SERIES_COLORS`, the same run twice, or a run of `nextword transfer`.
        NextwordError: Not a run directory.
        CorruptFileError: A file of a run is damaged.
    """
    if len(run_dirs) > len(SERIES_COLORS):
        raise UsageError(f"cannot compare {len(run_dirs)} runs on one page: pass at most {len(SERIES_COLORS)}")
    names = shortest_names([run_dir.resolve() for run_dir in run_dirs])
    runs = {name: RunData.load(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)}
    for run, run_dir in zip(runs.values(), run_dirs, strict=True):
        if run.metadata.get("task") == "transfer":
            raise UsageError(
                f"{run_dir}: a label-efficiency study cannot be compared with other runs; see {run_dir / 'report.html'}"
            )
    stored = [StoredResults.load(run_dir) for run_dir in run_dirs]
    texts = _pivot([{text.name: text for text in results.texts} for results in stored])
    settings = _pivot([_flatten_settings(run) for run in runs.values()])
    different = [Row(name, values) for name, values in settings if len(set(values)) > 1]
    last_samples = [dict(chain.from_iterable(run.samples_by_step.values())) for run in runs.values()]
    page = fmt.render(
        "comparison.html",
        title=" · ".join(names),
        names=names,
        outcomes=_outcome_rows(list(runs.values())),
        different_data=len({run.get("data", "fingerprint") for run in runs.values()}) > 1,
        charts=_charts(runs),
        settings=different,
        equal_settings=len(settings) - len(different),
        texts=[
            Row(
                name,
                [text and text.bits_per_byte for text in found],
                _join_bases(text.interval.basis for text in found if text),
            )
            for name, found in texts
        ],
        benchmarks=_benchmark_rows(stored),
        audits=fmt.group_by_section(_audit_rows(stored)),
        samples=_pivot(last_samples),
    )
    atomic_write(out, page)
    return out


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """The shortest suffixes of some paths that distinguish them."""
    if len(set(paths)) < len(paths):
        raise UsageError("the same run was passed twice")
    suffixes = (["/".join(path.parts[-depth:]) for path in paths] for depth in count(1))
    return next(names for names in suffixes if len(set(names)) == len(paths))


def _pivot(columns: Sequence[Mapping[K, V]]) -> list[tuple[K, list[V | None]]]:
    """The rows of a table from its columns: (key, the value of each column)."""
    return [(key, [column.get(key) for column in columns]) for key in dict.fromkeys(chain.from_iterable(columns))]


def _join_bases(bases: Iterable[str]) -> str:
    """What the intervals of a row speak of, each statement once."""
    return " · ".join(dict.fromkeys(filter(None, bases)))


def _outcome_rows(runs: Sequence[RunData]) -> list[Row]:
    results = [TaskResults.from_run(run) for run in runs]
    metrics = {label: metric for result in results for label, metric in result.metric_names.items()}
    basis = _join_bases(final[1] for run in runs if (final := run.final_bits_per_byte()))
    rows = [
        Row(
            label,
            [result.by_system.get(THIS_MODEL, {}).get(metric) for result in results],
            basis if metric == "bits_per_byte" else "",
        )
        for label, metric in metrics.items()
    ]
    numbers: dict[str, tuple[Callable[[float], str], Callable[[RunData], Any]]] = {
        "validation loss": (fmt.number, lambda run: run.final_value("loss")),
        "perplexity": (fmt.perplexity, lambda run: run.final_value("loss") if run.has_lm_loss else None),
        "parameters": (format_count, lambda run: run.get("parameters")),
        "training tokens": (format_count, lambda run: run.last_value("tokens")),
        "steps": (fmt.readable, lambda run: run.result.get("steps") or run.last_value("step")),
        "time": (format_duration, lambda run: run.seconds),
        "energy, Wh": (fmt.readable, lambda run: as_mapping(run.result.get("energy")).get("watt_hours")),
    }
    for label, (formatter, get) in numbers.items():
        values = [get(run) for run in runs]
        if any(map(is_number, values)):
            rows.append(Row(label, [formatter(value) if is_number(value) else None for value in values]))
    return rows


def _charts(runs: Mapping[str, RunData]) -> dict[str, tuple[str, Chart]]:
    """X axis → (its name, the curves of all runs): validation bits per byte, else validation loss, else training loss."""
    metrics = {"bits_per_byte": "bits per byte", "loss": "validation loss"}
    metric = next((key for key in metrics if all(run.series("validation", key) for run in runs.values())), None)
    charts: dict[str, tuple[str, Chart]] = {}
    for axis, axis_name in X_AXES.items():
        curves: list[tuple[str, list[tuple[float, float]]]] = []
        for name, run in runs.items():
            points = run.series("validation", metric) if metric else moving_average(run.series("loss"))
            x = dict(run.series(axis)) if axis != "step" else {step: step for step, _ in points}
            curves.append((name, [(x[step], y) for step, y in points if step in x]))
        if any(points for _, points in curves):
            y_label = metrics[metric] if metric else "training loss"
            charts[axis] = (axis_name, comparison_chart(f"by-{axis}", curves, axis_name, y_label))
    return charts


def _flatten_settings(run: RunData) -> dict[str, str]:
    """Every setting of a run as text; the locations of its files are left out."""
    data = {key: value for key, value in as_mapping(run.get("data")).items() if key != "fingerprint"}
    settings: dict[str, Any] = {name: run.get(name) for name in SETTINGS} | {"data": data}
    settings["data fingerprint"] = str(run.get("data", "fingerprint") or "")[:12] or None
    settings["base model"] = run.base_model
    settings |= {name: run.get("recipe", name) for name in ("budget", "steps", "tokens", "lora", "scratch")}
    return dict(fmt.flatten({**settings, "seed": run.get("seed")}))


def _benchmark_rows(stored: Sequence[StoredResults]) -> list[Row]:
    rows: list[Row] = []
    by_run = [{(benchmark.name, benchmark.metric): benchmark for benchmark in run.benchmarks} for run in stored]
    for (name, metric), found in _pivot(by_run):
        known = [benchmark for benchmark in found if benchmark is not None]
        details = [metric, *(f"chance {fmt.number(b.chance)}" for b in known if b.chance is not None)][:2]
        if len({benchmark.score.n for benchmark in known}) > 1:
            details.append("items: " + ", ".join("–" if b is None else f"{b.score.n}" for b in found))
        rows.append(Row(name, [benchmark and benchmark.score for benchmark in found], note=" · ".join(details)))
    return rows


def _audit_rows(stored: Sequence[StoredResults]) -> Iterator[tuple[str, Row]]:
    """(section, row) of every finding."""
    by_run = [{(finding.section, finding.name): finding for finding in run.findings} for run in stored]
    for (section, name), found in _pivot(by_run):
        first = next(finding for finding in found if finding is not None)
        note = "" if first.reference is None else f"reference value {fmt.number(first.reference, first.unit)}"
        flagged = [i for i, finding in enumerate(found) if finding is not None and finding.flagged]
        yield section, Row(name, [finding and finding.score for finding in found], note, first.unit, flagged)
