"""The folder beside an output where a run keeps states to resume from. Knows no model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtserve.errors import ConfigError
from training.config import RunConfig
from training.data.splits import TaskData


def states_folder(config: RunConfig) -> Path | None:
    """Where states to resume from are kept beside the output; None where the run keeps none."""
    kept = config.training.save_steps or config.training.best or config.training.report_to or config.resume
    output = Path(config.output)
    output = output.resolve() if output.name in ("", "..") else output  # `.` has no name to put something beside
    return output.with_name(output.name + ".training") if kept else None


def claim(states: Path, config: RunConfig, data: Mapping[str, TaskData], *, processes: int = 1) -> None:
    """Write down whose states these are. Raises ConfigError where they are those of another run, or would be lost."""
    free: Any = {
        "output": True,
        "overwrite": True,
        "resume": True,
        "data_dir": True,
        "chains": True,
        "training": {"max_seconds"},
    }
    kept = config.model_dump(mode="json", exclude=free)
    shas = {name: {which: split.sha256 for which, split in of.splits.items()} for name, of in data.items()}
    mark = hashlib.sha256(json.dumps([kept, shas, processes], sort_keys=True).encode()).hexdigest()
    path, state = states / "run.json", newest(states)
    if config.resume and state is None:
        raise ConfigError(f"resume: {states} holds no state to go on from; allowed: resume: false")
    if config.resume and _json(path) != {"run": mark}:
        raise ConfigError(f"{states} holds states of another run; allowed: the config, data and processes of it")
    if not config.resume and state is not None:
        raise ConfigError(f"{states} holds states of a run that did not end; allowed: resume: true, or remove it")
    states.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": mark}), encoding="utf-8")


def newest(states: Path) -> Path | None:
    """The last state that was written whole: a process that is killed may leave half of one."""
    named = ((path.name.removeprefix("checkpoint-"), path) for path in states.glob("checkpoint-*"))
    steps = sorted((int(step), path) for step, path in named if step.isdecimal())
    last = "trainer_state.json"  # the file that the Trainer writes last
    return next((path for _, path in reversed(steps) if _json(path / last)), None)


def _json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing or was not written whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def clear(states: Path) -> None:
    """Remove what resuming needed; what TensorBoard shows stays."""
    for folder in states.glob("checkpoint-*"):
        shutil.rmtree(folder)
    (states / "run.json").unlink()
    if not any(states.iterdir()):
        states.rmdir()
