"""Rows of text as a table, for a terminal or for Markdown. Knows nothing of what they say."""

from __future__ import annotations

from collections.abc import Sequence

Line = tuple[str, ...]


def aligned(lines: Sequence[Line]) -> list[str]:
    """The lines with their cells in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def markdown(lines: Sequence[Line]) -> str:
    """A Markdown table, the first line its header; what would end a cell or begin a tag is escaped."""
    cells = [[" ".join(c.replace("|", "\\|").replace("<", "&lt;").split()) for c in line] for line in lines]
    header, *rest = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([header, "|" + " --- |" * len(cells[0]), *rest])


def fenced(text: str, language: str = "") -> str:
    """A code block; its fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
