"""Heads that come to a running server and leave it: the invariants of `mtserve.serve.living`, and its routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mtserve.checkpoint import Checkpoint
from mtserve.client import Client
from mtserve.errors import CapacityError, ConfigError, HeadError, SetupError, UnknownTaskError
from mtserve.export.bundling import export
from mtserve.head_file import pack_head, read_head
from mtserve.loading import load as load_engine
from mtserve.manifest import FP32, Profile
from mtserve.safetensors_file import copy_with, read_metadata
from mtserve.sealing import accept_profiles
from mtserve.serve.app import make_app
from mtserve.serve.front import Front
from mtserve.serve.living import Living
from mtserve.serve.loading import load
from mtserve.serve.process import facts_of, follow, hosted
from mtserve.serve.table import Root
from mtserve.serve.ui.asking import ask
from mtserve.settings import Settings
from tests.serve.conftest import sealed
from tests.serve.test_routes import error
from tests.test_cli import run
from tests.tiny import GENERATION

TEXT = "ana silva moved from porto to oslo"
KEY, ADMIN = "a-key-of-the-tests", "a-key-of-the-operator"
MAY = {"Authorization": f"Bearer {ADMIN}"}


def ok(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def labels(version: str) -> tuple[str, dict[str, Any]]:
    return "classification", {"labels": [f"{version}-yes", f"{version}-no"], "max_length": 48}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one trunk with heads of several versions, of another trunk, and the files of their heads."""
    home = tmp_path_factory.mktemp("heads")
    sealed(home / "base", "bert", only=("topic", "names"))
    for version in ("v1", "v2"):
        sealed(home / version, "bert", tasks={"topic": labels(version)})
    sealed(home / "v3", "bert", tasks={"topic": labels("v3")}, golden=False)
    sealed(home / "bad", "bert", tasks={"topic": labels("bad")}, wrong="topic")
    sealed(home / "other", "roberta", tasks={"topic": labels("other")})
    for version in ("v1", "v2", "v3", "bad", "other"):
        pack_head(Checkpoint.open(home / version), "topic", home / f"{version}.head")
    return home


@dataclass
class Running:
    """An app over a loaded model."""

    living: Living
    root: Root
    client: TestClient

    def put(self, name: str, head: Path | bytes, **flags: str) -> Any:
        content = head if isinstance(head, bytes) else head.read_bytes()
        return self.client.put(f"/admin/heads/{name}", params=flags, content=content, headers=MAY)

    def delete(self, name: str) -> Any:
        return self.client.delete(f"/admin/heads/{name}", headers=MAY)

    def answer(self, name: str) -> Any:
        return ok(self.client.post(f"/tasks/{name}", json={"inputs": TEXT}))

    @property
    def heads(self) -> set[str]:
        """Keys of what is loaded, after all that waits for the engine has been done."""
        (queue,) = {*self.living.model.queues.values()}
        queue.scheduler.between(lambda: None).result()
        engine = queue.engine
        assert {*engine.tasks} == {*engine.backend.model.specs} == {*self.living.model.queues}
        return {*engine.tasks}


@contextmanager
def running(model: Path, assets: Path, **given: Any) -> Iterator[Running]:
    living = load(Settings(model=(str(model),), admin_keys=(ADMIN,), **given))
    root = Root(living.table)
    living.serve(root)
    try:
        with TestClient(Front(make_app(root, assets=assets), root=root)) as client:
            yield Running(living, root, client)
    finally:
        living.model.close()


@pytest.fixture
def server(made: Path, assets: Path) -> Iterator[Running]:
    with running(made / "base", assets) as one:
        yield one


