"""The scheduler's invariants, numbered as in its docstring, on an engine that counts instead of computing."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtserve.errors import CapacityError, DeadlineError, InputError, MtserveError, OverloadedError, TooLargeError
from mtserve.rows import Past, make_row
from mtserve.scheduler import Scheduler
from mtserve.stepper import InThread
from mtserve.tasks.base import Example, Parameters
from mtserve.tasks.work import Work
from mtserve.ticket import Ticket


class Job(Example):
    """An input of the fake engine: `tokens` of content `text` (equal texts are equal rows), finished after `steps`.

    poison    a step with it fails
    broken    it cannot be decoded after its last step
    reserved  tokens that are kept for it while it runs
    """

    text: int
    tokens: int = 4
    steps: int = 1
    poison: bool = False
    broken: bool = False
    reserved: int = 0


class FakeEngine:
    """Answers each job with its text and the number of steps that it took; `gate` holds steps back while cleared."""

    thread = "mtserve-engine"

    def __init__(self, *, max_batch_tokens: int = 32, max_past_tokens: int = 100) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.max_past_tokens = max_past_tokens
        self.batches: list[list[Work]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.finished: list[Work] = []
        self.threads: set[str] = set()
        self.releases = 0

    def prepare_tasks(
        self, asked: Mapping[str, Mapping[str, Any] | None], items: Sequence[Any], *, stream: bool = False
    ) -> dict[str, list[Work]]:
        self.threads.add(threading.current_thread().name)
        if any(item.tokens > 100 for item in items):
            raise InputError("too long for this task")
        return {name: [work_of(item) for item in items] for name in asked}

    def call(self, call: Callable[[], Any]) -> Any:
        assert threading.current_thread().name == self.thread
        return call()

    def release(self) -> None:
        self.releases += 1

    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        assert self.gate.wait(10)
        assert works
        assert len(set(works)) == len(works)
        assert threading.current_thread().name == self.thread
        assert all(work.rows for work in works)
        self.batches.append(list(works))
        if any(job_of(work).poison for work in works):
            raise ArithmeticError("secret detail of the inside")
        finished: list[Work] = []
        unfinished: list[Work] = []
        for work in works:
            job = job_of(work)
            work.state = (work.state or 0) + 1
            assert work.state <= job.steps
            if work.state == job.steps:
                work.rows, work.error = [], InputError("cannot be decoded") if job.broken else None
                finished.append(work)
            else:
                work.rows = [row.extended([job.text], past=Past(len(row))) for row in work.rows]
                unfinished.append(work)
        return finished, unfinished

    def emit(self, work: Work) -> list[Any]:
        assert threading.current_thread().name == "mtserve-engine"
        return [] if work.error else [(job_of(work).text, work.state)]

    def finish(self, work: Work) -> Any:
        self.finished.append(work)
        if work.error:
            raise work.error
        return job_of(work).text, work.state


def job_of(work: Work) -> Job:
    assert isinstance(work.example, Job)
    return work.example


def work_of(job: Job) -> Work:
    ids = [job.text] * job.tokens
    row = make_row(ids, [0] * len(ids), [(0, 0)] * len(ids), [0] * len(ids))
    return Work("roomy" if job.reserved else "fake", job, Parameters(), [row], reserved=job.reserved)


def works_of(*jobs: Job) -> list[Work]:
    return [work_of(job) for job in jobs]


def run(check: Callable[[Scheduler, FakeEngine], Awaitable[None]], engine: FakeEngine, **limits: Any) -> Scheduler:
    """Run a check over a fresh scheduler, close it, and see that its thread ended and nothing was left."""
    scheduler = Scheduler(engine, **limits)

    async def main() -> None:
        await check(scheduler, engine)

    try:
        asyncio.run(main())
    finally:
        engine.gate.set()
        scheduler.close(timeout_s=5)
    assert not scheduler._thread.is_alive()
    assert scheduler._waiting.tokens == 0
    assert not len(scheduler._waiting)
    assert not scheduler._waiting._of
    assert not scheduler._waiting._alike
    assert not scheduler._open
    return scheduler


async def until(true: Callable[[], object]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen within two seconds")


parts: Any = {"text": st.integers(0, 6), "tokens": st.integers(1, 12), "steps": st.integers(1, 4)}
jobs = st.builds(Job, **parts, poison=st.booleans(), broken=st.booleans())
healthy = st.builds(Job, **parts)
roomy = st.builds(Job, **parts, reserved=st.one_of(st.just(0), st.integers(1, 40)))


@settings(max_examples=60)
@given(requests=st.lists(st.lists(roomy, max_size=5), max_size=8), budget=st.sampled_from([1, 8, 30, 1000]))
def test_1_every_work_is_answered_once_in_order(requests: list[list[Job]], budget: int) -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        answers = await asyncio.gather(*(scheduler.submit(works_of(*request)) for request in requests))
        assert answers == [[(job.text, job.steps) for job in request] for request in requests]
        total = sum(len(request) for request in requests)
        assert len(engine.finished) == len(set(engine.finished)) == total
        assert sum(map(len, engine.batches)) == sum(job.steps for request in requests for job in request)

    run(check, FakeEngine(max_batch_tokens=budget))


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_2_accepted_whole_or_refused_whole(sizes: list[int]) -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        plug = asyncio.ensure_future(scheduler.submit(works_of(Job(text=9))))
        await until(lambda: scheduler._waiting.tokens == 0 and scheduler._open)
        queued, accepted, refused = 0, [], []
        for size in sizes:
            halves = works_of(Job(text=1, tokens=size), Job(text=2, tokens=size))
            if 2 * size > 100:
                with pytest.raises(TooLargeError):
                    scheduler.accept(halves)
                refused += halves
            elif queued + 2 * size > 100:
                with pytest.raises(OverloadedError):
                    scheduler.accept(halves)
                refused += halves
            else:
                accepted.append(scheduler.accept(halves))
                queued += 2 * size
            assert scheduler._waiting.tokens == queued
        engine.gate.set()
        await plug
        assert [await ticket.result() for ticket in accepted] == [[(1, 1), (2, 1)]] * len(accepted)
        assert not {work for batch in engine.batches for work in batch} & set(refused)

    run(check, FakeEngine(), max_queue_tokens=100)


def test_2_a_full_queue_refuses_before_tokenising() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        plug = asyncio.ensure_future(scheduler.submit(works_of(Job(text=1))))
        await until(lambda: scheduler._waiting.tokens == 0 and scheduler._open)
        filler = scheduler.accept(works_of(Job(text=2, tokens=10)))
        with pytest.raises(OverloadedError):
            await scheduler.prepare({"fake": None}, [Job(text=3)], deadline=time.monotonic() + 5)
        assert not engine.threads
        engine.gate.set()
        await asyncio.gather(plug, filler.result())

    run(check, FakeEngine(), max_queue_tokens=10)


def test_2_what_is_being_prepared_counts_as_much_as_requests_of_late_had() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        soon = time.monotonic() + 10
        for _ in range(200):  # the average is there
            await scheduler.submit(
                (await scheduler.prepare({"fake": None}, [Job(text=1, tokens=10)], deadline=soon))["fake"]
            )
        held = threading.Event()
        prepare_tasks = engine.prepare_tasks

        def held_up(*args: Any, **more: Any) -> Any:
            assert held.wait(10)
            return prepare_tasks(*args, **more)

        engine.prepare_tasks = held_up
        under_way = [
            asyncio.ensure_future(scheduler.prepare({"fake": None}, [Job(text=2, tokens=10)], deadline=soon))
            for _ in range(30)
        ]
        await asyncio.sleep(0)
        refused = [one for one in under_way if one.done()]
        assert len(refused) == 20  # 100 tokens are there already
        assert all(isinstance(one.exception(), OverloadedError) for one in refused)
        with pytest.raises(OverloadedError):
            scheduler.refuse("fake")
        held.set()
        assert len(await asyncio.gather(*(one for one in under_way if one not in refused))) == 10
        scheduler.refuse("fake")  # nothing is coming any more: no error

    run(check, FakeEngine(), max_queue_tokens=100)


@settings(max_examples=100)
@given(
    first=st.lists(roomy, min_size=1, max_size=20),
    budget=st.sampled_from([1, 8, 30]),
    beside=st.sampled_from([1, 6, 100]),
)
def test_3_and_9_rounds_hold_what_fits_in_order(first: list[Job], budget: int, beside: int) -> None:
    """With everything queued beforehand: new works within their limits, alone; then all running ones."""

    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        plug = asyncio.ensure_future(scheduler.submit(works_of(Job(text=90))))
        await until(lambda: scheduler._waiting.tokens == 0 and scheduler._open)
        tickets = [scheduler.accept(works_of(job)) for job in first]
        engine.gate.set()
        await plug
        await asyncio.gather(*(ticket.result() for ticket in tickets))
        check_rounds(engine.batches[1:], [ticket.works[0] for ticket in tickets], budget=budget, beside=beside)

    run(check, FakeEngine(max_batch_tokens=budget, max_past_tokens=50), interleave_tokens=beside)


def check_rounds(batches: list[list[Work]], accepted: list[Work], *, budget: int, beside: int) -> None:
    left = {work: job_of(work).steps for work in accepted}
    running: list[Work] = []
    started: list[Work] = []
    for batch in batches:
        new = [work for work in batch if left[work] == job_of(work).steps and work not in started]
        if new:
            assert new == batch
            adding = [work for at, work in enumerate(new) if distinct(new[: at + 1]) > distinct(new[:at])]
            assert distinct(new) <= (min(budget, beside) if running else budget) or len(adding) == 1
            kept = [job_of(work).reserved for work in (*running, *new) if job_of(work).reserved]
            assert len(kept) * max(kept, default=0) <= 50
            started += new
            running += new
        else:
            assert batch == running
        for work in batch:
            left[work] -= 1
        running = [work for work in running if left[work]]
    assert not any(left.values())
    in_order = [work for work in started if job_of(work).reserved]
    assert in_order == [work for work in accepted if job_of(work).reserved]


def distinct(works: Sequence[Work]) -> int:
    return sum(len(row) for row in {row.key: row for work in works for row in work.prompt}.values())


def test_3_equal_rows_share_a_step_whatever_the_budget() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        await scheduler.submit(works_of(*[Job(text=5, tokens=30)] * 50))
        assert [len(batch) for batch in engine.batches] == [50]

    run(check, FakeEngine(max_batch_tokens=1))


def test_3_new_works_join_between_the_steps_of_others() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        long = asyncio.ensure_future(scheduler.submit(works_of(Job(text=1, steps=200))))
        await until(lambda: scheduler._open and scheduler._waiting.tokens == 0)
        short = asyncio.ensure_future(scheduler.submit(works_of(Job(text=2), Job(text=3, steps=2))))
        await until(lambda: scheduler._waiting.tokens)
        engine.gate.set()
        assert await short == [(2, 1), (3, 2)]
        assert await long == [(1, 200)]
        texts = [[job_of(work).text for work in batch] for batch in engine.batches[:6]]
        assert texts == [[1], [1], [2, 3], [1, 3], [1], [1]]  # the second [1] was under way in the same round

    run(check, FakeEngine())


def test_3_a_classification_waits_for_the_decode_step_under_way_and_no_other() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        one_step = threading.Semaphore(0)
        step = engine.step

        def slow(works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
            assert one_step.acquire(timeout=10)
            return step(works)

        engine.step = slow  # type: ignore[method-assign]
        generations = [scheduler.accept(works_of(Job(text=at, steps=10**6, reserved=10))) for at in range(8)]
        for steps in range(2, 6):
            one_step.release()
            await until(lambda steps=steps: len(engine.batches) == steps - 1)  # type: ignore[misc]
            await asyncio.sleep(0.01)  # the next step, of eight generations, is under way now
        classification = asyncio.ensure_future(scheduler.submit(works_of(Job(text=50))))
        await until(lambda: scheduler._waiting.tokens)
        before = len(engine.batches)
        one_step.release()  # of the step under way
        await until(lambda: len(engine.batches) == before + 1)
        assert not classification.done()
        one_step.release()  # its own
        assert await classification == [(50, 1)]
        assert [len(batch) for batch in engine.batches[before:]] == [8, 1]
        for ticket in generations:
            ticket.withdraw()
        one_step.release(2)

    run(check, FakeEngine())


def test_3_a_flood_of_others_leaves_a_generation_its_steps() -> None:
    """Beside a running work a round takes no more than `interleave_tokens`, else all that the engine's budget holds."""

    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        generation = scheduler.accept(works_of(Job(text=99, steps=12, reserved=20)))
        await until(lambda: scheduler._waiting.tokens == 0)
        flood = [scheduler.accept(works_of(Job(text=at, tokens=8))) for at in range(40)]
        engine.gate.set()
        await asyncio.gather(*(ticket.result() for ticket in [generation, *flood]))
        sizes = [len(batch) for batch in engine.batches]
        assert sizes == [1, 1] + [2, 1] * 10 + [20]

    run(check, FakeEngine(max_batch_tokens=1000), interleave_tokens=16)


