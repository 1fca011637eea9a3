"""Metrics of the model in training, through the engine that serves it, beside those of a constant answer."""

from __future__ import annotations

from dataclasses import dataclass

from mtserve.engine import Engine
from mtserve.tasks.base import Metrics
from training.examples import TaskData


@dataclass(frozen=True)
class Scores:
    """A task's metrics on its evaluation split; `metric` names the one that stands for it.

    baseline   the same metrics of the constant prediction that the training labels alone suggest
    """

    metric: str
    metrics: Metrics
    baseline: Metrics


def evaluate(engine: Engine, name: str, data: TaskData) -> Scores:
    """Predict the whole evaluation split as a caller would, and score it."""
    kind, examples = data.kind, data.eval.examples
    predictions = engine.predict(name, [kind.unlabelled(example) for example in examples])
    constant = [kind.baseline(data.train.examples, data.options)] * len(examples)
    return Scores(
        metric=kind.metric,
        metrics=kind.metrics(predictions, examples, data.options),
        baseline=kind.metrics(constant, examples, data.options),
    )


def table(scores: dict[str, Scores], *, all_metrics: bool = False) -> list[tuple[str, str, str, str]]:
    """(task, metric, value, baseline) lines under a header; one a task, or one for each of its metrics."""
    lines = [("task", "metric", "value", "baseline")]
    for task, found in scores.items():
        names = [found.metric, *sorted(found.metrics.keys() - {found.metric})] if all_metrics else [found.metric]
        lines += [(task, name, f"{found.metrics[name]:.3f}", f"{found.baseline[name]:.3f}") for name in names]
    return lines
