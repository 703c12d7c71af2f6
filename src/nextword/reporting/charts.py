"""The pictures of a report: SVG that stands inside an HTML page and takes its colours from the page's style sheet.

Each is drawn in stand-in colours that become CSS variables (`--ink`, `--soft`, `--line`, `--train`, `--validation`), so that
one picture serves a light page and a dark one. Nothing in it refers outside of itself.
"""

import io
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Points = Sequence[tuple[float, float]]

# Colours that occur nowhere else, and the CSS variable that takes the place of each.
TEXT_COLOR, MUTED_COLOR, GRID_COLOR, TRAIN_COLOR, VALIDATION_COLOR = (
    "#010203",
    "#010204",
    "#010205",
    "#010206",
    "#010207",
)
SERIES_COLORS = tuple(f"#0102{number:02x}" for number in range(8, 14))  # of several runs
CSS_VARIABLES = {
    TEXT_COLOR: "--ink",
    MUTED_COLOR: "--soft",
    GRID_COLOR: "--line",
    TRAIN_COLOR: "--train",
    VALIDATION_COLOR: "--validation",
}
CSS_VARIABLES |= {color: f"--s{number}" for number, color in enumerate(SERIES_COLORS, start=1)}
LINE_STYLES: Any = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), "-", (0, (6, 2)))  # so that colour is not all

RC_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and read by screen readers
    "svg.hashsalt": "nextword",  # the same data, the same file
    "font.size": 8.5,
    "axes.edgecolor": GRID_COLOR,
    "axes.labelcolor": MUTED_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID_COLOR,
    "grid.linewidth": 0.8,
    "xtick.color": GRID_COLOR,
    "ytick.color": GRID_COLOR,
    "xtick.labelcolor": MUTED_COLOR,
    "ytick.labelcolor": MUTED_COLOR,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def plot_loss(train: Points, validation: Points, bits_per_nat: float | None, *, wide: bool) -> str:
    """Training loss (every step faint, smoothed strong) and validation loss, by step.

    Args:
        bits_per_nat: bits per byte for a loss of one nat per token, which gives the right-hand axis; None leaves it out.
        wide: for a wide page, or for a telephone's.
    """
    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = _new_figure((7.6, 3.5) if wide else (3.7, 3.0), right_axis=bits_per_nat is not None)
        if train:
            smooth = moving_average(train)
            axes.plot(*_split_xy(train), color=TRAIN_COLOR, alpha=0.3, linewidth=0.9)
            axes.plot(*_split_xy(smooth), color=TRAIN_COLOR, label="training")
        if validation:
            axes.plot(*_split_xy(validation), color=VALIDATION_COLOR, marker="o", markersize=3.5, label="validation")
        axes.set_ylim(*_y_limits_after_warmup(train, validation))
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        if bits_per_nat is not None:
            nats_to_bits, bits_to_nats = partial(np.multiply, bits_per_nat), partial(np.multiply, 1 / bits_per_nat)
            bits_axis = axes.secondary_yaxis("right", functions=(nats_to_bits, bits_to_nats))
            bits_axis.set_ylabel("bits per byte")
            bits_axis.spines["right"].set_visible(False)
        if train or validation:
            axes.legend(frameon=False, labelcolor=TEXT_COLOR, loc="upper right")
        return _to_svg(figure, f"loss-{'wide' if wide else 'narrow'}")


def plot_run_comparison(
    curves: Sequence[tuple[str, Points]], x_label: str, y_label: str, id_prefix: str, *, wide: bool
) -> str:
    """The curves of several runs in one figure, each named at its end where there is room, else in a legend.

    Args:
        lines: (a run's name, its points), as many as there are `SERIES` at most.
        wide: for a wide page, or for a telephone's.
    """
    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = _new_figure((7.6, 3.8) if wide else (3.7, 3.4))
        end_labels = []
        for (label, points), color, dash in zip(curves, SERIES_COLORS, LINE_STYLES, strict=False):
            if not points:
                continue
            marker = "o" if len(points) < 40 else None
            axes.plot(*_split_xy(points), color=color, linestyle=dash, marker=marker, markersize=3.5, label=label)
            end_labels.append((points[-1][1], label, color))
        axes.set_ylim(*_y_limits_after_warmup([point for _, points in curves for point in points], ()))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        if wide and max(len(label) for label, _ in curves) <= 24:
            _label_curve_ends(axes, end_labels, height_points=0.75 * 72 * figure.get_figheight())
        else:
            for text in axes.legend(frameon=False, labelcolor=TEXT_COLOR, loc="upper right").get_texts():
                text.set_parse_math(False)
        return _to_svg(figure, f"{id_prefix}-{'wide' if wide else 'narrow'}")


