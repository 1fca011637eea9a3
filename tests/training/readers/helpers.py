"""Reading a source whole, for tests of the formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.data.source import Source, read
from training.readers import BadRecord, Record

FIXTURES = Path(__file__).parents[2] / "fixtures" / "readers"


def both(base: Path, **source: Any) -> tuple[list[Record], list[BadRecord]]:
    """Records and bad records of a source."""
    found = list(read(Source(**source), base))
    return [r for r in found if isinstance(r, Record)], [r for r in found if isinstance(r, BadRecord)]


def good(base: Path, **source: Any) -> list[dict[str, Any]]:
    """The columns of the records of a source without a bad record."""
    records, bad = both(base, **source)
    assert bad == []
    return [dict(record.data) for record in records]


def faults(base: Path, **source: Any) -> list[tuple[str, str]]:
    """Places and messages of the bad records of a source."""
    return [(bad.where, bad.message) for bad in both(base, **source)[1]]
