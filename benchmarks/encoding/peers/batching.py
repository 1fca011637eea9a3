"""Rows to padded batches and back, for engines that take those. Knows no engine; needs numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Row = tuple[Ints, Ints]
"""Ids and type ids of one sequence, each (seq,)."""
Encode = Callable[[Ints, Ints, Ints], Floats]
"""Ids, mask and type ids of padded rows, each (rows, seq), to mean-pooled embeddings (rows, hidden)."""


@dataclass(frozen=True)
class Setting:
    """How an engine is asked: rows in the order `given` or `sorted` by length, cut into batches of so many rows or of
    so many tokens with padding, one batch at a time or `streams` at once with one thread each."""

    order: str = "sorted"
    rows: int = 0
    tokens: int = 0
    streams: int = 1

    def __str__(self) -> str:
        size = f"batches of {self.rows} rows" if self.rows else f"batches of {self.tokens} tokens"
        return f"{self.order}, {size}" + (f", {self.streams} streams" if self.streams > 1 else "")


def cut(lengths: Sequence[int], setting: Setting) -> list[list[int]]:
    """Batches of indexes. Sorted ones go from long to short, so that a batch is as long as its first row."""
    order: Sequence[int] = range(len(lengths))
    if setting.order == "sorted":
        order = sorted(order, key=lambda at: -lengths[at])
    batches: list[list[int]] = []
    longest = 0
    for at in order:
        size = len(batches[-1]) + 1 if batches else 0
        fits = size <= setting.rows if setting.rows else size * max(longest, lengths[at]) <= setting.tokens
        if batches and fits:
            batches[-1].append(at)
            longest = max(longest, lengths[at])
        else:
            batches.append([at])
            longest = lengths[at]
    return batches


def padding(lengths: Sequence[int], setting: Setting) -> float:
    """Tokens with padding over those without."""
    batches = cut(lengths, setting)
    return sum(len(batch) * max(lengths[at] for at in batch) for batch in batches) / sum(lengths)


def padded(rows: Sequence[Row], *, pad_id: int) -> tuple[Ints, Ints, Ints]:
    """Ids, mask and type ids, each (rows, seq), padded at the right."""
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    ids, mask, types = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for at, (mine, kinds) in enumerate(rows):
        ids[at, : len(mine)], mask[at, : len(mine)], types[at, : len(mine)] = mine, 1, kinds
    return ids, mask, types


def encoded(rows: Sequence[Row], setting: Setting, encode: Encode, *, pad_id: int) -> Floats:
    """Embeddings of rows in their order, (rows, hidden)."""

    def one(batch: list[int]) -> Floats:
        return encode(*padded([rows[at] for at in batch], pad_id=pad_id))

    batches = cut([len(ids) for ids, _ in rows], setting)
    if setting.streams > 1 and len(batches) > 1:
        with ThreadPoolExecutor(setting.streams) as pool:
            parts = list(pool.map(one, batches))
    else:
        parts = [one(batch) for batch in batches]
    made = np.empty((len(rows), parts[0].shape[1]), np.float32)
    for batch, part in zip(batches, parts, strict=True):
        made[batch] = part
    return made


def pooled(hidden: Floats, mask: Ints) -> Floats:
    """Mean of the states of real tokens: (rows, seq, hidden) and (rows, seq) to (rows, hidden)."""
    weights = (mask / mask.sum(1, keepdims=True)).astype(np.float32)
    made: Floats = (weights[:, None, :] @ hidden)[:, 0]
    return made
