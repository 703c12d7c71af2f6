"""What the page of a run that learned a task has of its own: its scores beside what needs no model, and their curve."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from nextword.reporting.charts import Points, score_curve, small_curve, training_curve
from nextword.reporting.run_data import (
    Run,
    at,
    duration,
    escaped,
    figure,
    headline,
    is_number,
    mapping,
    named_values,
    section,
    short_count,
    table,
)
from nextword.reporting.task_results import (
    METRICS,
    MODEL,
    Measured,
    Outcome,
    base_name,
    columns_in_words,
    forgetting_in_words,
)

TEXT_TASKS = ("continue", "chat", "rewrite")  # those whose training and validation loss are one quantity
UNEVEN = 2.0  # labels are shown one by one where the commonest is so many times as common as the rarest
SHOWN_LABELS = 20


def tuned_headline(run: Run) -> str:
    """The largest numbers: the task's score beside the best rule's, and how little it took."""
    outcome, facts = Outcome.of(run), run.facts
    metric, model = METRICS[outcome.metric], outcome.model
    on = f" on {model.n:,} examples" if model and model.n else ""
    interval = model and model.interval(outcome.metric)
    note = f"{interval}{on} (95 % interval)" if interval else metric.meaning
    numbers: list[tuple[str, Any, Any]] = [(metric.name, model and model.shown(outcome.metric), note)]
    if outcome.best_rule is not None:
        name, rule = outcome.best_rule
        between = rule.interval(outcome.metric)
        numbers.append(("without a model", rule.shown(outcome.metric), f"{name}{f', {between}' if between else ''}"))
    if outcome.before is not None:
        between = outcome.before.interval(outcome.metric)
        numbers.append(("before", outcome.before.shown(outcome.metric), between or "the model that it began with"))
    examples, held_out = (at(facts, "data", part, "examples") for part in ("train", "validation"))
    if is_number(examples):
        apart = f"; {held_out:,} held out" if is_number(held_out) else ""
        numbers.append(("examples", f"{examples:,}", f"to learn from{apart}"))
    elif tokens := run.last("tokens"):
        numbers.append(("tokens seen", short_count(tokens), "in training, repeats counted"))
    parameters, trained = facts.get("parameters"), facts.get("trained_parameters", facts.get("parameters"))
    if is_number(parameters) and is_number(trained):
        note = "all of them trained" if trained == parameters else f"were trained, of {short_count(parameters)}"
        numbers.append(("parameters", short_count(trained), note))
    seconds = at(run.result, "seconds")
    seconds = seconds if is_number(seconds) else run.last("seconds")
    numbers.append(("time", seconds and duration(seconds), "from start to end"))
    return headline(numbers)


# ---------------------------------------------------------------- the scores


def tuned_scores(run: Run) -> str:
    """How well it does the task: in words, drawn and as numbers; what was forgotten; the labels where they are uneven."""
    outcome = Outcome.of(run)
    metric = METRICS[outcome.metric]
    words = (
        f"{outcome.in_words()} {metric.name[0].upper()}{metric.name[1:]} is {metric.meaning}." if outcome.model else ""
    )
    forgotten = forgetting_in_words(run)
    parts = [
        f"<p>{escaped(words)}</p>" if words else "",
        dot_plot(outcome),
        scores_table(outcome),
        f"<p>{escaped(forgotten)}</p>" if forgotten else "",
    ]
    return section("How well it does", "".join(parts), any(parts)) + labels_section(run)


def dot_plot(outcome: Outcome) -> str:
    """The metric as dots on one axis, each with its interval: the model, before, the rules. Nothing where it would be one
    dot without an interval."""
    rows = outcome.rows
    ends = [x for _, one in rows for x in (one.value, one.low, one.high) if x is not None]
    if len(ends) < 2:
        return ""
    low, high = min(ends), max(ends)
    if 0 < low < 0.6 * high:
        low = 0.0
    ticks = [float(x) for x in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)]
    first, last = ticks[0], ticks[-1]

    def place(value: float) -> str:
        return f"{100 * (value - first) / (last - first):.2f}%"

    lines = "".join(f'<u style="left:{place(tick)}"></u>' for tick in ticks)
    drawn = []
    for who, one in rows:
        bar = ""
        if one.low is not None and one.high is not None:
            width = f"{100 * (one.high - one.low) / (last - first):.2f}%"
            bar = f'<i style="left:{place(one.low)};width:{width}"></i>'
        strip = f'<span class="strip">{lines}{bar}<b style="left:{place(one.value)}"></b></span>'
        kind = ' class="own"' if who == MODEL else ""
        drawn.append(
            f'<div{kind}><span>{escaped(who)}</span>{strip}<span class="number">{one.shown(outcome.metric)}</span></div>'
        )
    axis = "".join(f'<em style="left:{place(tick)}">{tick + 0.0:g}</em>' for tick in ticks)
    drawn.append(f'<div class="axis"><span></span><span class="strip">{axis}</span><span></span></div>')
    said = "; ".join(f"{who} {in_words(one, outcome.metric)}" for who, one in rows)
    name = METRICS[outcome.metric].name
    picture = f'<div class="dots">{"".join(drawn)}</div>'
    return figure(picture, f"{name}: {said}.", f"{escaped(name)} on held-out examples, with 95 % intervals")


def in_words(one: Measured, metric: str) -> str:
    interval = one.interval(metric)
    return f"{one.shown(metric)} ({interval})" if interval else one.shown(metric)


def scores_table(outcome: Outcome) -> str:
    """All scores of all who were scored: a row a score, a column for the model, before, and each rule."""
    if len(outcome.by_who) * len(outcome.names) < 2:
        return ""
    head = "".join(f'<th scope="col">{escaped(who)}</th>' for who in outcome.by_who)
    rows = []
    for name in outcome.names:
        cells = (score_cell(scores.get(name), name) for scores in outcome.by_who.values())
        rows.append(f'<tr><th scope="row">{escaped(METRICS[name].name)}</th>{"".join(cells)}</tr>')
    return (
        f'<table class="scores"><caption>Every score, and its 95 % interval</caption><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def score_cell(one: Measured | None, metric: str) -> str:
    """A table's cell with a score and its interval under it."""
    if one is None:
        return "<td>–</td>"
    interval = one.interval(metric)
    return f"<td>{one.shown(metric)}{f'<small>{interval}</small>' if interval else ''}</td>"


