"""Several checkpoints in one server: one model for each trunk, and prefixes for names that would clash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mtserve.backends.eager import EagerBackend
from mtserve.errors import CheckpointError, ConfigError, ResolveError, SetupError
from mtserve.loading import load
from mtserve.serve.app import make_app
from mtserve.serve.launch import command
from mtserve.serve.loading import load_table, open_checkpoints, split_prefix
from mtserve.serve.table import Root, TaskTable
from mtserve.settings import Settings
from tests.serve.conftest import sealed
from tests.serve.test_routes import ok
from tests.serve.test_service import free_port


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints on one BERT and two on one GPT-2, whose output matrix is the trunk's."""
    home = tmp_path_factory.mktemp("together")
    sealed(home / "a", "bert", only=("topic", "choice"))
    sealed(home / "b", "bert", only=("score", "names"))
    sealed(home / "c", "gpt2", only=("forth", "tags"))
    sealed(home / "d", "gpt2", only=("back",))
    return home


@contextmanager
def served(*locations: str) -> Iterator[TaskTable]:
    table = load_table(Settings(model=locations))
    try:
        yield table
    finally:
        table.model.close()


def bytes_of(table: TaskTable) -> int:
    """Memory of all weights, storage that is shared counted once."""
    storages = {}
    for trunk in dict.fromkeys(table.model.queues.values()):
        assert isinstance(trunk.engine.backend, EagerBackend)
        for tensor in trunk.engine.backend.model.state_dict().values():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def alone(location: Path) -> int:
    with served(str(location)) as table:
        return bytes_of(table)


def test_checkpoints_of_one_trunk_share_it(home: Path, assets: Path) -> None:
    folders = [home / name for name in "acbd"]
    with served(*map(str, folders)) as table:
        assert list(table.tasks) == ["topic", "choice", "tags", "forth", "score", "names", "back"]
        assert all(task.golden is not None and task.golden.reproduced for task in table.tasks.values())
        bert, gpt2 = dict.fromkeys(table.model.queues.values())
        assert set(bert.engine.tasks) == {"topic", "choice", "score", "names"}
        assert set(gpt2.engine.tasks) == {"tags", "forth", "back"}
        backend = gpt2.engine.backend
        assert isinstance(backend, EagerBackend)
        embeddings = backend.model.trunk.get_input_embeddings().weight.data_ptr()
        for name in ("forth", "back"):
            assert backend.model.head_state(name)["lm_head.weight"].data_ptr() == embeddings
        heads = sum(
            path.stat().st_size for folder in folders for path in folder.glob("heads/*/*.safetensors")
        )  # headers included
        trunks = alone(home / "a") + alone(home / "d")
        assert bytes_of(table) < trunks + heads < sum(map(alone, folders)) - trunks / 2
        client = TestClient(make_app(Root(table), assets=assets))
        for folder in folders:
            engine = load(folder)
            for name in engine.tasks:
                example = table.task(name).example()["inputs"]
                answer = engine.task(name).kind.join(engine.predict(name, [example]), "one")
                assert ok(client, f"/tasks/{name}", {"inputs": example}) == close(answer)
        assert ok(client, "/predict", {"inputs": "good", "tasks": ["topic", "names"]})["usage"]["trunk_passes"] == 1