def plot_training_loss(train: Points, id_prefix: str) -> str:
    """The training loss alone, small: every step faint, smoothed strong."""
    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = _new_figure((3.7, 2.3))
        axes.plot(*_split_xy(train), color=TRAIN_COLOR, alpha=0.3, linewidth=0.9)
        axes.plot(*_split_xy(moving_average(train)), color=TRAIN_COLOR, linewidth=1.4)
        axes.set_ylim(*_y_limits_after_warmup(train, ()))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return _to_svg(figure, id_prefix)


def plot_score(points: Points, baseline: tuple[str, float] | None, id_prefix: str) -> str:
    """A score by step, small, with a dashed line at what a rule has that needs no model: (its name, its score)."""
    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = _new_figure((3.7, 2.3))
        axes.plot(*_split_xy(points), color=VALIDATION_COLOR, marker="o", markersize=3.5)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if baseline is not None:
            values = [y for _, y in points] + [baseline[1]]
            midpoint = (max(values) + min(values)) / 2
            axes.axhline(baseline[1], color=MUTED_COLOR, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                baseline[0], (0, baseline[1]), xycoords=("axes fraction", "data"), xytext=(2, 3 if baseline[1] <= midpoint else -3),
                textcoords="offset points", va="bottom" if baseline[1] <= midpoint else "top", color=MUTED_COLOR, parse_math=False,
            )  # fmt: skip
            axes.margins(y=0.12)
        return _to_svg(figure, id_prefix)


def plot_metric(
    points: Points, id_prefix: str, *, x_label: str = "step", start_at_zero: bool = False, log_x: bool = False
) -> str:
    """One quantity by step, small. `zero`: its axis begins at 0. `log`: the steps are spaced by their logarithm."""
    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = _new_figure((3.7, 2.3))
        axes.plot(*_split_xy(points), color=VALIDATION_COLOR, linewidth=1.4)
        axes.set_xlabel(x_label)
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(_format_tick))  # the scale brought its own, in powers
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if start_at_zero:
            axes.set_ylim(0, 1.08 * max(y for _, y in points) or 1)
        return _to_svg(figure, id_prefix)


