"""Several seeds, and each task beside itself alone: what is run, what is compared, and what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from tests.training.conftest import Run
from training.__main__ import main
from training.compare import _same, compare, reached, seeded
from training.report.transfer import MARKS, grouping, section
from training.run import train
from training.runfile import read_config
from training.transfer import Transfer, transfer

TWO = {"topic": "classification", "names": "token_classification"}
LOST = Transfer("f1", "eval", 9, [0.5], [0.7], 0.5, (0.4, 0.6), -0.2, (-0.3, -0.1), 0.01)
SAME = replace(LOST, alone=[0.5], difference=0.0, limits=(-0.1, 0.1), p=0.9)
GAINED = replace(LOST, alone=[0.3], difference=0.2, limits=(0.1, 0.3))


def test_seeds_have_folders_of_their_own_and_the_table_has_their_means(
    run_file: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file({"topic": "classification"})
    assert main([str(path), "--seeds", "3", "seed=4"]) == 0
    shown, home = capsys.readouterr().out, path.parent / "out"
    assert sorted(p.name for p in home.iterdir()) == ["comparison.json", "comparison.md", "seed-4", "seed-5", "seed-6"]
    each = [Checkpoint.open(home / f"seed-{seed}").manifest.provenance for seed in (4, 5, 6)]
    assert [one["config"]["seed"] for one in each] == [4, 5, 6]
    values = [one["metrics"]["topic"]["macro_f1"] for one in each]
    line = next(line for line in shown.splitlines() if " macro_f1 " in line)
    assert line.split()[3:] == [f"{fmean(values):.3f}", "±", f"{stdev(values):.3f}"]
    assert (
        json.loads((home / "comparison.json").read_text())["value"][1]["eval"]["topic"] == each[1]["metrics"]["topic"]
    )
    monkeypatch.setattr("training.compare.train", None)  # nothing is trained again
    assert main([str(path), "--seeds", "3", "seed=4"]) == 0
    assert capsys.readouterr().out == shown


def test_a_group_that_was_broken_off_goes_on_from_the_state_of_its_run(
    run_file: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_file({"topic": "classification"})
    wanted = ["training.save_steps=1", f"output={path.parent / 'out'}"]

    class Stop(Exception):
        pass

    def stopped(*_: Any, **__: Any) -> None:
        raise Stop

    whole = reached(
        read_config(path, [*wanted, f"output={path.parent / 'whole'}", "seed=1"]), base=path.parent, command=""
    )
    config = read_config(path, wanted)
    train(seeded(config, 2)[0], base=path.parent)
    with monkeypatch.context() as patch:
        patch.setattr("training.run.finish", stopped)
        with pytest.raises(Stop):
            compare(config, seeds=2, base=path.parent, command="")
    with pytest.raises(ConfigError, match="states of a run that did not end; allowed: resume: true"):
        compare(config, seeds=2, base=path.parent, command="")
    compare(read_config(path, [*wanted, "resume=true"]), seeds=2, base=path.parent, command="")
    made = Checkpoint.open(path.parent / "out" / "seed-1").manifest.provenance
    assert made["metrics"] == whole["eval"]
    assert not (path.parent / "out" / "seed-1.training").exists()


def test_each_task_is_run_alone_and_compared(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_file(TWO, mixture={"strategy": "weights", "weights": {"topic": 3, "names": 1}})
    config = read_config(path, ["training.epochs=2", "resamples=50"])
    lines = transfer(config, seeds=2, base=path.parent, command="the command")
    home = path.parent / "out"
    assert [line[0] for line in lines] == ["task", "topic", "names"]
    shared = [Checkpoint.open(home / f"seed-{seed}").manifest.provenance for seed in (0, 1)]
    told = json.loads((home / "transfer.json").read_text())
    for name, metric in (("topic", "macro_f1"), ("names", "f1")):
        alone = [Checkpoint.open(home / "alone" / name / f"seed-{seed}").manifest for seed in (0, 1)]
        assert [task.name for task in alone[0].tasks] == [name]
        one = told["tasks"][name]
        assert one["shared"] == pytest.approx([of["metrics"][name][metric] for of in shared])
        assert one["alone"] == pytest.approx([of.provenance["metrics"][name][metric] for of in alone])
        assert one["difference"] == pytest.approx(fmean(one["shared"]) - fmean(one["alone"]))
        assert one["limits"][0] <= one["difference"] <= one["limits"][1]
        seen = [
            sum(row.get(f"train_examples_{name}", 0) for row in of["log"]) for of in (shared[0], alone[0].provenance)
        ]
        assert seen[1] == pytest.approx(seen[0], abs=4), "as many examples, to a batch"
    assert sum(row.get("train_examples_topic", 0) for row in shared[0]["log"]) > 24, "more than two passes"
    card = (home / "seed-1" / "README.md").read_text()
    assert card.index("## Evaluation") < card.index("## Transfer") < card.index("## Use")
    assert "Seeds" not in card
    assert "Means over seeds 0, 1." in card
    assert "Gradient cosines" in card
    assert "Suggested grouping" in card
    assert {tuple(pair[:2]) for pair in told["gradient_cosines"]} == {
        ("topic", "topic"), ("names", "names"), ("topic", "names")
    }  # fmt: skip
    assert told["gradient_sizes"].keys() == {"topic", "names"}
    monkeypatch.setattr("training.compare.train", None)  # nothing is trained again, and the section is there once
    assert transfer(config, seeds=2, base=path.parent, command="the command") == lines
    assert (home / "seed-1" / "README.md").read_text() == card
    assert card.count(MARKS[0]) == card.count("## Transfer") == 1
    Checkpoint.open(home / "seed-1").verify()


def test_a_checkpoint_of_a_version_with_fewer_keys_is_that_of_this_run(run_file: Run) -> None:
    config = read_config(run_file(TWO), ["training.freeze=embeddings", "preparation=marbert"])
    made = json.loads(json.dumps(config.model_dump(mode="json")))
    assert _same(made, config.model_copy(update={"overwrite": True, "resume": True}))
    for of in (made["training"], made["tasks"]["topic"], made):
        of.pop("mixout", None), of.pop("r_drop", None), of.pop("chains", None)
    assert _same(made, config)
    assert not _same(made, read_config(run_file(TWO), ["training.freeze=embeddings"]))
    assert not _same({**made, "training": {**made["training"], "mixout": 0.1}}, config)
    assert not _same({**made, "a key": "of a later version"}, config)
    assert not _same(None, config)


def test_the_test_is_paired(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that are right on the same examples but for a few: the pairs show what the two intervals do not."""
    from training import transfer as module

    truth = np.arange(200) % 2
    kind = read_config(run_file({"topic": "classification"})).tasks["topic"].handler
    options = kind.options.model_validate({"labels": ["no", "yes"]})
    better, worse = truth.copy(), truth.copy()
    better[:60] = 1 - better[:60]
    worse[:70] = 1 - worse[:70]
    given = {"shared": better, "alone": worse}
    monkeypatch.setattr(module, "_outcomes", lambda _, one, *__: ((truth, given[one.output]), options))
    config = read_config(run_file({"topic": "classification"}), ["resamples=200"])
    runs = [config.model_copy(update={"output": which}) for which in given]
    found = module._compared("topic", runs[:1], runs[1:], Path())
    assert found.verdict == "gained"
    assert found.p <= 2 / 201
    assert found.interval[0] < found.alone[0] < found.interval[1], "unpaired, nothing is shown"
    assert found.limits == pytest.approx((0.025, 0.08), abs=0.02)
    back = module._compared("topic", runs[1:], runs[:1], Path())
    assert back.verdict == "lost"
    assert back.limits == pytest.approx(tuple(-x for x in reversed(found.limits)))
    same = module._compared("topic", runs[:1], runs[:1], Path())
    assert (same.verdict, same.p, same.limits) == ("no difference shown", 1.0, (0.0, 0.0))


