"""An accepted request: what waits for its answer, and reads it along. Knows no engine and no queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from mtserve.errors import CapacityError, DeadlineError
from mtserve.tasks.work import Work


class Ticket:
    """An accepted request. Times are of `time.monotonic`; `started` is None while all its works wait."""

    def __init__(
        self, withdraw: Callable[[Ticket], None], works: Sequence[Work], *, deadline: float, stream: bool
    ) -> None:
        self.works = tuple(works)
        self.deadline = deadline
        self.accepted = time.monotonic()
        self.started: float | None = None
        self.unfinished = len(self.works)
        self.over = False
        self.future: Future[list[Any]] = Future()
        self.future.set_running_or_notify_cancel()  # from here on only the scheduler settles it
        self.loop = asyncio.get_running_loop() if stream else None  # where the request is read along
        self._events: asyncio.Queue[list[Any] | None] = asyncio.Queue()
        self._withdraw = withdraw

    async def result(self) -> list[Any]:
        """The predictions in the order of the works. Raises DeadlineError, or what the request failed with.

        Cancelling the caller withdraws the request.
        """
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                return await asyncio.wrap_future(self.future)
        except TimeoutError as error:
            raise late() from error
        finally:
            self.withdraw()

    async def events(self) -> AsyncGenerator[Any, None]:
        """What `engine.emit` says of the works of a request accepted with `stream`, as it comes, until it is answered.

        Raises as `result` does. Closing the iterator withdraws the request.
        """
        try:
            while True:
                async with asyncio.timeout(self.deadline - time.monotonic()):
                    events = await self._events.get()
                if events is None:
                    break
                for event in events:
                    yield event
            self.future.result()
        except TimeoutError as error:
            raise late() from error
        finally:
            self.withdraw()

    def tell(self, events: list[Any] | None) -> None:
        """Hand events over to whoever reads along, from any thread; None is the end."""
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self.loop.call_soon_threadsafe(self._events.put_nowait, events)

    def withdraw(self) -> None:
        """Give the request up: no work of it takes another step. Does nothing to one that is answered."""
        self._withdraw(self)


def late() -> DeadlineError:
    return DeadlineError("the request was not answered within its time limit")


def closed() -> CapacityError:
    return CapacityError("the server is closing")
