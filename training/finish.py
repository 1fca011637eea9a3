"""The end of a run: every task evaluated, and the checkpoint sealed or the trunk saved. Trains nothing."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mtserve
from mtserve.backends.eager import EagerBackend
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.golden import golden_rows
from mtserve.sealing import TaskPart, seal
from mtserve.surgery import add_heads
from mtserve.tasks.base import Kind, Options
from mtserve.tasks.calibration import Calibration
from mtserve.weights import task_part, trunk_part
from training.config import RunConfig
from training.data.audit import audit
from training.prepare import Prepared
from training.report.beside import Beside
from training.report.card import card
from training.report.evaluate import Scores, evaluate
from training.report.figures import figures
from training.trainer.cosines import mean_cosines, mean_sizes
from training.trainer.fit import Trained

_VERSIONS = ("torch", "transformers", "tokenizers", "datasets")
_OF_THE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Result:
    """A finished run: what was written, the engine over the model as it was sealed, and how well it does.

    scores   of each task on its evaluation split; `test` of those that have a test split
    """

    folder: Path
    engine: Engine
    scores: dict[str, Scores]
    test: dict[str, Scores]
    trained: Trained

    @property
    def checkpoint(self) -> Checkpoint:
        """Raises CheckpointError for a run whose result is a trunk."""
        return Checkpoint.open(self.folder)

    @property
    def splits(self) -> dict[str, dict[str, Scores]]:
        """The scores by split."""
        return {"eval": self.scores, **({"test": self.test} if self.test else {})}


def finish(config: RunConfig, run: Prepared, trained: Trained, *, command: str, beside: Mapping[str, Beside]) -> Result:
    """Evaluate all tasks and write the run's output. Raises CheckpointError."""
    folder = Path(config.output)
    run, calibrations = replace(run, engine=_serving(run)), dict[str, Calibration]()
    if config.calibrate:
        run, calibrations = _calibrated(run)
    measured = partial(evaluate, run.engine, resamples=config.resamples)
    scores = {name: measured(name, of, beside=beside[name]) for name, of in run.data.items()}
    test = {
        name: measured(name, of, split="test", beside=beside[name])
        for name, of in run.data.items()
        if of.test is not None
    }
    pictures = {} if config.result == "heads" else figures(trained.log, scores)  # they would be named as those there
    text = card(
        config,
        run.data,
        scores=scores,
        test=test,
        calibrations=calibrations,
        cosines=mean_cosines(trained.cosines),
        sizes=mean_sizes(trained.cosines),
        audit=audit(run.data),
        source=run.trunk.source,
        command=command,
        versions=_versions(),
        figures=pictures,
    )
    result = Result(folder, run.engine, scores, test, trained)
    if config.result == "trunk":
        _save_trunk(folder, run, text, pictures)
    elif config.result == "heads":
        _add_heads(config, run, result, command=command, text=text)
    else:
        _seal(config, run, result, command=command, text=text, pictures=pictures)
    return result


def _serving(run: Prepared) -> Engine:
    """An engine over the trained model that computes as one over the sealed checkpoint does, to the bit."""
    pad_id = run.trunk.spec.pad_id
    return Engine(run.engine.tasks.values(), EagerBackend(run.model.eval(), pad_id=pad_id), run.engine.text)


def _calibrated(run: Prepared) -> tuple[Prepared, dict[str, Calibration]]:
    """The run with what was fitted in its tasks' options, for each task whose scores are probabilities."""
    data, found = dict(run.data), dict[str, Calibration]()
    for name, of in run.data.items():
        if type(of.kind).calibrate is Kind.calibrate:
            continue
        plain = type(of.options).model_validate({**of.options.model_dump(exclude={"temperature", "thresholds"})})
        engine = _with(run, {name: plain}).engine
        works = engine.prepare_all(name, [of.kind.unlabelled(example) for example in of.eval.examples])
        made = of.kind.calibrate(works, engine.run(works), of.eval.examples, plain)
        assert made is not None
        found[name] = made
        data[name] = replace(of, options=type(plain).model_validate({**plain.model_dump(), **made.options}))
    return _with(replace(run, data=data), {name: data[name].options for name in found}), found


