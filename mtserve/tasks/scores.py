"""Logits to scores. Knows no kind."""

from __future__ import annotations

import numpy as np

from mtserve.rows import Floats


def softmax(logits: Floats) -> Floats:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def sigmoid(logits: Floats) -> Floats:
    """Logistic function, stable for large values of either sign."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), np.float32)
