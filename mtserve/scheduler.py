"""Many requests into few trunk passes: one engine thread and one bounded queue a trunk. Knows no HTTP and no torch.

Invariants (tests/test_scheduler.py holds them):

1.  Every accepted work is answered once: its request gets a prediction for each of its works, in the order given, or
    one error. Nothing is lost, nothing is answered twice.
2.  A request is accepted whole or refused whole. It is refused with OverloadedError while its tokens do not fit beside
    those that wait, and always with TooLargeError if they would not fit into an empty queue: sending it again later
    cannot help, so the answer does not depend on the load.
3.  Works start in the order in which they were accepted, as soon as the engine is free; a step takes what fits the
    engine's token budget, counted in distinct rows, and at least one work; a work without a new row always fits. So
    equal rows that stand next to each other in the queue are encoded once. Works of many steps stay, and others join
    between their steps.
4.  The waiting works of a request that was withdrawn (cancelled, timed out, failed) never start.
5.  When a step fails, each of its works is tried once more alone; a work that fails alone fails its own request, with
    a MtserveError that says nothing of the inside. The thread lives on.
6.  A request that is not answered by its deadline gets DeadlineError.
7.  After `close` nothing is accepted; what was accepted is answered if the time suffices, else fails with
    CapacityError. `close` returns within its bound.
8.  What a step holds depends on the order of acceptance and on when the engine was free, on nothing else.

The tokenizer runs in a pool of threads before a request is queued, and decoding after its last step, so that the event
loop and the engine thread do neither.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from mtserve.errors import CapacityError, DeadlineError, MtserveError, OverloadedError, TooLargeError
from mtserve.tasks.base import Work

DEFAULT_QUEUE_TOKENS = 262_144
DEFAULT_TIMEOUT_S = 60.0
logger = logging.getLogger(__name__)


class Stepper(Protocol):
    """What the scheduler asks of an engine: `step` from its own thread, the others from any."""

    max_batch_tokens: int

    def prepare_all(self, name: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None) -> list[Work]:
        """Raw items as works."""
        ...

    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """(finished, unfinished) after one more step of every work."""
        ...

    def finish(self, work: Work) -> Any:
        """The prediction of a finished work."""
        ...


class Ticket:
    """An accepted request. Times are of `time.monotonic`; `started` is None while all its works wait."""

    def __init__(self, scheduler: Scheduler, works: Sequence[Work], *, deadline: float) -> None:
        self.works = tuple(works)
        self.deadline = deadline
        self.accepted = time.monotonic()
        self.started: float | None = None
        self.waiting = self.unfinished = len(self.works)  # not started; not finished
        self.over = False
        self.future: Future[list[Any]] = Future()
        self.future.set_running_or_notify_cancel()  # from here on only the scheduler settles it
        self._scheduler = scheduler

    async def result(self) -> list[Any]:
        """The predictions in the order of the works. Raises DeadlineError, or what the request failed with.

        Cancelling the caller withdraws the request.
        """
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                return await asyncio.wrap_future(self.future)
        except TimeoutError as error:
            raise _late() from error
        finally:
            self.withdraw()

    def withdraw(self) -> None:
        """Give the request up: its waiting works never start. Does nothing to one that is answered."""
        self._scheduler.withdraw(self)


class Scheduler:
    """One engine, its thread and its queue."""

    def __init__(
        self,
        engine: Stepper,
        *,
        max_queue_tokens: int = DEFAULT_QUEUE_TOKENS,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        pool_threads: int = 2,
    ) -> None:
        self.max_queue_tokens = max_queue_tokens
        self.timeout_s = timeout_s
        self._engine = engine
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[tuple[Work, Ticket]] = deque()
        self._waiting_tokens = 0
        self._open: set[Ticket] = set()
        self._closing = False
        self._pool = ThreadPoolExecutor(pool_threads, thread_name_prefix="mtserve-text")
        self._thread = threading.Thread(target=self._serve, name="mtserve-engine", daemon=True)
        self._thread.start()

    # the callers' side

    async def prepare(
        self, task: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None, *, deadline: float
    ) -> list[Work]:
        """`engine.prepare_all` in the pool. Raises what that raises, CapacityError or DeadlineError."""
        with self._changed:
            self._refuse(0)
        call = partial(self._engine.prepare_all, task, items, parameters)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except TimeoutError as error:
            raise _late() from error

    def accept(self, works: Sequence[Work], *, deadline: float | None = None) -> Ticket:
        """Queue a request. Raises OverloadedError, TooLargeError, or CapacityError when closing; nothing runs then."""
        ticket = Ticket(self, works, deadline=time.monotonic() + self.timeout_s if deadline is None else deadline)
        tokens = sum(work.tokens for work in ticket.works)
        with self._changed:
            self._refuse(tokens)
            if not ticket.works:
                ticket.future.set_result([])
                return ticket
            self._open.add(ticket)
            self._waiting.extend((work, ticket) for work in ticket.works)
            self._waiting_tokens += tokens
            self._changed.notify()
        return ticket

    async def submit(self, works: Sequence[Work], *, deadline: float | None = None) -> list[Any]:
        """Predictions of works, in order. Raises as `accept` and `Ticket.result` do."""
        return await self.accept(works, deadline=deadline).result()

    def withdraw(self, ticket: Ticket) -> None:
        """Drop what still waits of a request; an unsettled one fails."""
        with self._changed:
            self._settle(ticket, error=CapacityError("the request was withdrawn"))

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Accept nothing more, answer what was accepted, end the thread; after `timeout_s` fail what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        drained = not self._thread.is_alive()
        if not drained:
            with self._changed:
                for ticket in list(self._open):
                    self._settle(ticket, error=_closed())
        self._pool.shutdown(wait=drained)

    def _refuse(self, tokens: int) -> None:
        """Raise if that many tokens cannot be queued now."""
        if self._closing:
            raise _closed()
        if tokens > self.max_queue_tokens:
            raise TooLargeError(f"the request has {tokens} tokens; at most {self.max_queue_tokens} are allowed")
        if self._waiting_tokens + max(tokens, 1) > self.max_queue_tokens:
            raise OverloadedError(
                f"{self._waiting_tokens} tokens wait already, and at most {self.max_queue_tokens} may; try again soon"
            )

    def _settle(self, ticket: Ticket, *, error: BaseException | None = None, result: list[Any] | None = None) -> None:
        """Answer a request once, and forget what still waits of it. Called with the lock held."""
        if ticket.future.done():
            return
        ticket.over = True
        self._open.discard(ticket)
        if ticket.waiting:
            self._waiting = deque(pair for pair in self._waiting if pair[1] is not ticket)
            self._waiting_tokens = sum(work.tokens for work, _ in self._waiting)
        if error is not None:
            ticket.future.set_exception(error)
        else:
            ticket.future.set_result(result or [])

    # the engine thread's side

    def _serve(self) -> None:
        running: dict[Work, Ticket] = {}
        while True:
            with self._changed:
                running = {work: ticket for work, ticket in running.items() if not ticket.over}
                while not (running or self._waiting or self._closing):
                    self._changed.wait()
                self._take(running)
                if not running:
                    return  # closing, and nothing is left
            running = self._step(running)

    def _take(self, running: dict[Work, Ticket]) -> None:
        """Move waiting works to the running ones while the distinct rows of all fit the budget."""
        seen = {row.key: len(row) for work in running for row in work.rows}
        tokens = sum(seen.values())
        while self._waiting:
            work, ticket = self._waiting[0]
            new = {row.key: len(row) for row in work.rows if row.key not in seen}
            if running and new and tokens + sum(new.values()) > self._engine.max_batch_tokens:
                return
            self._waiting.popleft()
            ticket.waiting -= 1
            self._waiting_tokens -= work.tokens
            seen.update(new)
            tokens += sum(new.values())
            running[work] = ticket
            if ticket.started is None:
                ticket.started = time.monotonic()

    def _step(self, running: dict[Work, Ticket]) -> dict[Work, Ticket]:
        """One step of all running works; those that are to go on."""
        before = [(work, work.rows, len(work.generated)) for work in running]
        try:
            finished, unfinished = self._engine.step(list(running))
        except Exception:  # whatever a backend raises, the thread must live on
            logger.exception("a step of %d works failed", len(running))
            finished, unfinished = self._alone(before, running)
        for work in finished:
            self._finished(running[work])
        return {work: running[work] for work in unfinished}

    def _alone(
        self, before: Sequence[tuple[Work, Any, int]], running: Mapping[Work, Ticket]
    ) -> tuple[list[Work], list[Work]]:
        """Repeat a failed step work by work, from where each stood before it; a work that was alone has had its try."""
        finished: list[Work] = []
        unfinished: list[Work] = []
        for work, rows, generated in before:
            ticket = running[work]
            if len(before) == 1:
                self._fail(ticket)
            elif not ticket.over:
                work.rows = rows
                del work.generated[generated:]
                try:
                    done, more = self._engine.step([work])
                except Exception:  # as in `_step`
                    logger.exception("task %r failed on one input", work.task)
                    self._fail(ticket)
                else:
                    finished += done
                    unfinished += more
        return finished, unfinished

    def _fail(self, ticket: Ticket) -> None:
        with self._changed:
            failed = MtserveError("the model failed on this request; the server's log has the reason")
            self._settle(ticket, error=failed)

    def _finished(self, ticket: Ticket) -> None:
        """Count a finished work; decode when it was the request's last."""
        ticket.unfinished -= 1
        with self._changed:
            if ticket.unfinished or ticket.over:
                return
            decoded = self._pool.submit(lambda: [self._engine.finish(work) for work in ticket.works])
        decoded.add_done_callback(partial(self._decoded, ticket))

    def _decoded(self, ticket: Ticket, decoded: Future[list[Any]]) -> None:
        error = decoded.exception()
        with self._changed:
            self._settle(ticket, error=error, result=None if error else decoded.result())


def _late() -> DeadlineError:
    return DeadlineError("the request was not answered within its time limit")


def _closed() -> CapacityError:
    return CapacityError("the server is closing")
