"""A linear classifier on TF-IDF features of words and character n-grams: a strong baseline, and a member of an ensemble.

Both are scikit-learn's, imported inside the functions because importing them takes seconds. The classifier is stored as JSON
and safetensors.
"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nextword.common.errors import CorruptFileError
from nextword.common.fs import build_directory, read_json, to_json, verify_manifest, write_manifest
from nextword.common.text_units import nfc, words

CONFIG_FILE, WEIGHTS_FILE = "linear.json", "linear.safetensors"
MAX_FEATURES = 100_000  # of words, and of character n-grams
MAX_CHARACTERS = 5_000  # of a text
INVERSE_REGULARIZATION = 10.0
MAX_ITERATIONS = 200
MIN_PROBABILITY = 1e-4  # of a label in an ensemble, so that no member rules it out


class LinearClassifier:
    """Logistic regression on TF-IDF features of single words and word pairs, and of 2 to 5 characters within words.

    Args:
        features: The fitted vectorizers.
        regression: The fitted logistic regression.
        labels: The labels of the task. Those without a training example have the probability 0.
    """

    def __init__(self, features: Sequence[Any], regression: Any, labels: Sequence[str]):
        self.features, self.regression, self.labels = features, regression, list(labels)

    @classmethod
    def fit(
        cls, texts: Sequence[str], targets: Sequence[str], labels: Sequence[str], balanced: bool = False
    ) -> "LinearClassifier | None":
        """Fit a classifier; None if the texts have one label only, or no word.

        Args:
            texts: Training texts.
            targets: Their labels.
            labels: All labels of the task.
            balanced: Whether rare labels have more weight.
        """
        if len(set(targets)) < 2 or not any(text.strip() for text in texts):
            return None
        features, short = _vectorizers(), [text[:MAX_CHARACTERS] for text in texts]
        columns = [vectorizer.fit_transform(short) for vectorizer in features]
        regression = importlib.import_module("sklearn.linear_model").LogisticRegression(
            C=INVERSE_REGULARIZATION, max_iter=MAX_ITERATIONS, class_weight="balanced" if balanced else None
        )
        regression.fit(importlib.import_module("scipy.sparse").hstack(columns, format="csr"), list(targets))
        return cls(features, regression, labels)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """The probability of each label for each text [E, K]."""
        columns = [vectorizer.transform([text[:MAX_CHARACTERS] for text in texts]) for vectorizer in self.features]
        known = self.regression.predict_proba(importlib.import_module("scipy.sparse").hstack(columns, format="csr"))
        result = np.zeros((len(texts), len(self.labels)))
        result[:, [self.labels.index(label) for label in self.regression.classes_]] = known
        return result

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each text."""
        return [self.labels[i] for i in self.probabilities(texts).argmax(1)]

    def save(self, directory: Path, weight: float) -> None:
        """Write the classifier to a directory, with its weight in an ensemble."""
        terms = [sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.get) for vectorizer in self.features]
        config = {
            "labels": self.labels,
            "classes": list(map(str, self.regression.classes_)),
            "weight": weight,
            "terms": terms,
        }
        tensors = {f"idf.{i}": np.asarray(vectorizer.idf_) for i, vectorizer in enumerate(self.features)}
        tensors |= {"coefficients": self.regression.coef_, "intercepts": self.regression.intercept_}

        def build(target: Path) -> None:
            (target / CONFIG_FILE).write_text(to_json(config), encoding="utf-8")
            save_file(
                {
                    name: torch.tensor(np.ascontiguousarray(values, dtype=np.float32))
                    for name, values in tensors.items()
                },
                target / WEIGHTS_FILE,
            )
            write_manifest(target, {})

        build_directory(directory, build)

    @classmethod
    def load(cls, directory: Path) -> tuple["LinearClassifier", float]:
        """Read a classifier and its weight in an ensemble.

        Raises:
            CorruptFileError: A file is damaged, or the files do not belong together.
        """
        verify_manifest(directory)
        config, tensors = read_json(directory / CONFIG_FILE), load_file(directory / WEIGHTS_FILE)
        arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        try:
            labels, classes, weight = list(config["labels"]), list(config["classes"]), float(config["weight"])
            features = _vectorizers()
            for i, vectorizer in enumerate(features):
                vectorizer.vocabulary = {term: index for index, term in enumerate(config["terms"][i])}
                vectorizer.idf_ = arrays[f"idf.{i}"]
            regression = importlib.import_module("sklearn.linear_model").LogisticRegression()
            regression.classes_ = np.array(classes)
            regression.coef_, regression.intercept_ = arrays["coefficients"], arrays["intercepts"]
            num_rows = 1 if len(classes) == 2 else len(classes)
            shape = (num_rows, sum(len(terms) for terms in config["terms"]))
            if arrays["coefficients"].shape != shape or not set(classes) <= set(labels) or not 0 <= weight <= 1:
                raise ValueError("the files do not belong together")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{directory}: not a linear classifier ({error})") from error
        return cls(features, regression, labels), weight


def combine(logits: np.ndarray, probabilities: np.ndarray, weight: float) -> np.ndarray:
    """Logarithmic opinion pool of a model and a linear classifier: the weighted mean of their log-probabilities.

    Source: Genest and Zidek 1986, "Combining probability distributions", section 3.

    Args:
        logits: Outputs of the model's head [E, K].
        probabilities: Probabilities of the classifier [E, K].
        weight: The weight of the classifier, 0 to 1.

    Returns:
        The logits of the ensemble [E, K].
    """
    log_model = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return (1 - weight) * log_model + weight * np.log(np.maximum(probabilities, MIN_PROBABILITY))


def fit_weight(logits: np.ndarray, probabilities: np.ndarray, targets: Sequence[int]) -> float:
    """The weight of the classifier with the lowest loss on some examples, of 0, 0.1, … 1. Few examples draw it to 1/2."""
    rows, candidates = np.arange(len(targets)), np.linspace(0, 1, 11)

    def loss(weight: float) -> float:
        pooled = combine(logits, probabilities, weight)
        nats = np.logaddexp.reduce(pooled, axis=1) - pooled[rows, list(targets)]
        return float(nats.sum()) - math.log(0.1 + weight * (1 - weight))

    return float(min(candidates, key=loss))


def _vectorizers() -> list[Any]:
    vectorizer = importlib.import_module("sklearn.feature_extraction.text").TfidfVectorizer
    settings = {"strip_accents": nfc, "sublinear_tf": True, "max_features": MAX_FEATURES}
    return [
        vectorizer(ngram_range=(1, 2), tokenizer=words, token_pattern=None, **settings),
        vectorizer(analyzer="char_wb", ngram_range=(2, 5), **settings),
    ]