def test_a_head_comes_is_replaced_and_leaves(server: Running, made: Path) -> None:
    base = server.answer("topic")
    came = server.put("urgency", made / "v1.head")
    assert came.status_code == 201
    assert (came.json()["name"], came.json()["labels"]) == ("urgency", ["v1-yes", "v1-no"])
    assert came.json()["golden"]["reproduced"]
    wanted = load_engine(made / "v1").predict("topic", [TEXT])
    assert server.answer("urgency") == wanted
    assert asyncio.run(ask(server.root, "urgency", {"inputs": TEXT})).joined == wanted  # as the playground asks
    body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}]}
    by_protocol = ok(server.client.post("/v2/models/urgency/infer", json=body))["outputs"]
    assert {out["name"]: out["data"] for out in by_protocol}["label"] == [wanted[0][0]["label"]]
    assert server.answer("topic") == base
    assert error(server.put("urgency", made / "v2.head"), 409, "head_refused")["message"].startswith("there is a task")
    replaced = server.put("urgency", made / "v2.head", replace="true")
    assert replaced.status_code == 200
    assert replaced.json()["version"] not in ("", came.json()["version"])
    assert server.answer("urgency") == load_engine(made / "v2").predict("topic", [TEXT])
    server.put("topic", made / "v1.head", replace="true")  # one of the checkpoint's own
    both = {"inputs": [TEXT], "tasks": ["topic", "urgency", "names"]}
    found = ok(server.client.post("/predict", json=both))
    assert [found["outputs"][name][0][0]["label"][:2] for name in ("topic", "urgency")] == ["v1", "v2"]
    assert found["usage"]["trunk_passes"] == 1
    assert [task["name"] for task in server.client.get("/tasks").json()["tasks"]] == ["topic", "names", "urgency"]
    assert len(server.heads) == 3  # what was replaced is free
    left = ok(server.delete("urgency"))
    assert left == {"removed": "urgency", "tasks": ["topic", "names"]}
    error(server.client.post("/tasks/urgency", json={"inputs": TEXT}), 404, "unknown_task")
    assert len(server.heads) == 2
    described = server.client.get("/openapi.json").json()
    assert "/tasks/urgency" not in described["paths"]
    assert set(described["paths"]["/admin/heads/{task}"]) == {"put", "delete"}
    assert "409" in described["components"]["responses"]


def test_a_head_of_generation_comes_and_answers_in_steps(tmp_path: Path, assets: Path) -> None:
    sealed(tmp_path / "base", "gpt2", only=("forth",))
    sealed(tmp_path / "more", "gpt2", tasks={"back": GENERATION["back"]})
    pack_head(Checkpoint.open(tmp_path / "more"), "back", tmp_path / "head")
    with running(tmp_path / "base", assets) as server:
        for _ in range(2):
            server.put("back", tmp_path / "head")
            (wanted,) = load_engine(tmp_path / "more").predict("back", ["good"])
            assert ok(server.client.post("/tasks/back", json={"inputs": "good"})) == wanted
            ok(server.delete("back"))
        (queue,) = {*server.living.model.queues.values()}
        queue.scheduler.between(lambda: None).result()
        served = queue.engine.backend.served
        assert {*served._heads} <= {"forth"}


