"""A run of scoring: what is there already, what is to be done, who does it, all parts together."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from mtserve.chains import AnyChain
from mtserve.engine import Engine, Task
from mtserve.errors import ConfigError, MtserveError
from mtserve.score.cutting import Limits
from mtserve.score.job import Answerer, Job, Todo, Told, nothing_counted
from mtserve.score.parts import Parts, Receipt
from mtserve.score.places import STREAM, Content, Format, Place, content, opened, targets
from mtserve.score.plan import Settings, asked, columns_plan, key, shape
from mtserve.score.records import total
from mtserve.score.scorer import COUNTS, together, unpack
from mtserve.score.writing import form_of
from mtserve.tasks.measures import Metrics


class TooManyErrorsError(MtserveError):
    """More rows failed than were allowed; what was scored is kept, and the run can go on."""

    code = "too_many_errors"


@dataclass
class Summary:
    """What a run did: sums over all rows of its output, whenever they were scored, and the time of this run.

    reused    rows that an earlier run had scored
    total     rows of the input, where they were counted
    padded    tokens that were computed, padding included; `tokens` without
    metrics   by task, of rows that have a truth
    """

    counts: dict[str, float] = field(default_factory=nothing_counted)
    reused: int = 0
    total: int | None = None
    seconds: float = 0.0
    metrics: dict[str, Metrics] = field(default_factory=dict)

    def add(self, counts: Mapping[str, float]) -> None:
        for name in COUNTS:
            self.counts[name] += counts.get(name, 0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {name: round(value, 3) if name.endswith("_s") else int(value) for name, value in self.counts.items()}
        fresh = found["rows"] - self.reused
        padding = 1 - found["tokens"] / found["padded"] if found["padded"] else 0.0
        rate = {"seconds": round(self.seconds, 3), "rows_per_s": round(fresh / max(self.seconds, 1e-9), 1)}
        return {**found, "reused": self.reused, "padding": round(padding, 4), **rate, "metrics": self.metrics}


class Workers(Protocol):
    """Who scores parts."""

    def run(self, job: Job, todo: Todo, folder: Parts, told: Told) -> Iterator[Receipt]:
        """Receipts of parts that are committed; `told` hears of each window, and what it raises ends it all."""
        ...


class Here:
    """This process, with an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def run(self, job: Job, todo: Todo, folder: Parts, told: Told) -> Iterator[Receipt]:
        for receipt, files in self.answerer(job).parts(todo, told):
            yield folder.commit(receipt, files)

    def answerer(self, job: Job) -> Answerer:
        return job.by(self.engine)


