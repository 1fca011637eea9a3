"""Heads that come to a loaded model, and leave it, while it answers. Knows no HTTP and no other process.

Invariants (tests/serve/test_living.py holds them, tests/serve/test_changes.py against a server under load):
1. A change is whole or not at all, and one comes after another. A head comes only to the trunk that it was trained on,
   and only if it reproduces its golden rows there, in the profile in force.
2. What is in force is in the folder of heads: committed before the table is announced, and there again after a start.
3. A request is answered by the heads of one table that was in force at some time since it came. So the heads of a
   table stay loaded until no request that may hold it is under way (`release`), under keys of their own.
4. Heads are loaded, tried and freed where the engine steps, between two steps. What waits is neither lost nor refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mtserve.engine import Engine
from mtserve.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    HeadError,
    MtserveError,
    SetupError,
    UnknownTaskError,
)
from mtserve.golden import GoldenReport, check_golden
from mtserve.head_file import HeadFile, read_head
from mtserve.loading import add_head, remove_head
from mtserve.manifest import Manifest, check_against_trunk
from mtserve.serve.heads_folder import HeadsFolder, version_of
from mtserve.serve.live import Base, Live, LiveHead
from mtserve.serve.model import LocalModel, Queue
from mtserve.serve.table import Root, ServedTrunk, TaskTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Place:
    """Where heads of a trunk run, and the manifest of the trunk's checkpoint."""

    queue: Queue
    manifest: Manifest


@dataclass(frozen=True)
class _Coming:
    """A head that is to come, and by how much its golden logits may differ."""

    head: LiveHead
    sent: HeadFile
    place: Place
    tolerance: float

    def come(self) -> GoldenReport | None:
        """Add it, where the engine steps, and see that it answers, and reproduces its golden rows; None where it has
        none. Raises CheckpointError or ConfigError; whoever asked frees it then."""
        engine, task = self.place.queue.engine, self.head.task
        try:
            if task.key not in engine.tasks:  # one that left may still be needed, and come again
                add_head(engine, task, self.sent)
            if not self.sent.golden:
                engine.step([engine.prepare(task.key, task.kind.sample(task.options))])
                return None
            report = check_golden(engine, task.key, self.sent.golden, tolerance=self.tolerance)
        except SetupError:
            raise
        except Exception as error:  # what a head of another shape does to its trunk's states has no class of its own
            logger.exception("task %r cannot come", task.name)
            raise CheckpointError(f"the head does not run on its trunk: {type(error).__name__}") from error
        if not report.reproduced:
            found = f"differ by {report.difference:.2g}; allowed: {self.tolerance:.2g} in {engine.backend.profile}"
            raise CheckpointError(f"the logits of the head's golden rows {found}")
        return report

    def tried(self, report: GoldenReport | None) -> LiveHead:
        return replace(self.head, golden=report)


