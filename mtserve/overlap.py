"""Three things at once, over windows in order: one is made ready, one is computed, one is used. Knows what none is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


def overlapped(
    source: Iterable[A], prepare: Callable[[A], B], compute: Callable[[B], C], *, ahead: int = 2
) -> Iterator[C]:
    """What `compute` makes of what `prepare` makes of each of the source, in order.

    The source is read and prepared in one thread, computed in another; the caller uses what comes meanwhile. At most
    `ahead` and the one in use are held, however long the source is. An exception comes through after what was made
    before it; once the caller stops, both threads end and the source is closed.
    """
    every = iter(source)

    def ready() -> tuple[B, ...]:
        return next(((prepare(one),) for one in every), ())

    def done(coming: Future[tuple[B, ...]]) -> tuple[C, ...]:
        return tuple(map(compute, coming.result()))

    with ThreadPoolExecutor(1, "mtserve-read") as reading, ThreadPoolExecutor(1, "mtserve-compute") as computing:
        coming: deque[Future[tuple[C, ...]]] = deque()
        try:
            for _ in range(ahead):
                coming.append(computing.submit(done, reading.submit(ready)))
            while made := coming.popleft().result():
                coming.append(computing.submit(done, reading.submit(ready)))
                yield made[0]
        finally:
            for pool in (reading, computing):
                pool.shutdown(wait=True, cancel_futures=True)
            _close(every)


def _close(every: Any) -> None:
    close = getattr(every, "close", None)
    if close is not None:
        close()
