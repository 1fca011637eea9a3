"""The access log: lines of JSON on their way to a stream, written some at a time. Knows no HTTP.

A write for every request would cost the event loop as much as reading its body does, so lines wait a moment for others;
at most PAUSE_S of them are lost when the process is killed. Where no event loop runs, each is written at once.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
from typing import TextIO

PAUSE_S = 0.1
access = logging.getLogger("mtserve.access")


class Lines(logging.Handler):
    """Writes messages as they are, a line each, in their order."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: list[str] = []
        atexit.register(self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held, as `flush` is by itself."""
        self._lines.append(record.getMessage() + "\n")
        if len(self._lines) > 1:
            return  # the first has seen to it
        try:
            asyncio.get_running_loop().call_later(PAUSE_S, self.flush)
        except RuntimeError:
            self.flush()

    def flush(self) -> None:
        with self.lock:  # type: ignore[union-attr]
            lines, self._lines = self._lines, []
            if lines and not self._stream.closed:  # at the end of a process it may be
                self._stream.write("".join(lines))
                self._stream.flush()
