"""The STS benchmark's own files: tab separated, no header, no quoting (Cer et al., 2017). Knows no other pair data."""

from __future__ import annotations

import math

from training.readers.lines import read_lines
from training.readers.record import BadRecord, Files, NoOptions, Record, Records

_COLUMNS = ("genre", "file", "year", "id", "score", "text", "text_pair")


def read_stsb(files: Files, options: NoOptions) -> Records:
    """Records of text, text_pair, score (0 to 5) and where the pair is from; one or two cells after these are its
    sources' names, which are left out."""
    for line in read_lines(files.path, files.encoding):
        cells = line.text.split("\t")
        if line.fault:
            yield BadRecord(line.where, line.fault)
        elif not line.text.strip():
            continue
        elif not 7 <= len(cells) <= 9:
            yield BadRecord(line.where, f"{len(cells)} cells; allowed: 7 to 9, the first seven {', '.join(_COLUMNS)}")
        elif (score := _number(cells[4])) is None:
            yield BadRecord(line.where, f"the score is no number: {cells[4]!r:.60}")
        else:
            yield Record(line.where, {**dict(zip(_COLUMNS, cells[:7], strict=True)), "score": score})


def _number(cell: str) -> float | None:
    try:
        return value if math.isfinite(value := float(cell)) else None
    except ValueError:
        return None
