"""The page of `nextword transfer`: every number that was measured, once in the plot and once in the table."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nextword.common.errors import NextwordError
from nextword.reporting.charts import ScoreCurve, plot_label_efficiency
from nextword.reporting.label_efficiency_page import write_label_efficiency_page
from nextword.reporting.report import write_report
from test_report import HOSTILE, Page


def point(examples: int, pretrained: float, scratch: float, half: float = 0.05, n: int = 2) -> dict[str, Any]:
    def whole(value: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half, "n": n}

    return {"examples": examples, "pretrained": whole(pretrained), "scratch": whole(scratch)}


def cell(examples: int, seed: int, pretrained: bool, score: float) -> dict[str, Any]:
    return {"examples": examples, "seed": seed, "pretrained": pretrained, "score": score, "seconds": 75.0}


FACTS: dict[str, Any] = {
    "task": "classify", "metric": "accuracy", "higher_is_better": True, "model": "base", "data": "questions.csv",
    "points": [point(32, 0.5, 0.3), point(128, 0.6, 0.35), point(512, 0.7, 0.55), point(5452, 0.8, 0.72)],
    "baselines": {"majority": {"value": 0.2, "low": 0.15, "high": 0.25, "n": 500}, "bag of words": {"value": 0.715}},
    "sentence": "Pre-training is worth 4 times the labels here: 128 with it do as well as 512 without.",
    "cells": [
        cell(n, seed, pretrained, base + (0.02 if seed else -0.02))
        for n, one, other in ((32, 0.5, 0.3), (128, 0.6, 0.35), (512, 0.7, 0.55), (5452, 0.8, 0.72))
        for seed in (0, 1)
        for pretrained, base in ((True, one), (False, other))
    ],
    "command": "nextword transfer base questions.csv --out runs/worth",
}  # fmt: skip


def test_the_page_says_it_in_a_sentence_a_plot_and_numbers(tmp_path: Path) -> None:
    path = write_label_efficiency_page(tmp_path, FACTS)
    page = Page(path)
    assert path == tmp_path / "report.html"
    text = " ".join(page.text.split())
    assert f'<h1><span class="sentence">{FACTS["sentence"]}</span></h1>' in page.source
    for said in ("classify · base · questions.csv", FACTS["command"], "the mean of 2 seeds", "Higher is better."):
        assert said in text, said
    rows = re.findall(r'<tr><th scope="row">([\d,]+)</th>(.*?)</tr>', page.source)
    told = [(n, re.sub(r"<small>.*?</small>|<[^>]+>", " ", cells).split()) for n, cells in rows][:4]
    assert told == [
        ("32", ["0.500", "0.300", "+0.200"]),
        ("128", ["0.600", "0.350", "+0.250"]),
        ("512", ["0.700", "0.550", "+0.150"]),
        ("5,452", ["0.800", "0.720", "+0.080"]),
    ]
    assert "0.450 to 0.550" in text
    assert "Each of the 16 runs" in text and text.count("1 min 15 s") == 16
    for name in ("pre-trained", "from scratch", "majority", "bag of words"):
        assert len(re.findall(rf"<text[^>]*>{name}</text>", page.source)) == 2, name  # in the wide plot and the narrow
    for count in ("32", "128", "512", "5,452"):
        assert len(re.findall(rf"<text[^>]*>{count}</text>", page.source)) == 2, count


def test_the_page_stands_alone_and_is_told_in_words(tmp_path: Path) -> None:
    page = Page(write_label_efficiency_page(tmp_path, FACTS))
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img", page.source)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(value[1:] in ids for name, value in page.attributes if name == "href" and value)
    [label] = [value for name, value in page.attributes if name == "aria-label"]
    assert label is not None
    assert "128 examples: pre-trained 0.600 (0.550 to 0.650), from scratch 0.350 (0.300 to 0.400)" in label
    assert "bag of words, without a model: 0.715" in label
    assert ("lang", "en") in page.attributes
    assert "prefers-color-scheme: dark" in page.source
    assert "#0102" not in page.source  # the stand-in colours
    assert write_label_efficiency_page(tmp_path, FACTS).read_text(encoding="utf-8") == page.source


def marks(svg: str) -> list[tuple[float, float]]:
    """Where the drawing puts its points: x and y of every marker."""
    return [(float(x), float(y)) for x, y in re.findall(r'<use href="#[^"]*" x="([\d.-]+)" y="([\d.-]+)"', svg)]


def test_the_axis_is_logarithmic_and_the_points_are_where_they_were_measured() -> None:
    first = ScoreCurve("one", [(32, 0.5, 0.5, 0.5), (64, 0.6, 0.6, 0.6), (256, 0.9, 0.9, 0.9)], [])
    second = ScoreCurve("two", [(32, 0.1, 0.1, 0.1), (64, 0.3, 0.3, 0.3), (256, 0.5, 0.5, 0.5)], [])
    points = marks(plot_label_efficiency(first, second, [], "accuracy", wide=True))[
        -6:
    ]  # the second line is under the first
    whole = [math.log2(n / 32) / math.log2(256 / 32) for n in (32, 64, 256)]
    (left, bottom), (right, top) = points[0], points[-1]
    assert [(x - left) / (right - left) for x, _ in points] == pytest.approx([*whole, *whole], abs=1e-5)
    heights = [0.1 + 0.8 * (bottom - y) / (bottom - top) for _, y in points]
    assert heights == pytest.approx([0.1, 0.3, 0.5, 0.5, 0.6, 0.9], abs=1e-5)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    "scores",
    [(0.50, 0.501, 0.502, 0.503), (0.9, 0.1, 0.9, 0.1), (0.0, 0.0, 0.0, 0.0), (1.0, 0.999, 0.5, 0.0)],
    ids=["close", "pairs", "zero", "spread"],
)
def test_names_of_lines_never_touch(scores: tuple[float, ...], wide: bool) -> None:
    a, b, c, d = scores
    first, second = ScoreCurve("one", [(32, a, a, a)], []), ScoreCurve("two", [(32, b, b, b)], [])
    svg = plot_label_efficiency(first, second, [("three", c), ("four", d)], "accuracy", wide=wide)
    places = {}
    for name in ("one", "two", "three", "four"):
        [found] = re.findall(rf'<text[^>]*y="([\d.]+)"[^>]*>{name}</text>', svg)
        places[name] = float(found)
    ordered = sorted(places.values())
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[0])
    assert all(b - a > 9 for a, b in pairwise(ordered))  # the letters are 8.5 high
    assert ordered[0] > 0 and ordered[-1] < height


def test_a_lower_score_may_be_the_better_one(tmp_path: Path) -> None:
    facts = {**FACTS, "metric": "bits_per_byte", "higher_is_better": False, "baselines": {}}
    page = Page(write_label_efficiency_page(tmp_path, facts))
    assert "Lower is better." in page.text
    assert "−0.200" in page.text
    assert "Without a model" not in page.text


def test_one_seed_has_no_interval_to_speak_of(tmp_path: Path) -> None:
    facts = {**FACTS, "points": [point(40, 0.5, 0.5, half=0.0, n=1)], "cells": [], "baselines": None, "command": None}
    page = Page(write_label_efficiency_page(tmp_path, facts))
    assert "seeds" not in page.text and "Each of the" not in page.text and "The command" not in page.text
    assert "+0.000" in page.text


def test_what_cannot_be_drawn_is_refused_or_left_out(tmp_path: Path) -> None:
    for facts in ({}, {**FACTS, "points": []}, {**FACTS, "metric": "joy"}, {**FACTS, "points": [{"examples": 3}]}):
        with pytest.raises(NextwordError, match="no scores to be drawn"):
            write_label_efficiency_page(tmp_path, facts)
    nan = {"value": math.nan, "low": 0.1, "high": 0.2, "n": 2}
    points = [*FACTS["points"], {"examples": 600, "pretrained": nan, "scratch": nan}]
    cells = [*FACTS["cells"], {**FACTS["cells"][0], "score": None}, {}]
    page = Page(
        write_label_efficiency_page(tmp_path, {**FACTS, "points": points, "cells": cells, "baselines": {"bad": {}}})
    )
    assert not re.search(r"\b(nan|None)\b", page.text)
    assert "Each of the 16 runs" in page.text


def test_names_are_text(tmp_path: Path) -> None:
    names = {"task": HOSTILE, "model": HOSTILE, "data": HOSTILE, "sentence": HOSTILE, "command": HOSTILE}
    baselines = {"$\\frac$ <b>": {"value": 0.4}}
    page = Page(write_label_efficiency_page(tmp_path, {**FACTS, **names, "baselines": baselines}))
    assert "script" not in page.tags
    assert page.text.count("alert('x')") == 5


def test_the_report_of_a_comparison_can_be_made_again(tmp_path: Path) -> None:
    run = {
        "task": "transfer",
        "command": FACTS["command"],
        "request": {"model": "/far/base/model", "data": ["/far/q.csv"]},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(NextwordError, match="not finished"):
        write_report(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({**FACTS, "model": "/far/base/model", "data": ["/far/q.csv"]}))
    page = Page(write_report(tmp_path))
    assert FACTS["sentence"] in page.text
    assert "classify · base · q.csv" in page.text
    assert "/far" not in page.source
