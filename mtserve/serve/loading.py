"""MTSERVE_MODEL to a task table: open the checkpoints, load each once, check the golden rows. Knows no HTTP."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.errors import CheckpointError, ConfigError
from mtserve.golden import GoldenReport, check_golden
from mtserve.loading import load_checkpoint
from mtserve.manifest import TaskEntry
from mtserve.resolve import resolve
from mtserve.scheduler import Scheduler
from mtserve.serve.table import ServedTask, ServedTrunk, TaskTable, clash
from mtserve.settings import Settings

logger = logging.getLogger(__name__)


def open_checkpoints(locations: Sequence[str]) -> list[Checkpoint]:
    """Open and check what is to be served, without reading weights.

    Raises ConfigError if there is nothing, SetupError for two tasks of one name, ResolveError or CheckpointError.
    """
    if not locations:
        raise ConfigError(
            "MTSERVE_MODEL names no checkpoint: set it to a folder or a hub id, or to several with commas"
        )
    checkpoints: list[Checkpoint] = []
    owners: dict[str, str] = {}
    for location in locations:
        checkpoint = Checkpoint.open(resolve(location))
        for task in checkpoint.manifest.tasks:
            if task.name in owners:
                raise clash(task.name, owners[task.name], location)
            owners[task.name] = location
        checkpoints.append(checkpoint)
    return checkpoints


def load_table(settings: Settings) -> TaskTable:
    """Load every checkpoint of the settings. Raises what `open_checkpoints` and `load_checkpoint` raise."""
    tasks = [task for checkpoint in open_checkpoints(settings.model) for task in _serve(checkpoint, settings)]
    table = TaskTable.of(tasks, settings)
    for task in table.tasks.values():
        if task.problem is not None:
            logger.error("not ready: %s", task.problem)
        elif task.golden is None:
            logger.warning("task %r has no golden rows, so nothing shows that it answers as when sealed", task.name)
    return table


def _serve(checkpoint: Checkpoint, settings: Settings) -> list[ServedTask]:
    engine = load_checkpoint(checkpoint, max_batch_tokens=settings.max_batch_tokens)
    checked = [(entry, *_golden(checkpoint, engine, entry)) for entry in checkpoint.manifest.tasks]
    scheduler = Scheduler(engine, max_queue_tokens=settings.max_queue_tokens, timeout_s=settings.timeout_s)
    trunk = ServedTrunk(checkpoint.manifest.trunk, engine, scheduler)
    return [
        ServedTask(engine.task(entry.name), entry, trunk, golden=report, problem=problem)
        for entry, report, problem in checked
    ]


def _golden(checkpoint: Checkpoint, engine: Engine, entry: TaskEntry) -> tuple[GoldenReport | None, str | None]:
    """(report, problem) of a task's golden rows under the profile in force; (None, None) where there are none."""
    rows = checkpoint.golden(entry.name)
    if not rows:
        return None, None
    name = engine.backend.profile
    try:
        tolerance = checkpoint.manifest.tolerance(name)
        report = check_golden(engine, entry.name, rows, tolerance=tolerance)
    except CheckpointError as error:
        return None, f"task {entry.name!r}: {str(error).removeprefix(f'task {entry.name!r}: ')}"
    if report.reproduced:
        return report, None
    found = f"differ by {report.difference:.2g}; profile {name} allows {tolerance:.2g}"
    return report, f"task {entry.name!r}: the logits of the golden rows {found}"
