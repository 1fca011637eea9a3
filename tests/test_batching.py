"""Properties of the batch plan."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtserve.batching import padded_cost, plan, real_cost

lengths_lists = st.lists(st.integers(1, 300), max_size=60)


@given(lengths=lengths_lists, budget=st.integers(1, 1000), cost=st.sampled_from([padded_cost, real_cost]))
def test_plan(lengths: list[int], budget: int, cost: object) -> None:
    assert callable(cost)
    batches = plan(lengths, budget=budget, cost=cost)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        inside = [lengths[i] for i in batch]
        assert len(batch) == 1 or cost(len(batch), max(inside), sum(inside)) <= budget
    assert plan(lengths, budget=budget, cost=cost) == batches


def test_rows_of_like_length_stand_together() -> None:
    assert plan([3, 90, 4, 100], budget=200, cost=padded_cost) == [[3, 1], [2, 0]]


def test_real_tokens_fill_a_batch_that_padding_would_split() -> None:
    lengths = [100, 1, 1, 1]
    assert plan(lengths, budget=110, cost=real_cost) == [[0, 1, 2, 3]]
    assert plan(lengths, budget=110, cost=padded_cost) == [[0], [1, 2, 3]]


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan([1], budget=0, cost=real_cost)
