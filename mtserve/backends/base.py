"""The protocol between the engine and what computes. Knows no framework."""

from __future__ import annotations

from typing import Protocol

from mtserve.batching import Batch, Cost
from mtserve.rows import Floats


class Backend(Protocol):
    """One trunk with its heads, ready to compute. Called from one thread at a time.

    cost      what a batch costs this backend, in tokens
    profile   how it computes, as the manifest names it
    tokens    how many it has computed so far: those of rows, but for what it knew of them; no padding
    keeps     whether it keeps pasts, so that a pass computes the `pending` tokens of a row. One that does not computes
              every row whole and leaves the lengths of pasts as they are
    """

    profile: str
    tokens: int

    @property
    def cost(self) -> Cost: ...

    @property
    def keeps(self) -> bool: ...

    def run(self, batch: Batch) -> dict[str, list[Floats]]:
        """One trunk pass over the batch's rows, then each task's head on the rows that it wants.

        For each task one array for each wanted row, in order: (n_out,); (len, n_out) where the head reads all positions
        and answers for each; (answers, n_out) where it reads the last ones and answers for each.

        Rows may be fresh or go on from pasts, of which no two share one. A past has the length of its row afterwards if
        it is kept, and the length that it had if this raises.
        """
        ...

    def release(self) -> None:
        """Free what is kept for pasts that nobody holds, without waiting for the next pass."""
        ...
