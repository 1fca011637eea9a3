"""Windows overlap: order, bound, errors and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mtserve.overlap import overlapped


@pytest.mark.parametrize("apart", [True, False])
def test_results_come_in_order_and_each_stage_has_its_thread(apart: bool) -> None:
    threads: dict[str, set[str]] = {"prepare": set(), "compute": set()}

    def stage(name: str, value: int) -> int:
        threads[name].add(threading.current_thread().name)
        return value + 1

    def source() -> Iterator[int]:
        threads["source"] = {threading.current_thread().name}
        yield from range(50)

    found = list(overlapped(source(), lambda n: stage("prepare", n), lambda n: stage("compute", n), apart=apart))
    assert found == [n + 2 for n in range(50)]
    mine = threading.current_thread().name
    assert mine not in threads["source"]
    if apart:
        assert threads["prepare"] == threads["source"]
        assert len(threads["compute"] - threads["prepare"] - {mine}) == 1
    else:
        assert threads["prepare"] == threads["compute"] == {mine}


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_is_read_than_is_ahead(ahead: int, apart: bool) -> None:
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for n in range(100):
            read = n + 1
            yield n

    for used, _ in enumerate(overlapped(source(), int, int, ahead=ahead, apart=apart)):
        time.sleep(0.001)
        assert read <= used + 1 + ahead


@pytest.mark.parametrize("apart", [True, False])
def test_while_one_is_used_others_are_read(apart: bool) -> None:
    """A source that waits until the caller uses the first would never end otherwise."""
    used = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        assert used.wait(10)
        yield 1

    found = []
    for n in overlapped(source(), int, int, apart=apart):
        used.set()
        found.append(n)
    assert found == [0, 1]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("stage", ["source", "prepare", "compute"])
def test_an_error_comes_after_what_was_made_before_it(stage: str, apart: bool) -> None:
    def check(name: str, n: int) -> int:
        if name == stage and n == 3:
            raise ValueError(f"{name} {n}")
        return n

    source = (check("source", n) for n in range(10))
    results = overlapped(source, lambda n: check("prepare", n), lambda n: check("compute", n), apart=apart)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=f"{stage} 3"):
        next(results)


@pytest.mark.parametrize("apart", [True, False])
def test_who_stops_early_leaves_no_thread_and_an_ended_source(apart: bool) -> None:
    before, ended = threading.active_count(), threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            ended.set()

    some = overlapped(source(), int, int, apart=apart)
    assert [next(some), next(some)] == [0, 1]
    some.close()
    assert ended.is_set()
    assert threading.active_count() == before
