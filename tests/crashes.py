"""A writer that is stopped before one of its renames and removals, as by a crash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Stopped(Exception):
    """Stands for a crash."""


class Crash:
    """Lets so many renames and removals happen as `run` is told, and stops the next one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = 0
        for owner, name in ((os, "replace"), (Path, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def run(self, write: Callable[[], Any], *, after: int) -> bool:
        """Whether the writer came to its end."""
        self._left = after
        try:
            write()
        except Stopped:
            return False
        return True

    def _counted(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Stopped
            return real(*args, **kwargs)

        return call
