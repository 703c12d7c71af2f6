"""Charts as inline SVG, and dot plots in HTML, that take their colours from the style sheet of the page.

Matplotlib draws with placeholder colours that are then replaced by CSS variables, so that one chart serves the light and the
dark theme. The SVG refers to nothing outside of itself.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# The type annotations of matplotlib are incomplete.

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nextword.common.results import BenchmarkResult
from nextword.common.statistics import ScoreWithCI
from nextword.reporting import formatting as fmt
from nextword.reporting.run_data import Point
from nextword.reporting.task_results import THIS_MODEL, TaskResults

Points = Sequence[Point]

# Placeholder colours, each replaced by a CSS variable.
TEXT_COLOR, MUTED_COLOR, GRID_COLOR, TRAIN_COLOR, VALIDATION_COLOR = (f"#01020{digit}" for digit in range(3, 8))
SERIES_COLORS = tuple(f"#0102{number:02x}" for number in range(8, 14))  # one for each of the compared runs
COLORS = (TEXT_COLOR, MUTED_COLOR, GRID_COLOR, TRAIN_COLOR, VALIDATION_COLOR, *SERIES_COLORS)
CSS_VARIABLES = ("--ink", "--soft", "--line", "--train", "--validation", *(f"--s{i}" for i in range(1, 7)))
BASELINE_STYLE: Any = (0, (4, 3))
LINE_STYLES: Any = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), "-", (0, (6, 2)))  # not by colour alone

STYLE_FILE = Path(__file__).parent / "templates" / "charts.mplstyle"


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


def responsive_chart(caption: str, description: str, plot: Callable[..., Markup], *args: Any) -> Chart:
    """A chart drawn twice by `plot(*args, wide=...)`, for wide pages and for narrow screens."""
    return Chart(caption, description, plot(*args, wide=True), plot(*args, wide=False))


def plot_loss(train: Points, validation: Points, bits_per_nat: float | None, *, wide: bool) -> Markup:
    """Training loss (faint: every step, strong: moving average) and validation loss by step.

    Args:
        bits_per_nat: Bits per byte at a loss of one nat per token, for the right-hand axis. None: no such axis.
    """
    with matplotlib.rc_context(fname=STYLE_FILE):
        figure, axes = _new_figure((7.6, 3.5) if wide else (3.7, 3.0), right_axis=bits_per_nat is not None)
        if train:
            _plot_with_average(axes, train, label="training")
        if validation:
            axes.plot(*_split_xy(validation), color=VALIDATION_COLOR, marker="o", markersize=3.5, label="validation")
        axes.set_ylim(*_y_limits_after_warmup([*train, *validation]))
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        if bits_per_nat is not None:
            to_bits, to_nats = partial(np.multiply, bits_per_nat), partial(np.multiply, 1 / bits_per_nat)
            right = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
            right.set_ylabel("bits per byte")
            right.spines["right"].set_visible(False)
        if train or validation:
            axes.legend()
        return _to_svg(figure, f"loss-{'wide' if wide else 'narrow'}")


def plot_run_comparison(
    curves: Sequence[tuple[str, Points]], x_label: str, y_label: str, id_prefix: str, *, wide: bool
) -> Markup:
    """The curves of several runs, labelled at their ends where there is room, otherwise in a legend.

    Args:
        curves: (run name, points), at most as many as there are `SERIES_COLORS`.
    """
    with matplotlib.rc_context(fname=STYLE_FILE):
        figure, axes = _new_figure((7.6, 3.8) if wide else (3.7, 3.4))
        end_labels: list[tuple[float, str, str]] = []
        for (name, points), color, style in zip(curves, SERIES_COLORS, LINE_STYLES, strict=False):
            if not points:
                continue
            marker = "o" if len(points) < 40 else None
            axes.plot(*_split_xy(points), color=color, linestyle=style, marker=marker, markersize=3.5, label=name)
            end_labels.append((points[-1][1], name, color))
        axes.set_ylim(*_y_limits_after_warmup([point for _, points in curves for point in points]))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        if wide and max(len(name) for name, _ in curves) <= 24:
            _label_curve_ends(figure, axes, end_labels)
        else:
            for text in axes.legend().get_texts():
                text.set_parse_math(False)
        return _to_svg(figure, f"{id_prefix}-{'wide' if wide else 'narrow'}")


def plot_small(
    points: Points,
    id_prefix: str,
    *,
    x_label: str = "step",
    is_training: bool = False,
    start_at_zero: bool = False,
    log_x: bool = False,
    baseline: tuple[str, float] | None = None,
) -> Markup:
    """A small chart of one quantity.

    Args:
        is_training: Whether to draw every step faint and the moving average strong, as for a training loss.
        baseline: (name, score) of a baseline, drawn as a dashed line.
    """
    with matplotlib.rc_context(fname=STYLE_FILE):
        figure, axes = _new_figure((3.7, 2.3))
        if is_training:
            _plot_with_average(axes, points, linewidth=1.4)
            axes.set_ylim(*_y_limits_after_warmup(points))
        else:
            marker = None if baseline is None else "o"
            axes.plot(*_split_xy(points), color=VALIDATION_COLOR, marker=marker, markersize=3.5, linewidth=1.4)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(_format_tick))  # set_xscale has replaced it
        if start_at_zero:
            axes.set_ylim(0, 1.08 * max(y for _, y in points) or 1)
        if baseline is not None:
            _draw_baseline(axes, *baseline, [y for _, y in points])
        return _to_svg(figure, id_prefix)


def _draw_baseline(axes: Axes, name: str, score: float, values: Sequence[float]) -> None:
    """A dashed line with its name, above the line if most values are above it."""
    is_low = score <= (max(*values, score) + min(*values, score)) / 2
    axes.axhline(score, color=MUTED_COLOR, linewidth=1, linestyle=BASELINE_STYLE)
    position: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    position |= {"xytext": (2, 3), "va": "bottom"} if is_low else {"xytext": (2, -3), "va": "top"}
    axes.annotate(name, (0, score), color=MUTED_COLOR, parse_math=False, **position)
    axes.margins(y=0.12)


@dataclass(frozen=True)
class ScoreCurve:
    """Scores by the number of training examples: the mean of the seeds as (examples, score), and every run."""

    name: str
    points: Sequence[tuple[float, ScoreWithCI]]
    runs: Points

    @property
    def bounds(self) -> list[tuple[float, float, float, float]]:
        """(examples, score, low, high) by the number of examples. Without an interval, low and high are the score."""
        rows = ((x, score.value, score.low, score.high) for x, score in sorted(self.points, key=lambda point: point[0]))
        return [(x, y, y if low is None else low, y if high is None else high) for x, y, low, high in rows]


def plot_label_efficiency(
    pretrained: ScoreCurve, scratch: ScoreCurve, baselines: Sequence[tuple[str, float]], y_label: str, *, wide: bool
) -> Markup:
    """Scores by the number of training examples on a logarithmic axis, with confidence bands and every single run.

    Args:
        baselines: (name, score), drawn as dashed lines.
    """
    with matplotlib.rc_context(fname=STYLE_FILE):
        figure, axes = _new_figure((7.6, 4.0) if wide else (3.7, 3.7))
        end_labels: list[tuple[float, str, str]] = []
        for curve, color in ((scratch, TRAIN_COLOR), (pretrained, VALIDATION_COLOR)):
            if not curve.points:
                continue
            x, y, low, high = (list(column) for column in zip(*curve.bounds, strict=True))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.scatter(*_split_xy(curve.runs), color=color, alpha=0.4, s=11, linewidth=0)
            axes.plot(x, y, color=color, marker="o", markersize=4.5)
            end_labels.append((y[-1], curve.name, color))
        for name, score in baselines:
            axes.axhline(score, color=MUTED_COLOR, linewidth=1, linestyle=BASELINE_STYLE, zorder=1)
            end_labels.append((score, name, MUTED_COLOR))
        counts = sorted({x for curve in (pretrained, scratch) for x, _ in curve.points})
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(counts) / 1.2, max(counts) * 1.2)
        axes.set_xticks(*_spaced_ticks(counts, 0.09 if wide else 0.17), minor=False)
        axes.minorticks_off()
        axes.set_ylim(*_label_efficiency_y_limits((pretrained, scratch), [score for _, score in baselines]))
        axes.set_xlabel("labelled training examples")
        axes.set_ylabel(y_label, parse_math=False)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        _label_curve_ends(figure, axes, end_labels)
        return _to_svg(figure, f"label-efficiency-{'wide' if wide else 'narrow'}")


def _spaced_ticks(counts: Sequence[float], min_gap: float) -> tuple[list[float], list[str]]:
    """Positions and labels of the ticks: the largest count, and those of the others that have room for their label."""
    span = math.log(max(counts) / min(counts)) or 1.0
    ticks: list[float] = []
    for count in sorted(counts, reverse=True):
        if not ticks or math.log(ticks[-1] / count) / span >= min_gap:
            ticks.append(count)
    return ticks, [f"{count:,.0f}" for count in ticks]


def _label_efficiency_y_limits(curves: Sequence[ScoreCurve], baselines: Sequence[float]) -> tuple[float, float]:
    """Limits that include every score, and confidence bands up to half of the range of the scores beyond it."""
    bounds = [row for curve in curves for row in curve.bounds]
    values = [*baselines, *(row[1] for row in bounds), *(y for curve in curves for _, y in curve.runs)]
    low, high = min(values), max(values)
    extra = 0.5 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = max(low - extra, min([low, *(row[2] for row in bounds)]))
    top = min(high + extra, max([high, *(row[3] for row in bounds)]))
    margin = 0.05 * (top - bottom) or extra
    return bottom - margin, top + margin


def _label_curve_ends(figure: Figure, axes: Axes, end_labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (y, name, colour) at the right of the axes, moved apart where labels would touch."""
    bottom, top = axes.get_ylim()
    line_height = 12 / (0.75 * 72 * figure.get_figheight())  # as a fraction of the height of the axes, roughly
    ordered = sorted(((y - bottom) / (top - bottom), name, color) for y, name, color in end_labels)
    positions = [position for position, _, _ in ordered]
    for i in range(1, len(positions)):
        positions[i] = max(positions[i], positions[i - 1] + line_height)
    limit = 1.0
    for i in reversed(range(len(positions))):
        positions[i] = min(positions[i], limit)
        limit = positions[i] - line_height
    for position, (_, name, color) in zip(positions, ordered, strict=True):
        options: dict[str, Any] = {"annotation_clip": False, "parse_math": False}
        axes.annotate(name, (1.015, position), xycoords="axes fraction", va="center", color=color, **options)


