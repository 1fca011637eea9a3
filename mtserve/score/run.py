"""A run of scoring: what is there already, what is to be done, one window after another, all parts together."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from mtserve.engine import Engine
from mtserve.errors import ConfigError, MtserveError
from mtserve.overlap import overlapped
from mtserve.score.cutting import Limits, Window, parts
from mtserve.score.parts import Parts, Receipt
from mtserve.score.places import STREAM, Place, content, opened, targets
from mtserve.score.plan import Settings, asked, columns_plan, key, shape
from mtserve.score.records import read, total
from mtserve.score.scorer import COUNTS, Answered, Scorer, pack, together, unpack
from mtserve.score.shape import ERROR, Shape, fault
from mtserve.score.writing import Form, Lines, form_of
from mtserve.tasks.measures import Metrics

Say = Callable[["Summary"], None]


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

    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    reused: int = 0
    total: int | None = None
    seconds: float = 0.0
    metrics: dict[str, Metrics] = field(default_factory=dict)

    def add(self, counts: Any) -> None:
        for name in COUNTS:
            self.counts[name] += counts.get(name, 0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {name: round(value, 3) if name.endswith("_s") else int(value) for name, value in self.counts.items()}
        fresh = found["rows"] - self.reused
        padding = 1 - found["tokens"] / found["padded"] if found["padded"] else 0.0
        rate = {"seconds": round(self.seconds, 3), "rows_per_s": round(fresh / max(self.seconds, 1e-9), 1)}
        return {**found, "reused": self.reused, "padding": round(padding, 4), **rate, "metrics": self.metrics}


@dataclass
class _Open:
    """The part that is being scored."""

    start: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[Any] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    count: int = 0


class Run:
    """One input, one output, one engine. `score` does it all and gives the summary."""

    def __init__(
        self,
        engine: Engine,
        places: Sequence[Place],
        output: str,
        settings: Settings,
        *,
        output_format: Any = None,
        errors: str | None = None,
        limits: Limits | None = None,
        model: Any = None,
    ) -> None:
        self.engine, self.places, self.url, self.settings = engine, list(places), output, settings
        self.errors, self.limits, self.model = errors, limits or Limits(), model or {}
        self.say: Say = lambda summary: None
        self.targets = targets(self.places, output, output_format)
        self.tasks = asked(engine, settings)
        self.shape: Shape = shape(engine, settings, self.tasks, self.targets[0].format)
        self.scorer = Scorer(engine, self.tasks)
        self.summary = Summary()
        self._open = _Open()
        self._done: dict[tuple[int, int], Receipt] = {}

    def score(self, *, restart: bool = False) -> Summary:
        """Raises SetupError before anything is scored, TooManyErrorsError after."""
        began = time.perf_counter()
        streamed = self.places[0].url == STREAM
        if streamed and self.targets[0].format != "jsonl":
            raise ConfigError("the columns of what comes over a pipe are not known before; allowed: output in jsonl")
        plan = [{} if streamed else self._planned(at, target) for at, target in enumerate(self.targets)]
        self.forms = [form_of(target, one) for target, one in zip(self.targets, plan, strict=True)]
        if self.url == STREAM:
            self._to_stdout()
        else:
            self._to_parts(plan, restart=restart or streamed)
        self.summary.seconds = time.perf_counter() - began
        return self.summary

    def _planned(self, at: int, target: Place) -> dict[str, Any]:
        """Columns of an output, by the files that go into it."""
        places = self.places if len(self.targets) == 1 else [self.places[at]]
        return columns_plan(places, self.tasks, self.shape, target.format)

    def _form(self, shard: int) -> Form:
        return self.forms[0 if len(self.forms) == 1 else shard]

    def _to_stdout(self) -> None:
        first = True
        for answered in self._answered({}):
            rows, _ = self._rows(answered)
            sys.stdout.buffer.write(self.forms[0].part(rows, first=first))
            sys.stdout.buffer.flush()
            first = False
            self._open.outcomes.append(answered.outcomes)
            self._count(answered)
        self._measure(self._open.outcomes)

    def _to_parts(self, plan: Any, *, restart: bool) -> None:
        folder = Parts(self.url)
        if folder.read_run() is None and not restart and (there := self._there()):
            raise ConfigError(f"{there} is there already; --restart scores it anew, or choose another output")
        with folder.locked():
            contents = [content(place) for place in self.places]
            sizes = [total(place, of.lines) for place, of in zip(self.places, contents, strict=True)]
            self.summary.total = None if None in sizes else sum(size or 0 for size in sizes)
            marks = [(place.url, of.mark) for place, of in zip(self.places, contents, strict=True)]
            wanted = key(
                model=self.model,
                inputs=marks,
                settings=self.settings,
                limits=self.limits,
                plan=plan,
                outputs=[one.url for one in self.targets],
                errors=self.errors,
            )
            folder.begin(wanted, restart=restart)
            self._done = folder.receipts()
            for receipt in self._done.values():
                self.summary.add(receipt.counts)
                self.summary.reused += receipt.rows
            self._check_errors()
            for answered in self._answered(self._done):
                self._take(answered, folder)
            self._assemble(folder)
            folder.remove()

    def _answered(self, done: Any) -> Iterator[Answered]:
        for computed in overlapped(self._windows(done), self.scorer.prepare, self.scorer.compute):
            yield self.scorer.answer(computed)

    def _windows(self, done: Any) -> Iterator[Window]:
        """Of the parts that are not there yet."""
        for shard, place in enumerate(self.places):
            number, start, over = 0, 0, False
            while (shard, number) in done and not over:
                receipt = done[shard, number]
                number, start, over = number + 1, start + receipt.rows, receipt.last
            if over:
                continue
            for part in parts(read(place, start=start), shard, self.limits, number=number, start=start):
                if (shard, part.number) not in done:
                    yield from part.windows(self.limits)

    def _rows(self, answered: Answered) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of the output, and those that go into the file of errors instead."""
        rows, faults = [], []
        form = self._form(answered.window.shard)
        for record, answers in zip(answered.records, answered.answers, strict=True):
            where = (self.places[answered.window.shard].name, record.number)
            row = self.shape.row(record.cells, answers, where)
            failed = {task: one for task, one in answers.items() if isinstance(one, Exception)}
            if not failed and (said := form.refused(row)) is not None:
                failed = dict.fromkeys(answers, ConfigError(said))
                answered.counts["errors"] += 1
            if failed and self.errors is not None:
                faults.append({**self.shape.kept(record.cells), ERROR: fault(failed, len(answers), where)})
                continue
            if failed and form.refused(row) is not None:
                row = self.shape.row({}, failed, where)
            rows.append(row)
        return rows, faults

    def _take(self, answered: Answered, folder: Parts) -> None:
        """A window into the part that is open; the last one closes it."""
        held, window = self._open, answered.window
        rows, faults = self._rows(answered)
        if not held.count and window.records:
            held.start = window.records[0].number
        held.rows += rows
        held.faults += faults
        held.outcomes.append(answered.outcomes)
        held.count += len(window.records)
        held.summary.add(answered.counts)
        self._count(answered)
        if not window.last:
            return
        files = {"data": self._form(window.shard).part(held.rows, first=self._first(window))}
        if held.faults:
            files["errors"] = Lines(Place(self.errors or "", "jsonl")).part(held.faults, first=False)
        if self.settings.metrics:
            files["outcomes"] = pack(together(held.outcomes))
        receipt = Receipt(
            shard=window.shard,
            part=window.part,
            start=held.start,
            rows=held.count,
            last=window.last_of_file,
            counts=held.summary.counts,
        )
        self._done[window.shard, window.part] = folder.commit(receipt, files)
        self._open = _Open()

    def _first(self, window: Window) -> bool:
        """Whether a part is the first of its output."""
        return window.part == 0 and (window.shard == 0 or len(self.targets) > 1)

    def _count(self, answered: Answered) -> None:
        self.summary.add(answered.counts)
        self.say(self.summary)
        self._check_errors()

    def _check_errors(self) -> None:
        most, found = self.settings.max_errors, int(self.summary.counts["errors"])
        if most is not None and found > most:
            raise TooManyErrorsError(f"{found} rows failed; at most {most} may (--max-errors)")

    def _assemble(self, folder: Parts) -> None:
        every = [self._done[at] for at in sorted(self._done)]
        for at, target in enumerate(self.targets):
            mine = [one for one in every if len(self.targets) == 1 or one.shard == at]
            with folder.output(target.url) as file:
                self.forms[at].joined((folder.read(one, "data") or b"" for one in mine), file)
        if self.errors is not None:
            with folder.output(self.errors) as file:
                file.writelines(folder.read(one, "errors") or b"" for one in every)
        kept = (folder.read(one, "outcomes") for one in every)
        self._measure([unpack(content) for content in kept if content is not None])

    def _measure(self, outcomes: Sequence[Any]) -> None:
        for task, of in together(outcomes).items():
            known = self.engine.task(task)
            self.summary.metrics[task] = known.kind.score(of, known.options)

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
