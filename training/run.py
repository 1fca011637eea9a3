"""A run from its config to a sealed checkpoint. Each part is a file of its own; this one is their order."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from mtserve.manifest import MANIFEST, read_manifest
from mtserve.trunk import hidden_size
from training.config import RunConfig
from training.finish import Result, finish
from training.prepare import Prepared, prepare
from training.report.beside import beside
from training.report.evaluate import measure
from training.states import claim, clear, states_folder
from training.trainer.fit import arguments, fit
from training.trainer.frozen import Outputs, check_heads, compute_outputs
from training.trunk import Trunk, find_trunk


def train(config: RunConfig, *, base: Path, command: str = "") -> Result | None:
    """Train and seal what `config` describes; `base` is the run file's folder, `command` goes into the card.

    None in all processes but the first. Raises SetupError (ConfigError, ResolveError, CheckpointError); nothing is
    written then but states to resume from.
    """
    started = time.monotonic()
    output = Path(config.output)
    if config.result == "heads":
        _check_heads(output, find_trunk(config.trunk, base), config)
    else:
        _check_output(output, overwrite=config.overwrite, result=config.result)
    states = states_folder(config)
    args = arguments(config.training, seed=config.seed, folder=states or output)
    with args.main_process_first(local=False, desc="reading data"):
        run = prepare(config, base=base)
        outputs = _outputs(run, output) if config.result == "heads" else None
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
        outputs=outputs,
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


def _outputs(run: Prepared, output: Path) -> dict[str, Outputs]:
    """What the trunk makes of every training row, kept beside the output for further runs on the same rows."""
    check_heads(run.model)
    assert run.trunk.checkpoint is not None
    mark, folder = run.trunk.checkpoint.manifest.trunk.fingerprint, output.with_name(output.name + ".outputs")
    return {
        name: compute_outputs(
            run.model, name, of.train.features, pad_id=run.trunk.spec.pad_id, trunk=mark, folder=folder
        )
        for name, of in run.data.items()
    }


def _check_heads(output: Path, home: Path, config: RunConfig) -> None:
    """Refuse heads for what is no checkpoint, that would replace others, or that would go into another one."""
    if not (home / MANIFEST).is_file():
        found = f"{config.trunk} is no checkpoint"
        raise ConfigError(f"trunk: {found}; allowed with result: heads: the folder or hub id of one")
    there = [task.name for task in read_manifest(home).tasks if task.name in config.tasks]
    if there and not config.overwrite:
        raise ConfigError(f"{home} has a task {there[0]!r} already; allowed: another name, or overwrite: true")
    if not output.exists() or output.resolve() != home.resolve():
        _check_output(output, overwrite=False, result="checkpoint")


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
