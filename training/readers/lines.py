"""Lines of text files, each with its place, and of aligned files together. Knows no columns.

Only a line feed ends a line, with or without a carriage return before it: other characters that Unicode counts as line
breaks occur inside sentences.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from mtserve.errors import ConfigError
from training.readers.record import BadRecord

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_UNMARKED = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}


@dataclass(frozen=True)
class Line:
    """A line; with a `fault`, the text is only what could be made of it."""

    where: str
    text: str
    fault: str | None = None


def canonical(encoding: str) -> str:
    """Python's name of an encoding, less its byte order mark. Raises ValueError where there is none for text."""
    try:
        name = codecs.lookup(encoding).name
        "\n".encode(name)
    except (LookupError, UnicodeError) as error:
        raise ValueError(f"unknown encoding {encoding!r}; allowed: those of Python, such as utf-8, cp1256") from error
    return _UNMARKED.get(name, name)


def read_lines(path: Path, encoding: str, *, ends: bool = False) -> Iterator[Line]:
    """The lines of a file, without their ends unless asked for.

    A byte order mark decides the encoding whatever the given one is, as in the WHATWG Encoding Standard.
    """
    with path.open("rb") as file:
        start = file.read(3)
        mark, encoding = next((m for m in _MARKS if start.startswith(m[0])), (b"", canonical(encoding)))
        file.seek(len(mark))
        for number, raw in enumerate(_split(file, "\n".encode(encoding)), 1):
            text, fault = _decoded(raw, encoding)
            yield Line(f"{path.name}:{number}", text if ends else text.removesuffix("\n").removesuffix("\r"), fault)


def read_aligned(paths: tuple[Path, ...], encoding: str) -> Iterator[tuple[int, tuple[str, ...]] | BadRecord]:
    """Line numbers from 1 and the lines of that number, one a file; a number that is empty in all of them is skipped.

    Raises ConfigError, at the end, for files of different length.
    """
    files = [read_lines(path, encoding) for path in paths]
    for number, row in enumerate(zip_longest(*files), 1):
        lines = [line for line in row if line is not None]
        if len(lines) < len(paths):
            sizes = [number - (at is None) + sum(1 for _ in rest) for at, rest in zip(row, files, strict=True)]
            found = ", ".join(f"{path.name} {size}" for path, size in zip(paths, sizes, strict=True))
            raise ConfigError(f"aligned files need equally many lines; found {found}")
        bad = next((line for line in lines if line.fault or not line.text.strip()), None)
        if bad is None:
            yield number, tuple(line.text for line in lines)
        elif any(line.fault or line.text.strip() for line in lines):
            yield BadRecord(bad.where, bad.fault or "an empty line beside one that is not")


def _split(file: BinaryIO, newline: bytes) -> Iterator[bytes]:
    """Lines with their ends. Where units are wider than a byte, half of one may look like a line feed."""
    if newline == b"\n":
        yield from file
        return
    held = bytearray()
    for unit in iter(partial(file.read, len(newline)), b""):
        held += unit
        if unit == newline:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def _decoded(raw: bytes, encoding: str) -> tuple[str, str | None]:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        fault = f"not {encoding.upper()}: {error.reason} at byte {error.start} of the line"
        return raw.decode(encoding, "replace"), fault
    return text, "holds a NUL character (is the encoding right?)" if "\0" in text else None
