"""Several windows of one long text back into one output. Knows no kind.

A group is what belongs together: the windows of one part of one example. Logits of a group are averaged, each window
weighted by how many tokens of text it holds; a group of one row keeps its logits bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtserve.rows import Floats, Row

if TYPE_CHECKING:
    from torch import Tensor


def groups(rows: Sequence[Row]) -> Iterator[tuple[int, slice]]:
    """(part, rows of that part) of one example's rows, in order."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end].part != rows[start].part:
            yield rows[start].part, slice(start, end)
            start = end


def weights(rows: Sequence[Row]) -> Floats:
    """(rows,) share of each window in its group's mean."""
    tokens = np.array([max(row.own_tokens, 1) for row in rows], np.float32)
    return np.asarray(tokens / tokens.sum(), np.float32)


def merge(rows: Sequence[Row], logits: Sequence[Floats]) -> Floats:
    """(parts, n_out): one vector for each part of an example, from (n_out,) logits of its rows."""
    merged = []
    for _, span in groups(rows):
        if span.stop - span.start == 1:
            merged.append(logits[span.start])
        else:
            merged.append(np.average(np.stack(logits[span]), axis=0, weights=weights(rows[span])))
    return np.asarray(np.stack(merged), np.float32)


def merge_tensor(examples: Sequence[Sequence[Row]], logits: Tensor) -> list[Tensor]:
    """`merge` for training: one (parts, n_out) tensor an example, from (rows, n_out) of all their rows."""
    import torch

    merged, at = [], 0
    for rows in examples:
        parts = []
        for _, span in groups(rows):
            block = logits[at + span.start : at + span.stop]
            share = torch.from_numpy(weights(rows[span])).to(block)
            parts.append(block[0] if len(block) == 1 else (block * share[:, None]).sum(0))
        merged.append(torch.stack(parts))
        at += len(rows)
    return merged
