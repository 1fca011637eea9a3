"""Chains over HTTP: beside tasks, by the model in this process and by that of another one, under one deadline."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from mtserve import surgery
from mtserve.chains import Rerank, Spans
from mtserve.checkpoint import Checkpoint
from mtserve.client import Client
from mtserve.errors import ConfigError, DeadlineError, InputError, SetupError
from mtserve.head_file import pack_head
from mtserve.loading import load
from mtserve.serve.answering import answer_tasks
from mtserve.serve.exchange import opened
from mtserve.serve.living import Living
from mtserve.serve.loading import load as load_served
from mtserve.serve.model import Usage
from mtserve.serve.openapi import document
from mtserve.serve.process import facts_of, remote_base
from mtserve.serve.table import TaskTable
from mtserve.settings import Settings
from tests.serve.conftest import asking, loaded, sealed
from tests.serve.schemas import problems
from tests.serve.test_living import ok, running
from tests.serve.test_remote import between, run

TEXTS = ["ana silva moved from porto to oslo in may", "good", "the parcel arrived two days late , but kind"]
ENCODER: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("token_classification", {"labels": ["a", "b", "c"], "max_length": 48}),
    "topic": ("classification", {"labels": ["good", "bad", "fine"], "max_length": 48}),
    "short": ("classification", {"labels": ["x", "y"], "max_length": 22, "on_long": "error"}),
}
DECODER: dict[str, tuple[str, dict[str, Any]]] = {
    "forth": ("generation", {"template": "{source} [SEP]{target}", "max_new_tokens": 5, "max_length": 48}),
    "style": ("classification", {"labels": ["old", "new"], "max_length": 48}),
}
CHAINS = [
    Spans(name="opinions", first="names", then="topic"),
    Spans(name="brief", first="names", then="short", labels=("b", "c")),
    Rerank(name="best", first="forth", then="style", label="old", candidates=3),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    home = tmp_path_factory.mktemp("chained")
    encoder, decoder = sealed(home / "bert", "bert", tasks=ENCODER), sealed(home / "gpt2", "gpt2", tasks=DECODER)
    for chain in CHAINS[:2]:
        encoder = surgery.add_chain(encoder, chain)
    return str(encoder.folder), str(surgery.add_chain(decoder, CHAINS[2]).folder)


@pytest.fixture(scope="module")
def living(folders: tuple[str, str]) -> Iterator[Living]:
    made = load_served(Settings(model=folders, max_inputs=20, threads=1))
    yield made
    made.model.close()


@pytest.fixture(scope="module")
def table(living: Living) -> TaskTable:
    return living.table


@pytest.fixture(scope="module")
def client(table: TaskTable, assets: Path) -> Iterator[TestClient]:
    with asking(table, assets) as made:
        yield made


def ask(client: TestClient, *tasks: str, inputs: Any = TEXTS, status: int = 200, **parameters: Any) -> Any:
    body = {"inputs": inputs, "tasks": tasks, "parameters": parameters}
    response = client.post("/predict", json=body)
    assert response.status_code == status, response.text
    return response.json()


def test_answers_are_those_of_an_engine_bit_for_bit(client: TestClient, folders: tuple[str, str]) -> None:
    for folder, names in zip(folders, (["opinions", "brief"], ["best"]), strict=True):
        engine = load(folder)
        for name in names:
            assert ask(client, name)["outputs"] == {name: engine.predict(name, TEXTS)}
    mixed = ask(client, "topic", "opinions", "best", "names", best={"forth": {"num_beams": 4}}, topic={"top_k": 1})
    assert list(mixed["outputs"]) == ["topic", "opinions", "best", "names"]
    alone = [ask(client, "opinions"), ask(client, "best", best={"forth": {"num_beams": 4}})]
    assert mixed["outputs"]["opinions"] == alone[0]["outputs"]["opinions"]
    assert mixed["outputs"]["best"] == alone[1]["outputs"]["best"]


def test_the_same_task_may_be_asked_otherwise_beside_its_chain(client: TestClient) -> None:
    found = ask(client, "names", "opinions", names={"ignore_labels": ["a", "b", "c"]})["outputs"]
    assert found["names"] == [[], [], []]
    assert found["opinions"] == ask(client, "opinions")["outputs"]["opinions"]
    assert any(found["opinions"])


def test_usage_is_that_of_both_steps(client: TestClient) -> None:
    first, both = ask(client, "names")["usage"], ask(client, "opinions")
    pairs = [
        {"text": text, "text_pair": one["word"]}
        for text, some in zip(TEXTS, both["outputs"]["opinions"], strict=True)
        for one in some
    ]
    second, usage = ask(client, "topic", inputs=pairs)["usage"], both["usage"]
    assert usage["inputs"] == len(TEXTS)
    for name in ("tokens", "trunk_passes"):
        assert usage[name] == first[name] + second[name]
    assert usage["total_time_ms"] >= usage["run_time_ms"]
    nothing = ask(client, "opinions", opinions={"names": {"ignore_labels": ["a", "b", "c"]}})
    assert nothing["outputs"] == {"opinions": [[], [], []]}
    assert (nothing["usage"]["trunk_passes"], nothing["usage"]["tokens"]) == (1, first["tokens"])


def test_what_is_wrong_is_said_before_anything_runs(client: TestClient, table: TaskTable) -> None:
    before = table.model.queues["names"].engine.counters.rows
    wrong = [
        ({"topic": {"top_k": 0}}, "chain 'opinions': Input should be greater", "parameters.topic.top_k"),
        ({"other": {}}, "chain 'opinions': not allowed here; allowed: names, topic", "parameters.other"),
        (3, "must be an object", "parameters.opinions"),
    ]
    for parameters, message, field in wrong:
        (problem,) = ask(client, "opinions", status=422, opinions=parameters)["error"]["problems"]
        assert message in problem["message"]
        assert problem["field"] == field
    (problem,) = ask(client, "opinions", inputs=["good", 3], status=422)["error"]["problems"]
    assert problem["index"] == 1
    assert ask(client, "opinions", inputs=["good"] * 21, status=413)["error"]["code"] == "too_large"
    assert table.model.queues["names"].engine.counters.rows == before


def test_what_the_second_task_refuses_names_the_input(client: TestClient) -> None:
    long = f"{TEXTS[0]} " * 2
    assert ask(client, "names", inputs=[long])["outputs"]["names"][0]
    found = ask(client, "brief", inputs=["good", long], status=422)["error"]["problems"]
    assert {problem["index"] for problem in found} == {1}
    assert all("chain 'brief', task 'short': the text has" in problem["message"] for problem in found)


def test_a_chain_is_no_task_and_says_so(client: TestClient) -> None:
    for path in ("/tasks/opinions", "/v2/models/opinions/infer"):
        response = client.post(path, json={"inputs": "good"})
        assert response.status_code == 404
        assert "'opinions' is a chain of tasks, which is asked among the tasks of POST /predict" in response.text
    assert "chains: best, brief, opinions" in ask(client, "gone", status=404)["error"]["message"]


def test_chains_are_listed_and_declared(client: TestClient, table: TaskTable) -> None:
    listed = client.get("/tasks").json()["chains"]
    assert [chain["name"] for chain in listed] == [chain.name for chain in CHAINS]
    assert listed[0] == {
        **{"name": "opinions", "link": "spans", "first": "names", "then": "topic"},
        **{"labels": None, "span": "text_pair", "text": "text"},
    }
    spec = json.loads(json.dumps(document(table)))
    body = spec["components"]["schemas"]["Predict"]
    schemas = spec["components"]["schemas"]
    assert schemas["opinions.FollowedSpan"]["properties"]["entity_group"]["enum"] == ["a", "b", "c"]
    assert schemas["opinions.LabelScore"]["properties"]["label"]["enum"] == ["good", "bad", "fine"]
    for chain in CHAINS:
        parameters = {chain.name: {chain.then: {"function_to_apply": "sigmoid"}}}
        request = {"inputs": TEXTS, "tasks": [chain.name], "parameters": parameters}
        assert problems(spec, body, request) == []
        assert problems(spec, body, {**request, "parameters": {chain.name: {"other": {}}}})
        answer = ask(client, chain.name, **parameters)
        assert problems(spec, schemas["Predictions"], answer) == []
        assert f"`{chain.name}` chains" in spec["paths"]["/predict"]["post"]["description"]


def test_the_examples_of_chains_run(client: TestClient, table: TaskTable) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        told = client.request(request.method, request.url.path, content=request.read())
        return httpx.Response(told.status_code, content=told.content)

    through = httpx.MockTransport(answer)
    said = document(table, url="http://testserver")["paths"]["/predict"]["post"]["description"]
    assert said.count("```bash") == len(CHAINS)
    for code in said.split("```python\n")[1:]:
        lines = code.split("```")[0].replace("Client('http://testserver')", "make()")
        printed: list[Any] = []
        made = {"make": lambda: Client("http://testserver", transport=through), "print": printed.append}
        exec(lines.replace("from mtserve.client import Client", "Client = None"), made)
        assert len(printed) == 1
        assert len(next(iter(printed[0].values()))) == 1
    with Client("http://testserver", transport=through) as asked:
        assert list(asked.chains()) == [chain.name for chain in CHAINS]


def test_a_prefix_is_put_before_chains_and_their_tasks(folders: tuple[str, str], assets: Path) -> None:
    with loaded(Settings(model=(f"mine={folders[0]}",), threads=1)) as made, asking(made, assets) as client:
        found = ask(client, "mine.opinions", **{"mine.opinions": {"mine.topic": {"top_k": 1}}})["outputs"]
        assert found["mine.opinions"] == load(folders[0]).predict("opinions", TEXTS, {"topic": {"top_k": 1}})
        chain = made.chains["mine.opinions"]
        assert (chain.first, chain.then) == ("mine.names", "mine.topic")
    with pytest.raises(SetupError, match="'names' is in"), loaded(Settings(model=(folders[0], folders[0]))):
        pass


def test_the_model_of_another_process_gives_the_same_answers(living: Living, table: TaskTable) -> None:
    async def main() -> None:
        async with between(living) as (remote, path, _):
            base, _ = remote_base(table.settings, str(path), facts_of(living.base, living.live))
            there = base.table()
            assert there.listing() == table.listing()
            for names in (["opinions"], ["topic", "best", "brief"]):
                asked = [
                    answer_tasks(made, inputs=TEXTS, tasks=names, parameters={})
                    for made in (table, replace(there, model=remote))
                ]
                (here, usage), (found, same) = [await one for one in asked]
                assert found == here
                assert (same.tokens, same.inputs) == (usage.tokens, usage.inputs)
            failing = replace(there, model=remote)
            with pytest.raises(InputError, match="task 'short'"):
                await answer_tasks(failing, inputs=[f"{TEXTS[0]} " * 2], tasks=["brief"], parameters={})

    run(main())


def test_heads_that_come_and_leave_go_with_the_chains(folders: tuple[str, str], tmp_path: Path, assets: Path) -> None:
    """A head that replaces one must have what chains want of it; then both steps are of the heads in force."""
    newer = {"names": ENCODER["names"], "topic": ("classification", {"labels": ["up", "down"], "max_length": 48})}
    sealed(tmp_path / "newer", "bert", tasks=newer)
    fewer = {"names": ("token_classification", {"labels": ["a", "b"], "max_length": 48}), "topic": newer["topic"]}
    sealed(tmp_path / "fewer", "bert", tasks=fewer)
    for which, task in (("newer", "topic"), ("fewer", "names")):
        pack_head(Checkpoint.open(tmp_path / which), task, tmp_path / f"{which}.head")
    with running(Path(folders[0]), assets) as server:
        before = server.root.table()
        for refused, why in (
            (server.delete("topic"), "'topic' is in a chain: chain 'opinions': no task 'topic'"),
            (server.put("names", tmp_path / "fewer.head", replace="true"), "chain 'brief': 'names' has no label 'c'"),
            (server.put("names", tmp_path / "newer.head", replace="true"), "first 'names' is a classification"),
            (server.put("opinions", tmp_path / "newer.head"), "'opinions' is the name of a chain and of a task"),
        ):
            assert refused.status_code == 409
            assert why in refused.json()["error"]["message"]
        assert server.root.table() is before
        assert len(server.heads) == len(ENCODER)
        assert server.put("topic", tmp_path / "newer.head", replace="true").status_code == 200
        answer = ask(server.client, "opinions")["outputs"]["opinions"]
        assert {one["label"] for some in answer for span in some for one in span["then"]} == {"up", "down"}
        assert ok(server.client.get("/openapi.json"))["components"]["schemas"]["opinions.LabelScore"]["properties"][
            "label"
        ]["enum"] == ["up", "down"]


def test_a_folder_of_heads_that_leaves_a_chain_without_its_task_is_refused(tmp_path: Path, assets: Path) -> None:
    checkpoint = sealed(tmp_path / "bert", "bert", tasks=ENCODER)
    with running(checkpoint.folder, assets, heads=tmp_path / "heads") as server:
        ok(server.delete("topic"))
    surgery.add_chain(checkpoint, CHAINS[0])
    with pytest.raises(ConfigError, match=r"MTSERVE_HEADS: .* chain 'opinions': no task 'topic'"):
        load_served(Settings(model=(str(checkpoint.folder),), heads=tmp_path / "heads"))


def test_both_steps_have_one_deadline(table: TaskTable) -> None:
    """What the first one took is not there for the second; what may not be kept of one may not of the other."""

    class Slow:
        left: list[float] = []  # noqa: RUF012
        private: list[bool] = []  # noqa: RUF012

        async def predict(self, asked: Any, items: Any, *, timeout_s: float, private: bool) -> tuple[Any, Usage]:
            self.left.append(timeout_s)
            self.private.append(private)
            await asyncio.sleep(0.2)
            return await table.model.predict(asked, items, timeout_s=timeout_s)

    async def main(limit: float) -> Any:
        opened("").private = True
        limits = table.settings.model_copy(update={"timeout_s": limit})
        made = replace(table, settings=limits, model=Slow())  # type: ignore[arg-type]
        return await answer_tasks(made, inputs=TEXTS, tasks=["opinions"], parameters={})

    asyncio.run(main(30.0))
    assert Slow.left[0] <= 30.0
    assert Slow.left[1] <= Slow.left[0] - 0.2
    assert Slow.private == [True, True]
    began = time.monotonic()
    with pytest.raises(DeadlineError):
        asyncio.run(main(0.1))
    assert time.monotonic() - began < 5


def test_the_tasks_of_a_chain_are_what_is_counted(table: TaskTable) -> None:
    async def main() -> None:
        now = opened("")
        await answer_tasks(table, inputs=TEXTS, tasks=["opinions", "names"], parameters={})
        assert now.tasks == ("names", "topic")
        assert now.usage["trunk_passes"] == 2

    asyncio.run(main())
