"""Rows to states: one trunk pass, end to end or padded, with what is kept of rows that go on. Knows no head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtserve.backends.flat import Rectangle
from mtserve.backends.graphs import Graphs
from mtserve.backends.pasts import Pasts
from mtserve.backends.serving import Served
from mtserve.backends.staging import moved, padded, sent, staged
from mtserve.heads import FlatStates
from mtserve.rows import Row
from mtserve.trunk import inputs_of


@dataclass(frozen=True)
class Kept:
    """What the trunk gave for one row: states (len, hidden), and (hidden,) of its pooler where that was asked for."""

    hidden: Tensor
    pooled: Tensor | None

    @classmethod
    def of(cls, states: FlatStates, number: int) -> Kept:
        """That of a row by its place among the states; copied, since a part of them would keep them all."""
        start, count = int(states.starts[number]), int(states.counts[number])
        pooled = None if states.pooled is None else states.pooled[number].clone()
        return cls(states.hidden[start : start + count].clone(), pooled)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.hidden.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class Passes:
    """Passes of a trunk that serves; `graphs` are recorded ones over few tokens. `pad_id` stands where a row is shorter
    than the longest."""

    def __init__(self, served: Served, graphs: Graphs | None, *, pad_id: int) -> None:
        self.served, self.graphs, self.pad_id = served, graphs, pad_id

    def computed(self, rows: Sequence[Row], known: Sequence[int], pasts: Pasts, *, pooled: bool = False) -> FlatStates:
        """One trunk pass over rows that `pasts` have admitted, but for their first `known` tokens; `pooled` if a head
        reads that."""
        keeping = pasts if any(row.past is not None for row in rows) else None
        if self.served.flat:
            states = self._flat(rows, known, keeping, pooled=pooled)
        else:
            states = self._padded(rows, known, keeping)
        if keeping is not None:
            keeping.slots.done(rows)
        return states

    def joined(self, kept: Sequence[Kept], *, pooled: bool) -> FlatStates:
        """States of rows that were kept, as a pass over them gives them."""
        counts = np.array([len(one.hidden) for one in kept], np.int32)
        starts = np.cumsum(counts, dtype=np.int32) - counts
        hidden = torch.cat([one.hidden for one in kept])
        first = None
        if pooled:
            ours = [one.pooled for one in kept]
            if any(one is None for one in ours):  # the pass in which they were computed had no use for them
                first = self.served.pooled(hidden.index_select(0, moved(starts, self.served.device)))
            else:
                first = torch.stack([one for one in ours if one is not None])
        return FlatStates(hidden, starts, counts, first)

    def _flat(self, rows: Sequence[Row], known: Sequence[int], pasts: Pasts | None, *, pooled: bool) -> FlatStates:
        counts = np.array([len(row) - start for row, start in zip(rows, known, strict=True)], np.int32)
        going_on = any(known)
        order = range(len(rows)) if going_on else np.argsort(-counts, kind="stable").tolist()
        placed = [rows[at] for at in order]
        begun = [known[at] for at in order]
        each, begins = list(zip(placed, begun, strict=True)), self.served.first_position
        lengths = counts[order].tolist()
        fill = 0 if pasts is not None else self.served.filling(lengths)
        none = [np.zeros(fill, np.int32)] if fill else []
        lines = staged(
            (
                [row.ids[start:] for row, start in each] + none,
                [row.type_ids[start:] for row, start in each] + none,
                [np.arange(begins + start, begins + len(row), dtype=np.int32) for row, start in each]
                + [begins + one for one in none],
            ),
            device=self.served.device,
        )
        seen = None if pasts is None else pasts.begin(placed, begun, self.served.like, flat=True)
        hidden = None if pasts is not None or self.graphs is None else self.graphs(lines, lengths)
        if hidden is None:
            layout = (
                self.served.layout(lengths, fill)
                if seen is None
                else Rectangle((len(rows), int(counts.max())), seen.place, seen.mask)
            )
            ids, type_ids, positions = sent(lines, self.served.device).unbind()
            hidden = self.served.encode(ids, type_ids, positions, layout, pasts)
            hidden = hidden[: len(hidden) - fill]
        starts = np.empty(len(rows), np.int32)
        starts[order] = np.cumsum([0, *lengths[:-1]])
        first = self.served.pooled(hidden.index_select(0, moved(starts, self.served.device))) if pooled else None
        return FlatStates(hidden, starts, counts, first)

    def _padded(self, rows: Sequence[Row], known: Sequence[int], pasts: Pasts | None) -> FlatStates:
        trunk, seq = self.served.trunk, max(len(row) - start for row, start in zip(rows, known, strict=True))
        on_host = padded(rows, pad_id=self.pad_id, known=known)
        ids, mask, type_ids = (sent(one, self.served.device) for one in on_host)
        inputs = inputs_of(trunk, ids, type_ids) | {"attention_mask": mask}
        if pasts is not None:
            inputs |= {"past_key_values": pasts, "use_cache": True}
            if seen := pasts.begin(rows, known, self.served.like, flat=False):
                inputs |= {"position_ids": seen.positions, "attention_mask": seen.mask}
        output = trunk(**inputs)
        counts = np.array([len(row) - start for row, start in zip(rows, known, strict=True)], np.int32)
        starts = np.arange(len(rows), dtype=np.int32) * seq
        hidden = output.last_hidden_state.flatten(0, 1)
        return FlatStates(hidden, starts, counts, getattr(output, "pooler_output", None))
