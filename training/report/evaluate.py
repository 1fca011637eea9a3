"""Metrics of a task through the engine that serves it, with intervals, beside what no model at all would reach.

Knows no training: the engine may hold a model in training or a loaded checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mtserve.engine import Engine
from mtserve.errors import ConfigError
from mtserve.tasks.base import Example
from mtserve.tasks.measures import LabelScores, Metrics, Outcomes
from training.data.splits import TaskData
from training.report.tables import Line

_EXAMPLES_AT_ONCE = 1024
_MASKED_TOKENS_AT_ONCE = 4096


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
    """Predict a whole split as a caller would, and score it. Raises ConfigError for a split that the task lacks."""
    kind, options, train = data.kind, data.options, data.train
    examples = _examples(name, data, split)
    predictions = _predictions(engine, name, data, examples)
    outcomes = kind.outcomes(predictions, examples, options)
    answers = {"majority": kind.constants(predictions, train.examples, train.features, options)}
    copies = [kind.copied(example, options) for example in examples]
    if copies[0] is not None:
        answers["copy"] = copies
    score = partial(kind.score, options=options)
    return Scores(
        metric=kind.metric,
        metrics=score(outcomes),
        baselines={which: kind.metrics(given, examples, options) for which, given in answers.items()},
        split=split,
        examples=len(examples),
        resamples=resamples,
        intervals=intervals(score, outcomes, resamples=resamples) if resamples else {},
        report=kind.report(outcomes, options),
        confusion=kind.confusion(outcomes, options),
    )


def measure(engine: Engine, name: str, data: TaskData, *, split: str = "eval") -> Metrics:
    """The metrics alone: what an evaluation during training needs. Raises ConfigError as `evaluate`."""
    examples = _examples(name, data, split)
    return data.kind.metrics(_predictions(engine, name, data, examples), examples, data.options)


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


def _predictions(engine: Engine, name: str, data: TaskData, examples: Sequence[Example]) -> list[Any]:
    """In parts, so that the rows and logits of a part only are in memory: of masked tokens fewer, since each position
    of a row has logits as wide as the vocabulary."""
    kind, options, size = data.kind, data.options, _EXAMPLES_AT_ONCE
    if kind.head(options).architecture == "masked_lm":
        size = max(1, _MASKED_TOKENS_AT_ONCE // options.max_length)
    inputs = [kind.unlabelled(example) for example in examples]
    parts = (engine.predict(name, inputs[at : at + size]) for at in range(0, len(inputs), size))
    return [prediction for part in parts for prediction in part]
