"""Examples in, predictions out: mixed tasks in one trunk pass, in steps. Knows no HTTP, no files, no framework.

    prepare(task, example, parameters) -> work     any thread; the tokenizer runs here; every bad input is found here
    step(works) -> finished, unfinished            one thread; one round of trunk passes for all works given
    finish(work) -> prediction                     any thread

Invariants (tests/test_contract.py and tests/tasks/test_generation.py hold them): a step encodes each distinct row once,
however many works and tasks want it; a prediction does not depend on what else is in a batch, on the order of works or
on the token budget (1e-5 in fp32); a work is in exactly one of the two lists that `step` returns, in the order given; a
step that raises has advanced no work; a work that cannot be advanced is finished with its error and harms no other.
Rows that go on from a past make passes of their own, since padding them to fresh rows would cost more than a pass. A
batch is launched before the answers of the one before are taken, so that a device that computes by itself need not wait
for the host; at the end of a step none is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtserve.backends.base import Backend, Pending
from mtserve.batching import Batch, plan
from mtserve.errors import ConfigError, InputError, Problem, UnknownTaskError
from mtserve.rows import Row
from mtserve.tasks.base import AnyKind, Example, Options
from mtserve.tasks.validation import validate
from mtserve.tasks.work import Work, fits, room
from mtserve.text import Text

DEFAULT_BUDGET = 4096
DEFAULT_PAST = 32_768


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


@dataclass(frozen=True)
class _Ahead:
    """A batch under way.

    takers   for each task and each row that it wants, the works that want it, and as which of their rows
    """

    pending: Pending
    rows: int
    takers: Mapping[str, Sequence[Sequence[tuple[Work, int]]]]


class Engine:
    """All tasks of one trunk. Raises ConfigError for a task whose options do not go with the tokenizer."""

    def __init__(
        self,
        tasks: Iterable[Task],
        backend: Backend,
        text: Text,
        *,
        max_batch_tokens: int = DEFAULT_BUDGET,
        max_past_tokens: int = DEFAULT_PAST,
    ) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.backend = backend
        self.text = text
        self.max_batch_tokens = max_batch_tokens
        self.max_past_tokens = max_past_tokens
        for task in self.tasks.values():
            try:
                task.kind.check_text(task.options, text)
            except ConfigError as error:
                raise ConfigError(f"task {task.name!r}: {error}") from error
        self.counters = Counters()  # only `step` writes it

    def task(self, name: str) -> Task:
        """Raises UnknownTaskError."""
        if name not in self.tasks:
            raise UnknownTaskError(name, self.tasks)
        return self.tasks[name]

    def prepare(
        self, name: str, example: Example, parameters: Mapping[str, Any] | None = None, *, stream: bool = False
    ) -> Work:
        """A validated example as work; `stream` for one whose answer is read along.

        Raises InputError for a wrong parameter or a text that the task refuses.
        """
        return self._prepare(name, example, parameters, self.text, stream=stream)

    def _prepare(
        self, name: str, example: Example, parameters: Mapping[str, Any] | None, text: Text, *, stream: bool
    ) -> Work:
        task = self.task(name)
        chosen = validate(task.kind.parameters, parameters or {}, prefix="parameters.")
        task.kind.check(example, task.options, chosen)
        if stream:
            task.kind.check_stream(task.options, chosen)
        work = Work(name, example, chosen, task.kind.rows(example, task.options, text), streamed=stream)
        task.kind.begin(work, task.options, text)
        if room([work]) > self.max_past_tokens:
            found = f"the prompt and its answers may take {room([work])} tokens at once"
            raise InputError(f"{found}; allowed: {self.max_past_tokens} (shorter or fewer answers need less)")
        return work

    def prepare_all(
        self, name: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None, *, stream: bool = False
    ) -> list[Work]:
        """Raw items (strings, mappings, examples) as works. Raises one InputError that names every bad item."""
        task = self.task(name)
        examples: dict[int, Example] = {}
        works: list[Work] = []
        problems: list[Problem] = []
        validate(task.kind.parameters, parameters or {}, prefix="parameters.")
        for index, item in enumerate(items):
            try:
                examples[index] = item if isinstance(item, task.kind.example) else task.kind.parse(item)
            except InputError as error:
                problems += error.at(index).problems
        texts = (text for example in examples.values() for text in task.kind.texts(example))
        ahead = self.text.ahead(texts, task.options.preparation)
        for index, example in examples.items():
            try:
                works.append(self._prepare(name, example, parameters, ahead, stream=stream))
            except InputError as error:
                problems += error.at(index).problems
        if problems:
            raise InputError(sorted(problems, key=lambda problem: problem.index or 0))
        return works

    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """Encode what every work wants next and take its logits in: (finished, unfinished).

        Raises what the backend raises; nothing has advanced then.
        """
        rows: dict[Any, Row] = {}
        wanted: dict[Any, dict[str, list[tuple[Work, int]]]] = {}
        for work in works:
            work.logits = [np.empty(0, np.float32)] * len(work.rows)
            for at, row in enumerate(work.rows):
                rows.setdefault(row.key, row)
                wanted.setdefault(row.key, {}).setdefault(work.task, []).append((work, at))
        ahead: _Ahead | None = None
        try:
            for keys in self._batches(rows):
                launched = self._launch(keys, rows, wanted)
                before, ahead = ahead, launched
                self._take(before)
        finally:
            self._take(ahead)
        finished: list[Work] = []
        unfinished: list[Work] = []
        for work in works:
            (finished if self._advanced(work) else unfinished).append(work)
        return finished, unfinished

    def _batches(self, rows: Mapping[Any, Row]) -> list[list[Any]]:
        """Keys of rows that share a pass: fresh rows first, then those that go on."""
        known = {key: self._known(row) for key, row in rows.items()}
        found = []
        for keys in ([key for key in rows if not known[key]], [key for key in rows if known[key]]):
            lengths = [len(rows[key]) - known[key] for key in keys]
            batches = plan(lengths, budget=self.max_batch_tokens, cost=self.backend.cost)
            found += [[keys[i] for i in indexes] for indexes in batches]
        return found

    def _known(self, row: Row) -> int:
        """Tokens of a row that the backend need not compute."""
        return row.known if self.backend.keeps else 0

    def _advanced(self, work: Work) -> bool:
        """Take in the logits of a work; whether it is finished, be it with an error."""
        task = self.tasks[work.task]
        try:
            finished = task.kind.advance(work, task.options, self.text)
        except Exception as error:  # logits that are no numbers, say; it must harm no other work, and no step half done
            work.error, finished = error, True
        if finished:
            work.rows = []  # what the backend kept for it is free
        return finished

    def _launch(
        self, keys: list[Any], rows: Mapping[Any, Row], wanted: Mapping[Any, Mapping[str, list[tuple[Work, int]]]]
    ) -> _Ahead:
        """One trunk pass over distinct rows, begun."""
        by_task: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            for task in wanted[key]:
                by_task.setdefault(task, []).append(index)
        batch = Batch(tuple(rows[key] for key in keys), {task: tuple(i) for task, i in by_task.items()})
        takers = {task: [wanted[keys[index]][task] for index in indexes] for task, indexes in batch.wanted.items()}
        return _Ahead(self.backend.launch(batch), len(keys), takers)

    def _take(self, ahead: _Ahead | None) -> None:
        """Each work that wants a row gets its own task's logits of it."""
        if ahead is None:
            return
        logits = ahead.pending.result()
        for task, takers in ahead.takers.items():
            for each, array in zip(takers, logits[task], strict=True):
                for work, at in each:
                    work.logits[at] = array
                    work.passes.add(self.counters.trunk_passes)
        self.counters.rows += ahead.rows
        self.counters.tokens = self.backend.tokens
        self.counters.trunk_passes += 1

    def finish(self, work: Work) -> Any:
        """The prediction of a finished work. Raises what went wrong with it."""
        if work.error is not None:
            raise work.error
        task = self.tasks[work.task]
        return task.kind.decode(work, task.options, self.text)

    def release(self) -> None:
        """Free what is kept for works that nobody holds; for the thread that steps, when it has nothing to do."""
        self.backend.release()

    def emit(self, work: Work) -> list[Any]:
        """JSON-ready events of a work that is read along: what came since the last call."""
        task = self.tasks[work.task]
        return [] if work.error is not None else task.kind.emit(work, task.options, self.text)

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Predictions of works, in order, whatever number of steps they take; as many at once as there is room for."""
        waiting, running = deque(works), list[Work]()
        while waiting or running:
            while waiting and fits(waiting[0], running, most=self.max_past_tokens):
                running.append(waiting.popleft())
            _, running = self.step(running)
        self.release()
        return [self.finish(work) for work in works]

    def predict(self, task: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None) -> list[Any]:
        """Predictions of one task for items that may be strings, mappings or examples, in order.

        Raises UnknownTaskError, or InputError that names every bad item; nothing has run then.
        """
        return self.run(self.prepare_all(task, items, parameters))
