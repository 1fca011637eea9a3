"""A batch of a torch backend that is under way: what comes back from it, and what holds once it has. Knows no trunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtserve.backends.base import Answers, Times
from mtserve.backends.staging import Lane
from mtserve.batching import Batch
from mtserve.rows import Floats, Ints, Row


@dataclass(frozen=True)
class Logits:
    """Logits of one task on their way to the host.

    task     whose they are
    rows     of the batch, by index
    values   (rows, n_out); or (sum of counts, n_out)
    counts   (rows,) positions of each row; None where the head answers once a row
    """

    task: str
    rows: Sequence[int]
    values: Tensor
    counts: Ints | None


@dataclass(frozen=True)
class Launched:
    """A batch that is under way.

    batch    as it was launched
    kept     its rows whose pasts have their lengths once it succeeded
    logits   that come back from it
    lane     on which they come
    wait     for all of that
    taken    called once it is there
    failed   called instead if waiting raises
    times    of its passes so far; the waiting is added
    """

    batch: Batch
    kept: Sequence[Row]
    logits: Sequence[Logits]
    lane: Lane
    wait: Callable[[], None]
    taken: Callable[[], None]
    failed: Callable[[], None]
    times: Times

    def result(self) -> Answers:
        began = time.perf_counter()
        try:
            self.wait()
        except Exception:
            self.failed()
            raise
        self.times.trunk_s += time.perf_counter() - began
        found: dict[str, dict[int, Floats]] = {task: {} for task in self.batch.wanted}
        for some in self.logits:
            found[some.task].update(zip(some.rows, self._arrays(some), strict=True))
        self.taken()
        for row in self.kept:
            assert row.past is not None
            row.past.length = len(row)
        return {task: [found[task][at] for at in some] for task, some in self.batch.wanted.items()}

    def _arrays(self, some: Logits) -> list[Floats]:
        """One a row. Parts of a row are copies, as a view would keep all rows' logits alive with one work."""
        if some.counts is None:
            return list(self.lane.read(some.values))
        values: Floats = some.values.numpy()
        return [part.copy() for part in np.split(values, np.cumsum(some.counts)[:-1])]
