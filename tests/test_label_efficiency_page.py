"""The page of `nextword transfer`: every measurement in the chart and in the tables."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nextword.common.errors import NextwordError
from nextword.reporting.report import write_report
from test_report import HOSTILE, ParsedPage, assert_contains, assert_self_contained, write_run

pytestmark = pytest.mark.charts

SCORES = {32: (0.5, 0.3), 128: (0.6, 0.35), 512: (0.7, 0.55), 5452: (0.8, 0.72)}


def point(examples: int, pretrained: float, scratch: float, half_width: float = 0.05, n: int = 2) -> dict[str, Any]:
    def score(value: float) -> dict[str, float]:
        return {"value": value, "low": value - half_width, "high": value + half_width, "n": n}

    return {"examples": examples, "pretrained": score(pretrained), "scratch": score(scratch)}


def run(examples: int, seed: int, pretrained: bool, score: float) -> dict[str, Any]:
    return {"examples": examples, "seed": seed, "pretrained": pretrained, "score": score, "seconds": 75.0}


STUDY: dict[str, Any] = {
    "task": "classify",
    "metric": "accuracy",
    "higher_is_better": True,
    "model": "/far/base/model",
    "data": ["/far/questions.csv"],
    "points": [point(examples, *scores) for examples, scores in SCORES.items()],
    "baselines": {"majority": {"value": 0.2, "low": 0.15, "high": 0.25, "n": 500}, "bag of words": {"value": 0.715}},
    "sentence": "Pre-training is worth 4 times the labels: 128 with it are as good as 512 without.",
    "cells": [
        run(examples, seed, i == 0, score + (0.02 if seed else -0.02))
        for examples, scores in SCORES.items()
        for seed in (0, 1)
        for i, score in enumerate(scores)
    ],
}
METADATA: dict[str, Any] = {
    "task": "transfer",
    "command": "nextword transfer base questions.csv --out runs/worth",
    "request": {"model": "/far/base/model", "data": ["/far/questions.csv"]},
}


def write_study(run_dir: Path, study: Any = STUDY, metadata: Any = METADATA) -> Path:
    """The page of a study with this result."""
    return write_report(write_run(run_dir, metadata, None, study))


def test_page_has_the_headline_the_chart_and_every_number(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    page = ParsedPage(path)
    assert path == tmp_path / "report.html"
    text = " ".join(page.text.split())
    assert f"{STUDY['sentence']}</span></h1>" in page.source
    assert_contains(
        text, "classify · base · questions.csv", METADATA["command"], "mean of 2 seeds", "Higher is better."
    )
    rows = re.findall(r'<tr><th scope="row">([\d,]+)</th>(.*?)</tr>', page.source)
    values = [(n, re.sub(r"<small>.*?</small>|<[^>]+>", " ", cells).split()) for n, cells in rows][:4]
    assert values == [
        ("32", ["0.500", "0.300", "+0.200"]),
        ("128", ["0.600", "0.350", "+0.250"]),
        ("512", ["0.700", "0.550", "+0.150"]),
        ("5,452", ["0.800", "0.720", "+0.080"]),
    ]
    assert_contains(text, "0.450 to 0.550", "All 16 runs")
    assert text.count("1 min 15 s") == 16
    for name in ("pre-trained", "from scratch", "majority", "bag of words", "32", "128", "512", "5,452"):
        assert len(re.findall(rf"<text[^>]*>{name}</text>", page.source)) == 2, name  # in the wide and the narrow chart
    [label] = page.values("aria-label")
    assert "128 examples: pre-trained 0.600 (0.550 to 0.650), from scratch 0.350 (0.300 to 0.400)" in label
    assert "bag of words: 0.715" in label
    assert_self_contained(page)
    assert "/far" not in page.source
    assert write_study(tmp_path).read_text(encoding="utf-8") == page.source


def chart_svg(run_dir: Path, scores: dict[int, tuple[float, float]], baselines: dict[str, float], width: str) -> str:
    """The chart of a study with these scores {examples: (pre-trained, from scratch)}, "wide" or "narrow"."""
    points = [
        {"examples": examples, "pretrained": {"value": pretrained}, "scratch": {"value": scratch}}
        for examples, (pretrained, scratch) in scores.items()
    ]
    study = {**STUDY, "points": points, "cells": [], "baselines": baselines}
    page = write_study(run_dir, study).read_text(encoding="utf-8")
    return page.split(f'<div class="{width}">')[1].split("</svg>")[0]


def test_chart_has_a_logarithmic_axis(tmp_path: Path) -> None:
    svg = chart_svg(tmp_path, {32: (0.5, 0.1), 64: (0.6, 0.3), 256: (0.9, 0.5)}, {}, "wide")
    marker = r'<use href="#[^"]*" x="([\d.-]+)" y="([\d.-]+)"'
    points = [(float(x), float(y)) for x, y in re.findall(marker, svg)][-6:]  # the scratch curve is drawn first
    expected = [math.log2(n / 32) / math.log2(256 / 32) for n in (32, 64, 256)]
    (left, bottom), (right, top) = points[0], points[-1]
    assert [(x - left) / (right - left) for x, _ in points] == pytest.approx([*expected, *expected], abs=1e-5)
    heights = [0.1 + 0.8 * (bottom - y) / (bottom - top) for _, y in points]
    assert heights == pytest.approx([0.1, 0.3, 0.5, 0.5, 0.6, 0.9], abs=1e-5)


@pytest.mark.parametrize("width", ["wide", "narrow"])
@pytest.mark.parametrize(
    "scores",
    [(0.50, 0.501, 0.502, 0.503), (0.9, 0.1, 0.9, 0.1), (0.0, 0.0, 0.0, 0.0), (1.0, 0.999, 0.5, 0.0)],
    ids=["close", "pairs", "zero", "spread"],
)
def test_curve_labels_do_not_overlap(tmp_path: Path, scores: tuple[float, ...], width: str) -> None:
    pretrained, scratch, three, four = scores
    svg = chart_svg(tmp_path, {32: (pretrained, scratch)}, {"three": three, "four": four}, width)
    labels = "pre-trained|from scratch|three|four"
    positions = [float(y) for y in re.findall(rf'<text[^>]*y="([\d.]+)"[^>]*>(?:{labels})</text>', svg)]
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[0])
    assert len(positions) == 4 and min(positions) > 0 and max(positions) < height
    assert all(upper - lower > 9 for lower, upper in pairwise(sorted(positions)))  # the font size is 8.5


def test_lower_scores_may_be_better(tmp_path: Path) -> None:
    study = {**STUDY, "metric": "bits_per_byte", "higher_is_better": False, "baselines": {}}
    page = ParsedPage(write_study(tmp_path, study))
    assert_contains(page.text, "Lower is better.", "−0.200")
    assert "Baselines" not in page.text


def test_a_single_seed_has_no_interval(tmp_path: Path) -> None:
    points = [point(40, 0.5, 0.5, half_width=0.0, n=1)]
    study = {**STUDY, "points": points, "cells": [], "baselines": None}
    page = ParsedPage(write_study(tmp_path, study, {**METADATA, "command": None}))
    assert not any(part in page.text for part in ("seeds", "runs", "Command"))
    assert "+0.000" in page.text


def test_invalid_studies_are_refused_and_invalid_entries_left_out(tmp_path: Path) -> None:
    for study in (
        {"task": "classify"},
        {**STUDY, "points": []},
        {**STUDY, "metric": "joy"},
        {**STUDY, "points": [{"examples": 3}]},
    ):
        with pytest.raises(NextwordError, match="no scores to plot"):
            write_study(tmp_path, study)
    nan = {"value": math.nan, "low": 0.1, "high": 0.2, "n": 2}
    points = [*STUDY["points"], {"examples": 600, "pretrained": nan, "scratch": nan}]
    runs = [*STUDY["cells"], {**STUDY["cells"][0], "score": None}, {}]
    study = {**STUDY, "points": points, "cells": runs, "baselines": {"bad": {}}}
    page = ParsedPage(write_study(tmp_path, study))
    assert not re.search(r"\b(nan|None)\b", page.text)
    assert "All 16 runs" in page.text


def test_names_are_never_markup(tmp_path: Path) -> None:
    study = {**STUDY, "task": HOSTILE, "sentence": HOSTILE, "baselines": {"$\\frac$ <b>": {"value": 0.4}}}
    request = {"model": HOSTILE, "data": [HOSTILE]}
    page = ParsedPage(write_study(tmp_path, study, {**METADATA, "command": HOSTILE, "request": request}))
    assert "script" not in page.tags
    assert page.text.count("alert('x')") == 2  # the names of paths and tasks are shortened


def test_an_unfinished_study_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(NextwordError, match="not finished"):
        write_study(tmp_path, None)
