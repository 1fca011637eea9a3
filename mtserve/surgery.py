"""Heads and chains that come into a checkpoint, leave it, or get another name. No torch; knows no engine.

Invariants (tests/test_surgery.py holds them):
1. Trunk, tokenizer, and the entries and files of all other tasks stay as they are, byte for byte.
2. New files are written first, then the manifest is replaced, then files that it no longer names are removed: a crash
   at any moment leaves the old checkpoint or the new one.
3. A head comes only to the trunk that it was trained on, by fingerprint.
4. A profile stays accepted only while every task was measured in it: a head that comes leaves fp32 alone.
5. A chain's tasks stay there, and go with it: a head that a chain uses is not removed, one that replaces it is checked
   first, and a task's new name is in its chains too. Chains alone change nothing but the manifest and the card's end.
6. What was changed is told by the manifest's provenance, under `changes`, and at the end of the card.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtserve.chains import AnyChain, Member
from mtserve.checkpoint import Checkpoint, sha256_file
from mtserve.errors import CheckpointError
from mtserve.folder import Writer, remove_unnamed, replace
from mtserve.manifest import (
    FP32,
    MANIFEST,
    Profile,
    TaskEntry,
    check_task_name,
    checked_manifest,
    format_of,
    read_manifest,
)
from mtserve.sealing import INDEX, TaskPart, commit, seal_task
from mtserve.tasks import KINDS

Profiles = Mapping[str, Profile]
_CHANGES = "\n## Changes\n\n"
_END = "<!-- end of heads -->"
_BLOCK = re.compile(rf"<!-- heads: ([^\n]*) -->\n.*?\n{_END}\n", re.DOTALL)


def add_heads(
    checkpoint: Checkpoint,
    parts: Sequence[TaskPart],
    *,
    instead: bool = False,
    told: Mapping[str, Any] | None = None,
    card: str = "",
) -> Checkpoint:
    """Commit a version with these tasks, whose heads were trained on its trunk, behind those that are there (`instead`:
    in the place of those of their names). `told` goes into provenance, `card` at the end of the card.

    Raises CheckpointError for names that are none or taken, for a head that a chain of its task cannot use, and where
    the folder holds another version by now.
    """
    _check_unchanged(checkpoint)
    taken = [part.name for part in parts if part.name in _names(checkpoint)]
    for part in parts:
        if part.name not in taken or not instead:
            _check_free(checkpoint, part.name)
    _check_chains(checkpoint.manifest.chains, checkpoint, parts)
    writer = Writer(checkpoint.folder)
    made = {part.name: seal_task(writer, part, checkpoint.manifest.trunk.fingerprint) for part in parts}
    kept = [made.pop(entry.name, entry) for entry in checkpoint.manifest.tasks]
    new = [part.name for part in parts if part.name not in taken]
    said = [f"{what} {_quoted(which)}" for what, which in (("added", new), ("replaced", taken)) if which]
    change = {"change": ", ".join(said), **(told or {})}
    block = f"<!-- heads: {' '.join(part.name for part in parts)} -->\n\n{card.strip()}\n\n{_END}\n" if card else ""
    entries = [*kept, *made.values()]
    return _committed(
        checkpoint, writer, entries, profiles={"fp32": FP32}, change=change, card=block, outdated=set(taken)
    )


def bring_heads(checkpoint: Checkpoint, source: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Commit a version with tasks of another checkpoint of the same trunk; `names` are theirs there -> theirs here.

    Raises CheckpointError as `add_heads`, for a task that is not there, and for another trunk.
    """
    _check_unchanged(checkpoint)
    ours, theirs = checkpoint.manifest.trunk, source.manifest.trunk
    if ours.fingerprint != theirs.fingerprint:
        raise CheckpointError(
            f"heads of {source.folder} were trained on trunk {theirs.fingerprint[:12]} ({theirs.source}); "
            f"{checkpoint.folder} holds {ours.fingerprint[:12]} ({ours.source}). A head goes with its own trunk alone"
        )
    source.check_torch("taking heads from it")
    _check_there(source, names)
    for name in names.values():
        _check_free(checkpoint, name)
    writer = Writer(checkpoint.folder)
    made = [_copied(writer, source, old, new) for old, new in names.items()]
    change = {"change": f"added {_quoted(names.values())} of {source.folder.resolve().name}"}
    entries = [*checkpoint.manifest.tasks, *made]
    return _committed(checkpoint, writer, entries, profiles={"fp32": FP32}, change=change)


