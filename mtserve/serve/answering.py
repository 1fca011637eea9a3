"""Requests for tasks and chains to answers by the model of a task table: names, limits, shapes. Knows no HTTP.

A chain is asked of the model in two steps, under one deadline: its first task together with the tasks of the request,
then its second one about all that the first handed on, at once. Nothing has run if its parameters are wrong.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from mtserve.chains import AnyChain, Steps, calls, grouped
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
    asked = {served.key: parameters}
    async with aclosing(table.model.stream(asked, items, timeout_s=table.settings.timeout_s)) as events:
        async for event in events:
            yield event


async def answer_tasks(
    table: TaskTable, *, inputs: Any, tasks: Any, parameters: Mapping[str, Any]
) -> tuple[dict[str, list[Any]], Usage]:
    """Predictions of several tasks and chains for the same inputs. Raises UnknownTaskError, else as `answer_task`;
    problems name their task."""
    items = inputs if isinstance(inputs, list) else [inputs]
    names = [name if name in table.chains else table.task(name).name for name in _names(tasks)]
    exchange().tasks = _counted(table, names)
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


def _counted(table: TaskTable, names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that are asked, those of chains among them."""
    chains = table.chains
    each = [[chains[name].first, chains[name].then] if name in chains else [name] for name in names]
    return tuple(dict.fromkeys(task for some in each for task in some))


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
    """Predictions of tasks and chains, by name."""
    limits = table.settings
    if len(items) > limits.max_inputs:
        raise TooLargeError(f"{len(items)} inputs; at most {limits.max_inputs} are allowed")
    end = time.monotonic() + limits.timeout_s
    steps = {name: _steps(table, name, asked[name]) for name in asked if name in table.chains}
    firsts = [(table.chains[name].first, step.first) for name, step in steps.items()]
    made = calls({name: of or {} for name, of in asked.items() if name not in steps}, firsts)
    said, usages = [], []
    for call in filter(None, made):
        answers, usage = await _ask(table, call, items, end=end)
        said.append((call, answers))
        usages.append(usage)
    outputs = {name: said[0][1][name] for name in asked if name not in steps}
    for name, step in steps.items():
        chain = table.chains[name]
        of_first = next(answers for call, answers in said if call.get(chain.first) == step.first)[chain.first]
        outputs[name], more = await _followed(table, chain, step.then, items, of_first, end=end)
        usages += more
    total = usages[0]
    for usage in usages[1:]:
        total = total.and_then(usage)
    exchange().usage = total.as_dict()
    return {name: outputs[name] for name in asked}, total


async def _ask(
    table: TaskTable, asked: Asked, items: Sequence[Any], *, end: float
) -> tuple[dict[str, list[Any]], Usage]:
    """Predictions of tasks, by name, by the heads of this table."""
    keys, left = {name: table.tasks[name].key for name in asked}, max(0.0, end - time.monotonic())
    by_key, private = {keys[name]: of for name, of in asked.items()}, exchange().private
    outputs, usage = await table.model.predict(by_key, items, timeout_s=left, private=private)
    return {name: outputs[key] for name, key in keys.items()}, usage


def _steps(table: TaskTable, name: str, parameters: Mapping[str, Any] | None) -> Steps:
    """Parameters of a chain's steps. Raises InputError that names it."""
    chain = table.chains[name]
    try:
        return chain.steps(parameters, table.members(chain))
    except InputError as error:
        raise InputError(replace(p, message=f"chain {name!r}: {p.message}") for p in error.problems) from error


async def _followed(
    table: TaskTable,
    chain: AnyChain,
    parameters: Mapping[str, Any],
    items: Sequence[Any],
    predictions: Sequence[Any],
    *,
    end: float,
) -> tuple[list[Any], list[Usage]]:
    """A chain's answers, of its first task's, and what its second step cost, if there was any. Raises InputError that
    names inputs by what was handed on of them."""
    kind = table.tasks[chain.first].task.kind
    handed = [chain.items(kind.parse(item), one) for item, one in zip(items, predictions, strict=True)]
    owners = [at for at, some in enumerate(handed) for _ in some]
    flat = [one for some in handed for one in some]
    answers: list[Any] = []
    usages: list[Usage] = []
    if flat:
        try:
            found, usage = await _ask(table, {chain.then: parameters}, flat, end=end)
        except InputError as error:
            about = f"chain {chain.name!r}, task {chain.then!r}: "
            raise InputError(
                replace(p, message=about + p.message, index=None if p.index is None else owners[p.index])
                for p in error.problems
            ) from error
        answers, usages = found[chain.then], [usage]
    each = zip(predictions, grouped(answers, handed), strict=True)
    return [chain.joined(prediction, some) for prediction, some in each], usages
