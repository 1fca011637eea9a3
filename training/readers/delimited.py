"""CSV and TSV with a header line. Values stay the text that they are: no guessed types, no text read as missing."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from mtserve.errors import ConfigError
from training.readers.record import BadRecord, Record


def read_delimited(path: Path, *, delimiter: str) -> Iterator[Record | BadRecord]:
    """Records of a UTF-8 file, named by their last line; an empty cell is a missing value. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(lines, [])
            if not header or len(set(header)) != len(header):
                raise ConfigError(f"{path.name} needs a header line of distinct names; found {', '.join(header)!r}")
            for cells in lines:
                where = f"{path.name}:{lines.line_num}"
                if len(cells) == len(header):
                    yield Record(where, {name: cell or None for name, cell in zip(header, cells, strict=True)})
                elif cells:
                    yield BadRecord(where, f"{len(cells)} cells; the header has {len(header)}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from error
