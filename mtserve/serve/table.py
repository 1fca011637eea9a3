"""The task table: all that a server answers for, immutable and swapped whole. Knows no HTTP and no files."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from mtserve.chains import AnyChain
from mtserve.engine import Task
from mtserve.errors import CapacityError, SetupError, UnknownTaskError
from mtserve.golden import GoldenReport
from mtserve.loading import InForce
from mtserve.manifest import TrunkEntry
from mtserve.serve.draining import Drain
from mtserve.serve.keys import Keys
from mtserve.serve.model import Model
from mtserve.settings import Settings

_POLL_S = 0.05


@dataclass(frozen=True, eq=False)
class ServedTrunk:
    """A trunk, how it computes, and with how many threads."""

    entry: TrunkEntry
    in_force: InForce
    threads: int


@dataclass(frozen=True, eq=False)
class ServedTask:
    """A task on its trunk; `golden` is None without golden rows."""

    task: Task
    trunk: ServedTrunk
    golden: GoldenReport | None = None

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def key(self) -> str:
        """By which the model is asked for it."""
        return self.task.key

    @property
    def url(self) -> str:
        return f"/tasks/{self.name}"

    def example(self) -> dict[str, Any]:
        """The body of a small request to the task."""
        kind = self.task.kind
        sample = kind.sample(self.task.options).model_dump(mode="json", exclude_none=True)
        return {"inputs": sample["text"] if kind.takes_text and set(sample) == {"text"} else sample}

    def listing(self) -> dict[str, Any]:
        """What `GET /tasks` says of the task."""
        trunk, options = self.trunk.entry, self.task.options
        return {
            "name": self.name,
            "kind": self.task.kind.name,
            "version": self.task.version,
            "labels": list(self.task.kind.label_names(options)),
            "options": options.model_dump(mode="json"),
            "trunk": {
                "fingerprint": trunk.fingerprint,
                "family": trunk.family,
                "source": trunk.source,
                "parameters": trunk.parameters,
            },
            "profile": self.trunk.in_force.profile,
            "device": self.trunk.in_force.hardware.device,
            "padding_free": self.trunk.in_force.padding_free,
            "threads": self.trunk.threads,
            "metrics": dict(self.task.metrics),
            "golden": self._golden_facts(),
            "url": self.url,
            "example": self.example(),
        }

    def _golden_facts(self) -> dict[str, Any]:
        if self.golden is None:
            return {"checked": False, "reason": "the checkpoint has no golden rows for this task"}
        facts = {"rows": self.golden.rows, "difference": self.golden.difference, "tolerance": self.golden.tolerance}
        return {"checked": True, "reproduced": True, **facts}


@dataclass(frozen=True, eq=False)
class TaskTable:
    """Task names to served tasks, in the order of the checkpoints, with what answers, and limits and keys in force.
    `number` tells a server's tables apart, later ones being larger."""

    tasks: Mapping[str, ServedTask]
    settings: Settings
    model: Model
    keys: Keys = field(default_factory=Keys)
    admin_keys: Keys = field(default_factory=Keys)
    number: int = 0
    chains: Mapping[str, AnyChain] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tasks: Iterable[ServedTask], settings: Settings, model: Model, *, chains: Iterable[AnyChain] = ()
    ) -> TaskTable:
        """Raises SetupError if two tasks have one name or a chain does not go with its tasks, ConfigError for keys that
        cannot be read."""
        named: dict[str, ServedTask] = {}
        for task in tasks:
            if task.name in named:
                raise clash(task.name, named[task.name].trunk.entry.source, task.trunk.entry.source)
            named[task.name] = task
        by_name = MappingProxyType({chain.name: chain for chain in chains})
        table = cls(
            MappingProxyType(named), settings, model, Keys.of(settings), Keys.of_admin(settings), chains=by_name
        )
        table.check_chains()
        return table

    def task(self, name: str) -> ServedTask:
        """Raises UnknownTaskError."""
        if name not in self.tasks:
            raise UnknownTaskError(name, self.tasks, chains=self.chains)
        return self.tasks[name]

    def check_chains(self) -> None:
        """Raises SetupError."""
        if both := [name for name in self.chains if name in self.tasks]:
            raise SetupError(f"{both[0]!r} is the name of a chain and of a task; names must be distinct")
        tasks = {name: served.task for name, served in self.tasks.items()}
        try:
            for chain in self.chains.values():
                chain.check(tasks)
        except ValueError as error:
            raise SetupError(str(error)) from error

    def members(self, chain: AnyChain) -> dict[str, Task]:
        """The two tasks of a chain."""
        return {name: self.tasks[name].task for name in (chain.first, chain.then)}

    @property
    def trunks(self) -> list[ServedTrunk]:
        return list(dict.fromkeys(task.trunk for task in self.tasks.values()))

    def listing(self) -> dict[str, Any]:
        """The answer of `GET /tasks`."""
        chains = [chain.model_dump(mode="json") for chain in self.chains.values()]
        return {"tasks": [task.listing() for task in self.tasks.values()], "chains": chains}


class Changes(Protocol):
    """What changes the tasks of a server (`mtserve.serve.living`)."""

    async def put(self, name: str, file: Path, *, instead: bool = False, untuned: bool = False) -> None: ...

    async def remove(self, name: str) -> None: ...


class Root:
    """Where requests find the table that is in force, and how that changes.

    drain      counts requests, and knows whether more are taken
    changes    None where nothing is loaded
    released   is told from which table on, by number, requests that are under way may hold one
    attend     runs while the server does, in its event loop
    """

    def __init__(self, table: TaskTable | None = None) -> None:
        self._table = table
        self._under_way: Counter[int] = Counter()  # by the number of the table in force when they came
        self.drain = Drain()
        self.changes: Changes | None = None
        self.released: Callable[[int], None] = lambda oldest: None
        self.attend: Callable[[], Coroutine[Any, Any, None]] = _nothing

    def swap(self, table: TaskTable | None) -> TaskTable | None:
        """Put another table in force (None: nothing is served); returns the one that was, which the caller closes."""
        before, self._table = self._table, table
        self.released(self.oldest)
        return before

    @property
    def oldest(self) -> int:
        """The number of the first table that a request under way may hold."""
        return min([*self._under_way, self._number])

    @property
    def _number(self) -> int:
        return 0 if self._table is None else self._table.number

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A request is under way inside, and may hold this table or a later one."""
        number = self._number
        self._under_way[number] += 1
        try:
            with self.drain.entered():
                yield
        finally:
            self._under_way[number] -= 1
            if not self._under_way[number]:
                del self._under_way[number]
                if number < self._number:
                    self.released(self.oldest)

    async def attended(self) -> None:
        """What `attend` says, from when there is a table: servers differ in whether they load before they begin."""
        while self._table is None:
            await asyncio.sleep(_POLL_S)
        await self.attend()

    async def check(self) -> None:
        """Raise CapacityError if a request would not be taken now."""
        await self.table().model.check()
        self.drain.refuse()

    def table(self) -> TaskTable:
        """The table. Raises CapacityError if nothing is loaded."""
        if self._table is None:
            raise CapacityError("the model is not loaded")
        return self._table


async def _nothing() -> None:
    """There is nothing to attend to."""


def clash(name: str, first: str, second: str) -> SetupError:
    """Two checkpoints with one task name."""
    return SetupError(
        f"task {name!r} is in {first} and in {second}; names must be distinct within a server: PREFIX=LOCATION in "
        "place of a location puts PREFIX. before its tasks' names"
    )
