"""How long a classification waits while generations run on the same trunk.

    python -m benchmarks.interleaving [CHECKPOINT-OR-TRUNK] [--generations 8] [--json FILE]

Generations run through the scheduler, each followed by another; classifications, by a fresh head on the same trunk,
come at random moments, one at a time. A backend that counts says how many passes of others ended between a
classification's acceptance and its own pass: the one under way when it came, and those that were let before it. Times
are from its text to its label. What it should take is what it takes on the idle server, and one step of the
generations.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.generation import scheduled
from benchmarks.measuring import How, Lines, parse, report
from benchmarks.subject import Subject, open_subject, plain
from mtserve.backends.eager import EagerBackend
from mtserve.backends.launched import Launched
from mtserve.batching import Batch
from mtserve.engine import Engine
from mtserve.scheduler import Scheduler
from mtserve.trunk import max_length

SORT = "benchmark.sort"
LONGEST = 512
"""Tokens of a generation, where the trunk's positions allow so many."""


@dataclass(frozen=True)
class Pass:
    """Times are of `time.monotonic`; `sorts` where a classification was in it."""

    started: float
    ended: float
    sorts: bool


class Counting(EagerBackend):
    """Keeps a list of its passes."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject.model, pad_id=subject.text.spec.pad_id)
        self.passes: list[Pass] = []

    def launch(self, batch: Batch) -> Launched:
        started = time.monotonic()
        launched = super().launch(batch)  # on a CPU it is computed then
        self.passes.append(Pass(started, time.monotonic(), SORT in batch.wanted))
        return launched


@dataclass(frozen=True)
class Arrivals:
    """Of each classification its seconds, and how many passes of others it waited for."""

    seconds: list[float] = field(default_factory=list)
    waited: list[int] = field(default_factory=list)

    async def another(self, scheduler: Scheduler, passes: list[Pass], text: str) -> None:
        before, started = len(passes), time.monotonic()
        works = (await scheduler.prepare({SORT: None}, [text], deadline=started + 600))[SORT]
        ticket = scheduler.accept(works)
        await ticket.result()
        self.seconds.append(time.monotonic() - started)
        since = [one for one in passes[before:] if one.ended > ticket.accepted]
        self.waited.append([one.sorts for one in since].index(True))


async def generate(scheduler: Scheduler, task: str, text: str, new_tokens: int) -> None:
    """One generation after the other, until cancelled."""
    asked = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    while True:
        works = (await scheduler.prepare({task: asked}, [text], deadline=time.monotonic() + 600))[task]
        await scheduler.submit(works)


async def measure(
    scheduler: Scheduler, subject: Subject, how: How, passes: list[Pass], *, generations: int, new_tokens: int
) -> tuple[Arrivals, Arrivals, float]:
    """Arrivals on the idle server and beside the generations, and the median seconds of a generations' pass."""
    chance, idle, busy = random.Random(0), Arrivals(), Arrivals()  # noqa: S311
    await Arrivals().another(scheduler, passes, how.texts[0])  # warms up
    for text in how.texts:
        await asyncio.sleep(how.pause_s / 10)
        await idle.another(scheduler, passes, text)
    texts = [how.texts[at % len(how.texts)] for at in range(max(generations, how.arrivals))]
    running = [asyncio.create_task(generate(scheduler, subject.task, text, new_tokens)) for text in texts[:generations]]
    since = len(passes)

    def step() -> float:
        return statistics.median(one.ended - one.started for one in passes[since:] if not one.sorts)

    while len(passes) < since + 4:
        await asyncio.sleep(0.01)
    for text in texts[: how.arrivals]:
        await asyncio.sleep(chance.uniform(0, 3) * step())
        await busy.another(scheduler, passes, text)
    assert not any(task.done() for task in running), "a generation failed"
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return idle, busy, step()


def interleaving(subject: Subject, how: How, *, generations: int) -> Lines:
    new_tokens = min(LONGEST, (max_length(subject.model.trunk.config) or 2 * LONGEST) - 64)
    sort = subject.with_head(SORT, "classification", labels=["one", "two", "three"], max_length=64)
    backend = Counting(subject)
    tasks = subject.engine(sort, options=plain(new_tokens=new_tokens)).tasks
    with scheduled(Engine(tasks.values(), backend, subject.text)) as scheduler:
        measured = measure(scheduler, subject, how, backend.passes, generations=generations, new_tokens=new_tokens)
        idle, busy, step = asyncio.run(measured)
    return [
        {
            "generations": generations,
            "arrivals": len(busy.seconds),
            "of them": name,
            "steps waited for": float(np.quantile(busy.waited, at)),
            "idle, ms": 1e3 * float(np.quantile(idle.seconds, at)),
            "a step, ms": 1e3 * step,
            "beside them, ms": 1e3 * float(np.quantile(busy.seconds, at)),
            "x idle + a step": float(np.quantile(busy.seconds, at)) / (statistics.median(idle.seconds) + step),
        }
        for name, at in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=8)
    chosen, how = parse(parser, argv)
    subject = open_subject(chosen.location, chosen.task)
    report({"interleaving": lambda: interleaving(subject, how, generations=chosen.generations)}, into=chosen.json)


if __name__ == "__main__":
    main()
