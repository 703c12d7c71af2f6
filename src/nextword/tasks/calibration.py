"""Calibration: probabilities that equal the frequency of being right.

Shapes: E examples, K outputs of the head.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_BINS = 15  # of equal mass
MIN_PER_BIN = 20  # examples; fewer examples have fewer bins
MAX_LOG_TEMPERATURE = 3.0


@dataclass(frozen=True)
class CalibrationResult:
    """How well probabilities are calibrated.

    Attributes:
        error: Expected calibration error, 0 to 1: the mean over the bins of |accuracy − confidence|.
        confidence: Mean probability of what was predicted.
        accuracy: Proportion of predictions that are right.
        bins: Mean confidence, accuracy and number of predictions in each bin of equal mass, by rising confidence.
    """

    error: float
    confidence: float
    accuracy: float
    bins: list[tuple[float, float, int]]


def fit_temperature(logits: Sequence[np.ndarray], targets: Sequence[Any]) -> float:
    """The temperature T of minimum loss of the probabilities softmax(logits / T), or sigmoid(logits / T).

    Source: Guo et al. 2017, "On calibration of modern neural networks", section 4.2. log T has a standard normal prior, so that
    few examples, or examples that are all predicted right, do not give an extreme temperature.

    Args:
        logits: The outputs of the head for each example [K]. K may differ between examples.
        targets: The index of the right output of each example, or whether each label applies [K].
    """
    if not len(logits):
        return 1.0
    width = max(map(len, logits))
    table = np.full((len(logits), width), -np.inf)
    for row, values in zip(table, logits, strict=True):
        row[: len(values)] = values
    labels = np.array(targets)

    def objective(log_temperature: float) -> float:
        scaled = table / math.exp(log_temperature)
        if labels.ndim == 2:
            losses = np.logaddexp(0, scaled) - labels * scaled
        else:
            losses = np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(scaled)), labels]
        return float(losses.sum()) + log_temperature**2 / 2

    optimize: Any = importlib.import_module("scipy.optimize")
    bounds = (-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE)
    return math.exp(float(optimize.minimize_scalar(objective, bounds=bounds, method="bounded").x))


def measure_calibration(confidences: Sequence[float], is_right: Sequence[bool]) -> CalibrationResult:
    """The expected calibration error of predictions (Naeini et al. 2015; Nixon et al. 2019, section 5: bins of equal mass).

    Args:
        confidences: The probability of each prediction.
        is_right: Whether it is right.
    """
    p, hits = np.asarray(confidences, dtype=np.float64), np.asarray(is_right, dtype=np.float64)
    order = np.lexsort((np.random.default_rng(0).random(len(p)), p))  # equal confidences in random order
    p, hits = p[order], hits[order]
    num_bins = max(1, min(NUM_BINS, len(p) // MIN_PER_BIN))
    bins = [
        (float(p[part].mean()), float(hits[part].mean()), len(part))
        for part in np.array_split(np.arange(len(p)), num_bins)
    ]
    error = sum(n * abs(accuracy - confidence) for confidence, accuracy, n in bins) / len(p)
    return CalibrationResult(error, float(p.mean()), float(hits.mean()), bins)
