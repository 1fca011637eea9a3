"""Evaluation, a part of the contract of a kind: from predictions and truths to outcomes, and from those to metrics.

Knows no kind. Kinds import scikit-learn and scipy where they score, since serving needs neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

Array = npt.NDArray[Any]
Metrics = dict[str, float]
Outcomes = tuple[Any, ...]
"""Arrays or sparse matrices with one entry an example: true and given values, or counts."""

O_ = TypeVar("O_")
L_ = TypeVar("L_")


class LabelScores(TypedDict):
    """How well one label is found; `support` is how often it is true."""

    precision: float
    recall: float
    f1: float
    support: int


class Evaluation(ABC, Generic[O_, L_]):
    """How predictions are measured against labelled examples."""

    @abstractmethod
    def outcomes(self, predictions: Sequence[Any], examples: Sequence[L_], options: O_) -> Outcomes:
        """All that scoring needs; entries may be left out or repeated, as a bootstrap does."""

    @abstractmethod
    def score(self, outcomes: Outcomes, options: O_) -> Metrics:
        """Metrics, in [-1, 1] but for losses; 0 where there is nothing to divide by or to correlate."""

    def metrics(self, predictions: Sequence[Any], examples: Sequence[L_], options: O_) -> Metrics:
        """Metrics of predictions against labelled examples."""
        return self.score(self.outcomes(predictions, examples, options), options)

    def report(self, outcomes: Outcomes, options: O_) -> dict[str, LabelScores]:
        """Scores of each label; empty for kinds without labels."""
        return {}

    def confusion(self, outcomes: Outcomes, options: O_) -> list[list[int]] | None:
        """Counts [true label][given label] in the order of the labels, where an example has and gets just one."""
        return None

    @abstractmethod
    def baseline(self, examples: Sequence[L_], options: O_) -> Any:
        """The constant prediction that training labels alone suggest (majority, mean, nothing)."""

    def constants(
        self, predictions: Sequence[Any], examples: Sequence[L_], features: Sequence[Any], options: O_
    ) -> list[Any]:
        """The baseline in the place of each prediction, from training examples and their features (rows, target)."""
        return [self.baseline(examples, options)] * len(predictions)

    def copied(self, example: L_, options: O_) -> Any:
        """The prediction that gives the input back, where that can be an answer; else None."""
        return None

    def truths(self, example: L_, options: O_) -> Sequence[str]:
        """What an audit counts of an example's truth: its labels, a band of its score; empty for free text."""
        return ()


def label_report(labels: Sequence[str], columns: Iterable[Array]) -> dict[str, LabelScores]:
    """Scores of each label from (labels,) precision, recall, F1 and support."""
    rows = zip(labels, *(column.tolist() for column in columns), strict=True)
    return {name: LabelScores(precision=p, recall=r, f1=f, support=n) for name, p, r, f, n in rows}


def f_scores(counts: Array) -> tuple[Array, Array, Array, Array]:
    """(…) precision, recall, F1 and support from (…, 3) whole counts of what is found rightly, found, and true."""
    right, found, true = np.moveaxis(counts, -1, 0)
    return right / np.maximum(found, 1), right / np.maximum(true, 1), 2 * right / np.maximum(found + true, 1), true
