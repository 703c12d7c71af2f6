"""A run directory as one HTML page (`report.html`): its training curves and everything that was evaluated and audited.

The page is self-contained: no script and no external resource.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError
from nextword.common.format import format_bytes, format_duration
from nextword.common.fs import atomic_write
from nextword.common.results import StoredResults
from nextword.reporting import charts
from nextword.reporting import formatting as fmt
from nextword.reporting.card import is_unmodified_card, write_card
from nextword.reporting.label_efficiency_page import write_label_efficiency_page
from nextword.reporting.rendering import render_html
from nextword.reporting.run_data import (
    LM_LOSS_TASKS,
    RunData,
    as_list,
    as_mapping,
    is_imbalanced,
    is_number,
    short_path_name,
    task_metadata,
    validation_loss_unit,
)
from nextword.reporting.task_results import METRICS, TaskResults

__all__ = ["refresh_unmodified", "regenerate", "write_card", "write_report", "write_run_reports"]

MAX_SAMPLES = 8  # steps whose samples are shown without unfolding
GENERATED_MARKERS = ('<meta name="generator" content="nextword">', "Made by nextword from the files of the run folder.")


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from run.json, metrics.jsonl, result.json and measured/.

    Returns:
        The path of the page.

    Raises:
        NextwordError: Not a run directory, or an unfinished `nextword transfer`.
        CorruptFileError: One of its files is damaged.
    """
    run = RunData.load(run_dir)
    if run.metadata.get("task") == "transfer":
        return _write_study_report(run_dir, run)
    stored, results = StoredResults.load(run_dir), TaskResults.from_run(run) if run.task else None
    metric = results.metric if results and results.metric != "loss" else "bits_per_byte"
    losses, scores = dict(run.series("validation", "loss")), dict(run.series("validation", metric))
    page = render_html(
        "report.html",
        title=run.name,
        run=run,
        subtitle=_subtitle(run),
        results=results,
        metrics=METRICS,
        task_scores=results and charts.task_score_plot(results),
        loss_chart=_loss_chart(run) if run.task in LM_LOSS_TASKS else None,
        charts=[*(_task_charts(run, results) if results else ()), *_training_charts(run)],
        metric=metric,
        losses=losses,
        scores=scores,
        validation_steps=sorted({*losses, *scores}),
        samples=_select_samples(run),
        tables=_metadata_tables(run),
        is_imbalanced=is_imbalanced(run),
        stored=stored,
        benchmark_plot=charts.benchmark_plot(stored.benchmarks),
        findings_by_section=fmt.group_by_section(stored.findings),
        section_titles=fmt.SECTION_TITLES,
    )
    atomic_write(run_dir / "report.html", page)
    return run_dir / "report.html"


def write_run_reports(run_dir: Path, overwrite: bool = True) -> None:
    """Write the model card and the report of a complete run.

    Args:
        overwrite: Whether to replace existing files.
    """
    if overwrite or not (run_dir / "README.md").is_file():
        write_card(run_dir)
    if overwrite or not (run_dir / "report.html").is_file():
        write_report(run_dir)


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


def _write_study_report(run_dir: Path, run: RunData) -> Path:
    """Write the page of `nextword transfer` again from its result."""
    if not run.result:
        raise NextwordError(f"{run_dir}: this study is not finished and has no report yet. Continue it with --resume")
    request = as_mapping(run.metadata.get("request"))
    data = request.get("data")
    names: dict[str, str] = {"command": str(run.metadata.get("command") or "")}
    for key, path in {
        "model": request.get("model"),
        "data": data[0] if isinstance(data, list) and data else None,
    }.items():
        names[key] = short_path_name(path) if isinstance(path, str) else key
    return write_label_efficiency_page(run_dir, {**run.result, **names})


def _subtitle(run: RunData) -> str:
    steps = max((step for step, _ in run.series("loss")), default=0)
    status = "finished" if run.result else f"not finished: at step {steps:,.0f}" if steps else "not started"
    created = str(run.metadata.get("created") or "")[:16].replace("T", " ")
    base = f"from {run.base_model}" if run.base_model else None
    model = (run.task, base) if run.task else (run.metadata.get("preset"), run.metadata.get("size"))
    return " · ".join(str(part) for part in (*model, status, created) if part)


# ---------------------------------------------------------------- charts


