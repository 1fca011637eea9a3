"""The data sets of several tasks as one, asked by keys of the sampler. Knows no model and no kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from training.trainer.sampler import Key, TaskBatches

Item = tuple[Key, Any]
Collate = Callable[[list[Any]], Mapping[str, Any]]


class TaskItems(Dataset[Item]):
    """Items of each task's data set beside the keys that asked for them.

    A data set that differs between epochs has `of_epoch(indexes, epoch)`; one that reads several items at once has
    `__getitems__`, as those of the `datasets` library do.
    """

    def __init__(self, tasks: Mapping[str, Any], sampler: TaskBatches | None = None) -> None:
        self.tasks, self.sampler = dict(tasks), sampler

    def __len__(self) -> int:
        return sum(map(len, self.tasks.values()))

    def __getitem__(self, key: Key) -> Item:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Item]:
        """The items of a slice, which are of one task and epoch."""
        data, indexes = self.tasks[keys[0].task], [key.index for key in keys]
        if hasattr(data, "of_epoch"):
            found = data.of_epoch(indexes, keys[0].epoch)
        elif hasattr(data, "__getitems__"):
            found = data.__getitems__(indexes)
        else:
            found = [data[index] for index in indexes]
        return list(zip(keys, found, strict=True))

    def set_epoch(self, epoch: int) -> None:
        """accelerate tells the data set of a new epoch in every case, and the sampler only in some."""
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)


class Collator:
    """Items of one task to a batch: the task's own collation, with the task's name and the slice's share beside."""

    def __init__(self, collate: Collate | Mapping[str, Collate]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        key = items[0][0]
        collate = self.collate[key.task] if isinstance(self.collate, Mapping) else self.collate
        batch = collate([item for _, item in items])
        return {**batch, "task_name": key.task, "share": key.share, "examples": len(items) if key.share else 0}
