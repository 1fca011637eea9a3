"""Many requests into few trunk passes: one engine thread and one bounded queue a trunk. Knows no HTTP and no torch.

Invariants (tests/test_scheduler.py holds them):

1.  Every accepted work is answered once: its request gets a prediction for each of its works, in the order given, or
    one error. Nothing is lost, nothing is answered twice.
2.  A request is accepted whole or refused whole. It is refused with OverloadedError while its tokens do not fit beside
    those that wait, and always with TooLargeError if they would not fit into an empty queue: sending it again later
    cannot help, so the answer does not depend on the load.
3.  A round takes waiting works and steps them alone; then every running work (of many steps, those that just began
    among them) takes one step. What a step finished is delivered, and what it has to read along is told, before the
    next one. So a work that comes while others run waits for the step under way, and for one of the running works if
    that was one of new works; then its own step comes.
    Works start in the order in which they were accepted; a round takes what fits the engine's token budget, or
    `interleave_tokens` while others run, counted in pending tokens of distinct rows, and at least one work; a work
    without a new row always fits. So equal rows that stand next to each other in the queue are encoded once.
4.  The waiting works of a request that was withdrawn (cancelled, timed out, failed) never start, its running ones take
    no further step, and the scheduler holds neither.
5.  When a step fails, none of its works has advanced, and each is tried once more alone; a work that fails alone fails
    its own request, with a MtserveError that says nothing of the inside. The thread lives on.
6.  A request that is not answered by its deadline gets DeadlineError.
7.  After `close` nothing is accepted; what was accepted is answered if the time suffices, else fails with
    CapacityError. `close` returns within its bound.
8.  What a step holds depends on the order of acceptance and on when the engine was free, on nothing else.
9.  The running works have room (`tasks.base.room`) in the engine's `max_past_tokens`, and what was kept for others is
    freed when nothing runs. Works that wait for room let those pass that need none; among those that need some, and
    among those that need none, the order stays that of acceptance.
10. The events of a request that is read along come in order and complete, its error after them; what reads them never
    holds up the engine.

The tokenizer runs in a pool of threads before a request is queued, and decoding after its last step, so that the event
loop and the engine thread do neither.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any, Protocol

from mtserve.errors import CapacityError, MtserveError, OverloadedError, TooLargeError
from mtserve.tasks.work import Work, fits
from mtserve.ticket import Ticket, late

DEFAULT_QUEUE_TOKENS = 262_144
DEFAULT_TIMEOUT_S = 60.0
INTERLEAVE_TOKENS = 512
logger = logging.getLogger(__name__)


class Stepper(Protocol):
    """What the scheduler asks of an engine: `step` from its own thread, the others from any."""

    max_batch_tokens: int
    max_past_tokens: int

    def prepare_all(
        self, name: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None, *, stream: bool = False
    ) -> list[Work]:
        """Raw items as works, none of which reserves more than `max_past_tokens`."""
        ...

    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """(finished, unfinished) after one more step of every work. Raises where none of them advanced."""
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


class Scheduler:
    """One engine, its thread and its queue."""

    def __init__(
        self,
        engine: Stepper,
        *,
        max_queue_tokens: int = DEFAULT_QUEUE_TOKENS,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        interleave_tokens: int = INTERLEAVE_TOKENS,
        pool_threads: int = 2,
    ) -> None:
        self.max_queue_tokens = max_queue_tokens
        self.timeout_s = timeout_s
        self.interleave_tokens = interleave_tokens
        self._engine = engine
        self._changed = threading.Condition()  # guards all that follows
        self._number = count()
        self._waiting: list[deque[tuple[int, Work, Ticket]]] = [deque(), deque()]  # need no room for a past; need some
        self._waiting_tokens = 0
        self._open: set[Ticket] = set()
        self._closing = False
        self._pool = ThreadPoolExecutor(pool_threads, thread_name_prefix="mtserve-text")
        self._thread = threading.Thread(target=self._serve, name="mtserve-engine", daemon=True)
        self._thread.start()

    # the callers' side

    async def prepare(
        self,
        task: str,
        items: Sequence[Any],
        parameters: Mapping[str, Any] | None = None,
        *,
        deadline: float,
        stream: bool = False,
    ) -> list[Work]:
        """`engine.prepare_all` in the pool. Raises what that raises, CapacityError or DeadlineError."""
        with self._changed:
            self._refuse(0)
        call = partial(self._engine.prepare_all, task, items, parameters, stream=stream)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except TimeoutError as error:
            raise late() from error

    def accept(self, works: Sequence[Work], *, deadline: float | None = None, stream: bool = False) -> Ticket:
        """Queue a request; one to be read along by `Ticket.events` is queued from the event loop that will read.

        Raises OverloadedError, TooLargeError, or CapacityError when closing; nothing runs then.
        """
        deadline = time.monotonic() + self.timeout_s if deadline is None else deadline
        ticket = Ticket(self.withdraw, works, deadline=deadline, stream=stream)
        tokens = sum(work.tokens for work in ticket.works)
        with self._changed:
            self._refuse(tokens)
            if not ticket.works:
                ticket.future.set_result([])
                ticket.tell(None)
                return ticket
            self._open.add(ticket)
            for work in ticket.works:
                self._waiting[work.reserved > 0].append((next(self._number), work, ticket))
            self._waiting_tokens += tokens
            self._changed.notify()
        return ticket

    async def submit(self, works: Sequence[Work], *, deadline: float | None = None) -> list[Any]:
        """Predictions of works, in order. Raises as `accept` and `Ticket.result` do."""
        return await self.accept(works, deadline=deadline).result()

    def withdraw(self, ticket: Ticket) -> None:
        """Drop what is left of a request; an unsettled one fails."""
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
            self._waiting = [deque(entry for entry in queue if entry[2] is not ticket) for queue in self._waiting]
            self._waiting_tokens = sum(work.tokens for queue in self._waiting for _, work, _ in queue)
        if error is not None:
            ticket.future.set_exception(error)
        else:
            ticket.future.set_result(result or [])
        ticket.tell(None)

    # the engine thread's side

    def _serve(self) -> None:
        running: dict[Work, Ticket] = {}
        while self._busy(running):
            running |= self._step(self._take(running))
            running = self._step(running)

    def _busy(self, running: Mapping[Work, Ticket]) -> bool:
        """Wait for something to do; False when closing, and nothing is left."""
        with self._changed:
            if not (running or any(self._waiting)):
                self._engine.release()
            while not (running or any(self._waiting) or self._closing):
                self._changed.wait()
            return bool(running or any(self._waiting))

    def _take(self, running: dict[Work, Ticket]) -> dict[Work, Ticket]:
        """Waiting works that start now, beside the running ones."""
        with self._changed:
            budget = min(self._engine.max_batch_tokens, self.interleave_tokens if running else sys.maxsize)
            taken: dict[Work, Ticket] = {}
            seen: set[Any] = set()

            def may_start(work: Work) -> bool:
                return fits(work, (*running, *taken), most=self._engine.max_past_tokens)

            while queues := [queue for queue in self._waiting if queue and may_start(queue[0][1])]:
                queue = min(queues, key=lambda queue: queue[0][0])
                _, work, ticket = queue[0]
                new = {row.key: row.pending for row in work.rows if row.key not in seen}
                budget -= sum(new.values())
                if taken and new and budget < 0:
                    break
                queue.popleft()
                taken[work] = ticket
                seen.update(new)
                ticket.waiting -= 1
                self._waiting_tokens -= work.tokens
                ticket.started = ticket.started or time.monotonic()
            return taken

    def _step(self, works: dict[Work, Ticket]) -> dict[Work, Ticket]:
        """One step of works whose requests are not over; those that are to go on."""
        _drop(works)
        if not works:
            return {}
        try:
            finished, unfinished = self._engine.step(list(works))
        except Exception:  # whatever a backend raises, the thread must live on
            logger.exception("a step of %d works failed", len(works))
            finished, unfinished = self._alone(works)
        for work in (*finished, *unfinished):
            self._tell(work, works[work])
        for work in finished:
            self._finished(works[work])
        going_on = {work: works[work] for work in unfinished}
        _drop(works)
        return going_on

    def _alone(self, works: Mapping[Work, Ticket]) -> tuple[list[Work], list[Work]]:
        """Repeat a failed step work by work; a work that was alone has had its try."""
        finished: list[Work] = []
        unfinished: list[Work] = []
        for work, ticket in works.items():
            if len(works) == 1:
                self._fail(ticket)
            elif not ticket.over:
                try:
                    done, more = self._engine.step([work])
                except Exception:  # as in `_step`
                    logger.exception("task %r failed on one input", work.task)
                    self._fail(ticket)
                else:
                    finished += done
                    unfinished += more
        return finished, unfinished

    def _tell(self, work: Work, ticket: Ticket) -> None:
        """Tell whoever reads along what a step brought."""
        if ticket.loop is not None:
            try:
                ticket.tell(self._engine.emit(work))
            except Exception:  # as in `_step`
                logger.exception("task %r has events that cannot be told", work.task)
                self._fail(ticket)

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


def _drop(works: dict[Work, Ticket]) -> None:
    """Forget works whose requests are over. What a backend keeps for them is freed, whoever still holds the works."""
    for work in [work for work, ticket in works.items() if ticket.over]:
        del works[work]
        work.rows = []


def _closed() -> CapacityError:
    return CapacityError("the server is closing")
