"""Processes that score parts beside each other, each with a model of its own on its share of the machine.

The parent reads and cuts; a worker scores a part and commits it. On a machine with GPUs worker n has GPU n; else each
has its part of the cores, neighbouring ones, so that on several NUMA nodes it stays on one. Weights of a bundle and of
a checkpoint are mapped, so pages that are not repacked are shared.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.errors import SetupError
from mtserve.loading import reproduced
from mtserve.opening import opened
from mtserve.resolve import resolve
from mtserve.score.cutting import Part
from mtserve.score.job import Job, Todo, Told
from mtserve.score.parts import Parts, Receipt
from mtserve.settings import Settings
from mtserve.share import Share, keep_few_kernels

_LOOK_S = 0.5


class WorkerError(SetupError):
    """A process that scores came to its end; what was scored is kept, and the run can go on."""

    code = "worker_failed"


def engine_for(location: str, settings: Settings, *, workers: int = 1) -> Engine:
    """A model as the settings say, for one of so many processes; its threads and memory are in force.

    Raises as a server does that loads it, also for golden rows that are not reproduced.
    """
    checkpoint = Checkpoint.open(resolve(location))
    keep_few_kernels()
    share = Share.of(settings, workers=workers, torch=checkpoint.manifest.exported is None)
    loaded = opened([checkpoint], settings, share.threads)
    share.settle(loaded.speeds(share.cores))
    deque(reproduced(loaded.engine, checkpoint), maxlen=0)
    return loaded.engine


@dataclass(frozen=True)
class Processes:
    """So many workers over the model at a location."""

    location: str
    settings: Settings
    count: int

    def run(self, job: Job, todo: Todo, folder: Parts, told: Told) -> Iterator[Receipt]:
        """As `Workers.run`. Raises WorkerError for a worker that ends before its work does."""
        context = multiprocessing.get_context("spawn")
        give: Any = context.Queue(self.count)
        take: Any = context.Queue()
        stop = threading.Event()
        crew = [
            context.Process(target=_work, args=(self, number, job, folder.url, give, take), daemon=True)
            for number in range(self.count)
        ]
        for one in crew:
            one.start()
        reader = threading.Thread(target=_fed, args=(iter(todo), give, take, self.count, stop), daemon=True)
        reader.start()
        try:
            yield from self._heard(crew, take, told)
        finally:
            stop.set()
            for one in crew:
                one.terminate()
            for one in crew:
                one.join()
            reader.join()
            give.cancel_join_thread()

    def _heard(self, crew: list[Any], take: Any, told: Told) -> Iterator[Receipt]:
        """What comes from workers until all have nothing left to do."""
        left = len(crew)
        while left:
            try:
                what, said = take.get(timeout=_LOOK_S)
            except queue.Empty:
                if dead := [one for one in crew if one.exitcode not in (None, 0)]:
                    found = f"a worker ended with exit code {dead[0].exitcode}"
                    raise WorkerError(f"{found}; the same command goes on") from None
                continue
            if what == "failed":
                raise said
            if what == "counts":
                told(said)
            elif what == "done":
                yield said
            else:
                left -= 1


def _fed(todo: Iterator[Part], give: Any, take: Any, workers: int, stop: threading.Event) -> None:
    """Parts for whoever is free, then an end for each."""
    try:
        for one in _then_ends(todo, workers):
            while not stop.is_set():
                with suppress(queue.Full):
                    give.put(one, timeout=_LOOK_S)
                    break
            if stop.is_set():
                return
    except Exception as error:
        take.put(("failed", _plain(error)))


def _then_ends(todo: Iterator[Part], workers: int) -> Iterator[Part | None]:
    yield from todo
    for _ in range(workers):
        yield None


def _work(of: Processes, number: int, job: Job, url: str, give: Any, take: Any) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells
    try:
        alone = _place(number, of.count)
        engine = engine_for(of.location, of.settings, workers=1 if alone else of.count)
        folder = Parts(url.removesuffix(".parts"))
        parts = iter(give.get, None)
        for receipt, files in job.by(engine).parts(parts, lambda counts: take.put(("counts", counts))):
            take.put(("done", folder.commit(receipt, files)))
        take.put(("over", None))
    except Exception as error:
        take.put(("failed", _plain(error)))


def _place(number: int, count: int) -> bool:
    """Give this process its part of the machine; whether it has cores of its own."""
    given = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    os.environ["CUDA_VISIBLE_DEVICES"] = given[number % len(given)] if given else str(number)
    if not hasattr(os, "sched_getaffinity"):
        return False
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        return False
    os.sched_setaffinity(0, cores[number * len(cores) // count : (number + 1) * len(cores) // count])
    return True


def _plain(error: Exception) -> Exception:
    """An error that can be sent to another process."""
    return error if isinstance(error, SetupError) else WorkerError(f"{type(error).__name__}: {error}")
