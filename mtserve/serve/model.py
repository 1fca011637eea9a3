"""What answers checked requests: a model, here by the schedulers of this process. Knows no HTTP.

`mtserve.serve.remote` is the other one, which asks the process that has the model for several API workers.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

from mtserve.engine import Engine
from mtserve.errors import CapacityError, InputError, Problem
from mtserve.scheduler import Scheduler
from mtserve.tasks.work import Work, named
from mtserve.ticket import Ticket

Asked = Mapping[str, Mapping[str, Any] | None]
"""Keys of tasks (`mtserve.engine.Task.key`), all known, and the parameters of each."""


@dataclass(frozen=True)
class Usage:
    """What a request cost.

    inputs            how many it asked about
    tokens            of all rows that it asked for, also of those that it shares
    truncated         inputs of which some text was cut; those that a chain makes count too
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

    def and_then(self, more: Usage) -> Usage:
        """Of a request that asked once more, about inputs of its own making."""
        sums = {name: round(value + vars(more)[name], 2) for name, value in vars(self).items()}
        return Usage(**{**sums, "inputs": self.inputs})


class Model(Protocol):
    """Answers within a time, after which it raises DeadlineError. All methods but `close` are for the event loop."""

    async def predict(
        self, asked: Asked, items: Sequence[Any], *, timeout_s: float, private: bool = False
    ) -> tuple[dict[str, list[Any]], Usage]:
        """Predictions of each task for the items, of which nothing is kept where they are `private`. Raises InputError
        that names every bad item (nothing has run then), TooLargeError, CapacityError, or what went wrong."""
        ...

    def stream(self, asked: Asked, items: Sequence[Any], *, timeout_s: float) -> AsyncGenerator[Any, None]:
        """Events of the answer of one task for one item, as it grows; closing the iterator gives it up. Raises as
        `predict`; what is wrong with the request before the first event."""
        ...

    def refuse(self, task: str) -> None:
        """Raise OverloadedError or CapacityError if no request for the task would be accepted now, however small it
        is, as far as is known without waiting: so that it is not read."""
        ...

    async def check(self) -> None:
        """Raise CapacityError if nothing can be answered now."""
        ...

    def close(self) -> None:
        """Answer what was accepted, and end."""
        ...


@dataclass(frozen=True, eq=False)
class Queue:
    """A trunk's engine, and its scheduler."""

    engine: Engine
    scheduler: Scheduler


class LocalModel:
    """Has the queues of all trunks in this process; `queues` are by the tasks' keys."""

    def __init__(self, queues: Mapping[str, Queue]) -> None:
        self.queues = dict(queues)

    async def predict(
        self, asked: Asked, items: Sequence[Any], *, timeout_s: float, private: bool = False
    ) -> tuple[dict[str, list[Any]], Usage]:
        """Prepare all, then queue all of a trunk as one request, input by input: works of equal rows side by side, so
        that they are encoded once."""
        began = time.monotonic()
        deadline = began + timeout_s
        order: dict[Queue, list[str]] = {}
        for key in asked:
            order.setdefault(self._queue(key), []).append(key)
        works = await _prepare(order, asked, items, deadline=deadline)
        for work in chain.from_iterable(works.values()):
            work.private = private
        prepared = time.monotonic()
        tickets: list[Ticket] = []
        outputs: dict[str, list[Any]] = {name: [] for name in asked}
        try:
            for queue, names in order.items():
                side_by_side = [works[name][at] for at in range(len(items)) for name in names]
                tickets.append(queue.scheduler.accept(side_by_side, deadline=deadline))
            for names, ticket in zip(order.values(), tickets, strict=True):
                predictions = await ticket.result()
                for number, name in enumerate(names):
                    outputs[name] = predictions[number :: len(names)]
        finally:
            for ticket in tickets:
                ticket.withdraw()
        return outputs, _usage(works, tickets, began=began, prepared=prepared, inputs=len(items))

    async def stream(self, asked: Asked, items: Sequence[Any], *, timeout_s: float) -> AsyncGenerator[Any, None]:
        ((name, parameters),) = asked.items()
        deadline, scheduler = time.monotonic() + timeout_s, self._queue(name).scheduler
        works = await scheduler.prepare({name: parameters}, items, deadline=deadline, stream=True)
        async with aclosing(scheduler.accept(works[name], deadline=deadline, stream=True).events()) as events:
            async for event in events:
                yield event

    def refuse(self, task: str) -> None:
        self._queue(task).scheduler.refuse(named(task))

    def _queue(self, key: str) -> Queue:
        """Raises CapacityError for a head that is gone, which only another process may not know."""
        if key not in self.queues:
            raise CapacityError(f"task {named(key)!r} was changed meanwhile; try again")
        return self.queues[key]

    async def check(self) -> None:
        """What is in this process is there."""

    def close(self) -> None:
        for queue in dict.fromkeys(self.queues.values()):
            queue.scheduler.close()


async def _prepare(
    order: Mapping[Queue, Sequence[str]], asked: Asked, items: Sequence[Any], *, deadline: float
) -> dict[str, list[Work]]:
    """Works of every task, those of a trunk at once. Raises one InputError with the problems of all tasks."""
    works: dict[str, list[Work]] = {}
    problems: list[Problem] = []
    for queue, names in order.items():
        try:
            works |= await queue.scheduler.prepare({name: asked[name] for name in names}, items, deadline=deadline)
        except InputError as error:
            if len(order) == 1:
                raise
            said = f"task {named(names[0])!r}: " if len(names) == 1 else ""  # else each problem says its task
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
