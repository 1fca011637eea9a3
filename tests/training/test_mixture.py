"""The invariants of the mixture, for any sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from training.mixture import batches_an_epoch, proportional

_TASKS = st.dictionaries(
    st.sampled_from(["a", "b.c", "d"]), st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1
)


@given(tasks=_TASKS, seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_example_once_an_epoch_in_batches_of_one_task(
    tasks: dict[str, tuple[int, int]], seed: int, epoch: int
) -> None:
    sizes, batch_sizes = {t: s for t, (s, _) in tasks.items()}, {t: b for t, (_, b) in tasks.items()}
    batches = proportional(sizes, batch_sizes, seed=seed, epoch=epoch)
    assert len(batches) == batches_an_epoch(sizes, batch_sizes)
    for task, size in sizes.items():
        mine = [indexes for name, indexes in batches if name == task]
        assert sorted(index for indexes in mine for index in indexes) == list(range(size))
        lengths = sorted(map(len, mine), reverse=True)
        assert all(length == batch_sizes[task] for length in lengths[:-1])
        assert 1 <= lengths[-1] <= batch_sizes[task]
    assert proportional(sizes, batch_sizes, seed=seed, epoch=epoch) == batches


def test_order_follows_from_seed_and_epoch() -> None:
    orders = [
        proportional({"a": 40, "b": 40}, {"a": 4, "b": 4}, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_order_is_the_same_in_every_version() -> None:
    batches = proportional({"a": 3, "b": 2}, {"a": 2, "b": 2}, seed=0, epoch=0)
    assert batches == [("a", [0, 2]), ("b", [0, 1]), ("a", [1])]
