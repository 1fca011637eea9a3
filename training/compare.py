"""One run on several trunks, and a table of what each reaches. Knows nothing of how a run is made."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mtserve.errors import ConfigError
from training.config import RunConfig
from training.finish import Result
from training.report.tables import Line, markdown
from training.run import train
from training.trunk import find_trunk


def compare(config: RunConfig, trunks: list[str], *, base: Path, command: str) -> list[Line]:
    """Train on each trunk, into a folder of its own under the output; the table also becomes `comparison.md` there, and
    the numbers `comparison.json`. A trunk whose folder already holds its checkpoint is an error, as in a single run.

    Raises SetupError.
    """
    names = [re.sub(r"[^\w.-]+", "-", trunk.rstrip("/").rsplit("/", 1)[-1]) for trunk in trunks]
    if len(set(names)) != len(names):
        raise ConfigError(f"trunks must end in different names; found {', '.join(names)}")
    for trunk in trunks:  # hours may pass before the last one's turn
        find_trunk(trunk, base)
    home = Path(config.output)
    results: dict[str, Result] = {}
    for name, trunk in zip(names, trunks, strict=True):
        one = config.model_copy(update={"trunk": trunk, "trunk_name": None, "output": str(home / name)})
        result = train(one, base=base, command=f"{command}  # this trunk: {trunk}")
        if result is not None:
            results[name] = result
    if not results:
        return []
    lines = _table(results)
    (home / "comparison.md").write_text(markdown(lines) + "\n", encoding="utf-8")
    numbers = {n: {w: {t: s.metrics for t, s in of.items()} for w, of in r.splits.items()} for n, r in results.items()}
    (home / "comparison.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return lines


def _table(results: dict[str, Result]) -> list[Line]:
    """A column a trunk; a line for every metric of every task on every split."""
    first = next(iter(results.values()))
    lines: list[Line] = [("task", "split", "metric", *results)]
    for which, of in first.splits.items():
        for task, scores in of.items():
            for metric in scores.metrics:
                found = (f"{result.splits[which][task].metrics[metric]:.3f}" for result in results.values())
                lines.append((task, which, metric, *found))
    return lines
