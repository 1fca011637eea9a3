"""Many items without a scheduler: all of them at once, or any number in windows. Knows no files.

What an engine adds to its steps for whoever asks no server (`Engine` inherits it).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from mtserve.chains import AnyChain, Tasks, grouped
from mtserve.errors import InputError, Problem
from mtserve.overlap import overlapped
from mtserve.tasks.base import AnyKind, Example
from mtserve.tasks.work import Work, fits

T = TypeVar("T")
Asked = Mapping[str, Mapping[str, Any] | None]
"""Tasks and chains with their parameters."""
WINDOW = 2048


@dataclass(frozen=True)
class Followed:
    """An item half way through a chain: what the first task says of it, and works of what that hands to the second."""

    chain: AnyChain
    prediction: Any
    works: Sequence[Any]


Each = dict[str, list[Work | Followed | Exception]]
"""For each task or chain, for each item: its work, or what is wrong with it. Of a chain the works are those of its
first step, and once all is computed what was followed."""


class Offline:
    """An engine's answers to items, in order."""

    max_past_tokens: int
    tasks: Tasks
    chains: Mapping[str, AnyChain]

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

    def first_steps(self, asked: Asked, *, stream: bool) -> dict[str, tuple[str, Mapping[str, Any] | None]]:
        """What is asked first under each name: the task itself, or the first one of a chain, and its parameters. Raises
        InputError for what cannot be asked of a chain."""
        found = {name: (name, parameters) for name, parameters in asked.items()}
        for name in asked:
            if (chain := self.chains.get(name)) is not None:
                if stream:
                    raise InputError(Problem("an answer of a chain comes at once", field="stream"))
                found[name] = chain.first, chain.steps(asked[name], self.tasks).first
        return found

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
        """Predictions of one task or chain for items that may be strings, mappings or examples, in order. `parameters`
        of a chain are those of its tasks, by their names.

        Raises UnknownTaskError, or InputError that names every bad item; nothing has run then.
        """
        asked = {task: parameters}
        each: Each = {name: [*works] for name, works in self.prepare_tasks(asked, items).items()}
        return [self.answered(one, errors=False) for one in self.computed(each, asked)[task]]

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
            by_index: dict[int, Any] = dict(zip(good, works, strict=True))
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

        `tasks` are names, also of chains, or parameters by name. Items that several tasks understand are encoded once.
        Raises as `predict` does, at the window in which the bad item is; with `errors` the exception stands in the
        prediction's place.
        """
        asked: Asked = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks)

        def prepare(some: list[Any]) -> Each:
            if errors:
                return self.prepare_each(asked, some)
            return {task: [*works] for task, works in self.prepare_tasks(asked, some).items()}

        def compute(each: Each) -> Each:
            return self.computed(each, asked)

        for each in overlapped(windows(items, window), prepare, compute, apart=self.apart):
            for at in range(len(next(iter(each.values()), []))):
                yield {task: self.answered(of[at], errors=errors) for task, of in each.items()}

    def computed(self, each: Each, asked: Asked) -> Each:
        """The same, after all its works are complete: then, of each chain, those of all that was handed on."""
        self.complete([work for of in each.values() for work in of if isinstance(work, Work)])
        chains = {name: self.chains[name] for name in each if name in self.chains}
        return {**each, **{name: self._followed(chain, each[name], asked[name]) for name, chain in chains.items()}}

    def _followed(
        self, chain: AnyChain, of: Sequence[Any], parameters: Mapping[str, Any] | None
    ) -> list[Work | Followed | Exception]:
        """A chain's second step, complete; what went wrong in the first one stays."""
        said = [self.answered(one, errors=True) for one in of]
        failed = [isinstance(one, Exception) for one in said]
        items = [[] if bad else chain.items(w.example, p) for bad, w, p in zip(failed, of, said, strict=True)]
        then = {chain.then: chain.steps(parameters, self.tasks).then}
        works = self.prepare_each(then, [item for some in items for item in some])[chain.then]
        self.complete([work for work in works if isinstance(work, Work)])
        every = zip(failed, said, grouped(works, items), strict=True)
        return [one if bad else Followed(chain, one, handed) for bad, one, handed in every]

    def answered(self, work: Work | Followed | Exception, *, errors: bool) -> Any:
        """The prediction of a complete work. Raises what is wrong with it, or with `errors` gives that back."""
        try:
            if isinstance(work, Exception):
                raise work
            if isinstance(work, Followed):
                answers = [self.answered(one, errors=False) for one in work.works]
                return work.chain.joined(work.prediction, answers)
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
