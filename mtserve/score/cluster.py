"""Parts scored on a Ray cluster: files are read where there is room, parts go to a pool of actors with a model each.

The same job as in one process: what an actor commits are the same bytes. An actor that dies is started again by Ray and
its part is scored again, so that a part is committed once more at most, with the same bytes. The driver holds the lock,
hears of parts and puts them together; input, output and model must be reachable under their names from every machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mtserve.errors import ConfigError, MissingExtraError
from mtserve.score.job import Job, Todo, Told
from mtserve.score.parts import Parts, Receipt
from mtserve.score.workers import engine_for
from mtserve.settings import Settings

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Cluster:
    """Actors over the model at a location.

    most      of them; there are fewer while there is less to do
    gpus      of each; may be a part of one
    address   of the cluster; None starts one on this machine, or takes the one that RAY_ADDRESS names
    """

    location: str
    settings: Settings
    most: int = 1
    gpus: float = 0.0
    address: str | None = None

    def run(self, job: Job, todo: Todo, folder: Parts, told: Told) -> Iterator[Receipt]:
        """As `Workers.run`."""
        if any(place.url == "-" for place in todo.places):
            raise ConfigError("a cluster cannot read a pipe; allowed: files and URLs")
        with _connected(self.address) as ray:
            shards = ray.data.from_items([{"shard": at} for at in range(len(todo.places))])
            parts = shards.repartition(len(todo.places)).map_batches(
                _read, fn_kwargs={"todo": todo}, batch_size=1, num_cpus=1
            )
            receipts = parts.map_batches(
                _Actor,
                fn_constructor_args=(self.location, self.settings, job, folder.url),
                batch_size=1,
                concurrency=(1, self.most),
                num_cpus=self.settings.threads or 1,
                num_gpus=self.gpus or None,
            )
            for row in receipts.iter_rows():
                receipt = Receipt(**json.loads(row["receipt"]))
                told(dict(receipt.counts))
                yield receipt


def _read(batch: Columns, *, todo: Todo) -> Iterator[dict[str, Any]]:
    """The parts of a file, one after another."""
    for shard in batch["shard"]:
        for part in todo.of(int(shard)):
            cell = np.empty(1, object)
            cell[0] = part
            yield {"part": cell}


class _Actor:
    """A model that scores the parts that it is given and commits them."""

    def __init__(self, location: str, settings: Settings, job: Job, url: str) -> None:
        threads = settings.threads or 1
        self.answerer = job.by(engine_for(location, settings.model_copy(update={"threads": threads})))
        self.folder = Parts(url.removesuffix(".parts"))

    def __call__(self, batch: Columns) -> dict[str, Any]:
        done = [self.folder.commit(*one) for one in self.answerer.parts(iter(batch["part"]))]
        return {"receipt": np.array([json.dumps(asdict(one)) for one in done])}


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected; what was started here ends here."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("scoring on a cluster", "ray") from error
    mine = not ray.is_initialized()
    if mine:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()
