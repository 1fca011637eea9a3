"""The scheduler's invariants, numbered as in its docstring, on an engine that counts instead of computing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtserve.errors import CapacityError, DeadlineError, InputError, MtserveError, OverloadedError, TooLargeError
from mtserve.rows import make_row
from mtserve.scheduler import Scheduler, Ticket
from mtserve.tasks.base import Example, Parameters, Work


class Job(Example):
    """An input of the fake engine: `tokens` of content `text` (equal texts are equal rows), finished after `steps`."""

    text: int
    tokens: int = 4
    steps: int = 1
    poison: bool = False


class FakeEngine:
    """Answers each job with its text and the number of steps that it took; `gate` holds steps back while cleared."""

    def __init__(self, *, max_batch_tokens: int = 32) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.batches: list[list[Work]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.finished: list[Work] = []
        self.threads: set[str] = set()

    def prepare_all(self, name: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None) -> list[Work]:
        self.threads.add(threading.current_thread().name)
        if any(item.tokens > 100 for item in items):
            raise InputError("too long for this task")
        return [work_of(item) for item in items]

    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        assert self.gate.wait(10)
        assert len(set(works)) == len(works)
        assert threading.current_thread().name == "mtserve-engine"
        self.batches.append(list(works))
        finished: list[Work] = []
        unfinished: list[Work] = []
        for work in works:  # advanced one by one, so that a poison work leaves the step half done
            job = work.example
            assert isinstance(job, Job)
            if job.poison:
                raise ArithmeticError("secret detail of the inside")
            work.generated.append(job.text)
            assert len(work.generated) <= job.steps
            (finished if len(work.generated) == job.steps else unfinished).append(work)
        return finished, unfinished

    def finish(self, work: Work) -> Any:
        self.finished.append(work)
        assert isinstance(work.example, Job)
        return work.example.text, len(work.generated)


def work_of(job: Job) -> Work:
    ids = [job.text] * job.tokens
    return Work("fake", job, Parameters(), [make_row(ids, [0] * len(ids), [(0, 0)] * len(ids), [0] * len(ids))])


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
    assert scheduler._waiting_tokens == 0
    assert not scheduler._waiting
    assert not scheduler._open
    return scheduler


async def until(true: Callable[[], object]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen within two seconds")


jobs = st.builds(Job, text=st.integers(0, 6), tokens=st.integers(1, 12), steps=st.integers(1, 4), poison=st.booleans())
healthy = st.builds(Job, text=st.integers(0, 6), tokens=st.integers(1, 12), steps=st.integers(1, 4))


@settings(max_examples=60)
@given(requests=st.lists(st.lists(healthy, max_size=5), max_size=8), budget=st.sampled_from([1, 8, 30, 1000]))
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
        await until(lambda: scheduler._waiting_tokens == 0 and scheduler._open)
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
            assert scheduler._waiting_tokens == queued
        engine.gate.set()
        await plug
        assert [await ticket.result() for ticket in accepted] == [[(1, 1), (2, 1)]] * len(accepted)
        assert not {work for batch in engine.batches for work in batch} & set(refused)

    run(check, FakeEngine(), max_queue_tokens=100)


def test_2_a_full_queue_refuses_before_tokenising() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        plug = asyncio.ensure_future(scheduler.submit(works_of(Job(text=1))))
        await until(lambda: scheduler._waiting_tokens == 0 and scheduler._open)
        filler = scheduler.accept(works_of(Job(text=2, tokens=10)))
        with pytest.raises(OverloadedError):
            await scheduler.prepare("fake", [Job(text=3)], deadline=time.monotonic() + 5)
        assert not engine.threads
        engine.gate.set()
        await asyncio.gather(plug, filler.result())

    run(check, FakeEngine(), max_queue_tokens=10)


@settings(max_examples=60)
@given(first=st.lists(healthy, min_size=1, max_size=20), budget=st.sampled_from([1, 8, 30]))
def test_3_steps_start_in_order_and_hold_what_fits(first: list[Job], budget: int) -> None:
    """With everything queued beforehand, each step is the longest prefix of what waits that fits beside the rest."""

    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        plug = asyncio.ensure_future(scheduler.submit(works_of(Job(text=90))))
        await until(lambda: scheduler._waiting_tokens == 0 and scheduler._open)
        tickets = [scheduler.accept(works_of(job)) for job in first]
        engine.gate.set()
        await plug
        await asyncio.gather(*(ticket.result() for ticket in tickets))
        waiting = [ticket.works[0] for ticket in tickets]
        running: list[Work] = []
        for batch in engine.batches[1:]:
            kept = [work for work in batch if work in running]
            new = batch[len(kept) :]
            assert new == waiting[: len(new)]
            waiting = waiting[len(new) :]
            assert distinct(batch) <= max(budget, distinct(batch[:1]))
            assert not waiting or distinct([*batch, waiting[0]]) > max(budget, distinct(batch))
            running = batch

    run(check, FakeEngine(max_batch_tokens=budget))


def distinct(works: Sequence[Work]) -> int:
    return sum(len(row) for row in {row.key: row for work in works for row in work.rows}.values())


def test_3_equal_rows_share_a_step_whatever_the_budget() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        await scheduler.submit(works_of(*[Job(text=5, tokens=30)] * 50))
        assert [len(batch) for batch in engine.batches] == [50]

    run(check, FakeEngine(max_batch_tokens=1))


def test_3_new_works_join_between_the_steps_of_others() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        long = asyncio.ensure_future(scheduler.submit(works_of(Job(text=1, steps=200))))
        await until(lambda: scheduler._open and scheduler._waiting_tokens == 0)
        short = asyncio.ensure_future(scheduler.submit(works_of(Job(text=2))))
        await until(lambda: scheduler._waiting_tokens)
        engine.gate.set()
        assert await short == [(2, 1)]
        assert await long == [(1, 200)]
        assert [len(batch) for batch in engine.batches[:3]] == [1, 2, 1]

    run(check, FakeEngine())


@settings(max_examples=40)
@given(cancelled=st.lists(st.booleans(), min_size=1, max_size=8))
def test_4_works_of_a_cancelled_request_never_start(cancelled: list[bool]) -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.gate.clear()
        plug = asyncio.ensure_future(scheduler.submit(works_of(Job(text=9))))
        await until(lambda: scheduler._open and scheduler._waiting_tokens == 0)
        batches = [works_of(Job(text=1), Job(text=2, tokens=7)) for _ in cancelled]
        calls = [asyncio.ensure_future(scheduler.submit(works)) for works in batches]
        await asyncio.sleep(0)
        for call, drop in zip(calls, cancelled, strict=True):
            if drop:
                call.cancel()
        await until(lambda: scheduler._waiting_tokens == 11 * cancelled.count(False))
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


@settings(max_examples=60)
@given(requests=st.lists(st.lists(jobs, min_size=1, max_size=4), min_size=1, max_size=6))
def test_5_a_poison_work_fails_its_own_request_only(requests: list[list[Job]]) -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        calls = [scheduler.submit(works_of(*request)) for request in requests]
        for request, answer in zip(requests, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if any(job.poison for job in request):
                assert type(answer) is MtserveError
                assert "secret" not in str(answer)
            else:
                assert answer == [(job.text, job.steps) for job in request]
        assert await scheduler.submit(works_of(Job(text=3))) == [(3, 1)]

    run(check, FakeEngine(max_batch_tokens=1000))


def test_5_a_failing_decode_fails_its_own_request_only() -> None:
    class Broken(FakeEngine):
        def finish(self, work: Work) -> Any:
            if work.rows[0].ids[0] == 13:
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
        await until(lambda: scheduler._open and scheduler._waiting_tokens == 0)
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
            await scheduler.prepare("fake", [], deadline=time.monotonic() + 1)

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
                await until(lambda: scheduler._waiting_tokens < sum(w.tokens for t in tickets for w in t.works))
            engine.gate.set()
            for ticket in tickets:
                await ticket.result()

        run(check, engine)
        return [[work.rows[0].ids[0].item() for work in batch] for batch in engine.batches]

    assert steps() == steps()


def test_the_tokenizer_runs_off_the_event_loop() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        soon = time.monotonic() + 5
        works = await scheduler.prepare("fake", [Job(text=1), Job(text=2)], deadline=soon)
        assert await scheduler.submit(works) == [(1, 1), (2, 1)]
        assert all(name.startswith("mtserve-text") for name in engine.threads)
        with pytest.raises(InputError, match="too long"):
            await scheduler.prepare("fake", [Job(text=1, tokens=101)], deadline=soon)
        with pytest.raises(DeadlineError):
            await scheduler.prepare("fake", [Job(text=1)], deadline=time.monotonic() - 1)

    run(check, FakeEngine())
