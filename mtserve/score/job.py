"""Parts of rows to the bytes of their files, by whoever has an engine: this process, a worker, another machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtserve.engine import Engine
from mtserve.errors import ConfigError
from mtserve.overlap import overlapped
from mtserve.score.cutting import Limits, Part, Window, parts
from mtserve.score.parts import Receipt
from mtserve.score.places import Place
from mtserve.score.plan import Settings, asked, shape
from mtserve.score.records import read
from mtserve.score.scorer import COUNTS, Answered, Counts, Scorer, pack, together
from mtserve.score.shape import ERROR, Shape, fault
from mtserve.score.writing import Form, Lines, Row, form_of

Told = Callable[[Counts], None]


def nothing_counted() -> Counts:
    return dict.fromkeys(COUNTS, 0)


@dataclass(frozen=True)
class Job:
    """All that scoring a part needs beside an engine; it can be sent to another process.

    names     of the files of the input
    targets   files of the output: one, or one for each of the input
    plan      columns of each
    apart     whether rows that fail go into a file of their own
    """

    settings: Settings
    names: Sequence[str]
    targets: Sequence[Place]
    plan: Sequence[Mapping[str, Any]]
    apart: bool = False
    limits: Limits = field(default_factory=Limits)

    def at(self, shard: int) -> int:
        """Which output the rows of a file go to."""
        return shard if len(self.targets) > 1 else 0

    def by(self, engine: Engine) -> Answerer:
        tasks = asked(engine.tasks, self.settings, engine.chains)
        return Answerer(self, Scorer(engine, tasks), shape(tasks, self.settings, self.targets[0].format))


@dataclass(frozen=True)
class Todo:
    """Parts that are not there yet: those of all files, or `of` one."""

    places: Sequence[Place]
    done: Mapping[tuple[int, int], Receipt]
    limits: Limits

    def __iter__(self) -> Iterator[Part]:
        for shard in range(len(self.places)):
            yield from self.of(shard)

    def of(self, shard: int) -> Iterator[Part]:
        number, start = 0, 0
        while (receipt := self.done.get((shard, number))) is not None:
            number, start = number + 1, start + receipt.rows
            if receipt.last:
                return
        records = read(self.places[shard], start=start)
        for part in parts(records, shard, self.limits, number=number, start=start):
            if (shard, part.number) not in self.done:
                yield part


@dataclass
class _Open:
    """The part that is being scored."""

    rows: list[Row] = field(default_factory=list)
    faults: list[Row] = field(default_factory=list)
    outcomes: list[Any] = field(default_factory=list)
    counts: Counts = field(default_factory=nothing_counted)


class Answerer:
    """A job with an engine."""

    def __init__(self, job: Job, scorer: Scorer, shape: Shape) -> None:
        self.job, self.scorer, self.shape = job, scorer, shape
        self.forms: list[Form] = [form_of(to, plan) for to, plan in zip(job.targets, job.plan, strict=True)]

    def answered(self, windows: Iterable[Window]) -> Iterator[Answered]:
        scorer = self.scorer
        for computed in overlapped(windows, scorer.prepare, scorer.compute, apart=scorer.engine.apart):
            yield scorer.answer(computed)

    def parts(
        self, todo: Iterable[Part], told: Told = lambda counts: None
    ) -> Iterator[tuple[Receipt, Mapping[str, bytes]]]:
        """Each part's receipt and the bytes of its files by their endings; `told` hears what each window cost."""
        ahead: dict[tuple[int, int], Part] = {}  # read, and not yet answered

        def windows() -> Iterator[Window]:
            for part in todo:
                ahead[part.shard, part.number] = part
                yield from part.windows(self.job.limits)

        held = _Open()
        for answered in self.answered(windows()):
            rows, faults = self.rows(answered)
            held.rows += rows
            held.faults += faults
            held.outcomes.append(answered.outcomes)
            for name, value in answered.counts.items():
                held.counts[name] += value
            told(answered.counts)
            window = answered.window
            if window.last:
                yield self._closed(held, ahead.pop((window.shard, window.part)))
                held = _Open()

    def rows(self, answered: Answered) -> tuple[list[Row], list[Row]]:
        """Rows of the output, and those that go into the file of errors instead."""
        shard = answered.window.shard
        places = [(self.job.names[shard], record.number) for record in answered.records]
        every = list(zip(answered.records, answered.answers, places, strict=True))
        made = [self.shape.row(record.cells, answers, where) for record, answers, where in every]
        misfits = self.forms[self.job.at(shard)].misfits(made)
        rows: list[Row] = []
        faults: list[Row] = []
        for at, (record, answers, where) in enumerate(every):
            failed = {task: one for task, one in answers.items() if isinstance(one, Exception)}
            if at in misfits and not failed:
                failed = dict.fromkeys(answers, ConfigError(misfits[at]))
                answered.counts["errors"] += 1
            if failed and self.job.apart:
                faults.append({**self.shape.kept(record.cells), ERROR: fault(failed, len(answers), where)})
            else:
                rows.append(made[at] if at not in misfits else self.shape.row({}, failed, where))
        return rows, faults

    def _closed(self, held: _Open, part: Part) -> tuple[Receipt, Mapping[str, bytes]]:
        at = self.job.at(part.shard)
        first = part.number == 0 and (part.shard == 0 or len(self.forms) > 1)
        files = {"data": self.forms[at].part(held.rows, first=first)}
        if held.faults:
            files["errors"] = Lines(Place("errors", "jsonl")).part(held.faults, first=False)
        if self.job.settings.metrics:
            files["outcomes"] = pack(together(held.outcomes))
        receipt = Receipt(
            shard=part.shard,
            part=part.number,
            start=part.start,
            rows=len(part.records),
            last=part.last,
            counts=held.counts,
        )
        return receipt, files
