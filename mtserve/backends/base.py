"""The protocol between the engine and what computes. Knows no framework."""

from __future__ import annotations

from typing import Protocol

from mtserve.batching import Batch, Cost
from mtserve.rows import Floats


class Backend(Protocol):
    """One trunk with its heads, ready to compute. Called from one thread at a time.

    cost      what a batch costs this backend, in tokens
    profile   how it computes, as the manifest names it
    """

    profile: str

    @property
    def cost(self) -> Cost: ...

    def run(self, batch: Batch) -> dict[str, list[Floats]]:
        """One trunk pass over the batch's rows, then each task's head on the rows that it wants.

        For each task one array for each wanted row, in order: (n_out,), or (len, n_out) where the head reads all
        positions and answers for each.
        """
        ...
