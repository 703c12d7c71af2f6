"""The report of a run that learned a task: its scores beside what needs no model, drawn where the axis says."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.reporting.report import write_card, write_report
from test_report import FACTS, HOSTILE, RESULT, Page, make, records


def score(value: float, low: float, high: float, n: int = 200) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n}


TUNED: dict[str, Any] = {
    "command": "nextword finetune /home/someone/models/base reviews.csv --out runs/reviews",
    "created": "2026-01-02T03:04:05+00:00",
    "recipe": {"task": "classify", "lora": True, "scratch": False},
    "task": {
        "task": "classify", "kind": "label", "labels": ["good", "bad", "<b>odd"], "answer_tokens": 0, "chat": False,
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
        "train": {"examples": 900}, "validation": {"examples": 200}, "problems": 2,
        "labels": {"good": 600, "bad": 290, "<b>odd": 10},
    },
}  # fmt: skip
TUNED_RESULT: dict[str, Any] = {
    "run": "/home/someone/runs/reviews", "steps": 300, "seconds": 61.0, "task": "classify", "metric": "macro_f1",
    "loss": 0.61, "bits_per_byte": None, "best_step": 200, "macro_f1": 0.72,
    "scores": {"macro_f1": score(0.72, 0.65, 0.78), "accuracy": score(0.81, 0.76, 0.86)},
    "baselines": {
        "majority": {"macro_f1": score(0.27, 0.25, 0.29), "accuracy": score(0.67, 0.6, 0.73)},
        "bag of words": {"macro_f1": score(0.64, 0.57, 0.7)},
    },
}  # fmt: skip


def tuned_records() -> list[dict[str, Any]]:
    lines = [line for line in records() if "validation" not in line and "sample" not in line]
    looks = [(100, 0.5, 0.9), (200, 0.72, 0.61), (300, 0.7, 0.66)]
    return lines + [{"step": s, "validation": {"loss": loss, "macro_f1": f1}} for s, f1, loss in looks]


def test_a_task_is_shown_by_its_score_beside_what_needs_no_model(tmp_path: Path) -> None:
    page = Page(write_report(make(tmp_path / "reviews", TUNED, tuned_records(), TUNED_RESULT)))
    text = " ".join(page.text.split())
    for said in (
        "macro-F10.7200.650 to 0.780 on 200 examples (95 % interval)",
        "without a model0.640bag of words, 0.570 to 0.700",
        "On 200 held-out examples: macro-F1 0.720 (95 % interval 0.650 to 0.780).",
        "bag of words, has 0.640: the model is ahead of it, though the intervals overlap.",
        "classify · from base · finished",
        "900to learn from; 200 held out",
        "12.3 kwere trained, of 4.07 M",
        "text (review), label (stars)",
        "The commonest label, good, has 600 examples; the rarest, <b>odd, has 10.",
        "Loss in training: the task's and 0.5 of the next-word loss",
    ):
        assert said in text, said
    assert "perplexity" not in text
    assert "/home/someone" not in text.replace(TUNED["command"], "")
    # the score, the loss on held-out examples and in training, then learning rate, gradient norm and speed
    assert page.tags.count("svg") == 6
    labels = [value or "" for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == page.tags.count("figure") == 7
    assert any("macro-F1: this model 0.720 (0.650 to 0.780); majority 0.270" in label for label in labels)
    assert any("macro-F1: 0.5 at step 100, 0.7 at step 300." in label for label in labels)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_dots_stand_where_the_axis_says(tmp_path: Path) -> None:
    source = Page(write_report(make(tmp_path / "run", TUNED, tuned_records(), TUNED_RESULT))).source
    axis = [(float(x), float(tick)) for x, tick in re.findall(r'<em style="left:([\d.]+)%">([\d.]+)</em>', source)]
    (x0, first), (x1, last) = axis[0], axis[-1]
    assert (x0, x1) == (0, 100)
    assert first <= 0.25 and last >= 0.78
    assert all(tick == pytest.approx(first + (last - first) * x / 100, abs=1e-4) for x, tick in axis)
    dots = [float(x) for x in re.findall(r'<b style="left:([\d.]+)%">', source)]
    assert [first + (last - first) * x / 100 for x in dots] == pytest.approx([0.72, 0.27, 0.64], abs=1e-4)
    bars = [(float(x), float(w)) for x, w in re.findall(r'<i style="left:([\d.]+)%;width:([\d.]+)%">', source)]
    assert [first + (last - first) * x / 100 for x, _ in bars] == pytest.approx([0.65, 0.25, 0.57], abs=2e-4)
    assert [(last - first) * w / 100 for _, w in bars] == pytest.approx([0.13, 0.04, 0.13], abs=2e-4)
    assert 'class="own"><span>this model' in source


@pytest.mark.parametrize(
    ("value", "rule", "said"),
    [
        (score(0.9, 0.8, 0.95), score(0.5, 0.4, 0.6), "the model is ahead of it, and the intervals are apart"),
        (score(0.5, 0.4, 0.6), score(0.9, 0.8, 0.95), "the model is behind it, and the intervals are apart"),
        (score(0.5, 0.4, 0.6), score(0.55, 0.45, 0.65), "the model is behind it, though the intervals overlap"),
        (score(0.5, 0.4, 0.6), score(0.5, 0.4, 0.6), "the model has the same"),
        (score(0.5, 0.4, 0.6), {"value": 0.4}, "has 0.400: the model is ahead of it."),
    ],
    ids=["ahead", "behind", "behind-overlapping", "same", "no-interval"],
)
def test_the_comparison_says_no_more_than_the_intervals(tmp_path: Path, value: Any, rule: Any, said: str) -> None:
    result = {**TUNED_RESULT, "scores": {"macro_f1": value}, "baselines": {"majority": {"macro_f1": rule}}}
    assert said in Page(write_report(make(tmp_path / "run", TUNED, tuned_records(), result))).text


def test_labels_that_are_even_are_not_drawn(tmp_path: Path) -> None:
    facts = {**TUNED, "data": {**TUNED["data"], "labels": {"good": 300, "bad": 310, "<b>odd": 290}}}
    page = Page(write_report(make(tmp_path / "run", facts, tuned_records(), TUNED_RESULT)))
    assert "The labels" not in page.text
    assert "examples of a label290 to 310" in page.text
    many = {**TUNED, "data": {**TUNED["data"], "labels": {f"label {i}": 500 - i for i in range(300)}}}
    page = Page(write_report(make(tmp_path / "run", many, tuned_records(), TUNED_RESULT)))
    assert "280 more labels" in page.text


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            1.5,
            1.53,
            "What was forgotten: held-out text of its pre-training costs 1.530 bits per byte now and cost 1.500",
        ),
        (1.5, 1.49, "Nothing was forgotten: held-out text of its pre-training costs 1.490 bits per byte now"),
        (1.5, None, ""),
    ],
    ids=["forgot", "kept", "unknown"],
)
def test_a_conversation_is_judged_by_its_bits_and_by_what_it_forgot(tmp_path, before, after, said) -> None:
    facts = {**TUNED, "metric": "bits_per_byte", "task": {"task": "chat", "kind": "answer", "chat": True, "labels": []}}
    result = {
        "task": "chat", "metric": "bits_per_byte", "loss": 2.5, "bits_per_byte": 1.25, "scores": {}, "baselines": {},
        "forgetting": {"text": "/home/someone/data", "before": before, "after": after}, "seconds": 5.0,
    }  # fmt: skip
    page = Page(write_report(make(tmp_path / "run", facts, records(), result)))
    assert "On what was held out: bits per byte 1.250, and lower is better." in page.text
    assert ("forgotten" in page.text) == bool(said)
    assert said in page.text
    assert page.tags.count("svg") == 5  # the loss wide and narrow, as in pre-training, and three small ones
    assert "/home/someone/data" not in page.source
    assert 'class="dots"' not in page.source  # one number alone is not drawn


def test_pre_training_that_went_on_is_shown_beside_its_beginning(tmp_path: Path) -> None:
    facts = {**FACTS, "task": {"task": "continue"}, "base": {"model": "/home/someone/base/model"}}
    result = {**RESULT, "task": "continue", "before": {"loss": 3.9, "bits_per_byte": 1.5}, "forgetting": None}
    page = Page(write_report(make(tmp_path / "run", facts, records(), result)))
    assert "bits per byte1.225" in page.text
    assert "before1.500" in page.text
    assert "Before this training it was 1.500." in page.text
    assert page.tags.count("b") > 2 and 'class="dots"' in page.source
    assert "Validation loss by position" in page.text
    assert "from base" in page.text


@pytest.mark.parametrize("result", [None, {}, {"scores": [], "metric": [1], "baselines": {"a": 3}, "before": 2}])
@pytest.mark.parametrize("lines", [None, [], [{"step": 1, "validation": {"macro_f1": 0.5}}], [{"validation": None}]])
@pytest.mark.parametrize(
    "facts", [{"task": {"task": "classify"}}, {"task": {"task": "new"}, "data": {"labels": {"a": -1, "b": "x"}}}, TUNED]
)
def test_half_a_run_of_a_task_is_shown_as_far_as_it_goes(tmp_path: Path, facts: Any, lines: Any, result: Any) -> None:
    run = make(tmp_path / "run", facts, lines, result)
    assert "run" in Page(write_report(run)).text
    assert write_card(run).read_text(encoding="utf-8").startswith("---\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, None, 0.0, -0.0, 1e300], ids=str)
def test_no_number_is_shown_that_is_none(tmp_path: Path, value: Any) -> None:
    one = {"value": value, "low": value, "high": value, "n": value}
    result = {**TUNED_RESULT, "macro_f1": value, "loss": value, "scores": {"macro_f1": one, "accuracy": one}}
    result |= {"baselines": {"majority": {"macro_f1": one}}, "before": {"macro_f1": one}, "seconds": value}
    facts = {**TUNED, "trained_parameters": value, "tuning": {"rank": value, "auxiliary": value}}
    lines = [*tuned_records(), {"step": 300, "loss": value, "validation": {"macro_f1": value, "loss": value}}]
    run = make(tmp_path / "run", facts, lines, result)
    page = Page(write_report(run))
    texts = [page.text, *(value or "" for name, value in page.attributes if name == "aria-label")]
    for text in (*texts, write_card(run).read_text(encoding="utf-8").replace("mean_resizing=False", "")):
        assert not re.search(r"\b(nan|inf|none|null|false)\b|-0\.0+\b", text, re.IGNORECASE)


def test_names_of_labels_and_rules_are_text(tmp_path: Path) -> None:
    facts = {**TUNED, "data": {**TUNED["data"], "labels": {HOSTILE: 9, "a": 1}}, "base": {"model": HOSTILE}}
    facts["task"] = {**TUNED["task"], "labels": [HOSTILE, "a"], "columns": {HOSTILE: HOSTILE, "$x$": "$\\frac$"}}
    result = {**TUNED_RESULT, "baselines": {"$\\frac$ <script>": {"macro_f1": score(0.9, 0.8, 0.95)}}}
    run = make(tmp_path / "run", facts, tuned_records(), result)
    page = Page(write_report(run))
    assert "script" not in page.tags
    assert "alert('x')" in page.text
    card = write_card(run).read_text(encoding="utf-8")
    assert "<script" not in card
    assert "````text" not in card


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
SCORES = st.dictionaries(st.sampled_from(["macro_f1", "accuracy", "chrf", "loss", "joy"]), VALUES | st.floats())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_the_files_hold_there_is_a_page_and_a_card(tmp_path: Path, data: st.DataObject) -> None:
    """Any value in place of any one fact and any one result, and scores of every shape."""
    facts = {**TUNED, data.draw(st.sampled_from(sorted(TUNED))): data.draw(VALUES)}
    facts["data"] = data.draw(st.just(TUNED["data"]) | st.fixed_dictionaries({"labels": SCORES, "train": VALUES}))
    result = {**TUNED_RESULT, "scores": data.draw(SCORES), "before": data.draw(SCORES | VALUES)}
    result["baselines"] = data.draw(st.dictionaries(st.text(max_size=5), SCORES | VALUES, max_size=3) | VALUES)
    result[data.draw(st.sampled_from(["metric", "loss", "seconds", "forgetting", "run"]))] = data.draw(VALUES)
    run = make(tmp_path / "run", facts, [], result)
    assert "run" in Page(write_report(run)).text  # whose tags close in order
    assert write_card(run).read_text(encoding="utf-8").startswith("---\n")
