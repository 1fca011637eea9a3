"""Metrics as functions of how often each example counts, so that a bootstrap scores all its resamples at once.

Knows no kind. A label's counts are three numbers: how often it was given rightly, was given, and is true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

Array = npt.NDArray[Any]
Weighted = Callable[[Array], dict[str, Array]]
"""From (resamples, examples) weights, each a count from 0, to one (resamples,) array a metric."""


class LabelScores(TypedDict):
    """How well one label is found; `support` is how often it is true."""

    precision: float
    recall: float
    f1: float
    support: int


def once(weighted: Weighted, examples: int) -> dict[str, float]:
    """The metrics with each example counted once."""
    return {name: float(values[0]) for name, values in weighted(np.ones((1, examples), np.float32)).items()}


def total(weights: Array, values: Array) -> Array:
    """(resamples, …) weighted sums of (examples, …) numbers."""
    return np.asarray(np.tensordot(weights, values.astype(np.float32), 1), np.float64)


def mean(name: str, values: Sequence[float]) -> Weighted:
    """The mean of one number an example."""
    return lambda weights: {name: total(weights, np.asarray(values)) / weights.sum(1)}


def f_scores(counts: Array) -> dict[str, Array]:
    """Precision, recall and F1, (…) each, from (…, 3) counts; 0 where there is nothing to divide by."""
    right, guessed, true = np.moveaxis(counts, -1, 0)
    return {"precision": _ratio(right, guessed), "recall": _ratio(right, true), "f1": _ratio(2 * right, guessed + true)}


def macro_f1(counts: Array) -> Array:
    """(…) mean F1 of the labels that are true or given at all, from (…, labels, 3) counts."""
    present = counts[..., 1:].sum(-1) > 0
    return _ratio((f_scores(counts)["f1"] * present).sum(-1), present.sum(-1))


def mcc(counts: Array) -> Array:
    """(…) Matthews correlation coefficient for any number of labels (Gorodkin, 2004), from (…, labels, 3) counts of
    one label an example; 0 where only one label is true or only one is given."""
    right, guessed, true = np.moveaxis(counts, -1, 0)
    size = true.sum(-1)
    spread = (size**2 - (guessed**2).sum(-1)) * (size**2 - (true**2).sum(-1))
    return _ratio(right.sum(-1) * size - (guessed * true).sum(-1), np.sqrt(spread))


def label_report(labels: Sequence[str], counts: Array) -> dict[str, LabelScores]:
    """Scores of each label from (labels, 3) counts."""
    found = {name: values.tolist() for name, values in f_scores(counts).items()}
    rows = zip(labels, found["precision"], found["recall"], found["f1"], counts[:, 2].tolist(), strict=True)
    return {name: LabelScores(precision=p, recall=r, f1=f, support=int(n)) for name, p, r, f, n in rows}


def correlations(guess: npt.ArrayLike, true: npt.ArrayLike) -> Weighted:
    """Pearson's and Spearman's correlation of (examples,) numbers; 0 where one side is constant, since there is nothing
    to correlate."""

    x, y = np.asarray(guess, np.float64), np.asarray(true, np.float64)

    def found(weights: Array) -> dict[str, Array]:
        ranked = _ranks(x, weights), _ranks(y, weights)
        return {"pearson": _correlation(x, y, weights), "spearman": _correlation(*ranked, weights)}

    return found


def _ranks(values: Array, weights: Array) -> Array:
    """(resamples, examples) ranks from 1 within each resample; equal values share the mean of theirs."""
    _, starts, level = np.unique(np.sort(values), return_index=True, return_inverse=True)
    order = np.argsort(values, kind="stable")
    held = np.add.reduceat(weights[:, order], starts, axis=1, dtype=np.float64)  # (resamples, levels)
    ranks = np.empty(weights.shape)
    ranks[:, order] = (held.cumsum(1) - (held - 1) / 2)[:, level]
    return ranks


def _correlation(a: Array, b: Array, weights: Array) -> Array:
    """(resamples,) from two sides of (examples,) or (resamples, examples) numbers."""
    held = weights > 0
    sides, moving = [], np.ones(len(weights), np.bool_)
    for side in (np.broadcast_to(a, weights.shape), np.broadcast_to(b, weights.shape)):
        moving &= side.max(1, where=held, initial=-np.inf) > side.min(1, where=held, initial=np.inf)
        sides.append(side - np.average(side, axis=1, weights=weights)[:, None])
    common, first, second = ((weights * x * y).sum(1) for x, y in (sides, [sides[0]] * 2, [sides[1]] * 2))
    return np.clip(_ratio(common, np.where(moving, np.sqrt(first * second), 0)), -1, 1)


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole, 0 where whole is not positive."""
    return np.asarray(np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0))
