"""The protocol between the engine and what computes. Knows no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from mtserve.batching import Batch, Cost
from mtserve.head_file import HeadFile
from mtserve.profiles import Hardware
from mtserve.rows import Floats

Answers = dict[str, list[Floats]]
"""For each task one array for each wanted row, in order: (n_out,); (len, n_out) where the head reads all positions and
answers for each; (answers, n_out) where it reads the last ones and answers for each."""


@dataclass
class Times:
    """Seconds of one batch: of the trunk's passes, and of the heads. On a GPU what the host waits for the answers
    counts as the trunk's. `reused` of its rows were not computed, since what the trunk gives for them was kept."""

    trunk_s: float = 0.0
    head_s: float = 0.0
    reused: int = 0


class Pending(Protocol):
    """Answers of a batch that was launched. `times` are complete once they were taken."""

    @property
    def times(self) -> Times: ...

    def result(self) -> Answers:
        """Wait for them; to be called once, in the thread that launched. Raises what went wrong on the way."""
        ...


@dataclass(frozen=True)
class Done:
    """Answers of a backend that computes when it launches."""

    answers: Answers
    times: Times = field(default_factory=Times)

    def result(self) -> Answers:
        return self.answers


class Backend(Protocol):
    """One trunk with its heads, ready to compute. Called from one thread at a time.

    cost      what a batch costs this backend, in tokens
    profile   how it computes, as the manifest names it
    kept_bytes
              of what it keeps of rows for later requests
    tokens    how many it has computed so far, in batches whose answers were taken: those of rows, but for what it knew
              of them; no padding
    keeps     whether it keeps pasts, so that a pass computes the `pending` tokens of a row. One that does not computes
              every row whole and leaves the lengths of pasts as they are
    """

    profile: str
    tokens: int

    @property
    def kept_bytes(self) -> int: ...

    @property
    def hardware(self) -> Hardware:
        """What it computes on."""
        ...

    @property
    def padding_free(self) -> bool:
        """Whether rows lie end to end; else they are padded."""
        ...

    @property
    def cost(self) -> Cost: ...

    @property
    def keeps(self) -> bool: ...

    def add(self, key: str, head: HeadFile) -> None:
        """Put a head that was sent on the trunk; where that fails, nothing has changed. Raises CheckpointError."""
        ...

    def remove(self, key: str) -> None:
        """Free a head that was added."""
        ...

    def launch(self, batch: Batch) -> Pending:
        """Begin one trunk pass over the batch's rows, and each task's head on the rows that it wants; a device that
        computes by itself goes on while the next batch is made. Batches compute in the order of their launches.

        Rows may be fresh or go on from pasts, of which no two share one; nor do those of batches under way. A past has
        the length of its row once the answers are taken, if it is kept, and the length that it had if either raises.
        """
        ...

    def run(self, batch: Batch) -> Answers:
        """Launch, and wait for the answers."""
        ...

    def release(self) -> None:
        """Free what is kept for pasts that nobody holds, without waiting for the next pass."""
        ...
