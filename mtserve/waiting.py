"""Works that wait for a trunk, which of them start next, and how fast they drain. Pure; knows no threads and no clock.

Tasks share the engine by deficit round robin (Shreedhar and Varghese, 1995). In turn, each task may start works of as
many tokens as its credit has, which grows by QUANTUM times its weight a turn; what is left is kept for its next one.

Invariants (tests/test_waiting.py holds them):

1.  Works of a task start in the order in which they were put in. Those whose rows all stand in the same `take` already
    cost nothing, and start with it wherever they stood: equal rows of requests in flight are encoded once.
2.  A `take` has at least one work, if one may start, and no more tokens of distinct rows than its budget; a work that
    is larger than the budget is taken alone.
3.  While two tasks wait, the tokens that they were given since both began to, each divided by its weight, differ by
    less than QUANTUM plus both tasks' largest work, over its weight. So a flood on one task does not starve another,
    and a task without competition gets all there is.
4.  A work that finds no room for what a backend keeps of it holds back those behind it in turn that need some, and
    none that needs none: so large ones are not passed by for ever.
5.  `tokens` and `len` are those of the works that were put in and neither taken nor dropped.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mtserve.tasks.work import Work

QUANTUM = 512
"""Tokens that a turn is worth to a task of weight 1: a few short texts, or a part of a long one."""

Owner = TypeVar("Owner")


@dataclass(eq=False)
class _Entry(Generic[Owner]):
    """A work in its place. `work` is None once it has started or was dropped, so that a place holds nothing back."""

    work: Work | None
    owner: Owner
    number: int


@dataclass(eq=False)
class _Lane(Generic[Owner]):
    """The works of one task. `in_turn`: its turn began in an earlier `take`, and its credit has grown for it."""

    weight: float
    entries: deque[_Entry[Owner]] = field(default_factory=deque)
    credit: float = 0.0
    in_turn: bool = False

    def head(self) -> _Entry[Owner] | None:
        while self.entries and self.entries[0].work is None:
            self.entries.popleft()
        return self.entries[0] if self.entries else None


class Waiting(Generic[Owner]):
    """The queue of one trunk. `weights` are the tasks' shares, 1 where none is given; all are positive."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.tokens = 0
        self._weights = weights or {}
        self._lanes: OrderedDict[str, _Lane[Owner]] = OrderedDict()  # of tasks that wait, whose turn is next first
        self._of: dict[Owner, dict[_Entry[Owner], None]] = {}
        self._alike: dict[Any, dict[_Entry[Owner], None]] = {}  # by the key of a row, those that keep nothing
        self._number = self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, work: Work, owner: Owner) -> None:
        """Put a work behind those of its task."""
        if work.task not in self._lanes:
            self._lanes[work.task] = _Lane(self._weights.get(work.task, 1.0))
        entry = _Entry(work, owner, self._number)
        self._lanes[work.task].entries.append(entry)
        self._of.setdefault(owner, {})[entry] = None
        for key in _keys(work):
            self._alike.setdefault(key, {})[entry] = None
        self._number += 1
        self._size += 1
        self.tokens += work.tokens

    def drop(self, owner: Owner) -> list[Work]:
        """Forget all works of an owner; which they were."""
        entries = list(self._of.get(owner, ()))
        return [self._out(entry) for entry in entries]

    def oldest(self) -> Owner | None:
        """Whose work has waited longest."""
        heads = [head for lane in self._lanes.values() if (head := lane.head()) is not None]
        return min(heads, key=lambda entry: entry.number).owner if heads else None

    def take(self, budget: int, has_room: Callable[[Work, Sequence[Work]], bool]) -> list[tuple[Work, Owner]]:
        """Works that start together. `has_room(work, taken)`: whether there is room for one beside those taken."""
        taken: list[tuple[Work, Owner]] = []
        seen: set[Any] = set()
        held: set[str] = set()  # tasks whose next work waits for room
        left = budget
        while (name := next((name for name in self._lanes if name not in held), None)) is not None:
            lane = self._lanes[name]
            if (entry := lane.head()) is None:
                del self._lanes[name]  # with its credit: whoever did not wait has nothing to make up for
                continue
            work = entry.work
            assert work is not None
            if work.reserved and (held or not has_room(work, [work for work, _ in taken])):
                held.add(name)
                continue
            cost = sum({row.key: row.pending for row in work.rows if row.key not in seen}.values())
            if not lane.in_turn:
                lane.credit, lane.in_turn = lane.credit + QUANTUM * lane.weight, True
            if cost > lane.credit:
                lane.in_turn = False
                self._lanes.move_to_end(name)
                continue
            if taken and cost > left:
                break
            lane.credit -= cost
            left -= cost
            taken.append((self._out(entry), entry.owner))
            new = {row.key for row in work.rows} - seen
            seen |= new
            taken += self._joined(new, seen)
        return taken

    def _joined(self, new: set[Any], seen: set[Any]) -> list[tuple[Work, Owner]]:
        """Works of no other rows than those seen, which became so by the new ones."""
        candidates = {entry: None for key in new for entry in self._alike.get(key, ())}
        alike = [entry for entry in candidates if entry.work is not None and seen.issuperset(_keys(entry.work))]
        return [(self._out(entry), entry.owner) for entry in sorted(alike, key=lambda entry: entry.number)]

    def _out(self, entry: _Entry[Owner]) -> Work:
        """Take an entry out of all that leads to it, but for its place, which is found empty later."""
        work, entry.work = entry.work, None
        assert work is not None
        _discard(self._of, entry.owner, entry)
        for key in _keys(work):
            _discard(self._alike, key, entry)
        self._size -= 1
        self.tokens -= work.tokens
        return work


class Rate:
    """How many waiting tokens the engine works off a second, of late: weights fall by 1/e in ten seconds of work."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        kept = math.exp(-seconds / 10)
        self._tokens, self._seconds = self._tokens * kept + tokens, self._seconds * kept + seconds

    def seconds(self, tokens: int) -> int:
        """Whole seconds that so many tokens will take, from 1 to 60; 1 where nothing was measured."""
        return 1 if not self._tokens else min(60, max(1, math.ceil(tokens * self._seconds / self._tokens)))


def _keys(work: Work) -> set[Any]:
    """Keys of the rows by which a work may join others; none for one of which something is kept."""
    return set() if work.reserved else {row.key for row in work.rows}


def _discard(index: dict[Any, dict[_Entry[Owner], None]], key: Any, entry: _Entry[Owner]) -> None:
    found = index[key]
    del found[entry]
    if not found:
        del index[key]
