"""What stands beside a generation's own scores: a judge of style, and the answers of the untrained trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mtserve.engine import Engine
from mtserve.errors import ConfigError
from mtserve.loading import load
from mtserve.tasks.measures import Array, Metrics
from training.config import JudgeConfig, RunConfig
from training.data.splits import TaskData
from training.report.answers import answers, prompted
from training.trunk import find_trunk

_JUDGED = "style_accuracy"


@dataclass(frozen=True)
class Judge:
    """A classifier that says whether texts have the style named by `label`."""

    engine: Engine
    task: str
    label: str

    def says(self, texts: Sequence[str]) -> Array:
        """(texts,) whether each gets the label before all others; one without a character never does."""
        asked = [at for at, text in enumerate(texts) if text.strip()]
        found = np.zeros(len(texts), np.bool_)
        best = self.engine.predict(self.task, [{"text": texts[at]} for at in asked])
        found[asked] = [one[0]["label"] == self.label for one in best]
        return found

    def metrics(self, predictions: Sequence[Any]) -> Metrics:
        """`style_accuracy`: the share of generations that get the label."""
        return {_JUDGED: float(self.says(_texts(predictions)).mean())}

    def judged(self, predictions: Sequence[Any], examples: Sequence[Any]) -> dict[str, Array]:
        """(examples,) each: whether a generation gets the label, and the judge's own accuracy on real lines: whether
        the target gets it, and whether the source does not."""
        return {
            _JUDGED: self.says(_texts(predictions)),
            f"{_JUDGED}_targets": self.says([example.target for example in examples]),
            f"{_JUDGED}_sources": ~self.says([example.text for example in examples]),
        }


@dataclass(frozen=True)
class Beside:
    """For one task: its judge, and by split the untrained trunk's predictions."""

    judge: Judge | None = None
    zero_shot: Mapping[str, Sequence[Any]] = field(default_factory=dict)


NOTHING = Beside()


def beside(
    config: RunConfig, data: Mapping[str, TaskData], *, base: Path, untrained: Engine | None = None
) -> dict[str, Beside]:
    """What the run file asks for, a task each; zero-shot answers if there is an engine over the untrained model.

    Raises SetupError for a judge that is not there and for a template that cannot be one.
    """
    judges = {n: open_judge(j, base, of=n) for n in data if (j := config.tasks[n].judge) is not None}
    found = {}
    for name, of in data.items():
        template, said = config.tasks[name].zero_shot, {}
        if untrained is not None and template is not None:
            engine = prompted(untrained, name, of, template)
            said = {which: answers(engine, name, of, split=which) for which in of.splits if which != "train"}
        found[name] = Beside(judges.get(name), said)
    return found


def open_judge(config: JudgeConfig, base: Path, *, of: str) -> Judge:
    """The judge of task `of`; its path is relative to `base`, else to the working directory. Raises SetupError."""
    engine = load(find_trunk(config.checkpoint, base))
    known = {t.name: t.kind.label_names(t.options) for t in engine.tasks.values() if t.kind.name == "classification"}
    if config.label not in known.get(config.task, ()):
        allowed = "; ".join(f"{task}: {', '.join(labels)}" for task, labels in known.items()) or "none"
        found = f"{config.checkpoint} has no classification {config.task!r} with label {config.label!r}"
        raise ConfigError(f"tasks.{of}.judge: {found}; allowed: {allowed}")
    return Judge(engine, config.task, config.label)


def _texts(predictions: Sequence[Any]) -> list[str]:
    """The best text of each generation."""
    return [prediction[0]["generated_text"] for prediction in predictions]