# ---------------------------------------------------------------- dot plots


@dataclass(frozen=True)
class DotRow:
    """A row of a dot plot: a score with its interval, and the score of guessing and of shuffled words if there are any."""

    label: str
    score: ScoreWithCI
    is_highlighted: bool
    chance: float | None = None
    shuffled: float | None = None


@dataclass(frozen=True)
class DotPlot:
    """Scores on one axis, drawn in HTML and CSS. `ticks` are the marks of the axis, its ends included."""

    caption: str
    description: str
    rows: list[DotRow]
    ticks: Sequence[float]

    def position(self, value: float) -> str:
        """Distance of a value from the start of the axis, as a CSS percentage."""
        return self.width(self.ticks[0], max(self.ticks[0], min(self.ticks[-1], value)))

    def width(self, low: float, high: float) -> str:
        return f"{100 * (high - low) / (self.ticks[-1] - self.ticks[0]):.2f}%"


def task_score_plot(results: TaskResults) -> DotPlot | None:
    """The selection metric of the model, the base model and the baselines; None for one score without an interval."""
    scores = results.metric_scores
    values = [x for _, score in scores for x in (score.value, score.low, score.high) if x is not None]
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0.0 if 0 < low < 0.6 * high else low, high)
    description = "; ".join(f"{system} {fmt.score(score)}" for system, score in scores)
    return DotPlot(
        caption=f"{results.info.name} on the validation set, with 95 % confidence intervals",
        description=f"{results.info.name}: {description}.",
        rows=[DotRow(system, score, system == THIS_MODEL) for system, score in scores],
        ticks=[float(tick) + 0.0 for tick in ticks],
    )


