"""MTSERVE_MODEL to a task table: open the checkpoints, load each trunk once, check the golden rows. Knows no HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError, MissingExtraError
from mtserve.loading import reproduced
from mtserve.manifest import check_task_name
from mtserve.observer import Observer
from mtserve.opening import Loaded, opened
from mtserve.resolve import resolve
from mtserve.scheduler import Scheduler
from mtserve.serve.heads_folder import HeadsFolder
from mtserve.serve.keeping import home
from mtserve.serve.keys import Keys
from mtserve.serve.live import Base, grouped
from mtserve.serve.living import Living, Place
from mtserve.serve.model import LocalModel, Queue
from mtserve.serve.table import ServedTrunk, TaskTable, clash
from mtserve.settings import Settings
from mtserve.share import Share
from mtserve.stepper import InThread

logger = logging.getLogger(__name__)


def split_prefix(location: str) -> tuple[str, str]:
    """(prefix, location) of what may be `PREFIX=LOCATION`; a path that exists is a path, whatever is in its name."""
    prefix, equals, rest = location.partition("=")
    if not equals or "/" in prefix or Path(location).exists():
        return "", location
    try:
        if prefix.endswith("."):
            raise ValueError(f"{prefix!r} ends with the dot that is put after it")
        return check_task_name(prefix), rest
    except ValueError as error:
        raise ConfigError(f"the prefix of {location}: {error}") from error


def open_checkpoints(locations: Sequence[str]) -> list[Checkpoint]:
    """Open and check what is to be served, without reading weights; tasks have the names that they are served by.

    Raises ConfigError if there is nothing, or for a prefix that is none; SetupError for two tasks of one name;
    ResolveError or CheckpointError.
    """
    if not locations:
        raise ConfigError(
            "MTSERVE_MODEL names no checkpoint: set it to a folder or a hub id, or to several with commas"
        )
    checkpoints: list[Checkpoint] = []
    owners: dict[str, str] = {}
    for location in locations:
        prefix, unprefixed = split_prefix(location)
        checkpoint = _prefixed(Checkpoint.open(resolve(unprefixed)), prefix)
        for name in checkpoint.manifest.names:
            if name in owners:
                raise clash(name, owners[name], location)
            owners[name] = location
        checkpoints.append(checkpoint)
    return checkpoints


def _prefixed(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """The checkpoint with other names for its tasks and chains. Raises ConfigError for one that is too long."""
    if not prefix:
        return checkpoint
    manifest = checkpoint.manifest
    try:
        names = {name: check_task_name(f"{prefix}.{name}") for name in manifest.names}
    except ValueError as error:
        raise ConfigError(f"with prefix {prefix!r}: {error}") from error
    tasks = tuple(task.model_copy(update={"name": names[task.name]}) for task in manifest.tasks)
    chains = tuple(chain.linked(names, name=names[chain.name]) for chain in manifest.chains)
    return replace(checkpoint, manifest=manifest.model_copy(update={"tasks": tasks, "chains": chains}))


def check_settings(settings: Settings) -> list[Checkpoint]:
    """Open what is to be served and see that the settings go with it, without reading weights.

    Raises what `open_checkpoints` raises; ConfigError for keys that cannot be read, weights of no task, and limits that
    are below the longest row of a task; MissingExtraError for a playground without Gradio.
    """
    checkpoints = open_checkpoints(settings.model)
    Keys.of(settings)
    if settings.ui and find_spec("gradio") is None:
        raise MissingExtraError("the playground (MTSERVE_UI)", "ui")
    tasks = {task.name: task.parsed_options.max_length for each in checkpoints for task in each.manifest.tasks}
    if unknown := sorted(set(settings.weights) - set(tasks)):
        raise ConfigError(f"MTSERVE_WEIGHTS: no task {unknown[0]!r}; tasks: {', '.join(tasks)}")
    for limit in ("max_batch_tokens", "max_queue_tokens"):
        for name, longest in tasks.items():
            if longest > (allowed := getattr(settings, limit)):
                found = f"rows of task {name!r} may have {longest} tokens"
                raise ConfigError(f"MTSERVE_{limit.upper()}: {allowed} is too little, as {found}")
    return checkpoints


def load_table(
    settings: Settings, *, workers: int = 1, observer: Callable[[str], Observer] = lambda trunk: Observer()
) -> TaskTable:
    """The table of `load`."""
    return load(settings, workers=workers, observer=observer).table


def load(
    settings: Settings, *, workers: int = 1, observer: Callable[[str], Observer] = lambda trunk: Observer()
) -> Living:
    """Load every checkpoint of the settings, those of one trunk as one model, in this process: one of so many `workers`
    that share the machine, each with a model of its own. `observer` is made for a trunk, by its fingerprint's start.
    Heads that came to an earlier server with the same folder of heads are there again.

    Raises what `check_settings` and `load_checkpoint` raise; CheckpointError for golden rows that are not reproduced;
    ConfigError for a folder of heads that does not go with the checkpoints.

    All of it runs in a thread that ends, and with it the OpenMP threads that PyTorch starts for whoever computes. Did
    they live on, there would be more of them than cores beside the engine's, and OpenMP would put its threads to sleep
    between any two operations, which doubles the time of a short request.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="mtserve-load") as apart:
        return apart.submit(_load, settings, workers, observer).result()


