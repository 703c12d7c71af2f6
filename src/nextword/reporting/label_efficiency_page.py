"""The page of `nextword transfer`: what pre-training is worth in labels, as one plot, one sentence and one table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError
from nextword.common.fs import write_durably
from nextword.reporting.charts import Line, transfer_plot
from nextword.reporting.finetune_sections import in_words, score_cell
from nextword.reporting.run_data import at, duration, escaped, figure, is_number, mapping, section
from nextword.reporting.task_results import LOWER_IS_BETTER, METRICS, Measured, as_score
from nextword.reporting.templates import FOOTER, PAGE, STYLE, TASK_STYLE

KINDS = {"pretrained": "pre-trained", "scratch": "from scratch"}


def transfer_page(folder: Path, facts: dict[str, Any]) -> Path:
    """Write FOLDER/report.html; its path.

    Args:
        facts: `task`, `metric`, `higher_is_better`, `model` and `data` (names), `sentence`, `command`;
            `points`: {"examples", "pretrained", "scratch"}, each of the last two {"value", "low", "high", "n"};
            `baselines`: rule → {"value", …}; `cells`: {"examples", "seed", "pretrained", "score", "seconds"}.
            What is missing is left out, but points there must be.

    Raises:
        NextwordError: no point with its two scores, or a score that has no name here.
    """
    metric, points = facts.get("metric"), read_points(facts)
    if metric not in METRICS or not points:
        raise NextwordError(f"{folder}: this comparison has no scores to be drawn (of {metric}); run it once more")
    sentence = str(facts.get("sentence") or "What pre-training is worth")
    named = [f"{facts[key]}" for key in ("task", "model", "data") if facts.get(key)]
    page = PAGE.substitute(
        title=escaped(folder.resolve().name),
        kind="what pre-training is worth",
        footer=FOOTER,
        heading=f'<span class="sentence">{escaped(sentence)}</span>',
        subtitle=" · ".join(escaped(part) for part in named),
        headline="",
        parts="\n".join(
            [
                plot_section(facts, metric, points),
                table_section(facts, metric, points),
                section(
                    "The command",
                    f"<pre><code>{escaped(facts.get('command'))}</code></pre>",
                    bool(facts.get("command")),
                ),
            ]
        ),
        style=STYLE + TASK_STYLE,
    )
    write_durably(folder / "report.html", page)
    return folder / "report.html"


Points = list[tuple[int, dict[str, Measured]]]


def read_points(facts: Mapping[str, Any]) -> Points:
    """(examples, {"pretrained": …, "scratch": …}) by the number of examples; those without both scores left out."""
    found: Points = []
    for point in facts.get("points") or []:
        count = at(point, "examples")
        scores = {kind: Measured.read(at(point, kind)) for kind in KINDS}
        both = {kind: one for kind, one in scores.items() if one is not None}
        if is_number(count) and count > 0 and len(both) == len(KINDS):
            found.append((int(count), both))
    return sorted(found, key=lambda point: point[0])


def read_rules(facts: Mapping[str, Any]) -> list[tuple[str, Measured]]:
    found = [(str(name), Measured.read(value)) for name, value in mapping(facts.get("baselines")).items()]
    return [(name, one) for name, one in found if one is not None]


def read_cells(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    cells = [mapping(cell) for cell in facts.get("cells") or []]
    return [cell for cell in cells if is_number(cell.get("score")) and is_number(cell.get("examples"))]


def higher_is_better(facts: Mapping[str, Any], metric: str) -> bool:
    told = facts.get("higher_is_better")
    return told if isinstance(told, bool) else metric not in LOWER_IS_BETTER


def plot_section(facts: Mapping[str, Any], metric: str, points: Points) -> str:
    cells, rules = read_cells(facts), read_rules(facts)
    lines = []
    for kind, name in KINDS.items():
        dots = [
            (float(c["examples"]), float(c["score"]))
            for c in cells
            if bool(c.get("pretrained")) == (kind == "pretrained")
        ]
        measured = [(float(count), scores[kind]) for count, scores in points]
        ends = [
            (x, one.value, *((one.value, one.value) if one.low is None or one.high is None else (one.low, one.high)))
            for x, one in measured
        ]
        lines.append(Line(name, ends, dots))
    values = [(name, rule.value) for name, rule in rules]
    label = METRICS[metric].name
    wide, narrow = (transfer_plot(lines[0], lines[1], values, label, wide=wide) for wide in (True, False))
    picture = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    seeds = max(one.n or 1 for _, scores in points for one in scores.values())
    of = f", the mean of {seeds} seeds with its 95 % interval. Each dot is one run" if seeds > 1 else ""
    better = "Higher is better" if higher_is_better(facts, metric) else "Lower is better"
    caption = f"{label[0].upper()}{label[1:]}: {METRICS[metric].meaning}{of}. {better}."
    said = [
        f"{count:,} examples: {', '.join(f'{KINDS[kind]} {in_words(one, metric)}' for kind, one in scores.items())}"
        for count, scores in points
    ]
    said += [f"{name}, without a model: {in_words(rule, metric)}" for name, rule in rules]
    return section("By number of labels", figure(picture, f"{label}. {'; '.join(said)}.", escaped(caption)))


def table_section(facts: Mapping[str, Any], metric: str, points: Points) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("labels", *KINDS.values(), "ahead by"))
    sign = 1 if higher_is_better(facts, metric) else -1
    rows = []
    for count, scores in points:
        ahead = sign * (scores["pretrained"].value - scores["scratch"].value)
        cells = "".join(score_cell(scores[kind], metric) for kind in KINDS)
        rows.append(f'<tr><th scope="row">{count:,}</th>{cells}<td>{as_score(ahead, metric, "+")}</td></tr>')
    rules = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>{score_cell(rule, metric)}</tr>' for name, rule in read_rules(facts)
    )
    tables = numbers(f"{METRICS[metric].name}, by labels to learn from", head, "".join(rows))
    if rules:
        tables += numbers(
            "Without a model", f'<th scope="col">rule</th><th scope="col">{METRICS[metric].name}</th>', rules
        )
    return section("The numbers", tables + every_run(facts, metric))


def every_run(facts: Mapping[str, Any], metric: str) -> str:
    cells = sorted(read_cells(facts), key=lambda c: (c["examples"], not c.get("pretrained"), str(c.get("seed"))))
    rows = "".join(
        f'<tr><th scope="row">{int(cell["examples"]):,}</th><td>{escaped(cell.get("seed", "–"))}</td>'
        f"<td>{KINDS['pretrained' if cell.get('pretrained') else 'scratch']}</td>"
        f"<td>{Measured(float(cell['score'])).shown(metric)}</td>"
        f"<td>{duration(cell['seconds']) if is_number(cell.get('seconds')) else '–'}</td></tr>"
        for cell in cells
    )
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("labels", "seed", "weights", METRICS[metric].name, "time")
    )
    return f"<details><summary>Each of the {len(cells)} runs</summary>{numbers('Every run', head, rows)}</details>"


def numbers(caption: str, head: str, rows: str) -> str:
    return (
        f'<table class="scores"><caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
