"""One task of a checkpoint as one file, to be sent to a running server. No torch; knows no server.

    tensors    those of the head's own file
    metadata   `mtserve-head`: JSON of what the manifest says of the task, its head's config, its golden rows, and the
               profiles that its checkpoint accepts

It is a safetensors file, so nothing in it is a pickle. A head without tensors of its own has a file without any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError
from mtserve.manifest import GoldenRow, TaskEntry, first_problem
from mtserve.safetensors_file import copy_with, read_header, read_metadata

FORMAT = 1
_KEY = "mtserve-head"


class _Said(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    entry: TaskEntry
    config: dict[str, Any] | None
    golden: tuple[GoldenRow, ...]
    profiles: dict[str, float]


@dataclass(frozen=True)
class HeadFile:
    """A head that was sent. `profiles` are those in which its checkpoint was measured, with their tolerances."""

    path: Path
    entry: TaskEntry
    config: Mapping[str, Any] | None
    golden: tuple[GoldenRow, ...]
    profiles: Mapping[str, float]


def pack_head(checkpoint: Checkpoint, task: str, target: Path) -> None:
    """Write a task's file. Raises CheckpointError for a task that is not there, and for a bundle."""
    checkpoint.check_torch("sending a head of it")
    names = [entry.name for entry in checkpoint.manifest.tasks]
    if task not in names:
        raise CheckpointError(f"{checkpoint.folder} has no task {task!r}; its tasks: {', '.join(names)}")
    entry = checkpoint.task(task)
    said = _Said(
        format=FORMAT,
        entry=entry.model_copy(update=dict.fromkeys(("weights", "config", "golden", "calibration"))),
        config=None if entry.config is None else json.loads((checkpoint.folder / entry.config).read_text("utf-8")),
        golden=tuple(checkpoint.golden(task)),
        profiles={name: profile.tolerance for name, profile in checkpoint.manifest.profiles.items()},
    )
    tensors = None if entry.weights is None else checkpoint.folder / entry.weights
    copy_with({"format": "pt", _KEY: said.model_dump_json()}, tensors, target)


def read_head(path: Path) -> HeadFile:
    """A head's file, but for its tensors. Raises CheckpointError for what is none, or of a newer format."""
    read_header(path)
    try:
        raw = json.loads(read_metadata(path).get(_KEY, "null"))
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise CheckpointError(f"the file is no head of format {FORMAT}; found format {found!r}")
        said = _Said.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"the file is no head: {first_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the file is no head: {error}") from error
    return HeadFile(path, said.entry, said.config, said.golden, said.profiles)
