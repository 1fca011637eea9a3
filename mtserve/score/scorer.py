"""Windows of rows to answers: several tasks in one pass, whatever is wrong with single rows. Knows no files."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtserve.chains import AnyChain
from mtserve.engine import Engine, Task
from mtserve.errors import InputError, Problem
from mtserve.observer import Observer, Ran
from mtserve.offline import Each, Followed
from mtserve.score.columns import Columns
from mtserve.score.cutting import Window
from mtserve.score.records import Record
from mtserve.tasks.base import AnyKind, Options
from mtserve.tasks.validation import validate
from mtserve.tasks.work import Work

Counts = dict[str, float]
_UNKNOWN = (InputError, ValueError, LookupError)
COUNTS = ("rows", "errors", "truncated", "joined", "tokens", "padded", "passes", "compute_s", "labelled")


@dataclass(frozen=True)
class Asked:
    """A task that rows are to be answered for, or a chain, whose first one it is; `labelled` rows are measured too."""

    task: Task
    columns: Columns
    parameters: Mapping[str, Any] = field(default_factory=dict)
    labelled: bool = False
    chain: AnyChain | None = None

    @property
    def name(self) -> str:
        return self.task.name if self.chain is None else self.chain.name


class Ledger(Observer):
    """Sums of what an engine ran, by the thread that computes."""

    def __init__(self) -> None:
        self.sums: Counts = dict.fromkeys(("joined", "tokens", "padded", "passes"), 0)

    def ran(self, batch: Ran) -> None:
        for name, more in (("joined", batch.joined), ("tokens", batch.tokens), ("padded", batch.padded), ("passes", 1)):
            self.sums[name] += more


@dataclass
class Computing:
    """A window on its way.

    items   for each task, for each row, what an example is made of
    each    for each task, for each row, its work or what is wrong with it; of a chain `Offline.computed` has more
    """

    window: Window
    items: Mapping[str, Sequence[dict[str, Any] | InputError]]
    each: Each
    counts: Counts = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))


@dataclass(frozen=True)
class Answered:
    """A window's answers: for each row a prediction by task, or an exception."""

    window: Window
    answers: Sequence[Mapping[str, Any]]
    counts: Counts
    outcomes: Mapping[str, Sequence[Any]]

    @property
    def records(self) -> Sequence[Record]:
        return self.window.records


