"""What a scheduler asks of an engine, a thread in which several engines compute, and a step that may fail. Knows no
engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from mtserve.tasks.work import Work

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Stepper(Protocol):
    """What the scheduler asks of an engine: `step` from its own thread, the others from any."""

    max_batch_tokens: int
    max_past_tokens: int

    def prepare_tasks(
        self, asked: Mapping[str, Mapping[str, Any] | None], items: Sequence[Any], *, stream: bool = False
    ) -> dict[str, list[Work]]:
        """Raw items as works of each task asked for, none of which reserves more than `max_past_tokens`."""
        ...

    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """(finished, unfinished) after one more step of every work. Raises where none of them advanced."""
        ...

    def call(self, call: Callable[[], T]) -> T:
        """What a call gives that runs where steps do, when none is under way."""
        ...

    def release(self) -> None:
        """Free what is kept for works that nobody holds."""
        ...

    def emit(self, work: Work) -> list[Any]:
        """What there is to read along since the last call, from the engine's thread; the last after the last step."""
        ...

    def finish(self, work: Work) -> Any:
        """The prediction of a finished work. Raises what went wrong with it."""
        ...


class InThread:
    """An engine whose steps run in a thread that others share, one after another.

    Each thread that computes has OpenMP threads of its own. Two of them on one set of cores have more than there are
    cores, and OpenMP then puts them to sleep between any two operations, which doubles the time of a short request.
    """

    def __init__(self, engine: Stepper, thread: ThreadPoolExecutor) -> None:
        self._engine, self._thread = engine, thread
        self.max_batch_tokens, self.max_past_tokens = engine.max_batch_tokens, engine.max_past_tokens
        self.prepare_tasks, self.emit, self.finish = engine.prepare_tasks, engine.emit, engine.finish

    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        return self._thread.submit(self._engine.step, works).result()

    def call(self, call: Callable[[], T]) -> T:
        return self._thread.submit(call).result()

    def release(self) -> None:
        self._thread.submit(self._engine.release).result()


def stepped(
    engine: Stepper, works: Sequence[Work], *, over: Callable[[Work], bool], failed: Callable[[Work], None]
) -> tuple[list[Work], list[Work]]:
    """A step, repeated in halves where it fails: (finished, unfinished). A work that fails alone is in neither, and
    `failed` is told; what is `over` by then is not repeated."""
    try:
        return engine.step(works)
    except Exception as error:  # whatever a backend raises, the thread must live on
        if len(works) == 1:
            logger.exception("task %r failed on one input", works[0].task)
            failed(works[0])
            return [], []
        logger.error("a step of %d works failed, and is repeated in halves: %r", len(works), error)
    finished: list[Work] = []
    unfinished: list[Work] = []
    for half in (works[: len(works) // 2], works[len(works) // 2 :]):
        if left := [work for work in half if not over(work)]:
            done, more = stepped(engine, left, over=over, failed=failed)
            finished += done
            unfinished += more
    return finished, unfinished