def remove_heads(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """Commit a version without these tasks. Raises CheckpointError for tasks that are not there or in a chain, and
    where none would be left."""
    _check_unchanged(checkpoint)
    _check_there(checkpoint, names)
    for chain in checkpoint.manifest.chains:
        if used := [name for name in names if name in (chain.first, chain.then)]:
            more = f"`mtserve chains remove {checkpoint.folder} {chain.name}` takes it away"
            raise CheckpointError(f"task {used[0]!r} is used by chain {chain.name!r}; {more}")
    entries = [entry for entry in checkpoint.manifest.tasks if entry.name not in names]
    if not entries:
        raise CheckpointError(f"{checkpoint.folder} would have no task left; its tasks: {_listed(checkpoint)}")
    kept = {name: _without(profile, names) for name, profile in checkpoint.manifest.profiles.items()}
    change = {"change": f"removed {_quoted(names)}"}
    writer = Writer(checkpoint.folder)
    return _committed(checkpoint, writer, entries, profiles=kept, change=change, outdated=set(names))


def rename_head(checkpoint: Checkpoint, old: str, new: str) -> Checkpoint:
    """Commit a version in which a task has another name. Raises CheckpointError for a name that is none, is taken, or
    is not there."""
    _check_unchanged(checkpoint)
    _check_there(checkpoint, [old])
    _check_free(checkpoint, new)
    writer = Writer(checkpoint.folder)
    entries = [
        _copied(writer, checkpoint, old, new) if entry.name == old else entry for entry in checkpoint.manifest.tasks
    ]
    kept = {
        name: profile.model_copy(
            update={"tasks": {new if task == old else task: found for task, found in profile.tasks.items()}}
        )
        for name, profile in checkpoint.manifest.profiles.items()
    }
    chains = [chain.linked({old: new}) for chain in checkpoint.manifest.chains]
    change = {"change": f"renamed `{old}` to `{new}`"}
    return _committed(checkpoint, writer, entries, profiles=kept, change=change, chains=chains)


def add_chain(checkpoint: Checkpoint, chain: AnyChain) -> Checkpoint:
    """Commit a version with a chain of its tasks. Raises CheckpointError for a name that is none or taken, and for
    tasks that cannot be chained so."""
    _check_unchanged(checkpoint, what="changing its chains")
    _check_free(checkpoint, chain.name)
    _check_chains([chain], checkpoint)
    return _rechained(checkpoint, [*checkpoint.manifest.chains, chain], f"added chain `{chain.name}`")


def remove_chains(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """Commit a version without these chains. Raises CheckpointError for those that are not there."""
    _check_unchanged(checkpoint, what="changing its chains")
    there = {chain.name: chain for chain in checkpoint.manifest.chains}
    if unknown := [name for name in names if name not in there]:
        raise CheckpointError(f"{checkpoint.folder} has no chain {unknown[0]!r}; its chains: {_or_none(there)}")
    left = [chain for name, chain in there.items() if name not in names]
    return _rechained(checkpoint, left, f"removed chain {_quoted(names)}")


def _rechained(checkpoint: Checkpoint, chains: Sequence[AnyChain], said: str) -> Checkpoint:
    manifest, writer = checkpoint.manifest, Writer(checkpoint.folder)
    change = {"change": said}
    return _committed(checkpoint, writer, manifest.tasks, profiles=manifest.profiles, change=change, chains=chains)


def _committed(
    checkpoint: Checkpoint,
    writer: Writer,
    entries: Sequence[TaskEntry],
    *,
    profiles: Profiles,
    change: Mapping[str, Any],
    card: str = "",
    outdated: Collection[str] = (),
    chains: Sequence[AnyChain] | None = None,
) -> Checkpoint:
    """`chains` are those before unless they are given. `card` is added to the card; what was added to it for tasks that
    are all `outdated` goes."""
    folder, before = checkpoint.folder, checkpoint.manifest
    paths = [before.trunk.weights, "trunk/config.json", "tokenizer.json"]
    for entry in entries:
        paths += [path for path in (entry.weights, entry.config, entry.golden, entry.calibration) if path is not None]
    files = {path: writer.files.get(path) or before.files[path] for path in dict.fromkeys(paths)}
    changes = [*before.provenance.get("changes", ()), {"date": f"{datetime.now(UTC):%Y-%m-%d}", **change}]
    kept = before.chains if chains is None else chains
    raw = {
        **before.model_dump(mode="json"),
        "format": format_of(kept),
        "chains": [chain.model_dump(mode="json") for chain in kept],
        "tasks": [entry.model_dump(mode="json") for entry in entries],
        "profiles": {name: profile.model_dump(mode="json") for name, profile in profiles.items()},
        "files": {path: file.model_dump(mode="json") for path, file in files.items()},
        "provenance": {**before.provenance, "changes": changes},
    }
    commit(folder, checked_manifest(raw, folder / MANIFEST))
    _tell(folder / "README.md", changes, card, outdated)
    figures = [path.relative_to(folder).as_posix() for path in (folder / "figures").rglob("*")]
    remove_unnamed(folder, {*files, *figures, INDEX})
    return Checkpoint.open(folder)


def _copied(writer: Writer, source: Checkpoint, old: str, new: str) -> TaskEntry:
    """A task's entry under another name or in another checkpoint, with its files."""
    entry = source.task(old)
    patterns = {
        "weights": f"heads/{new}/model-{{}}.safetensors",
        "config": f"heads/{new}/config-{{}}.json",
        "golden": f"golden/{new}-{{}}.jsonl",
        "calibration": f"calibration/{new}-{{}}.jsonl",
    }
    there: dict[str, Any] = {"name": new}
    with tempfile.TemporaryDirectory(dir=writer.folder, prefix=".sealing-") as aside:
        for field, pattern in patterns.items():
            if (path := getattr(entry, field)) is not None:
                copy = Path(shutil.copyfile(source.folder / path, Path(aside) / "copy"))
                if sha256_file(copy) != source.manifest.files[path].sha256:
                    raise CheckpointError(f"{source.folder / path} is not the file that was sealed: its sha256 differs")
                there[field] = writer.move(copy, pattern)
    return entry.model_copy(update=there)


def _without(profile: Profile, names: Collection[str]) -> Profile:
    """What was measured of the other tasks."""
    if not any(name in profile.tasks for name in names):
        return profile
    left = {name: found for name, found in profile.tasks.items() if name not in names}
    counts = {"flips": sum(one.flips for one in left.values()), "rows": sum(one.rows for one in left.values())}
    return profile.model_copy(update={"tasks": left, **counts})


def _tell(path: Path, changes: Sequence[Mapping[str, Any]], card: str, outdated: Collection[str]) -> None:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before = text.rpartition(_CHANGES)[0] if _CHANGES in text else text
    kept = _BLOCK.sub(lambda block: "" if {*block[1].split()} <= {*outdated} else block[0], before)
    lines = "".join(f"- {one['date']}: {one['change']}\n" for one in changes)
    replace(path, "\n".join([kept.rstrip(), *(["", card.rstrip()] if card else []), _CHANGES + lines]).encode())


def _check_unchanged(checkpoint: Checkpoint, *, what: str = "changing its heads") -> None:
    checkpoint.check_torch(what)
    if read_manifest(checkpoint.folder) != checkpoint.manifest:
        raise CheckpointError(f"{checkpoint.folder} was written anew since it was opened; nothing is changed")


def _check_there(checkpoint: Checkpoint, names: Collection[str]) -> None:
    for name in names:
        if name not in _names(checkpoint):
            raise CheckpointError(f"{checkpoint.folder} has no task {name!r}; its tasks: {_listed(checkpoint)}")


def _check_free(checkpoint: Checkpoint, name: str) -> None:
    """Raise CheckpointError for a name that is none, or that a task or chain has."""
    try:
        check_task_name(name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if name in _names(checkpoint):
        raise CheckpointError(f"{checkpoint.folder} has a task {name!r} already; its tasks: {_listed(checkpoint)}")
    if name in checkpoint.manifest.names:
        raise CheckpointError(f"{checkpoint.folder} has a chain {name!r} already")


def _check_chains(chains: Sequence[AnyChain], checkpoint: Checkpoint, parts: Sequence[TaskPart] = ()) -> None:
    """Raise CheckpointError for chains that do not go with the tasks, some of which are to be these."""
    new = {part.name: Member(KINDS[part.kind], part.options) for part in parts}
    members = {**checkpoint.manifest.members, **new} if chains else {}
    try:
        for chain in chains:
            chain.check(members)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _names(checkpoint: Checkpoint) -> list[str]:
    return [task.name for task in checkpoint.manifest.tasks]


def _listed(checkpoint: Checkpoint) -> str:
    return ", ".join(_names(checkpoint))


def _or_none(names: Collection[str]) -> str:
    return ", ".join(names) or "none"


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