def close(value: Any) -> Any:
    """An answer, its numbers only nearly equal."""
    if isinstance(value, dict):
        return {name: close(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [close(inner) for inner in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def test_prefixes_keep_names_apart(home: Path, assets: Path) -> None:
    a = str(home / "a")
    with served(a, f"new={a}", f"old.er={a}") as table:
        assert list(table.tasks) == ["topic", "choice", "new.topic", "new.choice", "old.er.topic", "old.er.choice"]
        assert len(table.trunks) == 1
        client = TestClient(make_app(Root(table), assets=assets))
        answers = [ok(client, f"/tasks/{prefix}topic", {"inputs": "good"}) for prefix in ("", "new.", "old.er.")]
        assert answers[0] == answers[1] == answers[2]
        assert {"/tasks/new.topic", "/tasks/old.er.choice"} < set(client.get("/openapi.json").json()["paths"])
        assert [task["name"] for task in client.get("/tasks").json()["tasks"]] == list(table.tasks)


def test_golden_rows_are_checked_for_all(home: Path, tmp_path: Path) -> None:
    sealed(tmp_path / "wrong", "bert", only=("topic",), wrong="topic")
    with (
        pytest.raises(CheckpointError, match=r"task 'other\.topic': the logits of the golden rows differ"),
        served(str(home / "a"), f"other={tmp_path / 'wrong'}"),
    ):
        pass


def test_trunks_of_another_config_are_not_shared(home: Path, tmp_path: Path) -> None:
    """The fingerprint is of tensors, tokenizer and preparation; what the config says of them may differ."""
    shutil.copytree(home / "b", tmp_path / "b")
    config = json.loads((tmp_path / "b/trunk/config.json").read_text())
    raw = json.dumps({**config, "layer_norm_eps": 1e-3}).encode()
    (tmp_path / "b/trunk/config.json").write_bytes(raw)
    manifest = json.loads((tmp_path / "b/mtserve.json").read_text())
    manifest["files"]["trunk/config.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (tmp_path / "b/mtserve.json").write_text(json.dumps(manifest))
    with served(str(home / "a"), str(tmp_path / "b")) as table:
        first, second = table.trunks
        assert first.entry.fingerprint == second.entry.fingerprint


def test_what_a_prefix_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=y").mkdir()
    (tmp_path / "folder").mkdir()
    assert split_prefix("x=y") == ("", "x=y")
    assert split_prefix("p=x=y") == ("p", "x=y")
    assert split_prefix("folder") == ("", "folder")
    assert split_prefix("p.q=owner/name@main") == ("p.q", "owner/name@main")
    assert split_prefix(f"p={tmp_path}") == ("p", str(tmp_path))
    assert split_prefix("./no=thing") == ("", "./no=thing")  # as a path it does not exist, and is told so
    for wrong in ("P=folder", "p.=folder", "=folder", "a b=folder", "a" * 65 + "=folder"):
        with pytest.raises(ConfigError, match="prefix"):
            split_prefix(wrong)
    with pytest.raises(ResolveError, match="does not exist"):
        open_checkpoints(["p=./nothing"])


def test_names_that_clash_say_how_to_prefix(home: Path) -> None:
    a, b = str(home / "a"), str(home / "b")
    with pytest.raises(SetupError, match=r"task 'topic' is in .*PREFIX=LOCATION"):
        open_checkpoints([a, b, a])
    with pytest.raises(SetupError, match=r"task 'p\.topic' is in"):
        open_checkpoints([f"p={a}", f"p={a}"])
    with pytest.raises(ConfigError, match="with prefix"):
        open_checkpoints([f"{'p' * 60}={a}"])


def test_prefixes_pass_through_command_and_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    _, env = command(["p=a", "a"], port=free_port())
    wanted = [f"p={home / 'a'}", str(home / "a")]
    assert json.loads(env["MTSERVE_MODEL"]) == [
        location.replace(str(home), os.path.realpath(home)) for location in wanted
    ]
    monkeypatch.setenv("MTSERVE_MODEL", "p=a, a")
    assert Settings().model == ("p=a", "a")
    assert [task.name for each in open_checkpoints(Settings().model) for task in each.manifest.tasks] == [
        *("p.topic", "p.choice"),
        *("topic", "choice"),
    ]


def test_the_room_for_pasts_is_a_setting(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTSERVE_MAX_PAST_TOKENS", "77")
    table = load_table(Settings(model=(str(home / "d"),)))
    table.model.close()
    assert table.model.queues["back"].engine.max_past_tokens == 77
    assert Settings.model_fields["max_past_tokens"].default == 32_768
