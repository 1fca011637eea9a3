"""Aligned text in two files, line by line: translation pairs, or two classes of style. Knows no paraphrases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from training.readers.lines import read_aligned
from training.readers.record import BadRecord, Files, Record, Records
from training.section import Section


class ParallelOptions(Section):
    """The files are `{split}.{source}{suffix}` and `{split}.{target}{suffix}`."""

    source: str
    target: str
    suffix: str = ""
    view: Literal["translate", "style"] = "translate"
    drop_equal: bool = False


def parallel_files(folder: Path, split: str, options: ParallelOptions) -> tuple[Path, ...]:
    """Both sides of a split."""
    return tuple(folder / f"{split}.{side}{options.suffix}" for side in (options.source, options.target))


def read_parallel(files: Files, options: ParallelOptions) -> Records:
    """Records of text and target, or two a pair of text and label (the name of its side); `pair` counts lines.

    Pairs that `drop_equal` leaves out are among the `repairs` of the next record that is kept, or of the last one.
    """
    held: list[dict[str, Any]] = []
    left_out: list[str] = []
    for row in read_aligned(files.paths, files.encoding):
        if isinstance(row, BadRecord):
            yield row
            continue
        number, (source, target) = row
        if options.drop_equal and source == target:
            left_out.append("equal_pair")
            continue
        yield from _placed(held, files)
        if options.view == "translate":
            held = [{"text": source, "target": target, "pair": number}]
        else:
            sides = ((source, options.source), (target, options.target))
            held = [{"text": text, "label": label, "pair": number} for text, label in sides]
        held[0]["repairs"], left_out = left_out, []
    if held:
        held[0]["repairs"] += left_out
    yield from _placed(held, files)


def _placed(rows: list[dict[str, Any]], files: Files) -> Records:
    for row, path in zip(rows, files.paths, strict=False):
        yield Record(f"{path.name}:{row['pair']}", row)
