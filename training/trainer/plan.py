"""What a run will do, and about how long it will take, without training. Knows no model: it is told what a token costs.

Batches and examples are those of the schedule, exactly. Rows, tokens and seconds are expected: the examples that come,
times the mean of the task's examples.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter

from training.trainer.mixture import Schedule, Strategy


@dataclass(frozen=True)
class TaskPlan:
    """One task in the whole run.

    passes       over its training examples
    share        of the run's batches
    rows         trunk sequences; `tokens`: real ones, without padding
    seconds      None where it is not known what a token costs
    an_epoch     batches in the first epoch and in the last, were it not cut short
    """

    batches: int
    examples: int
    passes: float
    share: float
    rows: float
    tokens: float
    seconds: float | None
    an_epoch: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """A run before it is run; `first` are its first batches as (task, examples)."""

    strategy: Strategy
    epochs: float
    steps: int
    tasks: dict[str, TaskPlan]
    first: list[tuple[str, int]]

    @property
    def seconds(self) -> float | None:
        """Of the optimisation alone, without reading data and evaluation."""
        known = [task.seconds for task in self.tasks.values() if task.seconds is not None]
        return sum(known) if len(known) == len(self.tasks) else None

    def format(self) -> str:
        """An aligned table for a terminal, a line a task and one for all, and the first batches below it."""
        lines = [["task", "batches/epoch", "examples/epoch", "rows/epoch", "tokens/epoch", "share", "passes", "time"]]
        for name, task in self.tasks.items():
            first, last = task.an_epoch
            batches = f"{first:,}" if first == last else f"{first:,} to {last:,}"
            each = self._an_epoch(task.examples, task.rows, task.tokens)
            lines.append([name, batches, *each, f"{task.share:.1%}", f"{task.passes:.2f}", duration(task.seconds)])
        tasks = self.tasks.values()
        each = self._an_epoch(sum(t.examples for t in tasks), sum(t.rows for t in tasks), sum(t.tokens for t in tasks))
        lines.append(["all", f"{sum(t.an_epoch[0] for t in tasks):,}", *each, "100.0%", "", duration(self.seconds)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        title = f"mixture {self.strategy}: {self.epochs:.4g} epochs, {self.steps:,} steps"
        order = ", ".join(f"{task} {examples}" for task, examples in self.first)
        return "\n".join([title, "", *table, "", *textwrap.wrap(f"first batches: {order}", 100)])

    def _an_epoch(self, *totals: float) -> list[str]:
        return [f"{total / self.epochs:,.0f}" for total in totals]


def plan(
    schedule: Schedule,
    *,
    rows: Mapping[str, Sequence[int]],
    tokens: Mapping[str, Sequence[int]],
    seconds_per_token: Mapping[str, float] | None = None,
    gradient_accumulation: int = 1,
    max_steps: int | None = None,
    world_size: int = 1,
    first: int = 12,
) -> Plan:
    """The plan of the schedule's epochs, or of `max_steps` optimiser steps.

    rows, tokens        of each training example of a task, or of a sample of them
    seconds_per_token   by task, on one of `world_size` equal devices, as `measure` finds it
    """
    an_epoch = math.ceil(len(schedule) / gradient_accumulation)
    steps = max_steps or math.ceil(schedule.epochs * an_epoch)
    whole, rest = divmod(steps, an_epoch)
    cut = schedule.epoch(whole)[: rest * gradient_accumulation] if rest else []
    batches, examples = Counter(task for task, _ in cut), Counter[str]()
    for task, indexes in cut:
        examples[task] += len(indexes)
    for number in range(whole):
        batches.update(schedule.counts(number))
        examples.update(schedule.examples(number))
    last = (steps - 1) // an_epoch
    tasks = {}
    for task, size in schedule.sizes.items():
        seen = examples[task] * fmean(tokens[task])
        tasks[task] = TaskPlan(
            batches=batches[task],
            examples=examples[task],
            passes=examples[task] / size,
            share=batches[task] / batches.total(),
            rows=examples[task] * fmean(rows[task]),
            tokens=seen,
            seconds=seen * seconds_per_token[task] / world_size if seconds_per_token else None,
            an_epoch=(schedule.counts(0)[task], schedule.counts(last)[task]),
        )
    head = [(task, len(indexes)) for task, indexes in schedule.epoch(0)[:first]]
    return Plan(schedule.config.strategy, batches.total() / len(schedule), steps, tasks, head)


def measure(step: Callable[[str], int], tasks: Iterable[str], *, repeats: int = 3) -> dict[str, float]:
    """Seconds that a real token costs in each task: the median over `repeats` steps, after one that warms up.

    step   trains on one batch of a task without changing weights, waits for the device, and returns its real tokens
    """

    def cost(task: str) -> float:
        started = perf_counter()
        real = step(task)
        return (perf_counter() - started) / real

    return {task: median([cost(task) for _ in range(repeats + 1)][1:]) for task in tasks}


def duration(seconds: float | None) -> str:
    """A length of time as a person would say it; `?` where it is not known."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