def test_9_works_that_need_no_room_pass_by_those_that_wait_for_it() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        first = scheduler.accept(works_of(Job(text=1, steps=50, reserved=20)))
        await until(lambda: scheduler._waiting.tokens == 0)
        second = scheduler.accept(works_of(Job(text=2, steps=3, reserved=60)))  # no room before the first one's end
        third = scheduler.accept(works_of(Job(text=3, steps=3, reserved=10)))  # would fit, but it came later
        plain = scheduler.accept(works_of(Job(text=4)))
        engine.gate.set()
        assert await plain.result() == [(4, 1)]
        await asyncio.gather(first.result(), second.result(), third.result())
        assert plain.started < second.started < third.started  # type: ignore[operator]
        together = [{job_of(work).text for work in batch} for batch in engine.batches]
        assert all(not {1, 2} <= texts and not {2, 3} <= texts for texts in together)
        assert engine.releases

    run(check, FakeEngine())


@settings(max_examples=40)
@given(cancelled=st.lists(st.booleans(), min_size=1, max_size=8))
def test_4_works_of_a_cancelled_request_never_start(cancelled: list[bool]) -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        plug = asyncio.ensure_future(scheduler.submit(works_of(Job(text=9))))
        await until(lambda: scheduler._open and scheduler._waiting.tokens == 0)
        batches = [works_of(Job(text=1), Job(text=2, tokens=7)) for _ in cancelled]
        calls = [asyncio.ensure_future(scheduler.submit(works)) for works in batches]
        await asyncio.sleep(0)
        for call, drop in zip(calls, cancelled, strict=True):
            if drop:
                call.cancel()
        await until(lambda: scheduler._waiting.tokens == 11 * cancelled.count(False))
        engine.gate.set()
        await plug
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result, drop in zip(results, cancelled, strict=True):
            assert isinstance(result, asyncio.CancelledError) if drop else result == [(1, 1), (2, 1)]
        started = {work for batch in engine.batches for work in batch}
        for works, drop in zip(batches, cancelled, strict=True):
            assert started.isdisjoint(works) if drop else started.issuperset(works)

    run(check, FakeEngine())