def _with(run: Prepared, options: Mapping[str, Options]) -> Prepared:
    """The run with an engine whose tasks have these options."""
    tasks = [replace(task, options=options.get(task.name, task.options)) for task in run.engine.tasks.values()]
    return replace(run, engine=Engine(tasks, run.engine.backend, run.engine.text))


def _seal(
    config: RunConfig, run: Prepared, result: Result, *, command: str, text: str, pictures: Mapping[str, bytes]
) -> None:
    """Seal the tasks that can be served; those that only train the trunk are left out."""
    seal(
        result.folder,
        trunk_part(run.model, source=run.trunk.source),
        tasks=[_part(config, run, name=name, scores=result.scores[name]) for name in config.sealed],
        chains=[*config.chains.values()],
        tokenizer_json=run.trunk.tokenizer_json,
        text=run.trunk.spec,
        provenance=_provenance(config, run, result, command=command),
        card=text,
        extras=pictures,
        written_by=f"mtserve {mtserve.__version__}",
    )


def _add_heads(config: RunConfig, run: Prepared, result: Result, *, command: str, text: str) -> None:
    """Put the tasks into the checkpoint of their trunk, or into a copy of it."""
    home, folder = run.trunk.checkpoint, result.folder
    assert home is not None
    parts = [_part(config, run, name=name, scores=result.scores[name]) for name in config.tasks]
    told = _provenance(config, run, result, command=command)
    if folder.exists() and folder.resolve() == home.folder.resolve():
        add_heads(home, parts, instead=config.overwrite, told=told, card=text)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
            copy = Path(shutil.copytree(home.folder, Path(aside) / "copy"))
            add_heads(Checkpoint.open(copy), parts, instead=config.overwrite, told=told, card=text)
            copy.replace(folder)
    if len(home.manifest.profiles) > 1:
        sys.stderr.write(f"{folder} is served in fp32 until `mtserve tune` has measured the new heads too\n")


def _part(config: RunConfig, run: Prepared, *, name: str, scores: Scores) -> TaskPart:
    of = run.data[name]
    golden = [of.kind.unlabelled(example) for example in of.eval.examples[: config.golden_rows]]
    labelled = [e.model_dump(mode="json", exclude_none=True) for e in of.eval.examples[: config.calibration_rows]]
    return task_part(
        run.model,
        name,
        kind=of.kind.name,
        options=of.options,
        golden=golden_rows(run.engine, name, golden),
        calibration=labelled,
        metrics=scores.metrics,
    )


def _save_trunk(folder: Path, run: Prepared, text: str, pictures: Mapping[str, bytes]) -> None:
    """The adapted trunk as a plain Transformers folder, with its tokenizer; further runs take it as their trunk."""
    folder.mkdir(parents=True, exist_ok=True)
    trunk_part(run.model, source=run.trunk.source).write(folder)
    (folder / "tokenizer.json").write_text(run.trunk.tokenizer_json, encoding="utf-8")
    for name in _OF_THE_TOKENIZER:
        if (run.trunk.folder / name).is_file():
            shutil.copyfile(run.trunk.folder / name, folder / name)
    for name, content in {**pictures, "README.md": text.encode()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _provenance(config: RunConfig, run: Prepared, result: Result, *, command: str) -> dict[str, Any]:
    trained = result.trained
    data = {
        name: {
            which: {"sha256": split.sha256, "rows": len(split), "left_out": len(split.bad.messages)}
            for which, split in of.splits.items()
        }
        for name, of in run.data.items()
    }
    return {
        "config": config.model_dump(mode="json"),
        "command": command,
        "data": data,
        "metrics": {name: found.metrics for name, found in result.scores.items()},
        "baselines": {name: found.baseline for name, found in result.scores.items()},
        "test": {name: found.metrics for name, found in result.test.items()},
        "training": {
            "steps": trained.steps,
            "seconds": round(trained.seconds, 1),
            "tokens": trained.tokens,
            "ended": trained.ended,
            "best_step": trained.best_step,
            "gradient_cosines": trained.cosines,
        },
        "log": trained.log,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    own = {"mtserve": mtserve.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in _VERSIONS}
