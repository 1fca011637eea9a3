"""Rows to batches under a token budget. Pure: knows no task, no tokenizer, no tensor library.

Invariants (tests/test_batching.py holds them): every index is in exactly one batch; no batch costs more than the
budget unless it is a single row; the same lengths and budget give the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtserve.rows import Row

Cost = Callable[[int, int, int], int]
"""Cost in tokens of a batch, from (rows, longest row, sum of the row lengths)."""


def padded_cost(rows: int, longest: int, total: int) -> int:
    """What a backend pays that pads every row to the longest."""
    return rows * longest


def real_cost(rows: int, longest: int, total: int) -> int:
    """What a backend pays that computes real tokens only."""
    return total


def plan(lengths: Sequence[int], *, budget: int, cost: Cost) -> list[list[int]]:
    """Split rows into batches: indexes into `lengths`, longest rows first, each batch within `budget` tokens.

    Sorting by length keeps padding small; a row that costs more than the budget alone forms its own batch.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, found {budget}")
    batches: list[list[int]] = []
    longest = total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if batches and cost(len(batches[-1]) + 1, longest, total + length) <= budget:
            batches[-1].append(index)
            total += length
        else:
            batches.append([index])
            longest = total = length
    return batches


@dataclass(frozen=True)
class Batch:
    """Distinct rows for one trunk pass, and which tasks want which of them.

    wanted: task -> indexes into `rows`, in the order in which the task's logits are returned.
    private: indexes of rows of which nothing may be kept.
    """

    rows: tuple[Row, ...]
    wanted: dict[str, tuple[int, ...]]
    private: frozenset[int] = frozenset()

    @property
    def tokens(self) -> int:
        """Real tokens in the batch."""
        return sum(map(len, self.rows))
