"""Threads that tokenise before a request is queued, and decode after its last step. Knows no engine and no queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mtserve.tasks.work import Work
from mtserve.ticket import late

T = TypeVar("T")
_WEIGHT = 0.05


class TextPool:
    """A pool, and an estimate of what it will bring. `prepare` and `coming` are for one thread, an event loop's."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mtserve-text")
        self._requests = 0
        self._tokens = 1.0  # of a request of late, on average

    @property
    def coming(self) -> int:
        """Tokens that the requests under preparation will have, if they are as those of late were."""
        return round(self._requests * self._tokens)

    async def prepare(self, call: Callable[[], dict[str, list[Work]]], *, deadline: float) -> dict[str, list[Work]]:
        """Works of a request by task. Raises what the call raises, or DeadlineError; a call that has not begun by then
        never does."""
        self._requests += 1
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                works = await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except TimeoutError as error:
            raise late() from error
        finally:
            self._requests -= 1
        tokens = sum(work.tokens for of_task in works.values() for work in of_task)
        self._tokens += _WEIGHT * (tokens - self._tokens)
        return works

    def submit(self, call: Callable[[], T]) -> Future[T]:
        return self._pool.submit(call)

    def close(self, *, wait: bool) -> None:
        """Begin no more calls; `wait` for those that have begun."""
        self._pool.shutdown(wait)