class Run:
    """One input and one output.

    chains  of the model, by name
    model   what else must be the same for a run to go on: which model, in which profile
    errors  a file for rows that fail
    say     hears of the sums after each window

    Raises ConfigError and UnknownTaskError for what cannot be.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        places: Sequence[Place],
        output: str,
        settings: Settings,
        *,
        chains: Mapping[str, AnyChain] | None = None,
        output_format: Format | None = None,
        errors: str | None = None,
        limits: Limits | None = None,
        model: Mapping[str, Any] | None = None,
        say: Callable[[Summary], None] = lambda summary: None,
    ) -> None:
        self.known, self.places, self.url, self.settings = tasks, list(places), output, settings
        self.errors, self.limits, self.model, self.say = errors, limits or Limits(), model or {}, say
        self.targets = targets(self.places, output, output_format)
        if both := {one.url for one in self.places} & {one.url for one in self.targets} - {STREAM}:
            raise ConfigError(f"{min(both)} is input and output at once; choose another output")
        self.tasks = asked(tasks, settings, chains or {})
        self.shape = shape(self.tasks, settings, self.targets[0].format)
        self.summary = Summary()

    def score(self, by: Workers, *, restart: bool = False) -> Summary:
        """Raises SetupError before anything is scored, TooManyErrorsError after."""
        began = time.perf_counter()
        piped = self.places[0].url == STREAM
        if piped and self.targets[0].format != "jsonl":
            raise ConfigError("the columns of what comes over a pipe are not known before; allowed: output in jsonl")
        plan: list[Mapping[str, Any]] = [
            {} if piped else columns_plan(self._into(at), self.tasks, self.shape, target.format)
            for at, target in enumerate(self.targets)
        ]
        names = [place.name for place in self.places]
        job = Job(self.settings, names, self.targets, plan, self.errors is not None, self.limits)
        if self.url == STREAM:
            self._to_stdout(job, by)
        else:
            self._to_parts(job, by, restart=restart or piped)
        self.summary.seconds = time.perf_counter() - began
        return self.summary

    def _into(self, target: int) -> list[Place]:
        """Files of the input whose rows go into an output."""
        return self.places if len(self.targets) == 1 else [self.places[target]]

    def _to_stdout(self, job: Job, by: Workers) -> None:
        """Window by window, with nothing to go on with."""
        if not isinstance(by, Here) or self.errors is not None:
            raise ConfigError("what goes to stdout is scored in one process, with its errors in it")
        answerer, outcomes = by.answerer(job), []
        windows = (window for part in Todo(self.places, {}, self.limits) for window in part.windows(self.limits))
        for number, answered in enumerate(answerer.answered(windows)):
            rows, _ = answerer.rows(answered)
            sys.stdout.buffer.write(answerer.forms[0].part(rows, first=number == 0))
            sys.stdout.buffer.flush()
            outcomes.append(answered.outcomes)
            self._told(answered.counts)
        self._measure(outcomes)

    def _to_parts(self, job: Job, by: Workers, *, restart: bool) -> None:
        folder = Parts(self.url)
        if folder.read_run() is None and not restart and (there := self._there()):
            raise ConfigError(f"{there} is there already; --restart scores it anew, or choose another output")
        with folder.locked():
            folder.begin(self._key(job, [content(place) for place in self.places]), restart=restart)
            done = folder.receipts()
            for receipt in done.values():
                self.summary.add(receipt.counts)
                self.summary.reused += receipt.rows
            self._told({})
            for receipt in by.run(job, Todo(self.places, dict(done), self.limits), folder, self._told):
                done[receipt.shard, receipt.part] = receipt
            self._assemble(job, folder, [done[at] for at in sorted(done)])
            folder.remove()

    def _key(self, job: Job, contents: Sequence[Content]) -> Mapping[str, Any]:
        sizes = [total(place, of.lines) for place, of in zip(self.places, contents, strict=True)]
        self.summary.total = None if None in sizes else sum(size or 0 for size in sizes)
        return key(
            model=self.model,
            inputs=[(place.url, of.mark) for place, of in zip(self.places, contents, strict=True)],
            settings=self.settings,
            limits=self.limits,
            plan=job.plan,
            outputs=[one.url for one in self.targets],
            errors=self.errors,
        )

    def _told(self, counts: Mapping[str, float]) -> None:
        self.summary.add(counts)
        self.say(self.summary)
        most, found = self.settings.max_errors, int(self.summary.counts["errors"])
        if most is not None and found > most:
            raise TooManyErrorsError(f"{found} rows failed; at most {most} may (--max-errors)")

    def _assemble(self, job: Job, folder: Parts, every: Sequence[Receipt]) -> None:
        for at, (target, plan) in enumerate(zip(self.targets, job.plan, strict=True)):
            mine = [one for one in every if job.at(one.shard) == at]
            with folder.output(target.url) as file:
                form_of(target, plan).joined((folder.read(one, "data") or b"" for one in mine), file)
        if self.errors is not None:
            with folder.output(self.errors) as file:
                file.writelines(folder.read(one, "errors") or b"" for one in every)
        kept = (folder.read(one, "outcomes") for one in every)
        self._measure([unpack(content) for content in kept if content is not None])

    def _measure(self, outcomes: Sequence[Mapping[str, Sequence[Any]]]) -> None:
        for name, of in together(outcomes).items():
            task = self.known[name]
            self.summary.metrics[name] = task.kind.score(of, task.options)

    def _there(self) -> str | None:
        """An output that is there already."""
        for target in self.targets:
            with ExitStack() as stack:
                try:
                    stack.enter_context(opened(target))
                except MtserveError:
                    continue
                return target.url
        return None


def told(summary: Summary) -> str:
    """A summary in words, for a terminal."""
    found = summary.as_dict()
    metrics = found.pop("metrics")
    lines = [f"{name:<12} {value}" for name, value in found.items()]
    lines += [f"{task}: {json.dumps({name: round(v, 4) for name, v in of.items()})}" for task, of in metrics.items()]
    return "\n".join(lines)
