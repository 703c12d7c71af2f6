"""The page of `nextword transfer`: what pre-training is worth in labels, as one plot, one sentence and one table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError
from nextword.common.fs import atomic_write
from nextword.reporting.charts import ScoreCurve, plot_label_efficiency
from nextword.reporting.finetune_sections import score_cell
from nextword.reporting.run_data import (
    as_mapping,
    escape_html,
    get_nested,
    is_number,
    render_figure,
    render_section,
)
from nextword.reporting.task_results import LOWER_IS_BETTER_METRICS, METRICS, ScoreWithCI
from nextword.reporting.templates import BASE_CSS, PAGE_TEMPLATE, RUN_FOOTER, TASK_CSS

INITIALIZATIONS = {"pretrained": "pre-trained", "scratch": "from scratch"}


def write_label_efficiency_page(run_dir: Path, study: dict[str, Any]) -> Path:
    """Write FOLDER/report.html; its path.

    Args:
        facts: `task`, `metric`, `higher_is_better`, `model` and `data` (names), `sentence`, `command`;
            `points`: {"examples", "pretrained", "scratch"}, each of the last two {"value", "low", "high", "n"};
            `baselines`: rule → {"value", …}; `cells`: {"examples", "seed", "pretrained", "score", "seconds"}.
            What is missing is left out, but points there must be.

    Raises:
        NextwordError: no point with its two scores, or a score that has no name here.
    """
    metric, points = study.get("metric"), parse_points(study)
    if metric not in METRICS or not points:
        raise NextwordError(f"{run_dir}: this comparison has no scores to be drawn (of {metric}); run it once more")
    sentence = str(study.get("sentence") or "What pre-training is worth")
    subtitle_parts = [f"{study[key]}" for key in ("task", "model", "data") if study.get(key)]
    page = PAGE_TEMPLATE.substitute(
        title=escape_html(run_dir.resolve().name),
        kind="what pre-training is worth",
        footer=RUN_FOOTER,
        heading=f'<span class="sentence">{escape_html(sentence)}</span>',
        subtitle=" · ".join(escape_html(part) for part in subtitle_parts),
        headline="",
        parts="\n".join(
            [
                plot_section(study, metric, points),
                table_section(study, metric, points),
                render_section(
                    "The command",
                    f"<pre><code>{escape_html(study.get('command'))}</code></pre>",
                    bool(study.get("command")),
                ),
            ]
        ),
        style=BASE_CSS + TASK_CSS,
    )
    atomic_write(run_dir / "report.html", page)
    return run_dir / "report.html"


StudyPoints = list[tuple[int, dict[str, ScoreWithCI]]]


def parse_points(study: Mapping[str, Any]) -> StudyPoints:
    """(examples, {"pretrained": …, "scratch": …}) by the number of examples; those without both scores left out."""
    parsed: StudyPoints = []
    for point in study.get("points") or []:
        count = get_nested(point, "examples")
        scores = {kind: ScoreWithCI.parse(get_nested(point, kind)) for kind in INITIALIZATIONS}
        valid_scores = {kind: one for kind, one in scores.items() if one is not None}
        if is_number(count) and count > 0 and len(valid_scores) == len(INITIALIZATIONS):
            parsed.append((int(count), valid_scores))
    return sorted(parsed, key=lambda point: point[0])


def parse_baselines(study: Mapping[str, Any]) -> list[tuple[str, ScoreWithCI]]:
    parsed = [(str(name), ScoreWithCI.parse(value)) for name, value in as_mapping(study.get("baselines")).items()]
    return [(name, one) for name, one in parsed if one is not None]


def parse_runs(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    runs = [as_mapping(cell) for cell in study.get("cells") or []]
    return [cell for cell in runs if is_number(cell.get("score")) and is_number(cell.get("examples"))]


def is_higher_better(study: Mapping[str, Any], metric: str) -> bool:
    declared = study.get("higher_is_better")
    return declared if isinstance(declared, bool) else metric not in LOWER_IS_BETTER_METRICS


def plot_section(study: Mapping[str, Any], metric: str, points: StudyPoints) -> str:
    runs, baselines = parse_runs(study), parse_baselines(study)
    curves = []
    for kind, name in INITIALIZATIONS.items():
        run_scores = [
            (float(c["examples"]), float(c["score"]))
            for c in runs
            if bool(c.get("pretrained")) == (kind == "pretrained")
        ]
        pretraining_scores = [(float(count), scores[kind]) for count, scores in points]
        mean_points = [
            (x, one.value, *((one.value, one.value) if one.low is None or one.high is None else (one.low, one.high)))
            for x, one in pretraining_scores
        ]
        curves.append(ScoreCurve(name, mean_points, run_scores))
    values = [(name, rule.value) for name, rule in baselines]
    label = METRICS[metric].name
    wide, narrow = (plot_label_efficiency(curves[0], curves[1], values, label, wide=wide) for wide in (True, False))
    picture = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    seeds = max(one.n or 1 for _, scores in points for one in scores.values())
    aggregation_note = f", the mean of {seeds} seeds with its 95 % interval. Each dot is one run" if seeds > 1 else ""
    better = "Higher is better" if is_higher_better(study, metric) else "Lower is better"
    caption = f"{label[0].upper()}{label[1:]}: {METRICS[metric].description}{aggregation_note}. {better}."
    descriptions = [
        f"{count:,} examples: {', '.join(f'{KINDS[kind]} {in_words(one, metric)}' for kind, one in scores.items())}"
        for count, scores in points
    ]
    descriptions += [f"{name}, without a model: {in_words(rule, metric)}" for name, rule in baselines]
    return render_section(
        "By number of labels", render_figure(picture, f"{label}. {'; '.join(descriptions)}.", escape_html(caption))
    )


def table_section(study: Mapping[str, Any], metric: str, points: StudyPoints) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("labels", *INITIALIZATIONS.values(), "ahead by"))
    sign = 1 if is_higher_better(study, metric) else -1
    rows = []
    for count, scores in points:
        advantage = sign * (scores["pretrained"].value - scores["scratch"].value)
        cells = "".join(score_cell(scores[kind], metric) for kind in INITIALIZATIONS)
        rows.append(f'<tr><th scope="row">{count:,}</th>{cells}<td>{format_score(advantage, metric, "+")}</td></tr>')
    baseline_rows = "".join(
        f'<tr><th scope="row">{escape_html(name)}</th>{score_cell(rule, metric)}</tr>'
        for name, rule in parse_baselines(study)
    )
    tables = render_scores_table(f"{METRICS[metric].name}, by labels to learn from", head, "".join(rows))
    if baseline_rows:
        tables += render_scores_table(
            "Without a model", f'<th scope="col">rule</th><th scope="col">{METRICS[metric].name}</th>', baseline_rows
        )
    return render_section("The numbers", tables + runs_table(study, metric))


def runs_table(study: Mapping[str, Any], metric: str) -> str:
    runs = sorted(parse_runs(study), key=lambda c: (c["examples"], not c.get("pretrained"), str(c.get("seed"))))
    rows = "".join(
        f'<tr><th scope="row">{int(cell["examples"]):,}</th><td>{escape_html(cell.get("seed", "–"))}</td>'
        f"<td>{INITIALIZATIONS['pretrained' if cell.get('pretrained') else 'scratch']}</td>"
        f"<td>{ScoreWithCI(float(cell['score'])).read_offset(metric)}</td>"
        f"<td>{format_duration(cell['seconds']) if is_number(cell.get('seconds')) else '–'}</td></tr>"
        for cell in runs
    )
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("labels", "seed", "weights", METRICS[metric].name, "time")
    )
    return f"<details><summary>Each of the {len(runs)} runs</summary>{render_scores_table('Every run', head, rows)}</details>"


def render_scores_table(caption: str, head: str, rows: str) -> str:
    return (
        f'<table class="scores"><caption>{escape_html(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
