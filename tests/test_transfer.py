"""What pre-training is worth in labels: the arithmetic, and a small grid that is stopped and goes on."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nextword.commands import api
from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import read_json, read_jsonl
from nextword.evaluation.label_efficiency import equivalent_label_ratio, headline


def test_worth_is_read_off_the_curve_from_scratch():
    points = [(32, 0.5, 0.3), (128, 0.7, 0.5), (512, 0.8, 0.7), (2048, 0.9, 0.8)]
    worth = equivalent_label_ratio(points)
    assert worth["ratio"] == pytest.approx(4) and not worth["at_least"]
    assert [n for _, n in worth["ratios"]] == [32, 128, 512]
    assert headline(worth) == "Pre-training is worth 4.0 times the labels here: 128 with it do as well as 512 without."


def test_between_two_points_the_axis_is_logarithmic():
    worth = equivalent_label_ratio([(10, 0.5, 0.0), (1000, 2.0, 1.0)])
    assert worth["ratios"] == [[pytest.approx(10), 10]]


def test_beyond_the_data_only_a_bound_is_told():
    worth = equivalent_label_ratio([(32, 0.8, 0.3), (512, 0.9, 0.5)])
    assert worth == {"ratio": 16.0, "examples": 32, "at_least": True, "ratios": []}
    assert "more than 16 times" in headline(worth) and "512" in headline(worth)
    only = equivalent_label_ratio([(32, 0.2, 0.3), (512, 0.9, 0.5)])
    assert only["ratio"] == 1 and "lies beyond the data" in headline(only)


def test_pre_training_that_is_worth_nothing_is_said_to_be():
    assert "not worth any" in headline(equivalent_label_ratio([(32, 0.2, 0.3), (128, 0.3, 0.5)]))
    costs = equivalent_label_ratio([(32, 0.1, 0.3), (128, 0.3, 0.6), (512, 0.5, 0.9)])
    assert costs["ratio"] < 1 and headline(costs).startswith("Pre-training costs labels")


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True), st.integers(1, 5), st.sampled_from([1, -1]))
def test_a_curve_moved_along_the_axis_is_worth_its_move(scores, power, sign):
    """Pre-trained with n labels as good as from scratch with n · 2^power: worth 2^power, wherever it can be read off."""
    assume(all(b - a > 1e-3 for a, b in pairwise(sorted(scores))))
    ordered = sorted(scores, reverse=sign < 0)
    counts = [2**i * 8 for i in range(len(ordered))]
    points = [
        (n, ordered[i + power] if i + power < len(ordered) else ordered[-1] + sign, y)
        for i, (n, y) in enumerate(zip(counts, ordered, strict=True))
    ]
    for ratio, _ in equivalent_label_ratio(points, sign)["ratios"]:
        assert math.isclose(ratio, 2**power, rel_tol=1e-6)


def test_a_grid_goes_on_where_it_stood(base, tmp_path, monkeypatch):
    rows = [{"text": f"the {'good' if i % 2 else 'bad'} name {i}", "label": "ab"[i % 2]} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"counts": [8, 500], "seeds": 2, "steps": 4, "training": {"evaluations": 1}}
    whole, calls = api.finetune, []

    def third_fails(*words, **named):
        calls.append(named["out"].name)
        if len(calls) == 3:
            raise NextwordError("the light went out")
        return whole(*words, **named)

    monkeypatch.setattr(api, "finetune", third_fails)
    with pytest.raises(NextwordError, match="light"):
        api.transfer(base, data, tmp_path / "grid", **settings)
    kept = read_jsonl(tmp_path / "grid" / "metrics.jsonl")
    assert len(kept) == 2
    monkeypatch.setattr(api, "finetune", whole)
    result = api.transfer(base, data, tmp_path / "grid", resume=True, **settings)
    assert read_jsonl(tmp_path / "grid" / "metrics.jsonl")[:2] == kept
    # 500 is more than there is: only 8 and all of them are measured.
    assert [p["examples"] for p in result["points"]] == [8, kept[0]["available"]] and len(result["cells"]) == 8
    assert result["metric"] == "accuracy" and result["sentence"] and "majority" in result["baselines"]
    assert (tmp_path / "grid" / "report.html").is_file() and not list((tmp_path / "grid" / "cells").iterdir())
    assert api.transfer(base, data, tmp_path / "grid", resume=True, **settings) == read_json(
        tmp_path / "grid" / "result.json"
    )
    with pytest.raises(UsageError, match="seeds: 2 → 3"):
        api.transfer(base, data, tmp_path / "grid", resume=True, **{**settings, "seeds": 3})
    with pytest.raises(UsageError, match="at least 1"):
        api.transfer(base, data, tmp_path / "other", seeds=0)
