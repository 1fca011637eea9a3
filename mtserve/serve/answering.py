"""Requests for tasks to answers by the model of a task table: names, limits and shapes. Knows no HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from mtserve.errors import InputError, Problem, TooLargeError
from mtserve.serve.exchange import exchange
from mtserve.serve.model import Asked, Usage
from mtserve.serve.table import ServedTask, TaskTable


async def answer_task(
    table: TaskTable, served: ServedTask, inputs: Any, parameters: Mapping[str, Any]
) -> tuple[Any, Usage]:
    """The answer of one task in the shape that clients of its kind expect.

    Raises InputError that names every bad input (nothing has run then), TooLargeError or a CapacityError.
    """
    items, shape = served.task.kind.split(inputs)
    predictions, usage = await answer_items(table, served, items, parameters)
    return served.task.kind.join(predictions, shape), usage


async def answer_items(
    table: TaskTable, served: ServedTask, items: Sequence[Any], parameters: Mapping[str, Any]
) -> tuple[list[Any], Usage]:
    """Predictions of one task, an item each. Raises as `answer_task`."""
    predictions, usage = await _predict(table, {served.name: parameters}, items)
    return predictions[served.name], usage


async def stream_task(
    table: TaskTable, served: ServedTask, inputs: Any, parameters: Mapping[str, Any]
) -> AsyncGenerator[Any, None]:
    """Events of one answer as it grows; the last one has all of it. Closing the iterator gives the answer up.

    Raises as `answer_task` does, before the first event where the request is at fault; InputError too for several
    inputs, and for a task or parameters whose answer comes at once.
    """
    items, shape = served.task.kind.split(inputs)
    if shape != "one":
        raise InputError(Problem("a stream takes one input, not a list", field="inputs"))
    asked = {served.name: parameters}
    async with aclosing(table.model.stream(asked, items, timeout_s=table.settings.timeout_s)) as events:
        async for event in events:
            yield event


async def answer_tasks(
    table: TaskTable, *, inputs: Any, tasks: Any, parameters: Mapping[str, Any]
) -> tuple[dict[str, list[Any]], Usage]:
    """Predictions of several tasks for the same inputs. Raises UnknownTaskError, else as `answer_task`; problems name
    their task."""
    items = inputs if isinstance(inputs, list) else [inputs]
    names = [table.task(name).name for name in _names(tasks)]
    exchange().tasks = tuple(names)
    problems = [
        Problem(f"not among the tasks asked for: {', '.join(names)}", field=f"parameters.{name}")
        for name in parameters
        if name not in names
    ]
    problems += [
        Problem("must be an object", field=f"parameters.{name}")
        for name, value in parameters.items()
        if not isinstance(value, dict)
    ]
    if problems:
        raise InputError(problems)
    return await _predict(table, {name: parameters.get(name) for name in names}, items)


def note_inputs(table: TaskTable, body: Mapping[str, Any]) -> None:
    """Write a request's inputs down for the log, where it is to have them."""
    if table.settings.log_texts:
        exchange().inputs = body["inputs"]


def _names(tasks: Any) -> list[str]:
    """The `tasks` of a request. Raises InputError."""
    if not isinstance(tasks, list) or not tasks or not all(isinstance(name, str) for name in tasks):
        raise InputError(Problem("must be a list with the name of at least one task", field="tasks"))
    if len(set(tasks)) < len(tasks):
        raise InputError(Problem("names a task twice", field="tasks"))
    return tasks


async def _predict(table: TaskTable, asked: Asked, items: Sequence[Any]) -> tuple[dict[str, list[Any]], Usage]:
    limits = table.settings
    if len(items) > limits.max_inputs:
        raise TooLargeError(f"{len(items)} inputs; at most {limits.max_inputs} are allowed")
    outputs, usage = await table.model.predict(asked, items, timeout_s=limits.timeout_s)
    exchange().usage = usage.as_dict()
    return outputs, usage
