"""What each task gains or loses by sharing the trunk: the run of all tasks beside a run of each alone, seed by seed.

Under the output: `seed-N` for the run of all tasks, `alone/TASK/seed-N` for a task's own run, which has the same
settings and sees as many examples of its task. What was broken off goes on, as in a comparison.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from mtserve.folder import replace
from training.compare import reached, seeded
from training.config import RunConfig
from training.report.answers import answers, examples_of
from training.report.command import sealed
from training.report.tables import Line
from training.report.transfer import MARKS, section, table
from training.trainer.cosines import mean_cosines, mean_sizes
from training.trainer.mixture import MixtureConfig, Schedule
from training.trainer.plan import plan

_MOMENTS = 5


@dataclass(frozen=True)
class Transfer:
    """One task with and without the others, by its metric on the split (test where there is one, else evaluation).

    shared, alone   the metric from each seed
    mean            of `shared` over seeds, with `interval`
    difference      of the means, shared less alone, with `limits`: 95 % by a bootstrap over examples, of which every
                    resample is the same for all runs (paired: Efron and Tibshirani, 1993, chapter 13; Koehn, 2004)
    p               two-sided: how often resamples put the difference on its other side of zero, twice
    """

    metric: str
    split: str
    examples: int
    shared: list[float]
    alone: list[float]
    mean: float
    interval: tuple[float, float]
    difference: float
    limits: tuple[float, float]
    p: float

    @property
    def verdict(self) -> str:
        """What the limits allow to say."""
        low, high = self.limits
        return "gained" if low > 0 else "lost" if high < 0 else "no difference shown"


def transfer(config: RunConfig, *, seeds: int, base: Path, command: str) -> list[Line]:
    """Train what is not there yet and compare; the report goes into the cards of the checkpoints of all tasks, and its
    numbers into `transfer.json`. Raises SetupError."""
    if config.result != "checkpoint" or len(config.sealed) < 2:
        raise ConfigError("transfer is between tasks of one checkpoint; allowed: result: checkpoint, two or more tasks")
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a run here reads what another one sealed
        raise ConfigError("transfer runs in one process; allowed: without torchrun, or --seeds and single runs with it")
    if not config.resamples:
        raise ConfigError("resamples: a paired test needs some; allowed: 1 or more")
    if not config.training.gradient_cosines:
        config = _with(config, gradient_cosines=_MOMENTS)
    runs = seeded(config, seeds)
    for one in runs:
        reached(one, base=base, command=f"{command}  # this seed: {one.seed}")
    passes = _passes(runs[0])
    singles = {name: seeded(_single(config, name, passes[name]), seeds) for name in config.sealed}
    for name, of in singles.items():
        for one in of:
            reached(one, base=base, command=f"{command}  # {name} alone, seed {one.seed}")
    found = {name: _compared(name, runs, of, base) for name, of in singles.items()}
    logs = [Checkpoint.open(Path(one.output)).manifest.provenance["training"]["gradient_cosines"] for one in runs]
    measured = [row for log in logs for row in log]
    cosines, sizes = mean_cosines(measured), mean_sizes(measured)
    text = section(found, cosines, sizes, seeds=[one.seed for one in runs], resamples=config.resamples)
    for one in runs:
        _tell(Path(one.output) / "README.md", text)
    told = {name: asdict(one) | {"verdict": one.verdict} for name, one in found.items()}
    pairs = [[*pair, value] for pair, value in cosines.items()]
    numbers = json.dumps({"tasks": told, "gradient_cosines": pairs, "gradient_sizes": sizes}, indent=1)
    (Path(config.output) / "transfer.json").write_text(numbers + "\n", encoding="utf-8")
    return table(found)


def _with(config: RunConfig, **training: Any) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def _single(config: RunConfig, name: str, passes: float) -> RunConfig:
    """The run of one task alone, for as many passes over its data."""
    best = config.training.best
    alone = _with(
        config,
        epochs=passes,
        max_steps=None,
        gradient_cosines=0,
        best=best if best is None or best.startswith(f"{name}.") else "average",
    )
    return alone.model_copy(
        update={
            "tasks": {name: config.tasks[name]},
            "chains": {},
            "output": str(Path(config.output) / "alone" / name),
            "mixture": MixtureConfig(group_by_length=config.mixture.group_by_length),
        }
    )


def _passes(config: RunConfig) -> dict[str, float]:
    """How often the schedule of all tasks goes over each task's examples."""
    data = Checkpoint.open(Path(config.output)).manifest.provenance["data"]
    sizes = {name: data[name]["train"]["rows"] for name in config.tasks}
    schedule = Schedule(
        sizes,
        {name: config.batch_size(name) for name in config.tasks},
        config.mixture.model_copy(update={"group_by_length": False}),
        seed=config.seed,
        epochs=config.training.epochs,
    )
    ones = {name: [1] for name in sizes}
    settings = config.training
    made = plan(
        schedule, rows=ones, tokens=ones, max_steps=settings.max_steps,
        gradient_accumulation=settings.gradient_accumulation,
    )  # fmt: skip
    return {name: task.passes for name, task in made.tasks.items()}


def _compared(name: str, runs: Sequence[RunConfig], singles: Sequence[RunConfig], base: Path) -> Transfer:
    split = "eval" if runs[0].tasks[name].test is None else "test"
    both = [[_outcomes(name, one, base, split) for one in of] for of in (runs, singles)]
    kind, metric = runs[0].tasks[name].handler, runs[0].tasks[name].handler.metric

    def score(arm: int, drawn: Any) -> list[float]:
        return [kind.score(tuple(one[drawn] for one in outcomes), options)[metric] for outcomes, options in both[arm]]

    size = both[0][0][0][0].shape[0]
    generator, every = np.random.default_rng(0), np.arange(size)
    shared, alone = score(0, every), score(1, every)
    draws = [generator.integers(size, size=size) for _ in range(runs[0].resamples)]
    means = np.array([[np.mean(score(arm, drawn)) for arm in (0, 1)] for drawn in draws])  # (resamples, arms)
    differences = means[:, 0] - means[:, 1]
    other_side = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return Transfer(
        metric=metric,
        split=split,
        examples=size,
        shared=shared,
        alone=alone,
        mean=float(np.mean(shared)),
        interval=_middle(means[:, 0]),
        difference=float(np.mean(shared) - np.mean(alone)),
        limits=_middle(differences),
        p=min(1.0, 2 * (int(other_side) + 1) / (len(draws) + 1)),
    )


def _outcomes(name: str, config: RunConfig, base: Path, split: str) -> tuple[Any, Any]:
    """A sealed run's outcomes on the split, and the task's options there."""
    engine, data = sealed(config.model_copy(update={"tasks": {name: config.tasks[name]}}), base, config.output)[name]
    examples = examples_of(name, data, split)
    return data.kind.outcomes(answers(engine, name, data, split=split), examples, data.options), data.options


def _middle(values: Any) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _tell(path: Path, text: str) -> None:
    """Put the section into the card, before its `## Use`, in the place of the one that is there."""
    begin, end = MARKS
    card = path.read_text(encoding="utf-8")
    if begin in card:
        card = card[: card.index(begin)] + card[card.index(end) + len(end) :].lstrip("\n")
    before, use, after = card.partition("## Use\n")
    replace(path, f"{before}{begin}\n\n{text}\n\n{end}\n\n{use}{after}".encode())
