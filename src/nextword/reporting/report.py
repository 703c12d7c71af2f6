"""A run folder as one page that can be sent to somebody (`report.html`), and as a model card (`README.md`): how it learned, and
everything that was measured on it.

Only the run folder's files are read. The page is self-contained: no script, no outside address. Everything that came from a
corpus or a model is escaped, for a sample may hold anything.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError
from nextword.common.fs import atomic_write
from nextword.common.results import StoredResults
from nextword.reporting.card import is_unmodified_card, write_card
from nextword.reporting.charts import Points, moving_average, plot_loss, plot_metric
from nextword.reporting.finetune_sections import (
    LM_LOSS_TASKS,
    finetune_curves,
    finetune_headline,
    finetune_metadata_section,
    finetune_scores_section,
    validation_table,
)
from nextword.reporting.label_efficiency_page import write_label_efficiency_page
from nextword.reporting.results_sections import results_sections
from nextword.reporting.run_data import (
    RunData,
    as_mapping,
    escape_html,
    flatten_values,
    format_count,
    format_duration,
    get_nested,
    is_number,
    render_figure,
    render_headline,
    render_section,
    render_table,
)
from nextword.reporting.task_results import base_model_name, short_path_name
from nextword.reporting.templates import BASE_CSS, PAGE_TEMPLATE, RESULTS_CSS, RUN_FOOTER, TASK_CSS

__all__ = ["refresh", "renew", "write_card", "write_report", "write_run_reports"]

MAX_SAMPLES = 8  # steps whose samples are shown at once; the others can be unfolded


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from RUN/run.json, metrics.jsonl, result.json and measured/; its path.

    Raises:
        NextwordError: not a run folder, or a `transfer` that is not finished.
        CorruptFile: a file of it is damaged.
    """
    run_data = RunData.load(run_dir)
    if run_data.metadata.get("task") == "transfer":
        return _label_efficiency_report(run_dir, run_data)
    command, is_finetuned = run_data.metadata.get("command"), run_data.task is not None
    results_html = results_sections(StoredResults.load(run_dir))
    sections = [
        _training_section(run_data),
        "" if is_finetuned else _plan_section(run_data),
        results_html,
        _samples_section(run_data),
        finetune_metadata_section(run_data) if is_finetuned else _metadata_section(run_data),
        render_section("The command", f"<pre><code>{escape_html(command)}</code></pre>", bool(command)),
        _log_section(run_data),
    ]
    page = PAGE_TEMPLATE.substitute(
        title=escape_html(run_data.name),
        footer=RUN_FOOTER,
        kind="training report",
        heading=escape_html(run_data.name),
        subtitle=_subtitle(run_data),
        headline=f"<dl>\n{finetune_headline(run_data) if is_finetuned else _headline_numbers(run_data)}\n</dl>\n",
        parts="\n".join([finetune_scores_section(run_data), *sections] if is_finetuned else sections),
        style=BASE_CSS + (TASK_CSS if is_finetuned or results_html else "") + (RESULTS_CSS if results_html else ""),
    )
    atomic_write(run_dir / "report.html", page)
    return run_dir / "report.html"


def regenerate(run_dir: Path) -> Path:
    """Write the report anew, and the card with it where it is ours or gone; the report's path."""
    report_path = write_report(run_dir)
    run_data = RunData.load(run_dir)
    if run_data.metadata.get("task") != "transfer" and (
        is_unmodified_card(run_dir / "README.md") or not (run_dir / "README.md").exists()
    ):
        write_card(run_dir)
    return report_path


def refresh_unmodified(run_dir: Path, info: Callable[[str], None]) -> None:
    """Draw a run's report and card anew after something was measured on it. One that a person has changed, or has taken away,
    stays so; what is changed is said."""
    if (run_dir / "report.html").is_file() and RUN_FOOTER in (run_dir / "report.html").read_text(
        encoding="utf-8", errors="replace"
    ):
        write_report(run_dir)
    card_path = run_dir / "README.md"
    if is_unmodified_card(card_path):
        write_card(run_dir)
    elif card_path.is_file():
        info(
            f"{card_path}: somebody has changed it, so it stays as it is; without it, nextword report {run_dir} writes a new one"
        )


def _label_efficiency_report(run_dir: Path, run: RunData) -> Path:
    """The page of `nextword transfer`, once more."""
    result, request = run.result, as_mapping(run.metadata.get("request"))
    if not result:
        raise NextwordError(
            f"{run_dir}: this comparison is not finished, and its page comes with its end. Go on with it by --resume"
        )
    data = request.get("data")
    names = {"model": request.get("model"), "data": data[0] if isinstance(data, list) and data else None}
    shown_names = {key: short_path_name(value) if isinstance(value, str) else key for key, value in names.items()}
    return write_label_efficiency_page(
        run_dir, {**result, **shown_names, "command": str(run.metadata.get("command") or "")}
    )


