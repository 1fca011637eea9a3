"""Pictures for the card: that they are PNG, sized to what they show, the same again, and never fail on a label."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.report.evaluate import Scores
from training.report.figures import confusion, curves, figures


def picture(content: bytes) -> Any:
    """(height, width, 3) pixels."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def log(tasks: int, steps: int = 6) -> list[dict[str, float]]:
    losses = {f"train_loss_t{n}": 1.0 for n in range(tasks)}
    return [{"step": step, "loss": 1.0, **{name: n / step for name, n in losses.items()}} for step in range(1, steps)]


@pytest.mark.parametrize("size", [1, 2, 8, 30, 77])
def test_confusion_matrices_of_any_size(size: int) -> None:
    matrix = (np.eye(size, dtype=int) * 5).tolist()
    labels = [f"label_{n}" for n in range(size)]
    first = confusion(matrix, labels)
    assert first == confusion(matrix, labels)
    assert b"matplotlib" not in first.lower()  # no version, no date: equal input gives an equal file
    height, width, _ = picture(first).shape
    assert 250 < height < 2200
    assert 300 < width < 2200
    if size > 1:
        matrix[0] = [0] * (size - 1) + [5]
        assert confusion(matrix, labels) != first


@pytest.mark.parametrize("label", ["إيجابي", "笑", "$\\frac{", "a_b^c", "x" * 300, "", "two\nlines", "\u202eright"])
def test_no_label_is_too_strange(label: str) -> None:
    assert picture(confusion([[3, 1], [0, 2]], [label, "other"])).shape[1] < 1500


def test_a_label_without_examples_has_a_row_without_shade() -> None:
    empty, full = picture(confusion([[0, 0], [0, 0]], ["a", "b"])), picture(confusion([[1, 0], [0, 1]], ["a", "b"]))
    blue = [int(((p[..., 2].astype(int) - p[..., 0]) > 60).sum()) for p in (empty, full)]
    assert blue[1] > blue[0] + 5000


def test_curves_show_a_panel_a_task_and_its_metric() -> None:
    one, five = picture(curves(log(1), {})), picture(curves(log(5), {}))
    assert five.shape[1] > 1.5 * one.shape[1]
    assert five.shape[0] > 1.5 * one.shape[0]
    assert curves(log(5), {}) == curves(log(5), {})
    measured = [*log(1), {"step": 3, "eval_t0_f1": 0.5, "eval_t0_loss": 9.0}, {"step": 5, "eval_t0_f1": 0.7}]
    orange = [
        int((np.abs(picture(curves(measured, metrics)).astype(int) - (255, 127, 14)).sum(-1) < 30).sum())
        for metrics in ({}, {"t0": "f1"})
    ]
    assert orange[0] == 0
    assert orange[1] > 50


def test_a_run_has_curves_and_a_matrix_where_there_is_one() -> None:
    report: Any = {label: {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1} for label in "ab"}
    topic = Scores("mcc", {"mcc": 1.0}, {}, report=report, confusion=[[1, 0], [0, 1]])
    score = Scores("pearson", {"pearson": 1.0}, {})
    made = figures(log(2), {"topic": topic, "score": score})
    assert list(made) == ["figures/curves.png", "figures/confusion-topic.png"]
    assert made["figures/confusion-topic.png"] == confusion([[1, 0], [0, 1]], ["a", "b"])
    assert figures([], {"score": score}) == {}
