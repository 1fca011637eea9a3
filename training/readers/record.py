"""One record as it was read, or why it could not be. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """Columns and values; `where` is the file and line, or the data set and row, from 1."""

    where: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class BadRecord:
    """A place that holds no record, and why."""

    where: str
    message: str