class Living:
    """A loaded model whose heads come and go. `announce` is given each later table; it is in force everywhere once that
    has returned."""

    def __init__(self, base: Base, places: Mapping[ServedTrunk, Place], folder: HeadsFolder, model: LocalModel) -> None:
        self.base, self.folder, self.model = base, folder, model
        self.live, self.table = Live(), base.table()
        self.announce: Callable[[TaskTable], Awaitable[None]] = _to_nobody
        self._places = places
        self._changing = asyncio.Lock()
        self._keys: dict[int, frozenset[str]] = {}  # by number, of tables that requests may hold
        self._coming: str | None = None
        self._hold(self.live)

    def serve(self, root: Root) -> None:
        """Let the requests of this process find each table, and tell which they may hold."""

        async def announce(table: TaskTable) -> None:
            root.swap(table)

        self.announce, root.changes, root.released = announce, self, self.release

    def restore(self) -> None:
        """Bring what the folder holds, at the start. Raises ConfigError where it does not go with the checkpoints."""
        live = Live()
        for name, file in self.folder.read().items():
            if file is None:
                live = live.minus(name)
                continue
            try:
                coming = self._read(name, file, untuned=True)
                self._expect(coming)
                live = live.plus(coming.tried(coming.place.queue.scheduler.between(coming.come).result()))
            except (MtserveError, OSError) as error:
                raise ConfigError(f"MTSERVE_HEADS: {file} cannot be served: {error}") from error
        try:
            self._hold(live)
        except SetupError as error:
            raise ConfigError(f"MTSERVE_HEADS: {self.folder.path} cannot be served: {error}") from error
        if not self.table.tasks:
            raise ConfigError(f"MTSERVE_HEADS: {self.folder.path} leaves no task to serve")

    async def put(self, name: str, file: Path, *, instead: bool = False, untuned: bool = False) -> None:
        """Bring a head, in the place of the task of that name only if it is to be `instead` of it; `untuned` takes one
        that its checkpoint did not measure in the profile in force. Raises HeadError, or CapacityError where the folder
        cannot be written; nothing has changed then."""
        async with self._changing:
            if name in self.table.tasks and not instead:
                raise HeadError(f"there is a task {name!r} already; ask to replace it, or choose another name")
            try:
                coming = await asyncio.to_thread(self._read, name, file, untuned=untuned)
                self.base.table(self.live.plus(coming.head))  # what it is in must go with it
                self._expect(coming)
                report = await asyncio.wrap_future(coming.place.queue.scheduler.between(coming.come))
                await self._committed(partial(self.folder.put, name, file))
                await self._change(self.live.plus(coming.tried(report)))
            except SetupError as error:
                raise HeadError(str(error)) from error
            finally:
                self._coming = None
                self.release(min(self._keys))
            logger.info("task %r came, version %s", name, coming.head.version)

    async def remove(self, name: str) -> None:
        """Let a task leave. Raises UnknownTaskError, HeadError for the last one or one in a chain, CapacityError as
        `put`."""
        async with self._changing:
            if name not in self.table.tasks:
                raise UnknownTaskError(name, self.table.tasks)
            if len(self.table.tasks) == 1:
                raise HeadError(f"{name!r} is the last task; a server has at least one")
            try:
                self.base.table(self.live.minus(name))
            except SetupError as error:
                raise HeadError(f"{name!r} is in a chain: {error}") from error
            await self._committed(partial(self.folder.remove, name, of_checkpoint=name in self.base.names))
            await self._change(self.live.minus(name))
            logger.info("task %r left", name)

    def release(self, oldest: int) -> None:
        """Free heads of tables before that number, which no request holds any more, as far as no later one has them."""
        self._keys = {number: keys for number, keys in self._keys.items() if number >= oldest}
        used = frozenset({self._coming}).union(*self._keys.values())
        for key in [key for key in self.model.queues if key not in used]:
            queue = self.model.queues.pop(key)
            with suppress(CapacityError):  # closing, which frees all
                queue.scheduler.between(partial(_free, queue.engine, key))

    def _expect(self, coming: _Coming) -> None:
        """So that it can be asked, and `release` leaves it alone."""
        self._coming = coming.head.task.key
        self.model.queues[self._coming] = coming.place.queue

    async def _committed(self, commit: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(commit)
        except OSError as error:
            raise CapacityError(f"the folder of heads cannot be written: {error.strerror}") from error

    async def _change(self, live: Live) -> None:
        self._hold(live)
        await self.announce(self.table)

    def _hold(self, live: Live) -> None:
        self.live, self.table = live, self.base.table(live)
        self._keys[live.number] = frozenset(task.key for task in self.table.tasks.values())

    def _read(self, name: str, file: Path, *, untuned: bool) -> _Coming:
        """A head that may come, as far as its file says. Raises HeadError, CheckpointError or ConfigError."""
        sent = read_head(file)
        head = LiveHead(sent.entry.model_copy(update={"name": name}), version_of(file), None)
        place = self._place(sent)
        try:
            check_against_trunk(sent.entry, place.manifest.trunk)
        except ValueError as error:
            raise HeadError(str(error)) from error
        settings, longest = self.base.settings, head.task.options.max_length
        if longest > (most := min(settings.max_batch_tokens, settings.max_queue_tokens)):
            raise HeadError(f"rows of the head may have {longest} tokens; this server allows {most}")
        return _Coming(head, sent, place, _tolerance(sent, place, untuned=untuned))

    def _place(self, sent: HeadFile) -> Place:
        trunk = self.base.trunk(sent.entry.trunk)
        if trunk is None:
            ours = ", ".join(f"{each.entry.fingerprint[:12]} ({each.entry.source})" for each in self.base.trunks)
            raise HeadError(f"the head was trained on trunk {sent.entry.trunk[:12]}; this server has {ours}")
        return self._places[trunk]


def _tolerance(sent: HeadFile, place: Place, *, untuned: bool) -> float:
    """By how much golden logits may differ. Raises CheckpointError for a profile in which the head was not measured."""
    profile = place.queue.engine.backend.profile
    if place.manifest.exported is not None:
        raise CheckpointError("its trunk is served from a bundle, which takes no heads")
    if profile in sent.profiles:
        return sent.profiles[profile]
    if untuned:
        return place.manifest.tolerance(profile)
    raise CheckpointError(
        f"this server computes in {profile}, in which the head's checkpoint was not measured; measured: "
        f"{', '.join(sent.profiles)}. `mtserve tune` measures it there; to take it all the same, send it as untuned"
    )


def _free(engine: Engine, key: str) -> None:
    if key in engine.tasks:
        remove_head(engine, key)


async def _to_nobody(table: TaskTable) -> None:
    """Nobody else has a table."""
