"""The sections in which our engine is measured alone: several tasks in one pass, its overhead, its tokenisation.

In this process, as nobody else runs beside it; knows no peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from benchmarks.encoding.peers.ours import encode_rows, open_engine
from benchmarks.encoding.race import Run, Section, spread
from benchmarks.encoding.subject import FIVE
from benchmarks.measuring import Call, Lines, rounds, timed
from mtserve.batching import Batch, plan
from mtserve.engine import DEFAULT_BUDGET, Engine
from mtserve.errors import CheckpointError, ConfigError
from mtserve.rows import Row

PROFILES = ("fp32", "bf16")
BATCH = 64
GROUPS = 16


def tasks(run: Run) -> Section:
    """Five tasks of equal options on the same texts over the trunk alone; five texts for five, together and apart.

    From works, whose texts are tokenised, to predictions.
    """

    def lines(profile: str, engine: Engine) -> Lines:
        texts = run.singles[: 5 * BATCH]
        rows = run.rows_of(texts)

        def of(names: Sequence[str], texts: Sequence[str]) -> Call:
            def call() -> tuple[float, Any]:
                works = list(chain.from_iterable(engine.prepare_tasks(dict.fromkeys(names), texts).values()))
                return timed(lambda: engine.run(works))

            return call

        def groups(*, together: bool) -> Call:
            def call() -> tuple[float, Any]:
                seconds = 0.0
                for at in range(min(GROUPS, len(texts) // 5)):
                    some = texts[5 * at : 5 * at + 5]
                    works = [engine.prepare_all(name, [text])[0] for name, text in zip(FIVE, some, strict=True)]
                    for part in [works] if together else [[work] for work in works]:
                        seconds += timed(lambda part=part: engine.run(part))[0]  # type: ignore[misc]
                return seconds, None

            return call

        calls = {
            "trunk alone": lambda: timed(lambda: _trunk(engine, rows)),
            "one task": of(FIVE[:1], texts),
            "five tasks, same texts": of(FIVE, texts),
            "five texts for five tasks, one pass": groups(together=True),
            "five texts for five tasks, five passes": groups(together=False),
        }
        seconds, _ = rounds(run.how, calls)
        over = dict.fromkeys(list(calls)[:3], seconds["trunk alone"])
        over |= dict.fromkeys(list(calls)[3:], seconds["five texts for five tasks, five passes"])
        return [
            {
                "profile": profile,
                "what": name,
                "texts": len(texts) if over[name] is seconds["trunk alone"] else 5 * min(GROUPS, len(texts) // 5),
                "seconds": spread(taken),
                "time over": "trunk alone" if over[name] is seconds["trunk alone"] else "five passes",
                "ratio": spread([a / b for a, b in zip(taken, over[name], strict=True)]),
            }
            for name, taken in seconds.items()
        ]

    return _by_profile(run, lines)


def overhead(run: Run) -> Section:
    """Time outside trunk and heads, of requests of 64 texts: tokenising them, and all else that the engine does."""

    def lines(profile: str, engine: Engine) -> Lines:
        texts = [run.texts.singles[at % len(run.texts.singles)] for at in range(4 * BATCH)]
        batches = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
        parts: dict[str, list[float]] = {"tokenising": [], "trunk and heads": [], "engine": []}

        def call() -> tuple[float, Any]:
            prepared = ran = 0.0
            with _inside(engine) as clock:
                for batch in batches:
                    taken, works = timed(lambda batch=batch: engine.prepare_all(FIVE[0], batch))  # type: ignore[misc]
                    prepared += taken
                    ran += timed(lambda works=works: engine.run(works))[0]  # type: ignore[misc]
            found = (prepared, clock.seconds, ran - clock.seconds)
            for part, value in zip(parts, found, strict=True):
                parts[part].append(value)
            return prepared + ran, clock.of

        seconds, made = rounds(run.how, {"all": call})
        whole = seconds["all"]
        return [
            {
                "profile": profile,
                "part": part,
                "ms a batch": spread([1e3 * value / len(batches) for value in values[1:]]),
                "share": spread([a / b for a, b in zip(values[1:], whole, strict=True)]),
                "trunk and heads are": made["all"],
            }
            for part, values in parts.items()
        ]

    return _by_profile(run, lines)


def tokenisation(run: Run) -> Section:
    """Share of making rows of texts in the time from texts to embeddings, set B."""

    def lines(profile: str, engine: Engine) -> Lines:
        shares: list[float] = []

        def call() -> tuple[float, Any]:
            tokenising, rows = timed(lambda: run.rows_of(run.singles))
            encoding, _ = timed(lambda: encode_rows(engine, rows, budget=DEFAULT_BUDGET))
            shares.append(tokenising / (tokenising + encoding))
            return tokenising + encoding, tokenising

        seconds, _ = rounds(run.how, {"all": call})
        line = {"profile": profile, "texts": len(run.singles), "seconds": spread(seconds["all"])}
        return [{**line, "share of tokenising": spread(shares[1:])}]

    return _by_profile(run, lines)


def _by_profile(run: Run, lines: Callable[[str, Engine], Lines]) -> Section:
    found: Lines = []
    failed: dict[str, str] = {}
    for profile in PROFILES:
        try:
            engine = open_engine(run.folder / "checkpoint", profile)
        except (CheckpointError, ConfigError) as error:
            failed[profile] = str(error)
            continue
        found += lines(profile, engine)
    about = {"set": "B", "unit": "single sentences", "order": "shuffled", "seed": 0, "rounds": run.how.rounds}
    return {"lines": found, "about": about, "failed": failed}


def _trunk(engine: Engine, rows: Sequence[Row]) -> None:
    """All rows through the trunk, each distinct one once, and through no head."""
    rows = list({row.key: row for row in rows}.values())
    for batch in plan([len(row) for row in rows], budget=engine.max_batch_tokens, cost=engine.backend.cost):
        engine.backend.run(Batch(tuple(rows[at] for at in batch), {}))


@dataclass
class Clock:
    """Seconds inside of something, and what that is."""

    seconds: float = 0.0
    of: str = ""


@contextmanager
def _inside(engine: Engine) -> Iterator[Clock]:
    """A clock of the trunk's and the heads' modules where the backend calls them, of its `launch` where it does not."""
    backend: Any = engine.backend
    clock, whole, starts = Clock(), Clock(), list[float]()

    def before(*_: Any) -> None:
        starts.append(time.perf_counter())

    def after(*_: Any) -> None:
        clock.seconds += time.perf_counter() - starts.pop()

    served = getattr(backend, "served", backend.model)
    modules = [served.trunk, *(served.head(name) for name in engine.tasks)]
    ran: list[None] = []
    hooks = [served.trunk.register_forward_hook(lambda *_: ran.append(None))]
    hooks += [one for m in modules for one in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    launch = backend.launch

    def timed_launch(batch: Batch) -> Any:
        taken, pending = timed(lambda: launch(batch))  # on a CPU it is computed then
        whole.seconds += taken
        return pending

    backend.launch = timed_launch
    try:
        yield clock
    finally:
        del backend.launch
        for hook in hooks:
            hook.remove()
        clock.of = "their modules"
        if not ran:
            clock.seconds, clock.of = whole.seconds, "the backend's run"
