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

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from mtserve.backends.base import Backend, Pending
from mtserve.batching import Batch, plan
from mtserve.chains import AnyChain
from mtserve.errors import ConfigError, InputError, NotFiniteError, Problem, UnknownTaskError
from mtserve.observer import Observer, Ran
from mtserve.offline import Offline, parsed_items
from mtserve.rows import Row
from mtserve.tasks.base import AnyKind, Example, Options
from mtserve.tasks.validation import validate
from mtserve.tasks.work import Work, key_of, room
from mtserve.text import Text

T = TypeVar("T")
DEFAULT_BUDGET = 4096
DEFAULT_PAST = 32_768


@dataclass(frozen=True)
class Task:
    """A task as the engine knows it. One that came to a running server has a `version`, so that it and the one whose
    place it took have keys of their own while requests of both are under way."""

    name: str
    kind: AnyKind
    options: Options
    metrics: Mapping[str, float] = field(default_factory=dict)
    version: str = ""

    @property
    def key(self) -> str:
        return key_of(self.name, self.version)


@dataclass
class Counters:
    """What an engine has run so far, after equal rows were joined."""

    tokens: int = 0
    rows: int = 0
    trunk_passes: int = 0


@dataclass(frozen=True)
class _Ahead:
    """A batch under way.

    padded   tokens that it costs, padding included
    takers   for each task's key and each row that it wants, the works that want it, and as which of their rows
    """

    pending: Pending
    rows: int
    padded: int
    takers: Mapping[str, Sequence[Sequence[tuple[Work, int]]]]


