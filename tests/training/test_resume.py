"""A run that was stopped and goes on gives the run that was never stopped: weights, log and counters, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtserve.errors import ConfigError
from tests.training.conftest import Run
from training import run as runs
from training.finish import Result
from training.run import train
from training.runfile import read_config
from training.states import newest
from training.trainer.deadline import Deadline

TASKS = {"topic": "classification", "names.2-b_c": "token_classification"}
WORDS = (
    "tasks.words={kind: masked_lm, weight: 0.5, options: {mask_token: '[UNK]', max_length: 32}, "
    "train: {path: topic.train.jsonl}, eval: {path: topic.eval.jsonl}}"
)
# Three tasks of three batches an epoch, in steps of two: five steps an epoch, the last of one batch.
STEPS = ("training.epochs=3", "training.gradient_accumulation=2", "training.logging_steps=5", "training.save_steps=3")
SETTINGS = {
    "proportional": (WORDS, "training.optimizer=adamw_torch", "training.scheduler=linear", *STEPS),
    "uniform, adafactor": (
        WORDS,
        "mixture=uniform",
        "training.optimizer=adafactor",
        "training.scheduler=cosine",
        *STEPS,
    ),
    "annealed, workers": (WORDS, "mixture=annealed", "training.arguments={dataloader_num_workers: 1}", *STEPS),
}


class Stopped(Exception):
    """What ends a run in these tests."""


def run(path: Path, *overrides: str, output: str = "out") -> Result:
    config = read_config(path, [*overrides, f"output={path.parent / output}", "resamples=0", "golden_rows=1"])
    result = train(config, base=path.parent)
    assert result is not None
    return result


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, path: Path, *overrides: str) -> None:
    """Run until the optimiser has made a step; of that one nothing is logged or saved."""

    def end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Deadline, "on_step_end", end)
        with pytest.raises(Stopped):
            run(path, *overrides)
    assert not (path.parent / "out").exists()


def states(path: Path) -> list[str]:
    folder = path.parent / "out.training"
    return sorted(found.name for found in folder.iterdir()) if folder.exists() else []


def same(one: Result, other: Result) -> None:
    mine, theirs = one.checkpoint.manifest, other.checkpoint.manifest
    assert mine.trunk.fingerprint == theirs.trunk.fingerprint
    for task, twin in zip(mine.tasks, theirs.tasks, strict=True):
        assert (task.name, task.weights, task.metrics) == (twin.name, twin.weights, twin.metrics)
    assert mine.provenance["log"] == theirs.provenance["log"]
    assert one.trained.log == other.trained.log
    assert (one.trained.steps, one.trained.tokens) == (other.trained.steps, other.trained.tokens)
    assert (one.trained.ended, one.trained.best_step) == (other.trained.ended, other.trained.best_step)


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_twice_and_never(name: str, run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first epoch, and in the last; both times within a window of the log and with steps that no state has."""
    path, settings = run_file(TASKS), SETTINGS[name]
    whole = run(path, *settings, output="whole")
    counted = {key for row in whole.trained.log for key in row if key.startswith("train_tokens_")}
    assert counted == {"train_tokens_topic", "train_tokens_names.2-b_c", "train_tokens_words"}
    assert whole.trained.steps == 15
    stopped_at(5, monkeypatch, path, *settings)
    assert states(path) == ["checkpoint-3", "run.json"]
    stopped_at(14, monkeypatch, path, *settings, "resume=true")
    assert states(path) == ["checkpoint-12", "checkpoint-9", "run.json"]
    same(run(path, *settings, "resume=true"), whole)
    assert not states(path)
    assert not (path.parent / "whole.training").exists()


