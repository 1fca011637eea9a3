"""Many items without a scheduler: all of them at once, or any number in windows. Knows no files.

What an engine adds to its steps for whoever asks no server (`Engine` inherits it).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from mtserve.errors import InputError, Problem
from mtserve.overlap import overlapped
from mtserve.tasks.base import AnyKind, Example
from mtserve.tasks.work import Work, fits

T = TypeVar("T")
Asked = Mapping[str, Mapping[str, Any] | None]
"""Tasks with their parameters."""
Each = dict[str, list[Work | InputError]]
"""For each task, for each item: its work, or what is wrong with it."""
WINDOW = 2048


class Offline:
    """An engine's answers to items, in order."""

    max_past_tokens: int

    @property
    @abstractmethod
    def apart(self) -> bool:
        """Whether a device of its own computes, so that the processor is free meanwhile."""

    @abstractmethod
    def prepare_tasks(self, asked: Asked, items: Sequence[Any], *, stream: bool = False) -> dict[str, list[Work]]: ...

    @abstractmethod
    def step(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]: ...

    @abstractmethod
    def finish(self, work: Work) -> Any: ...

    @abstractmethod
    def release(self) -> None: ...

    def complete(self, works: Sequence[Work]) -> None:
        """Step works until all are finished, whatever number of steps they take; as many at once as there is room
        for."""
        waiting, running = deque(works), list[Work]()
        while waiting or running:
            while waiting and fits(waiting[0], running, most=self.max_past_tokens):
                running.append(waiting.popleft())
            _, running = self.step(running)
        self.release()

    def run(self, works: Sequence[Work], *, errors: bool = False) -> list[Any]:
        """Predictions of works, in order.

        Raises what went wrong with the first work that failed; with `errors` that stands in its prediction's place.
        """
        self.complete(works)
        return [work.error if errors and work.error is not None else self.finish(work) for work in works]

    def predict(self, task: str, items: Sequence[Any], parameters: Mapping[str, Any] | None = None) -> list[Any]:
        """Predictions of one task for items that may be strings, mappings or examples, in order.

        Raises UnknownTaskError, or InputError that names every bad item; nothing has run then.
        """
        return self.run(self.prepare_tasks({task: parameters}, items)[task])

    def prepare_each(self, asked: Asked, items: Sequence[Any]) -> Each:
        """As `prepare_tasks`, with what is wrong with an item in its work's place. Raises UnknownTaskError, and
        InputError for a parameter."""
        try:
            return {task: [*works] for task, works in self.prepare_tasks(asked, items).items()}
        except InputError as error:
            bad = {problem.index for problem in error.problems}
            if None in bad:
                raise
        good = [at for at in range(len(items)) if at not in bad]
        found = self.prepare_tasks(asked, [items[at] for at in good])
        whole: Each = {}
        for task, works in found.items():
            by_index: dict[int, Work] = dict(zip(good, works, strict=True))
            whole[task] = [
                by_index[at] if at in by_index else self._alone(task, asked[task], item)
                for at, item in enumerate(items)
            ]
        return whole

    def score(
        self,
        items: Iterable[Any],
        tasks: Sequence[str] | Asked,
        *,
        errors: bool = False,
        window: int = WINDOW,
    ) -> Iterator[dict[str, Any]]:
        """For each item, in order, its prediction by task; items of any number are read as they are needed.

        `tasks` are names, or parameters by name. Items that several tasks understand are encoded once. Raises as
        `predict` does, at the window in which the bad item is; with `errors` the exception stands in the prediction's
        place.
        """
        asked: Asked = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks)

        def prepare(some: list[Any]) -> Each:
            if errors:
                return self.prepare_each(asked, some)
            return {task: [*works] for task, works in self.prepare_tasks(asked, some).items()}

        for each in overlapped(windows(items, window), prepare, self.computed, apart=self.apart):
            for at in range(len(next(iter(each.values()), []))):
                yield {task: self.answered(of[at], errors=errors) for task, of in each.items()}

    def computed(self, each: Each) -> Each:
        """The same, after all its works are complete."""
        self.complete([work for of in each.values() for work in of if isinstance(work, Work)])
        return each

    def answered(self, work: Work | InputError, *, errors: bool) -> Any:
        """The prediction of a complete work. Raises what is wrong with it, or with `errors` gives that back."""
        try:
            if isinstance(work, InputError):
                raise work
            return self.finish(work)
        except Exception as error:
            if errors:
                return error
            raise

    def _alone(self, task: str, parameters: Mapping[str, Any] | None, item: Any) -> Work | InputError:
        try:
            return self.prepare_tasks({task: parameters}, [item])[task][0]
        except InputError as error:
            return InputError(replace(problem, index=None) for problem in error.problems)


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many at a time."""
    every = iter(items)
    while some := list(islice(every, size)):
        yield some


def parsed_items(kind: AnyKind, items: Sequence[Any]) -> tuple[dict[int, Example], list[Problem]]:
    """Raw items as examples by their indexes, and what is wrong with the others."""
    examples: dict[int, Example] = {}
    problems: list[Problem] = []
    for index, item in enumerate(items):
        try:
            examples[index] = item if isinstance(item, kind.example) else kind.parse(item)
        except InputError as error:
            problems += error.at(index).problems
    return examples, problems
