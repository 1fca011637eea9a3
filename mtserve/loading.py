"""A checkpoint's location to an engine that answers. Knows no HTTP."""

from __future__ import annotations

from pathlib import Path

from mtserve.checkpoint import Checkpoint
from mtserve.engine import DEFAULT_BUDGET, Engine, Task
from mtserve.errors import MissingExtraError
from mtserve.resolve import resolve


def load(location: str | Path, *, max_batch_tokens: int = DEFAULT_BUDGET) -> Engine:
    """Load a checkpoint (a folder, or a hub id with an optional revision) once, for all its tasks.

    Raises ResolveError, CheckpointError, or MissingExtraError where torch is not installed.
    """
    return load_checkpoint(Checkpoint.open(resolve(location)), max_batch_tokens=max_batch_tokens)


def load_checkpoint(checkpoint: Checkpoint, *, max_batch_tokens: int = DEFAULT_BUDGET) -> Engine:
    """An engine over an opened checkpoint."""
    try:
        from mtserve.backends.eager import EagerBackend
        from mtserve.weights import load_model
    except ImportError as error:
        raise MissingExtraError("running a torch checkpoint", "torch") from error
    tasks = [Task(t.name, t.handler, t.parsed_options, t.metrics) for t in checkpoint.manifest.tasks]
    backend = EagerBackend(load_model(checkpoint), pad_id=checkpoint.manifest.text.pad_id)
    return Engine(tasks, backend, checkpoint.text(), max_batch_tokens=max_batch_tokens)
