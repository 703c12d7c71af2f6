"""What the page of a run that learned a task has of its own: its scores beside what needs no model, and their curve."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from nextword.reporting.charts import Points, plot_metric, plot_score, plot_training_loss
from nextword.reporting.run_data import (
    RunData,
    as_mapping,
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
from nextword.reporting.task_results import (
    METRICS,
    THIS_MODEL,
    ScoreWithCI,
    TaskResults,
    base_model_name,
    format_columns,
    format_forgetting,
)

LM_LOSS_TASKS = ("continue", "chat", "rewrite")  # those whose training and validation loss are one quantity
IMBALANCE_RATIO = 2.0  # labels are shown one by one where the commonest is so many times as common as the rarest
MAX_SHOWN_LABELS = 20


def finetune_headline(run: RunData) -> str:
    """The largest numbers: the task's score beside the best rule's, and how little it took."""
    results, metadata = TaskResults.from_run(run), run.metadata
    metric, model_score = METRICS[results.metric], results.model_score
    sample_text = f" on {model_score.n:,} examples" if model_score and model_score.n else ""
    interval = model_score and model_score.format_interval(results.metric)
    note = f"{interval}{sample_text} (95 % interval)" if interval else metric.description
    numbers: list[tuple[str, Any, Any]] = [
        (metric.name, model_score and model_score.format_value(results.metric), note)
    ]
    if results.best_baseline is not None:
        name, baseline = results.best_baseline
        interval_text = baseline.format_interval(results.metric)
        numbers.append(
            (
                "without a model",
                baseline.format_value(results.metric),
                f"{name}{f', {between}' if interval_text else ''}",
            )
        )
    if results.score_before is not None:
        interval_text = results.score_before.format_interval(results.metric)
        numbers.append(
            (
                "before",
                results.score_before.format_value(results.metric),
                interval_text or "the model that it began with",
            )
        )
    examples, validation_examples = (get_nested(metadata, "data", part, "examples") for part in ("train", "validation"))
    if is_number(examples):
        held_out_note = f"; {validation_examples:,} held out" if is_number(validation_examples) else ""
        numbers.append(("examples", f"{examples:,}", f"to learn from{held_out_note}"))
    elif tokens := run.last_value("tokens"):
        numbers.append(("tokens seen", format_count(tokens), "in training, repeats counted"))
    parameters, trained = metadata.get("parameters"), metadata.get("trained_parameters", metadata.get("parameters"))
    if is_number(parameters) and is_number(trained):
        note = "all of them trained" if trained == parameters else f"were trained, of {format_count(parameters)}"
        numbers.append(("parameters", format_count(trained), note))
    seconds = get_nested(run.result, "seconds")
    seconds = seconds if is_number(seconds) else run.last_value("seconds")
    numbers.append(("time", seconds and format_duration(seconds), "from start to end"))
    return render_headline(numbers)


# ---------------------------------------------------------------- the scores


def finetune_scores_section(run: RunData) -> str:
    """How well it does the task: in words, drawn and as numbers; what was forgotten; the labels where they are uneven."""
    results = TaskResults.from_run(run)
    metric = METRICS[results.metric]
    summary = (
        f"{results.summary_lines()} {metric.name[0].upper()}{metric.name[1:]} is {metric.description}."
        if results.model_score
        else ""
    )
    forgotten = format_forgetting(run)
    parts = [
        f"<p>{format_count(summary)}</p>" if summary else "",
        dot_plot(results),
        scores_table(results),
        f"<p>{format_count(forgotten)}</p>" if forgotten else "",
    ]
    return render_section("How well it does", "".join(parts), any(parts)) + labels_section(run)


def dot_plot(results: TaskResults) -> str:
    """The metric as dots on one axis, each with its interval: the model, before, the rules. Nothing where it would be one
    dot without an interval."""
    rows = results.metric_scores
    ends = [x for _, score in rows for x in (score.value, score.low, score.high) if x is not None]
    if len(ends) < 2:
        return ""
    low, high = min(ends), max(ends)
    if 0 < low < 0.6 * high:
        low = 0.0
    ticks = [float(x) for x in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)]
    first, last = ticks[0], ticks[-1]

    def to_percent(value: float) -> str:
        return f"{100 * (value - first) / (last - first):.2f}%"

    gridlines = "".join(f'<u style="left:{to_percent(tick)}"></u>' for tick in ticks)
    plot_rows = []
    for system, score in rows:
        bar = ""
        if score.low is not None and score.high is not None:
            width = f"{100 * (score.high - score.low) / (last - first):.2f}%"
            bar = f'<i style="left:{to_percent(score.low)};width:{width}"></i>'
        strip = f'<span class="strip">{gridlines}{bar}<b style="left:{to_percent(score.value)}"></b></span>'
        kind = ' class="own"' if system == THIS_MODEL else ""
        plot_rows.append(
            f'<div{kind}><span>{format_count(system)}</span>{strip}<span class="number">{score.format_value(results.metric)}</span></div>'
        )
    axis = "".join(f'<em style="left:{to_percent(tick)}">{tick + 0.0:g}</em>' for tick in ticks)
    plot_rows.append(f'<div class="axis"><span></span><span class="strip">{axis}</span><span></span></div>')
    alt_text = "; ".join(f"{system} {format_score_with_ci(score, results.metric)}" for system, score in rows)
    name = METRICS[results.metric].name
    picture = f'<div class="dots">{"".join(plot_rows)}</div>'
    return render_figure(
        picture, f"{name}: {alt_text}.", f"{format_count(name)} on held-out examples, with 95 % intervals"
    )


def format_score_with_ci(score: ScoreWithCI, metric: str) -> str:
    interval = score.format_interval(metric)
    return f"{score.format_value(metric)} ({interval})" if interval else score.format_value(metric)


def scores_table(results: TaskResults) -> str:
    """All scores of all who were scored: a row a score, a column for the model, before, and each rule."""
    if len(results.by_system) * len(results.metric_names) < 2:
        return ""
    head = "".join(f'<th scope="col">{format_count(who)}</th>' for who in results.by_system)
    rows = []
    for name in results.metric_names:
        cells = (score_cell(scores.get(name), name) for scores in results.by_system.values())
        rows.append(f'<tr><th scope="row">{format_count(METRICS[name].name)}</th>{"".join(cells)}</tr>')
    return (
        f'<table class="scores"><caption>Every score, and its 95 % interval</caption><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def score_cell(score: ScoreWithCI | None, metric: str) -> str:
    """A table's cell with a score and its interval under it."""
    if score is None:
        return "<td>–</td>"
    interval = score.format_interval(metric)
    return f"<td>{score.format_value(metric)}{f'<small>{interval}</small>' if interval else ''}</td>"


