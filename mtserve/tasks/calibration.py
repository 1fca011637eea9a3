"""Scores that mean what they say: a temperature for logits, a threshold for each label, and how far scores are off.

One number divides all logits (Guo et al., 2017, 1706.04599): it is fitted so that the truth is as likely as possible,
and changes no order, so no answer of a task with one label. Thresholds are those of the best F1 of each label. Expected
calibration error is the mean distance of confidence and accuracy over bins of equal width, by their share. Knows no
kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from mtserve.tasks.measures import Array

BINS = 15
_RANGE = np.log(0.05), np.log(20.0)
_TINY = 1e-30


@dataclass(frozen=True)
class Calibration:
    """What was fitted, and what for.

    before, after   expected calibration error, of scores in [0, 1]. After: of each half of the examples by the
                    temperature of the other half, as what is fitted on an example flatters it
    options         the task's options that hold what was fitted on all examples
    """

    before: float
    after: float
    options: Mapping[str, Any] = field(default_factory=dict)


def by_class(scores: Array, true: Array) -> Calibration:
    """Of (examples, classes) probabilities, 0 where there is no such class, and the true class of each example."""
    logits = np.log(np.maximum(scores, _TINY))  # but for a constant a row, those that they were made of
    present = scores > 0

    def loss(temperature: float, rows: Array) -> float:
        scaled = np.where(present[rows], logits[rows] / temperature, -np.inf)
        top = scaled.max(axis=1)
        total = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((total - scaled[np.arange(len(rows)), true[rows]].clip(-1e6)).mean())

    def confidences(temperature: float, rows: Array) -> tuple[Array, Array]:
        scaled = np.where(present[rows], logits[rows] / temperature, -np.inf)
        found = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        found /= found.sum(axis=1, keepdims=True)
        return found.max(axis=1), found.argmax(axis=1) == true[rows]

    return _fitted(len(scores), loss, confidences)


def by_label(scores: Array, true: Array) -> Calibration:
    """Of (examples, labels) probabilities, each label for itself, and (examples, labels) truths 0 and 1."""
    kept = scores.astype(np.float64).clip(1e-7, 1 - 1e-7)
    logits = np.log(kept / (1 - kept))

    def loss(temperature: float, rows: Array) -> float:
        signed = np.where(true[rows] > 0, logits[rows], -logits[rows]) / temperature
        return float(np.logaddexp(0, -signed).mean())

    def confidences(temperature: float, rows: Array) -> tuple[Array, Array]:
        return 1 / (1 + np.exp(-logits[rows].ravel() / temperature)), true[rows].ravel() > 0

    found = _fitted(len(scores), loss, confidences)
    warm = 1 / (1 + np.exp(-logits / found.options["temperature"]))
    thresholds = tuple(_threshold(warm[:, label], true[:, label] > 0) for label in range(scores.shape[1]))
    return Calibration(found.before, found.after, {**found.options, "thresholds": thresholds})


def error_of(confidences: Array, right: Array) -> float:
    """Expected calibration error of confidences in [0, 1] in what was right or not."""
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    gaps = [abs(float((confidences[bins == b] - right[bins == b]).sum())) for b in np.unique(bins)]
    return sum(gaps) / max(len(confidences), 1)


def _fitted(
    size: int,
    loss: Callable[[float, Array], float],
    confidences: Callable[[float, Array], tuple[Array, Array]],
) -> Calibration:
    def best(rows: Array) -> float:
        found = minimize_scalar(lambda at: loss(float(np.exp(at)), rows), bounds=_RANGE, method="bounded")
        return float(np.exp(found.x))

    every = np.arange(size)
    halves = every[::2], every[1::2]
    if size < 2:
        error = error_of(*confidences(1.0, every))
        return Calibration(error, error, {"temperature": 1.0})
    crossed = [confidences(best(other), mine) for mine, other in (halves, halves[::-1])]
    after = error_of(*(np.concatenate(part) for part in zip(*crossed, strict=True)))
    return Calibration(error_of(*confidences(1.0, every)), after, {"temperature": round(best(every), 4)})


def _threshold(scores: Array, true: Array) -> float:
    """Half way between the scores where the F1 of a label is best; 0.5 for a label that is never true."""
    if not true.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(true[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + true.sum())
    ordered = scores[order]
    ends = np.append(ordered[1:] < ordered[:-1], [True])  # equal scores hold together or not at all
    at = int(np.where(ends, f1, -1).argmax())
    below = float(ordered[at + 1]) if at + 1 < len(ordered) else 0.0
    return round(float(ordered[at] + below) / 2, 6)
