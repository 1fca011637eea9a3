"""Golden rows: what a checkpoint answered when it was sealed, and whether an engine still does. Knows no files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mtserve.engine import Engine
from mtserve.errors import CheckpointError
from mtserve.manifest import GOLDEN_WIDTH, GoldenRow
from mtserve.rows import Floats
from mtserve.tasks.base import Example


def golden_rows(engine: Engine, task: str, examples: Iterable[Example]) -> list[GoldenRow]:
    """Ids and logits of the first step of each example, each encoded alone."""
    rows = []
    for example in examples:
        work = engine.prepare(task, example)
        ids = [row.ids.tolist() for row in work.rows]
        engine.step([work])
        logits = [np.asarray(array[..., :GOLDEN_WIDTH], np.float32).tolist() for array in work.logits]
        rows.append(GoldenRow(input=example.model_dump(mode="json", exclude_none=True), ids=ids, logits=logits))
    return rows


@dataclass(frozen=True)
class GoldenReport:
    """How far an engine is from a task's golden rows.

    difference   the largest of a logit, over the larger of 1 and the row's largest golden logit; infinite where a
                 logit is no finite number
    """

    task: str
    rows: int
    difference: float
    tolerance: float

    @property
    def reproduced(self) -> bool:
        return self.difference <= self.tolerance


def check_golden(engine: Engine, task: str, rows: Sequence[GoldenRow], *, tolerance: float) -> GoldenReport:
    """Encode the golden inputs again. Raises CheckpointError if their ids differ (another tokenizer)."""
    worst, name = 0.0, engine.task(task).name
    for number, row in enumerate(rows):
        work = engine.prepare(task, engine.task(task).kind.parse(row.input))
        if [r.ids.tolist() for r in work.rows] != row.ids:
            raise CheckpointError(
                f"task {name!r}: golden row {number} is tokenised differently than when it was sealed"
            )
        engine.step([work])
        for array, wanted in zip(work.logits, row.logits, strict=True):
            expected = np.asarray(wanted, np.float32)
            found = array[..., :GOLDEN_WIDTH]
            if found.shape != expected.shape:
                raise CheckpointError(f"task {name!r}: golden row {number} has logits of another shape")
            scale = max(1.0, float(np.abs(expected).max(initial=0)))
            worst = max(worst, largest_difference(found, expected) / scale)
    return GoldenReport(name, len(rows), worst, tolerance)


def largest_difference(one: Floats, other: Floats) -> float:
    """Largest absolute difference of two arrays; infinite where they have other shapes or hold no finite numbers.

    NaN is no difference: `max` would drop it, and a broken model would pass for an exact one.
    """
    if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return float("inf")
    return float(np.abs(one - other).max(initial=0))
