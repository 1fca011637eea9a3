"""What engine and scheduler tell of their work, to whoever counts it. Knows no metrics, no HTTP and no framework.

Every call comes from the thread on which the thing happened, is short, and raises nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reason = Literal["overloaded", "too_large", "deadline", "withdrawn", "closing", "failed"]
"""Why a request of which nothing, or not all, was answered went out of the queue, or did not come into it."""


@dataclass(frozen=True)
class Ran:
    """One batch that has run.

    rows      distinct ones
    joined    rows that works wanted beside those, and that were not encoded again
    tokens    of the distinct rows that were computed
    padded    tokens that the backend computed for them, padding included
    tasks     names of those that wanted the rows
    reused    rows of which the trunk's outputs were kept from an earlier batch; `kept` bytes of such there are now
    trunk_s   seconds of the trunk's pass, head_s of the heads; on a GPU the trunk's is the wait for all of it
    """

    rows: int
    joined: int
    tokens: int
    padded: int
    tasks: tuple[str, ...]
    trunk_s: float
    head_s: float
    reused: int = 0
    kept: int = 0


class Observer:
    """Takes no notice of anything."""

    def prepared(self, tasks: tuple[str, ...], *, seconds: float) -> None:
        """Inputs became rows, for these tasks at once."""

    def truncated(self, task: str, *, inputs: int) -> None:
        """So many inputs of a task had text cut."""

    def waiting(self, *, rows: int, tokens: int) -> None:
        """What waits has changed to this."""

    def started(self, task: str, *, wait_s: float) -> None:
        """A request's first work left the queue after so long."""

    def ran(self, batch: Ran) -> None:
        """A batch has run."""

    def dropped(self, task: str, reason: Reason) -> None:
        """A request of a task (its first, of several) was refused or given up."""