def test_the_patience_goes_on(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics that never get better: the third evaluation without a better one is that of step 4, before and after."""
    path = run_file({"topic": "classification"})
    monkeypatch.setattr(runs, "_measured", lambda run, name: {"macro_f1": 0.5})
    settings = ("training.epochs=6", "training.eval_steps=1", "training.best=topic.macro_f1", "training.patience=3")
    whole = run(path, *settings, output="whole")
    assert (whole.trained.steps, whole.trained.ended, whole.trained.best_step) == (4, "no improvement", 1)
    stopped_at(3, monkeypatch, path, *settings)
    same(run(path, *settings, "resume=true"), whole)


@pytest.mark.parametrize("ends", ["training.max_steps=5", "training.epochs=1.5", "training.epochs=2", "patience"])
def test_trained_but_not_sealed(ends: str, run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps an epoch. Transformers would make a sixth step of five, and go on after stopping early."""
    path = run_file({"topic": "classification"})
    monkeypatch.setattr(runs, "_measured", lambda run, name: {"macro_f1": 0.5})
    settings = [ends, "training.save_steps=2"]
    if ends == "patience":
        settings = ["training.eval_steps=1", "training.best=average", "training.patience=2", "training.epochs=9"]
    whole = run(path, *settings, output="whole")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(runs, "finish", full)
        with pytest.raises(OSError, match="no space"):
            run(path, *settings)
    assert "run.json" in states(path)
    same(run(path, *settings, "resume=true"), whole)
    assert not states(path)


KILLED = """
import os, signal, sys
from training.__main__ import main
from training.trainer.multitask import MultitaskTrainer
saved = MultitaskTrainer._save_rng_state
def save(self, folder):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)  # weights and optimizer are written, the rest is not
    saved(self, folder)
MultitaskTrainer._save_rng_state = save
main(sys.argv[1:])
"""


def test_a_process_killed_while_it_saves(run_file: Run) -> None:
    path = run_file(TASKS)
    settings = SETTINGS["proportional"]
    whole = run(path, *settings, output="whole")
    command = [sys.executable, "-c", KILLED, str(path), *settings, f"output={path.parent / 'out'}", "resamples=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run([*command, "golden_rows=1"], capture_output=True, timeout=120, env=environment)
    assert child.returncode == -signal.SIGKILL
    assert states(path) == ["checkpoint-3", "checkpoint-6", "run.json"]
    assert (path.parent / "out.training" / "checkpoint-6" / "model.safetensors").is_file()
    found = newest(path.parent / "out.training")
    assert found is not None
    assert found.name == "checkpoint-3"
    same(run(path, *settings, "resume=true"), whole)
    assert not states(path)


def test_what_is_not_resumed(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_file({"topic": "classification"})
    settings = ("training.save_steps=1", "training.epochs=2")
    with pytest.raises(ConfigError, match=r"out.training holds no state to go on from; allowed: resume: false"):
        run(path, "resume=true")
    assert not states(path)
    stopped_at(3, monkeypatch, path, *settings)
    left = states(path)
    assert left == ["checkpoint-1", "checkpoint-2", "run.json"]
    with pytest.raises(ConfigError, match="states of a run that did not end; allowed: resume: true, or remove it"):
        run(path, *settings)
    another = "holds states of another run; allowed: the config, data and processes of it"
    for change in ("training.learning_rate=0.1", "seed=1", "tasks.topic.weight=2", "mixture=uniform"):
        with pytest.raises(ConfigError, match=another):
            run(path, *settings, change, "resume=true")
    data = path.parent / "topic.train.jsonl"
    kept = data.read_text(encoding="utf-8")
    data.write_text(kept.replace("town", "river", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=another):
        run(path, *settings, "resume=true")
    data.write_text(kept, encoding="utf-8")
    mark = path.parent / "out.training" / "run.json"
    held = mark.read_text(encoding="utf-8")
    mark.unlink()
    with pytest.raises(ConfigError, match=another):
        run(path, *settings, "resume=true")
    mark.write_text(held, encoding="utf-8")
    assert states(path) == left
    run(path, *settings, "resume=true", "training.max_seconds=900")  # a budget is each session's own
    assert not states(path)


def test_states_hold_no_pickled_arguments_and_are_read_safely(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_file({"topic": "classification"})
    settings = ("training.save_steps=2", "training.scheduler=cosine")
    stopped_at(3, monkeypatch, path, *settings)
    held = {file.name for file in (path.parent / "out.training" / "checkpoint-2").iterdir()}
    weights, tensors = {"model.safetensors"}, {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert held == weights | tensors | {"trainer_state.json", "ledger-0.json"}
    loaded: list[str] = []
    load: Callable[..., Any] = torch.load

    def watched(file: Any, *args: Any, **given: Any) -> Any:
        assert given["weights_only"] is True
        loaded.append(Path(file).name)
        return load(file, *args, **given)

    monkeypatch.setattr(torch, "load", watched)
    run(path, *settings, "resume=true")
    assert set(loaded) == tensors


def test_half_a_state_is_no_state(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step, text in ((2, "{}"), (9, '{"a": 1}'), (10, '{"a": 1}'), (11, '{"a":'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text, encoding="utf-8")
    assert newest(tmp_path) == tmp_path / "checkpoint-10"
    assert json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text(encoding="utf-8"))
