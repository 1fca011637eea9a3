"""Metrics of a task through the engine that serves it, with intervals, beside what no model at all would reach.

Knows no training: the engine may hold a model in training or a loaded checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtserve.engine import Engine
from mtserve.errors import ConfigError
from mtserve.tasks.base import AnyKind, Example, Metrics, Options
from mtserve.tasks.measures import Array, LabelScores, Weighted
from training.splits import TaskData
from training.tables import Line

_AT_ONCE = 1024
_WEIGHTS_AT_ONCE = 2**21
_SLOW_RESAMPLES = 100


@dataclass(frozen=True)
class Scores:
    """A task's metrics on one of its splits; `metric` names the one that stands for the task.

    baselines   the same metrics of answers that need no model: `majority`, the constant that the training labels
                suggest (the mean of scores, no spans), and `copy`, the input itself where that can be an answer
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


def evaluate(engine: Engine, name: str, data: TaskData, *, split: str = "eval", resamples: int = 0) -> Scores:
    """Predict a whole split as a caller would, and score it; a kind that is slow to score is resampled less often.

    Raises ConfigError for a split that the task does not have.
    """
    kind, options = data.kind, data.options
    examples = _examples(name, data, split)
    predictions = _predictions(engine, name, kind, examples)
    baselines = {"majority": [kind.baseline(data.train.examples, options)] * len(examples)}
    copies = [kind.copied(example, options) for example in examples]
    if copies[0] is not None:
        baselines["copy"] = copies
    weighted = kind.weighted_metrics(predictions, examples, options)
    if weighted is None:
        resamples, weighted = min(resamples, _SLOW_RESAMPLES), _slowly(kind, predictions, examples, options)
    return Scores(
        metric=kind.metric,
        metrics=kind.metrics(predictions, examples, options),
        baselines={which: kind.metrics(answers, examples, options) for which, answers in baselines.items()},
        split=split,
        examples=len(examples),
        resamples=resamples,
        intervals=intervals(weighted, len(examples), resamples) if resamples else {},
        report=kind.report(predictions, examples, options),
        confusion=kind.confusion(predictions, examples, options),
    )


def measure(engine: Engine, name: str, data: TaskData, *, split: str = "eval") -> Metrics:
    """The metrics alone: what an evaluation during training needs. Raises ConfigError as `evaluate`."""
    examples = _examples(name, data, split)
    return data.kind.metrics(_predictions(engine, name, data.kind, examples), examples, data.options)


def intervals(weighted: Weighted, examples: int, resamples: int) -> dict[str, tuple[float, float]]:
    """The middle 95 % of each metric over resamples of the examples with replacement, the same ones in every run
    (percentile bootstrap: Efron and Tibshirani, 1993, chapter 13)."""
    generator = np.random.default_rng(0)
    size = max(1, _WEIGHTS_AT_ONCE // examples)
    found: dict[str, list[Array]] = {}
    for start in range(0, resamples, size):
        drawn = generator.integers(examples, size=(min(size, resamples - start), examples))
        weights = np.stack([np.bincount(one, minlength=examples) for one in drawn]).astype(np.float32)
        for metric, values in weighted(weights).items():
            found.setdefault(metric, []).append(values)
    limits = {metric: np.percentile(np.concatenate(values), (2.5, 97.5)) for metric, values in found.items()}
    return {metric: (float(low), float(high)) for metric, (low, high) in limits.items()}


def table(scores: Mapping[str, Scores], *, all_metrics: bool = False) -> list[Line]:
    """(task, metric, value, interval, baseline…) lines under a header; one a task, or one for each of its metrics.

    A column that no task fills is left out.
    """
    columns = ["task", "metric", "value", "95% interval", "majority", "copy"]
    lines = []
    for task, found in scores.items():
        names = [found.metric, *sorted(found.metrics.keys() - {found.metric})] if all_metrics else [found.metric]
        for name in names:
            low_high = " to ".join(f"{limit:.3f}" for limit in found.intervals.get(name, ()))
            values = {which: f"{metrics[name]:.3f}" for which, metrics in found.baselines.items()}
            cells = (task, name, f"{found.metrics[name]:.3f}", low_high, values["majority"], values.get("copy", ""))
            lines.append(cells)
    kept = [at for at in range(len(columns)) if any(line[at] for line in lines)]
    return [tuple(line[at] for at in kept) for line in (columns, *lines)]


def _examples(name: str, data: TaskData, split: str) -> list[Example]:
    if split not in data.splits:
        raise ConfigError(f"tasks.{name} has no split {split!r}; it has {', '.join(data.splits)}")
    return list(data.splits[split].examples)


def _predictions(engine: Engine, name: str, kind: AnyKind, examples: Sequence[Example]) -> list[Any]:
    """In parts, so that the rows and logits of a part only are in memory."""
    inputs = [kind.unlabelled(example) for example in examples]
    parts = (engine.predict(name, inputs[at : at + _AT_ONCE]) for at in range(0, len(inputs), _AT_ONCE))
    return [prediction for part in parts for prediction in part]


def _slowly(kind: AnyKind, predictions: Sequence[Any], examples: Sequence[Example], options: Options) -> Weighted:
    """The metrics of each resample by making it."""

    def of(weights: Array) -> dict[str, Array]:
        drawn = [np.repeat(np.arange(len(examples)), one.astype(int)).tolist() for one in weights]
        found = [kind.metrics([predictions[i] for i in d], [examples[i] for i in d], options) for d in drawn]
        return {metric: np.array([one[metric] for one in found]) for metric in found[0]}

    return of
