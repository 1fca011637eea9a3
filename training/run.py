"""A run from its config to a sealed checkpoint. Each part is a file of its own; this one is their order."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from mtserve.manifest import MANIFEST
from mtserve.trunk import hidden_size
from training.config import RunConfig
from training.finish import Result, finish
from training.prepare import Prepared, prepare
from training.report.beside import beside
from training.report.evaluate import measure
from training.states import claim, clear, states_folder
from training.trainer.fit import arguments, fit
from training.trunk import Trunk


def train(config: RunConfig, *, base: Path, command: str = "") -> Result | None:
    """Train and seal what `config` describes; `base` is the run file's folder, `command` goes into the card.

    None in all processes but the first. Raises SetupError (ConfigError, ResolveError, CheckpointError); nothing is
    written then but states to resume from.
    """
    started = time.monotonic()
    output = Path(config.output)
    _check_output(output, overwrite=config.overwrite, result=config.result)
    states = states_folder(config)
    args = arguments(config.training, seed=config.seed, folder=states or output)
    with args.main_process_first(local=False, desc="reading data"):
        run = prepare(config, base=base)
    _check_same_trunk(output, run.trunk)
    if states is not None and args.process_index == 0:
        claim(states, config, run.data, processes=args.world_size)
    others = {} if args.process_index else beside(config, run.data, base=base, untrained=run.engine)
    budget = config.training.max_seconds
    trained = fit(
        run.model,
        run.runs,
        settings=config.training,
        seed=config.seed,
        pad_id=run.trunk.spec.pad_id,
        mixture=config.mixture,
        evaluator=lambda: {name: _measured(run, name) for name in run.data},
        folder=states,
        resume=config.resume,
        ends_at=None if budget is None else started + budget,
    )
    if args.process_index != 0:
        return None
    if trained.ended != "finished":
        sys.stderr.write(f"training stopped after {trained.steps} steps: {trained.ended}\n")
    result = finish(config, run, trained, command=command, beside=others)
    if states is not None:
        clear(states)
    return result


def _measured(run: Prepared, name: str) -> dict[str, float]:
    """A task's metrics, its own first: that one counts in the average."""
    of = run.data[name]
    metrics = measure(run.engine, name, of)
    return {of.kind.metric: metrics[of.kind.metric], **metrics}


def _check_output(output: Path, *, overwrite: bool, result: str) -> None:
    """Refuse before training what sealing would refuse after it."""
    if (output / MANIFEST).exists():
        if result == "trunk":
            raise ConfigError(f"{output} holds a checkpoint, which a trunk cannot replace; allowed: another output")
        if not overwrite:
            raise ConfigError(f"{output} already holds a checkpoint; allowed: another output, or overwrite: true")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} holds something that is no checkpoint; allowed: a new or empty folder")
    home = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not home.is_dir():
        raise ConfigError(f"{output} cannot be written: {home} is no folder")
    if not os.access(home, os.W_OK):
        raise ConfigError(f"{output} cannot be written: no permission in {home}")


def _check_same_trunk(output: Path, trunk: Trunk) -> None:
    """A checkpoint folder keeps its tokenizer and its trunk's shape for life."""
    if (output / MANIFEST).exists():
        held = Checkpoint.open(output)
        shape = (trunk.model.config.model_type, hidden_size(trunk.model.config))
        if (
            held.tokenizer_json != trunk.tokenizer_json
            or (held.manifest.trunk.family, held.manifest.trunk.hidden_size) != shape
        ):
            found = f"{held.manifest.trunk.source} ({held.manifest.trunk.family})"
            raise ConfigError(f"{output} holds a checkpoint of another trunk, {found}; allowed: another output")
