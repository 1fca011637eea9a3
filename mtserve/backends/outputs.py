"""What a trunk computed for rows, kept for later passes within a bound of bytes. Knows no tensor library and no trunk.

Invariants (tests/test_outputs.py holds them):
1. At no time are there more bytes than `most`; what alone is larger is not kept.
2. What was used longest ago goes first. A row that is kept again takes the place of what was kept of it.

For the thread in which the backend computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Kept(Generic[T]):
    value: T
    size: int


class Outputs(Generic[T]):
    """Values by key, at most `most` bytes of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 0
        self._kept: OrderedDict[Hashable, _Kept[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> T | None:
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found.value

    def put(self, key: Hashable, value: T, *, size: int) -> None:
        """Keep a value of so many bytes."""
        if size > self.most:
            return
        if (before := self._kept.pop(key, None)) is not None:
            self.size -= before.size
        while self.size + size > self.most:
            _, oldest = self._kept.popitem(last=False)
            self.size -= oldest.size
        self._kept[key] = _Kept(value, size)
        self.size += size