# ---------------------------------------------------------------- the parts of the page


def _subtitle(run: RunData) -> str:
    steps = max((step for step, _ in run.series("loss")), default=0)
    state = "finished" if run.result else f"not finished: at step {steps:,.0f}" if steps else "not started"
    created = str(run.metadata.get("created") or "")[:16].replace("T", " ")
    base = base_model_name(run) if run.task else None
    what = (run.task, base and f"from {base}") if run.task else (run.metadata.get("preset"), run.metadata.get("size"))
    parts = (*what, state, created)
    return " · ".join(escape_html(part) for part in parts if part)


def _headline_numbers(run: RunData) -> str:
    loss, seconds, tokens = run.loss, get_nested(run.result, "seconds"), run.last_value("tokens")
    seconds = seconds if is_number(seconds) else run.last_value("seconds")
    parameters = run.metadata.get("parameters")
    numbers = [
        ("validation loss", loss and f"{loss:.3f}", loss and f"nats per token · perplexity {format_perplexity(loss)}"),
        ("bits per byte", run.bits_per_byte and f"{run.bits_per_byte:.3f}", "of the validation text"),
        ("parameters", is_number(parameters) and format_count(parameters), "numbers that were trained"),
        ("tokens seen", tokens and format_count(tokens), "in training, repeats counted"),
        ("time", seconds and format_duration(seconds), "from start to end"),
    ]
    return render_headline(numbers)


def _training_section(run: RunData) -> str:
    is_finetuned = run.task not in (None, *LM_LOSS_TASKS)
    loss_figure, small_figures = "" if is_finetuned else _loss_figure(run), finetune_curves(run) if run.task else []
    for name, caption in (
        ("lr", "Learning rate"),
        ("gradient_norm", "Gradient norm, before it is clipped"),
        ("tokens_per_second", "Tokens per second"),
    ):
        if points := run.series(name):
            low, high, end = min(y for _, y in points), max(y for _, y in points), points[-1][1]
            words = f"{caption}: between {low:.3g} and {high:.3g}, {end:.3g} at the end."
            small_figures.append(
                render_figure(plot_metric(points, f"small-{name}", start_at_zero=True), words, caption)
            )
    by_position = run.result.get("by_position") or get_nested(run.metadata, "evaluation", "by_position")
    if isinstance(by_position, list) and len(by_position) > 1 and all(map(is_number, by_position)):
        points = [(float(position), loss) for position, loss in enumerate(by_position, start=1)]
        words = f"Validation loss by position: {points[0][1]:.2f} at the first, {moving_average(points)[-1][1]:.2f} at the last."
        picture = plot_metric(points, "small-position", x_label="position in the window", log_x=True)
        small_figures.append(
            render_figure(picture, words, "Validation loss by position: how much the words before help")
        )
    grid = f'<div class="grid">{"".join(small_figures)}</div>' if small_figures else ""
    return render_section(
        "How it learned",
        loss_figure + grid + (validation_table(run) if is_finetuned else ""),
        bool(loss_figure or small_figures),
    )


def _loss_figure(run: RunData) -> str:
    train, validation = run.series("loss"), run.series("validation", "loss")
    if not train and not validation:
        return ""
    bits = dict(run.series("validation", "bits_per_byte"))
    ratio = next((bits[step] / loss for step, loss in validation if loss and bits.get(step)), None)
    wide, narrow = (plot_loss(train, validation, ratio, wide=wide) for wide in (True, False))
    picture = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    caption = (
        "Training loss at each step (faint) and smoothed, and the loss on text that was held out. Lower is better."
    )
    return render_figure(picture, _describe_loss(train, validation), caption) + _validation_loss_table(run)


def _describe_loss(train: Points, validation: Points) -> str:
    sentences = []
    if train:
        sentences.append(f"The training loss goes from {train[0][1]:.2f} to {moving_average(train)[-1][1]:.2f}.")
    if validation:
        step, loss = min(validation, key=lambda point: point[1])
        sentences.append(f"The lowest validation loss is {loss:.3f}, at step {step:,.0f}.")
    return " ".join(sentences)


def _validation_loss_table(run: RunData) -> str:
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