class ScoreCurve(NamedTuple):
    """A line of a plot: its name, its points as (x, y, low, high), and single measurements as (x, y)."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    runs: Points


def plot_label_efficiency(
    pretrained: ScoreCurve, scratch: ScoreCurve, baselines: Sequence[tuple[str, float]], y_label: str, *, wide: bool
) -> str:
    """Two lines over the number of examples, spaced by its logarithm, with their intervals and every single measurement.

    Args:
        rules: (name, score) of what needs no model, drawn as dashed lines.
        label: what is measured.
        wide: for a wide page, or for a telephone's.
    """
    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = _new_figure((7.6, 4.0) if wide else (3.7, 3.7))
        end_labels: list[tuple[float, str, str]] = []
        for line, color in ((scratch, TRAIN_COLOR), (pretrained, VALIDATION_COLOR)):
            if not line.points:
                continue
            x, y, low, high = (list(column) for column in zip(*sorted(line.points), strict=True))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.scatter(*_split_xy(line.runs), color=color, alpha=0.4, s=11, linewidth=0)
            axes.plot(x, y, color=color, marker="o", markersize=4.5)
            end_labels.append((y[-1], line.name, color))
        for name, score in baselines:
            axes.axhline(score, color=MUTED_COLOR, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            end_labels.append((score, name, MUTED_COLOR))
        counts = sorted({x for line in (pretrained, scratch) for x, *_ in line.points})
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(counts) / 1.2, max(counts) * 1.2)
        axes.set_xticks(*_spaced_ticks(counts, 0.09 if wide else 0.17), minor=False)
        axes.minorticks_off()
        axes.set_ylim(*_label_efficiency_y_limits(pretrained, scratch, [score for _, score in baselines]))
        axes.set_xlabel("labelled examples to learn from")
        axes.set_ylabel(y_label, parse_math=False)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        _label_curve_ends(axes, end_labels, height_points=0.75 * 72 * figure.get_figheight())
        return _to_svg(figure, f"transfer-{'wide' if wide else 'narrow'}")


def _spaced_ticks(counts: Sequence[float], min_gap: float) -> tuple[list[float], list[str]]:
    """Where the axis is marked, and by what: the largest count, and of the others those with room for their number."""
    log_range = math.log(max(counts) / min(counts)) or 1.0
    ticks: list[float] = []
    for count in sorted(counts, reverse=True):
        if not ticks or math.log(ticks[-1] / count) / log_range >= min_gap:
            ticks.append(count)
    return ticks, [f"{count:,.0f}" for count in ticks]


def _label_efficiency_y_limits(
    pretrained: ScoreCurve, scratch: ScoreCurve, baselines: Sequence[float]
) -> tuple[float, float]:
    """Limits that hold every measurement, and intervals as far as they reach no further out than half of all that."""
    lines = (pretrained, scratch)
    values = [
        *baselines,
        *(y for line in lines for _, y, *_ in line.points),
        *(y for line in lines for _, y in line.runs),
    ]
    low, high = min(values), max(values)
    interval_allowance = 0.5 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = max(low - interval_allowance, min([low, *(p[2] for line in lines for p in line.points)]))
    top = min(high + interval_allowance, max([high, *(p[3] for line in lines for p in line.points)]))
    margin = 0.05 * (top - bottom) or interval_allowance
    return bottom - margin, top + margin


def _label_curve_ends(axes: Axes, end_labels: Sequence[tuple[float, str, str]], height_points: float) -> None:
    """Each line's name beside its end, those that would touch moved apart. `height`: about the axes', in points."""
    bottom, top = axes.get_ylim()
    min_spacing = 12 / height_points
    labels = sorted(((y - bottom) / (top - bottom), name, color) for y, name, color in end_labels)
    positions = [place for place, _, _ in labels]
    for i in range(1, len(positions)):
        positions[i] = max(positions[i], positions[i - 1] + min_spacing)
    limit = 1.0
    for i in reversed(range(len(positions))):
        positions[i] = min(positions[i], limit)
        limit = positions[i] - min_spacing
    for place, (_, name, color) in zip(positions, labels, strict=True):
        axes.annotate(
            name, (1.015, place), xycoords="axes fraction", va="center", color=color, annotation_clip=False,
            parse_math=False,
        )  # fmt: skip


def moving_average(points: Points) -> list[tuple[float, float]]:
    """The moving average over the last fiftieth of the points; at the start, where it falls fast, over a tenth so far."""
    average, result = 0.0, []
    for i, (x, y) in enumerate(points):
        average += (y - average) / max(1.0, min(i / 10, len(points) / 50))
        result.append((x, average))
    return result


def downsample(points: Points, max_points: int = 600) -> Points:
    """At most about so many of the points, evenly spread, the last among them."""
    step = -(-len(points) // max_points)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


def _new_figure(size: tuple[float, float], right_axis: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.01 if right_axis else 0.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(_format_tick))
    return figure, axes


def _format_tick(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.3g}"


def _split_xy(points: Points) -> tuple[list[float], list[float]]:
    sampled = downsample(points)
    return [x for x, _ in sampled], [y for _, y in sampled]


def _y_limits_after_warmup(train: Points, validation: Points) -> tuple[float | None, float | None]:
    """Limits that leave out the first twentieth of the steps, whose fall would flatten all the rest."""
    all_points = [*train, *validation]
    last_step = max((x for x, _ in all_points), default=0)
    late_losses = [y for x, y in all_points if x >= last_step / 20]
    if not late_losses or max(late_losses) == min(late_losses):
        return None, None
    margin = 0.08 * (max(late_losses) - min(late_losses))
    return min(late_losses) - margin, max(late_losses) + margin


def _to_svg(figure: Figure, id_prefix: str) -> str:
    """The picture as an element of an HTML page: no declarations, no addresses, ids of its own, colours as variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{id_prefix}-", svg)
    svg = re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg
    )  # a hundredth of a point is enough
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">', svg, count=1)
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.strip()
