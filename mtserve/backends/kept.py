"""Keys and values of sequences that go on, in numpy, as an exported trunk takes and gives them. Which past has which
slot is in `slots`. Knows no runtime.

A layer's buffers are (slots, heads, capacity, size), so that a pass over neighbouring slots is given views of them.
They go in as long as they are: what a row does not know is masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mtserve.backends.slots import Indexes, Slots, Steps
from mtserve.bundle import CacheShape
from mtserve.rows import Floats

Numbers = Floats


class Kept:
    """All pasts of a backend, of a trunk with such a cache. `slots` says where a row's is; `given` before a pass and
    `taken` after it."""

    def __init__(self, cache: CacheShape) -> None:
        self.cache = cache
        self.slots = Slots(self)
        self.buffers: list[Numbers] = []

    def clear(self) -> None:
        self.buffers = []

    def resize(self, slots: int, capacity: int) -> None:
        self.buffers = [_resized(old, slots, capacity) for old in self.buffers]

    def copy(self, source: Indexes, into: Indexes, capacity: int) -> None:
        (slot, at), (to, there) = divmod(source, capacity), divmod(into, capacity)
        for buffer in self.buffers:
            buffer[to, :, there] = buffer[slot, :, at]

    def given(self, steps: Steps) -> tuple[npt.NDArray[np.int64], list[Numbers]]:
        """What a trunk is given for a pass: the mask (rows, known + seq), and for each layer keys and values."""
        real = steps.real.astype(np.int64)
        if not steps.known.any():
            shape = len(real), self.cache.heads, 0, self.cache.size
            return real, [np.empty(shape, np.float32)] * (2 * self.cache.layers)
        before = np.arange(self.slots.shape[1]) < steps.known[:, None]
        read = steps.read
        return np.concatenate([before.astype(np.int64), real], 1), [buffer[read] for buffer in self.buffers]

    def taken(self, steps: Steps, new: Sequence[Numbers]) -> None:
        """Keep what a pass gave: for each layer keys and values (rows, heads, seq, size)."""
        if not self.buffers:
            slots, capacity = self.slots.shape
            shape = slots, self.cache.heads, capacity, self.cache.size
            self.buffers = [np.zeros(shape, np.float32) for _ in new]
        slot, at = divmod(steps.into, self.slots.shape[1])
        for buffer, one in zip(self.buffers, new, strict=True):
            buffer[slot, :, at] = one.transpose(0, 2, 1, 3)[steps.new]


def _resized(old: Numbers, slots: int, capacity: int) -> Numbers:
    new = np.zeros((slots, old.shape[1], capacity, old.shape[3]), old.dtype)
    rows, known = min(slots, len(old)), min(capacity, old.shape[2])
    new[:rows, :, :known] = old[:rows, :, :known]
    return new
