"""Many requests into few trunk passes: one engine thread and one bounded queue a trunk. Knows no HTTP and no torch.

Invariants (tests/test_scheduler.py holds them):

1.  Every accepted work is answered once: its request gets a prediction for each of its works, in the order given, or
    one error. Nothing is lost, nothing is answered twice.
2.  A request is accepted whole or refused whole. It is refused with OverloadedError while its tokens do not fit beside
    those that wait, and always with TooLargeError if they would not fit into an empty queue: sending it again later
    cannot help, so the answer does not depend on the load. OverloadedError says in how many seconds what waits now will
    have drained, at the rate of late. While nothing more would fit behind those that wait and are being prepared, a
    request is refused before it is prepared (`refuse`: before it is read), so that refusing costs little.
3.  A round takes waiting works and steps them alone; then every running work (of many steps, those that just began
    among them) takes one step. What a step finished is delivered, and what it has to read along is told, before the
    next one. So a work that comes while others run waits for the step under way, and for one of the running works if
    that was one of new works; then its own step comes.
    Which works start is for `mtserve.waiting`: fair among tasks, equal rows together. A round takes what fits the
    engine's token budget, or `interleave_tokens` while others run. It begins the moment the engine is free; with
    `max_wait_ms`, while nothing runs and the budget is not full, not before the oldest work has waited so long.
4.  The waiting works of a request that was withdrawn (cancelled, timed out, failed) never start, its running ones take
    no further step, and the scheduler holds neither.
5.  When a step fails, none of its works has advanced, and it is repeated in halves; a work that fails alone fails its
    own request, with a MtserveError that says nothing of the inside. The thread lives on.
6.  A request that is not answered by its deadline gets DeadlineError; works that still wait then never start.
7.  After `close` nothing is accepted; what was accepted is answered within its bound, else fails with CapacityError.
8.  What a step holds depends on the order of acceptance and on when the engine was free, on nothing else.
9.  The running works have room (`tasks.work.room`) in the engine's `max_past_tokens`, and what was kept for others is
    freed when nothing runs.
10. After MUCH tokens, `tidy` is called from the engine's thread, between two rounds: once it was idle for IDLE_S, or
    TIDY_S after the last time.
11. A call for `between` runs where the engine steps, while it does not, before the thread ends.
12. The events of a request that is read along come in order and complete, its error after them; what reads them never
    holds up the engine.

The tokenizer runs in a pool of threads before a request is queued, and decoding after its last step, so that the event
loop and the engine thread do neither.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from mtserve.errors import CapacityError, DeadlineError, MtserveError, OverloadedError, TooLargeError
from mtserve.observer import Observer, Reason
from mtserve.stepper import Stepper, stepped
from mtserve.tasks.work import Work, fits, named
from mtserve.text_pool import TextPool
from mtserve.ticket import Ticket, closed, late
from mtserve.waiting import Rate, Waiting

DEFAULT_QUEUE_TOKENS = 262_144
DEFAULT_TIMEOUT_S = 60.0
INTERLEAVE_TOKENS = 512
IDLE_S, TIDY_S, MUCH = 2.0, 10.0, 16_384
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Scheduler:
    """One engine, its thread and its queue."""

    def __init__(
        self,
        engine: Stepper,
        *,
        max_queue_tokens: int = DEFAULT_QUEUE_TOKENS,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        interleave_tokens: int = INTERLEAVE_TOKENS,
        max_wait_ms: float = 0.0,
        weights: Mapping[str, float] | None = None,
        pool_threads: int = 2,
        observer: Observer | None = None,
        tidy: Callable[[], Any] = lambda: None,
    ) -> None:
        self.max_queue_tokens = max_queue_tokens
        self.timeout_s = timeout_s
        self.interleave_tokens = interleave_tokens
        self.max_wait_s = max_wait_ms / 1000
        self._engine = engine
        self._observer = observer or Observer()
        self._tidy, self._since, self._tidied = tidy, 0, time.monotonic()  # tokens since then; the engine's thread's
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: Waiting[Ticket] = Waiting(weights)
        self._rate = Rate()
        self._open: set[Ticket] = set()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._texts = TextPool(pool_threads)
        self._thread = threading.Thread(target=self._serve, name="mtserve-engine", daemon=True)
        self._thread.start()

    async def prepare(
        self,
        asked: Mapping[str, Mapping[str, Any] | None],
        items: Sequence[Any],
        *,
        deadline: float,
        stream: bool = False,
    ) -> dict[str, list[Work]]:
        """`engine.prepare_tasks` in the pool. Raises what that raises, what `refuse` raises, or DeadlineError."""
        task = named(next(iter(asked)))
        self.refuse(task)
        call = partial(self._engine.prepare_tasks, asked, items, stream=stream)
        try:
            return await self._texts.prepare(call, deadline=deadline)
        except DeadlineError:
            self._observer.dropped(task, "deadline")
            raise

    def refuse(self, task: str) -> None:
        """Raise OverloadedError or CapacityError if a request would not be accepted, however small it is. Counts what
        is being prepared; for the event loop's thread."""
        with self._changed:
            self._refuse(task, 0, coming=self._texts.coming)

    def accept(self, works: Sequence[Work], *, deadline: float | None = None, stream: bool = False) -> Ticket:
        """Queue a request; one to be read along by `Ticket.events` is queued from the event loop that will read.

        Raises OverloadedError, TooLargeError, or CapacityError when closing; nothing runs then.
        """
        deadline = time.monotonic() + self.timeout_s if deadline is None else deadline
        ticket = Ticket(self.withdraw, works, deadline=deadline, stream=stream)
        with self._changed:
            self._refuse(works[0].task if works else "", sum(work.tokens for work in ticket.works))
            self._open.add(ticket)
            if not ticket.works:
                self._settle(ticket, result=[])
                return ticket
            for work in ticket.works:
                self._waiting.put(work, ticket)
            self._observer.waiting(rows=len(self._waiting), tokens=self._waiting.tokens)
            self._changed.notify()
        return ticket

    async def submit(self, works: Sequence[Work], *, deadline: float | None = None) -> list[Any]:
        """Predictions of works, in order. Raises as `accept` and `Ticket.result` do."""
        return await self.accept(works, deadline=deadline).result()

    def withdraw(self, ticket: Ticket) -> None:
        """Drop what is left of a request; an unsettled one fails."""
        with self._changed:
            late_now = time.monotonic() >= ticket.deadline - 0.001  # a timer may be a little early
            error = late() if late_now else CapacityError("the request was withdrawn")
            self._settle(ticket, error=error, reason="deadline" if late_now else "withdrawn")

    def between(self, call: Callable[[], T]) -> Future[T]:
        """What a call gives or raises, between two steps. Raises CapacityError when closing."""
        called: Future[T] = Future()
        with self._changed:
            if self._closing:
                raise closed()
            self._calls.append((call, called))
            self._changed.notify()
        return called

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
                    self._settle(ticket, error=closed(), reason="closing")
        self._texts.close(wait=drained)

    def _refuse(self, task: str, tokens: int, *, coming: int = 0) -> None:
        """Raise if that many tokens cannot be queued now, or not behind those that are coming."""
        waiting, most = self._waiting.tokens + coming, self.max_queue_tokens
        if self._closing:
            self._observer.dropped(task, "closing")
            raise closed()
        if tokens > most:
            self._observer.dropped(task, "too_large")
            raise TooLargeError(f"the request has {tokens} tokens; at most {most} are allowed")
        if waiting + max(tokens, 1) > most:
            self._observer.dropped(task, "overloaded")
            when = self._rate.seconds(waiting)
            found = f"{waiting} tokens wait already, and at most {most} may; try again in {when} s"
            raise OverloadedError(found, retry_after_s=when)

    def _settle(
        self,
        ticket: Ticket,
        *,
        result: list[Any] | None = None,
        error: BaseException | None = None,
        reason: Reason | None = None,
    ) -> None:
        """Answer a request once, and forget what still waits of it. Called with the lock held."""
        if ticket.future.done():
            return
        ticket.over = True
        self._open.discard(ticket)
        if self._waiting.drop(ticket):
            self._observer.waiting(rows=len(self._waiting), tokens=self._waiting.tokens)
        if reason is not None:
            self._observer.dropped(ticket.works[0].task, reason)
        if error is not None:
            ticket.future.set_exception(error)
        else:
            ticket.future.set_result(result or [])
        ticket.tell(None)

    def _serve(self) -> None:
        running: dict[Work, Ticket] = {}
        while self._busy(running):
            if self._call() and not running:
                continue
            taken, began = self._take(running), time.monotonic()
            tokens = sum(work.tokens for work in taken)
            running |= self._step(taken)
            running = self._step(running)
            self._rate.add(tokens, time.monotonic() - began)
            self._since += tokens
            if self._since >= MUCH and began - self._tidied >= TIDY_S:
                self._tidy_up()

    def _busy(self, running: Mapping[Work, Ticket]) -> bool:
        """Wait for something to do; False when closing, and nothing is left."""
        with self._changed:
            if not (running or self._waiting):
                self._engine.release()
            while not (running or self._closing or self._calls) and (left := self._wait_s()) != 0:
                worked = left is None and self._since >= MUCH
                if not self._changed.wait(IDLE_S if worked else left) and worked:
                    break
            else:
                return bool(running or self._waiting or self._calls)
        self._tidy_up()
        return self._busy(running)

    def _call(self) -> bool:
        """Run the call that has waited longest; whether there was one."""
        with self._changed:
            if not self._calls:
                return False
            call, called = self._calls.popleft()
        try:
            called.set_result(self._engine.call(call))
        except Exception as error:  # it is for whoever waits for the call
            called.set_exception(error)
        return True

    def _tidy_up(self) -> None:  # without the lock, as it may take a while
        self._since, self._tidied = 0, time.monotonic()
        self._tidy()

    def _wait_s(self) -> float | None:
        """Seconds until what waits is to start, if the engine is free; None where nothing waits."""
        oldest = self._waiting.oldest()
        if oldest is None or self._waiting.tokens >= self._engine.max_batch_tokens:
            return None if oldest is None else 0.0
        return max(0.0, oldest.accepted + self.max_wait_s - time.monotonic())

    def _take(self, running: Mapping[Work, Ticket]) -> dict[Work, Ticket]:
        """Waiting works that start now, beside the running ones."""
        now = time.monotonic()
        with self._changed:
            for ticket in [ticket for ticket in self._open if ticket.deadline <= now]:
                self._settle(ticket, error=late(), reason="deadline")
            most = self._engine.max_past_tokens
            budget = min(self._engine.max_batch_tokens, self.interleave_tokens if running else sys.maxsize)
            taken = dict(self._waiting.take(budget, lambda work, new: fits(work, (*running, *new), most=most)))
            for work, ticket in taken.items():
                if ticket.started is None:
                    ticket.started = now
                    self._observer.started(work.task, wait_s=now - ticket.accepted)
            self._observer.waiting(rows=len(self._waiting), tokens=self._waiting.tokens)
            return taken

    def _step(self, works: dict[Work, Ticket]) -> dict[Work, Ticket]:
        """One step of works whose requests are not over; those that are to go on."""
        _drop(works)
        if not works:
            return {}
        finished, unfinished = stepped(
            self._engine, list(works), over=lambda work: works[work].over, failed=lambda work: self._fail(works[work])
        )
        for work in (*finished, *unfinished):
            self._tell(work, works[work])
        for work in finished:
            self._finished(works[work])
        going_on = {work: works[work] for work in unfinished}
        _drop(works)
        return going_on

    def _tell(self, work: Work, ticket: Ticket) -> None:
        """Tell whoever reads along what a step brought."""
        if ticket.loop is not None:
            try:
                ticket.tell(self._engine.emit(work))
            except Exception:  # as in `_stepped`
                logger.exception("task %r has events that cannot be told", work.task)
                self._fail(ticket)

    def _fail(self, ticket: Ticket) -> None:
        with self._changed:
            failed = MtserveError("the model failed on this request; the server's log has the reason")
            self._settle(ticket, error=failed, reason="failed")

    def _finished(self, ticket: Ticket) -> None:
        """Count a finished work; decode when it was the request's last."""
        ticket.unfinished -= 1
        with self._changed:
            if ticket.unfinished or ticket.over:
                return
            decoded = self._texts.submit(lambda: [self._engine.finish(work) for work in ticket.works])
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
