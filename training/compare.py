"""One run several times, on other trunks or from other seeds, and a table of what each reaches. Knows nothing of how a
run is made.

Under the output each run has a folder of its own: TRUNK, seed-N, or TRUNK/seed-N. What was broken off goes on: a
folder that holds the checkpoint of this very run, by its config and its data, is not trained again, and with
`resume: true` the run whose turn it was goes on from its last state.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from pydantic import ValidationError

from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from mtserve.manifest import MANIFEST
from mtserve.tasks.measures import Metrics
from training.config import RunConfig
from training.data.source import Source, fingerprint
from training.report.tables import Line, markdown
from training.run import train
from training.states import newest, states_folder
from training.trunk import find_trunk

Numbers = dict[str, dict[str, Metrics]]
"""split -> task -> metrics"""


def compare(
    config: RunConfig, *, trunks: Sequence[str] = (), seeds: int | None = None, base: Path, command: str
) -> list[Line]:
    """Train on each trunk (by default the config's), from `seeds` seeds in a row that begins with the config's (by
    default that one); the table also becomes `comparison.md` under the output, and the numbers `comparison.json`.

    Another checkpoint in a run's folder is an error, as in a single run. Raises SetupError.
    """
    names = [re.sub(r"[^\w.-]+", "-", trunk.rstrip("/").rsplit("/", 1)[-1]) for trunk in trunks]
    if len(set(names)) != len(names):
        raise ConfigError(f"trunks must end in different names; found {', '.join(names)}")
    for trunk in trunks:  # hours may pass before the last one's turn
        find_trunk(trunk, base)
    home = Path(config.output)
    found: dict[str, list[Numbers]] = {}
    for name, trunk in zip(names, trunks, strict=True):
        there = config.model_copy(update={"trunk": trunk, "trunk_name": None, "output": str(home / name)})
        found[name] = from_seeds(there, seeds, base=base, command=f"{command}  # this trunk: {trunk}")
    if not trunks:
        found["value"] = from_seeds(config, seeds, base=base, command=command)
    if os.environ.get("RANK", "0") != "0":
        return []
    lines = list(_table(found))
    write(home, "comparison", lines, found if seeds else {name: one for name, (one,) in found.items()})
    return lines


def from_seeds(config: RunConfig, seeds: int | None, *, base: Path, command: str) -> list[Numbers]:
    """The numbers of the run from each seed, in folders of seeds; of the run alone where `seeds` is None."""
    if seeds is None:
        return [reached(config, base=base, command=command)]
    return [reached(one, base=base, command=f"{command}  # this seed: {one.seed}") for one in seeded(config, seeds)]


def seeded(config: RunConfig, seeds: int) -> list[RunConfig]:
    """The run from each of so many seeds."""
    every = range(config.seed, config.seed + seeds)
    return [config.model_copy(update={"seed": n, "output": str(Path(config.output) / f"seed-{n}")}) for n in every]


def reached(config: RunConfig, *, base: Path, command: str) -> Numbers:
    """What the run reaches: of the checkpoint that it has made already, or trained now. Empty in all processes but the
    first. Raises SetupError."""
    if (numbers := _there(config, base)) is not None:
        return numbers
    states = states_folder(config)
    if config.resume and (states is None or newest(states) is None):
        config = config.model_copy(update={"resume": False})
    result = train(config, base=base, command=command)
    splits = {} if result is None else result.splits
    return {which: {task: scores.metrics for task, scores in of.items()} for which, of in splits.items()}


def write(home: Path, name: str, lines: Sequence[Line], numbers: object) -> None:
    """A table and its numbers as files."""
    (home / f"{name}.md").write_text(markdown(lines) + "\n", encoding="utf-8")
    (home / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _there(config: RunConfig, base: Path) -> Numbers | None:
    """The metrics of this very run where its checkpoint is already there."""
    folder = Path(config.output)
    if config.overwrite or not (folder / MANIFEST).exists():
        return None
    made = Checkpoint.open(folder).manifest.provenance
    if not _same(made["config"], config):
        return None
    where = config.data_home(base)
    for name, task in config.tasks.items():
        for which in made["data"][name]:
            source = getattr(task, which)
            if isinstance(source, Source) and fingerprint(source, where) != made["data"][name][which]["sha256"]:
                return None
    sys.stderr.write(f"{folder} holds the checkpoint of this run: its metrics are taken\n")
    return {"eval": made["metrics"], **({"test": made["test"]} if made["test"] else {})}


def _same(made: object, config: RunConfig) -> bool:
    """Whether a checkpoint's config is this one, but for what changes no weights. Keys that its version lacked have
    their defaults, which are what it did."""
    try:
        held = RunConfig.model_validate(made)
    except ValidationError:
        return False
    free = {"overwrite": False, "resume": False}
    return held.model_copy(update=free) == config.model_copy(update=free)


def _table(found: Mapping[str, Sequence[Numbers]]) -> Iterator[Line]:
    """A column a trunk; a line for every metric of every task on every split: the mean over seeds, and their standard
    deviation where there are several."""
    yield ("task", "split", "metric", *found)
    for which, of in next(iter(found.values()))[0].items():
        for task, metrics in of.items():
            for metric in metrics:
                values = ([one[which][task][metric] for one in of_trunk] for of_trunk in found.values())
                yield (task, which, metric, *map(_mean, values))


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