def label_counts(run: RunData) -> list[tuple[str, int]]:
    """How often each label occurs in the examples to learn from, the commonest first."""
    counts = [
        (str(label), int(n))
        for label, n in as_mapping(get_nested(run.metadata, "data", "labels")).items()
        if is_number(n)
    ]
    return sorted((one for one in counts if one[1] >= 0), key=lambda one: (-one[1], one[0]))


def is_imbalanced(counts: Sequence[tuple[str, int]]) -> bool:
    return len(counts) > 1 and counts[0][1] >= IMBALANCE_RATIO * counts[-1][1]


def labels_section(run: RunData) -> str:
    counts = label_counts(run)
    if not is_imbalanced(counts):
        return ""
    widest = max(1, counts[0][1])
    rows = [
        f'<tr><th scope="row">{format_count(label)}</th>'
        f'<td><span style="width:{100 * n / widest:.1f}%"></span></td><td>{n:,}</td></tr>'
        for label, n in counts
    ]
    shown, others = rows[:MAX_SHOWN_LABELS], rows[MAX_SHOWN_LABELS:]
    uses_macro_f1 = run.metadata.get("metric") == "macro_f1"
    (common, most), (rare, least) = counts[0], counts[-1]
    summary = f"The commonest label, {common}, has {most:,} examples; the rarest, {rare}, has {least:,}."
    if uses_macro_f1:
        summary += " So rare labels counted more in training, and macro-F1 decided which weights were kept."
    content = f"<p>{format_count(summary)}</p>{label_bars_table(shown)}"
    if others:
        content += f"<details><summary>{len(others):,} more labels</summary>{label_bars_table(others)}</details>"
    return render_section("The labels", content)


def label_bars_table(rows: Sequence[str]) -> str:
    caption = "Examples to learn from, by label"
    return f'<table class="bars"><caption>{caption}</caption><tbody>{"".join(rows)}</tbody></table>'


# ---------------------------------------------------------------- the curves


def finetune_curves(run: RunData) -> list[str]:
    """The score by step and, where they are two quantities, the loss on held-out examples and the one in training."""
    results, curves = TaskResults.from_run(run), []
    points = run.series("validation", results.metric)
    if len(points) > 1 and results.metric not in ("loss", "bits_per_byte"):
        name = METRICS[results.metric].name
        alt_text = (
            f"{name}: {points[0][1]:.3g} at step {points[0][0]:,.0f}, {points[-1][1]:.3g} at step {points[-1][0]:,.0f}."
        )
        caption = f"{format_count(name)} on the held-out examples that were looked at on the way"
        baseline = results.best_baseline and (results.best_baseline[0], results.best_baseline[1].value)
        curves.append(render_figure(plot_score(points, baseline, "small-score"), alt_text, caption))
    if run.task in LM_LOSS_TASKS:
        return curves
    if len(points := run.series("validation", "loss")) > 1:
        caption = f"Loss on held-out examples: {validation_loss_unit(run)}"
        curves.append(render_figure(plot_metric(points, "small-validation"), describe_range(caption, points), caption))
    if len(points := run.series("loss")) > 1:
        caption = f"Loss in training: {training_loss_name(run)}"
        curves.append(
            render_figure(plot_training_loss(points, "small-training"), describe_range(caption, points), caption)
        )
    return curves


