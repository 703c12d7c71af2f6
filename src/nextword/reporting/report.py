"""A run directory as one HTML page (`report.html`): its training curves and everything that was evaluated and audited.

A run of `nextword transfer` has a page on label efficiency instead: what pre-training is worth in labels. Pages are
self-contained: no script and no external resource.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError
from nextword.common.format import format_bytes, format_duration
from nextword.common.fs import atomic_write
from nextword.common.results import StoredResults, is_number, short_path_name
from nextword.reporting import charts
from nextword.reporting import formatting as fmt
from nextword.reporting.card import is_unmodified_card, write_card
from nextword.reporting.run_data import (
    LM_LOSS_TASKS,
    LOWER_IS_BETTER_METRICS,
    METRICS,
    RunData,
    TaskResults,
    as_list,
    as_mapping,
    get_nested,
    parse_scores,
)

__all__ = ["refresh_unmodified", "regenerate", "write_card", "write_report", "write_run_reports"]

MAX_SAMPLES = 8  # steps whose samples are shown without unfolding
GENERATED_MARKERS = ('<meta name="generator" content="nextword">', "Made by nextword from the files of the run folder.")


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from run.json, metrics.jsonl, result.json and measured/.

    Returns:
        The path of the page.

    Raises:
        NextwordError: Not a run directory, or a `nextword transfer` that is unfinished or has no scores to plot.
        CorruptFileError: One of its files is damaged.
    """
    run = RunData.load(run_dir)
    is_study = run.metadata.get("task") == "transfer"
    page = _render_study(run_dir, run) if is_study else _render_training(run, StoredResults.load(run_dir))
    atomic_write(run_dir / "report.html", page)
    return run_dir / "report.html"


def write_run_reports(run_dir: Path, overwrite: bool = True) -> None:
    """Write the model card and the report of a complete run.

    Args:
        run_dir: The run directory.
        overwrite: Whether to replace existing files.
    """
    for name, write in (("README.md", write_card), ("report.html", write_report)):
        if overwrite or not (run_dir / name).is_file():
            write(run_dir)


def regenerate(run_dir: Path) -> Path:
    """Write the report, and the model card unless someone has edited it; the path of the report."""
    page, card = write_report(run_dir), run_dir / "README.md"
    if RunData.load(run_dir).metadata.get("task") != "transfer" and (is_unmodified_card(card) or not card.exists()):
        write_card(run_dir)
    return page


def refresh_unmodified(run_dir: Path, info: Callable[[str], None]) -> None:
    """Update the report and the model card after an evaluation or audit.

    Files that were edited or removed by hand are left alone; an edited model card is mentioned by `info`.
    """
    report, card = run_dir / "report.html", run_dir / "README.md"
    if report.is_file():
        page = report.read_text(encoding="utf-8", errors="replace")
        if any(marker in page for marker in GENERATED_MARKERS):
            write_report(run_dir)
    if is_unmodified_card(card):
        write_card(run_dir)
    elif card.is_file():
        info(
            f"{card} was edited by hand and is left unchanged. Delete it and run `nextword report {run_dir}` to rebuild it"
        )


# ---------------------------------------------------------------- training


def _render_training(run: RunData, stored: StoredResults) -> str:
    results = TaskResults.from_run(run) if run.task else None
    metric = results.metric if results and results.metric != "loss" else "bits_per_byte"
    samples = list(run.samples_by_step.items())
    shown = {round(i * (len(samples) - 1) / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES)}  # evenly spaced
    return fmt.render_html(
        "report.html",
        title=run.name,
        run=run,
        subtitle=_subtitle(run),
        results=results,
        metrics=METRICS,
        task_scores=results and charts.task_score_plot(results),
        loss_chart=charts.loss_chart(run) if run.task in LM_LOSS_TASKS else None,
        charts=_small_charts(run, results),
        metric=metric,
        losses=dict(run.series("validation", "loss")),
        scores=dict(run.series("validation", metric)),
        samples=[group for i, group in enumerate(samples) if i in shown],
        other_samples=[group for i, group in enumerate(samples) if i not in shown],
        tables=_metadata_tables(run),
        stored=stored,
        benchmark_plot=charts.benchmark_plot(stored.benchmarks),
        findings_by_section=fmt.group_by_section((finding.section, finding) for finding in stored.findings),
    )


def _subtitle(run: RunData) -> str:
    steps = max((step for step, _ in run.series("loss")), default=0)
    status = "finished" if run.result else f"not finished: at step {steps:,.0f}" if steps else "not started"
    created = str(run.metadata.get("created") or "")[:16].replace("T", " ")
    base = f"from {run.base_model}" if run.base_model else None
    model = (run.task, base) if run.task else (run.metadata.get("preset"), run.metadata.get("size"))
    return " · ".join(str(part) for part in (*model, status, created) if part)


