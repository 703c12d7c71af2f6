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
INK, SOFT, LINE, TRAIN, VALIDATION = "#010203", "#010204", "#010205", "#010206", "#010207"
SERIES = tuple(f"#0102{number:02x}" for number in range(8, 14))  # of several runs
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", TRAIN: "--train", VALIDATION: "--validation"}
VARIABLES |= {color: f"--s{number}" for number, color in enumerate(SERIES, start=1)}
DASHES: Any = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), "-", (0, (6, 2)))  # so that colour is not all

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and read by screen readers
    "svg.hashsalt": "nextword",  # the same data, the same file
    "font.size": 8.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def loss_curve(train: Points, validation: Points, bits_per_nat: float | None, *, wide: bool) -> str:
    """Training loss (every step faint, smoothed strong) and validation loss, by step.

    Args:
        bits_per_nat: bits per byte for a loss of one nat per token, which gives the right-hand axis; None leaves it out.
        wide: for a wide page, or for a telephone's.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure((7.6, 3.5) if wide else (3.7, 3.0), right=bits_per_nat is not None)
        if train:
            smooth = smoothed(train)
            axes.plot(*_columns(train), color=TRAIN, alpha=0.3, linewidth=0.9)
            axes.plot(*_columns(smooth), color=TRAIN, label="training")
        if validation:
            axes.plot(*_columns(validation), color=VALIDATION, marker="o", markersize=3.5, label="validation")
        axes.set_ylim(*_without_the_first_fall(train, validation))
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        if bits_per_nat is not None:
            there, back = partial(np.multiply, bits_per_nat), partial(np.multiply, 1 / bits_per_nat)
            right = axes.secondary_yaxis("right", functions=(there, back))
            right.set_ylabel("bits per byte")
            right.spines["right"].set_visible(False)
        if train or validation:
            axes.legend(frameon=False, labelcolor=INK, loc="upper right")
        return _svg(figure, f"loss-{'wide' if wide else 'narrow'}")


def compared_curves(lines: Sequence[tuple[str, Points]], x_label: str, y_label: str, name: str, *, wide: bool) -> str:
    """The curves of several runs in one figure, each named at its end where there is room, else in a legend.

    Args:
        lines: (a run's name, its points), as many as there are `SERIES` at most.
        wide: for a wide page, or for a telephone's.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure((7.6, 3.8) if wide else (3.7, 3.4))
        ends = []
        for (label, points), color, dash in zip(lines, SERIES, DASHES, strict=False):
            if not points:
                continue
            marker = "o" if len(points) < 40 else None
            axes.plot(*_columns(points), color=color, linestyle=dash, marker=marker, markersize=3.5, label=label)
            ends.append((points[-1][1], label, color))
        axes.set_ylim(*_without_the_first_fall([point for _, points in lines for point in points], ()))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        if wide and max(len(label) for label, _ in lines) <= 24:
            _name_at_the_right(axes, ends, height=0.75 * 72 * figure.get_figheight())
        else:
            for text in axes.legend(frameon=False, labelcolor=INK, loc="upper right").get_texts():
                text.set_parse_math(False)
        return _svg(figure, f"{name}-{'wide' if wide else 'narrow'}")


def training_curve(train: Points, name: str) -> str:
    """The training loss alone, small: every step faint, smoothed strong."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure((3.7, 2.3))
        axes.plot(*_columns(train), color=TRAIN, alpha=0.3, linewidth=0.9)
        axes.plot(*_columns(smoothed(train)), color=TRAIN, linewidth=1.4)
        axes.set_ylim(*_without_the_first_fall(train, ()))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return _svg(figure, name)


def score_curve(points: Points, rule: tuple[str, float] | None, name: str) -> str:
    """A score by step, small, with a dashed line at what a rule has that needs no model: (its name, its score)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure((3.7, 2.3))
        axes.plot(*_columns(points), color=VALIDATION, marker="o", markersize=3.5)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if rule is not None:
            values = [y for _, y in points] + [rule[1]]
            middle = (max(values) + min(values)) / 2
            axes.axhline(rule[1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                rule[0], (0, rule[1]), xycoords=("axes fraction", "data"), xytext=(2, 3 if rule[1] <= middle else -3),
                textcoords="offset points", va="bottom" if rule[1] <= middle else "top", color=SOFT, parse_math=False,
            )  # fmt: skip
            axes.margins(y=0.12)
        return _svg(figure, name)


def small_curve(points: Points, name: str, *, x_label: str = "step", zero: bool = False, log: bool = False) -> str:
    """One quantity by step, small. `zero`: its axis begins at 0. `log`: the steps are spaced by their logarithm."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure((3.7, 2.3))
        axes.plot(*_columns(points), color=VALIDATION, linewidth=1.4)
        axes.set_xlabel(x_label)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(_short))  # the scale brought its own, in powers
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if zero:
            axes.set_ylim(0, 1.08 * max(y for _, y in points) or 1)
        return _svg(figure, name)


class Line(NamedTuple):
    """A line of a plot: its name, its points as (x, y, low, high), and single measurements as (x, y)."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    dots: Points


def transfer_plot(first: Line, second: Line, rules: Sequence[tuple[str, float]], label: str, *, wide: bool) -> str:
    """Two lines over the number of examples, spaced by its logarithm, with their intervals and every single measurement.

    Args:
        rules: (name, score) of what needs no model, drawn as dashed lines.
        label: what is measured.
        wide: for a wide page, or for a telephone's.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure((7.6, 4.0) if wide else (3.7, 3.7))
        ends: list[tuple[float, str, str]] = []
        for line, color in ((second, TRAIN), (first, VALIDATION)):
            if not line.points:
                continue
            x, y, low, high = (list(column) for column in zip(*sorted(line.points), strict=True))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.scatter(*_columns(line.dots), color=color, alpha=0.4, s=11, linewidth=0)
            axes.plot(x, y, color=color, marker="o", markersize=4.5)
            ends.append((y[-1], line.name, color))
        for name, score in rules:
            axes.axhline(score, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            ends.append((score, name, SOFT))
        counts = sorted({x for line in (first, second) for x, *_ in line.points})
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(counts) / 1.2, max(counts) * 1.2)
        axes.set_xticks(*_apart(counts, 0.09 if wide else 0.17), minor=False)
        axes.minorticks_off()
        axes.set_ylim(*_around(first, second, [score for _, score in rules]))
        axes.set_xlabel("labelled examples to learn from")
        axes.set_ylabel(label, parse_math=False)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        _name_at_the_right(axes, ends, height=0.75 * 72 * figure.get_figheight())
        return _svg(figure, f"transfer-{'wide' if wide else 'narrow'}")


def _apart(counts: Sequence[float], least: float) -> tuple[list[float], list[str]]:
    """Where the axis is marked, and by what: the largest count, and of the others those with room for their number."""
    whole = math.log(max(counts) / min(counts)) or 1.0
    kept: list[float] = []
    for count in sorted(counts, reverse=True):
        if not kept or math.log(kept[-1] / count) / whole >= least:
            kept.append(count)
    return kept, [f"{count:,.0f}" for count in kept]


def _around(first: Line, second: Line, others: Sequence[float]) -> tuple[float, float]:
    """Limits that hold every measurement, and intervals as far as they reach no further out than half of all that."""
    lines = (first, second)
    values = [*others, *(y for line in lines for _, y, *_ in line.points), *(y for line in lines for _, y in line.dots)]
    low, high = min(values), max(values)
    room = 0.5 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = max(low - room, min([low, *(p[2] for line in lines for p in line.points)]))
    top = min(high + room, max([high, *(p[3] for line in lines for p in line.points)]))
    margin = 0.05 * (top - bottom) or room
    return bottom - margin, top + margin


def _name_at_the_right(axes: Axes, ends: Sequence[tuple[float, str, str]], height: float) -> None:
    """Each line's name beside its end, those that would touch moved apart. `height`: about the axes', in points."""
    bottom, top = axes.get_ylim()
    least = 12 / height
    order = sorted(((y - bottom) / (top - bottom), name, color) for y, name, color in ends)
    places = [place for place, _, _ in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + least)
    limit = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - least
    for place, (_, name, color) in zip(places, order, strict=True):
        axes.annotate(
            name, (1.015, place), xycoords="axes fraction", va="center", color=color, annotation_clip=False,
            parse_math=False,
        )  # fmt: skip


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The moving average over the last fiftieth of the points; at the start, where it falls fast, over a tenth so far."""
    average, result = 0.0, []
    for i, (x, y) in enumerate(points):
        average += (y - average) / max(1.0, min(i / 10, len(points) / 50))
        result.append((x, average))
    return result


def thinned(points: Points, most: int = 600) -> Points:
    """At most about so many of the points, evenly spread, the last among them."""
    every = -(-len(points) // most)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _figure(size: tuple[float, float], right: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.01 if right else 0.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    return figure, axes


def _short(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.3g}"


def _columns(points: Points) -> tuple[list[float], list[float]]:
    thin = thinned(points)
    return [x for x, _ in thin], [y for _, y in thin]


def _without_the_first_fall(train: Points, validation: Points) -> tuple[float | None, float | None]:
    """Limits that leave out the first twentieth of the steps, whose fall would flatten all the rest."""
    every = [*train, *validation]
    last = max((x for x, _ in every), default=0)
    late = [y for x, y in every if x >= last / 20]
    if not late or max(late) == min(late):
        return None, None
    margin = 0.08 * (max(late) - min(late))
    return min(late) - margin, max(late) + margin


def _svg(figure: Figure, name: str) -> str:
    """The picture as an element of an HTML page: no declarations, no addresses, ids of its own, colours as variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg
    )  # a hundredth of a point is enough
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">', svg, count=1)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.strip()