def _load(settings: Settings, workers: int, observer: Callable[[str], Observer]) -> Living:
    checkpoints = check_settings(settings)
    folder = HeadsFolder(settings.heads) if settings.heads else HeadsFolder.private(home())
    torch = any(each.manifest.exported is None for each in checkpoints)
    share = Share.of(settings, workers=workers, torch=torch)
    loaded = [opened(together, settings, share.threads) for together in grouped(checkpoints)]
    share.settle([speed for each in loaded for speed in each.speeds(share.cores)])
    golden = {
        name: report for each in loaded for one in each.checkpoints for name, report in reproduced(each.engine, one)
    }
    trunks: list[ServedTrunk] = []
    queues: list[Queue] = []
    thread = ThreadPoolExecutor(1, thread_name_prefix="mtserve-engines") if len(loaded) > 1 else None
    for each in loaded:
        trunks.append(ServedTrunk(each.checkpoints[0].manifest.trunk, each.in_force, share.threads))
        _say(trunks[-1])
        queues.append(_queue(each, settings, observer(each.fingerprint[:12]), thread))
    model = LocalModel({key: queue for queue in queues for key in queue.engine.tasks})
    places = {
        trunk: Place(queue, each.checkpoints[0].manifest)
        for trunk, queue, each in zip(trunks, queues, loaded, strict=True)
    }
    living = Living(Base(checkpoints, trunks, golden, settings, model), places, folder, model)
    living.restore()
    for task in living.table.tasks.values():
        if task.golden is None:
            logger.warning("task %r has no golden rows, so nothing shows that it answers as when sealed", task.name)
    return living


def _say(trunk: ServedTrunk) -> None:
    """Log how a trunk computes."""
    entry, how = trunk.entry, trunk.in_force
    padding = "no padding" if how.padding_free else "rows padded"
    found = entry.fingerprint[:12], entry.family, how.profile, how.hardware.key, padding, trunk.threads
    logger.info("trunk %s (%s): profile %s on %s, %s, %d threads", *found)


def _queue(loaded: Loaded, settings: Settings, observer: Observer, thread: ThreadPoolExecutor | None) -> Queue:
    """The one of a trunk, for all tasks on it; `thread` is the one in which several trunks compute."""
    from mtserve.backends.machine import trim_memory

    loaded.engine.observer = observer
    scheduler = Scheduler(
        InThread(loaded.engine, thread) if thread and loaded.in_force.hardware.device == "cpu" else loaded.engine,
        max_queue_tokens=settings.max_queue_tokens,
        timeout_s=settings.timeout_s,
        max_wait_ms=settings.max_wait_ms,
        weights=settings.weights,
        observer=observer,
        tidy=trim_memory,
    )
    return Queue(loaded.engine, scheduler)