def describe_range(caption: str, points: Points) -> str:
    return f"{caption}: from {points[0][1]:.3g} to {points[-1][1]:.3g}."


def validation_loss_unit(run: RunData) -> str:
    """What the loss on held-out examples is, by the kind of the task."""
    return {
        "label": "nats per example",
        "labels": "binary cross-entropy, nats per label",
        "score": "squared error",
        "choice": "nats per example",
        "preference": "nats per token of the chosen answer",
    }.get(str(get_nested(run.metadata, "task", "kind")), "nats per token")


def training_loss_name(run: RunData) -> str:
    """What the training minimised; it may hold the next-word loss too, so that it is no longer that of held-out examples."""
    if get_nested(run.metadata, "task", "kind") == "preference":
        return "DPO's, which begins at ln 2 = 0.693"
    weight = get_nested(run.metadata, "tuning", "auxiliary")
    if is_number(weight) and weight > 0:
        return f"the task's and {weight:g} of the next-word loss"
    return "the task's"


def validation_table(run: RunData) -> str:
    """The numbers of the looks at held-out examples: step, score, loss."""
    metric = TaskResults.from_run(run).metric
    scores, losses = dict(run.series("validation", metric)), dict(run.series("validation", "loss"))
    names = [metric] if metric != "loss" and scores else []
    rows = "".join(
        f'<tr><th scope="row">{step:,.0f}</th>'
        + "".join(f"<td>{f'{scores[step]:z.4f}' if step in scores else '–'}</td>" for _ in names)
        + f"<td>{f'{losses[step]:z.4f}' if step in losses else '–'}</td></tr>"
        for step in sorted({*scores, *losses})
    )
    if not rows:
        return ""
    columns = "".join(f'<th scope="col">{name}</th>' for name in ["step", *(METRICS[n].name for n in names), "loss"])
    table = f'<table class="numbers"><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>'
    return f"<details><summary>The numbers of the looks at held-out examples</summary>{table}</details>"


# ---------------------------------------------------------------- the facts


def task_metadata(run: RunData) -> dict[str, Any]:
    """What was learned, from what and how, a value a name; what is not known is left out."""
    metadata, labels = run.metadata, get_nested(run.metadata, "task", "labels")
    counts = label_counts(run)
    columns = as_mapping(get_nested(metadata, "task", "columns"))
    rank = get_nested(metadata, "tuning", "rank")
    adapter_text = f"LoRA of rank {int(rank)}" if is_number(rank) else "LoRA"
    trained_weights = adapter_text if get_nested(metadata, "recipe", "lora") else "all weights"
    rows: dict[str, Any] = {
        "task": run.task,
        "began with": base_model_name(run),
        "columns": format_columns(columns) if columns else None,
        "labels": len(labels) if isinstance(labels, list) and labels else None,
        "trained": f"{trained_weights}, from scratch" if get_nested(metadata, "recipe", "scratch") else trained_weights,
        "trained parameters": metadata.get("trained_parameters"),
    }
    if counts and not is_imbalanced(counts):
        rows["examples of a label"] = f"{counts[-1][1]:,} to {counts[0][1]:,}"
    return {name: value for name, value in rows.items() if value is not None}


def finetune_metadata_section(run: RunData) -> str:
    """The facts; scores, labels and forgetting, which have their own place, left out, and paths of the machine too."""
    metadata = run.metadata
    result_keys = ("steps", "best_step", "tokens", "loss", "perplexity", "bits_per_byte", "validation_tokens")
    outcome = {key: run.result[key] for key in result_keys if is_number(run.result.get(key))}
    if is_number(seconds := run.result.get("seconds")):
        outcome["time"] = format_duration(seconds)
    data: Mapping[str, Any] = as_mapping(metadata.get("data"))
    tables = {
        "Outcome": outcome,
        "Task": task_metadata(run),
        "Data": {key: value for key, value in data.items() if key != "labels"},
        "Model": {"parameters": metadata.get("parameters"), **as_mapping(metadata.get("model"))},
        "Training": as_mapping(metadata.get("training")),
        "Fine-tuning": as_mapping(metadata.get("tuning")),
        "Machine": as_mapping(metadata.get("machine")),
        "Versions": as_mapping(metadata.get("versions")),
    }
    rows = {caption: flatten_values(values) for caption, values in tables.items()}
    parts = [render_table(caption, some) for caption, some in rows.items() if some]
    return render_section("The facts", f'<div class="tables">{"".join(parts)}</div>', bool(parts))
