"""Windows overlap: order, bound, errors and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mtserve.overlap import overlapped


def test_results_come_in_order_and_each_stage_has_its_thread() -> None:
    threads: dict[str, set[str]] = {"prepare": set(), "compute": set()}

    def stage(name: str, value: int) -> int:
        threads[name].add(threading.current_thread().name)
        return value + 1

    found = list(overlapped(range(50), lambda n: stage("prepare", n), lambda n: stage("compute", n)))
    assert found == [n + 2 for n in range(50)]
    assert len(threads["prepare"] | threads["compute"]) == 2
    assert threading.current_thread().name not in threads["prepare"] | threads["compute"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_is_read_than_is_ahead(ahead: int) -> None:
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for n in range(100):
            read = n + 1
            yield n

    for used, _ in enumerate(overlapped(source(), int, int, ahead=ahead)):
        time.sleep(0.001)
        assert read <= used + 1 + ahead


def test_while_one_is_used_others_are_read_and_computed() -> None:
    """A source that waits until the caller uses the first would never end otherwise."""
    used = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        assert used.wait(10)
        yield 1

    found = []
    for n in overlapped(source(), int, int):
        used.set()
        found.append(n)
    assert found == [0, 1]


@pytest.mark.parametrize("stage", ["source", "prepare", "compute"])
def test_an_error_comes_after_what_was_made_before_it(stage: str) -> None:
    def check(name: str, n: int) -> int:
        if name == stage and n == 3:
            raise ValueError(f"{name} {n}")
        return n

    source = (check("source", n) for n in range(10))
    results = overlapped(source, lambda n: check("prepare", n), lambda n: check("compute", n))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=f"{stage} 3"):
        next(results)


def test_who_stops_early_leaves_no_thread_and_an_ended_source() -> None:
    before, ended = threading.active_count(), threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            ended.set()

    some = overlapped(source(), int, int)
    assert [next(some), next(some)] == [0, 1]
    some.close()
    assert ended.is_set()
    assert threading.active_count() == before
