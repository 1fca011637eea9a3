"""The checkpoint format: what is written, that it is whole at every moment, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from mtserve import sealing
from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError
from mtserve.sealing import seal
from mtserve.weights import load_model, task_part, trunk_part
from tests.crashes import Crash
from tests.tiny import TOKENIZER_JSON, tiny, write_checkpoint


def edit(folder: Path, change: Any) -> None:
    path = folder / "mtserve.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "bert"
    write_checkpoint(folder, tiny("bert"))
    return folder


@pytest.fixture
def folder(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "bert"))


def test_a_sealed_checkpoint_verifies(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert present - {*checkpoint.manifest.files} == {"mtserve.json", "README.md", sealing.INDEX}
    assert all((folder / name).stat().st_mode & 0o444 == 0o444 for name in present)  # a server's user may read them


def test_plain_transformers_loads_the_trunk(folder: Path) -> None:
    trunk = AutoModel.from_pretrained(folder / "trunk")
    ours = load_model(Checkpoint.open(folder)).trunk.state_dict()
    theirs = trunk.state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_nothing_in_a_checkpoint_is_a_pickle(folder: Path) -> None:
    endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert endings == {".json", ".jsonl", ".safetensors", ".md"}


def test_another_version_replaces_the_first_and_leaves_nothing(folder: Path) -> None:
    before = Checkpoint.open(folder)
    after = write_checkpoint(folder, tiny("bert", only=("topic", "names")))
    assert [task.name for task in after.manifest.tasks] == ["topic", "names"]
    assert not (folder / "heads" / "tags").exists()
    assert after.manifest.trunk.fingerprint == before.manifest.trunk.fingerprint
    after.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../up"}, "is no task name"),
        ({"options": {"max_length": 999}}, "max_length 999 is over the 96 positions"),
    ],
)
def test_what_could_not_be_opened_is_not_committed(folder: Path, change: dict[str, Any], message: str) -> None:
    before = (folder / "mtserve.json").read_bytes()
    small = tiny("bert", only=("topic",))
    options = small.tasks[0].options.model_copy(update=change.pop("options", {}))
    part = task_part(small.model, "topic", kind="classification", options=options)
    with pytest.raises(CheckpointError, match=message):
        seal(
            folder,
            trunk_part(small.model, source="random"),
            tasks=[dataclasses.replace(part, **change)],
            tokenizer_json=TOKENIZER_JSON,
            text=small.spec,
            provenance={},
            card="",
            written_by="tests",
        )
    assert (folder / "mtserve.json").read_bytes() == before
    Checkpoint.open(folder).verify()


def test_figures_stand_beside_the_card_until_the_next_version(folder: Path) -> None:
    small = tiny("bert", only=("topic",))

    def write(extras: dict[str, bytes]) -> Checkpoint:
        topic = task_part(small.model, "topic", kind="classification", options=small.tasks[0].options)
        return seal(
            folder,
            trunk_part(small.model, source="random"),
            tasks=[topic],
            tokenizer_json=TOKENIZER_JSON,
            text=small.spec,
            provenance={},
            card="# figures\n",
            written_by="tests",
            extras=extras,
        )

    write({"figures/curves.png": b"1", "figures/confusion-topic.png": b"2"}).verify()
    sealed = write({"figures/curves.png": b"3"})
    assert [(p.name, p.read_bytes()) for p in (folder / "figures").iterdir()] == [("curves.png", b"3")]
    (folder / "figures" / "curves.png").unlink()  # not load-bearing
    Checkpoint.open(folder).verify()
    assert not any(name.startswith("figures/") for name in sealed.manifest.files)
    before = (folder / "mtserve.json").read_bytes()
    for name in ("figures/../up.png", "mtserve.json", "figures/.hidden", "/figures/x", "figures/a/b"):
        with pytest.raises(CheckpointError, match="is no name of an extra file; allowed: figures/"):
            write({name: b""})
    assert (folder / "mtserve.json").read_bytes() == before
    assert not list(folder.parent.glob("up.png"))


def test_a_crash_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop the writer before each of its renames and removals in turn, and open what is there."""
    crash = Crash(monkeypatch)
    old_tasks = {task.name for task in Checkpoint.open(folder).manifest.tasks}
    new = tiny("bert", only=("topic",))
    for parameter in new.model.trunk.parameters():
        parameter.data += 0.5
    outcomes = []
    for after in range(200):
        trial = Path(shutil.copytree(folder, tmp_path / f"trial{after}"))
        done = crash.run(lambda trial=trial: write_checkpoint(trial, new), after=after)
        found = Checkpoint.open(trial)
        found.verify()
        load_model(found)
        AutoModel.from_pretrained(trial / "trunk")
        names = {task.name for task in found.manifest.tasks}
        assert names in (old_tasks, {"topic"})
        outcomes.append(names == {"topic"})
        if done:
            break
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 10


