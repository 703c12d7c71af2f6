"""The linear TF-IDF classifier: its files, its ensemble with a model, and the command line."""

import random

import numpy as np
import pytest

import nextword
from nextword.common.errors import CorruptFileError, UsageError
from nextword.tasks.examples import example_from_texts
from nextword.tasks.linear import LinearClassifier, combine, fit_weight
from test_finetuning import rows, tune, write

TEXTS = {
    "Latin": ("the film was good", "the film was bad"),
    "Thai": ("หนังดีมาก", "หนังแย่มาก"),
    "Chinese": ("这部电影很好看", "这部电影很难看"),
    "Hindi": ("फ़िल्म अच्छी थी", "फ़िल्म बुरी थी"),
}


@pytest.mark.parametrize("script", TEXTS)
def test_labels_are_learned_in_any_script(script):
    texts = [text for text in TEXTS[script] for _ in range(10)]
    targets = [label for label in ("good", "bad") for _ in range(10)]
    classifier = LinearClassifier.fit(texts, targets, ["bad", "good", "unseen"])
    assert classifier is not None and classifier.predict(TEXTS[script]) == ["good", "bad"]
    probabilities = classifier.probabilities(list(TEXTS[script]))
    assert probabilities.sum(1) == pytest.approx([1, 1]) and probabilities[:, 2].tolist() == [0, 0]


def test_a_saved_classifier_gives_the_same_probabilities(tmp_path):
    examples = [(row["text"], row["label"]) for row in rows("classify", 60)]
    for count, labels in ((2, ["negative", "positive"]), (3, ["negative", "positive", "none"])):
        texts, targets = zip(*examples, *[("nothing here", "none")] * 5 * (count - 2), strict=True)
        classifier = LinearClassifier.fit(texts, targets, labels)
        classifier.save(tmp_path / str(count), 0.3)
        loaded, weight = LinearClassifier.load(tmp_path / str(count))
        assert weight == 0.3
        assert np.abs(loaded.probabilities(texts) - classifier.probabilities(texts)).max() < 1e-6
    assert (
        LinearClassifier.fit(["a", "b"], ["x", "x"], ["x"]) is None
        and LinearClassifier.fit([" ", ""], ["x", "y"], "xy") is None
    )


@pytest.mark.parametrize("name", ["linear.json", "linear.safetensors"])
def test_a_damaged_classifier_is_refused(tmp_path, name):
    LinearClassifier.fit(["good", "bad"], ["x", "y"], ["x", "y"]).save(tmp_path / "linear", 0.5)
    content = (tmp_path / "linear" / name).read_bytes()
    for damaged in (content[:-9], content[:20] + b"\x00" + content[21:], b""):
        (tmp_path / "linear" / name).write_bytes(damaged)
        with pytest.raises(CorruptFileError):
            LinearClassifier.load(tmp_path / "linear")


def test_the_pool_is_the_weighted_mean_of_log_probabilities():
    logits, probabilities = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[0.1, 0.9], [0.0, 1.0]])
    pooled = np.exp(combine(logits, probabilities, 0.5))
    model = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert pooled[0] == pytest.approx(np.sqrt(model[0] * probabilities[0]))
    assert np.exp(combine(logits, probabilities, 0.0)) == pytest.approx(model)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 300)
    good = np.where(np.eye(2)[targets] > 0, 0.9, 0.1)
    assert fit_weight(np.log(good), np.full((300, 2), 0.5), targets.tolist()) == 0.0
    assert fit_weight(np.zeros((300, 2)), good, targets.tolist()) == 1.0
    assert fit_weight(np.zeros((0, 2)), np.zeros((0, 2)), []) == 0.5


def test_the_ensemble_of_a_run(base, tmp_path):
    result = tune(base, write(tmp_path / "data.jsonl", "classify", 120), tmp_path / "run")
    assert "TF-IDF" in result["baselines"] and 0 <= result["ensemble"]["weight"] <= 1
    table = write(tmp_path / "test.jsonl", "classify", 20, seed=5)
    alone, together = (nextword.predict(tmp_path / "run", table, ensemble=value) for value in (False, True))
    texts = [row["text"] for row in rows("classify", 20, seed=5)]
    classifier, weight = LinearClassifier.load(tmp_path / "run" / "linear")
    model = np.array([list(p["probabilities"].values()) for p in alone.predictions])
    expected = np.exp(combine(np.log(model), classifier.probabilities(texts), weight))
    expected /= expected.sum(1, keepdims=True)
    ours = np.array([list(p["probabilities"].values()) for p in together.predictions])
    assert ours == pytest.approx(expected, abs=1e-6)
    assert "ensemble with TF-IDF" in (tmp_path / "run" / "report.html").read_text()
    assert nextword.verify(tmp_path / "run")
    single = nextword.predict(tmp_path / "run", text=[texts[0]], ensemble=True).predictions[0]
    assert list(single["probabilities"].values()) == pytest.approx(expected[0], abs=1e-6)


def test_other_tasks_have_no_ensemble(base, tmp_path):
    result = tune(base, write(tmp_path / "data.jsonl", "similarity", 40), tmp_path / "run", steps=3)
    assert "ensemble" not in result and not (tmp_path / "run" / "linear").exists()
    with pytest.raises(UsageError, match="no linear classifier for an ensemble"):
        nextword.predict(tmp_path / "run", text=["a", "b"], ensemble=True)


def test_many_labels_and_rare_ones():
    rng = random.Random(0)
    words = [f"word{i}" for i in range(30)]
    texts = [" ".join([words[i % 30], *rng.choices(words, k=2)]) for i in range(600)]
    targets = [f"label{i % 30}" for i in range(600)]
    classifier = LinearClassifier.fit(texts, targets, sorted(set(targets)), balanced=True)
    assert np.mean([a == b for a, b in zip(classifier.predict(texts), targets, strict=True)]) > 0.9


def test_windows_read_the_whole_of_a_long_text(base, tmp_path):
    tune(base, write(tmp_path / "data.jsonl", "classify", 80), tmp_path / "run")
    short = "the object is good"
    long = " ".join(["the object name value class is called with a list"] * 30 + ["wrong", "poor", "bad"] * 10)
    model = nextword.load(tmp_path / "run")
    predictor = model.build_predictor(ensemble=False, windows=True)
    windows = predictor.encoder.encode_windows(example_from_texts("classify", [long]))
    lengths = [window.sequences[0].ids.size for window in windows]
    assert len(windows) > 3 and max(lengths) <= model.gpt.config.context_length and max(lengths) - min(lengths) <= 1
    text_ids = np.concatenate([window.sequences[0].ids[1:-1] for window in windows])
    assert text_ids.tolist() == model.tokenizer.encode(long)
    per_window = [predictor.logits([], [window])[0] for window in windows]
    predictions = nextword.predict(tmp_path / "run", text=[long], windows=True).predictions
    expected = np.exp(np.mean(per_window, axis=0))
    assert list(predictions[0]["probabilities"].values()) == pytest.approx(expected / expected.sum(), abs=1e-6)
    whole, cut = (
        nextword.predict(tmp_path / "run", text=[short], windows=value).predictions for value in (True, False)
    )
    assert whole[0]["probabilities"] == pytest.approx(cut[0]["probabilities"], abs=1e-6)
    tune(base, write(tmp_path / "pairs.jsonl", "entail", 40), tmp_path / "pairs", steps=3)
    with pytest.raises(UsageError, match="--windows needs a model that classifies texts"):
        nextword.predict(tmp_path / "pairs", text=["a", "b"], windows=True)
