"""A run folder as one page that can be sent to somebody (`report.html`), and as a model card (`README.md`): how it learned, and
everything that was measured on it.

Only the run folder's files are read. The page is self-contained: no script, no outside address. Everything that came from a
corpus or a model is escaped, for a sample may hold anything.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError
from nextword.common.fs import write_durably
from nextword.common.results import Measurements
from nextword.reporting.card import is_own_card, write_card
from nextword.reporting.charts import Points, loss_curve, small_curve, smoothed
from nextword.reporting.finetune_sections import (
    TEXT_TASKS,
    looks_table,
    task_curves,
    tuned_headline,
    tuned_scores,
    tuned_tables,
)
from nextword.reporting.label_efficiency_page import transfer_page
from nextword.reporting.results_sections import measured_sections
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
    perplexity,
    readable,
    section,
    short_count,
    table,
)
from nextword.reporting.task_results import base_name, name_of
from nextword.reporting.templates import FOOTER, MEASURED_STYLE, PAGE, STYLE, TASK_STYLE

__all__ = ["refresh", "renew", "write_card", "write_report"]

SHOWN_SAMPLES = 8  # steps whose samples are shown at once; the others can be unfolded


def write_report(run: Path) -> Path:
    """Write RUN/report.html from RUN/run.json, metrics.jsonl, result.json and measured/; its path.

    Raises:
        NextwordError: not a run folder, or a `transfer` that is not finished.
        CorruptFile: a file of it is damaged.
    """
    data = Run.read(run)
    if data.facts.get("task") == "transfer":
        return _transfer_report(run, data)
    command, tuned = data.facts.get("command"), data.task is not None
    measured = measured_sections(Measurements.read(run))
    parts = [
        _learning(data),
        "" if tuned else _plan(data),
        measured,
        _samples(data),
        tuned_tables(data) if tuned else _tables(data),
        section("The command", f"<pre><code>{escaped(command)}</code></pre>", bool(command)),
        _messages(data),
    ]
    page = PAGE.substitute(
        title=escaped(data.name),
        footer=FOOTER,
        kind="training report",
        heading=escaped(data.name),
        subtitle=_subtitle(data),
        headline=f"<dl>\n{tuned_headline(data) if tuned else _headline(data)}\n</dl>\n",
        parts="\n".join([tuned_scores(data), *parts] if tuned else parts),
        style=STYLE + (TASK_STYLE if tuned or measured else "") + (MEASURED_STYLE if measured else ""),
    )
    write_durably(run / "report.html", page)
    return run / "report.html"


def renew(run: Path) -> Path:
    """Write the report anew, and the card with it where it is ours or gone; the report's path."""
    page = write_report(run)
    data = Run.read(run)
    if data.facts.get("task") != "transfer" and (is_own_card(run / "README.md") or not (run / "README.md").exists()):
        write_card(run)
    return page


def refresh(run: Path, say: Callable[[str], None]) -> None:
    """Draw a run's report and card anew after something was measured on it. One that a person has changed, or has taken away,
    stays so; what is changed is said."""
    if (run / "report.html").is_file() and FOOTER in (run / "report.html").read_text(
        encoding="utf-8", errors="replace"
    ):
        write_report(run)
    card = run / "README.md"
    if is_own_card(card):
        write_card(run)
    elif card.is_file():
        say(
            f"{card}: somebody has changed it, so it stays as it is; without it, nextword report {run} writes a new one"
        )


def _transfer_report(folder: Path, run: Run) -> Path:
    """The page of `nextword transfer`, once more."""
    result, facts = run.result, mapping(run.facts.get("request"))
    if not result:
        raise NextwordError(
            f"{folder}: this comparison is not finished, and its page comes with its end. Go on with it by --resume"
        )
    data = facts.get("data")
    names = {"model": facts.get("model"), "data": data[0] if isinstance(data, list) and data else None}
    shown_names = {key: name_of(value) if isinstance(value, str) else key for key, value in names.items()}
    return transfer_page(folder, {**result, **shown_names, "command": str(run.facts.get("command") or "")})


