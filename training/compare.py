"""One run on several trunks, and a table of what each reaches. Knows nothing of how a run is made."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from mtserve.manifest import MANIFEST
from mtserve.tasks.measures import Metrics
from training.config import RunConfig
from training.data.source import Source, fingerprint
from training.report.tables import Line, markdown
from training.run import train
from training.trunk import find_trunk

Numbers = dict[str, dict[str, Metrics]]
"""split -> task -> metrics"""


def compare(config: RunConfig, trunks: list[str], *, base: Path, command: str) -> list[Line]:
    """Train on each trunk, into a folder of its own under the output; the table also becomes `comparison.md` there, and
    the numbers `comparison.json`.

    A comparison that was broken off goes on: a folder that holds the checkpoint of this very run, by its config and its
    data, is not trained again. Another checkpoint there is an error, as in a single run. Raises SetupError.
    """
    names = [re.sub(r"[^\w.-]+", "-", trunk.rstrip("/").rsplit("/", 1)[-1]) for trunk in trunks]
    if len(set(names)) != len(names):
        raise ConfigError(f"trunks must end in different names; found {', '.join(names)}")
    for trunk in trunks:  # hours may pass before the last one's turn
        find_trunk(trunk, base)
    home = Path(config.output)
    found: dict[str, Numbers] = {}
    for name, trunk in zip(names, trunks, strict=True):
        one = config.model_copy(update={"trunk": trunk, "trunk_name": None, "output": str(home / name)})
        numbers = _reached(one, base)
        if numbers is None:
            result = train(one, base=base, command=f"{command}  # this trunk: {trunk}")
            splits = {} if result is None else result.splits
            numbers = {which: {task: scores.metrics for task, scores in of.items()} for which, of in splits.items()}
        found[name] = numbers
    if os.environ.get("RANK", "0") != "0":
        return []
    lines = _table(found)
    (home / "comparison.md").write_text(markdown(lines) + "\n", encoding="utf-8")
    (home / "comparison.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return lines


def _reached(config: RunConfig, base: Path) -> Numbers | None:
    """The metrics of this very run where its checkpoint is already there."""
    folder = Path(config.output)
    if config.overwrite or not (folder / MANIFEST).exists():
        return None
    made, now = Checkpoint.open(folder).manifest.provenance, config.model_dump(mode="json")
    free = ("overwrite", "resume")
    if any(made["config"].get(key) != now[key] for key in now if key not in free):
        return None
    where = config.data_home(base)
    for name, task in config.tasks.items():
        for which in made["data"][name]:
            source = getattr(task, which)
            if isinstance(source, Source) and fingerprint(source, where) != made["data"][name][which]["sha256"]:
                return None
    sys.stderr.write(f"{folder} holds the checkpoint of this run: its metrics are taken\n")
    return {"eval": made["metrics"], **({"test": made["test"]} if made["test"] else {})}


def _table(found: dict[str, Numbers]) -> list[Line]:
    """A column a trunk; a line for every metric of every task on every split."""
    lines: list[Line] = [("task", "split", "metric", *found)]
    for which, of in next(iter(found.values())).items():
        for task, metrics in of.items():
            for metric in metrics:
                values = (f"{one[which][task][metric]:.3f}" for one in found.values())
                lines += [(task, which, metric, *values)]
    return lines
