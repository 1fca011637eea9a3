"""Keys and values of sequences that go on, kept in slots. Knows no tasks, no heads and no trunk.

Invariants (tests/test_pasts.py holds them):

- a slot belongs to one `Past` and holds keys and values of a sequence's first tokens at [0, n), so positions are plain
  indexes, and rows of any lengths go on together without padding between them;
- a slot's record says which tokens stand in it, and a row uses those that agree with its own, one by one. So a cut, a
  fork, a pass that failed, or a past that another backend filled can cost time, and never change an answer;
- a pass writes behind the known tokens of its own rows and nowhere else, and the record is cut before and made longer
  after it;
- slots know their pasts by weak references: a past may be dropped at any time, in any thread, and nobody is told. Who
  is left is found when a pass begins (`admit`); then the n that live are moved to the slots [0, n), so that a pass
  over all of them reads views, where one over a few of them gathers;
- buffers are rectangles: as many slots as pasts live, as long as the longest of them, both rounded up a little; and go
  when nothing lives. If resizing fails half-way, all is forgotten, and computed anew.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from mtserve.backends.staging import moved, sent
from mtserve.rows import Ints, Past, Row

_NOTHING: Ints = np.empty((2, 0), np.int32)
_MORE_SLOTS, _MORE_TOKENS = 8, 64  # buffers grow to multiples of these, so that growing costs a step little


@dataclass
class _Slot:
    """past: whose slot it is; tokens (2, n): ids and type ids of what stands in it."""

    past: weakref.ref[Past]
    tokens: Ints


@dataclass(frozen=True)
class _Plan:
    """What one pass does in every layer.

    new     which of the pass's tokens, in their order, are kept; None: all
    into    where they go: slot * capacity + position
    slots   whose keys and values are read; None: only those of the pass itself
    length  how many of them are read
    """

    new: Tensor | None
    into: Tensor
    slots: slice | Tensor | None
    length: int


@dataclass(frozen=True)
class Seen:
    """What rows that go on see.

    positions   (rows, seq) of the new tokens
    mask        (rows, 1, seq, kv), added to the scores
    place       of each new token in the rectangle of rows and seq; None where it is full
    """

    positions: Tensor
    mask: Tensor
    place: Tensor | None


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed
    """keys, values: (slots, capacity, heads, head_dim), so that a token's are in one place and copied in one go."""

    def __init__(self, pasts: Pasts) -> None:
        super().__init__()
        self.pasts = pasts

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.pasts.shape
        self.keys, self.values = (
            new.new_zeros(*shape, new.shape[1], new.shape[3]) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in what a pass computed, (rows, heads, seq, head_dim), and give what its queries see: kv for seq."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, kept: Tensor, new: Tensor) -> Tensor:
        plan = self.pasts.plan
        flat = new.transpose(1, 2).flatten(0, 1)  # (rows * seq, heads, head_dim)
        kept.flatten(0, 1).index_copy_(0, plan.into, flat if plan.new is None else flat[plan.new])
        return new if plan.slots is None else kept[plan.slots, : plan.length].transpose(1, 2)

    def resize(self, slots: int, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(slots, capacity, *old.shape[2:])
            both = slice(min(slots, old.shape[0])), slice(min(capacity, old.shape[1]))
            new[both] = old[both]
            setattr(self, name, new)

    def copy(self, source: Tensor, into: Tensor) -> None:
        for kept in (self.keys.flatten(0, 1), self.values.flatten(0, 1)):
            kept.index_copy_(0, into, kept.index_select(0, source))

    def get_seq_length(self) -> int:
        return 0  # positions and masks of rows that go on are given to the trunk, so families need not count

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class Pasts(Cache):  # type: ignore[misc]  # transformers is not followed
    """All pasts of a backend, as the cache that Transformers' trunks write into and read from.

    admit(rows)         first: a slot for the past of every row
    known(row)          how many of its first tokens need not be computed
    begin(rows, known)  before a trunk pass; `done(rows)` after it
    """

    plan: _Plan

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=partial(_Layer, self))
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
            self.layers.clear()
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
            for layer in self.layers:
                layer.resize(*shape)

    def _move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        if moves and self.layers:
            sides = zip(*((_span(a, n, self.shape[1]), _span(b, n, self.shape[1])) for a, b, n in moves), strict=True)
            source, into = (moved(np.concatenate(side), self.layers[0].keys.device) for side in sides)
            for layer in self.layers:
                layer.copy(source, into)

    def known(self, row: Row) -> int:
        """First tokens of an admitted row that its slot holds and whose positions are not answered for."""
        tokens = self._slots[self.slot(row)].tokens
        most = min(row.known, tokens.shape[1])
        agree = (tokens[0, :most] == row.ids[:most]) & (tokens[1, :most] == row.type_ids[:most])
        return most if agree.all() else int(agree.argmin())

    def begin(self, rows: Sequence[Row], known: Sequence[int], like: Tensor, *, flat: bool) -> Seen | None:
        """Make ready for a pass that computes `rows` but for their first `known` tokens, which lie end to end (`flat`)
        or padded at the right. Rows without a past are not kept. What rows that go on see, in the precision and on the
        device of `like`; None if no row knows a token.
        """
        lengths, first = np.array([len(row) for row in rows]), np.array(known)
        slots = np.array([0 if row.past is None else self.slot(row) for row in rows])
        steps = first[:, None] + np.arange((lengths - first).max())  # (rows, seq)
        real = steps < lengths[:, None]
        new = real & np.array([row.past is not None for row in rows])[:, None]
        into = moved((slots[:, None] * self.shape[1] + steps)[new], like.device)
        kept = new[real] if flat else new.ravel()
        which = None if kept.all() else moved(np.flatnonzero(kept), like.device)
        for row, count in zip(rows, known, strict=True):
            if row.past is not None:
                slot = self._slots[self.slot(row)]
                slot.tokens = slot.tokens[:, :count]
        if not first.any():
            self.plan = _Plan(which, into, None, 0)
            return None
        in_order = np.array_equal(slots, np.arange(slots[0], slots[0] + len(slots)))
        read = slice(slots[0], slots[-1] + 1) if in_order else moved(slots, like.device)
        self.plan = _Plan(which, into, read, int(lengths.max()))
        positions = np.minimum(steps, lengths[:, None] - 1)
        seen = np.arange(lengths.max()) <= positions[:, :, None]  # (rows, seq, kv)
        added = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-math.inf))[:, None])
        place = None if real.all() else moved(np.flatnonzero(real), like.device)
        return Seen(moved(positions, like.device), sent(added.to(like.dtype), like.device), place)

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


def _span(slot: int, tokens: int, capacity: int) -> np.ndarray[Any, Any]:
    return np.arange(slot * capacity, slot * capacity + tokens)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def reach(config: PretrainedConfig) -> float:
    """Longest row for which the keys and values of a longer row's beginning are those of the beginning alone, and each
    position sees all before it: the shortest of a family's windows, and where its rotary angles begin to change."""
    rope = getattr(config, "rope_parameters", None) or {}
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    if rope.get("rope_type") in ("dynamic", "longrope"):
        windows.append(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min((size for size in windows if size), default=math.inf)
