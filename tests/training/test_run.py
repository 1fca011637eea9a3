"""Whole runs: train, seal, load in another process, predict the same; and what a run refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtserve.errors import CheckpointError, ConfigError, ResolveError
from mtserve.golden import check_golden
from mtserve.loading import load
from tests.tiny import TOKENIZER_JSON
from tests.training.conftest import Run
from training.__main__ import main
from training.run import Result, train
from training.runfile import read_config
from training.trunk import tokenizer_json

FIVE = {
    "topic": "classification",
    "score": "similarity",
    "choice": "multiple_choice",
    "names": "token_classification",
    "cosine": "similarity",
}
CAUSAL = {"forth": "generation", "topic": "classification"}
_FAST = ("training.epochs=30", "training.learning_rate=1e-3", "training.head_learning_rate=0.03")
LOADED = """
import json, sys, torch, mtserve
torch.set_num_threads(1)
engine = mtserve.load(sys.argv[1])
asked = json.load(sys.stdin)
print(json.dumps({task: engine.predict(task, inputs) for task, inputs in asked.items()}))
"""


def run(path: Path, *overrides: str) -> Result:
    return train(read_config(path, overrides), base=path.parent, command="python -m training run.yaml")


def in_another_process(folder: Path, asked: dict[str, list[Any]]) -> dict[str, Any]:
    command = [sys.executable, "-c", LOADED, str(folder)]
    found = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    answers: dict[str, Any] = json.loads(found.stdout)
    return answers


@pytest.mark.parametrize(("family", "tasks"), [("bert", FIVE), ("gpt2", CAUSAL)])
def test_a_sealed_run_predicts_the_same_in_another_process(run_file: Run, family: str, tasks: dict[str, str]) -> None:
    path = run_file(tasks, family)
    overrides = ["tasks.cosine.options.method=cosine"] if "cosine" in tasks else []
    result = run(path, *overrides)
    checkpoint, engine = result.checkpoint, result.engine
    checkpoint.verify()
    assert [task.name for task in checkpoint.manifest.tasks] == list(tasks)
    asked = {name: [row.input for row in checkpoint.golden(name)] * 2 for name in tasks}
    assert all(len(inputs) == 4 for inputs in asked.values())
    expected = {name: engine.predict(name, inputs) for name, inputs in asked.items()}
    assert in_another_process(checkpoint.folder, asked) == expected
    for name in tasks:
        assert check_golden(engine, name, checkpoint.golden(name), tolerance=1e-4).difference == 0
        assert len(checkpoint.calibration(name)) == 6
        assert checkpoint.task(name).metrics == result.scores[name].metrics
    manifest = checkpoint.manifest
    assert manifest.trunk.source == f"tiny-{family}"
    assert manifest.trunk.causal == (family == "gpt2")
    assert manifest.provenance["metrics"].keys() == manifest.provenance["baselines"].keys() == tasks.keys()
    files = {file.suffix for file in checkpoint.folder.rglob("*") if file.is_file()}
    assert files == {".json", ".jsonl", ".safetensors", ".md", ".png"}
    card = (checkpoint.folder / "README.md").read_text(encoding="utf-8")
    assert all(name in card for name in [*tasks, *tasks.values(), f"tiny-{family}", "python -m training run.yaml"])
    assert manifest.provenance["data"]["topic"]["train"]["sha256"] in card


def test_training_learns(run_file: Run) -> None:
    path = run_file({"names": "token_classification"}, calibration_rows=0)
    result = run(path, *_FAST, "golden_rows=0")
    scores = result.scores["names"]
    assert scores.metrics["f1"] > scores.baseline["f1"] + 0.5
    assert result.trained.log[-1]["train_loss_names"] < 0.5 * result.trained.log[0]["train_loss_names"]
    assert result.trained.steps == 90
    assert not result.checkpoint.golden("names")
    assert not result.checkpoint.calibration("names")


def test_scores_are_calibrated_on_request(run_file: Run, tmp_path: Path) -> None:
    kinds = {"topic": "classification", "choice": "multiple_choice", "names": "token_classification"}
    path = run_file({**kinds, "score": "similarity"})
    plain = run(path, f"output={tmp_path / 'plain'}")
    result = run(path, "calibrate=true")
    of = {task.name: task.options for task in result.checkpoint.manifest.tasks}
    before = {task.name: task.options for task in plain.checkpoint.manifest.tasks}
    for name in kinds:
        assert before[name]["temperature"] == 1 != of[name]["temperature"]
        assert {**of[name], "temperature": 1.0} == before[name]
        assert result.scores[name].metrics == plain.scores[name].metrics  # no order changes
        row = f"| {name} | {of[name]['temperature']:.3f} | "
        assert row in (result.folder / "README.md").read_text()
    assert of["score"] == before["score"]
    text = "the great ana town"
    loaded, trained = (one.predict("topic", [text])[0] for one in (load(result.folder), result.engine))
    assert loaded == trained != load(plain.folder).predict("topic", [text])[0]
    assert "temperature" not in (plain.folder / "README.md").read_text()


def test_the_same_seed_gives_the_same_weights(run_file: Run) -> None:
    path = run_file({"topic": "classification", "names": "token_classification"})
    folder = path.parent
    marks = [
        run(path, f"output={folder / name}", f"seed={seed}").checkpoint.manifest
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert marks[0].trunk.fingerprint == marks[1].trunk.fingerprint != marks[2].trunk.fingerprint
    heads = [[task.weights for task in manifest.tasks] for manifest in marks]
    assert heads[0] == heads[1] != heads[2]


def test_a_pooler_that_the_trunks_folder_lacks_follows_the_seed(
    run_file: Run, tmp_path: Path, trunk_folder: Callable[[str], Path]
) -> None:
    bare = Path(shutil.copytree(trunk_folder("bert"), tmp_path / "bare"))
    tensors = load_file(bare / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) < len(tensors)
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    path = run_file({"topic": "classification"})
    marks = []
    for name in ("a", "b"):
        torch.rand(3)  # the state of the global generator must not matter
        made = run(path, f"trunk={bare}", f"output={tmp_path / name}").checkpoint
        marks.append(made.manifest.trunk.fingerprint)
    assert marks[0] == marks[1]


def test_overwrite_is_asked_for(run_file: Run, trunk_folder: Callable[[str], Path]) -> None:
    path = run_file({"topic": "classification"})
    first = run(path).checkpoint.manifest
    with pytest.raises(ConfigError, match="already holds a checkpoint; allowed: another output, or overwrite: true"):
        run(path)
    assert run(path, "overwrite=true", "seed=1").checkpoint.manifest.trunk.fingerprint != first.trunk.fingerprint
    with pytest.raises(ConfigError, match=r"holds a checkpoint of another trunk, tiny-bert \(bert\)"):
        run(path, "overwrite=true", f"trunk={trunk_folder('gpt2')}")
    (path.parent / "mine").mkdir()
    (path.parent / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="holds something that is no checkpoint"):
        run(path, f"output={path.parent / 'mine'}")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["tasks.topic.options.max_length=97"],
            ConfigError,
            "97 is more than this trunk's positions allow; allowed: at most 96",
        ),
        (["tasks.forth.kind=generation"], ConfigError, "generation needs a causal trunk; bert here is bidirectional"),
        (["trunk=./nowhere"], ResolveError, "nowhere does not exist"),
        (
            ["training.learning_rate=1e30", "training.epochs=3"],
            ConfigError,
            "the loss of task '.*' is (nan|inf) at step",
        ),
    ],
)
def test_what_a_run_refuses(run_file: Run, overrides: list[str], error: type[Exception], message: str) -> None:
    tasks = {"topic": "classification"}
    if any("forth" in override for override in overrides):
        tasks["forth"] = "generation"
    path = run_file(tasks)
    with pytest.raises(error, match=message):
        run(path, *overrides)
    assert not (path.parent / "out").exists()


def test_tokenizer_files_of_older_trunks(tmp_path: Path, trunk_folder: Callable[[str], Path]) -> None:
    vocab = json.loads(TOKENIZER_JSON)["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text((trunk_folder("bert") / "config.json").read_text())
    assert json.loads(tokenizer_json(tmp_path))["model"]["vocab"] == vocab
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer that can be loaded"):
        tokenizer_json(empty)


def test_a_trunk_without_a_fast_tokenizer_is_refused(tmp_path: Path, trunk_folder: Callable[[str], Path]) -> None:
    shutil.copy(trunk_folder("bert") / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has a tokenizer \(ByT5Tokenizer\) without a tokenizer.json form"):
        tokenizer_json(tmp_path)


def test_command_line(run_file: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_file({"topic": "classification"}, on_bad_record="skip")
    train_file = path.parent / "topic.train.jsonl"
    train_file.write_text(train_file.read_text() + "{\n", encoding="utf-8")
    assert main([str(path), "training.max_steps=2", "training.bf16=true"]) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[0] == ["task", "metric", "value", "95%", "interval", "majority"]
    assert lines[1][:2] == ["topic", "macro_f1"]
    assert "topic train: 1 of 13 records left out; the first: topic.train.jsonl:13: not JSON" in shown.err
    assert "step 2/2" in shown.err
    assert main([str(path), "training.epoch=2"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert "unknown key 'epoch'" in shown.err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "example: python -m training run.yaml" in capsys.readouterr().out


def test_a_plan_trains_and_writes_nothing(run_file: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_file({"topic": "classification", "names": "token_classification"})
    before = set(path.parent.rglob("*"))
    settings = ["training.eval_steps=2", "training.best=average", "training.patience=1", "training.save_steps=2"]
    assert main([str(path), "--plan", *settings]) == 0
    shown = capsys.readouterr().out
    assert "mixture proportional: 1 epochs, 6 steps" in shown
    assert shown.count("topic") >= 3
    assert set(path.parent.rglob("*")) == before
