"""The row: one trunk sequence, everything that the trunk sees of it and what decoding needs. Knows no tokenizer.

Invariants: all arrays of a row have its length; `ids` and `type_ids` are int32 and never change after the row is
made; positions count from 0 (a backend adds its family's offset), so they follow from the length and are not stored.

A row may go on from a past: what a backend keeps of its first tokens, so that only the others are computed. A past says
nothing about the answer, only about the cost: a backend that keeps nothing computes the whole row, and a row whose past
is gone is computed anew. Invariants of a past:

- the backend holds keys and values of exactly the first `length` tokens of the row that goes on from it; those tokens
  never change, but the past may be cut (a smaller `length`), after which what stood behind is overwritten;
- only a backend makes `length` larger, once a pass has succeeded, and then it is the length of the row;
- rows of one pass have pasts of their own; a past that is to be two is forked, and a fork holds its origin until the
  backend has copied it;
- a past lives as long as somebody holds it: whoever drops a work frees what was kept for it, and nobody else need know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
AnyInts = npt.NDArray[np.signedinteger[Any]]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(eq=False)
class Past:
    """What a backend keeps of a sequence: its first `length` tokens. `origin` is where a fork is to be copied from."""

    length: int = 0
    origin: Past | None = None

    def fork(self) -> Past:
        """Another past with the same tokens."""
        return Past(self.length, self)

    def cut(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.length = min(self.length, length)


@dataclass(frozen=True, eq=False)
class Row:
    """One trunk sequence of an example.

    ids         (seq,)     token ids, special tokens included
    type_ids    (seq,)     segment ids
    offsets     (seq, 2)   characters [start, end) of each token in its own text; (0, 0) at special tokens
    special     (seq,)     True at tokens that the template added
    cut         tokens of the caller's text that are in no row of the example
    part        which of the example's sequences this is: a choice, or one text of a pair encoded apart
    window      which window of that sequence, from 0
    first       position of the row's first own token in the uncut token sequence (windows overlap)
    second      where the second text of a pair begins; 0 where there is none
    shared      how many of its first tokens all rows of the example have (one question, several choices)
    past        what a backend keeps of it between steps; None for rows of one pass
    answers     for how many of its last positions a head that reads the last one answers
    """

    ids: Ints
    type_ids: Ints
    offsets: Ints
    special: Bools
    cut: int = 0
    part: int = 0
    window: int = 0
    first: int = 0
    second: int = 0
    shared: int = 0
    past: Past | None = None
    answers: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def key(self) -> tuple[bytes, bytes, int]:
        """Equal for two rows just when the trunk sees the same: ids and type ids (positions follow from them). A row
        with a past is equal to itself alone, since what a backend keeps is kept for one."""
        return self.ids.tobytes(), self.type_ids.tobytes(), 0 if self.past is None else id(self.past)

    @property
    def known(self) -> int:
        """First tokens that need not be computed: those of the past, but for the positions that are answered for."""
        return 0 if self.past is None else max(0, min(self.past.length, len(self) - self.answers))

    @property
    def pending(self) -> int:
        """Tokens that the next pass computes, by a backend that keeps pasts."""
        return len(self) - self.known

    @property
    def own_tokens(self) -> int:
        """Tokens of the caller's text in this row."""
        return int(len(self.special) - self.special.sum())

    def first_tokens(self, length: int) -> Row:
        """This row without what stands behind its first `length` tokens."""
        if length == len(self):
            return self
        kept = slice(length)
        arrays = {name: getattr(self, name)[kept] for name in ("ids", "type_ids", "offsets", "special")}
        return replace(self, **arrays, answers=1)

    def begun(self, length: int, past: Past | None) -> Row:
        """Its first tokens as a row that shares nothing, with a past of its own."""
        return replace(self.first_tokens(length), past=past, shared=0)

    def extended(self, tokens: Sequence[int], *, past: Past | None = None, answers: int = 1) -> Row:
        """This row with more tokens of text at its end, of the type of its last one: how a generation goes on."""
        more = len(tokens)
        return Row(
            ids=np.concatenate([self.ids, np.asarray(tokens, np.int32)]),
            type_ids=np.concatenate([self.type_ids, np.repeat(self.type_ids[-1:], more)]),
            offsets=np.concatenate([self.offsets, np.zeros((more, 2), np.int32)]),
            special=np.concatenate([self.special, np.zeros(more, np.bool_)]),
            cut=self.cut,
            part=self.part,
            past=past,
            answers=answers,
        )


def texts_of(rows: Sequence[Row]) -> Ints:
    """(rows, seq): to which text of a pair each token belongs, 1 or 2, and 0 for special tokens and padding."""
    found = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for at, row in enumerate(rows):
        behind = np.arange(len(row)) >= (row.second or len(row))
        found[at, : len(row)] = np.where(row.special, 0, 1 + behind)
    return found


def spans(starts: AnyInts, counts: AnyInts) -> AnyInts:
    """start, start + 1, … of each, one after another: (sum of counts,)."""
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(np.repeat(starts, counts) + np.arange(counts.sum()) - before, starts.dtype)


def make_row(ids: Any, type_ids: Any, offsets: Any, special: Any) -> Row:
    """A row from sequences of any kind, as int32 and bool arrays."""
    return Row(
        ids=np.asarray(ids, np.int32),
        type_ids=np.asarray(type_ids, np.int32),
        offsets=np.asarray(offsets, np.int32).reshape(-1, 2),
        special=np.asarray(special, np.bool_),
    )
