"""Charts as inline SVG, and dot plots in HTML, that take their colours from the style sheet of the page.

Matplotlib draws with placeholder colours that are then replaced by CSS variables, so that one chart serves the light and the
dark theme. The SVG refers to nothing outside of itself.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# The type annotations of matplotlib are incomplete.

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nextword.common.results import BenchmarkResult
from nextword.common.statistics import ScoreWithCI
from nextword.reporting import formatting as fmt
from nextword.reporting.run_data import METRICS, THIS_MODEL, Point, RunData, TaskResults, metric_info

Points = Sequence[Point]
Plot = Callable[[Axes, bool], None]  # draws into axes, which may be those of a wide chart

# Placeholder colours, each replaced by a CSS variable. templates/charts.mplstyle has the first three.
CSS_VARIABLES = ("--ink", "--soft", "--line", "--train", "--validation", *(f"--s{i}" for i in range(1, 7)))
COLORS = tuple(f"#0102{number:02x}" for number, _ in enumerate(CSS_VARIABLES, start=3))
_, MUTED_COLOR, _, TRAIN_COLOR, VALIDATION_COLOR, *SERIES_COLORS = COLORS
LINE_STYLES: Any = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), "-", (0, (6, 2)))  # not by colour alone
BASELINE: Any = {"color": MUTED_COLOR, "linewidth": 1, "linestyle": (0, (4, 3))}

INITIALIZATIONS = {"pretrained": "pre-trained", "scratch": "from scratch"}
StudyPoint = tuple[int, Mapping[str, ScoreWithCI]]  # number of training examples, score by initialization


@dataclass(frozen=True)
class Chart:
    """A chart of a page.

    Attributes:
        caption: Visible caption.
        description: Text alternative for screen readers.
        svg: The chart, for a wide page if there is also a `narrow` one.
        narrow: The same chart for a narrow screen.
    """

    caption: str
    description: str
    svg: Markup
    narrow: Markup | None = None


def loss_chart(run: RunData) -> Chart | None:
    """Training loss (faint: every step, strong: moving average) and validation loss by step; None if there are none."""
    train, validation = run.series("loss"), run.series("validation", "loss")
    bits = dict(run.series("validation", "bits_per_byte"))
    bits_per_nat = next((bits[step] / loss for step, loss in validation if loss and bits.get(step)), None)

    def plot(axes: Axes, wide: bool) -> None:
        if train:
            _plot_with_average(axes, train, label="training")
        if validation:
            axes.plot(*_split_xy(validation), color=VALIDATION_COLOR, marker="o", label="validation")
        for i, step in enumerate(run.resumed_steps):
            axes.axvline(step, **BASELINE, label="_" if i else "resumed")
        axes.set(xlabel="step", ylabel="loss, nats per token", ylim=_y_limits_after_warmup([*train, *validation]))
        if bits_per_nat is not None:  # a right-hand axis
            axes.margins(x=0.01)
            to_bits, to_nats = partial(np.multiply, bits_per_nat), partial(np.multiply, 1 / bits_per_nat)
            right = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
            right.set_ylabel("bits per byte")
            right.spines["right"].set_visible(False)
        axes.legend()

    if not train and not validation:
        return None
    sentences: list[str] = []
    if train:
        last = moving_average(train)[-1][1]
        sentences.append(f"The training loss falls from {train[0][1]:.2f} to {last:.2f}.")
    if run.best_validation:
        step, loss = run.best_validation
        sentences.append(f"The lowest validation loss is {loss:.3f}, at step {step:,.0f}.")
    if run.resumed_steps:
        steps = ", ".join(f"{step:,.0f}" for step in run.resumed_steps)
        sentences.append(f"The run was interrupted and resumed at step {steps}.")
    caption = "Training loss (faint: every step, strong: moving average) and validation loss. Lower is better."
    return _responsive_chart("loss", caption, " ".join(sentences), plot, (3.5, 3.0))


def comparison_chart(name: str, curves: Sequence[tuple[str, Points]], x_label: str, y_label: str) -> Chart:
    """The curves of several runs, labeled at their ends where there is room, otherwise in a legend.

    Args:
        name: Prefix of the ids in the SVG.
        curves: (run name, points), at most as many as there are `SERIES_COLORS`.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis, a loss.
    """

    def plot(axes: Axes, wide: bool) -> None:
        for (run, points), color, style in zip(curves, SERIES_COLORS, LINE_STYLES, strict=False):
            if points:
                marker = "o" if len(points) < 40 else None
                axes.plot(*_split_xy(points), color=color, linestyle=style, marker=marker, label=run)
        limits = _y_limits_after_warmup([point for _, points in curves for point in points])
        axes.set(xlabel=x_label, ylabel=y_label, ylim=limits)
        if wide and max(len(run) for run, _ in curves) <= 24:
            _label_line_ends(axes)
        else:
            axes.legend()

    caption = f"{y_label[0].upper()}{y_label[1:]} by {x_label}. Lower is better."
    ends = "; ".join(f"{run} ends at {points[-1][1]:.3f}" for run, points in curves if points)
    return _responsive_chart(name, caption, f"{caption} {ends}.", plot, (3.8, 3.4))


def small_chart(
    name: str,
    caption: str,
    points: Points,
    *,
    x_label: str = "step",
    log_x: bool = False,
    start_at_zero: bool = False,
    is_training: bool = False,
    baseline: tuple[str, ScoreWithCI] | None = None,
) -> Chart:
    """A small chart of one quantity.

    Args:
        name: Suffix of the prefix of the ids in the SVG.
        caption: Name of the quantity.
        points: At least one point.
        x_label: Label of the horizontal axis.
        log_x: Whether the horizontal axis is logarithmic.
        start_at_zero: Whether the vertical axis starts at 0.
        is_training: Whether to draw every step faint and the moving average strong, as for a training loss.
        baseline: (name, score) of a baseline, drawn as a dashed line.
    """
    values = [y for _, y in points]

    def plot(axes: Axes, wide: bool) -> None:
        if is_training:
            _plot_with_average(axes, points, linewidth=1.4)
            axes.set_ylim(*_y_limits_after_warmup(points))
        else:
            axes.plot(*_split_xy(points), color=VALIDATION_COLOR, marker="o" if baseline else None, linewidth=1.4)
        axes.set_xlabel(x_label)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(_format_tick)  # set_xscale has replaced it
        if start_at_zero:
            axes.set_ylim(0, 1.08 * max(values) or 1)
        if baseline:
            label, score = baseline[0], baseline[1].value  # the label is above the line if most values are
            is_low = score <= (max(*values, score) + min(*values, score)) / 2
            axes.axhline(score, **BASELINE)
            offset, va = ((2, 3), "bottom") if is_low else ((2, -3), "top")
            coordinates: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(label, (0, score), offset, color=MUTED_COLOR, va=va, **coordinates)
            axes.margins(y=0.12)

    axis = x_label.split()[0]
    (first_x, first), (last_x, last) = points[0], points[-1]
    description = f"{caption}: {first:.3g} at {axis} {first_x:,.0f}, {last:.3g} at {axis} {last_x:,.0f}."
    return Chart(caption, description, draw_svg(plot, (3.7, 2.3), f"small-{name}"))


def label_efficiency_chart(
    metric: str,
    points: Sequence[StudyPoint],
    baselines: Mapping[str, ScoreWithCI],
    runs: Sequence[Mapping[str, Any]],
    higher_is_better: bool,
) -> Chart:
    """Scores by the number of training examples on a logarithmic axis, with confidence bands and every single run.

    Args:
        metric: The metric.
        points: The mean scores, by the number of examples.
        baselines: Scores of the baselines, drawn as dashed lines.
        runs: `examples`, `score` and `pretrained` of every run.
        higher_is_better: Whether a higher score is better.
    """
    counts = [count for count, _ in points]
    name, meaning = metric_info(metric) or METRICS["loss"]
    bounds = {key: np.array([_value_low_high(scores[key]) for _, scores in points]) for key in INITIALIZATIONS}
    means, lows, highs = np.concatenate(list(bounds.values())).T
    values = [*means, *(score.value for score in baselines.values()), *(run["score"] for run in runs)]

    def plot(axes: Axes, wide: bool) -> None:
        for key, color in (("scratch", TRAIN_COLOR), ("pretrained", VALIDATION_COLOR)):
            mean, low, high = bounds[key].T
            is_pretrained = key == "pretrained"
            dots = [(run["examples"], run["score"]) for run in runs if bool(run.get("pretrained")) == is_pretrained]
            axes.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
            axes.scatter(*_split_xy(dots), color=color, alpha=0.4, s=11, linewidth=0)
            axes.plot(counts, mean, color=color, marker="o", markersize=4.5, label=INITIALIZATIONS[key])
        for baseline, score in baselines.items():
            axes.axhline(score.value, **BASELINE, zorder=1, label=baseline)
        axes.set_xscale("log", base=2)
        axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
        min_gap = (0.09 if wide else 0.17) * (math.log(counts[-1] / counts[0]) or 1.0)
        ticks = counts[-1:]  # the largest count, and those of the others that have room for their label
        for count in reversed(counts):
            if math.log(ticks[-1] / count) >= min_gap:
                ticks.append(count)
        axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
        axes.minorticks_off()
        # The limits include every score, and confidence bands up to half of the range of the scores beyond it.
        low, high = min(values), max(values)
        extra = 0.5 * (high - low) or 0.1 * abs(high) or 1.0
        bottom = max(low - extra, min(low, *lows))
        top = min(high + extra, max(high, *highs))
        margin = 0.05 * (top - bottom) or extra
        axes.set(xlabel="labeled training examples", ylabel=name, ylim=(bottom - margin, top + margin))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        _label_line_ends(axes)

    seeds = max(score.n or 1 for _, scores in points for score in scores.values())
    repeated = f", mean of {seeds} seeds with its 95 % confidence interval. Each dot is one run" if seeds > 1 else ""
    direction = "Higher is better" if higher_is_better else "Lower is better"
    caption = f"{name[0].upper()}{name[1:]}: {meaning}{repeated}. {direction}."
    results = [
        f"{count:,} examples: pre-trained {fmt.score(scores['pretrained'])}, from scratch {fmt.score(scores['scratch'])}"
        for count, scores in points
    ]
    results += [f"baseline {baseline}: {fmt.score(score)}" for baseline, score in baselines.items()]
    return _responsive_chart("label-efficiency", caption, f"{name}. {'; '.join(results)}.", plot, (4.0, 3.7))


# ---------------------------------------------------------------- dot plots


class DotRow(NamedTuple):
    """A row of a dot plot: a score with its interval, and the score of guessing and of shuffled words if there are any."""

    label: str
    score: ScoreWithCI
    is_highlighted: bool
    chance: float | None = None
    shuffled: float | None = None
    note: str = ""


class DotPlot(NamedTuple):
    """Scores on one axis, drawn in HTML and CSS. `ticks` are the marks of the axis, its ends included."""

    rows: list[DotRow]
    ticks: list[float]


def task_score_plot(results: TaskResults) -> DotPlot | None:
    """The selection metric of the model, the base model and the baselines; None for one score without an interval."""
    scores = results.metric_scores
    values = [x for score in scores.values() for x in (score.value, score.low, score.high) if x is not None]
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0.0 if 0 < low < 0.6 * high else low, high)
    rows = [DotRow(system, score, system == THIS_MODEL) for system, score in scores.items()]
    return DotPlot(rows, [float(tick) + 0.0 for tick in ticks])


def benchmark_plot(benchmarks: Sequence[BenchmarkResult]) -> DotPlot | None:
    """The benchmarks for which guessing has a score, on one axis from 0 to 1."""
    rows: list[DotRow] = []
    for entry in benchmarks:
        if entry.chance is not None and 0 <= entry.score.value <= 1:
            shuffled = entry.shuffled_control and entry.shuffled_control.value
            is_significant = entry.chance_side is not None
            rows.append(
                DotRow(entry.name, entry.score, is_significant, entry.chance, shuffled, fmt.versus_chance(entry))
            )
    return DotPlot(rows, [0.0, 0.25, 0.5, 0.75, 1.0]) if rows else None


def reliability_diagram(bins: Sequence[Sequence[float]]) -> Chart:
    """Accuracy by confidence (DeGroot and Fienberg 1983). On the diagonal the probabilities are calibrated.

    Args:
        bins: Mean confidence, accuracy and number of predictions of each bin.
    """
    confidences, accuracies = np.array([entry[:2] for entry in bins], dtype=np.float64).T

    def plot(axes: Axes, wide: bool) -> None:
        low = min(confidences.min(), accuracies.min())
        axes.plot((low, 1), (low, 1), **BASELINE)
        axes.plot(confidences, accuracies, color=VALIDATION_COLOR, marker="o", markersize=4)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(_format_tick)
        axes.set(xlabel="confidence", ylabel="accuracy")

    caption = "Reliability diagram: accuracy by confidence. Calibrated predictions lie on the diagonal."
    points = "; ".join(f"{accuracy:.2f} at {confidence:.2f}" for confidence, accuracy, *_ in bins)
    return Chart(caption, f"Accuracy by confidence: {points}.", draw_svg(plot, (3.7, 2.6), "reliability"))


# ---------------------------------------------------------------- drawing


def moving_average(points: Points) -> list[Point]:
    """The moving average over the last fiftieth of the points; over a tenth of those so far at the steep start."""
    average = 0.0
    result: list[Point] = []
    for i, (x, y) in enumerate(points):
        average += (y - average) / max(1.0, min(i / 10, len(points) / 50))
        result.append((x, average))
    return result


def downsample(points: Points, max_points: int = 600) -> Points:
    """About `max_points` of the points, evenly spaced, including the last."""
    stride = -(-len(points) // max_points)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _value_low_high(score: ScoreWithCI) -> tuple[float, float, float]:
    """A score and the bounds of its interval; without one, both are the score."""
    low, high = score.low, score.high
    return score.value, score.value if low is None else low, score.value if high is None else high


def _split_xy(points: Points) -> np.ndarray:
    return np.array(downsample(points), dtype=np.float64).reshape(-1, 2).T


def _plot_with_average(axes: Axes, points: Points, **line: Any) -> None:
    axes.plot(*_split_xy(points), color=TRAIN_COLOR, alpha=0.3, linewidth=0.9)
    axes.plot(*_split_xy(moving_average(points)), color=TRAIN_COLOR, **line)


def _y_limits_after_warmup(points: Points) -> tuple[float | None, float | None]:
    """Limits without the first twentieth of the steps, whose steep fall would flatten the rest."""
    last = max((x for x, _ in points), default=0)
    late = [y for x, y in points if x >= last / 20]
    if not late or max(late) == min(late):
        return None, None
    margin = 0.08 * (max(late) - min(late))
    return min(late) - margin, max(late) + margin


def _label_line_ends(axes: Axes) -> None:
    """Write the label of each line at the right of the axes, moved apart where labels would touch."""
    figure: Any = axes.figure
    bottom, top = axes.get_ylim()
    line_height = 12 / (0.75 * 72 * figure.get_figheight())  # as a fraction of the height of the axes, roughly
    ends: list[tuple[float, str, Any]] = sorted(
        ((float(np.asarray(line.get_ydata())[-1]) - bottom) / (top - bottom), str(line.get_label()), line.get_color())
        for line in axes.lines
    )
    steps = line_height * np.arange(len(ends))
    heights = np.maximum.accumulate([height for height, _, _ in ends] - steps)  # each above the one below it
    positions = np.minimum(heights, 1 - steps[-1:]) + steps  # and all below the top
    for position, (_, name, color) in zip(positions, ends, strict=True):
        where: Any = {"xycoords": "axes fraction", "annotation_clip": False}
        axes.annotate(name, (1.015, position), va="center", color=color, **where)


def _format_tick(value: float, _: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.3g}"


def _responsive_chart(name: str, caption: str, description: str, plot: Plot, heights: tuple[float, float]) -> Chart:
    """A chart that is drawn twice, for wide pages and for narrow screens."""
    wide, narrow = ((7.6, heights[0]), (3.7, heights[1]))
    return Chart(caption, description, draw_svg(plot, wide, f"{name}-wide"), draw_svg(plot, narrow, f"{name}-narrow"))


def draw_svg(plot: Plot, size: tuple[float, float], id_prefix: str) -> Markup:
    """A figure as an element of an HTML page: no XML declaration, no addresses, prefixed ids, colours as variables."""
    buffer, wide = io.StringIO(), size[0] > 5
    with matplotlib.rc_context(fname=fmt.TEMPLATES / "charts.mplstyle"):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.margins(x=0.02)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        axes.yaxis.set_major_formatter(_format_tick)
        plot(axes, wide)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{id_prefix}-", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)  # 1/100 point is enough
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">', svg, count=1)
    for color, variable in zip(COLORS, CSS_VARIABLES, strict=True):
        svg = svg.replace(color, f"var({variable})")
    return Markup(svg.strip())
