"""JSON lines, one object a line. A line that is none is a bad record; empty lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from training.readers.record import BadRecord, Record


def read_jsonl(path: Path) -> Iterator[Record | BadRecord]:
    """Records of a UTF-8 file, with or without a byte order mark, lines ended by LF or CRLF."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path.name}:{number}"
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not content.strip():
                continue
            try:
                data = json.loads(content.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield BadRecord(where, f"not UTF-8: {error.reason} at byte {error.start} of the line")
                continue
            except ValueError as error:
                yield BadRecord(where, f"not JSON: {error}")
                continue
            yield Record(where, data) if isinstance(data, dict) else BadRecord(where, f"no JSON object: {data!r:.60}")
