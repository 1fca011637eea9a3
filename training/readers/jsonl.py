"""JSON lines, one object a line. A line that is none is a bad record; empty lines are skipped."""

from __future__ import annotations

import json

from training.readers.lines import read_lines
from training.readers.record import BadRecord, Files, NoOptions, Record, Records


def read_jsonl(files: Files, options: NoOptions) -> Records:
    """The objects, with the columns that each has."""
    for line in read_lines(files.path, files.encoding):
        if not line.text.strip():
            continue
        try:
            data = None if line.fault else json.loads(line.text)
            if "\\u" in line.text:
                json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            yield BadRecord(line.where, f"not JSON: {error}")
            continue
        if isinstance(data, dict):
            yield Record(line.where, data)
        else:
            yield BadRecord(line.where, line.fault or f"no JSON object: {data!r:.60}")
