"""The page of `nextword transfer`: what pre-training is worth in labels, as a chart, a sentence and tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError
from nextword.common.fs import atomic_write
from nextword.common.statistics import ScoreWithCI
from nextword.reporting import formatting as fmt
from nextword.reporting.charts import Chart, ScoreCurve, plot_label_efficiency, responsive_chart
from nextword.reporting.rendering import render_html
from nextword.reporting.run_data import as_list, as_mapping, get_nested, is_number
from nextword.reporting.task_results import LOWER_IS_BETTER_METRICS, METRICS, parse_score

INITIALIZATIONS = {"pretrained": "pre-trained", "scratch": "from scratch"}

StudyPoint = tuple[int, dict[str, ScoreWithCI]]  # number of training examples, score by initialisation


def write_label_efficiency_page(run_dir: Path, study: Mapping[str, Any]) -> Path:
    """Write RUN/report.html.

    Args:
        study: `task`, `metric`, `higher_is_better`, `model` and `data` (names), `sentence`, `command`;
            `points`: {"examples", "pretrained", "scratch"}, the last two with {"value", "low", "high", "n"};
            `baselines`: name → {"value", …}; `cells`: {"examples", "seed", "pretrained", "score", "seconds"}.
            Everything but `metric` and `points` may be missing.

    Returns:
        The path of the page.

    Raises:
        NextwordError: No point with a score for both initialisations, or an unknown metric.
    """
    metric, points = str(study.get("metric")), _parse_points(study)
    if metric not in METRICS or not points:
        raise NextwordError(
            f"{run_dir}: the study has no scores to plot (metric: {metric}). Run nextword transfer again"
        )
    higher_is_better = study.get("higher_is_better")
    if not isinstance(higher_is_better, bool):
        higher_is_better = metric not in LOWER_IS_BETTER_METRICS
    scores = {str(name): parse_score(value) for name, value in as_mapping(study.get("baselines")).items()}
    baselines = {name: score for name, score in scores.items() if score is not None}
    runs = _parse_runs(study)
    page = render_html(
        "label_efficiency.html",
        title=run_dir.resolve().name,
        headline=str(study.get("sentence") or "Label efficiency of pre-training"),
        subtitle=" · ".join(str(study[key]) for key in ("task", "model", "data") if study.get(key)),
        metric=METRICS[metric].name,
        figure=_label_efficiency_chart(metric, points, baselines, runs, higher_is_better),
        initializations=INITIALIZATIONS,
        points=points,
        sign=1 if higher_is_better else -1,
        baselines=baselines,
        runs=runs,
        command_line=study.get("command"),
    )
    atomic_write(run_dir / "report.html", page)
    return run_dir / "report.html"


def _parse_points(study: Mapping[str, Any]) -> list[StudyPoint]:
    """The points that have a score for both initialisations, by the number of examples."""
    points: list[StudyPoint] = []
    for point in as_list(study.get("points")):
        count = get_nested(point, "examples")
        pretrained, scratch = (parse_score(get_nested(point, key)) for key in INITIALIZATIONS)
        if is_number(count) and count > 0 and pretrained is not None and scratch is not None:
            points.append((int(count), {"pretrained": pretrained, "scratch": scratch}))
    return sorted(points, key=lambda point: point[0])


def _parse_runs(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs that have a score, by the number of examples, initialisation and seed."""
    runs = [as_mapping(run) for run in as_list(study.get("cells"))]
    scored = [run for run in runs if is_number(run.get("score")) and is_number(run.get("examples"))]
    return sorted(scored, key=lambda run: (run["examples"], not run.get("pretrained"), str(run.get("seed"))))


def _label_efficiency_chart(
    metric: str,
    points: list[StudyPoint],
    baselines: Mapping[str, ScoreWithCI],
    runs: list[Mapping[str, Any]],
    higher_is_better: bool,
) -> Chart:
    pretrained, scratch = (
        ScoreCurve(
            name,
            [(count, scores[key]) for count, scores in points],
            [(run["examples"], run["score"]) for run in runs if bool(run.get("pretrained")) == (key == "pretrained")],
        )
        for key, name in INITIALIZATIONS.items()
    )
    name, description = METRICS[metric]
    seeds = max(score.n or 1 for _, scores in points for score in scores.values())
    repeated = f", mean of {seeds} seeds with its 95 % confidence interval. Each dot is one run" if seeds > 1 else ""
    direction = "Higher is better" if higher_is_better else "Lower is better"
    values = [
        f"{count:,} examples: pre-trained {fmt.score(scores['pretrained'])}, from scratch {fmt.score(scores['scratch'])}"
        for count, scores in points
    ]
    values += [f"baseline {baseline}: {fmt.score(score)}" for baseline, score in baselines.items()]
    return responsive_chart(
        f"{name[0].upper()}{name[1:]}: {description}{repeated}. {direction}.",
        f"{name}. {'; '.join(values)}.",
        plot_label_efficiency,
        pretrained,
        scratch,
        [(baseline, score.value) for baseline, score in baselines.items()],
        name,
    )