def label_counts(run: Run) -> list[tuple[str, int]]:
    """How often each label occurs in the examples to learn from, the commonest first."""
    counts = [(str(label), int(n)) for label, n in mapping(at(run.facts, "data", "labels")).items() if is_number(n)]
    return sorted((one for one in counts if one[1] >= 0), key=lambda one: (-one[1], one[0]))


def uneven(counts: Sequence[tuple[str, int]]) -> bool:
    return len(counts) > 1 and counts[0][1] >= UNEVEN * counts[-1][1]


def labels_section(run: Run) -> str:
    counts = label_counts(run)
    if not uneven(counts):
        return ""
    widest = max(1, counts[0][1])
    rows = [
        f'<tr><th scope="row">{escaped(label)}</th>'
        f'<td><span style="width:{100 * n / widest:.1f}%"></span></td><td>{n:,}</td></tr>'
        for label, n in counts
    ]
    shown, others = rows[:SHOWN_LABELS], rows[SHOWN_LABELS:]
    balanced = run.facts.get("metric") == "macro_f1"
    (common, most), (rare, least) = counts[0], counts[-1]
    said = f"The commonest label, {common}, has {most:,} examples; the rarest, {rare}, has {least:,}."
    if balanced:
        said += " So rare labels counted more in training, and macro-F1 decided which weights were kept."
    content = f"<p>{escaped(said)}</p>{bars(shown)}"
    if others:
        content += f"<details><summary>{len(others):,} more labels</summary>{bars(others)}</details>"
    return section("The labels", content)


def bars(rows: Sequence[str]) -> str:
    caption = "Examples to learn from, by label"
    return f'<table class="bars"><caption>{caption}</caption><tbody>{"".join(rows)}</tbody></table>'


# ---------------------------------------------------------------- the curves


