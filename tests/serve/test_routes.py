"""Every route and every error of the app, in process."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mtserve.backends.machine import usable_cores
from mtserve.errors import CapacityError, CheckpointError, ConfigError, SetupError
from mtserve.serve.app import make_app
from mtserve.serve.loading import check_settings, load_table, open_checkpoints
from mtserve.serve.table import Root, ServedTask, TaskTable
from mtserve.settings import Settings
from mtserve.waiting import Rate
from tests.serve.conftest import sealed
from tests.tiny import GENERATION, OPTIONS

TEXT = "the parcel arrived two days late"
PAIR = {"text": "a man is feeding his dog", "text_pair": "someone gives food to a pet"}
CHOICE = {"question": "what do you open ?", "choices": ["an umbrella", "a book"]}


def ok(client: TestClient, path: str, body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def error(response: Any, status: int, code: str) -> dict[str, Any]:
    """The error of a response, checked in form."""
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found["code"] == code
    assert found["message"]
    assert response.headers["x-error-message"]
    assert "Traceback" not in response.text
    return found


# answers


def test_classification_answers_lists_of_lists(client: TestClient) -> None:
    one = ok(client, "/tasks/topic", {"inputs": TEXT})
    assert [len(one), len(one[0])] == [1, 3]
    assert set(one[0][0]) == {"label", "score"}
    both = ok(client, "/tasks/topic", {"inputs": [TEXT, {"text": TEXT, "text_pair": "good"}]})
    assert [len(each) for each in both] == [3, 3]
    assert [label["label"] for label in both[0]] == [label["label"] for label in one[0]]
    assert [label["score"] for label in both[0]] == pytest.approx([label["score"] for label in one[0]], abs=1e-6)
    best = ok(client, "/tasks/topic", {"inputs": TEXT, "parameters": {"top_k": 1}})
    assert best == [one[0][:1]]


def test_similarity_answers_in_each_shape(client: TestClient) -> None:
    for name in ("score", "cosine"):
        one = ok(client, f"/tasks/{name}", {"inputs": PAIR})
        assert set(one) == {"score"}
        assert ok(client, f"/tasks/{name}", {"inputs": [PAIR, PAIR]}) == [one, one]
        asked = {"source_sentence": PAIR["text"], "sentences": [PAIR["text_pair"], "good"]}
        scores = ok(client, f"/tasks/{name}", {"inputs": asked})
        assert scores[0] == pytest.approx(one["score"], abs=1e-5)
        assert len(scores) == 2


def test_multiple_choice_answers_best_first(client: TestClient) -> None:
    one = ok(client, "/tasks/choice", {"inputs": CHOICE})
    assert {entry["choice"] for entry in one} == set(CHOICE["choices"])
    assert one[0]["score"] >= one[1]["score"]
    assert ok(client, "/tasks/choice", {"inputs": [CHOICE]}) == [one]


def test_token_classification_answers_spans_of_the_callers_text(client: TestClient) -> None:
    spans = ok(client, "/tasks/names", {"inputs": TEXT})
    assert all(TEXT[span["start"] : span["end"]] == span["word"] for span in spans)
    assert ok(client, "/tasks/names", {"inputs": [TEXT]}) == [spans]
    ok(client, "/tasks/names", {"inputs": {"words": TEXT.split()}, "parameters": {"aggregation_strategy": "simple"}})


def test_generation_answers_text(client: TestClient) -> None:
    one = ok(client, "/tasks/forth", {"inputs": "good"})
    assert set(one[0]) == {"generated_text", "translation_text", "finish_reason"}
    assert ok(client, "/tasks/forth", {"inputs": ["good", "good"]}) == [one, one]


def test_an_empty_list_has_an_empty_answer(client: TestClient) -> None:
    assert ok(client, "/tasks/topic", {"inputs": []}) == []


def test_usage_is_in_headers(client: TestClient) -> None:
    response = client.post("/tasks/topic", json={"inputs": ["good", "good " * 100]})
    counts = {name: response.headers[f"x-{name}"] for name in ("inputs", "tokens", "truncated", "trunk-passes")}
    assert counts == {"inputs": "2", "tokens": str(3 + 48), "truncated": "1", "trunk-passes": "1"}
    assert float(response.headers["x-total-time-ms"]) > 0


def test_predict_encodes_equal_rows_once(client: TestClient, table: TaskTable) -> None:
    engine = table.model.queues["topic"].engine
    before = engine.counters.rows
    answer = ok(client, "/predict", {"inputs": [TEXT, "good"], "tasks": ["topic", "tags", "names"]})
    assert engine.counters.rows == before + 2
    assert answer["usage"]["trunk_passes"] == 1
    assert answer["usage"]["tokens"] == 3 * (8 + 3)
    assert list(answer["outputs"]) == ["topic", "tags", "names"]
    for name, outputs in answer["outputs"].items():
        assert outputs == ok(client, f"/tasks/{name}", {"inputs": [TEXT, "good"]})


def test_predict_spans_trunks_and_passes_parameters(client: TestClient) -> None:
    body = {
        "inputs": TEXT,
        "tasks": ["forth", "topic"],
        "parameters": {"topic": {"top_k": 1}, "forth": {"max_new_tokens": 1}},
    }
    answer = ok(client, "/predict", body)
    assert [len(answer["outputs"]["forth"]), len(answer["outputs"]["topic"])] == [1, 1]
    assert len(answer["outputs"]["topic"][0]) == 1
    assert answer["usage"]["trunk_passes"] == 2


def test_the_listing_names_every_task(client: TestClient) -> None:
    listing = client.get("/tasks").json()
    assert [task["name"] for task in listing["tasks"]] == [*OPTIONS, *GENERATION]
    for task in listing["tasks"]:
        ok(client, task["url"], task["example"])
        assert task["golden"]["reproduced"] is True
        assert task["metrics"] == {"metric": 0.5}
        assert (task["profile"], task["device"], task["padding_free"]) == ("fp32", "cpu", True)
        assert 1 <= task["threads"] <= usable_cores()
    assert listing["tasks"][0]["labels"] == ["good", "bad", "fine"]


def test_health_docs_and_assets(client: TestClient) -> None:
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
    assert client.get("/").headers["location"] == "docs"
    page = client.get("/docs").text
    assert "http" not in page.replace("<!DOCTYPE html>", "")
    for asset in ("docs/assets/swagger-ui-bundle.js",):
        assert asset in page
        assert client.get(f"/{asset}").status_code == 200


# errors


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"inputs": NaN}', "NaN"),
        (b'{"inputs": -Infinity}', "Infinity"),
        (b'{"inputs": 1e999}', "beyond the range"),
        (b'{"inputs": "\xff"}', "UTF-8"),
        (b'{"inputs": ' + b"[" * 9000 + b"]" * 9000 + b"}", "nested"),
        (b'{"inputs": ' + b"1" * 9000 + b"}", "not JSON"),
    ],
)
def test_400_what_is_no_json_object(client: TestClient, body: bytes, said: str) -> None:
    for path in ("/tasks/topic", "/predict"):
        assert said in error(client.post(path, content=body), 400, "bad_request")["message"]


def test_404_unknown_task_and_route(client: TestClient) -> None:
    assert "topic" in error(client.post("/tasks/nothing", json={"inputs": "x"}), 404, "unknown_task")["tasks"]
    error(client.post("/predict", json={"inputs": "x", "tasks": ["topic", "nothing"]}), 404, "unknown_task")
    for path in ("/nothing", "/tasks/topic/more", "/docs/assets/nothing.js", "/docs/assets/../app.py"):
        error(client.get(path), 404, "not_found")


def test_405_names_the_methods(client: TestClient) -> None:
    for method, path, allowed in [
        ("GET", "/tasks/topic", "POST"),
        ("PUT", "/predict", "POST"),
        ("POST", "/tasks", "GET"),
    ]:
        response = client.request(method, path)
        error(response, 405, "method_not_allowed")
        assert allowed in response.headers["allow"]


def test_413_bodies_lists_and_texts(client: TestClient) -> None:
    huge = json.dumps({"inputs": "x" * 30_000}).encode()
    error(client.post("/tasks/topic", content=huge), 413, "too_large")
    chunks = (huge[at : at + 1000] for at in range(0, len(huge), 1000))
    error(client.post("/tasks/topic", content=chunks), 413, "too_large")  # without a content-length
    assert "at most 20" in error(client.post("/tasks/topic", json={"inputs": ["x"] * 21}), 413, "too_large")["message"]
    assert "5001" in error(client.post("/tasks/topic", json={"inputs": "x" * 5001}), 413, "too_large")["message"]
    many = client.post("/tasks/topic", json={"inputs": [f"{at} " * 46 for at in range(20)]})
    assert "at most 600" in error(many, 413, "too_large")["message"]


def test_422_names_every_bad_input_and_runs_nothing(client: TestClient, table: TaskTable) -> None:
    passes = table.model.queues["topic"].engine.counters.trunk_passes
    found = error(client.post("/tasks/topic", json={"inputs": ["good", 3, {"txt": "x"}]}), 422, "invalid_input")
    assert {problem["index"] for problem in found["problems"]} == {1, 2}
    assert {problem.get("field") for problem in found["problems"]} == {None, "text", "txt"}
    assert table.model.queues["topic"].engine.counters.trunk_passes == passes


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tasks/topic", {}, "inputs"),
        ("/tasks/topic", {"inputs": "x", "options": {}}, "options"),
        ("/tasks/topic", {"inputs": "x", "parameters": []}, "parameters"),
        ("/tasks/topic", {"inputs": "x", "parameters": {"top_k": 0}}, "parameters.top_k"),
        ("/tasks/topic", {"inputs": "x", "parameters": {"nothing": 0}}, "parameters.nothing"),
        ("/predict", {"inputs": "x"}, "tasks"),
        ("/predict", {"inputs": "x", "tasks": "topic"}, "tasks"),
        ("/predict", {"inputs": "x", "tasks": []}, "tasks"),
        ("/predict", {"inputs": "x", "tasks": ["topic", "topic"]}, "tasks"),
        ("/predict", {"inputs": "x", "tasks": ["topic"], "parameters": {"tags": {}}}, "parameters.tags"),
        ("/predict", {"inputs": "x", "tasks": ["topic"], "parameters": {"topic": 1}}, "parameters.topic"),
        ("/predict", {"inputs": "x", "tasks": ["topic"], "parameters": {"topic": {"top_k": 0}}}, "parameters.top_k"),
    ],
)
def test_422_names_the_field(client: TestClient, path: str, body: Any, field: str) -> None:
    found = error(client.post(path, json=body), 422, "invalid_input")
    assert [problem["field"] for problem in found["problems"]] == [field]


def test_422_of_several_tasks_names_each(client: TestClient) -> None:
    found = error(client.post("/predict", json={"inputs": ["x", 1], "tasks": ["topic", "score"]}), 422, "invalid_input")
    said = [(problem["index"], problem["message"].split(":")[0]) for problem in found["problems"]]
    assert said == [(1, "task 'topic'"), (0, "task 'score'"), (1, "task 'score'")]


def test_422_half_a_surrogate_pair(client: TestClient) -> None:
    error(client.post("/tasks/topic", content=b'{"inputs": "\\ud83d"}'), 422, "invalid_input")
    ok(client, "/tasks/topic", {"inputs": "\U0001f600"})


def test_messages_are_safe_in_headers(client: TestClient) -> None:
    response = client.post("/tasks/topic", json={"inputs": "x", "\r\nSet-Cookie: a=b \u2603": 1})
    error(response, 422, "invalid_input")
    assert "set-cookie" not in response.headers
    assert "\u2603" in response.json()["error"]["message"]


def other(table: TaskTable, assets: Path, **changed: Any) -> TestClient:
    """A client of an app whose table has tasks with other fields."""
    tasks = {name: replace(task, **changed) for name, task in table.tasks.items()}
    return TestClient(make_app(Root(replace(table, tasks=tasks)), assets=assets))


def failing(table: TaskTable, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make the trunk of `topic` fail every request with one exception."""

    async def prepare(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(table.model.queues["topic"].scheduler, "prepare", prepare)


@contextmanager
def full(table: TaskTable, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if 600 tokens waited for a busy engine, which does 100 a second."""
    scheduler, rate = table.model.queues["topic"].scheduler, Rate()
    rate.add(tokens=100, seconds=1)
    monkeypatch.setattr(scheduler, "_rate", rate)
    with scheduler._changed:
        scheduler._waiting.tokens += 600
    try:
        yield
    finally:
        with scheduler._changed:
            scheduler._waiting.tokens -= 600


@pytest.mark.parametrize(
    ("path", "body"), [("/tasks/topic", {"inputs": "x"}), ("/predict", {"inputs": "x", "tasks": ["topic"]})]
)
def test_429_says_when_to_come_back(
    client: TestClient, table: TaskTable, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    with full(table, monkeypatch):
        response = client.post(path, json=body)
    error(response, 429, "overloaded")
    assert response.headers["retry-after"] == "6"


def test_a_full_queue_refuses_before_the_body_is_read(
    table: TaskTable, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    scope = {"type": "http", "method": "POST", "path": "/tasks/topic", "headers": [], "query_string": b""}

    async def receive() -> Any:
        raise AssertionError("somebody reads")

    async def send(message: Any) -> None:
        sent.append(message)

    with full(table, monkeypatch):
        asyncio.run(make_app(Root(table), assets=assets)(scope, receive, send))
    assert sent[0]["status"] == 429


def test_a_client_that_goes_away_cancels_its_request(
    table: TaskTable, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight on the ASGI interface: the client is gone once its body is read, while the engine is held up."""
    trunk = table.model.queues["forth"]
    held, step = threading.Event(), trunk.engine.step
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": b'{"inputs": "good"}'}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": "/tasks/forth", "headers": [], "query_string": b""}

    def held_step(works: Any) -> Any:
        assert held.wait(30)
        return step(works)

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setattr(trunk.engine, "step", held_step)
    before = trunk.engine.counters.trunk_passes
    asyncio.run(make_app(Root(table), assets=assets)(scope, receive, send))
    assert sent[0]["status"] == 499
    assert not trunk.scheduler._waiting
    held.set()
    last = trunk.engine.prepare_all("forth", ["bad"], {"max_new_tokens": 1})
    asyncio.run(trunk.scheduler.submit(last))  # one pass; what was cancelled had at most the one that it was in
    assert trunk.engine.counters.trunk_passes <= before + 2


def test_503_before_the_model_is_loaded(assets: Path) -> None:
    client = TestClient(make_app(Root(), assets=assets))
    for method, path in [("POST", "/tasks/topic"), ("POST", "/predict"), ("GET", "/readyz"), ("GET", "/openapi.json")]:
        assert "not loaded" in error(client.request(method, path, json={}), 503, "unavailable")["message"]
    assert client.get("/livez").status_code == 200


def test_503_when_closing(client: TestClient, table: TaskTable, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(table, monkeypatch, CapacityError("the server is closing"))
    error(client.post("/tasks/topic", json={"inputs": "x"}), 503, "unavailable")


def test_504_when_it_takes_too_long(table: TaskTable, assets: Path) -> None:
    hurried = replace(table, settings=table.settings.model_copy(update={"timeout_s": 1e-6}))
    client = TestClient(make_app(Root(hurried), assets=assets))
    error(client.post("/tasks/topic", json={"inputs": "x"}), 504, "deadline_exceeded")


@pytest.mark.parametrize("raised", [ZeroDivisionError("secret"), CheckpointError("secret path")])
def test_500_tells_an_identifier_and_nothing_else(
    client: TestClient,
    table: TaskTable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    raised: Exception,
) -> None:
    failing(table, monkeypatch, raised)
    with caplog.at_level(logging.ERROR):
        response = client.post("/tasks/topic", json={"inputs": "x"})
    found = error(response, 500, "internal")
    assert "secret" not in response.text
    assert found["request_id"] in caplog.text
    assert "secret" in caplog.text


# start


def test_a_table_without_golden_rows_is_ready_and_says_so(tmp_path: Path) -> None:
    sealed(tmp_path / "c", "bert", only=("topic",), golden=False)
    table = load_table(Settings(model=(str(tmp_path / "c"),)))
    try:
        assert table.listing()["tasks"][0]["golden"]["checked"] is False
    finally:
        table.model.close()


def test_a_checkpoint_that_answers_otherwise_is_not_served(tmp_path: Path) -> None:
    sealed(tmp_path / "c", "bert", only=("topic", "choice"), wrong="topic")
    with pytest.raises(CheckpointError, match=r"task 'topic': the logits of the golden rows differ by .* fp32 allows"):
        load_table(Settings(model=(str(tmp_path / "c"),)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_batch_tokens": 20}, r"MTSERVE_MAX_BATCH_TOKENS: 20 is too little, as rows of task '\w+' may have \d+"),
        ({"max_queue_tokens": 20}, "MTSERVE_MAX_QUEUE_TOKENS: 20 is too little"),
        ({"weights": {"nothing": 2.0}}, "MTSERVE_WEIGHTS: no task 'nothing'; tasks: "),
        ({"api_keys": ("short",)}, "MTSERVE_API_KEYS: key 1 has 5 characters; at least 16 are needed"),
    ],
)
def test_settings_that_do_not_go_with_the_tasks(checkpoints: tuple[str, str], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_settings(Settings(model=checkpoints, **given))


def damaged(folder: Path, change: Callable[[dict[str, Any]], None]) -> Settings:
    """A checkpoint whose manifest was changed."""
    sealed(folder, "bert", only=("topic", "choice"))
    manifest = json.loads((folder / "mtserve.json").read_text())
    change(manifest)
    (folder / "mtserve.json").write_text(json.dumps(manifest))
    return Settings(model=(str(folder),))


def test_what_does_not_belong_together_is_not_served(tmp_path: Path) -> None:
    """Another tokenizer, trunk, number of labels or pad token than the heads were trained with."""

    def labels(manifest: dict[str, Any]) -> None:
        manifest["tasks"][0]["options"]["labels"] = ["good", "bad"]

    def pad(manifest: dict[str, Any]) -> None:
        manifest["text"]["pad_id"] = 10**6

    with pytest.raises(CheckpointError, match="task 'topic'"):
        load_table(damaged(tmp_path / "labels", labels))
    with pytest.raises(CheckpointError, match="pad"):
        load_table(damaged(tmp_path / "pad", pad))
    settings = damaged(tmp_path / "tokenizer", lambda manifest: None)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"good"', b'"doog"'))  # the same size
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the file that was sealed"):
        load_table(settings)
    trunk = damaged(tmp_path / "trunk", lambda manifest: None)
    sealed(tmp_path / "other", "bert", only=("topic",))
    weights = next((tmp_path / "trunk" / "trunk").glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-400:] = bytes(400)  # a tensor's end
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"golden rows differ|fingerprint"):
        load_table(trunk)


def test_checkpoints_that_cannot_be_served(tmp_path: Path, checkpoints: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="MTSERVE_MODEL"):
        open_checkpoints([])
    with pytest.raises(SetupError, match="task 'topic' is in"):
        open_checkpoints([checkpoints[0], checkpoints[0]])
    with pytest.raises(CheckpointError, match=r"no mtserve\.json"):
        open_checkpoints([str(tmp_path)])


def test_a_table_refuses_clashing_names(table: TaskTable) -> None:
    task: ServedTask = table.task("topic")
    with pytest.raises(SetupError, match="distinct"):
        TaskTable.of([task, task], table.settings, table.model)
