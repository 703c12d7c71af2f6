"""Label efficiency: the label ratio, and a small study that is interrupted and resumed."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import nextword
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import read_jsonl, read_sealed_json
from nextword.common.run_dir import RunDir
from nextword.evaluation.label_efficiency import StudyRun, equivalent_label_ratio, headline, run_study


def study_runs(
    scores: dict[int, tuple[float, float]], spread: float = 0.01, seeds: int = 3, error: float = 0.0
) -> list:
    """Runs with these scores {examples: (pre-trained, from scratch)}, and a spread over seeds around each."""
    return [
        StudyRun(
            n, n, 9999, seed, i == 0, "classify", "accuracy", score + spread * (seed - (seeds - 1) / 2), 1.0, {}, error
        )
        for n, pair in scores.items()
        for i, score in enumerate(pair)
        for seed in range(seeds)
    ]


def test_the_label_ratio_is_read_off_the_curve_from_scratch():
    runs = study_runs({32: (0.5, 0.3), 128: (0.7, 0.5), 512: (0.8, 0.7), 2048: (0.9, 0.8)})
    label_ratio = equivalent_label_ratio(runs)
    # With 32, 128 and 512 labels the ratio is 4; with 2,048 it is more than 1.
    assert [n for n, *_ in label_ratio["ratios"]] == [32, 128, 512, 2048]
    assert [bound for _, *bound in label_ratio["ratios"]] == [[pytest.approx(4)] * 2] * 3 + [[pytest.approx(1), None]]
    assert label_ratio["ratio"] == pytest.approx(4) and label_ratio["gain"] is True
    assert 1 < label_ratio["low"] < 4 and not label_ratio["at_least"]
    assert headline(label_ratio).startswith("Pre-training is worth 4.0 times the labels here (95 % CI: more than ")


def test_the_axis_of_examples_is_logarithmic():
    assert equivalent_label_ratio(study_runs({10: (0.5, 0.0), 1000: (2.0, 1.0)}))["ratios"][0][1] == pytest.approx(10)


def test_a_ratio_beyond_the_data_is_a_lower_bound():
    """Bounds count with the ratios: here three of five, so that the median is a bound although two ratios are known."""
    scores = {32: (0.8, 0.1), 128: (0.8, 0.2), 512: (0.8, 0.3), 2048: (0.55, 0.5), 7000: (0.9, 0.6)}
    label_ratio = equivalent_label_ratio(study_runs(scores))
    assert label_ratio["at_least"] and label_ratio["gain"] is True and label_ratio["high"] is None
    assert label_ratio["ratio"] == pytest.approx(7000 / 512)
    assert label_ratio["ratios"][1] == [128, pytest.approx(7000 / 128), None]
    assert "worth more than 14 times" in headline(label_ratio)


def test_an_even_number_of_ratios_has_the_middle_of_two():
    runs = study_runs({32: (0.4, 0.2), 128: (0.5, 0.4), 512: (0.55, 0.6), 2048: (0.7, 0.8)}, spread=1e-4)
    known = [low for _, low, high in equivalent_label_ratio(runs)["ratios"] if low == high]
    assert equivalent_label_ratio(runs)["ratio"] == pytest.approx(math.sqrt(sorted(known)[1] * sorted(known)[2]))


def test_pre_training_that_saves_no_labels():
    flat = equivalent_label_ratio(study_runs({32: (0.51, 0.5), 128: (0.49, 0.5), 512: (0.5, 0.5)}))
    assert flat["gain"] is None and headline(flat).startswith("No evidence that pre-training saves labels here")
    costs = equivalent_label_ratio(
        study_runs({32: (0.1, 0.3), 128: (0.3, 0.6), 512: (0.5, 0.9), 2048: (0.7, 0.95)}, spread=0.001)
    )
    assert (
        costs["gain"] is False
        and costs["ratio"] < 1
        and costs["at_most"]
        and headline(costs).startswith("Pre-training costs labels here")
    )
    lower = equivalent_label_ratio(study_runs({32: (1.5, 1.9), 128: (1.4, 1.6), 512: (1.2, 1.4)}), sign=-1)
    assert lower["gain"] is True and lower["ratio"] > 1


def test_one_seed_or_few_validation_examples_are_no_evidence():
    scores = {32: (0.5, 0.3), 128: (0.7, 0.5), 512: (0.8, 0.7), 2048: (0.9, 0.8)}
    one = equivalent_label_ratio(study_runs(scores, seeds=1))
    assert one["gain"] is None and one["low"] is None and "give several seeds" in headline(one)
    assert equivalent_label_ratio(study_runs(scores, error=0.2))["gain"] is None


def test_two_curves_of_one_law_seldom_differ():
    rng, false_gains, counts = np.random.default_rng(0), 0, (32, 128, 512)
    for i in range(12):
        means = np.zeros(3) if i % 2 else 0.1 * np.log(np.array(counts) / 16)
        runs = [
            replace(run, score=float(run.score + 0.03 * rng.normal()))
            for run in study_runs({n: (mean, mean) for n, mean in zip(counts, means, strict=True)}, spread=0.0)
        ]
        false_gains += equivalent_label_ratio(runs)["gain"] is not None
    assert false_gains <= 2


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True), st.integers(1, 5), st.sampled_from([1, -1]))
@settings(deadline=None, max_examples=12)
def test_a_shifted_curve_has_its_shift_as_ratio(scores, power, sign):
    """If pre-training with n labels equals n · 2^power labels from scratch, each known ratio is 2^power."""
    assume(all(b - a > 1e-3 for a, b in pairwise(sorted(scores))))
    ordered = sorted(scores, reverse=sign < 0)
    pairs = {
        2**i * 8: (ordered[i + power] if i + power < len(ordered) else ordered[-1] + sign, y)
        for i, y in enumerate(ordered)
    }
    for _, low, high in equivalent_label_ratio(study_runs(pairs, spread=0.0), sign)["ratios"]:
        if low == high:
            assert math.isclose(low, 2**power, rel_tol=1e-6)
        else:
            assert low <= 2**power * (1 + 1e-9) and high is None


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
