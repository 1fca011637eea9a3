"""Heads that come into a checkpoint, leave it, or get another name: the invariants of `mtserve.surgery`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtserve import surgery
from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError
from mtserve.golden import golden_rows
from mtserve.loading import load
from mtserve.manifest import FP32, Change, Profile
from mtserve.sealing import accept_profiles
from mtserve.weights import load_model, task_part
from tests.crashes import Crash
from tests.test_cli import run
from tests.tiny import Tiny, tiny, write_checkpoint

TASKS = ("topic", "names", "cosine")
CHANGE = Change(metric="macro_f1", fp32=0.5, change=0.0, low=-0.1, high=0.1, flips=1, rows=10)


@pytest.fixture(scope="module")
def small() -> Tiny:
    return tiny("bert", only=TASKS)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory, small: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("surgery") / "bert"
    checkpoint = write_checkpoint(folder, small)
    accept_profiles(
        checkpoint,
        {"fp32": FP32, "bf16": Profile(tolerance=0.5, flips=3, rows=30, tasks=dict.fromkeys(TASKS, CHANGE))},
    )
    (folder / "figures").mkdir()
    (folder / "figures" / "curves.png").write_bytes(b"1")
    return folder


@pytest.fixture
def folder(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "bert"))


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Checkpoint:
    """Another checkpoint of the same trunk, whose task `topic` has a head of its own."""
    made = Path(shutil.copytree(folder, tmp_path / "other"))
    checkpoint = surgery.remove_heads(Checkpoint.open(made), ["names"])
    head = load_model(checkpoint)
    for parameter in head.head("topic").parameters():
        parameter.data += 1
    entry = checkpoint.task("topic")
    part = task_part(head, "topic", kind="classification", options=entry.parsed_options)
    return surgery.add_heads(checkpoint, [part], instead=True)


def names(checkpoint: Checkpoint) -> list[str]:
    return [task.name for task in checkpoint.manifest.tasks]


def scores(folder: Path, task: str) -> Any:
    return load(folder, profile="fp32").predict(task, ["the parcel arrived two days late"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changes(checkpoint: Checkpoint) -> list[str]:
    return [one["change"] for one in checkpoint.manifest.provenance["changes"]]


def test_1_a_task_goes_and_all_else_stays_byte_for_byte(folder: Path) -> None:
    before, old = contents(folder), Checkpoint.open(folder)
    answer = scores(folder, "topic")
    checkpoint = surgery.remove_heads(old, ["names"])
    checkpoint.verify()
    assert names(checkpoint) == ["topic", "cosine"]
    assert checkpoint.manifest.tasks == tuple(task for task in old.manifest.tasks if task.name != "names")
    gone = {name for name in before if "/names" in name}
    assert len(gone) == 4
    after = contents(folder)
    assert after.keys() == before.keys() - gone
    assert {name for name in after if after[name] != before[name]} == {"mtserve.json", "README.md"}
    assert scores(folder, "topic") == answer


def test_4_profiles_stay_where_every_task_was_measured(folder: Path) -> None:
    checkpoint = surgery.remove_heads(Checkpoint.open(folder), ["names"])
    assert checkpoint.manifest.profiles["bf16"].tasks == dict.fromkeys(("topic", "cosine"), CHANGE)
    assert (checkpoint.manifest.profiles["bf16"].flips, checkpoint.manifest.profiles["bf16"].rows) == (2, 20)
    checkpoint = surgery.rename_head(checkpoint, "topic", "subject")
    assert list(checkpoint.manifest.profiles["bf16"].tasks) == ["subject", "cosine"]


def test_a_task_gets_another_name_and_answers_as_before(folder: Path) -> None:
    answer, place = scores(folder, "topic"), names(Checkpoint.open(folder)).index("topic")
    checkpoint = surgery.rename_head(Checkpoint.open(folder), "topic", "subject")
    checkpoint.verify()
    assert names(checkpoint)[place] == "subject"
    assert scores(folder, "subject") == answer
    assert not [name for name in contents(folder) if "topic" in name]
    entry = checkpoint.task("subject")
    assert all("subject" in str(path) for path in (entry.weights, entry.config, entry.golden, entry.calibration))


def test_3_a_task_of_the_same_trunk_comes_under_another_name(folder: Path, other: Checkpoint) -> None:
    theirs, ours = scores(other.folder, "topic"), scores(folder, "topic")
    checkpoint = surgery.bring_heads(Checkpoint.open(folder), other, {"topic": "urgency"})
    checkpoint.verify()
    assert names(checkpoint) == [*those_before(checkpoint), "urgency"]
    assert scores(folder, "urgency") == theirs != ours
    assert scores(folder, "topic") == ours
    assert list(checkpoint.manifest.profiles) == ["fp32"]  # 4: it was never measured in others


def those_before(checkpoint: Checkpoint) -> list[str]:
    return [name for name in names(checkpoint) if name in TASKS]


def test_a_trained_head_comes_in(folder: Path, small: Tiny) -> None:
    topic = next(task for task in small.tasks if task.name == "topic")
    rows = golden_rows(small.engine, "topic", [topic.kind.sample(topic.options)])
    part = task_part(small.model, "topic", kind="classification", options=topic.options, golden=rows)
    with pytest.raises(CheckpointError, match="has a task 'topic' already; its tasks: "):
        surgery.add_heads(Checkpoint.open(folder), [part])
    checkpoint = surgery.add_heads(
        Checkpoint.open(folder), [part], instead=True, told={"command": "train"}, card="# More\n\nof it\n"
    )
    checkpoint.verify()
    assert sorted(names(checkpoint)) == sorted(TASKS)
    assert checkpoint.manifest.provenance["changes"][0]["command"] == "train"
    card = (folder / "README.md").read_text()
    block = "<!-- heads: topic -->\n\n# More\n\nof it\n\n<!-- end of heads -->\n"
    assert card.startswith(f"# test\n\n{block}\n## Changes\n\n- 2")
    assert changes(checkpoint) == ["replaced `topic`"]
    surgery.rename_head(checkpoint, "names", "people")
    assert block in (folder / "README.md").read_text()
    surgery.remove_heads(Checkpoint.open(folder), ["topic"])
    assert (folder / "README.md").read_text().startswith("# test\n\n## Changes\n\n- 2")
    assert checkpoint.manifest.provenance["note"] == "test"


def test_5_every_change_is_told(folder: Path) -> None:
    checkpoint = surgery.rename_head(Checkpoint.open(folder), "topic", "subject")
    checkpoint = surgery.remove_heads(checkpoint, ["subject"])
    assert changes(checkpoint) == ["renamed `topic` to `subject`", "removed `subject`"]
    card = (folder / "README.md").read_text()
    assert card.startswith("# test\n\n## Changes\n\n- 2")
    assert card.count("## Changes") == 1
    assert [line.partition(": ")[2] for line in card.splitlines()[4:]] == changes(checkpoint)
    assert (folder / "figures" / "curves.png").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one, _: surgery.remove_heads(one, ["nope"]), "has no task 'nope'; its tasks: "),
        (lambda one, _: surgery.remove_heads(one, TASKS), "would have no task left"),
        (lambda one, _: surgery.rename_head(one, "nope", "x"), "has no task 'nope'"),
        (lambda one, _: surgery.rename_head(one, "topic", "names"), "has a task 'names' already"),
        (lambda one, _: surgery.rename_head(one, "topic", "../up"), "'../up' is no task name"),
        (lambda one, other: surgery.bring_heads(one, other, {"topic": "names"}), "has a task 'names' already"),
        (lambda one, other: surgery.bring_heads(one, other, {"nope": "x"}), "has no task 'nope'"),
        (lambda one, other: surgery.bring_heads(one, other, {"topic": "A B"}), "'A B' is no task name"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    folder: Path, other: Checkpoint, change: Callable[[Checkpoint, Checkpoint], Any], message: str
) -> None:
    before = contents(folder)
    with pytest.raises(CheckpointError, match=message):
        change(Checkpoint.open(folder), other)
    assert contents(folder) == before


def test_3_a_head_of_another_trunk_is_refused(folder: Path, tmp_path: Path) -> None:
    foreign = tiny("bert", only=("topic",))
    for parameter in foreign.model.trunk.parameters():
        parameter.data += 0.5
    source = write_checkpoint(tmp_path / "foreign", foreign)
    before = contents(folder)
    with pytest.raises(CheckpointError, match="A head goes with its own trunk alone"):
        surgery.bring_heads(Checkpoint.open(folder), source, {"topic": "urgency"})
    assert contents(folder) == before


def test_a_version_that_somebody_else_wrote_meanwhile_stays(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    surgery.remove_heads(Checkpoint.open(folder), ["names"])
    for late in (
        lambda: surgery.remove_heads(opened, ["topic"]),
        lambda: surgery.rename_head(opened, "topic", "x"),
        lambda: surgery.bring_heads(opened, opened, {"topic": "x"}),
    ):
        with pytest.raises(CheckpointError, match="was written anew since it was opened"):
            late()
    assert "topic" in names(Checkpoint.open(folder))


def test_a_head_file_that_was_changed_is_not_brought(folder: Path, other: Checkpoint) -> None:
    path = other.folder / str(other.task("topic").weights)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is not the file that was sealed"):
        surgery.bring_heads(Checkpoint.open(folder), other, {"topic": "urgency"})
    Checkpoint.open(folder).verify()
    assert not (folder / "heads" / "urgency").exists()


def test_2_a_crash_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash, outcomes = Crash(monkeypatch), []
    for after in range(40):
        trial = Path(shutil.copytree(folder, tmp_path / f"trial{after}"))
        opened = Checkpoint.open(trial)
        done = crash.run(lambda opened=opened: surgery.rename_head(opened, "topic", "subject"), after=after)
        found = Checkpoint.open(trial)
        found.verify()
        outcomes.append("subject" in names(found))
        if done:
            break
    assert (outcomes[0], outcomes[-1]) == (False, True)
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 6


def test_commands(folder: Path, other: Checkpoint) -> None:
    done = run("heads", "add", folder, other.folder, "--task", "urgency=topic")
    assert done.returncode == 0, done.stderr
    assert "`mtserve tune`" in done.stderr
    done = run("heads", "rename", folder, "urgency", "priority")
    assert done.stdout.endswith("priority\n")
    done = run("heads", "remove", folder, "topic", "cosine")
    assert sorted(done.stdout.rpartition(": ")[2].strip().split(", ")) == ["names", "priority"]
    answer = run("predict", folder, "the town", "--task", "priority").stdout
    assert json.loads(answer)["priority"] == load(other.folder).predict("topic", ["the town"])[0]
    for wrong, message in (
        (("remove", folder, "nope"), "has no task 'nope'"),
        (("add", folder, other.folder, "--task", "a=topic", "--task", "b=topic"), "allowed is each task once"),
        (("rename", folder.parent / "no", "a", "b"), "is not a checkpoint"),
    ):
        refused = run("heads", *wrong)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