# ---------------------------------------------------------------- the parts of the page


def _subtitle(run: Run) -> str:
    steps = max((step for step, _ in run.series("loss")), default=0)
    state = "finished" if run.result else f"not finished: at step {steps:,.0f}" if steps else "not started"
    created = str(run.facts.get("created") or "")[:16].replace("T", " ")
    base = base_name(run) if run.task else None
    what = (run.task, base and f"from {base}") if run.task else (run.facts.get("preset"), run.facts.get("size"))
    parts = (*what, state, created)
    return " · ".join(escaped(part) for part in parts if part)


def _headline(run: Run) -> str:
    loss, seconds, tokens = run.loss, at(run.result, "seconds"), run.last("tokens")
    seconds = seconds if is_number(seconds) else run.last("seconds")
    parameters = run.facts.get("parameters")
    numbers = [
        ("validation loss", loss and f"{loss:.3f}", loss and f"nats per token · perplexity {perplexity(loss)}"),
        ("bits per byte", run.bits_per_byte and f"{run.bits_per_byte:.3f}", "of the validation text"),
        ("parameters", is_number(parameters) and short_count(parameters), "numbers that were trained"),
        ("tokens seen", tokens and short_count(tokens), "in training, repeats counted"),
        ("time", seconds and duration(seconds), "from start to end"),
    ]
    return headline(numbers)


def _learning(run: Run) -> str:
    tuned = run.task not in (None, *TEXT_TASKS)
    whole, small = "" if tuned else _loss_figure(run), task_curves(run) if run.task else []
    for name, caption in (
        ("lr", "Learning rate"),
        ("gradient_norm", "Gradient norm, before it is clipped"),
        ("tokens_per_second", "Tokens per second"),
    ):
        if points := run.series(name):
            low, high, end = min(y for _, y in points), max(y for _, y in points), points[-1][1]
            words = f"{caption}: between {low:.3g} and {high:.3g}, {end:.3g} at the end."
            small.append(figure(small_curve(points, f"small-{name}", zero=True), words, caption))
    by_position = run.result.get("by_position") or at(run.facts, "evaluation", "by_position")
    if isinstance(by_position, list) and len(by_position) > 1 and all(map(is_number, by_position)):
        points = [(float(position), loss) for position, loss in enumerate(by_position, start=1)]
        words = (
            f"Validation loss by position: {points[0][1]:.2f} at the first, {smoothed(points)[-1][1]:.2f} at the last."
        )
        picture = small_curve(points, "small-position", x_label="position in the window", log=True)
        small.append(figure(picture, words, "Validation loss by position: how much the words before help"))
    grid = f'<div class="grid">{"".join(small)}</div>' if small else ""
    return section("How it learned", whole + grid + (looks_table(run) if tuned else ""), bool(whole or small))


def _loss_figure(run: Run) -> str:
    train, validation = run.series("loss"), run.series("validation", "loss")
    if not train and not validation:
        return ""
    bits = dict(run.series("validation", "bits_per_byte"))
    ratio = next((bits[step] / loss for step, loss in validation if loss and bits.get(step)), None)
    wide, narrow = (loss_curve(train, validation, ratio, wide=wide) for wide in (True, False))
    picture = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    caption = (
        "Training loss at each step (faint) and smoothed, and the loss on text that was held out. Lower is better."
    )
    return figure(picture, _loss_in_words(train, validation), caption) + _validation_table(run)


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


