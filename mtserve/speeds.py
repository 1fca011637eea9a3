"""How fast an engine computes in each profile, with so many threads, with freed memory kept or not. Accepts nothing.

A round does the same work in every way that is compared, one after the other, and begins with another way each time; a
way's speed is the median of its rounds. So a machine that is slower for a while is so for all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from mtserve.engine import Engine
from mtserve.loading import in_profile
from mtserve.tasks.base import Example

ROUNDS = 5
SECONDS = 2.0
"""A round's work in one way is what fp32 does in about this time."""
_SAME = 1.05  # ways within 5 % are equally fast
_UNSTEADY = 1.5
Way = TypeVar("Way", bound=Hashable)


@dataclass(frozen=True)
class Workload:
    """What a round does in each way: these inputs, all at once, so many times over.

    tokens   of the inputs of one round; a generation computes those that it makes, too
    """

    inputs: Sequence[tuple[str, Example]]
    times: int
    tokens: int

    @classmethod
    def of(cls, engine: Engine, examples: Mapping[str, Sequence[Example]], *, seconds: float | None = None) -> Workload:
        """Inputs of all tasks, shuffled by a fixed seed: as many as the engine, warmed up here, answers in so many
        seconds (`SECONDS` by default), but at least what fills a pass."""
        inputs = [(task, example) for task, some in examples.items() for example in some]
        random.Random(0).shuffle(inputs)  # noqa: S311 - to mix tasks and lengths, the same way each time
        sizes = [engine.prepare(task, example).tokens for task, example in inputs]
        few = cls(inputs[: _reached(sizes, engine.max_batch_tokens)], 1, 0)
        few.seconds(engine)
        speed = sum(sizes[: len(few.inputs)]) / few.seconds(engine)
        wanted = max(engine.max_batch_tokens, int(speed * (seconds or SECONDS)))
        some = _reached(sizes, wanted)
        times = max(1, round(wanted / sum(sizes[:some])))
        return cls(inputs[:some], times, times * sum(sizes[:some]))

    def seconds(self, engine: Engine) -> float:
        """Time to answer all of it; tokenised before."""
        works = [[engine.prepare(task, example) for task, example in self.inputs] for _ in range(self.times)]
        started = time.perf_counter()
        for each in works:
            engine.run(each)
        return time.perf_counter() - started

    def warm(self, engine: Engine) -> None:
        """Have done once what is only done the first time."""
        Workload(self.inputs[:16], 1, 0).seconds(engine)

    def rate(self, engine: Engine) -> float:
        """Real tokens a second that the engine computes: equal rows once, padding not at all."""
        before = engine.backend.tokens
        seconds = self.seconds(engine)
        return (engine.backend.tokens - before) / seconds


def interleaved(
    ways: Sequence[Way], rate: Callable[[Way], float], *, rounds: int | None = None
) -> dict[Way, list[float]]:
    """Each way's rates in rounds in turn; `ROUNDS` of them by default."""
    found: dict[Way, list[float]] = {way: [] for way in ways}
    for number in range(rounds or ROUNDS):
        first = number % len(ways)
        for way in (*ways[first:], *ways[:first]):
            found[way].append(rate(way))
    return found


def medians(rates: Mapping[Way, Sequence[float]]) -> dict[Way, float]:
    return {way: median(each) for way, each in rates.items()}


def unsteady(rates: Mapping[Way, Sequence[float]]) -> list[Way]:
    """Ways of which the fastest round was more than half faster than the median: something else ran beside them."""
    return [way for way, each in rates.items() if max(each) > _UNSTEADY * median(each)]


def of_profiles(engine: Engine, profiles: Sequence[str], work: Workload) -> dict[str, list[float]]:
    """Tokens a second in each profile, in rounds; each time anew, so that one of them at a time is in memory."""

    def rate(profile: str) -> float:
        made = in_profile(engine, profile)
        work.warm(made)
        return work.rate(made)

    return interleaved(profiles, rate)


def of_threads(engine: Engine, counts: Sequence[int], work: Workload) -> dict[int, float]:
    """Tokens a second with so many threads; afterwards the last of them is in force."""
    from mtserve.backends.hardware import use_threads

    def rate(count: int) -> float:
        use_threads(count)
        work.warm(engine)
        return work.rate(engine)

    found = medians(interleaved(counts, rate))
    use_threads(counts[-1])
    return found


def of_memory(engine: Engine, work: Workload) -> dict[bool, float]:
    """Tokens a second with freed memory given back, then with it kept; empty where it cannot be kept.

    What the allocator was told cannot be taken back in a process, so rounds are not in turn, and each way's best round
    stands for it: of what else runs on a machine, the best round has seen the least.
    """
    from mtserve.backends.machine import keep_memory

    found = {False: max(work.rate(engine) for _ in range(ROUNDS))}
    if not keep_memory():
        return {}
    work.warm(engine)
    return found | {True: max(work.rate(engine) for _ in range(ROUNDS))}


def thread_counts(cores: int) -> list[int]:
    """Powers of two below the number of cores, and that number."""
    return [*(2**power for power in range(cores.bit_length()) if 2**power < cores), cores]


def best(rates: Mapping[Way, float]) -> Way:
    """The last of the ways that are as fast as the fastest, within 5 %."""
    most = max(rates.values())
    return [way for way, rate in rates.items() if rate * _SAME >= most][-1]


def _reached(sizes: Sequence[int], tokens: int) -> int:
    """How many of the first sizes make so many tokens; all, if they are fewer."""
    total = 0
    for at, size in enumerate(sizes, 1):
        total += size
        if total >= tokens:
            return at
    return len(sizes)