class Engine(Offline):
    """All tasks of one trunk, by key, and chains. Raises ConfigError for options that do not go with the tokenizer."""

    def __init__(
        self,
        tasks: Iterable[Task],
        backend: Backend,
        text: Text,
        *,
        chains: Iterable[AnyChain] = (),
        max_batch_tokens: int = DEFAULT_BUDGET,
        max_past_tokens: int = DEFAULT_PAST,
        observer: Observer | None = None,
    ) -> None:
        self.observer = observer or Observer()
        self.tasks: Mapping[str, Task] = {}  # never changed, but put in another's place, since all threads read it
        self.chains = {chain.name: chain for chain in chains}
        self.backend = backend
        self.text = text
        self.max_batch_tokens, self.max_past_tokens = max_batch_tokens, max_past_tokens
        for task in tasks:
            self.add(task)
        self.counters = Counters()  # only `step` writes it

    def add(self, task: Task) -> None:
        """Know a task whose head the backend has. Raises ConfigError where its options do not go with the tokenizer."""
        try:
            task.kind.check_text(task.options, self.text)
        except ConfigError as error:
            raise ConfigError(f"task {task.name!r}: {error}") from error
        self.tasks = {**self.tasks, task.key: task}

    def remove(self, key: str) -> None:
        """Forget a task of which no work is left."""
        self.tasks = {known: task for known, task in self.tasks.items() if known != key}

    @property
    def apart(self) -> bool:
        return self.backend.hardware.device != "cpu"

    def task(self, key: str) -> Task:
        """Raises UnknownTaskError."""
        if (found := self.tasks.get(key)) is None:
            raise UnknownTaskError(key, self.tasks, chains=self.chains)
        return found

    def prepare(
        self, key: str, example: Example, parameters: Mapping[str, Any] | None = None, *, stream: bool = False
    ) -> Work:
        """A validated example as work; `stream` for one whose answer is read along.

        Raises InputError for a wrong parameter or a text that the task refuses.
        """
        return self._prepare(self.task(key), example, parameters, self.text, stream=stream)

    def _prepare(
        self, task: Task, example: Example, parameters: Mapping[str, Any] | None, text: Text, *, stream: bool
    ) -> Work:
        chosen = validate(task.kind.parameters, parameters or {}, prefix="parameters.")
        task.kind.check(example, task.options, chosen)
        if stream:
            task.kind.check_stream(task.options, chosen)
        rows = task.kind.rows(example, task.options, text)
        work = Work(task.name, example, chosen, rows, streamed=stream, head=task.key)
        task.kind.begin(work, task.options, text)
        if room([work]) > self.max_past_tokens:
            found = f"the prompt and its answers may take {room([work])} tokens at once"
            raise InputError(f"{found}; allowed: {self.max_past_tokens} (shorter or fewer answers need less)")
        return work

    def prepare_all(
        self, name: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None, *, stream: bool = False
    ) -> list[Work]:
        """Raw items (strings, mappings, examples) as works of one task. Raises as `prepare_tasks`."""
        return self.prepare_tasks({name: parameters}, items, stream=stream)[name]

    def prepare_tasks(
        self, asked: Mapping[str, Mapping[str, Any] | None], items: Sequence[Any], *, stream: bool = False
    ) -> dict[str, list[Work]]:
        """The same raw items as works of each task asked for, of a chain of its first step; texts are tokenised once.

        Raises UnknownTaskError, or one InputError that names every bad item, and the task where there are several.
        """
        began = time.perf_counter()
        tasks = {name: (self.task(key), of) for name, (key, of) in self.first_steps(asked, stream=stream).items()}
        text = self.text.ahead()
        parsed: dict[AnyKind, tuple[dict[int, Example], list[Problem]]] = {}
        works: dict[str, list[Work]] = {}
        problems: list[Problem] = []
        for name, (task, parameters) in tasks.items():
            if task.kind not in parsed:
                parsed[task.kind] = parsed_items(task.kind, items)
            examples, found = parsed[task.kind]
            texts = (text for example in examples.values() for text in task.kind.texts(example))
            text = text.ahead(texts, task.options.preparation)
            works[name], more = self._works(task, examples, parameters, text, stream=stream)
            said = sorted([*found, *more], key=lambda problem: problem.index or 0)
            told = f"task {task.name!r}: "
            problems += said if len(tasks) == 1 else [replace(p, message=told + p.message) for p in said]
        if problems:
            raise InputError(problems)
        for (task, _), made in zip(tasks.values(), works.values(), strict=True):
            self.observer.truncated(task.name, inputs=sum(work.cut > 0 for work in made))
        self.observer.prepared(tuple(task.name for task, _ in tasks.values()), seconds=time.perf_counter() - began)
        return works

    def _works(
        self,
        task: Task,
        examples: Mapping[int, Example],
        parameters: Mapping[str, Any] | None,
        text: Text,
        *,
        stream: bool,
    ) -> tuple[list[Work], list[Problem]]:
        """Works of the examples by their indexes, and what is wrong with some of them."""
        try:
            validate(task.kind.parameters, parameters or {}, prefix="parameters.")
        except InputError as error:
            return [], list(error.problems)
        works: list[Work] = []
        problems: list[Problem] = []
        for index, example in examples.items():
            try:
                works.append(self._prepare(task, example, parameters, text, stream=stream))
            except InputError as error:
                problems += error.at(index).problems
        return works, problems

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
                wanted.setdefault(row.key, {}).setdefault(work.head, []).append((work, at))
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
        task = self.tasks[work.head]
        try:
            if work.error is not None:
                raise work.error
            finished = task.kind.advance(work, task.options, self.text)
        except Exception as error:  # it must harm no other work, and no step half done
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
        private = {at for at, key in enumerate(keys) if all(w.private for of in wanted[key].values() for w, _ in of)}
        wants = {task: tuple(indexes) for task, indexes in by_task.items()}
        batch = Batch(tuple(rows[key] for key in keys), wants, frozenset(private))
        takers = {task: [wanted[keys[index]][task] for index in indexes] for task, indexes in batch.wanted.items()}
        lengths = [len(row) - self._known(row) for row in batch.rows]
        padded = self.backend.cost(len(lengths), max(lengths), sum(lengths))
        return _Ahead(self.backend.launch(batch), len(keys), padded, takers)

    def _take(self, ahead: _Ahead | None) -> None:
        """Each work that wants a row gets its own task's logits of it."""
        if ahead is None:
            return
        logits = ahead.pending.result()
        wanted, passed = 0, ahead.pending.times.reused < ahead.rows
        for key, takers in ahead.takers.items():
            for each, array in zip(takers, logits[key], strict=True):
                finite = bool(np.isfinite(array).all())
                wanted += len(each)
                for work, at in each:
                    work.logits[at] = array
                    if passed:
                        work.passes.add(self.counters.trunk_passes)
                    if not finite:
                        work.error = NotFiniteError(work.task)
        tokens = self.backend.tokens - self.counters.tokens
        self.counters.rows += ahead.rows
        self.counters.tokens = self.backend.tokens
        self.counters.trunk_passes += passed
        times, joined = ahead.pending.times, wanted - ahead.rows
        names = tuple(self.tasks[key].name for key in ahead.takers)
        how = times.trunk_s, times.head_s, times.reused, self.backend.kept_bytes
        self.observer.ran(Ran(ahead.rows, joined, tokens, ahead.padded, names, *how))

    def finish(self, work: Work) -> Any:
        """The prediction of a finished work. Raises what went wrong with it."""
        if work.error is not None:
            raise work.error
        task = self.tasks[work.head]
        return task.kind.decode(work, task.options, self.text)

    def call(self, call: Callable[[], T]) -> T:
        """What a call gives, which is to run in the thread that steps; see `mtserve.stepper`."""
        return call()

    def release(self) -> None:
        """Free what is kept for works that nobody holds; for the thread that steps, when it has nothing to do."""
        self.backend.release()

    def emit(self, work: Work) -> list[Any]:
        """JSON-ready events of a work that is read along: what came since the last call."""
        task = self.tasks[work.head]
        return [] if work.error is not None else task.kind.emit(work, task.options, self.text)
