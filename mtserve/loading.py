"""A checkpoint's location to an engine that answers. Knows no HTTP."""

from __future__ import annotations

from pathlib import Path

from mtserve.checkpoint import Checkpoint
from mtserve.engine import DEFAULT_BUDGET, DEFAULT_PAST, Engine, Task
from mtserve.errors import MissingExtraError
from mtserve.resolve import resolve


def load(location: str | Path, *, max_batch_tokens: int = DEFAULT_BUDGET) -> Engine:
    """Load a checkpoint (a folder, or a hub id with an optional revision) once, for all its tasks.

    Raises ResolveError, CheckpointError, or MissingExtraError where torch is not installed.
    """
    return load_checkpoint(Checkpoint.open(resolve(location)), max_batch_tokens=max_batch_tokens)


def load_checkpoint(
    checkpoint: Checkpoint,
    *others: Checkpoint,
    max_batch_tokens: int = DEFAULT_BUDGET,
    max_past_tokens: int = DEFAULT_PAST,
) -> Engine:
    """An engine over an opened checkpoint, and over the heads of others that have the same trunk and other tasks."""
    try:
        from mtserve.backends.eager import EagerBackend
        from mtserve.weights import add_heads, load_model
    except ImportError as error:
        raise MissingExtraError("running a torch checkpoint", "torch") from error
    model = load_model(checkpoint)
    for other in others:
        add_heads(model, other)
    entries = [entry for each in (checkpoint, *others) for entry in each.manifest.tasks]
    return Engine(
        [Task(entry.name, entry.handler, entry.parsed_options, entry.metrics) for entry in entries],
        EagerBackend(model, pad_id=checkpoint.manifest.text.pad_id),
        checkpoint.text(),
        max_batch_tokens=max_batch_tokens,
        max_past_tokens=max_past_tokens,
    )
