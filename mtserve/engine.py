"""Examples in, predictions out: mixed tasks in one trunk pass, in steps. Knows no HTTP, no files, no framework.

    prepare(task, example, parameters) -> work     any thread; the tokenizer runs here; every bad input is found here
    step(works) -> finished, unfinished            one thread; one round of trunk passes for all works given
    finish(work) -> prediction                     any thread

Invariants (tests/test_engine.py holds them): a step encodes each distinct row once, however many works and tasks want
it; a prediction does not depend on what else is in a batch, on the order of works or on the token budget (1e-5 in
fp32); a work is in exactly one of the two lists that `step` returns, in the order given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtserve.backends.base import Backend
from mtserve.batching import Batch, plan
from mtserve.errors import InputError, Problem, UnknownTaskError
from mtserve.rows import Row
from mtserve.tasks.base import AnyKind, Example, Options, Work
from mtserve.tasks.validation import validate
from mtserve.text import Text

DEFAULT_BUDGET = 4096


@dataclass(frozen=True)
class Task:
    """A task as the engine knows it."""

    name: str
    kind: AnyKind
    options: Options
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Counters:
    """What an engine has run so far, after equal rows were joined."""

    tokens: int = 0
    rows: int = 0
    trunk_passes: int = 0


class Engine:
    """All tasks of one trunk."""

    def __init__(
        self, tasks: Iterable[Task], backend: Backend, text: Text, *, max_batch_tokens: int = DEFAULT_BUDGET
    ) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.backend = backend
        self.text = text
        self.max_batch_tokens = max_batch_tokens
        self.counters = Counters()  # only `step` writes it

    def task(self, name: str) -> Task:
        """Raises UnknownTaskError."""
        if name not in self.tasks:
            raise UnknownTaskError(name, self.tasks)
        return self.tasks[name]

    def prepare(self, name: str, example: Example, parameters: Mapping[str, Any] | None = None) -> Work:
        """A validated example as work. Raises InputError for a wrong parameter or a text that the task refuses."""
        task = self.task(name)
        chosen = validate(task.kind.parameters, parameters or {}, prefix="parameters.")
        task.kind.check(example, task.options, chosen)
        return Work(name, example, chosen, task.kind.rows(example, task.options, self.text))

    def prepare_all(self, name: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None) -> list[Work]:
        """Raw items (strings, mappings, examples) as works. Raises one InputError that names every bad item."""
        task = self.task(name)
        works: list[Work] = []
        problems: list[Problem] = []
        validate(task.kind.parameters, parameters or {}, prefix="parameters.")
        for index, item in enumerate(items):
            try:
                example = item if isinstance(item, task.kind.example) else task.kind.parse(item)
                works.append(self.prepare(name, example, parameters))
            except InputError as error:
                problems += error.at(index).problems
        if problems:
            raise InputError(problems)
        return works

    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """Encode what every work wants next and take its logits in: (finished, unfinished)."""
        rows: dict[Any, Row] = {}
        wanted: dict[Any, dict[str, list[tuple[Work, int]]]] = {}
        for work in works:
            work.logits = [np.empty(0, np.float32)] * len(work.rows)
            for at, row in enumerate(work.rows):
                rows.setdefault(row.key, row)
                wanted.setdefault(row.key, {}).setdefault(work.task, []).append((work, at))
        keys = list(rows)
        for indexes in plan([len(rows[k]) for k in keys], budget=self.max_batch_tokens, cost=self.backend.cost):
            self._run([keys[i] for i in indexes], rows, wanted)
        finished: list[Work] = []
        unfinished: list[Work] = []
        for work in works:
            task = self.tasks[work.task]
            (finished if task.kind.advance(work, task.options, self.text) else unfinished).append(work)
        return finished, unfinished

    def _run(
        self, keys: list[Any], rows: Mapping[Any, Row], wanted: Mapping[Any, Mapping[str, list[tuple[Work, int]]]]
    ) -> None:
        """One trunk pass over distinct rows; each work that wants a row gets its own task's logits of it."""
        by_task: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            for task in wanted[key]:
                by_task.setdefault(task, []).append(index)
        batch = Batch(tuple(rows[key] for key in keys), {task: tuple(i) for task, i in by_task.items()})
        logits = self.backend.run(batch)
        for task, indexes in batch.wanted.items():
            for index, array in zip(indexes, logits[task], strict=True):
                for work, at in wanted[keys[index]][task]:
                    work.logits[at] = array
                    work.passes.add(self.counters.trunk_passes)
        self.counters.rows += len(keys)
        self.counters.tokens += batch.tokens
        self.counters.trunk_passes += 1

    def finish(self, work: Work) -> Any:
        """The prediction of a finished work."""
        task = self.tasks[work.task]
        return task.kind.decode(work, task.options, self.text)

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Predictions of works, in order, whatever number of steps they take."""
        waiting = list(works)
        while waiting:
            _, waiting = self.step(waiting)
        return [self.finish(work) for work in works]

    def predict(self, task: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None) -> list[Any]:
        """Predictions of one task for items that may be strings, mappings or examples, in order.

        Raises UnknownTaskError, or InputError that names every bad item; nothing has run then.
        """
        return self.run(self.prepare_all(task, items, parameters))
