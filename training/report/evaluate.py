"""Metrics of a task through the engine that serves it, with intervals, beside what no model at all would reach.

Knows no training: the engine may hold a model in training or a loaded checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtserve.engine import Engine
from mtserve.tasks.measures import LabelScores, Metrics, Outcomes
from mtserve.tasks.overlap import signatures
from training.data.splits import TaskData
from training.report.answers import answers, examples_of
from training.report.beside import NOTHING, Beside
from training.report.tables import Line

_BASELINES = ("majority", "copy", "zero-shot")


@dataclass(frozen=True)
class Scores:
    """A task's metrics on one of its splits; `metric` names the one that stands for the task.

    baselines   the same metrics of answers that need no training: `majority`, the constant that the training labels
                suggest (the mean of scores, no spans), `copy`, the input itself where that can be an answer, and
                `zero-shot`, what the untrained trunk says
    intervals   (low, high) of each metric: 95 % by a bootstrap of so many `resamples`; empty without
    report      scores of each label, of kinds that have labels
    confusion   counts [true][given] in the order of the task's labels, where an example has one label
    """

    metric: str
    metrics: Metrics
    baselines: Mapping[str, Metrics]
    split: str = "eval"
    examples: int = 0
    resamples: int = 0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    report: Mapping[str, LabelScores] = field(default_factory=dict)
    confusion: list[list[int]] | None = None

    @property
    def baseline(self) -> Metrics:
        """The metrics of the constant answer."""
        return self.baselines["majority"]


def evaluate(
    engine: Engine, name: str, data: TaskData, *, split: str = "eval", resamples: int = 0, beside: Beside = NOTHING
) -> Scores:
    """Predict a whole split as a caller would, and score it. Raises ConfigError for a split that the task lacks."""
    return scored(answers(engine, name, data, split=split), name, data, split=split, resamples=resamples, beside=beside)


def scored(
    predictions: Sequence[Any],
    name: str,
    data: TaskData,
    *,
    split: str = "eval",
    resamples: int = 0,
    beside: Beside = NOTHING,
) -> Scores:
    """Scores of predictions, one an example of the split in its order. A judge's metrics are of the same kind as the
    task's own: with intervals, and of each baseline. Raises ConfigError as `evaluate`."""
    kind, options, train = data.kind, data.options, data.train
    examples = examples_of(name, data, split)
    given = {"majority": kind.constants(predictions, train.examples, train.features, options)}
    copies = [kind.copied(example, options) for example in examples]
    if copies[0] is not None:
        given["copy"] = copies
    if split in beside.zero_shot:
        given["zero-shot"] = list(beside.zero_shot[split])
    judged = {} if beside.judge is None else beside.judge.judged(predictions, examples)
    own = kind.outcomes(predictions, examples, options)

    def score(outcomes: Outcomes) -> Metrics:
        opinions = zip(judged, outcomes[len(own) :], strict=True)
        return kind.score(outcomes[: len(own)], options) | {metric: float(one.mean()) for metric, one in opinions}

    outcomes = (*own, *judged.values())
    return Scores(
        metric=kind.metric,
        metrics=score(outcomes),
        baselines={
            which: kind.metrics(one, examples, options) | ({} if beside.judge is None else beside.judge.metrics(one))
            for which, one in given.items()
        },
        split=split,
        examples=len(examples),
        resamples=resamples,
        intervals=intervals(score, outcomes, resamples=resamples) if resamples else {},
        report=kind.report(own, options),
        confusion=kind.confusion(own, options),
    )


def measure(engine: Engine, name: str, data: TaskData, *, split: str = "eval") -> Metrics:
    """The metrics alone: what an evaluation during training needs. Raises ConfigError as `evaluate`."""
    return data.kind.metrics(answers(engine, name, data, split=split), examples_of(name, data, split), data.options)


def intervals(
    score: Callable[[Outcomes], Metrics], outcomes: Outcomes, *, resamples: int
) -> dict[str, tuple[float, float]]:
    """The middle 95 % of each metric over resamples of the examples with replacement, the same ones in every run
    (percentile bootstrap: Efron and Tibshirani, 1993, chapter 13)."""
    generator, size = np.random.default_rng(0), outcomes[0].shape[0]
    draws = (generator.integers(size, size=size) for _ in range(resamples))
    found = [score(tuple(one[drawn] for one in outcomes)) for drawn in draws]
    limits = {metric: np.percentile([one[metric] for one in found], (2.5, 97.5)) for metric in found[0]}
    return {metric: (float(low), float(high)) for metric, (low, high) in limits.items()}


def table(scores: Mapping[str, Scores], *, all_metrics: bool = False) -> list[Line]:
    """(task, metric, value, interval, baseline…) lines under a header; one a task, or one for each of its metrics.

    A column that no task fills is left out.
    """
    columns = ("task", "metric", "value", "95% interval", *_BASELINES)
    lines = []
    for task, found in scores.items():
        names = [found.metric, *sorted(found.metrics.keys() - {found.metric})] if all_metrics else [found.metric]
        for name in names:
            low_high = " to ".join(f"{limit:.3f}" for limit in found.intervals.get(name, ()))
            values = ({name: found.metrics[name]}, *(found.baselines.get(which, {}) for which in _BASELINES))
            value, *others = (f"{of[name]:.3f}" if name in of else "" for of in values)
            lines.append((task, name, value, low_high, *others))
    kept = [at for at in range(len(columns)) if any(line[at] for line in lines)]
    return [tuple(line[at] for at in kept) for line in (columns, *lines)]


def signed(scores: Mapping[str, Scores]) -> list[str]:
    """sacreBLEU's signatures, a sentence each, if any of the scores are its."""
    shown = any("bleu" in one.metrics for one in scores.values())
    return [f"{metric}: sacreBLEU {signature}" for metric, signature in signatures().items()] if shown else []
