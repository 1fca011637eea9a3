"""Checked requests to answers through the schedulers of a task table. Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from mtserve.errors import InputError, Problem, TooLargeError
from mtserve.serve.exchange import exchange
from mtserve.serve.table import ServedTask, ServedTrunk, TaskTable
from mtserve.tasks.work import Work
from mtserve.ticket import Ticket


@dataclass(frozen=True)
class Usage:
    """What a request cost.

    inputs            how many it asked about
    tokens            of all rows that it asked for, also of those that it shares
    truncated         inputs of which some text was cut
    trunk_passes      in which it took part
    …_time_ms         tokenising; waiting for the engine; running and decoding; all of it
    """

    inputs: int
    tokens: int
    truncated: int
    trunk_passes: int
    prepare_time_ms: float
    queue_time_ms: float
    run_time_ms: float
    total_time_ms: float

    def as_dict(self) -> dict[str, int | float]:
        return {**vars(self)}


async def answer_task(
    table: TaskTable, served: ServedTask, inputs: Any, parameters: Mapping[str, Any]
) -> tuple[Any, Usage]:
    """The answer of one task in the shape that clients of its kind expect.

    Raises InputError that names every bad input (nothing has run then), TooLargeError or a CapacityError.
    """
    items, shape = served.task.kind.split(inputs)
    predictions, usage = await _predict(table, [served], items, {served.name: parameters})
    return served.task.kind.join(predictions[served.name], shape), usage


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
    deadline, scheduler = time.monotonic() + table.settings.timeout_s, served.trunk.scheduler
    works = await scheduler.prepare({served.name: parameters}, items, deadline=deadline, stream=True)
    async with aclosing(scheduler.accept(works[served.name], deadline=deadline, stream=True).events()) as events:
        async for event in events:
            yield event


async def answer_tasks(
    table: TaskTable, *, inputs: Any, tasks: Any, parameters: Mapping[str, Any]
) -> tuple[dict[str, list[Any]], Usage]:
    """Predictions of several tasks for the same inputs; works of equal rows are queued side by side, so that they are
    encoded once. Raises UnknownTaskError, else as `answer_task`; problems name their task.
    """
    items = inputs if isinstance(inputs, list) else [inputs]
    served = [table.task(name) for name in _names(tasks)]
    names = [task.name for task in served]
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
    return await _predict(table, served, items, parameters)


def _names(tasks: Any) -> list[str]:
    """The `tasks` of a request. Raises InputError."""
    if not isinstance(tasks, list) or not tasks or not all(isinstance(name, str) for name in tasks):
        raise InputError(Problem("must be a list with the name of at least one task", field="tasks"))
    if len(set(tasks)) < len(tasks):
        raise InputError(Problem("names a task twice", field="tasks"))
    return tasks


async def _predict(
    table: TaskTable, served: Sequence[ServedTask], items: Sequence[Any], parameters: Mapping[str, Any]
) -> tuple[dict[str, list[Any]], Usage]:
    """Prepare all, then queue all of a trunk as one request, input by input."""
    limits = table.settings
    if len(items) > limits.max_inputs:
        raise TooLargeError(f"{len(items)} inputs; at most {limits.max_inputs} are allowed")
    began = time.monotonic()
    order: dict[ServedTrunk, list[ServedTask]] = {}
    for task in served:
        order.setdefault(task.trunk, []).append(task)
    works = await _prepare(order, items, parameters, deadline=began + limits.timeout_s)
    prepared = time.monotonic()
    tickets: list[Ticket] = []
    outputs: dict[str, list[Any]] = {task.name: [] for task in served}
    try:
        for trunk, tasks in order.items():
            side_by_side = [works[task.name][at] for at in range(len(items)) for task in tasks]
            tickets.append(trunk.scheduler.accept(side_by_side, deadline=began + limits.timeout_s))
        for tasks, ticket in zip(order.values(), tickets, strict=True):
            predictions = await ticket.result()
            for number, task in enumerate(tasks):
                outputs[task.name] = predictions[number :: len(tasks)]
    finally:
        for ticket in tickets:
            ticket.withdraw()
    usage = _usage(works, tickets, began=began, prepared=prepared, inputs=len(items))
    exchange().usage = usage.as_dict()
    return outputs, usage


async def _prepare(
    served: Mapping[ServedTrunk, Sequence[ServedTask]],
    items: Sequence[Any],
    parameters: Mapping[str, Any],
    *,
    deadline: float,
) -> dict[str, list[Work]]:
    """Works of every task, those of a trunk at once. Raises one InputError with the problems of all tasks."""
    works: dict[str, list[Work]] = {}
    problems: list[Problem] = []
    for trunk, tasks in served.items():
        asked = {task.name: parameters.get(task.name) for task in tasks}
        try:
            works |= await trunk.scheduler.prepare(asked, items, deadline=deadline)
        except InputError as error:
            if len(served) == 1:
                raise
            said = f"task {tasks[0].name!r}: " if len(tasks) == 1 else ""  # else each problem says its task
            problems += [replace(problem, message=said + problem.message) for problem in error.problems]
    if problems:
        raise InputError(problems)
    return works


def _usage(
    works: Mapping[str, Sequence[Work]], tickets: Sequence[Ticket], *, began: float, prepared: float, inputs: int
) -> Usage:
    ended = time.monotonic()
    started = max((ticket.started or ended for ticket in tickets), default=prepared)
    return Usage(
        inputs=inputs,
        tokens=sum(work.tokens for of_task in works.values() for work in of_task),
        truncated=sum(any(work.cut for work in of_input) for of_input in zip(*works.values(), strict=True)),
        trunk_passes=sum(len(set().union(*(work.passes for work in ticket.works))) for ticket in tickets),
        prepare_time_ms=_ms(prepared - began),
        queue_time_ms=_ms(started - prepared),
        run_time_ms=_ms(ended - started),
        total_time_ms=_ms(ended - began),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
