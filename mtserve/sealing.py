"""Writing a checkpoint, or a new version of one, so that it is whole at every moment. No torch; knows no engine.

Invariants (tests/test_sealing.py holds them):
1. The manifest names every load-bearing file with size and sha256. Those files never change once written: all that
   may differ between two versions of a folder has its hash in its name, and a folder whose tokenizer or trunk config
   would change is refused.
2. Files are written aside, synced and renamed; the manifest is replaced last, at once. A crash at any moment leaves
   the old checkpoint or the new one. Files that no manifest names are removed after the commit.
3. What is not load-bearing (the card and its figures, the index through which plain Transformers finds the trunk)
   follows the commit.
4. `accept_profiles` replaces the manifest and touches no other file.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtserve.chains import AnyChain
from mtserve.checkpoint import Checkpoint, fingerprint
from mtserve.errors import CheckpointError
from mtserve.folder import Writer, refuse_foreign, remove_unnamed, replace
from mtserve.manifest import (
    MANIFEST,
    GoldenRow,
    Manifest,
    Profile,
    TaskEntry,
    TrunkEntry,
    check_task_name,
    checked_manifest,
    format_of,
    read_manifest,
)
from mtserve.safetensors_file import parameters, read_header
from mtserve.tasks.base import Options
from mtserve.text import TextSpec

INDEX = "trunk/model.safetensors.index.json"
_FIGURE = re.compile(r"figures/[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TrunkPart:
    """A trunk to be sealed: `write` puts `config.json` and `model.safetensors` into an empty folder."""

    write: Callable[[Path], None]
    family: str
    causal: bool
    hidden_size: int
    max_length: int | None
    source: str


@dataclass(frozen=True)
class TaskPart:
    """A task to be sealed: `write` puts the head's tensors into a file, None for a head without tensors of its own."""

    name: str
    kind: str
    options: Options
    write: Callable[[Path], None] | None = None
    config: Mapping[str, Any] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    golden: Sequence[GoldenRow] = ()
    calibration: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


def seal(
    folder: Path,
    trunk: TrunkPart,
    *,
    tasks: Sequence[TaskPart],
    chains: Sequence[AnyChain] = (),
    tokenizer_json: str,
    text: TextSpec,
    provenance: Mapping[str, Any],
    card: str,
    written_by: str,
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> Checkpoint:
    """Write a checkpoint, or a new version of the one that is there, and commit it.

    `extras` are files that the card shows, by their names, `figures/…`; those of an older version are removed. Raises
    CheckpointError if the folder holds something else, or a checkpoint with another tokenizer or trunk config.
    """
    refuse_foreign(folder)
    for name in extras:
        if not _FIGURE.fullmatch(name):
            raise CheckpointError(f"{name!r} is no name of an extra file; allowed: figures/ and a plain file name")
    for task in tasks:
        try:
            check_task_name(task.name)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".sealing-") as aside:
        trunk.write(Path(aside))
        writer.fixed("tokenizer.json", tokenizer_json.encode())
        writer.fixed("trunk/config.json", (Path(aside) / "config.json").read_bytes())
        weights = writer.move(Path(aside) / "model.safetensors", "trunk/model-{}.safetensors")
    mark = fingerprint(folder / weights, tokenizer_json, text)
    entries = [seal_task(writer, task, mark) for task in tasks]
    entry = TrunkEntry(
        fingerprint=mark,
        weights=weights,
        family=trunk.family,
        causal=trunk.causal,
        hidden_size=trunk.hidden_size,
        max_length=trunk.max_length,
        parameters=parameters(folder / weights),
        source=trunk.source,
    )
    parts = {"trunk": entry, "text": text, "tasks": entries, "files": writer.files, "provenance": provenance}
    parts["chains"] = tuple(chains)
    manifest = checked_manifest({"format": format_of(chains), "written_by": written_by, **parts}, folder / MANIFEST)
    commit(folder, manifest)
    # Plain AutoModel.from_pretrained(trunk/) finds the weights through this index; nothing of ours reads it.
    index = {"metadata": {}, "weight_map": dict.fromkeys(read_header(folder / weights), Path(weights).name)}
    replace(folder / INDEX, json.dumps(index, indent=1).encode())
    for name, content in {**extras, "README.md": card.encode()}.items():
        replace(folder / name, content)
    remove_unnamed(folder, {*writer.files, *extras, INDEX})
    return Checkpoint.open(folder)


def accept_profiles(checkpoint: Checkpoint, profiles: Mapping[str, Profile]) -> Checkpoint:
    """Commit a manifest that accepts these profiles and says all else as before; returns the checkpoint anew.

    Raises CheckpointError if the folder holds another version by now than the one that was opened.
    """
    if read_manifest(checkpoint.folder) != checkpoint.manifest:
        raise CheckpointError(f"{checkpoint.folder} was written anew since it was opened; nothing is changed")
    raw = checkpoint.manifest.model_dump(mode="json")
    raw["profiles"] = {name: profile.model_dump(mode="json") for name, profile in profiles.items()}
    commit(checkpoint.folder, checked_manifest(raw, checkpoint.folder / MANIFEST))
    return Checkpoint.open(checkpoint.folder)


def commit(folder: Path, manifest: Manifest) -> None:
    replace(folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())


def seal_task(writer: Writer, task: TaskPart, trunk: str) -> TaskEntry:
    home, weights, config = f"heads/{task.name}", None, None
    if task.write is not None:
        with tempfile.TemporaryDirectory(dir=writer.folder, prefix=".sealing-") as aside:
            task.write(Path(aside) / "head")
            weights = writer.move(Path(aside) / "head", home + "/model-{}.safetensors")
    if task.config is not None:
        config = writer.write(home + "/config-{}.json", json.dumps(task.config, indent=1, sort_keys=True).encode())
    golden = [row.model_dump(mode="json") for row in task.golden]
    return TaskEntry(
        name=task.name,
        kind=task.kind,
        options=task.options.model_dump(mode="json"),
        trunk=trunk,
        weights=weights,
        config=config,
        tied=dict(task.tied),
        golden=writer.jsonl(f"golden/{task.name}-{{}}.jsonl", golden),
        calibration=writer.jsonl(f"calibration/{task.name}-{{}}.jsonl", task.calibration),
        metrics=dict(task.metrics),
    )
