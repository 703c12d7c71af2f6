"""Label efficiency: the label ratio, and a small study that is interrupted and resumed."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import nextword
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import read_jsonl, read_sealed_json
from nextword.common.run_dir import RunDir
from nextword.evaluation.label_efficiency import equivalent_label_ratio, headline, run_study


def test_the_label_ratio_is_read_off_the_curve_from_scratch():
    points = [(32, 0.5, 0.3), (128, 0.7, 0.5), (512, 0.8, 0.7), (2048, 0.9, 0.8)]
    label_ratio = equivalent_label_ratio(points)
    assert label_ratio["ratio"] == pytest.approx(4) and not label_ratio["at_least"]
    assert [n for _, n in label_ratio["ratios"]] == [32, 128, 512]
    expected = "with 128 labels it matches training from scratch with 512."
    assert headline(label_ratio) == f"Pre-training is worth 4.0 times the labels here: {expected}"


def test_the_axis_of_examples_is_logarithmic():
    label_ratio = equivalent_label_ratio([(10, 0.5, 0.0), (1000, 2.0, 1.0)])
    assert label_ratio["ratios"] == [[pytest.approx(10), 10]]


def test_a_ratio_beyond_the_data_is_a_lower_bound():
    label_ratio = equivalent_label_ratio([(32, 0.8, 0.3), (512, 0.9, 0.5)])
    assert label_ratio == {"ratio": 16.0, "examples": 32, "at_least": True, "ratios": []}
    assert "more than 16 times" in headline(label_ratio) and "512" in headline(label_ratio)
    only = equivalent_label_ratio([(32, 0.2, 0.3), (512, 0.9, 0.5)])
    assert only["ratio"] == 1 and "is beyond the data" in headline(only)


def test_pre_training_that_saves_no_labels():
    assert "saves no labels" in headline(equivalent_label_ratio([(32, 0.2, 0.3), (128, 0.3, 0.5)]))
    costs = equivalent_label_ratio([(32, 0.1, 0.3), (128, 0.3, 0.6), (512, 0.5, 0.9)])
    assert costs["ratio"] < 1 and headline(costs).startswith("Pre-training costs labels")


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True), st.integers(1, 5), st.sampled_from([1, -1]))
def test_a_shifted_curve_has_its_shift_as_ratio(scores, power, sign):
    """If pre-training with n labels equals n · 2^power labels from scratch, each known ratio is 2^power."""
    assume(all(b - a > 1e-3 for a, b in pairwise(sorted(scores))))
    ordered = sorted(scores, reverse=sign < 0)
    counts = [2**i * 8 for i in range(len(ordered))]
    points = [
        (n, ordered[i + power] if i + power < len(ordered) else ordered[-1] + sign, y)
        for i, (n, y) in enumerate(zip(counts, ordered, strict=True))
    ]
    for ratio, _ in equivalent_label_ratio(points, sign)["ratios"]:
        assert math.isclose(ratio, 2**power, rel_tol=1e-6)


def fake_finetune(*, out, limit, seed, scratch, resume, console):
    """A fine-tuning run without training: its score grows with the examples and with pre-training."""
    examples = limit or 60
    out.mkdir()
    data = {"train": {"examples": examples}, "available": 60}
    run = {"recipe": {}, "request": {}, "task": {"task": "classify", "kind": "label"}, "data": data}
    RunDir(out).write_metadata(run)
    accuracy = examples / 100 + 0.01 * seed + (0 if scratch else 0.2)
    return {"accuracy": accuracy, "seconds": 1.0, "baselines": {"majority": {"accuracy": {"value": 0.5}}}}


def test_a_study_is_resumed(tmp_path):
    request = {"model": "base", "data": ["data.jsonl"], "counts": [8, 500], "seeds": 2}
    calls = []

    def failing(**settings):
        calls.append(settings["out"].name)
        if len(calls) == 3:
            raise NextwordError("interrupted")
        return fake_finetune(**settings)

    def study(finetune, **changes):
        arguments = tmp_path / "study", request | changes, "nextword transfer"
        return run_study(finetune, *arguments, resume=True, console=Console(quiet=True))

    with pytest.raises(NextwordError, match="interrupted"):
        study(failing)
    stored = read_jsonl(tmp_path / "study" / "metrics.jsonl")
    assert len(stored) == 2
    result = study(fake_finetune)
    assert read_jsonl(tmp_path / "study" / "metrics.jsonl")[:2] == stored
    # 500 exceeds the data: only 8 and all examples are evaluated.
    assert [point["examples"] for point in result["points"]] == [8, 60] and len(result["cells"]) == 8
    assert result["metric"] == "accuracy" and result["baselines"] == {"majority": {"value": 0.5}}
    assert result["points"][0]["pretrained"]["value"] == pytest.approx(0.285)
    assert not list((tmp_path / "study" / "cells").iterdir())
    assert study(failing) == result == read_sealed_json(tmp_path / "study" / "result.json")
    with pytest.raises(UsageError, match="seeds: 2 → 3"):
        study(fake_finetune, seeds=3)


def test_the_command(base, tmp_path):
    rows = [{"text": f"the {'good' if i % 2 else 'bad'} name {i}", "label": "ab"[i % 2]} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"counts": [8], "steps": 4, "training": {"evaluations": 1}}
    result = nextword.transfer(base, data, tmp_path / "study", num_seeds=1, **settings)
    assert result.metric == "accuracy" and len(result.cells) == 4 and "majority" in result.baselines
    assert (tmp_path / "study" / "report.html").is_file()
    with pytest.raises(UsageError, match="must be a whole number from 1"):
        nextword.transfer(base, data, tmp_path / "other", num_seeds=0)
