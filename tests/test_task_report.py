"""Reports and model cards of fine-tuning runs: scores beside baselines and the base model."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.commands.finetune import compare_with_baseline
from nextword.reporting.report import write_card, write_report
from test_report import (
    HOSTILE,
    METADATA,
    RESULT,
    ParsedPage,
    assert_contains,
    assert_self_contained,
    training_records,
    write_run,
)


def score(value: float, low: float, high: float, n: int = 200) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n}


TASK_METADATA: dict[str, Any] = {
    "command": "nextword finetune /home/someone/models/base reviews.csv --out runs/reviews",
    "created": "2026-01-02T03:04:05+00:00",
    "recipe": {"task": "classify", "lora": True, "scratch": False},
    "task": {
        "task": "classify",
        "kind": "label",
        "labels": ["good", "bad", "<b>odd"],
        "answer_tokens": 0,
        "chat": False,
        "columns": {"text": "review", "label": "stars"},
    },
    "base": {"model": "/home/someone/models/base", "weights": "ab12"},
    "model": {"vocab_size": 4099, "context_length": 256, "n_labels": 3},
    "parameters": 4_066_048,
    "trained_parameters": 12_345,
    "training": {"optimizer": "adamw", "lr": 0.0003},
    "tuning": {"rank": 8, "auxiliary": 0.5},
    "metric": "macro_f1",
    "data": {
        "train": {"examples": 900},
        "validation": {"examples": 200},
        "problems": 2,
        "labels": {"good": 600, "bad": 290, "<b>odd": 10},
    },
}
TASK_RESULT: dict[str, Any] = {
    "run": "/home/someone/runs/reviews",
    "steps": 300,
    "seconds": 61.0,
    "task": "classify",
    "metric": "macro_f1",
    "loss": 0.61,
    "bits_per_byte": None,
    "best_step": 200,
    "macro_f1": 0.72,
    "scores": {"macro_f1": score(0.72, 0.65, 0.78), "accuracy": score(0.81, 0.76, 0.86)},
    "baselines": {
        "majority": {"macro_f1": score(0.27, 0.25, 0.29), "accuracy": score(0.67, 0.6, 0.73)},
        "bag of words": {"macro_f1": score(0.64, 0.57, 0.7)},
    },
}


def task_records() -> list[dict[str, Any]]:
    records = [record for record in training_records() if "validation" not in record and "sample" not in record]
    evaluations = [(100, 0.5, 0.9), (200, 0.72, 0.61), (300, 0.7, 0.66)]
    return records + [{"step": s, "validation": {"loss": loss, "macro_f1": f1}} for s, f1, loss in evaluations]


def write_task_run(run_dir: Path, metadata: Any = TASK_METADATA, result: Any = TASK_RESULT) -> Path:
    return write_run(run_dir, metadata, task_records(), result)


@pytest.mark.charts
def test_scores_are_shown_beside_baselines(tmp_path: Path) -> None:
    page = ParsedPage(write_report(write_task_run(tmp_path / "reviews")))
    text = " ".join(page.text.split())
    assert_contains(
        text, "On 200 examples of the validation set: macro-F1 0.720 (95 % confidence interval 0.650 to 0.780)."
    )
    assert_contains(text, "best baseline", "bag of words, has 0.640: the model is better", "0.570 to 0.700")
    assert_contains(text, "classify · from base · finished", "12.3 k", "4.07 M", "text (review), label (stars)")
    assert_contains(text, "The most frequent label, good, has 600 examples; the least frequent, <b>odd, has 10.")
    assert "perplexity" not in text
    assert "/home/someone" not in text.replace(TASK_METADATA["command"], "")
    # score, validation loss, training loss, learning rate, gradient norm, throughput; the dot plot is HTML
    assert page.tags.count("svg") == 6 and page.tags.count("figure") == 7
    labels = page.values("aria-label")
    assert any("macro-F1: this model 0.720 (0.650 to 0.780); majority 0.270" in label for label in labels)
    assert any(": 0.5 at step 100, 0.7 at step 300." in label for label in labels)
    assert_self_contained(page)


def test_dot_plot_positions(tmp_path: Path) -> None:
    source = ParsedPage(write_report(write_task_run(tmp_path / "run"))).source
    axis = [(float(x), float(tick)) for x, tick in re.findall(r'<em style="left:([\d.]+)%">([\d.]+)</em>', source)]
    (x0, first), (x1, last) = axis[0], axis[-1]
    assert (x0, x1) == (0, 100) and first <= 0.25 and last >= 0.78

    def to_value(position: str) -> float:
        return first + (last - first) * float(position) / 100

    assert all(tick == pytest.approx(to_value(str(x)), abs=1e-4) for x, tick in axis)
    dots = re.findall(r'<b style="left:([\d.]+)%">', source)
    assert [to_value(x) for x in dots] == pytest.approx([0.72, 0.27, 0.64], abs=1e-4)
    intervals = re.findall(r'<i style="left:([\d.]+)%;width:([\d.]+)%">', source)
    assert [to_value(x) for x, _ in intervals] == pytest.approx([0.65, 0.25, 0.57], abs=2e-4)
    widths = [(last - first) * float(width) / 100 for _, width in intervals]
    assert widths == pytest.approx([0.13, 0.04, 0.13], abs=2e-4)
    assert 'class="highlighted"><span>this model' in source


@pytest.mark.parametrize(
    ("model", "baseline", "comparison"),
    [
        (score(0.9, 0.8, 0.95), score(0.5, 0.4, 0.6), "better, and the confidence intervals do not overlap."),
        (score(0.5, 0.4, 0.6), score(0.9, 0.8, 0.95), "worse, and the confidence intervals do not overlap."),
        (score(0.5, 0.4, 0.6), score(0.55, 0.45, 0.65), "worse, but the confidence intervals overlap."),
        (score(0.5, 0.4, 0.6), score(0.5, 0.4, 0.6), "the model has the same score."),
        (score(0.5, 0.4, 0.6), {"value": 0.4}, "has 0.400: the model is better."),
    ],
    ids=["better", "worse", "overlapping", "same", "no-interval"],
)
def test_comparison_with_the_best_baseline(tmp_path: Path, model: Any, baseline: Any, comparison: str) -> None:
    result = {**TASK_RESULT, "scores": {"macro_f1": model}, "baselines": {"majority": {"macro_f1": baseline}}}
    run = write_task_run(tmp_path / "run", result=result)
    assert comparison in " ".join(ParsedPage(write_report(run)).text.split())
    assert comparison in write_card(run).read_text(encoding="utf-8")


def test_the_paired_difference_from_the_best_baseline_is_shown(tmp_path: Path) -> None:
    result = {**TASK_RESULT, "baseline_difference": {"baseline": "bag of words", **score(0.08, 0.01, 0.15)}}
    run = write_task_run(tmp_path / "run", result=result)
    comparison = "has 0.640: the model is better (difference 0.080 (0.010 to 0.150))."
    assert comparison in " ".join(ParsedPage(write_report(run)).text.split())
    assert comparison in write_card(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("difference", "line"),
    [
        (
            {"value": 0.05, "low": 0.01, "high": 0.09},
            "better than majority, the best baseline: +0.050 (+0.010 to +0.090)",
        ),
        ({"value": 0.05, "low": -0.01, "high": 0.11}, "+0.050 (-0.010 to +0.110), which may be chance"),
        (
            {"value": -0.05, "low": -0.09, "high": -0.01},
            "worse than majority, a baseline that needs no language model: -0.050",
        ),
        ({"value": 0.0, "low": None, "high": None}, "no better than majority, a baseline"),
    ],
)
def test_the_terminal_compares_with_the_best_baseline(difference: dict[str, Any], line: str) -> None:
    assert line in compare_with_baseline("accuracy", {"baseline": "majority", **difference})


def test_only_imbalanced_label_distributions_are_shown(tmp_path: Path) -> None:
    def report(labels: dict[str, int]) -> str:
        metadata = {**TASK_METADATA, "data": {**TASK_METADATA["data"], "labels": labels}}
        return ParsedPage(write_report(write_task_run(tmp_path / "run", metadata))).text

    balanced = report({"good": 300, "bad": 310, "<b>odd": 290})
    assert "Label distribution" not in balanced and "290 to 310" in balanced
    assert "280 more labels" in report({f"label {i}": 500 - i for i in range(300)})


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (1.5, 1.53, "Forgetting: from 1.500 to 1.530 bits per byte"),
        (1.5, 1.49, "No forgetting: from 1.500 to 1.490 bits per byte"),
        (1.5, None, ""),
    ],
    ids=["forgot", "kept", "unknown"],
)
def test_chat_models_are_evaluated_by_bits_per_byte_and_forgetting(
    tmp_path: Path, before: float, after: float | None, sentence: str
) -> None:
    task = {"task": "chat", "kind": "answer", "chat": True, "labels": []}
    result = {
        "task": "chat",
        "metric": "bits_per_byte",
        "loss": 2.5,
        "bits_per_byte": 1.25,
        "scores": {},
        "baselines": {},
    }
    result |= {"forgetting": {"text": "/home/someone/data", "before": before, "after": after}, "seconds": 5.0}
    metadata = {**TASK_METADATA, "metric": "bits_per_byte", "task": task}
    page = ParsedPage(write_report(write_run(tmp_path / "run", metadata, training_records(), result)))
    assert "On the validation set: bits per byte 1.250 (lower is better)." in " ".join(page.text.split())
    assert ("forgetting" in page.text.lower()) == bool(sentence) and sentence in page.text
    assert page.tags.count("svg") == 5  # the loss for wide and narrow screens as in pre-training, three small charts
    assert "/home/someone/data" not in page.source
    assert 'class="dots"' not in page.source  # no plot of a single number


def test_continued_pretraining_is_compared_with_the_base_model(tmp_path: Path) -> None:
    metadata = {**METADATA, "task": {"task": "continue"}, "base": {"model": "/home/someone/base/model"}}
    result = {**RESULT, "task": "continue", "before": {"loss": 3.9, "bits_per_byte": 1.5}, "forgetting": None}
    page = ParsedPage(write_report(write_run(tmp_path / "run", metadata, training_records(), result)))
    text = " ".join(page.text.split())
    assert_contains(text, "bits per byte1.225", "base model1.500", "The base model has 1.500.", "from base")
    assert "Validation loss by position" in text and 'class="dots"' in page.source


@pytest.mark.parametrize("result", [None, {}, {"scores": [], "metric": [1], "baselines": {"a": 3}, "before": 2}])
@pytest.mark.parametrize("records", [None, [], [{"step": 1, "validation": {"macro_f1": 0.5}}], [{"validation": None}]])
@pytest.mark.parametrize(
    "metadata",
    [{"task": {"task": "classify"}}, {"task": {"task": "new"}, "data": {"labels": {"a": -1, "b": "x"}}}, TASK_METADATA],
)
def test_incomplete_runs_have_reports_and_cards(tmp_path: Path, metadata: Any, records: Any, result: Any) -> None:
    run = write_run(tmp_path / "run", metadata, records, result)
    assert "run" in ParsedPage(write_report(run)).text
    assert write_card(run).read_text(encoding="utf-8").startswith("---\n")


@pytest.mark.charts
@pytest.mark.parametrize("value", [math.nan, math.inf, None, 0.0, -0.0, 1e300], ids=str)
def test_invalid_numbers_are_not_shown(tmp_path: Path, value: Any) -> None:
    scores = {"value": value, "low": value, "high": value, "n": value}
    result = {**TASK_RESULT, "macro_f1": value, "loss": value, "scores": {"macro_f1": scores, "accuracy": scores}}
    result |= {"baselines": {"majority": {"macro_f1": scores}}, "before": {"macro_f1": scores}, "seconds": value}
    metadata = {**TASK_METADATA, "trained_parameters": value, "tuning": {"rank": value, "auxiliary": value}}
    records = [*task_records(), {"step": 300, "loss": value, "validation": {"macro_f1": value, "loss": value}}]
    run = write_run(tmp_path / "run", metadata, records, result)
    page = ParsedPage(write_report(run))
    card = write_card(run).read_text(encoding="utf-8").replace("mean_resizing=False", "")
    for text in (page.text, *page.values("aria-label"), card):
        assert not re.search(r"\b(nan|inf|none|null|false)\b|-0\.0+\b", text, re.IGNORECASE)


@pytest.mark.charts
def test_names_of_labels_columns_and_baselines_are_never_markup(tmp_path: Path) -> None:
    task = {**TASK_METADATA["task"], "labels": [HOSTILE, "a"], "columns": {HOSTILE: HOSTILE, "$x$": "$\\frac$"}}
    data = {**TASK_METADATA["data"], "labels": {HOSTILE: 9, "a": 1}}
    metadata = {**TASK_METADATA, "task": task, "data": data, "base": {"model": HOSTILE}}
    result = {**TASK_RESULT, "baselines": {"$\\frac$ <script>": {"macro_f1": score(0.9, 0.8, 0.95)}}}
    run = write_task_run(tmp_path / "run", metadata, result)
    page = ParsedPage(write_report(run))
    assert "script" not in page.tags and "alert('x')" in page.text
    card = write_card(run).read_text(encoding="utf-8")
    assert "<script" not in card and "````text" not in card


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
SCORES = st.dictionaries(st.sampled_from(["macro_f1", "accuracy", "chrf", "loss", "joy"]), VALUES | st.floats())


@pytest.mark.charts
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_content_gives_a_report_and_a_card(tmp_path: Path, data: st.DataObject) -> None:
    metadata = {**TASK_METADATA, data.draw(st.sampled_from(sorted(TASK_METADATA))): data.draw(VALUES)}
    labels = st.fixed_dictionaries({"labels": SCORES, "train": VALUES})
    metadata["data"] = data.draw(st.just(TASK_METADATA["data"]) | labels)
    result = {**TASK_RESULT, "scores": data.draw(SCORES), "before": data.draw(SCORES | VALUES)}
    result["baselines"] = data.draw(st.dictionaries(st.text(max_size=5), SCORES | VALUES, max_size=3) | VALUES)
    result[data.draw(st.sampled_from(["metric", "loss", "seconds", "forgetting", "run"]))] = data.draw(VALUES)
    run = write_run(tmp_path / "run", metadata, [], result)
    assert "run" in ParsedPage(write_report(run)).text
    assert write_card(run).read_text(encoding="utf-8").startswith("---\n")