def test_what_does_not_fit_is_refused_and_changes_nothing(
    server: Running, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, table = server.heads, server.root.table()
    whole = (made / "v1.head").read_bytes()
    pack_head(Checkpoint.open(made / "v1"), "topic", tmp_path / "twisted")
    said = json.loads(read_metadata(tmp_path / "twisted")["mtserve-head"])
    weights = Checkpoint.open(made / "base").folder / str(Checkpoint.open(made / "base").task("names").weights)

    def twisted(tensors: Path | None = None, **changes: Any) -> bytes:
        copy_with({"mtserve-head": json.dumps({**said, **changes})}, tensors, tmp_path / "file")
        return (tmp_path / "file").read_bytes()

    refused: list[tuple[bytes, str]] = [
        ((made / "other.head").read_bytes(), "trained on trunk"),
        ((made / "bad.head").read_bytes(), "golden rows differ by"),
        (whole[:-10], "does not fit the file"),
        (whole[:4], "is not a whole safetensors file"),
        (b"", "is not a whole safetensors file"),
        (b"\x80\x04" * 50, "is not a whole safetensors file"),
        (weights.read_bytes(), "is no head of format 1; found format None"),
        (twisted(format=2), "found format 2"),
        (twisted(entry={**said["entry"], "kind": "poetry"}), "is no kind of task"),
        (twisted(tensors=weights), "task 'urgency': tensor classifier.weight has a wrong shape"),
        (twisted(entry={**said["entry"], "options": {**said["entry"]["options"], "max_length": 97}}), "96 positions"),
        (twisted(config={"model_type": "nothing"}), "is no model config"),
    ]
    for content, why in refused:
        assert why in error(server.put("urgency", content), 409, "head_refused")["message"]
    for name, flags, status, code in (
        ("A", {}, 400, "bad_request"),
        ("urgency", {"replace": "yes"}, 422, "invalid_input"),
        ("urgency", {"force": "true"}, 422, "invalid_input"),
    ):
        error(server.put(name, whole, **flags), status, code)
    error(server.delete("urgency"), 404, "unknown_task")
    with monkeypatch.context() as patched:
        patched.setattr(server.living.folder, "put", _full)
        message = error(server.put("urgency", whole), 503, "unavailable")["message"]
        assert message == "the folder of heads cannot be written: No space left on device"
    assert server.root.table() is table
    assert server.heads == before
    server.delete("names")
    assert "last task" in error(server.delete("topic"), 409, "head_refused")["message"]


@pytest.mark.parametrize("golden", [True, False])
def test_a_head_of_another_shape_does_not_come(
    server: Running, made: Path, tmp_path: Path, golden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor[..., :16].contiguous() for name, tensor in load_file(made / "v1.head").items()}
    said = json.loads(read_metadata(made / "v1.head")["mtserve-head"])
    said["config"] = {**said["config"], "hidden_size": 16, "num_attention_heads": 2}
    said["golden"] = said["golden"] if golden else []
    save_file(tensors, tmp_path / "small")
    copy_with({"mtserve-head": json.dumps(said)}, tmp_path / "small", tmp_path / "head")
    before = server.heads
    message = error(server.put("urgency", tmp_path / "head"), 409, "head_refused")["message"]
    assert message == "the head does not run on its trunk: RuntimeError"
    assert server.heads == before
    assert server.answer("topic")


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_only_the_operators_key_opens_the_routes(made: Path, assets: Path) -> None:
    with running(made / "base", assets, api_keys=(KEY,)) as server:
        for headers in ({}, {"X-API-Key": KEY}, {"Authorization": "Bearer x"}):
            error(server.client.put("/admin/heads/x", content=b"", headers=headers), 401, "unauthorized")
            error(server.client.delete("/admin/heads/topic", headers=headers), 401, "unauthorized")
        error(server.client.post("/tasks/topic", json={"inputs": TEXT}, headers=MAY), 401, "unauthorized")
        assert server.put("urgency", made / "v1.head").status_code == 201
    living = load(Settings(model=(str(made / "base"),), max_head_bytes=1000))
    with TestClient(Front(make_app(root := Root(living.table), assets=assets), root=root)) as client:
        living.serve(root)
        assert "MTSERVE_ADMIN_KEYS" in error(client.delete("/admin/heads/topic"), 404, "not_found")["message"]
    living.model.close()
    with running(made / "base", assets, max_head_bytes=1000) as server:
        error(server.put("urgency", made / "v1.head"), 413, "too_large")


def test_a_request_under_way_keeps_the_heads_that_it_may_hold(server: Running, made: Path) -> None:
    first = server.heads
    with ExitStack() as requests:
        requests.enter_context(server.root.entered())
        server.put("topic", made / "v1.head", replace="true")
        between = server.heads - first
        with server.root.entered():  # came later
            server.put("topic", made / "v2.head", replace="true")
            assert first | between < server.heads
        assert first | between < server.heads  # an older one is still there, and each table between
    later = server.heads
    assert len(later) == 2
    assert not later & (between | {"topic"})


def test_a_head_that_leaves_and_comes_again_while_its_requests_are_under_way(server: Running, made: Path) -> None:
    server.put("urgency", made / "v1.head")
    with server.root.entered():
        server.delete("urgency")
        server.put("urgency", made / "v1.head")
    server.heads  # noqa: B018  # what was to be freed has been
    assert server.answer("urgency")[0][0]["label"].startswith("v1")
    assert len(server.heads) == 3


def test_a_later_start_finds_what_is_in_force(made: Path, assets: Path, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"heads": tmp_path / "heads"}
    with running(made / "base", assets, **kept) as server:
        server.put("urgency", made / "v1.head")
        server.put("topic", made / "v2.head", replace="true")
        server.delete("names")
        listed, answers = server.client.get("/tasks").json(), [server.answer(n) for n in ("topic", "urgency")]
    with running(made / "base", assets, **kept) as server:
        assert server.client.get("/tasks").json() == listed
        assert [server.answer(n) for n in ("topic", "urgency")] == answers
        assert len(server.heads - {"topic", "names"}) == 2
    with pytest.raises(ConfigError, match=r"MTSERVE_HEADS: .* trained on trunk"):
        load(Settings(model=(str(made / "other"),), **kept))
    next((tmp_path / "heads").glob("urgency-*")).unlink()
    with pytest.raises(ConfigError, match=r"MTSERVE_HEADS: .*urgency-.*No such file"):
        load(Settings(model=(str(made / "base"),), **kept))


def test_a_head_without_golden_rows_comes_and_says_so(server: Running, made: Path) -> None:
    assert server.put("urgency", made / "v3.head").json()["golden"]["checked"] is False


def test_a_profile_takes_heads_that_were_measured_in_it(made: Path, assets: Path, tmp_path: Path) -> None:
    checkpoint = sealed(tmp_path / "base", "bert", only=("topic",))
    accept_profiles(checkpoint, {"fp32": FP32, "int8": Profile(tolerance=5.0)})
    with running(tmp_path / "base", assets, profile="int8") as server:
        message = error(server.put("urgency", made / "v1.head"), 409, "head_refused")["message"]
        assert "computes in int8, in which the head's checkpoint was not measured; measured: fp32" in message
        assert server.put("urgency", made / "v1.head", untuned="true").status_code == 201
        measured = sealed(tmp_path / "v", "bert", tasks={"topic": labels("v9")})
        accept_profiles(measured, {"fp32": FP32, "int8": Profile(tolerance=1e-9)})
        pack_head(Checkpoint.open(tmp_path / "v"), "topic", tmp_path / "head")
        assert "allowed: 1e-09 in int8" in server.put("more", tmp_path / "head").json()["error"]["message"]


def test_workers_hear_of_each_change_before_it_is_answered(made: Path, tmp_path: Path) -> None:
    """Two API workers and the model process, in one loop."""
    settings = Settings(model=(str(made / "base"),))

    async def main() -> None:
        living, path, stopped = load(settings), tmp_path / "socket", asyncio.Event()
        answering = asyncio.create_task(hosted(living).serve(path, stopped=stopped))
        roots = [Root(), Root()]
        for root in roots:
            root.swap(follow(root, settings, str(path), facts_of(living.base, living.live)))
        attending = [asyncio.create_task(root.attend()) for root in roots]
        for root in roots:
            while True:
                try:
                    await root.check()
                    break
                except CapacityError:
                    await asyncio.sleep(0.01)

        async def asked(root: Root, name: str) -> Any:
            task = root.table().task(name)
            outputs, _ = await root.table().model.predict({task.key: None}, [TEXT], timeout_s=30)
            return outputs[task.key][0][0]["label"][:2]

        first, second = (root.changes for root in roots)
        assert first is not None
        assert second is not None
        await first.put("urgency", made / "v1.head")
        assert [await asked(root, "urgency") for root in roots] == ["v1", "v1"]
        old = roots[1].table()
        with roots[1].entered():
            await second.put("urgency", made / "v2.head", instead=True)
            assert [await asked(root, "urgency") for root in roots] == ["v2", "v2"]
            task = old.task("urgency")  # a request that came before holds the old table
            found, _ = await old.model.predict({task.key: None}, [TEXT], timeout_s=30)
            assert found[task.key][0][0]["label"].startswith("v1")
        while task.key in living.model.queues:
            await asyncio.sleep(0.01)
        with pytest.raises(CapacityError, match="'urgency' was changed meanwhile"):
            await old.model.predict({task.key: None}, [TEXT], timeout_s=30)
        with pytest.raises(HeadError, match="trained on trunk"):
            await first.put("more", made / "other.head")
        with pytest.raises(UnknownTaskError):
            await first.remove("more")
        await first.remove("urgency")
        assert [[*root.table().tasks] for root in roots] == [["topic", "names"]] * 2
        for one in attending:
            one.cancel()
        stopped.set()
        await answering
        living.model.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_the_client_and_the_command_bring_heads_and_take_them_away(
    server: Running, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connected(url: str, *, api_key: str | None, timeout_s: float = 60) -> Client:
        assert (url, api_key) == ("http://a-server", ADMIN)
        client = Client(url, api_key=api_key)
        client._http = server.client
        server.client.headers["Authorization"] = f"Bearer {api_key}"
        return client

    monkeypatch.setattr("mtserve.client.Client", connected)
    monkeypatch.setattr(server.client, "close", lambda: None)
    monkeypatch.setenv("MTSERVE_ADMIN_KEY", ADMIN)
    push = ("heads", "push", str(made / "v1"), "http://a-server", "--task")
    found = run(*push, "urgency=topic")
    assert found.returncode == 0, found.stderr
    assert "urgency (classification), version " in found.stdout
    again = run(*push, "urgency=topic")
    assert (again.returncode, "ask to replace it" in again.stderr) == (2, True)
    assert run(*push, "urgency=topic", "--replace").returncode == 0
    assert run(*push, "nothing").returncode == 2
    gone = run("heads", "withdraw", "http://a-server", "urgency")
    assert (gone.returncode, gone.stdout) == (0, "http://a-server: topic, names\n")


def test_a_bundle_takes_no_heads(made: Path, assets: Path, tmp_path: Path) -> None:
    bundle = export(Checkpoint.open(made / "base"), tmp_path / "bundle").bundle
    assert bundle is not None
    with running(bundle.folder, assets) as server:
        assert "bundle" in error(server.put("urgency", made / "v1.head"), 409, "head_refused")["message"]
    with pytest.raises(SetupError, match="bundle"):
        pack_head(bundle, "topic", tmp_path / "head")


def test_a_file_says_all_of_its_head(made: Path) -> None:
    checkpoint = Checkpoint.open(made / "v1")
    found = read_head(made / "v1.head")
    assert found.entry.options == checkpoint.task("topic").options
    assert [*found.golden] == checkpoint.golden("topic")
    assert found.profiles == {"fp32": FP32.tolerance}
    with pytest.raises(SetupError, match="no task 'nothing'; its tasks: topic"):
        pack_head(checkpoint, "nothing", made / "nothing")
