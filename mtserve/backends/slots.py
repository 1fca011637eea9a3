"""Which past has which slot of a backend's buffers, and which tokens stand there. Knows no tasks and no framework.

Buffers are rectangles (slots, capacity, …), one or more, that a `Store` keeps; this is the book about them. Invariants
(tests/test_pasts.py holds them, over both backends):

- a slot belongs to one `Past` and holds keys and values of a sequence's first tokens at [0, n), so positions are plain
  indexes, and rows of any lengths go on together without padding between them;
- a slot's record says which tokens stand in it, and a row uses those that agree with its own, one by one. So a cut, a
  fork, a pass that failed, or a past that another backend filled can cost time, and never change an answer;
- a pass writes behind the known tokens of its own rows and nowhere else, and the record is cut before and made longer
  after it;
- slots know their pasts by weak references: a past may be dropped at any time, in any thread, and nobody is told. Who
  is left is found when a pass begins (`admit`); then the n that live are moved to the slots [0, n), so that a pass
  over all of them reads views, where one over a few of them gathers;
- buffers have as many slots as pasts live, as long as the longest of them, both rounded up a little; and go when
  nothing lives. If resizing fails half-way, all is forgotten, and computed anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mtserve.rows import Bools, Ints, Past, Row

Indexes = npt.NDArray[np.intp]
_NOTHING: Ints = np.empty((2, 0), np.int32)
_MORE_SLOTS, _MORE_TOKENS = 8, 64  # buffers grow to multiples of these, so that growing costs a step little


class Store(Protocol):
    """Where keys and values are."""

    def clear(self) -> None:
        """Let all buffers go."""
        ...

    def resize(self, slots: int, capacity: int) -> None:
        """Make the buffers as large as that; what is inside both the old and the new ones stays."""
        ...

    def copy(self, source: Indexes, into: Indexes, capacity: int) -> None:
        """Copy single tokens, both by slot * capacity + position."""
        ...


@dataclass
class _Slot:
    """past: whose slot it is; tokens (2, n): ids and type ids of what stands in it."""

    past: weakref.ref[Past]
    tokens: Ints


@dataclass(frozen=True)
class Steps:
    """What a pass computes of some rows, and where that is kept. The rectangle of rows and seq is filled from the left.

    real       (rows, seq)   where a token is computed
    new        (rows, seq)   which of them are kept
    positions  (rows, seq)   of each in its row; behind the last the last one's
    slots      (rows,)       of each row; 0 of one without a past
    into       (kept,)       slot * capacity + position of those that are kept, row by row
    known      (rows,)       first tokens that are not computed
    length     the longest row
    """

    real: Bools
    new: Bools
    positions: Indexes
    slots: Indexes
    into: Indexes
    known: Indexes
    length: int

    @property
    def read(self) -> slice | Indexes:
        """The slots that rows going on read: a slice where they are neighbours in order."""
        first, some = int(self.slots[0]), self.slots
        return slice(first, first + len(some)) if np.array_equal(some, np.arange(first, first + len(some))) else some


class Slots:
    """The book of a store.

    admit(rows)         first: a slot for the past of every row
    known(row)          how many of its first tokens need not be computed
    begin(rows, known)  before a pass; `done(rows)` after it
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.shape = (0, 0)
        self._slots: list[_Slot] = []
        self._at: dict[int, int] = {}  # id of a past -> slot; good until somebody drops a past, so for one pass

    def slot(self, row: Row) -> int:
        return self._at[id(row.past)]

    def admit(self, rows: Sequence[Row]) -> None:
        """Free the slots of pasts that nobody holds, close the gaps, and give every past of `rows` a slot, filled from
        its origin where it is a fork."""
        held = {past: at for at, slot in enumerate(self._slots) if (past := slot.past()) is not None}
        pasts = [row.past for row in rows if row.past is not None]
        assert len(set(pasts)) == len(pasts), "rows of one pass have pasts of their own"
        if not held:
            self.store.clear()
            self.shape = (0, 0)
        total = len(held.keys() | set(pasts))
        placed = {past: at for past, at in held.items() if at < total}
        gaps = iter(sorted(set(range(total)) - set(placed.values())))
        records = {past: self._slots[at].tokens for past, at in held.items()}
        moves: list[tuple[int, int, int]] = []  # from slot, into slot, tokens
        for past in [*(past for past in held if past not in placed), *(past for past in pasts if past not in held)]:
            placed[past] = next(gaps)
            if (origin := _source(past, held)) is not None:
                records[past] = records[origin][:, : past.length]
                moves.append((held[origin], placed[past], records[past].shape[1]))
        self._slots = []
        longest = max([*map(len, rows), *(tokens.shape[1] for tokens in records.values())], default=0)
        if total > self.shape[0]:
            self._fit(total, longest)
        self._move(moves)  # from here on nothing that lives stands behind the slot `total`
        self._fit(total, longest)
        made = {at: _Slot(weakref.ref(past), records.get(past, _NOTHING)) for past, at in placed.items()}
        self._slots = [made[at] for at in range(total)]
        self._at = {id(past): at for past, at in placed.items()}
        for past in pasts:
            past.origin = None

    def _fit(self, slots: int, capacity: int) -> None:
        """Make the buffers as large as that, rounded up; what lives must have its place already."""
        shape = _up(slots, _MORE_SLOTS), _up(capacity, _MORE_TOKENS)
        if shape != self.shape:
            self.shape = shape
            self.store.resize(*shape)

    def _move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        if moves:
            sides = zip(*((_span(a, n, self.shape[1]), _span(b, n, self.shape[1])) for a, b, n in moves), strict=True)
            source, into = (np.concatenate(side) for side in sides)
            self.store.copy(source, into, self.shape[1])

    def known(self, row: Row) -> int:
        """First tokens of an admitted row that its slot holds and whose positions are not answered for."""
        tokens = self._slots[self.slot(row)].tokens
        most = min(row.known, tokens.shape[1])
        agree = (tokens[0, :most] == row.ids[:most]) & (tokens[1, :most] == row.type_ids[:most])
        return most if agree.all() else int(agree.argmin())

    def begin(self, rows: Sequence[Row], known: Sequence[int]) -> Steps:
        """Make ready for a pass that computes admitted `rows` but for their first `known` tokens. Rows without a past
        are not kept."""
        lengths, first = np.array([len(row) for row in rows]), np.array(known)
        slots = np.array([0 if row.past is None else self.slot(row) for row in rows])
        steps = first[:, None] + np.arange((lengths - first).max())  # (rows, seq)
        real = steps < lengths[:, None]
        new = real & np.array([row.past is not None for row in rows])[:, None]
        into = (slots[:, None] * self.shape[1] + steps)[new]
        for row, count in zip(rows, known, strict=True):
            if row.past is not None:
                slot = self._slots[self.slot(row)]
                slot.tokens = slot.tokens[:, :count]
        positions = np.minimum(steps, lengths[:, None] - 1)
        return Steps(real, new, positions, slots, into, first, int(lengths.max()))

    def done(self, rows: Sequence[Row]) -> None:
        """Record what stands in the slots of rows that were computed."""
        for row in rows:
            if row.past is not None:
                self._slots[self.slot(row)].tokens = np.stack([row.ids, row.type_ids])


def _source(past: Past | None, held: dict[Past, int]) -> Past | None:
    """The past itself if it has a slot, or else the nearest one that it was forked from and that has."""
    while past is not None and past not in held:
        past = past.origin
    return past


def _span(slot: int, tokens: int, capacity: int) -> Indexes:
    return np.arange(slot * capacity, slot * capacity + tokens)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
