"""How far a run is, on a terminal: rows and tokens a second, and when it will end. Knows no run."""

from __future__ import annotations

import time
from typing import Any, Protocol, TextIO


class Told(Protocol):
    """What there is to tell: sums of rows, errors and tokens so far, of them the rows of an earlier run, and how many
    rows there are if that is known."""

    counts: dict[str, float]
    reused: int
    total: int | None


class Progress:
    """A bar where the stream is a terminal, else a line now and then."""

    EVERY_S = 10.0

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live = stream, stream.isatty()
        self._began = self._last = time.monotonic()
        self._bar: Any = None
        self._job: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def told(self, of: Told) -> None:
        rows, seconds = int(of.counts["rows"]), max(time.monotonic() - self._began, 1e-6)
        fresh = rows - of.reused
        said = f"{fresh / seconds:,.0f} rows/s, {of.counts['tokens'] / seconds:,.0f} tokens/s"
        said += f", {int(of.counts['errors'])} errors" if of.counts["errors"] else ""
        if self._live:
            self._draw(rows, of.total, said)
        elif time.monotonic() - self._last >= self.EVERY_S:
            self._last = time.monotonic()
            left = "" if of.total is None or not fresh else f", {(of.total - rows) * seconds / fresh:,.0f} s left"
            self._stream.write(f"{rows:,}{'' if of.total is None else f' of {of.total:,}'} rows, {said}{left}\n")
            self._stream.flush()

    def _draw(self, rows: int, total: int | None, said: str) -> None:
        from rich import progress
        from rich.console import Console

        if self._bar is None:
            shown = [progress.MofNCompleteColumn(), progress.BarColumn(), progress.TextColumn("{task.description}")]
            self._bar = progress.Progress(*shown, progress.TimeRemainingColumn(), console=Console(file=self._stream))
            self._bar.start()
            self._job = self._bar.add_task(said, total=total)
        self._bar.update(self._job, completed=rows, description=said, total=total)
