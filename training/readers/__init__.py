"""Raw records from files and data sets, each with the place that it came from. Knows no kind of task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mtserve.checkpoint import sha256_file
from mtserve.errors import ConfigError
from training.config import Source
from training.readers.delimited import read_delimited
from training.readers.jsonl import read_jsonl
from training.readers.record import BadRecord, Record
from training.readers.table import read_hub, read_parquet

__all__ = ["BadRecord", "Record", "fingerprint", "read"]


def read(source: Source, base: Path) -> Iterator[Record | BadRecord]:
    """The records of a source in its order; `base` is what relative paths are relative to. Raises ConfigError."""
    if source.path is None:
        return read_hub(source, base)
    path = base / source.path
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is no file")
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    return read_delimited(path, delimiter="\t" if path.suffix == ".tsv" else ",")


def fingerprint(source: Source, base: Path) -> str:
    """sha256 of the source's file; of a data set, of its records as JSON lines."""
    if source.path is not None:
        return sha256_file(base / source.path)
    digest = hashlib.sha256()
    for record in read(source, base):
        assert isinstance(record, Record)
        digest.update(json.dumps(record.data, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