def test_4_running_works_of_a_cancelled_request_stop_between_steps() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        call = asyncio.ensure_future(scheduler.submit(works_of(Job(text=1, steps=10**9))))
        await until(lambda: len(engine.batches) > 3)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await scheduler.submit(works_of(Job(text=2))) == [(2, 1)]
        count = len(engine.batches)
        await asyncio.sleep(0.02)
        assert len(engine.batches) == count

    run(check, FakeEngine())


def test_4_a_work_that_is_withdrawn_during_the_step_of_others_takes_none_after_it() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        step, held = engine.step, threading.Event()

        def slow(works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
            assert job_of(works[0]).text == 1 or held.wait(10)
            return step(works)

        engine.step = slow  # type: ignore[method-assign]
        long = scheduler.accept(works_of(Job(text=1, steps=10**9)))
        await until(lambda: len(engine.batches) > 3)
        new = scheduler.accept(works_of(Job(text=2)))
        await until(lambda: scheduler._waiting.tokens == 0)
        count = len(engine.batches)
        long.withdraw()
        held.set()
        assert await new.result() == [(2, 1)]
        await until(lambda: not long.works[0].rows)
        assert [[job_of(work).text for work in batch] for batch in engine.batches[count:]] == [[2]]

    run(check, FakeEngine())


@pytest.mark.parametrize("beside", [False, True])
def test_4_what_was_kept_for_a_withdrawn_work_is_free_at_once(beside: bool) -> None:
    """Without a garbage collection, be the engine idle or busy, and although the caller still holds the work."""

    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        other = scheduler.accept(works_of(Job(text=1, steps=10**9))) if beside else None
        held = [scheduler.accept(works_of(Job(text=2, steps=10**9, reserved=100)))]
        await until(lambda: held[0].works[0].rows[0].past)
        gone = weakref.ref(held[0].works[0])
        held[0].withdraw()
        await until(lambda: not held[0].works[0].rows)
        held.clear()
        await until(lambda: gone() is None or engine.batches.clear())
        assert await scheduler.submit(works_of(Job(text=3, reserved=100))) == [(3, 1)]  # its room is free too
        if other is not None:
            other.withdraw()

    gc.disable()
    try:
        run(check, FakeEngine())
    finally:
        gc.enable()


@settings(max_examples=60)
@given(requests=st.lists(st.lists(jobs, min_size=1, max_size=4), min_size=1, max_size=6))
def test_5_a_poison_work_fails_its_own_request_only(requests: list[list[Job]]) -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        calls = [scheduler.submit(works_of(*request)) for request in requests]
        for request, answer in zip(requests, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if any(job.poison for job in request):
                assert type(answer) is MtserveError
                assert "secret" not in str(answer)
            elif any(job.broken for job in request):
                assert isinstance(answer, InputError)
            else:
                assert answer == [(job.text, job.steps) for job in request]
        assert await scheduler.submit(works_of(Job(text=3))) == [(3, 1)]

    run(check, FakeEngine(max_batch_tokens=1000))


def test_5_what_was_kept_for_a_request_that_failed_is_free() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        ticket = scheduler.accept(works_of(Job(text=1, steps=9, poison=True), Job(text=2, steps=9)))
        with pytest.raises(MtserveError, match="the model failed"):
            await ticket.result()
        await until(lambda: not any(work.rows for work in ticket.works))

    run(check, FakeEngine())


def test_5_a_failing_decode_fails_its_own_request_only() -> None:
    class Broken(FakeEngine):
        def finish(self, work: Work) -> Any:
            if job_of(work).text == 13:
                raise KeyError("inside")
            return super().finish(work)

    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        with pytest.raises(KeyError):
            await scheduler.submit(works_of(Job(text=13)))
        assert await scheduler.submit(works_of(Job(text=3))) == [(3, 1)]

    run(check, Broken())


def test_6_a_late_request_gets_a_deadline_error_and_never_starts() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        running = asyncio.ensure_future(scheduler.submit(works_of(Job(text=1))))
        await until(lambda: scheduler._open and scheduler._waiting.tokens == 0)
        waiting = works_of(Job(text=2))
        with pytest.raises(DeadlineError):
            await scheduler.submit(waiting)
        with pytest.raises(DeadlineError):
            await running
        engine.gate.set()
        assert await scheduler.submit(works_of(Job(text=3)), deadline=time.monotonic() + 5) == [(3, 1)]
        assert all(waiting[0] not in batch for batch in engine.batches)

    run(check, FakeEngine(), timeout_s=0.05)


def test_7_close_drains_and_then_refuses() -> None:
    engine = FakeEngine(max_batch_tokens=4)
    scheduler = Scheduler(engine)

    async def main() -> None:
        calls = [asyncio.ensure_future(scheduler.submit(works_of(Job(text=at, steps=3)))) for at in range(6)]
        await asyncio.sleep(0)
        await asyncio.to_thread(scheduler.close)
        assert await asyncio.gather(*calls) == [[(at, 3)] for at in range(6)]
        with pytest.raises(CapacityError, match="closing"):
            await scheduler.submit(works_of(Job(text=1)))
        with pytest.raises(CapacityError, match="closing"):
            await scheduler.prepare({"fake": None}, [], deadline=time.monotonic() + 1)

    asyncio.run(main())
    assert not scheduler._thread.is_alive()
    scheduler.close()


def test_7_close_gives_up_after_its_bound() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    scheduler = Scheduler(engine)

    async def main() -> None:
        stuck = [asyncio.ensure_future(scheduler.submit(works_of(Job(text=at)))) for at in range(2)]
        await until(lambda: scheduler._open)
        began = time.monotonic()
        await asyncio.to_thread(scheduler.close, timeout_s=0.05)
        assert time.monotonic() - began < 2
        for answer in await asyncio.gather(*stuck, return_exceptions=True):
            assert isinstance(answer, CapacityError)

    asyncio.run(main())
    engine.gate.set()
    scheduler._thread.join(5)
    assert not scheduler._thread.is_alive()


def test_8_the_same_arrivals_make_the_same_steps() -> None:
    def steps() -> list[list[int]]:
        engine = FakeEngine(max_batch_tokens=20)

        async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
            engine.gate.clear()
            tickets: list[Ticket] = []
            for at in range(30):
                tickets.append(scheduler.accept(works_of(Job(text=at % 7, tokens=1 + at % 9, steps=1 + at % 3))))
                await until(lambda: scheduler._waiting.tokens < sum(w.tokens for t in tickets for w in t.works))
            engine.gate.set()
            for ticket in tickets:
                await ticket.result()

        run(check, engine)
        return [[job_of(work).text for work in batch] for batch in engine.batches]

    assert steps() == steps()


async def read(ticket: Ticket, into: list[Any]) -> None:
    async for event in ticket.events():
        into.append(event)


@settings(max_examples=40)
@given(requests=st.lists(jobs, min_size=1, max_size=6))
def test_10_events_come_in_order_and_complete_then_the_error(requests: list[Job]) -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        tickets = [scheduler.accept(works_of(job), stream=True) for job in requests]
        events: list[list[Any]] = [[] for _ in tickets]
        readers = [read(ticket, into) for ticket, into in zip(tickets, events, strict=True)]
        for job, error, told in zip(
            requests, await asyncio.gather(*readers, return_exceptions=True), events, strict=True
        ):
            if job.poison:
                assert type(error) is MtserveError
                assert told == []
            elif job.broken:
                assert isinstance(error, InputError)
                assert told == [(job.text, step) for step in range(1, job.steps)]
            else:
                assert error is None
                assert told == [(job.text, step) for step in range(1, job.steps + 1)]

    run(check, FakeEngine(max_batch_tokens=1000))


def test_10_an_event_is_there_before_the_others_take_a_step() -> None:
    """The first token of a new generation is told after its own step, while the step of the running ones waits."""

    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        step = engine.step
        held = threading.Event()

        def slow(works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
            assert len(works) == 1 or held.wait(10)
            return step(works)

        engine.step = slow  # type: ignore[method-assign]
        long = scheduler.accept(works_of(Job(text=1, steps=10**9)))
        await until(lambda: len(engine.batches) > 3)
        new = scheduler.accept(works_of(Job(text=2, steps=3)), stream=True)
        events = new.events()
        assert await anext(events) == (2, 1)
        assert [job_of(work).text for work in engine.batches[-1]] == [2]
        held.set()
        assert [event async for event in events] == [(2, 2), (2, 3)]
        long.withdraw()

    run(check, FakeEngine())


def test_10_closing_the_events_stops_the_work() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        ticket = scheduler.accept(works_of(Job(text=1, steps=10**9)), stream=True)
        events = ticket.events()
        assert [await anext(events), await anext(events)] == [(1, 1), (1, 2)]
        await events.aclose()
        assert await scheduler.submit(works_of(Job(text=2))) == [(2, 1)]
        count = len(engine.batches)
        await asyncio.sleep(0.02)
        assert len(engine.batches) == count

    run(check, FakeEngine())


def test_10_late_and_empty_streams_end() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        assert [event async for event in scheduler.accept([], stream=True).events()] == []
        engine.gate.clear()
        ticket = scheduler.accept(works_of(Job(text=1)), stream=True)
        with pytest.raises(DeadlineError):
            await anext(ticket.events())

    run(check, FakeEngine(), timeout_s=0.05)


def test_10_events_that_cannot_be_told_fail_their_own_request_only() -> None:
    class Mute(FakeEngine):
        def emit(self, work: Work) -> list[Any]:
            raise KeyError("secret detail of the inside")

    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        for steps in (1, 5):
            with pytest.raises(MtserveError, match="the model failed"):
                await anext(scheduler.accept(works_of(Job(text=1, steps=steps)), stream=True).events())
        assert await scheduler.submit(works_of(Job(text=2, steps=5))) == [(2, 5)]

    run(check, Mute())


def test_10_a_reader_whose_loop_is_closed_does_not_stop_the_thread() -> None:
    engine = FakeEngine()
    scheduler = Scheduler(engine)

    async def leave() -> Ticket:
        return scheduler.accept(works_of(Job(text=1, steps=10)), stream=True)

    engine.gate.clear()
    left = asyncio.run(leave())
    engine.gate.set()
    assert left.future.result(10) == [(1, 10)]
    scheduler.close()
    assert not scheduler._thread.is_alive()


def test_the_tokenizer_runs_off_the_event_loop() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        soon = time.monotonic() + 5
        works = (await scheduler.prepare({"fake": None}, [Job(text=1), Job(text=2)], deadline=soon))["fake"]
        assert await scheduler.submit(works) == [(1, 1), (2, 1)]
        assert all(name.startswith("mtserve-text") for name in engine.threads)
        with pytest.raises(InputError, match="too long"):
            await scheduler.prepare({"fake": None}, [Job(text=1, tokens=101)], deadline=soon)
        with pytest.raises(DeadlineError):
            await scheduler.prepare({"fake": None}, [Job(text=1)], deadline=time.monotonic() - 1)

    run(check, FakeEngine())


def test_after_much_work_an_idle_engine_tidies_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.scheduler.IDLE_S", 0.05)
    monkeypatch.setattr("mtserve.scheduler.MUCH", 40)
    rests: list[str] = []
    engine = FakeEngine()

    async def main() -> None:
        scheduler = Scheduler(engine, tidy=lambda: rests.append(threading.current_thread().name))
        try:
            for _ in range(2):
                await scheduler.submit([work_of(Job(text=1, tokens=15))])
            await asyncio.sleep(0.3)
            assert not rests  # that was little
            for number in (1, 2):
                await scheduler.submit([work_of(Job(text=1, tokens=30))])
                await asyncio.sleep(0.02)
                assert len(rests) == number - 1  # not at once
                await scheduler.submit([work_of(Job(text=1, tokens=30))])
                await asyncio.sleep(0.4)
                assert len(rests) == number
        finally:
            scheduler.close()

    asyncio.run(main())
    assert set(rests) == {"mtserve-engine"}


def test_a_busy_engine_tidies_up_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.scheduler.TIDY_S", 0.3)
    monkeypatch.setattr("mtserve.scheduler.MUCH", 10)
    times: list[float] = []

    async def main() -> None:
        scheduler = Scheduler(FakeEngine(), tidy=lambda: times.append(time.monotonic()))
        end = time.monotonic() + 1.5
        try:
            while time.monotonic() < end:
                await scheduler.submit([work_of(Job(text=1, tokens=15))])
        finally:
            scheduler.close()

    asyncio.run(main())
    assert 3 <= len(times) <= 5
    assert all(later - before >= 0.29 for before, later in pairwise(times))


def test_several_engines_compute_in_one_thread() -> None:
    class Noting(FakeEngine):
        thread = "shared_0"

        def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
            assert not inside
            inside.append(self)
            time.sleep(0.001)
            inside.pop()
            return super().step(works)

    inside = list[FakeEngine]()

    async def main() -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="shared") as thread:
            made = [Scheduler(InThread(Noting(), thread)) for _ in range(3)]
            jobs = [(scheduler, Job(text=n, poison=n == 7)) for n in range(10) for scheduler in made]
            asked = [scheduler.submit([work_of(job)]) for scheduler, job in jobs]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for scheduler in made:
                scheduler.close()
        assert [isinstance(answer, MtserveError) for answer in answers] == [job.poison for _, job in jobs]

    asyncio.run(main())


def test_calls_run_between_steps_while_others_run_and_start_nothing_early() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        seen: list[int] = []
        running = asyncio.ensure_future(scheduler.submit(works_of(Job(text=1, steps=40))))
        calls = [scheduler.between(lambda: seen.append(len(engine.batches))) for _ in range(5)]
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(scheduler.between(lambda: 1 / 0))
        for call in calls:
            await asyncio.wrap_future(call)
        assert seen == sorted(seen)
        assert await running == [(1, 40)]
        began = time.monotonic()
        waiting = asyncio.ensure_future(scheduler.submit(works_of(Job(text=2))))
        await asyncio.sleep(0.02)
        await asyncio.wrap_future(scheduler.between(lambda: None))
        assert len(engine.batches) == 40
        assert await waiting == [(2, 1)]
        assert time.monotonic() - began >= 0.2

    engine = FakeEngine()
    scheduler = run(check, engine, max_wait_ms=200)
    with pytest.raises(CapacityError):
        scheduler.between(lambda: None)


def test_calls_that_wait_when_it_closes_are_run() -> None:
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    engine.gate.clear()
    ticket = scheduler.accept(works_of(Job(text=1)))
    while not engine.batches and not scheduler._open:
        time.sleep(0.001)
    calls = [scheduler.between(lambda at=at: at) for at in range(3)]
    threading.Timer(0.05, engine.gate.set).start()
    scheduler.close(timeout_s=5)
    assert [call.result(timeout=1) for call in calls] == [0, 1, 2]
    assert ticket.future.result(timeout=1) == [(1, 1)]
