"""Rows to parts, which are committed, and windows, which are computed at once. Pure.

Invariants (tests/score/test_cutting.py holds them): every row is in one part, in order; where parts and windows end
depends on the rows before alone, so that a run that goes on cuts as one that was never broken off, and computes the
same batches; a part is of one file; a file without rows has one part without rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mtserve.score.records import Record
from mtserve.tasks.validation import strings


@dataclass(frozen=True)
class Limits:
    """Most rows and most characters of a part and of a window; a single row may have more characters."""

    part_rows: int = 8192
    part_chars: int = 2**25
    window_rows: int = 2048
    window_chars: int = 2**22


@dataclass(frozen=True)
class Window:
    """Rows that are computed at once; `last` of their part, which may be the last of its file."""

    shard: int
    part: int
    records: Sequence[Record]
    last: bool
    last_of_file: bool


@dataclass(frozen=True)
class Part:
    """Rows that are committed at once; `last` of their file."""

    shard: int
    number: int
    start: int
    records: Sequence[Record]
    last: bool

    def windows(self, limits: Limits) -> Iterator[Window]:
        pieces = [*_pieces(self.records, limits.window_rows, limits.window_chars)] or [[]]
        for at, piece in enumerate(pieces, 1):
            yield Window(self.shard, self.number, piece, at == len(pieces), self.last)


def parts(records: Iterable[Record], shard: int, limits: Limits, *, number: int = 0, start: int = 0) -> Iterator[Part]:
    """A file's rows from `start` on, where part `number` begins."""
    held: list[Record] | None = None
    for piece in _pieces(records, limits.part_rows, limits.part_chars):
        if held is not None:
            yield Part(shard, number, start, held, last=False)
            number, start = number + 1, start + len(held)
        held = piece
    yield Part(shard, number, start, held or [], last=True)


def _pieces(records: Iterable[Record], rows: int, chars: int) -> Iterator[list[Record]]:
    piece: list[Record] = []
    size = 0
    for record in records:
        length = sum(map(len, strings(record.cells)))
        if piece and (len(piece) == rows or size + length > chars):
            yield piece
            piece, size = [], 0
        piece.append(record)
        size += length
    if piece:
        yield piece
