"""Which batch of which task comes when. Pure: knows no data, no tensors, no ranks.

    strategy      batches of a task in an epoch
    proportional  one pass over its examples, the batches of all tasks shuffled
    round_robin   one pass over its examples, tasks take turns; one that has run out drops out
    uniform       as many as every other task
    weights       in proportion to `weights`
    temperature   in proportion to (min(size, cap) / batch size) ** (1 / temperature): Raffel et al. 2020 (1910.10683)
    annealed      in proportion to (size / batch size) ** alpha, alpha falling from 1 in the first epoch to 0.2 in the
                  last: Stickland and Murray 2019 (1902.02671)
    staged        in proportion to each epoch's own weights, where 0 leaves a task out: a task may begin late, when the
                  others have taught the trunk and the rate is low, or end early

Dividing by the batch size changes nothing where all are equal; else it keeps temperature 1 proportional in examples.

Invariants of every strategy (tests/training/test_mixture.py holds them):

- a batch has examples of one task, and never more than the task's batch size;
- all epochs have equally many batches: those of one pass over every task;
- shares become whole batches by largest remainder, not by chance, and no task gets none but one of weight 0;
- a task's batches, laid end to end over the epochs, are passes: all examples once in random order, and only then again.
  A pass has one short batch where the size is no multiple of the batch size; no batch reaches into the next pass. The
  first two strategies make one pass an epoch, the others go on where the last epoch ended;
- an epoch follows from seed, number of the epoch, sizes, batch sizes, config and, with `group_by_length`, the
  examples' lengths alone. Then a pass is cut into stretches of many batches in random order, each is sorted by length,
  and its batches are shuffled: which examples meet is still chance, but for their length.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, chain, count, zip_longest
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mtserve.errors import ConfigError
from training.section import Section

_STRETCH = 50  # batches that are sorted together, as Transformers' own length grouping does

_FIELDS = (("weights", "weights"), ("temperature", "temperature"), ("cap", "temperature"), ("stages", "staged"))
"""A field, and the strategy that it is for."""
TaskBatch = tuple[str, list[int]]
"""A task and the numbers of its examples."""

Strategy = Literal["proportional", "round_robin", "uniform", "weights", "temperature", "annealed", "staged"]


class MixtureConfig(Section):
    """How the tasks share the batches; a run file may give the strategy's name alone."""

    strategy: Strategy = "proportional"
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None, description="For `weights`: each task's share of the batches, on any scale."
    )
    temperature: float | None = Field(
        default=None, ge=1, allow_inf_nan=False, description="For `temperature`: 1 is proportional, large is uniform."
    )
    cap: int | None = Field(default=None, ge=1, description="For `temperature`: most examples that count as size.")
    stages: list[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]] | None = Field(
        default=None,
        min_length=1,
        description="For `staged`: weights of the tasks, one entry an epoch, or for equally many epochs each.",
    )
    group_by_length: bool = Field(
        default=False, description="Make batches of examples of similar lengths, so that little of them is padding."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"strategy": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _fields_fit(self) -> MixtureConfig:
        for name, strategy in _FIELDS:
            given = getattr(self, name) is not None
            if given and self.strategy != strategy:
                raise ValueError(f"{name} is for strategy {strategy!r}; the strategy is {self.strategy!r}")
            if not given and self.strategy == strategy and name != "cap":
                raise ValueError(f"strategy {strategy!r} needs {name}")
        if self.stages is not None:
            if empty := [at for at, stage in enumerate(self.stages) if not any(stage.values())]:
                raise ValueError(f"stages: number {empty[0]} has no task with a weight above 0")
            if lost := [task for task in self.stages[0] if not any(stage.get(task) for stage in self.stages)]:
                raise ValueError(f"stages: task {lost[0]} has no weight above 0 in any")
        return self

    def check(self, tasks: Collection[str]) -> None:
        """Raise ConfigError where `weights`, or one of `stages`, does not name exactly these tasks."""
        named = {"weights": self.weights} if self.weights is not None else {}
        named |= {f"stages.{at}": stage for at, stage in enumerate(self.stages or ())}
        for where, weights in named.items():
            for wrong, found in (
                ("names unknown", [task for task in weights if task not in tasks]),
                ("lacks", [task for task in tasks if task not in weights]),
            ):
                if found:
                    raise ConfigError(f"mixture.{where} {wrong} {', '.join(found)}; the tasks are {', '.join(tasks)}")


class Schedule:
    """All epochs of a run: `sizes` and `batch_sizes` count examples a task, and batches are global, of all ranks.

    `epochs` is the run's length, which `annealed` and `staged` need; later epochs have the shares of the last.
    `lengths` are tokens of each example of a task, which `group_by_length` needs.
    Raises ConfigError for a task without examples or without a batch size, and for weights of other tasks.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        config: MixtureConfig,
        *,
        seed: int,
        epochs: float,
        lengths: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        config.check(sizes)
        for what, of in (("examples", sizes), ("batch size", batch_sizes)):
            empty = [task for task in sizes if of.get(task, 0) < 1]
            if empty or not sizes:
                raise ConfigError(f"a mixture needs tasks with {what}; {', '.join(empty) or 'no task'} has none")
        self.sizes, self.batch_sizes = dict(sizes), dict(batch_sizes)
        self.config, self.seed, self.epochs = config, seed, epochs
        self._lengths = lengths if config.group_by_length else None
        self._pass = {task: math.ceil(size / batch_sizes[task]) for task, size in sizes.items()}
        varied = max(1, math.ceil(epochs)) if config.strategy in ("annealed", "staged") else 1
        self._counts = [self._shared_out(number, varied) for number in range(varied)]
        self._starts = {task: list(accumulate((c[task] for c in self._counts), initial=0)) for task in sizes}

    def __len__(self) -> int:
        """Batches an epoch."""
        return sum(self._pass.values())

    def counts(self, number: int) -> dict[str, int]:
        """Batches of each task in an epoch; epochs count from 0."""
        return dict(self._counts[min(number, len(self._counts) - 1)])

    def examples(self, number: int) -> dict[str, int]:
        """Examples of each task in an epoch, those that come twice counted twice."""
        return {
            t: self._seen(t, self._start(t, number + 1)) - self._seen(t, self._start(t, number)) for t in self.sizes
        }

    def epoch(self, number: int) -> list[TaskBatch]:
        """The batches of an epoch in order."""
        order = random.Random(f"{self.seed}/{number}")  # noqa: S311 - no secret; a text seed is hashed whole
        if self.config.strategy in ("proportional", "round_robin"):
            passes = [[(task, batch) for batch in self._one_pass(task, order)] for task in self.sizes]
            if self.config.strategy == "round_robin":
                return [batch for turn in zip_longest(*passes) for batch in turn if batch is not None]
            batches = list(chain.from_iterable(passes))
            order.shuffle(batches)
            return batches
        tasks = [task for task, batches in self.counts(number).items() for _ in range(batches)]
        order.shuffle(tasks)
        streams = {task: self._stream(task, self._start(task, number)) for task in self.sizes}
        return [(task, next(streams[task])) for task in tasks]

    def _one_pass(self, task: str, order: random.Random) -> list[list[int]]:
        indexes, step = list(range(self.sizes[task])), self.batch_sizes[task]
        order.shuffle(indexes)
        if self._lengths is None:
            return _cut(indexes, step)
        lengths, batches = self._lengths[task], list[list[int]]()
        for stretch in _cut(indexes, step * _STRETCH):
            alike = _cut(sorted(stretch, key=lambda index: lengths[index]), step)
            short = [alike.pop()] if len(alike[-1]) < step else []  # stays the last of the pass
            order.shuffle(alike)
            batches += alike + short
        return batches

    def _stream(self, task: str, start: int) -> Iterator[list[int]]:
        """The task's batches from number `start` on, without end."""
        first, skipped = divmod(start, self._pass[task])
        for number in count(first):
            order = random.Random(f"{self.seed}/{task}/{number}")  # noqa: S311 - as in `epoch`
            yield from self._one_pass(task, order)[skipped if number == first else 0 :]

    def _start(self, task: str, number: int) -> int:
        """Batches of the task before an epoch."""
        known = min(number, len(self._counts))
        return self._starts[task][known] + (number - known) * self._counts[-1][task]

    def _seen(self, task: str, batches: int) -> int:
        """Examples in the first `batches` batches of the task."""
        passes, rest = divmod(batches, self._pass[task])
        return passes * self.sizes[task] + rest * self.batch_sizes[task]

    def _shared_out(self, number: int, epochs: int) -> dict[str, int]:
        sizes, config = self.sizes, self.config
        match config.strategy:
            case "proportional" | "round_robin":
                return self._pass
            case "uniform":
                shares = dict.fromkeys(sizes, 1.0)
            case "weights":
                shares = {task: (config.weights or {})[task] for task in sizes}
            case "temperature":
                power, cap = 1 / (config.temperature or 1), config.cap or max(sizes.values())
                shares = {task: (min(size, cap) / self.batch_sizes[task]) ** power for task, size in sizes.items()}
            case "annealed":
                alpha = 1 - 0.8 * number / max(1, epochs - 1)
                shares = {task: (size / self.batch_sizes[task]) ** alpha for task, size in sizes.items()}
            case "staged":
                stages = config.stages or []
                stage = stages[number * len(stages) // epochs]
                shares = {task: stage[task] for task in sizes if stage[task]}
        return dict.fromkeys(sizes, 0) | apportioned(len(self), shares)


def _cut(indexes: list[int], step: int) -> list[list[int]]:
    return [indexes[start : start + step] for start in range(0, len(indexes), step)]


def apportioned(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` batches in proportion to positive shares: largest remainder, ties to the task named first.

    A task whose quota is below one gets one, and the others share the rest; `total` is at least the number of tasks.
    """
    quotas = {task: Fraction(share) for task, share in shares.items()}
    while True:  # what the small ones are given may push another quota below one
        left, whole = total - (len(shares) - len(quotas)), sum(quotas.values())
        small = [task for task, share in quotas.items() if share * left < whole]
        if not small:
            break
        quotas = {task: share for task, share in quotas.items() if task not in small}
    quotas = {task: share * left / whole for task, share in quotas.items()}
    counts = {task: math.floor(quotas.get(task, 1)) for task in shares}
    by_remainder = sorted(quotas, key=lambda task: counts[task] - quotas[task])
    for task in by_remainder[: total - sum(counts.values())]:
        counts[task] += 1
    return counts
