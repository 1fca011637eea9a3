"""The same run on 1 to 8 ranks, through accelerate's own wrappers."""

from __future__ import annotations

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from tests.training.test_mixture import schedule, schedules
from training.trainer.mixture import Schedule
from training.trainer.sampler import Key, TaskBatches

RANKS = st.integers(1, 8)


def shards(mixture: Schedule, ranks: int, *, epoch: int = 0, even: bool = True) -> list[list[list[Key]]]:
    """What each of `ranks` processes works on, each with a sampler of its own."""
    found = []
    for rank in range(ranks):
        sampler = TaskBatches(mixture, world_size=ranks)
        sampler.set_epoch(epoch)
        shard = BatchSamplerShard(sampler, num_processes=ranks, process_index=rank, even_batches=even)
        assert len(shard) == len(mixture)
        found.append(list(shard))
    return found


@given(mixture=schedules(), ranks=RANKS, epoch=st.integers(0, 3), even=st.booleans())
def test_ranks_together_make_the_batches_of_the_schedule(mixture: Schedule, ranks: int, epoch: int, even: bool) -> None:
    steps = list(zip(*shards(mixture, ranks, epoch=epoch, even=even), strict=True))
    for (task, indexes), slices in zip(mixture.epoch(epoch), steps, strict=True):
        assert {(key.task, key.epoch) for part in slices for key in part} == {(task, epoch)}
        assert [key.index for part in slices for key in part if key.share] == indexes
        sizes = [len(part) if part[0].share else 0 for part in slices]
        assert max(sizes) - min(sizes) <= 1
        assert all(part for part in slices), "a rank without an example would leave the others waiting"


@given(mixture=schedules(), ranks=RANKS)
def test_the_mean_over_ranks_is_the_mean_over_the_batch(mixture: Schedule, ranks: int) -> None:
    for (_, indexes), slices in zip(mixture.epoch(0), zip(*shards(mixture, ranks), strict=True), strict=True):
        losses = []
        for part in slices:
            assert len({key.share for key in part}) == 1
            losses.append(part[0].share * sum(key.index**2 for key in part) / len(part))
        assert sum(losses) / ranks == pytest.approx(sum(index**2 for index in indexes) / len(indexes))


def test_slices_by_hand() -> None:
    mixture = schedule({"a": 5}, 3, "proportional")
    (_, first), (_, second) = sorted(mixture.epoch(0), key=lambda batch: -len(batch[1]))
    by_length = {len(first): first, len(second): second}
    found = list(TaskBatches(mixture, world_size=4))
    sizes = [len(batch) for _, batch in mixture.epoch(0)]
    for at, size in enumerate(sizes):
        shares = [part[0].share for part in found[4 * at : 4 * at + 4]]
        assert shares == [4 / size] * size + [0.0] * (4 - size)
        assert [len(part) for part in found[4 * at : 4 * at + 4]] == [1] * 4
        assert found[4 * at + 3] == [Key("a", by_length[size][0], 0.0, 0)]


@given(mixture=schedules(), ranks=RANKS, skip=st.integers(0, 10))
def test_it_can_be_walked_again_and_from_the_middle(mixture: Schedule, ranks: int, skip: int) -> None:
    sampler, skip = TaskBatches(mixture, world_size=ranks), min(skip, len(mixture))
    sampler.set_epoch(1)
    torch.manual_seed(5)
    whole = list(sampler)
    sampler.set_epoch(1)
    torch.manual_seed(6)
    assert list(sampler) == whole
    assert len(whole) == len(sampler) == ranks * len(mixture)
    assert list(SkipBatchSampler(sampler, skip)) == whole[skip:]
    shard = BatchSamplerShard(sampler, num_processes=ranks, process_index=ranks - 1)
    assert list(SkipBatchSampler(shard, skip)) == list(shard)[skip:]


class _Asked(Dataset[Key]):
    """Gives back what it is asked for; accelerate tells it the epoch."""

    def __init__(self, sampler: TaskBatches) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return sum(self.sampler.schedule.sizes.values())

    def __getitem__(self, key: Key) -> Key:
        return key

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


def _keep(keys: list[Key]) -> list[Key]:
    return keys


def _loader(sampler: TaskBatches, rank: int) -> DataLoaderShard:
    shard = BatchSamplerShard(sampler, num_processes=sampler.world_size, process_index=rank)
    return DataLoaderShard(_Asked(sampler), batch_sampler=shard, collate_fn=_keep)


@pytest.mark.parametrize("strategy", ["proportional", "uniform"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_training_resumed_in_a_later_epoch_goes_on_where_it_was(strategy: str, ranks: int) -> None:
    """As the Trainer resumes: a new process, the loader skips what was done, and is told the epoch."""
    mixture = schedule({"a": 17, "b.c": 6}, {"a": 4, "b.c": 2}, strategy)
    for rank in range(ranks):
        whole = _loader(TaskBatches(mixture, world_size=ranks), rank)
        epochs = []
        for epoch in range(3):
            whole.set_epoch(epoch)
            epochs.append(list(whole))
        assert epochs[2] == shards(mixture, ranks, epoch=2)[rank]
        resumed = skip_first_batches(_loader(TaskBatches(mixture, world_size=ranks), rank), 3)
        resumed.set_epoch(2)
        assert list(resumed) == epochs[2][3:]
