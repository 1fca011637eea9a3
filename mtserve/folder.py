"""Files of a checkpoint folder: written aside, synced, put in place at once, named by their hash. Knows no manifest's
rules; `mtserve.sealing` has the order in which they are written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtserve.checkpoint import sha256_file
from mtserve.errors import CheckpointError
from mtserve.manifest import MANIFEST, FileEntry


class Writer:
    """Puts files into a checkpoint folder by the hash of their content, and keeps the list for the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, FileEntry] = {}

    def move(self, source: Path, pattern: str) -> str:
        """Move a finished file to its name by hash; returns the name."""
        sync(source)
        digest = sha256_file(source)
        name = pattern.format(digest[:16])
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source.chmod(0o644)  # safetensors writes for the owner alone; a server often runs as another user
        source.replace(target)
        sync(target.parent)
        self.files[name] = FileEntry(size=target.stat().st_size, sha256=digest)
        return name

    def note(self, name: str) -> None:
        """List a file that is there already."""
        path = self.folder / name
        self.files[name] = FileEntry(size=path.stat().st_size, sha256=sha256_file(path))

    def write(self, pattern: str, content: bytes) -> str:
        """Write bytes to a name by hash (or to a fixed one); returns the name."""
        digest = hashlib.sha256(content).hexdigest()
        name = pattern.format(digest[:16])
        replace(self.folder / name, content)
        self.files[name] = FileEntry(size=len(content), sha256=digest)
        return name

    def jsonl(self, pattern: str, records: Iterable[Mapping[str, Any]]) -> str | None:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        return self.write(pattern, "".join(lines).encode()) if lines else None

    def fixed(self, name: str, content: bytes) -> None:
        """Write a file that must not change while the folder lives."""
        target = self.folder / name
        if target.exists() and target.read_bytes() != content:
            raise CheckpointError(f"{target} would change: write a checkpoint of another trunk into another folder")
        self.write(name, content)


def refuse_foreign(folder: Path) -> None:
    """A folder without a manifest must hold nothing, since sealing removes what no manifest names."""
    if folder.exists() and not (folder / MANIFEST).exists():
        found = [folder] if not folder.is_dir() else [p for p in folder.iterdir() if not p.name.startswith(".sealing-")]
        if found:
            raise CheckpointError(f"{folder} holds something else ({min(found).name}); choose an empty folder")


def remove_unnamed(folder: Path, named: set[str]) -> None:
    """Remove what earlier versions of the checkpoint left; only inside the format's own folders."""
    for home in ("trunk", "heads", "golden", "calibration", "figures"):
        for path in sorted((folder / home).rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(folder).as_posix() not in named:
                path.unlink()
    for left in folder.glob(".sealing-*"):
        shutil.rmtree(left, ignore_errors=True)


def replace(path: Path, content: bytes) -> None:
    """Write a file aside, sync it and put it in place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.aside")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