def _plan_section(run: RunData) -> str:
    """What was expected, and what came."""
    plan, result = as_mapping(run.metadata.get("plan")), run.result
    if not plan or not result:
        return ""
    low, high, bits = (plan.get(name) for name in ("low", "high", "bits_per_byte"))
    actual_bits = result.get("bits_per_byte")
    budget = get_nested(run.metadata, "recipe", "budget")
    rows: list[tuple[str, Any, Any, Callable[[float], str]]] = [
        ("bits per byte", bits, actual_bits, lambda value: f"{value:.3f}"),
        ("tokens", plan.get("tokens"), result.get("tokens"), format_count),
        ("time", budget if is_number(budget) else plan.get("seconds"), result.get("seconds"), format_duration),
        ("memory", plan.get("memory_bytes"), result.get("memory_bytes"), lambda value: f"{value / 1e9:.2f} GB"),
    ]
    shown = "".join(
        f'<tr><th scope="row">{name}</th><td>{formatter(before)}</td><td>{formatter(after)}</td>'
        f"<td>{100 * (after / before - 1):+.1f} %</td></tr>".replace("-", "−")
        for name, before, after, formatter in rows
        if is_number(before) and is_number(after) and before > 0
    )
    rationale_items = "".join(
        f"<li>{escape_html(line)}</li>" for line in plan.get("why") or () if isinstance(line, str)
    )
    range_note = ""
    if is_number(low) and is_number(high) and is_number(actual_bits):
        inside = "inside" if low <= actual_bits <= high else "outside"
        expected = f"between {low:.3f} and {high:.3f} bits per byte"
        range_note = f"<p>Four runs in five were expected to end {expected}; this one is {inside}.</p>"
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "planned", "came", "off by"))
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{shown}</tbody></table>'
    return render_section(
        "The plan, and what came of it", f"<ul>{rationale_items}</ul>{table}{range_note}", bool(shown)
    )


def _samples_section(run: RunData) -> str:
    by_step: dict[Any, list[dict[str, Any]]] = {}
    for record in run.records:
        if isinstance(record.get("sample"), dict):
            by_step.setdefault(record.get("step"), []).append(record["sample"])
    items = [
        f"<li><h3>{escape_html(format_value(step))}</h3><div>{_sample_quotes(samples)}</div></li>"
        for step, samples in by_step.items()
    ]
    spread = {round(i * (len(items) - 1) / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES)}
    shown = [item for i, item in enumerate(items) if i in spread]
    others = [item for i, item in enumerate(items) if i not in spread]
    more = f"<details><summary>{len(others)} more</summary><ol>{''.join(others)}</ol></details>" if others else ""
    description = "How the model went on" if run.task in (None, "continue") else "What the model answered"
    intro = f"<p>{description} as it learned. The number is the step; the prompt is set in bold.</p>"
    return render_section("What it wrote", f'{intro}<ol class="samples">{"".join(shown)}</ol>{more}', bool(items))


def _sample_quotes(samples: Iterable[Mapping[str, Any]]) -> str:
    return "".join(
        f'<blockquote dir="auto"><b>{escape_html(sample.get("prompt") or "")}</b>{escape_html(sample.get("text") or "")}</blockquote>'
        for sample in samples
    )


def _metadata_section(run: RunData) -> str:
    metadata = run.metadata
    model_summary = {key: metadata[key] for key in ("preset", "size", "parameters") if key in metadata}
    outcome = {key: value for key, value in run.result.items() if key not in ("by_position", "seconds")}
    if is_number(seconds := run.result.get("seconds")):
        outcome["time"] = format_duration(seconds)
    if is_number(memory := outcome.pop("memory_bytes", None)):
        outcome["memory"] = f"{memory / 1e9:.2f} GB"
    if energy := as_mapping(outcome.pop("energy", None)):
        outcome["energy"] = f"{energy.get('watt_hours')} Wh, {'measured' if energy.get('measured') else 'estimated'}"
    if not outcome and run.best_validation:
        outcome = {"best validation loss": run.best_validation[1], "best step": run.best_validation[0]}
    tables = {
        "Outcome": outcome,
        "Model": {**model_summary, **as_mapping(metadata.get("model"))},
        "Data": as_mapping(metadata.get("data")),
        "Training": as_mapping(metadata.get("training")),
        "Machine": as_mapping(metadata.get("machine")),
        "Versions": as_mapping(metadata.get("versions")),
    }
    parts = [render_table(caption, flatten_values(values)) for caption, values in tables.items() if values]
    return render_section("The facts", f'<div class="tables">{"".join(parts)}</div>', bool(parts))


def _log_section(run: RunData) -> str:
    lines = [(record.get("step"), record["message"]) for record in run.records if "message" in record]
    items = "".join(
        f"<li><b>{escape_html(format_value(step))}</b> {escape_html(message)}</li>" for step, message in lines
    )
    return render_section("What was said on the way", f'<ul class="messages">{items}</ul>', bool(lines))


def write_run_reports(run_dir: Path, overwrite: bool = True) -> None:
    """Write the model card and the report of a complete run.

    Args:
        run_dir: The run directory.
        overwrite: Replace existing files.
    """
    if overwrite or not (run_dir / "README.md").is_file():
        write_card(run_dir)
    if overwrite or not (run_dir / "report.html").is_file():
        write_report(run_dir)