def benchmark_plot(benchmarks: Sequence[BenchmarkResult]) -> DotPlot | None:
    """The benchmarks for which guessing has a score, on one axis from 0 to 1."""
    plotted = [
        benchmark for benchmark in benchmarks if benchmark.chance is not None and 0 <= benchmark.score.value <= 1
    ]
    if not plotted:
        return None
    description = "; ".join(f"{entry.name} {fmt.score(entry.score)}, {fmt.versus_chance(entry)}" for entry in plotted)
    return DotPlot(
        caption="Benchmark scores with 95 % confidence intervals. Vertical line: chance. Ring: score with the words shuffled. "
        "Grey: not significantly different from chance.",
        description=f"{description}.",
        rows=[
            DotRow(
                benchmark.name,
                benchmark.score,
                benchmark.chance_side is not None,
                benchmark.chance,
                benchmark.shuffled_control and benchmark.shuffled_control.value,
            )
            for benchmark in plotted
        ],
        ticks=[0.0, 0.25, 0.5, 0.75, 1.0],
    )


# ---------------------------------------------------------------- helpers


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


def _plot_with_average(axes: Axes, points: Points, **line: Any) -> None:
    axes.plot(*_split_xy(points), color=TRAIN_COLOR, alpha=0.3, linewidth=0.9)
    axes.plot(*_split_xy(moving_average(points)), color=TRAIN_COLOR, **line)


def _new_figure(size: tuple[float, float], right_axis: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.margins(x=0.01 if right_axis else 0.02)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(FuncFormatter(_format_tick))
    return figure, axes


def _format_tick(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.3g}"


def _split_xy(points: Points) -> tuple[list[float], list[float]]:
    sampled = downsample(points)
    return [x for x, _ in sampled], [y for _, y in sampled]


def _y_limits_after_warmup(points: Points) -> tuple[float | None, float | None]:
    """Limits without the first twentieth of the steps, whose steep fall would flatten the rest."""
    last = max((x for x, _ in points), default=0)
    late = [y for x, y in points if x >= last / 20]
    if not late or max(late) == min(late):
        return None, None
    margin = 0.08 * (max(late) - min(late))
    return min(late) - margin, max(late) + margin


def _to_svg(figure: Figure, id_prefix: str) -> Markup:
    """The figure as an element of an HTML page: no XML declaration, no addresses, prefixed ids, colours as variables."""
    buffer = io.StringIO()
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