def _plan(run: Run) -> str:
    """What was expected, and what came."""
    plan, result = mapping(run.facts.get("plan")), run.result
    if not plan or not result:
        return ""
    low, high, bits = (plan.get(name) for name in ("low", "high", "bits_per_byte"))
    came = result.get("bits_per_byte")
    budget = at(run.facts, "recipe", "budget")
    rows: list[tuple[str, Any, Any, Callable[[float], str]]] = [
        ("bits per byte", bits, came, lambda value: f"{value:.3f}"),
        ("tokens", plan.get("tokens"), result.get("tokens"), short_count),
        ("time", budget if is_number(budget) else plan.get("seconds"), result.get("seconds"), duration),
        ("memory", plan.get("memory_bytes"), result.get("memory_bytes"), lambda value: f"{value / 1e9:.2f} GB"),
    ]
    shown = "".join(
        f'<tr><th scope="row">{name}</th><td>{form(before)}</td><td>{form(after)}</td>'
        f"<td>{100 * (after / before - 1):+.1f} %</td></tr>".replace("-", "−")
        for name, before, after, form in rows
        if is_number(before) and is_number(after) and before > 0
    )
    why = "".join(f"<li>{escaped(line)}</li>" for line in plan.get("why") or () if isinstance(line, str))
    said = ""
    if is_number(low) and is_number(high) and is_number(came):
        inside = "inside" if low <= came <= high else "outside"
        expected = f"between {low:.3f} and {high:.3f} bits per byte"
        said = f"<p>Four runs in five were expected to end {expected}; this one is {inside}.</p>"
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "planned", "came", "off by"))
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{shown}</tbody></table>'
    return section("The plan, and what came of it", f"<ul>{why}</ul>{table}{said}", bool(shown))


def _samples(run: Run) -> str:
    by_step: dict[Any, list[dict[str, Any]]] = {}
    for record in run.records:
        if isinstance(record.get("sample"), dict):
            by_step.setdefault(record.get("step"), []).append(record["sample"])
    items = [
        f"<li><h3>{escaped(readable(step))}</h3><div>{_quotes(samples)}</div></li>" for step, samples in by_step.items()
    ]
    spread = {round(i * (len(items) - 1) / (SHOWN_SAMPLES - 1)) for i in range(SHOWN_SAMPLES)}
    shown = [item for i, item in enumerate(items) if i in spread]
    others = [item for i, item in enumerate(items) if i not in spread]
    more = f"<details><summary>{len(others)} more</summary><ol>{''.join(others)}</ol></details>" if others else ""
    what = "How the model went on" if run.task in (None, "continue") else "What the model answered"
    intro = f"<p>{what} as it learned. The number is the step; the prompt is set in bold.</p>"
    return section("What it wrote", f'{intro}<ol class="samples">{"".join(shown)}</ol>{more}', bool(items))


def _quotes(samples: Iterable[Mapping[str, Any]]) -> str:
    return "".join(
        f'<blockquote dir="auto"><b>{escaped(sample.get("prompt") or "")}</b>{escaped(sample.get("text") or "")}</blockquote>'
        for sample in samples
    )


def _tables(run: Run) -> str:
    facts = run.facts
    about = {key: facts[key] for key in ("preset", "size", "parameters") if key in facts}
    outcome = {key: value for key, value in run.result.items() if key not in ("by_position", "seconds")}
    if is_number(seconds := run.result.get("seconds")):
        outcome["time"] = duration(seconds)
    if is_number(memory := outcome.pop("memory_bytes", None)):
        outcome["memory"] = f"{memory / 1e9:.2f} GB"
    if energy := mapping(outcome.pop("energy", None)):
        outcome["energy"] = f"{energy.get('watt_hours')} Wh, {'measured' if energy.get('measured') else 'estimated'}"
    if not outcome and run.best:
        outcome = {"best validation loss": run.best[1], "best step": run.best[0]}
    tables = {
        "Outcome": outcome,
        "Model": {**about, **mapping(facts.get("model"))},
        "Data": mapping(facts.get("data")),
        "Training": mapping(facts.get("training")),
        "Machine": mapping(facts.get("machine")),
        "Versions": mapping(facts.get("versions")),
    }
    parts = [table(caption, named_values(values)) for caption, values in tables.items() if values]
    return section("The facts", f'<div class="tables">{"".join(parts)}</div>', bool(parts))


def _messages(run: Run) -> str:
    lines = [(record.get("step"), record["message"]) for record in run.records if "message" in record]
    items = "".join(f"<li><b>{escaped(readable(step))}</b> {escaped(message)}</li>" for step, message in lines)
    return section("What was said on the way", f'<ul class="messages">{items}</ul>', bool(lines))
