"""The task table: all that a server answers for, immutable and swapped whole. Knows no HTTP and no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mtserve.chains import AnyChain
from mtserve.engine import Task
from mtserve.errors import CapacityError, SetupError, UnknownTaskError
from mtserve.golden import GoldenReport
from mtserve.loading import InForce
from mtserve.manifest import TaskEntry, TrunkEntry
from mtserve.serve.draining import Drain
from mtserve.serve.keys import Keys
from mtserve.serve.model import Model
from mtserve.settings import Settings


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
    entry: TaskEntry
    trunk: ServedTrunk
    golden: GoldenReport | None = None

    @property
    def name(self) -> str:
        return self.task.name

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
    """Task names to served tasks, in the order of the checkpoints, with what answers, and limits and keys in force."""

    tasks: Mapping[str, ServedTask]
    settings: Settings
    model: Model
    keys: Keys = field(default_factory=Keys)
    chains: Mapping[str, AnyChain] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tasks: Iterable[ServedTask], settings: Settings, model: Model, *, chains: Iterable[AnyChain] = ()
    ) -> TaskTable:
        """Raises SetupError if two tasks have one name, ConfigError for keys that cannot be read."""
        named: dict[str, ServedTask] = {}
        for task in tasks:
            if task.name in named:
                raise clash(task.name, named[task.name].trunk.entry.source, task.trunk.entry.source)
            named[task.name] = task
        by_name = MappingProxyType({chain.name: chain for chain in chains})
        return cls(MappingProxyType(named), settings, model, Keys.of(settings), by_name)

    def task(self, name: str) -> ServedTask:
        """Raises UnknownTaskError."""
        if name not in self.tasks:
            raise UnknownTaskError(name, self.tasks, chains=self.chains)
        return self.tasks[name]

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


class Root:
    """Where requests find the table that is in force. `drain` counts them, and knows whether more are taken."""

    def __init__(self, table: TaskTable | None = None) -> None:
        self._table = table
        self.drain = Drain()

    def swap(self, table: TaskTable | None) -> TaskTable | None:
        """Put another table in force (None: nothing is served); returns the one that was, which the caller closes."""
        before, self._table = self._table, table
        return before

    async def check(self) -> None:
        """Raise CapacityError if a request would not be taken now."""
        await self.table().model.check()
        self.drain.refuse()

    def table(self) -> TaskTable:
        """The table. Raises CapacityError if nothing is loaded."""
        if self._table is None:
            raise CapacityError("the model is not loaded")
        return self._table


def clash(name: str, first: str, second: str) -> SetupError:
    """Two checkpoints with one task name."""
    return SetupError(
        f"task {name!r} is in {first} and in {second}; names must be distinct within a server: PREFIX=LOCATION in "
        "place of a location puts PREFIX. before its tasks' names"
    )