def _small_charts(run: RunData, results: TaskResults | None) -> list[charts.Chart]:
    """Score and losses of a fine-tuning, learning rate, gradient norm and throughput by step, and loss by position."""
    small: list[charts.Chart] = []

    def add(name: str, caption: str, points: charts.Points, min_points: int = 1, **options: Any) -> None:
        if len(points) >= min_points:
            small.append(charts.small_chart(name, caption, points, **options))

    if results and results.metric not in LOWER_IS_BETTER_METRICS:
        caption = f"{results.info.name} on the validation examples used during training"
        add("score", caption, run.series("validation", results.metric), 2, baseline=results.best_baseline)
    if run.task not in LM_LOSS_TASKS:  # the two losses are different quantities
        add("validation", f"Validation loss: {run.loss_unit}", run.series("validation", "loss"), 2)
        weight = run.get("tuning", "auxiliary")
        loss = f"task loss + {weight:g} × language modelling loss" if is_number(weight) and weight > 0 else "task loss"
        loss = "DPO, which starts at ln 2 = 0.693" if run.task_kind == "preference" else loss
        add("training", f"Training loss: {loss}", run.series("loss"), 2, is_training=True)
    add("lr", "Learning rate", run.series("lr"), start_at_zero=True)
    add("gradient_norm", "Gradient norm before clipping", run.series("gradient_norm"), start_at_zero=True)
    add("tokens_per_second", "Tokens per second", run.series("tokens_per_second"), start_at_zero=True)
    losses = as_list(run.result.get("by_position")) or as_list(run.get("evaluation", "by_position"))
    if all(map(is_number, losses)):
        caption = "Validation loss by position: the benefit of a longer context"
        points = [(float(position), loss) for position, loss in enumerate(losses, start=1)]
        add("position", caption, points, 2, x_label="position in the context window", log_x=True)
    return small


def _metadata_tables(run: RunData) -> dict[str, list[tuple[str, str]]]:
    """(name, value) rows of every table of the section "Run details", by caption."""
    kept = ("steps", "best_step", "tokens", "loss", "perplexity", "bits_per_byte", "validation_tokens")
    result: dict[str, Any] = {key: run.result[key] for key in kept if is_number(run.result.get(key))}
    if is_number(seconds := run.result.get("seconds")):
        result["time"] = format_duration(seconds)
    if is_number(memory := run.result.get("memory_bytes")):
        result["memory"] = format_bytes(memory)
    if energy := as_mapping(run.result.get("energy")):
        result["energy"] = f"{energy.get('watt_hours')} Wh, {'measured' if energy.get('measured') else 'estimated'}"
    if not result and run.best_validation:
        result = {"best validation loss": run.best_validation[1], "best step": run.best_validation[0]}
    model = {key: run.get(key) for key in ("preset", "size", "parameters", "trained_parameters")}
    tables: dict[str, Any] = {
        "Result": result,
        "Task": run.task_metadata,
        "Model": {**model, **as_mapping(run.get("model"))},
        "Data": {key: value for key, value in as_mapping(run.get("data")).items() if key != "labels"},
        "Training": run.get("training"),
        "Fine-tuning": run.get("tuning") if run.task else None,
        "Hardware": run.get("machine"),
        "Versions": run.get("versions"),
    }
    rows = {caption: fmt.flatten(as_mapping(values)) for caption, values in tables.items()}
    return {caption: values for caption, values in rows.items() if values}


# ---------------------------------------------------------------- label efficiency


def _render_study(run_dir: Path, run: RunData) -> str:
    study, metric = run.result, str(run.result.get("metric"))
    if not study:
        raise NextwordError(f"{run_dir}: this study is not finished and has no report yet. Continue it with --resume")
    points: list[charts.StudyPoint] = []
    for point in as_list(study.get("points")):
        count, scores = get_nested(point, "examples"), parse_scores(point)
        if is_number(count) and count > 0 and scores.keys() >= charts.INITIALIZATIONS.keys():
            points.append((int(count), scores))
    if metric not in METRICS or not points:
        raise NextwordError(
            f"{run_dir}: the study has no scores to plot (metric: {metric}). Run nextword transfer again"
        )
    points.sort(key=lambda point: point[0])
    cells = [as_mapping(cell) for cell in as_list(study.get("cells"))]
    cells = [cell for cell in cells if is_number(cell.get("score")) and is_number(cell.get("examples"))]
    cells.sort(key=lambda cell: (cell["examples"], not cell.get("pretrained"), str(cell.get("seed"))))
    higher_is_better = study.get("higher_is_better")
    if not isinstance(higher_is_better, bool):
        higher_is_better = metric not in LOWER_IS_BETTER_METRICS
    baselines, data = parse_scores(study.get("baselines")), as_list(run.get("request", "data"))
    names = (study.get("task"), run.get("request", "model"), *data[:1])
    return fmt.render_html(
        "label_efficiency.html",
        title=run.name,
        headline=str(study.get("sentence") or "Label efficiency of pre-training"),
        subtitle=" · ".join(short_path_name(str(name)) for name in names if name),
        metric=METRICS[metric].name,
        figure=charts.label_efficiency_chart(metric, points, baselines, cells, higher_is_better),
        initializations=charts.INITIALIZATIONS,
        points=points,
        sign=1 if higher_is_better else -1,
        baselines=baselines,
        runs=cells,
        command_line=run.get("command"),
    )