def _loss_chart(run: RunData) -> charts.Chart | None:
    train, validation = run.series("loss"), run.series("validation", "loss")
    if not train and not validation:
        return None
    bits = dict(run.series("validation", "bits_per_byte"))
    bits_per_nat = next((bits[step] / loss for step, loss in validation if loss and bits.get(step)), None)
    sentences: list[str] = []
    if train:
        last = charts.moving_average(train)[-1][1]
        sentences.append(f"The training loss falls from {train[0][1]:.2f} to {last:.2f}.")
    if run.best_validation:
        step, loss = run.best_validation
        sentences.append(f"The lowest validation loss is {loss:.3f}, at step {step:,.0f}.")
    caption = "Training loss (faint: every step, strong: moving average) and validation loss. Lower is better."
    description = " ".join(sentences)
    return charts.responsive_chart(caption, description, charts.plot_loss, train, validation, bits_per_nat)


def _training_charts(run: RunData) -> list[charts.Chart]:
    """Learning rate, gradient norm and throughput by step, and the validation loss by position."""
    captions = {
        "lr": "Learning rate",
        "gradient_norm": "Gradient norm before clipping",
        "tokens_per_second": "Tokens per second",
    }
    series = {key: run.series(key) for key in captions}
    small = [_small_chart(captions[key], series[key], key, start_at_zero=True) for key in captions if series[key]]
    losses = as_list(run.result.get("by_position")) or as_list(run.get("evaluation", "by_position"))
    if len(losses) > 1 and all(map(is_number, losses)):
        caption = "Validation loss by position: the benefit of a longer context"
        points = [(float(position), loss) for position, loss in enumerate(losses, start=1)]
        small.append(_small_chart(caption, points, "position", x_label="position in the context window", log_x=True))
    return small


def _task_charts(run: RunData, results: TaskResults) -> list[charts.Chart]:
    """The score and, where the two are different quantities, the validation loss and the training loss by step."""
    small: list[charts.Chart] = []
    points = run.series("validation", results.metric)
    if len(points) > 1 and results.metric not in ("loss", "bits_per_byte"):
        baseline = results.best_baseline and (results.best_baseline[0], results.best_baseline[1].value)
        caption = f"{results.info.name} on the validation examples used during training"
        small.append(_small_chart(caption, points, "score", baseline=baseline))
    if run.task in LM_LOSS_TASKS:
        return small
    if len(points := run.series("validation", "loss")) > 1:
        small.append(_small_chart(f"Validation loss: {validation_loss_unit(run)}", points, "validation"))
    if len(points := run.series("loss")) > 1:
        small.append(_small_chart(f"Training loss: {_training_loss_name(run)}", points, "training", is_training=True))
    return small


def _small_chart(caption: str, points: charts.Points, name: str, **options: Any) -> charts.Chart:
    axis = options.get("x_label", "step").split()[0]
    (first_x, first), (last_x, last) = points[0], points[-1]
    description = f"{caption}: {first:.3g} at {axis} {first_x:,.0f}, {last:.3g} at {axis} {last_x:,.0f}."
    return charts.Chart(caption, description, charts.plot_small(points, f"small-{name}", **options))


def _training_loss_name(run: RunData) -> str:
    if run.task_kind == "preference":
        return "DPO, which starts at ln 2 = 0.693"
    weight = run.get("tuning", "auxiliary")
    return f"task loss + {weight:g} × language modelling loss" if is_number(weight) and weight > 0 else "task loss"


# ---------------------------------------------------------------- samples and tables


def _select_samples(run: RunData) -> dict[str, list[Any]]:
    """The samples of evenly spaced steps, to be shown, and those of the other steps."""
    groups = list(run.samples_by_step.items())
    indices = {round(i * (len(groups) - 1) / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES)}
    return {
        "shown": [group for i, group in enumerate(groups) if i in indices],
        "others": [group for i, group in enumerate(groups) if i not in indices],
    }


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
    tables: dict[str, Mapping[str, Any]] = {
        "Result": result,
        "Task": task_metadata(run) if run.task else {},
        "Model": {key: run.get(key) for key in ("preset", "size", "parameters", "trained_parameters")}
        | dict(as_mapping(run.get("model"))),
        "Data": {key: value for key, value in as_mapping(run.get("data")).items() if key != "labels"},
        "Training": as_mapping(run.get("training")),
        "Fine-tuning": as_mapping(run.get("tuning")) if run.task else {},
        "Hardware": as_mapping(run.get("machine")),
        "Versions": as_mapping(run.get("versions")),
    }
    rows = {caption: fmt.flatten(values) for caption, values in tables.items()}
    return {caption: values for caption, values in rows.items() if values}
