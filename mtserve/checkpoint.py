"""A checkpoint on disk, or a bundle (`mtserve.bundle`): open it, check it, read what it holds. No torch; knows no
engine. Writing is in sealing.py.

    checkpoint/  mtserve.json                                    the manifest, and the only commit
                 tokenizer.json  trunk/config.json               fixed for the life of the folder
                 trunk/model-<hash>.safetensors  trunk/model.safetensors.index.json
                 heads/<task>/config-<hash>.json  heads/<task>/model-<hash>.safetensors
                 golden/<task>-<hash>.jsonl  calibration/<task>-<hash>.jsonl  README.md

Opening checks format, names, presence, sizes and safetensors headers; `verify` reads all bytes too. A head names the
fingerprint of the trunk that it was trained on; another trunk is an error.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mtserve.errors import CheckpointError
from mtserve.manifest import GoldenRow, Manifest, TaskEntry, read_manifest
from mtserve.safetensors_file import hash_tensors, read_header
from mtserve.text import Text, TextSpec


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest has been read and whose files are present: weights with their declared sizes
    and headers that fit them, all others byte for byte."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read a folder. Raises CheckpointError with the first thing that is wrong."""
        manifest = read_manifest(folder)
        for name, entry in manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            if (size := path.stat().st_size) != entry.size:
                raise CheckpointError(f"{path} has {size} bytes; the manifest says {entry.size}")
            if name.endswith(".safetensors"):
                read_header(path)
            elif sha256_file(path) != entry.sha256:  # all but the weights is small enough to be read whole
                raise CheckpointError(f"{path} is not the file that was sealed: its sha256 differs")
        return cls(folder, manifest)

    def verify(self) -> None:
        """Read every byte. Raises CheckpointError where a hash or the trunk's fingerprint differs."""
        for name, entry in self.manifest.files.items():
            if (found := sha256_file(self.folder / name)) != entry.sha256:
                raise CheckpointError(
                    f"{self.folder / name} has sha256 {found[:12]}…, the manifest says {entry.sha256[:12]}…"
                )
        if self.manifest.exported is not None:  # a bundle's tensors are not those that the trunk's mark was made of
            return
        found = fingerprint(self.folder / self.manifest.trunk.weights, self.tokenizer_json, self.manifest.text)
        if found != self.manifest.trunk.fingerprint:
            raise CheckpointError(
                f"trunk fingerprint {found[:12]} differs from the manifest's {self.manifest.trunk.fingerprint[:12]}"
            )

    def check_torch(self, what: str) -> None:
        """Raise CheckpointError for a bundle, of which `what` cannot be done."""
        if self.manifest.exported is not None:
            raise CheckpointError(
                f"{self.folder} is a bundle of ONNX graphs, and {what} needs the checkpoint that it was exported from"
            )

    @cached_property
    def tokenizer_json(self) -> str:
        return (self.folder / "tokenizer.json").read_text(encoding="utf-8")

    def text(self) -> Text:
        return Text(self.tokenizer_json, self.manifest.text)

    def task(self, name: str) -> TaskEntry:
        for task in self.manifest.tasks:
            if task.name == name:
                return task
        raise KeyError(name)

    def golden(self, name: str) -> list[GoldenRow]:
        """The golden rows of a task; empty if it has none."""
        path = self.task(name).golden
        return [] if path is None else [GoldenRow.model_validate(r) for r in read_jsonl(self.folder / path)]

    def calibration(self, name: str) -> list[dict[str, Any]]:
        """The calibration rows of a task, as labelled records; empty if it has none."""
        path = self.task(name).calibration
        return [] if path is None else read_jsonl(self.folder / path)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(weights: Path, tokenizer_json: str, text: TextSpec) -> str:
    """sha256 over the sorted trunk tensors (name, dtype, shape, bytes), the tokenizer and the text spec."""
    digest = hashlib.sha256()
    hash_tensors(weights, digest)
    digest.update(hashlib.sha256(tokenizer_json.encode()).digest())
    chosen = text.model_dump(mode="json", exclude_defaults=True)  # a later version's new fields leave old marks valid
    digest.update(json.dumps(chosen, sort_keys=True).encode())
    return digest.hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file. Raises CheckpointError with file and line."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(f"{path}:{number} is not JSON: {error}") from error
    return records
