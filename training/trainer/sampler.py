"""The batch sampler of a run: a schedule's global batches cut into one slice a rank. Knows no examples and no tensors.

torch's DataLoader and accelerate's BatchSamplerShard take it as it is: rank r gets every slice whose place is r modulo
the number of ranks, so at every step all ranks work on the same task, and their slices are one batch of the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from training.trainer.mixture import Schedule


@dataclass(frozen=True, slots=True)
class Key:
    """What a dataset is asked for: example `index` of a task, in an epoch.

    share   what to multiply the mean loss over the slice with: the mean over the ranks of these products is the mean
            over the global batch. 0 for the example that a rank gets to keep step where there are fewer than ranks
    """

    task: str
    index: int
    share: float
    epoch: int


class TaskBatches:
    """Slices as lists of keys: the ranks' slices of the first batch, of the second, and so on; each of one task.

    Slices of a batch differ by one example at most; all keys of a slice have the same share. `set_epoch` may be called
    again and again. accelerate does not pass it on through its wrappers in every case (many ranks, training resumed
    within an epoch) but always calls a dataset's, which should pass it on.

    `batch_size` None and `drop_last` False keep accelerate from topping up or dropping batches of differing size.
    """

    batch_size = None
    drop_last = False

    def __init__(self, schedule: Schedule, *, world_size: int = 1) -> None:
        self.schedule, self.world_size, self.epoch = schedule, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.schedule) * self.world_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        for task, indexes in self.schedule.epoch(epoch):
            size, longer = divmod(len(indexes), self.world_size)
            for rank in range(self.world_size):
                start = rank * size + min(rank, longer)
                mine = indexes[start : start + size + (rank < longer)]
                share = self.world_size * len(mine) / len(indexes)
                yield [Key(task, index, share, epoch) for index in mine or indexes[:1]]