def test_another_trunk_config_does_not_go_into_the_same_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trunk/config.json would change"):
        write_checkpoint(folder, tiny("roberta"))
    Checkpoint.open(folder).verify()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="holds something else"):
        write_checkpoint(tmp_path, tiny("bert", only=("topic",)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["trunk/model.safetensors", "README.md", "heads/notes.txt"])
def test_files_that_no_manifest_ever_named_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(CheckpointError, match="holds something else"):
        write_checkpoint(tmp_path, tiny("bert", only=("topic",)))
    assert (tmp_path / name).read_text() == "precious"


def test_the_fingerprint_changes_with_one_weight_and_with_the_tokenizer(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", tiny("bert", only=("topic",))).manifest.trunk.fingerprint
    again = write_checkpoint(tmp_path / "b", tiny("bert", only=("topic",))).manifest.trunk.fingerprint
    assert first == again
    changed = tiny("bert", only=("topic",))
    next(changed.model.trunk.parameters()).data[0, 0] += 1
    assert write_checkpoint(tmp_path / "c", changed).manifest.trunk.fingerprint != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format=3), "has format 3; this version reads format 1 and 2"),
        (lambda raw: raw.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda raw: raw["tasks"][0].update(kind="poetry"), "'poetry' is no kind of task; allowed: classification"),
        (lambda raw: raw["tasks"][0].update(name="../up"), "'../up' is no task name"),
        (lambda raw: raw["tasks"][0].update(trunk="0" * 64), "was trained on trunk 000000000000"),
        (lambda raw: raw["tasks"][1].update(name=raw["tasks"][0]["name"]), "task names must be distinct"),
        (lambda raw: raw["tasks"][0]["options"].update(labels=["a", "a"]), "labels must be distinct; found a, a"),
        (lambda raw: raw["files"].update({"../x": {"size": 1, "sha256": "0" * 64}}), "is not a plain path inside"),
        (lambda raw: raw["files"].pop("tokenizer.json"), "'tokenizer.json' is used but not listed"),
        (
            lambda raw: raw["trunk"].update(max_length=40),
            "max_length 48 is over the 40 positions of its trunk",
        ),
        (lambda raw: raw["tasks"][0].update(kind="generation", options={"max_length": 80}), "needs a causal trunk"),
        (lambda raw: raw["text"].update(preparation=["stem"]), "'stem' is unknown to this version"),
    ],
)
def test_bad_manifests_are_refused_with_a_sentence(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(").replace(".", r"\.")):
        Checkpoint.open(folder).text()


def test_missing_and_damaged_files_are_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    weights = folder / checkpoint.manifest.trunk.weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    Checkpoint.open(folder)  # sizes and headers are right …
    with pytest.raises(CheckpointError, match="has sha256"):
        checkpoint.verify()  # … the bytes are not
    weights.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="the manifest says"):
        Checkpoint.open(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint.open(folder)
    (folder / "mtserve.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        Checkpoint.open(folder)
    (folder / "mtserve.json").unlink()
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (10).to_bytes(8, "little") + b"not json!!",
        (2).to_bytes(8, "little") + b"{}"[:1],
        (62).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}  ' + b"\0" * 4,
        (62).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,99999]}}    ' + b"\0" * 4,
    ],
)
def test_lying_safetensors_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        sealing.read_header(path)


@pytest.mark.parametrize("pattern", ["trunk/config.json", "heads/topic/config-*.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "poem"}'])
def test_damaged_configs_are_refused(folder: Path, pattern: str, content: str) -> None:
    (path,) = folder.glob(pattern)
    path.write_text(content.ljust(path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"config.*\.json is not the file that was sealed"):
        Checkpoint.open(folder)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda raw: raw["files"][path.relative_to(folder).as_posix()].update(sha256=found))
    with pytest.raises(CheckpointError, match="is no model config"):
        load_model(Checkpoint.open(folder))


def test_head_tensors_must_fit(folder: Path) -> None:
    def swap(raw: Any) -> None:
        by_name = {task["name"]: task for task in raw["tasks"]}
        by_name["topic"]["weights"] = by_name["tags"]["weights"]

    edit(folder, swap)
    with pytest.raises(CheckpointError, match=r"'topic': tensor classifier\.(bias|weight) has a wrong shape"):
        load_model(Checkpoint.open(folder))