def task_curves(run: Run) -> list[str]:
    """The score by step and, where they are two quantities, the loss on held-out examples and the one in training."""
    outcome, curves = Outcome.of(run), []
    points = run.series("validation", outcome.metric)
    if len(points) > 1 and outcome.metric not in ("loss", "bits_per_byte"):
        name = METRICS[outcome.metric].name
        words = (
            f"{name}: {points[0][1]:.3g} at step {points[0][0]:,.0f}, {points[-1][1]:.3g} at step {points[-1][0]:,.0f}."
        )
        caption = f"{escaped(name)} on the held-out examples that were looked at on the way"
        rule = outcome.best_rule and (outcome.best_rule[0], outcome.best_rule[1].value)
        curves.append(figure(score_curve(points, rule, "small-score"), words, caption))
    if run.task in TEXT_TASKS:
        return curves
    if len(points := run.series("validation", "loss")) > 1:
        caption = f"Loss on held-out examples: {held_out_loss(run)}"
        curves.append(figure(small_curve(points, "small-validation"), ends_in_words(caption, points), caption))
    if len(points := run.series("loss")) > 1:
        caption = f"Loss in training: {training_loss(run)}"
        curves.append(figure(training_curve(points, "small-training"), ends_in_words(caption, points), caption))
    return curves


def ends_in_words(caption: str, points: Points) -> str:
    return f"{caption}: from {points[0][1]:.3g} to {points[-1][1]:.3g}."


def held_out_loss(run: Run) -> str:
    """What the loss on held-out examples is, by the kind of the task."""
    return {
        "label": "nats per example",
        "labels": "binary cross-entropy, nats per label",
        "score": "squared error",
        "choice": "nats per example",
        "preference": "nats per token of the chosen answer",
    }.get(str(at(run.facts, "task", "kind")), "nats per token")


def training_loss(run: Run) -> str:
    """What the training minimised; it may hold the next-word loss too, so that it is no longer that of held-out examples."""
    if at(run.facts, "task", "kind") == "preference":
        return "DPO's, which begins at ln 2 = 0.693"
    weight = at(run.facts, "tuning", "auxiliary")
    if is_number(weight) and weight > 0:
        return f"the task's and {weight:g} of the next-word loss"
    return "the task's"


def looks_table(run: Run) -> str:
    """The numbers of the looks at held-out examples: step, score, loss."""
    metric = Outcome.of(run).metric
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


def task_facts(run: Run) -> dict[str, Any]:
    """What was learned, from what and how, a value a name; what is not known is left out."""
    facts, labels = run.facts, at(run.facts, "task", "labels")
    counts = label_counts(run)
    columns = mapping(at(facts, "task", "columns"))
    rank = at(facts, "tuning", "rank")
    lora = f"LoRA of rank {int(rank)}" if is_number(rank) else "LoRA"
    weights = lora if at(facts, "recipe", "lora") else "all weights"
    known: dict[str, Any] = {
        "task": run.task,
        "began with": base_name(run),
        "columns": columns_in_words(columns) if columns else None,
        "labels": len(labels) if isinstance(labels, list) and labels else None,
        "trained": f"{weights}, from scratch" if at(facts, "recipe", "scratch") else weights,
        "trained parameters": facts.get("trained_parameters"),
    }
    if counts and not uneven(counts):
        known["examples of a label"] = f"{counts[-1][1]:,} to {counts[0][1]:,}"
    return {name: value for name, value in known.items() if value is not None}


def tuned_tables(run: Run) -> str:
    """The facts; scores, labels and forgetting, which have their own place, left out, and paths of the machine too."""
    facts = run.facts
    kept = ("steps", "best_step", "tokens", "loss", "perplexity", "bits_per_byte", "validation_tokens")
    outcome = {key: run.result[key] for key in kept if is_number(run.result.get(key))}
    if is_number(seconds := run.result.get("seconds")):
        outcome["time"] = duration(seconds)
    data: Mapping[str, Any] = mapping(facts.get("data"))
    tables = {
        "Outcome": outcome,
        "Task": task_facts(run),
        "Data": {key: value for key, value in data.items() if key != "labels"},
        "Model": {"parameters": facts.get("parameters"), **mapping(facts.get("model"))},
        "Training": mapping(facts.get("training")),
        "Fine-tuning": mapping(facts.get("tuning")),
        "Machine": mapping(facts.get("machine")),
        "Versions": mapping(facts.get("versions")),
    }
    rows = {caption: named_values(values) for caption, values in tables.items()}
    parts = [table(caption, some) for caption, some in rows.items() if some]
    return section("The facts", f'<div class="tables">{"".join(parts)}</div>', bool(parts))
