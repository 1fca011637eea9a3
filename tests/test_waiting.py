"""The queue's invariants, numbered as in its docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtserve.rows import make_row
from mtserve.tasks.base import Example, Parameters
from mtserve.tasks.work import Work
from mtserve.waiting import QUANTUM, Rate, Waiting

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.25}


def work_of(task: str, texts: Sequence[int], tokens: int, reserved: int = 0) -> Work:
    """A work of one row a text, each of so many tokens; equal texts and sizes are equal rows."""
    rows = [make_row([text] * tokens, [0] * tokens, [(0, 0)] * tokens, [False] * tokens) for text in texts]
    return Work(task, Example(), Parameters(), rows, reserved=reserved)


def distinct(works: Sequence[Work]) -> int:
    return sum(len(row) for row in {row.key: row for work in works for row in work.rows}.values())


def always(work: Work, taken: Sequence[Work]) -> bool:
    return True


def drained(waiting: Waiting[int], budget: int) -> list[list[Work]]:
    found = []
    while len(waiting):
        found.append([work for work, _ in waiting.take(budget, always)])
    return found


some_works = st.lists(
    st.builds(
        work_of,
        st.sampled_from("abc"),
        st.lists(st.integers(0, 8), min_size=1, max_size=3),
        st.integers(1, 40),
    ),
    max_size=30,
)


@settings(max_examples=150)
@given(works=some_works, budget=st.sampled_from([1, 30, 100, 10_000]))
def test_1_2_5_order_budget_and_sizes(works: list[Work], budget: int) -> None:
    waiting: Waiting[int] = Waiting(WEIGHTS)
    for number, work in enumerate(works):
        waiting.put(work, number)
    assert (len(waiting), waiting.tokens) == (len(works), sum(work.tokens for work in works))
    takes = drained(waiting, budget)
    assert sorted(id(work) for take in takes for work in take) == sorted(map(id, works))
    assert (len(waiting), waiting.tokens, waiting._of, waiting._alike) == (0, 0, {}, {})
    place = {id(work): number for number, work in enumerate(works)}
    last = dict.fromkeys("abc", -1)
    for take in takes:
        assert take
        adding = [work for at, work in enumerate(take) if distinct(take[: at + 1]) > distinct(take[:at])]
        assert distinct(take) <= budget or len(adding) == 1
        for work in adding:  # the others joined them
            assert place[id(work)] > last[work.task]
            last[work.task] = place[id(work)]


def test_1_equal_rows_of_other_tasks_and_requests_join_wherever_they_stand() -> None:
    waiting: Waiting[int] = Waiting()
    for number, (task, text) in enumerate([("a", 1), ("a", 2), ("b", 3), ("b", 1), ("a", 1), ("c", 2)]):
        waiting.put(work_of(task, [text], 10), number)
    assert [owner for _, owner in waiting.take(10, always)] == [0, 3, 4]
    assert [owner for _, owner in waiting.take(20, always)] == [1, 5, 2]


@settings(max_examples=60)
@given(
    sizes=st.fixed_dictionaries({task: st.lists(st.integers(1, 900), min_size=40, max_size=60) for task in "abc"}),
    budget=st.sampled_from([64, 1000, 4096]),
)
def test_3_tasks_that_wait_get_their_shares(sizes: Mapping[str, list[int]], budget: int) -> None:
    """While all three wait, whatever the sizes of their works; no two rows are equal."""
    waiting: Waiting[int] = Waiting(WEIGHTS)
    text = 0
    for task, lengths in sizes.items():
        for tokens in lengths:
            waiting.put(work_of(task, [text := text + 1], tokens), text)
    left = {task: len(lengths) for task, lengths in sizes.items()}
    given_tokens = dict.fromkeys("abc", 0)
    most = {task: max(lengths) / WEIGHTS[task] for task, lengths in sizes.items()}
    while all(left.values()):
        for work, _ in waiting.take(budget, always):
            given_tokens[work.task] += work.tokens
            left[work.task] -= 1
            if all(left.values()):
                share = {task: tokens / WEIGHTS[task] for task, tokens in given_tokens.items()}
                for one, other in pairwise("abca"):
                    assert abs(share[one] - share[other]) < QUANTUM + most[one] + most[other]


def test_3_a_flood_does_not_starve_another_task() -> None:
    waiting: Waiting[int] = Waiting()
    for text in range(5000):
        waiting.put(work_of("flood", [text], 32), text)
    waiting.put(work_of("other", [9999], 32), -1)
    assert -1 in [owner for _, owner in waiting.take(1024, always)]


def test_3_what_a_task_did_not_use_is_not_saved_up() -> None:
    waiting: Waiting[int] = Waiting()
    for text in range(50):
        waiting.put(work_of("early", [text], 10), 0)
        waiting.take(10, always)
    for text in range(100):
        waiting.put(work_of("early", [100 + text], 32), 1)
        waiting.put(work_of("late", [200 + text], 32), 2)
    owners = [owner for _, owner in waiting.take(2048, always)]
    assert owners.count(1) == owners.count(2)


def test_4_a_large_one_waits_for_room_and_is_not_passed_by() -> None:
    waiting: Waiting[str] = Waiting()
    waiting.put(work_of("big", [1], 5, reserved=90), "big")
    waiting.put(work_of("small", [2], 5, reserved=5), "small")
    waiting.put(work_of("plain", [3], 5), "plain")

    def room(free: int) -> list[str]:
        def has_room(work: Work, taken: Sequence[Work]) -> bool:
            return work.reserved + sum(other.reserved for other in taken) <= free

        return [owner for _, owner in waiting.take(100, has_room)]

    assert room(50) == ["plain"]
    waiting.put(work_of("plain", [4], 5), "plain")
    assert room(50) == ["plain"]
    assert room(100) == ["big", "small"]


@given(works=some_works, dropped=st.sets(st.integers(0, 4)))
def test_5_dropped_works_are_gone(works: list[Work], dropped: set[int]) -> None:
    waiting: Waiting[int] = Waiting()
    for number, work in enumerate(works):
        waiting.put(work, number % 5)
    gone = [work for owner in dropped for work in waiting.drop(owner)]
    assert waiting.tokens == sum(work.tokens for work in works) - sum(work.tokens for work in gone)
    left = {id(work) for take in drained(waiting, 30) for work in take}
    assert left == set(map(id, works)) - set(map(id, gone))
    assert waiting.drop(0) == []


def test_the_oldest_is_the_first_that_still_waits() -> None:
    waiting: Waiting[str] = Waiting()
    assert waiting.oldest() is None
    for task, owner in [("a", "first"), ("b", "second"), ("a", "third")]:
        waiting.put(work_of(task, [len(owner)], 3), owner)
    assert waiting.oldest() == "first"
    waiting.drop("first")
    assert waiting.oldest() == "second"


def test_the_rate_is_that_of_late() -> None:
    rate = Rate()
    assert rate.seconds(10**6) == 1
    rate.add(1000, 1.0)
    assert rate.seconds(5000) == 5
    assert rate.seconds(1) == 1
    assert rate.seconds(10**9) == 60
    for _ in range(100):
        rate.add(100, 1.0)
    assert rate.seconds(5000) == pytest.approx(50, abs=2)
