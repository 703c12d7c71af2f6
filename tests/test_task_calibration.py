"""Temperature scaling, the calibration error, early stopping and the selection metric of a fine-tuning."""

import json
import math

import numpy as np
import pytest

import nextword
from nextword.common.errors import UsageError
from nextword.common.fs import read_jsonl, read_manifest
from nextword.pipeline.evaluators import selection_metric
from nextword.tasks.calibration import fit_temperature, measure_calibration
from nextword.tasks.dataset import TaskSpec
from nextword.tasks.metrics import classification, final_number, generation_metrics
from nextword.training.step import BestCheckpoint
from test_finetuning import tune, write


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_temperature_undoes_a_scale_of_the_logits(scale):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (4000, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = [int(rng.choice(3, p=row)) for row in probabilities]
    assert fit_temperature(list(scale * logits), targets) == pytest.approx(scale, rel=0.08)
    several = (rng.random((4000, 3)) < 1 / (1 + np.exp(-logits))).astype(float)
    assert fit_temperature(list(scale * logits), list(several)) == pytest.approx(scale, rel=0.08)


def test_the_temperature_of_few_examples_is_not_extreme():
    rows, targets = [np.array([9.0, 0.0])] * 5 + [np.array([0.0, 9.0])] * 5, [0] * 5 + [1] * 5
    assert 0.3 < fit_temperature(rows, targets) < 1.0  # all are right
    assert 1.0 < fit_temperature(rows, targets[::-1]) < math.exp(3.01)  # all are wrong
    choices = [np.array([1.0, 0.0]), np.array([1.0, 0.0, 0.5])]  # of different numbers of choices
    assert 0.5 < fit_temperature(choices, [0, 0]) < 1.0
    assert fit_temperature([], []) == 1.0


def test_the_calibration_error_equals_its_formula():
    rng = np.random.default_rng(1)
    confidences = rng.uniform(0.5, 1.0, 3000)
    calibrated = measure_calibration(confidences.tolist(), (rng.random(3000) < confidences).tolist())
    assert calibrated.error < 0.04 and [n for *_, n in calibrated.bins] == [200] * 15
    overconfident = measure_calibration([0.9] * 100, [True] * 60 + [False] * 40)
    assert (overconfident.error, overconfident.confidence) == (pytest.approx(0.3), pytest.approx(0.9))
    assert overconfident.accuracy == 0.6 and len(overconfident.bins) == 5


def test_the_best_weights_and_patience_follow_the_score_and_the_loss():
    tolerant = BestCheckpoint()
    kept = [tolerant.update(i, score, 1.0, 0.03) for i, score in enumerate((0.5, 0.48, 0.46, 0.6, 0.58, 0.5, 0.575), 1)]
    assert kept == [True, True, False, True, True, False, True]  # within 0.03 of the highest so far
    assert (tolerant.step, tolerant.score, tolerant.highest_score) == (7, 0.575, 0.6)

    best = BestCheckpoint()
    steps = [(0.5, 0.9), (0.5, 0.8), (0.5, 0.85), (0.6, 0.9), (0.6, 0.95), (0.6, math.nan), (0.55, 0.7)]
    is_best = [best.update(step, score, loss) for step, (score, loss) in enumerate(steps, 1)]
    assert is_best == [True, True, False, True, False, False, False]
    assert (best.step, best.score, best.loss, best.lowest_loss) == (4, 0.6, 0.9, 0.7)
    assert (best.last_improvement, best.validations_without_improvement) == (7, 0)  # the loss improved


def test_early_stopping_waits_for_an_epoch(base, tmp_path):
    data = tmp_path / "data.jsonl"  # labels that do not follow from the text
    lines = [{"text": f"the value {i} of the class", "label": ("a", "b")[i * 7919 % 101 % 2]} for i in range(200)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    training, tuning = {"lr": 0.02, "evaluations": 60, "patience": 1}, {"batch_examples": 4}
    result = nextword.finetune(base, data, tmp_path / "run", steps=600, training=training, tuning=tuning).to_dict()
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    validations = [(r["step"], r["validation"]["calibrated_loss"]) for r in records if "validation" in r]
    lowest = min(validations, key=lambda pair: pair[1])[0]
    assert any("early stopping" in str(record.get("message")) for record in records)
    assert result["steps"] < 600 and result["steps"] - max(lowest, result["best_step"]) >= 40  # an epoch


def test_probabilities_are_calibrated_in_the_weights(base, tmp_path):
    result = tune(base, write(tmp_path / "data.jsonl", "classify", 120), tmp_path / "run")
    temperature = read_manifest(tmp_path / "run" / "model")["temperature"]
    assert result["calibration"]["temperature"] == temperature != 1.0
    assert 0 <= result["calibration"]["error"] <= 1 and sum(n for *_, n in result["calibration"]["bins"]) == 24
    last = [record for record in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "validation" in record][-1]
    assert last["validation"]["calibrated_loss"] <= last["validation"]["loss"] + 0.05
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Expected calibration error" in page and "Reliability diagram" in page
    assert "Expected calibration error" in (tmp_path / "run" / "README.md").read_text()


def test_a_metric_by_name_selects_and_leads(base, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", "classify", 80)
    result = tune(base, data, tmp_path / "run", metric="f1:positive")
    assert result["metric"] == "f1:positive" and "f1:positive" in result["scores"]
    assert "f1:positive" in result["baselines"]["majority"]
    assert "F1 of positive" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(UsageError, match=r"--metric chrf: the task classify has no such metric.*f1:LABEL"):
        tune(base, data, tmp_path / "other", metric="chrf")


def test_metric_names():
    label = TaskSpec("classify", "label", ("a", "b"))
    assert selection_metric(label, False) == "accuracy" and selection_metric(label, True) == "macro_f1"
    assert selection_metric(label, True, "mcc") == "matthews" and selection_metric(label, True, "loss") == "loss"
    with pytest.raises(UsageError, match="no such metric"):
        selection_metric(label, False, "f1:c")
    assert selection_metric(TaskSpec("rewrite", "answer"), False, "rouge") == "rougeL"
    assert selection_metric(TaskSpec("chat", "answer"), False, "bits_per_byte") == "bits_per_byte"


def test_f1_of_a_label_equals_scikit_learn():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(2)
    targets, predictions = ([str(x) for x in rng.integers(0, 3, 200)] for _ in range(2))
    score = classification(targets, predictions, ["0", "1", "2"], ["f1:1"])["f1:1"]
    assert score.value == pytest.approx(f1_score(targets, predictions, labels=["1"], average=None)[0])
    assert score.low is not None and score.low < score.value


def test_metrics_of_short_answers():
    scores = generation_metrics(
        [["12", "twelve"], "The answer is 1,200.5"], ["  12 ", "so #### 1200.50"], ["exact_match", "final_number"]
    )
    assert (scores["exact_match"].value, scores["final_number"].value) == (0.5, 1.0)
    assert final_number("from -3 to 4, no: 1,000") == 1000.0 and final_number("none") is None
    assert generation_metrics(["no number"], ["no number"], ["final_number"])["final_number"].value == 0.0