class Scorer:
    """The tasks of an engine that rows are answered for; `prepare`, `compute` and `answer` may run in three threads."""

    def __init__(self, engine: Engine, asked: Sequence[Asked]) -> None:
        self.engine, self.asked = engine, asked
        self.ledger = Ledger()
        engine.observer = self.ledger
        self._groups: dict[Any, list[Asked]] = {}
        for one in asked:  # tasks that read the same fields from the same columns share their items
            fields = tuple(one.columns.kind.example.model_fields)
            self._groups.setdefault((fields, tuple(sorted(one.columns.given.items()))), []).append(one)

    def prepare(self, window: Window) -> Computing:
        found = Computing(window, {}, {})
        items: dict[str, list[dict[str, Any] | InputError]] = {}
        for group, made in self._items(window):
            good = [at for at, item in enumerate(made) if not isinstance(item, InputError)]
            each = self.engine.prepare_each({one.name: one.parameters for one in group}, [made[at] for at in good])
            for task, works in each.items():
                ready = iter(works)
                found.each[task] = [item if isinstance(item, InputError) else next(ready) for item in made]
                items[task] = made
        found.items = items
        found.counts["truncated"] = _cut(work for of in found.each.values() for work in of)
        return found

    def _items(self, window: Window) -> list[tuple[list[Asked], list[dict[str, Any] | InputError]]]:
        """What examples are made of, with the tasks that all have these: their texts are encoded once."""
        found: list[tuple[list[Asked], list[dict[str, Any] | InputError]]] = []
        for group in self._groups.values():
            made = [_item(group[0].columns, record) for record in window.records]
            same = next((one for one, other in found if other == made), None)
            if same is None:
                found.append(([*group], made))
            else:
                same += group
        return found

    def compute(self, window: Computing) -> Computing:
        before, began = dict(self.ledger.sums), time.perf_counter()
        window.each = self.engine.computed(window.each, {one.name: one.parameters for one in self.asked})
        window.counts |= {name: value - before[name] for name, value in self.ledger.sums.items()}
        followed = (one for of in window.each.values() for one in of if isinstance(one, Followed))
        window.counts["truncated"] += _cut(work for one in followed for work in one.works)
        window.counts["compute_s"] = time.perf_counter() - began
        return window

    def answer(self, window: Computing) -> Answered:
        answers: list[dict[str, Any]] = [
            {task: self.engine.answered(of[at], errors=True) for task, of in window.each.items()}
            for at in range(len(window.window.records))
        ]
        failed = sum(any(isinstance(one, Exception) for one in row.values()) for row in answers)
        window.counts |= {"rows": len(answers), "errors": failed}
        outcomes = {one.name: self._outcomes(one, window, answers) for one in self.asked if one.labelled}
        window.counts["labelled"] = sum(len(of[0]) for of in outcomes.values() if of)
        return Answered(window.window, answers, window.counts, outcomes)

    def _outcomes(self, asked: Asked, window: Computing, answers: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """Of the rows that have a prediction and a truth that the task knows."""
        options, kind = asked.task.options, asked.task.kind
        pairs: list[tuple[Any, Any]] = []
        for record, item, row in zip(window.window.records, window.items[asked.name], answers, strict=True):
            if isinstance(item, InputError) or isinstance(row[asked.name], Exception):
                continue
            try:
                pairs.append((row[asked.name], validate(kind.labelled, asked.columns.labelled(item, record.cells))))
            except InputError:
                continue
        try:
            return _dense(kind, pairs, options)
        except _UNKNOWN:  # a truth that the task does not know: without the rows that have one
            known = [pair for pair in pairs if _is_known(kind, pair, options)]
            return _dense(kind, known, options)


def _cut(works: Iterable[Any]) -> int:
    """How many of them have text that no row holds."""
    return sum(isinstance(work, Work) and work.cut > 0 for work in works)


def pack(outcomes: Mapping[str, Sequence[Any]]) -> bytes:
    """Outcomes by task as a file of arrays."""
    file = io.BytesIO()
    np.savez(file, **{f"{task}/{at}": one for task, of in outcomes.items() for at, one in enumerate(of)})
    return file.getvalue()


def unpack(content: bytes) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for name in arrays.files:
            found.setdefault(name.rpartition("/")[0], []).append(arrays[name])
    return found


def together(outcomes: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, tuple[Any, ...]]:
    """Outcomes by task of several windows or parts, as of one."""
    names = dict.fromkeys(task for one in outcomes for task, of in one.items() if of)
    found = {name: [one[name] for one in outcomes if one.get(name)] for name in names}
    return {name: tuple(np.concatenate(arrays) for arrays in zip(*of, strict=True)) for name, of in found.items()}


def _item(columns: Columns, record: Record) -> dict[str, Any] | InputError:
    if record.problem is not None:
        return InputError(Problem(record.problem))
    try:
        return columns.item(record.cells)
    except InputError as error:
        return error


def _dense(kind: AnyKind, pairs: Sequence[tuple[Any, Any]], options: Options) -> Sequence[Any]:
    if not pairs:
        return []
    outcomes = kind.outcomes([given for given, _ in pairs], [true for _, true in pairs], options)
    return [one.toarray() if hasattr(one, "toarray") else np.asarray(one) for one in outcomes]


def _is_known(kind: AnyKind, pair: tuple[Any, Any], options: Options) -> bool:
    try:
        _dense(kind, [pair], options)
    except _UNKNOWN:
        return False
    return True
