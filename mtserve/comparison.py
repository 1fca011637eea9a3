"""A profile against fp32 on the calibration rows of a task: decisions, metric, logits. Accepts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import ValidationError

from mtserve.checkpoint import Checkpoint
from mtserve.decisions import flipped
from mtserve.engine import Engine, Task
from mtserve.errors import CheckpointError
from mtserve.golden import largest_difference
from mtserve.manifest import Change
from mtserve.tasks.base import Example
from mtserve.tasks.measures import Outcomes

RESAMPLES = 1000


@dataclass(frozen=True)
class Cases:
    """The calibration rows of a task."""

    task: Task
    labelled: Sequence[Any]
    examples: Sequence[Example]

    @classmethod
    def of(cls, checkpoint: Checkpoint, task: Task) -> Cases:
        """Raises CheckpointError for a row that is none of its kind."""
        try:
            labelled = [task.kind.labelled.model_validate(record) for record in checkpoint.calibration(task.name)]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"a calibration row of task {task.name!r}: {where}: {first['msg']}") from error
        return cls(task, labelled, [task.kind.unlabelled(example) for example in labelled])


@dataclass(frozen=True)
class Answered:
    """A task's predictions for its calibration rows, with the logits of kinds of one pass, and what scoring needs."""

    cases: Cases
    predictions: Sequence[Any]
    logits: Sequence[Sequence[Any]]

    @classmethod
    def by(cls, engine: Engine, cases: Cases) -> Answered:
        works = [engine.prepare(cases.task.name, example) for example in cases.examples]
        predictions = engine.run(works, errors=True)
        return cls(cases, predictions, [[] if work.reserved else work.logits for work in works])

    @cached_property
    def outcomes(self) -> Outcomes:
        return self.cases.task.kind.outcomes(self.predictions, self.cases.labelled, self.cases.task.options)

    def score(self, rows: Any = slice(None)) -> float:
        """The metric that stands for the task, of some of the rows."""
        kind, options = self.cases.task.kind, self.cases.task.options
        return float(kind.score(tuple(one[rows] for one in self.outcomes), options)[kind.metric])

    @cached_property
    def resampled(self) -> list[float]:
        """The metric of resamples of the rows with replacement, the same ones for every profile."""
        generator, size = np.random.default_rng(0), len(self.predictions)
        return [self.score(generator.integers(size, size=size)) for _ in range(RESAMPLES)]


def changed(fp32: Answered, other: Answered) -> Change:
    """What a profile makes of a task (paired percentile bootstrap: Efron and Tibshirani, 1993, chapter 13)."""
    task, pairs = fp32.cases.task, zip(fp32.predictions, other.predictions, strict=True)
    low = high = 0.0
    if not _equal(fp32.outcomes, other.outcomes):
        apart = np.subtract(other.resampled, fp32.resampled)
        low, high = (float(limit) for limit in np.percentile(apart, (2.5, 97.5)))
    return Change(
        metric=task.kind.metric,
        fp32=fp32.score(),
        change=other.score() - fp32.score(),
        low=low,
        high=high,
        flips=sum(flipped(one, two, task.options) for one, two in pairs),
        rows=len(fp32.predictions),
    )


def _equal(one: Outcomes, other: Outcomes) -> bool:
    return all(not (a != b).sum() for a, b in zip(one, other, strict=True))


def difference(fp32: Answered, other: Answered) -> float:
    """Largest difference of a logit, as golden rows measure it: over the larger of 1 and the row's largest logit."""
    worst = 0.0
    for wanted, found in zip(fp32.logits, other.logits, strict=True):
        for a, b in zip(wanted, found, strict=True):
            worst = max(worst, largest_difference(b, a) / max(1.0, float(np.abs(a).max(initial=0))))
    return worst
