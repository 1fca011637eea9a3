"""Heads that are trained into a checkpoint whose trunk stays as it is: the invariants of `training.trainer.frozen`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtserve
from mtserve.backends.staging import padded
from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from mtserve.golden import check_golden
from tests.test_surgery import contents
from tests.training.conftest import Run
from tests.training.test_run import run
from training.prepare import prepare
from training.runfile import read_config
from training.trainer import frozen
from training.trainer.fit import fit
from training.trainer.frozen import compute_outputs

NEW = {"urgency": "classification", "pick": "multiple_choice", "people": "token_classification", "close": "similarity"}
_FAST = ("training.epochs=60", "training.learning_rate=0.05")


@pytest.fixture
def home(run_file: Run) -> Path:
    """A checkpoint with the tasks `topic` and `names`."""
    return run(run_file({"topic": "classification", "names": "token_classification"})).folder


def new_heads(run_file: Run, home: Path, tasks: dict[str, str] = NEW, **more: Any) -> Path:
    return run_file(tasks, **{"trunk": str(home), "output": str(home), "result": "heads", **more})


def names(folder: Path) -> list[str]:
    return [task.name for task in Checkpoint.open(folder).manifest.tasks]


def test_new_heads_learn_and_all_else_stays(home: Path, run_file: Run) -> None:
    before, texts = contents(home), ["the great ana town", "the awful silva town"]
    answers = mtserve.load(home).predict("topic", texts)
    result = run(new_heads(run_file, home), *_FAST)
    checkpoint = Checkpoint.open(home)
    checkpoint.verify()
    assert names(home) == ["topic", "names", *NEW]
    after = contents(home)
    assert all(after[name] == content for name, content in before.items() if name not in ("mtserve.json", "README.md"))
    engine = mtserve.load(home)
    assert engine.predict("topic", texts) == answers
    assert [found[0]["label"] for found in engine.predict("urgency", texts)] == ["good", "bad"]
    assert result.scores["urgency"].metrics["accuracy"] > 0.9
    for name in NEW:
        assert check_golden(engine, name, checkpoint.golden(name), tolerance=1e-4).difference == 0
        assert engine.tasks[name].metrics == result.scores[name].metrics
    change = checkpoint.manifest.provenance["changes"][-1]
    assert change["change"] == "added `urgency`, `pick`, `people`, `close`"
    assert change["training"]["steps"] > 0
    card = (home / "README.md").read_text()
    assert card.count("---\n") == 2  # one block of metadata
    assert "# urgency, pick, people, close\n" in card


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "distilbert"])
def test_3_a_head_sees_what_it_would_see_of_the_trunk(run_file: Run, tmp_path: Path, family: str) -> None:
    tasks = {"topic": "classification", "choice": "multiple_choice", "names": "token_classification"}
    config = read_config(run_file(tasks, family), ["tasks.choice.options.pooling=pair"])
    made = prepare(config, base=tmp_path)
    for name, of in made.data.items():
        features = list(of.train.features)
        found = compute_outputs(
            made.model, name, features, pad_id=made.trunk.spec.pad_id, trunk="x", folder=tmp_path / "kept"
        )
        some = [row for rows, _ in features[:5] for row in rows]
        given = found.of(some)
        head = made.model.eval().head(name)
        pooled, texts = given["hidden"][:, 0] if found.pooled else None, given["texts"]
        states = frozen.TrunkStates(given["hidden"], pooled, given["mask"], texts)
        assert bool((texts == 2).any()) == (name == "choice")
        with torch.inference_mode():
            ours, theirs = head(states), made.model(name, *padded(some, pad_id=made.trunk.spec.pad_id), texts)
        for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            many = len(some[row]) if head.per_token else len(one)
            np.testing.assert_allclose(one[:many], other[:many], atol=1e-5)


def test_1_and_2_rows_are_computed_once_and_kept(
    home: Path, run_file: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    compute = frozen._compute

    def counted(model: Any, rows: Any, *rest: Any, **more: Any) -> None:
        passes.append(len(rows))
        compute(model, rows, *rest, **more)

    monkeypatch.setattr(frozen, "_compute", counted)
    path = new_heads(run_file, home, {"urgency": "classification"})
    run(path, "training.epochs=1", f"output={tmp_path / 'first'}")
    computed, kept = sum(passes), list((tmp_path / "first.outputs").iterdir())
    features = prepare(read_config(path, ()), base=tmp_path).data["urgency"].train.features
    assert computed == len({row.key for rows, _ in features for row in rows})
    assert [one.suffix for one in kept] == [".npy"]
    passes.clear()
    shutil.copytree(tmp_path / "first.outputs", tmp_path / "second.outputs")
    result = run(path, "training.epochs=2", "seed=5", f"output={tmp_path / 'second'}")
    assert passes == []
    assert names(tmp_path / "second") == ["topic", "names", "urgency"]
    assert names(home) == ["topic", "names"]
    kept[0].write_bytes(kept[0].read_bytes()[:-4])  # as no crash leaves it; it is made anew
    shutil.copytree(tmp_path / "first.outputs", tmp_path / "third.outputs")
    again = run(path, "training.epochs=2", "seed=5", f"output={tmp_path / 'third'}")
    assert sum(passes) == computed
    assert again.scores["urgency"].metrics == result.scores["urgency"].metrics


def test_training_equals_that_of_a_frozen_trunk_without_dropout(run_file: Run, tmp_path: Path) -> None:
    """The same head from the same start, on kept outputs and on a trunk that computes them in every step."""
    found = []
    for kept in (True, False):
        config = read_config(
            run_file({"topic": "classification"}), ("training.epochs=2", "training.learning_rate=0.01")
        )
        made = prepare(config, base=tmp_path)
        for module in made.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        features, pad_id = made.data["topic"].train.features, made.trunk.spec.pad_id
        outputs = {
            "topic": compute_outputs(made.model, "topic", features, pad_id=pad_id, trunk="x", folder=tmp_path / "kept")
        }
        settings = config.training if kept else config.training.model_copy(update={"freeze": ("trunk",)})
        fit(made.model, made.runs, settings=settings, seed=0, pad_id=pad_id, outputs=outputs if kept else None)
        found.append(made.model.head_tensors("topic"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("special_tokens=notebook",), "special_tokens: with result: heads the trunk stays as it is"),
        (("training.freeze=embeddings",), "training.freeze: with result: heads"),
        (("preparation=arabert",), "preparation: .* prepares its texts by no step"),
        (("trunk={plain}",), "is no checkpoint; allowed with result: heads"),
        (("tasks.urgency.kind=masked_lm",), "only trains a trunk; allowed: classification"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    home: Path, run_file: Run, trunk_folder: Any, overrides: tuple[str, ...], message: str
) -> None:
    path = new_heads(run_file, home, {"urgency": "classification"})
    before = contents(home)
    given = [one.replace("{plain}", str(trunk_folder("bert"))) for one in overrides]
    with pytest.raises(ConfigError, match=message):
        run(path, *given)
    assert contents(home) == before


def test_a_task_that_is_there_is_replaced_only_on_request(home: Path, run_file: Run) -> None:
    path = new_heads(run_file, home, {"topic": "classification"})
    with pytest.raises(ConfigError, match="has a task 'topic' already; allowed: another name, or overwrite: true"):
        run(path)
    run(path, "overwrite=true", "training.epochs=1")
    assert names(home) == ["topic", "names"]


def test_a_head_without_weights_of_its_own_is_refused(run_file: Run) -> None:
    home = run(run_file({"forth": "generation"}, "gpt2"), "training.epochs=1").folder
    with pytest.raises(ConfigError, match="its head has no weights of its own, as they are the trunk's"):
        run(new_heads(run_file, home, {"back": "generation"}))


def test_a_run_may_start_from_the_trunk_of_a_checkpoint(home: Path, run_file: Run, tmp_path: Path) -> None:
    """As a whole: transfer from one set of tasks to another."""
    result = run(
        run_file({"urgency": "classification"}, trunk=str(home), output=str(tmp_path / "next")), "training.epochs=1"
    )
    assert names(result.folder) == ["urgency"]
    assert result.checkpoint.manifest.trunk.source == Checkpoint.open(home).manifest.trunk.source
    assert result.checkpoint.manifest.trunk.fingerprint != Checkpoint.open(home).manifest.trunk.fingerprint
