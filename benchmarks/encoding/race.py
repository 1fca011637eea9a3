"""A race: contestants take turns over the same inputs, beside the machine's limit, and one line for each at the end."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.encoding import limit
from benchmarks.encoding.contestants import Contestant, Field, Runner, Stable, cosines, embeddings
from benchmarks.encoding.lineup import OURS, plain
from benchmarks.encoding.peers.batching import Floats, Setting, padding
from benchmarks.encoding.peers.child import write_rows
from benchmarks.encoding.subject import config_of
from benchmarks.encoding.texts import SINGLE, Texts
from benchmarks.measuring import Call, How, Lines, rounds
from mtserve.rows import Row
from mtserve.text import Text

Section = dict[str, Any]
"""Lines of a table, what was measured (`about`), versions, who failed and why, and what each setting took."""


@dataclass(frozen=True)
class Run:
    """What all sections share.

    folder   the subject's
    rows     how many inputs of each set are raced over, the first of its shuffled order
    tune     over how many of them settings are tried
    sizes    tokens of the linear section
    """

    how: How
    stable: Stable
    folder: Path
    texts: Texts
    text: Text
    rows: int = 1024
    tune: int = 256
    rate_s: float = 0.15
    calls: int = 100
    base_rows: int = 128
    sizes: Sequence[int] = (100, 1_000, 10_000, 100_000, 1_000_000)
    budgets: Sequence[int] = (1024, 4096, 16_384)
    shapes: Sequence[tuple[int, int, int]] = limit.SHAPES
    base: bool = True

    @property
    def pairs(self) -> list[Row]:
        return self.texts.pairs[: self.rows]

    @property
    def singles(self) -> list[str]:
        return self.texts.singles[: self.rows]

    def rows_of(self, texts: Sequence[str]) -> list[Row]:
        return [self.text.rows(text, limits=SINGLE)[0] for text in texts]

    def file(self, name: str, inputs: Sequence[Row] | Sequence[str]) -> Path:
        """Inputs as a contestant reads them."""
        texts = [one for one in inputs if isinstance(one, str)]
        path = self.folder.parent / f"{name}.{'json' if texts else 'npz'}"
        if texts:
            path.write_text(json.dumps(texts), encoding="utf-8")
        else:
            write_rows(path, [(row.ids, row.type_ids) for row in inputs if not isinstance(row, str)])
        return path


@dataclass(frozen=True)
class Race:
    """One race over some inputs; `rows` are theirs, which say how many tokens there are and what is true."""

    run: Run
    contestants: Sequence[Contestant]
    inputs: Sequence[Row] | Sequence[str]
    rows: Sequence[Row]
    calls: int = 1
    limits: Sequence[str] = limit.PRECISIONS
    folder: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> Path:
        return self.folder or self.run.folder

    def hold(self) -> Section:
        """Run it."""
        run = self.run
        inputs = {"all": run.file("all", self.inputs), "part": run.file("part", self.inputs[: run.tune])}
        found = run.stable.lined_up(self.contestants, self.subject, inputs, tune_on="part")
        calls: dict[str, Call] = {key: partial(self._turn, runner) for key, runner in found.running.items()}
        for precision in self.limits:
            calls[f"limit {precision}"] = partial(limit.best_rate, precision, seconds=run.rate_s, shapes=run.shapes)
        figures, made = rounds(run.how, calls)
        truth, file = self._truth(), run.folder.parent / "made.npy"
        return {
            "lines": [
                self._line(key, found, figures, cosines(embeddings(runner, file), truth))
                for key, runner in found.running.items()
            ],
            "limits": {
                precision: {**spread(figures[f"limit {precision}"], by=1e-9), "best": made[f"limit {precision}"]}
                for precision in self.limits
            },
            "about": self._about(),
            "versions": found.versions,
            "failed": found.failed,
            "tried": found.tried,
        }

    def _turn(self, runner: Runner) -> tuple[float, None]:
        return statistics.median(runner.ask("run", name="all", calls=self.calls)["seconds"]), None

    def _truth(self) -> Floats:
        """Embeddings of each row alone, by the stock trunk in fp32."""
        alone = plain("alone", "fp32", {"order": "given", "rows": 1})
        path = self.run.file("truth", self.rows)
        runner, _ = self.run.stable.fetch(alone, self.subject)
        runner.ask("inputs", name="all", path=str(path))
        runner.ask("tune", name="all", settings=list(alone.settings))
        return embeddings(runner, path.with_suffix(".npy"))

    def _about(self) -> dict[str, Any]:
        lengths = [len(row) for row in self.rows]
        counted = {"inputs": len(lengths), "tokens": sum(lengths), "longest": max(lengths), "calls": self.calls}
        return {**counted, "rounds": self.run.how.rounds, "seed": 0, **self.about}

    def _line(self, key: str, found: Field, figures: Mapping[str, list[float]], kept: Floats) -> dict[str, Any]:
        one = next(contestant for contestant in self.contestants if contestant.key == key)
        seconds, lengths = figures[key], [len(row) for row in self.rows]
        setting = found.settings[key]
        ids = one.engine in ("plain_torch", "ort", "vino", "ct2")
        line: dict[str, Any] = {
            "contestant": one.name,
            "precision": one.precision,
            "setting": str(Setting(**setting)) if ids else ", ".join(f"{n} {v}" for n, v in setting.items()),
            "padding": padding(lengths, Setting(**setting)) if ids else None,
            "seconds": spread(seconds),
            "tokens/s": sum(lengths) / statistics.median(seconds),
        }
        same = f"{OURS} {one.precision.partition('+')[0]}"
        for name, other in (("speed over ours", same), ("speed over ours in fp32", f"{OURS} fp32")):
            theirs = figures.get(other)
            line[name] = theirs and spread([a / b for a, b in zip(theirs, seconds, strict=True)])
        peak = figures.get(f"limit {one.precision.partition('+')[0]}")
        needed = limit.operations(config_of(self.subject), lengths)
        line["share of limit"] = peak and spread([needed / a / b for a, b in zip(peak, seconds, strict=True)])
        return {**line, "lowest cosine": float(kept.min()), "mean cosine": float(kept.mean())}


def spread(values: Sequence[float], *, by: float = 1.0) -> dict[str, float]:
    """Median, least and most."""
    found: dict[str, Callable[[Sequence[float]], float]] = {"median": statistics.median, "min": min, "max": max}
    return {name: by * measure(values) for name, measure in found.items()}


def table_of(lines: Lines) -> Lines:
    """Lines as the terminal shows them: a spread as its median."""
    return [
        {name: value["median"] if isinstance(value, dict) else value for name, value in line.items()} for line in lines
    ]
