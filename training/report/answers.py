"""Predictions of a whole split through an engine, and those of a trunk that was not trained. Knows no metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mtserve.engine import Engine, Task
from mtserve.errors import ConfigError, InputError
from mtserve.tasks.base import Example
from training.data.splits import TaskData

_EXAMPLES_AT_ONCE = 1024
_MASKED_TOKENS_AT_ONCE = 4096


def examples_of(name: str, data: TaskData, split: str) -> list[Example]:
    """The labelled examples of a split. Raises ConfigError for one that the task lacks."""
    if split not in data.splits:
        raise ConfigError(f"tasks.{name} has no split {split!r}; it has {', '.join(data.splits)}")
    return list(data.splits[split].examples)


def answers(
    engine: Engine, name: str, data: TaskData, *, split: str = "eval", parameters: Mapping[str, Any] | None = None
) -> list[Any]:
    """The predictions of a split in its order, under the parameters of a request. Raises ConfigError for a split that
    the task lacks and for parameters that it refuses.

    In parts, so that the rows and logits of a part only are in memory: of masked tokens fewer, since each position of a
    row has logits as wide as the vocabulary.
    """
    kind, options, size = data.kind, data.options, _EXAMPLES_AT_ONCE
    if kind.head(options).architecture == "masked_lm":
        size = max(1, _MASKED_TOKENS_AT_ONCE // options.max_length)
    inputs: Sequence[Example] = [kind.unlabelled(example) for example in examples_of(name, data, split)]
    try:
        parts = [engine.predict(name, inputs[at : at + size], parameters) for at in range(0, len(inputs), size)]
    except InputError as error:
        raise ConfigError(f"tasks.{name}, {split}: {error}") from error
    return [prediction for part in parts for prediction in part]


def prompted(engine: Engine, name: str, data: TaskData, template: str) -> Engine:
    """An engine over the same model in which a generation has another template: before training, the trunk with its
    pretrained output matrix. Raises ConfigError for a template that cannot be one."""
    given = {**data.options.model_dump(mode="json"), "template": template}
    try:
        options = data.kind.options.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"tasks.{name}.zero_shot: {found}") from error
    return Engine([Task(name, data.kind, options)], engine.backend, engine.text)
