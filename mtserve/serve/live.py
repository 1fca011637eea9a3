"""What is served, as data: the checkpoints, and the heads that came and tasks that left since. Loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mtserve.checkpoint import Checkpoint
from mtserve.engine import Task
from mtserve.golden import GoldenReport
from mtserve.manifest import TaskEntry
from mtserve.serve.model import Model
from mtserve.serve.table import ServedTask, ServedTrunk, TaskTable
from mtserve.settings import Settings


@dataclass(frozen=True)
class LiveHead:
    """A head that came: its entry under the name by which it is served, and the version of its file."""

    entry: TaskEntry
    version: str
    golden: GoldenReport | None

    @property
    def task(self) -> Task:
        entry = self.entry
        return Task(entry.name, entry.handler, entry.parsed_options, entry.metrics, self.version)


@dataclass(frozen=True)
class Live:
    """How what is served differs from the checkpoints. `number` grows with each change."""

    number: int = 0
    heads: Mapping[str, LiveHead] = field(default_factory=lambda: MappingProxyType({}))
    removed: frozenset[str] = frozenset()

    def plus(self, head: LiveHead) -> Live:
        name = head.entry.name
        return Live(self.number + 1, {**self.heads, name: head}, self.removed - {name})

    def minus(self, name: str) -> Live:
        heads = {other: head for other, head in self.heads.items() if other != name}
        return Live(self.number + 1, heads, self.removed | {name})

    def as_json(self) -> dict[str, Any]:
        heads = [
            {
                "entry": head.entry.model_dump(mode="json"),
                "version": head.version,
                "golden": None if head.golden is None else asdict(head.golden),
            }
            for head in self.heads.values()
        ]
        return {"number": self.number, "heads": heads, "removed": sorted(self.removed)}

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> Live:
        heads = [
            LiveHead(
                TaskEntry.model_validate(head["entry"]),
                head["version"],
                None if head["golden"] is None else GoldenReport(**head["golden"]),
            )
            for head in said["heads"]
        ]
        return cls(said["number"], {head.entry.name: head for head in heads}, frozenset(said["removed"]))


@dataclass(frozen=True)
class Base:
    """What was there at the start: opened checkpoints, their trunks in the order of `grouped`, what their golden rows
    showed, by task, and what answers."""

    checkpoints: Sequence[Checkpoint]
    trunks: Sequence[ServedTrunk]
    golden: Mapping[str, GoldenReport]
    settings: Settings
    model: Model

    @property
    def names(self) -> list[str]:
        return [entry.name for each in self.checkpoints for entry in each.manifest.tasks]

    def trunk(self, fingerprint: str) -> ServedTrunk | None:
        """That on which a head goes."""
        return next((trunk for trunk in self.trunks if trunk.entry.fingerprint == fingerprint), None)

    def table(self, live: Live | None = None) -> TaskTable:
        """A head stands in the place of the task whose name it has, or behind all; chains are those of the checkpoints,
        whose tasks so cannot leave. Raises as `TaskTable.of`."""
        live = live or Live()
        tasks = {task.name: task for task in self._served()}
        for name, head in live.heads.items():
            trunk = self.trunk(head.entry.trunk)
            assert trunk is not None, "its head has come"
            tasks[name] = ServedTask(head.task, trunk, golden=head.golden)
        left = [task for name, task in tasks.items() if name not in live.removed]
        chains = [chain for each in self.checkpoints for chain in each.manifest.chains]
        return replace(TaskTable.of(left, self.settings, self.model, chains=chains), number=live.number)

    def _served(self) -> list[ServedTask]:
        trunk_of = {
            entry.name: trunk
            for together, trunk in zip(grouped(self.checkpoints), self.trunks, strict=True)
            for each in together
            for entry in each.manifest.tasks
        }
        return [
            ServedTask(
                Task(entry.name, entry.handler, entry.parsed_options, entry.metrics),
                trunk_of[entry.name],
                golden=self.golden.get(entry.name),
            )
            for each in self.checkpoints
            for entry in each.manifest.tasks
        ]


def grouped(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """Checkpoints of one trunk together, each bundle alone."""
    of_trunk: dict[tuple[str, str], list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        manifest = checkpoint.manifest  # the fingerprint does not cover the config
        alone = manifest.exported is not None
        apart = str(checkpoint.folder) if alone else manifest.files["trunk/config.json"].sha256
        key = manifest.trunk.fingerprint, apart
        of_trunk.setdefault(key, []).append(checkpoint)
    return [*of_trunk.values()]
