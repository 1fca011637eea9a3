"""The work that carries one example through the engine, and the room that works need. Knows no kind and no engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mtserve.rows import Floats, Row
from mtserve.tasks.base import Example, Parameters


@dataclass(eq=False)
class Work:
    """One example on its way through the engine; only the engine's thread changes it after `prepare`.

    task        the name by which it was asked for
    rows        what the trunk has to encode in the next step
    logits      one array for each of `rows` from the last step, (n_out,), or (len, n_out) for token outputs
    streamed    a client reads the answer along
    reserved    tokens that a backend may have to keep of each of its `sequences`; 0 for kinds of one pass
    state       what a kind of many steps knows between them
    error       what went wrong with this work alone; `engine.finish` raises it
    passes      numbers of the engine's trunk passes that it took part in
    private     nothing of it may be kept for other requests
    head        under which key the engine knows the task (`mtserve.engine.Task.key`); without one, its name
    """

    task: str
    example: Example
    parameters: Parameters
    rows: list[Row]
    logits: list[Floats] = field(default_factory=list)
    streamed: bool = False
    reserved: int = 0
    sequences: int = 1
    state: Any = None
    error: Exception | None = None
    passes: set[int] = field(default_factory=set)
    private: bool = False
    head: str = ""

    def __post_init__(self) -> None:
        self.prompt, self.head = self.rows, self.head or self.task

    @property
    def tokens(self) -> int:
        """Tokens of the input, over all its rows."""
        return sum(map(len, self.prompt))

    @property
    def cut(self) -> int:
        """Tokens of the caller's text that no row holds."""
        return sum(row.cut for row in self.prompt)


def key_of(name: str, version: str) -> str:
    """Under which key an engine knows a version of a task; @ is in no name."""
    return f"{name}@{version}" if version else name


def named(key: str) -> str:
    """The task's name in such a key."""
    return key.partition("@")[0]


def room(works: Iterable[Work]) -> int:
    """Tokens that a backend may have to keep for these works at once: each sequence has the room of the longest."""
    kept = [(work.sequences, work.reserved) for work in works if work.reserved]
    return sum(many for many, _ in kept) * max((size for _, size in kept), default=0)


def fits(work: Work, beside: Iterable[Work], *, most: int) -> bool:
    """Whether there is room for a work beside others."""
    return not work.reserved or room([work, *beside]) <= most
