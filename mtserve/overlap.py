"""Windows in order, each read, made ready, computed and used, at once where that pays. Knows what none of them is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


def overlapped(
    source: Iterable[A], prepare: Callable[[A], B], compute: Callable[[B], C], *, apart: bool, ahead: int = 2
) -> Iterator[C]:
    """What `compute` makes of what `prepare` makes of each of the source, in order.

    The source is read in a thread of its own; where a device computes `apart` from the processor, it is prepared there
    too and computed in a third thread, and the caller uses what comes meanwhile. On a processor all of whose cores
    compute, the stages would only keep each other waiting, so there they take turns in the caller's thread. At most
    `ahead` and the one in use are held, however long the source is. An exception comes through after what was made
    before it; once the caller stops, the threads end and the source is closed.
    """
    every = iter(source)

    def read() -> tuple[A, ...]:
        return next(((one,) for one in every), ())

    def ready() -> tuple[B, ...]:
        return tuple(map(prepare, read()))

    def done(coming: Future[tuple[B, ...]]) -> tuple[C, ...]:
        return tuple(map(compute, coming.result()))

    with ThreadPoolExecutor(1, "mtserve-read") as reading, ThreadPoolExecutor(1, "mtserve-compute") as computing:

        def begun() -> Future[Any]:
            return computing.submit(done, reading.submit(ready)) if apart else reading.submit(read)

        coming: deque[Future[Any]] = deque()
        try:
            for _ in range(ahead):
                coming.append(begun())
            while made := coming.popleft().result():
                coming.append(begun())
                yield made[0] if apart else compute(prepare(made[0]))
        finally:
            for pool in (reading, computing):
                pool.shutdown(wait=True, cancel_futures=True)
            _close(every)


def _close(every: Any) -> None:
    close = getattr(every, "close", None)
    if close is not None:
        close()
