"""Which batch of which task comes when. Pure: knows no data, no tensors.

Invariants (tests/training/test_mixture.py holds them): a batch has examples of one task; every example of every task
comes exactly once an epoch; the order follows from (seed, epoch) and the sizes alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

TaskBatch = tuple[str, list[int]]


def proportional(sizes: Mapping[str, int], batch_sizes: Mapping[str, int], *, seed: int, epoch: int) -> list[TaskBatch]:
    """One epoch as (task, indexes of its examples) batches: tasks come in proportion to their number of batches.

    A task's last batch is short where its size is no multiple of its batch size.
    """
    order = random.Random(f"{seed}/{epoch}")  # noqa: S311 - no secret; a text seed is hashed whole
    batches: list[TaskBatch] = []
    for task, size in sizes.items():
        indexes = list(range(size))
        order.shuffle(indexes)
        step = batch_sizes[task]
        batches += [(task, indexes[start : start + step]) for start in range(0, size, step)]
    order.shuffle(batches)
    return batches


def batches_an_epoch(sizes: Mapping[str, int], batch_sizes: Mapping[str, int]) -> int:
    """How many batches `proportional` makes."""
    return sum(math.ceil(size / batch_sizes[task]) for task, size in sizes.items())