def test_groups() -> None:
    cosines = {("a", "b"): 0.2, ("a", "c"): -0.2, ("b", "c"): 0.3, ("a", "a"): 0.9}
    assert grouping({"a": SAME, "b": GAINED, "c": SAME}, {}) == "Suggested grouping: a + b + c on one trunk; none lost."
    assert grouping({"a": SAME, "b": LOST, "c": LOST}, cosines) == (
        "Suggested grouping: a; b + c. Gradients of a and c point against each other."
    )
    assert grouping({"a": LOST, "b": SAME, "c": LOST}, cosines).startswith("Suggested grouping: b; a; c.")
    assert grouping({"a": LOST, "b": LOST}, {("a", "b"): -0.5}).startswith("Suggested grouping: a; b.")
    text = section({"a": LOST, "b": GAINED}, cosines, {}, seeds=[0], resamples=10)
    assert "Seed 0." in text
    assert re.search(r"\| a \| eval \| f1 \| 0.500 \| 0.400 to 0.600 \| 0.700 \| -0.200 \| .* \| lost \|", text)


def test_several_processes_are_refused(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_file(TWO)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="transfer runs in one process"):
        transfer(read_config(path), seeds=1, base=path.parent, command="")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds 0: allowed: 1 or more"),
        (["--transfer", "--trunk", "a"], "--transfer is of one trunk"),
        (["--transfer", "resamples=0"], "a paired test needs some"),
        (["--transfer"], "two or more tasks"),
    ],
)
def test_what_cannot_be_compared_is_said(
    arguments: list[str], message: str, run_file: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"topic": "classification"} if arguments == ["--transfer"] else TWO
    assert main([str(run_file(tasks)), *arguments]) == 2
    assert message in capsys.readouterr().err
