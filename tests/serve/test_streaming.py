"""Answers that are read along: their events, their errors, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from mtserve.scheduler import Scheduler
from mtserve.serve.app import make_app
from mtserve.serve.loading import load
from mtserve.serve.table import Root, TaskTable
from mtserve.settings import Settings
from tests.serve.conftest import sealed
from tests.serve.test_routes import error, ok

LONG = {"template": "{source} [SEP]{target}", "max_new_tokens": 80, "max_length": 96, "on_long": "error"}
ENDLESS = {"min_new_tokens": 80}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, checked in form."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.endswith("\n\n")
    lines = response.text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_the_events_of_a_stream_make_the_whole_answer(client: TestClient) -> None:
    for name in ("forth", "back"):
        for text in ("good", "a tin of soup"):
            body = {"inputs": text, "parameters": {"min_new_tokens": 3}}
            [whole] = ok(client, f"/tasks/{name}", body)
            told = events(client.post(f"/tasks/{name}", json={**body, "stream": True}))
            assert len(told) >= 3
            assert [event["index"] for event in told] == list(range(1, len(told) + 1))
            assert "".join(event["token"]["text"] for event in told) == whole["generated_text"]
            assert all(event["token"]["logprob"] <= 0 for event in told)
            assert [event["generated_text"] for event in told] == [None] * (len(told) - 1) + [whole["generated_text"]]
            assert [event["details"] for event in told[:-1]] == [None] * (len(told) - 1)
            details = told[-1]["details"]
            assert (details["finish_reason"], details["generated_tokens"]) == (whole["finish_reason"], len(told))


def test_a_stream_that_is_none_is_an_ordinary_answer(client: TestClient) -> None:
    whole = ok(client, "/tasks/forth", {"inputs": "good"})
    for no in (False, None):
        assert ok(client, "/tasks/forth", {"inputs": "good", "stream": no}) == whole
        assert ok(client, "/tasks/forth", {"inputs": ["good"], "stream": no}) == [whole]


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        ("forth", {"stream": "yes"}, "stream", "true or false"),
        ("forth", {"stream": 1}, "stream", "true or false"),
        ("forth", {"stream": True, "inputs": ["good"]}, "inputs", "one input"),
        ("forth", {"stream": True, "inputs": []}, "inputs", "one input"),
        ("forth", {"stream": True, "inputs": 3}, None, "found a number"),
        ("forth", {"stream": True, "inputs": {"txt": "good"}}, "text", "required"),
        ("forth", {"stream": True, "parameters": {"num_beams": 2}}, "stream", "beams"),
        (
            "forth",
            {"stream": True, "parameters": {"do_sample": True, "num_return_sequences": 2}},
            "stream",
            "several sequences",
        ),
        ("forth", {"stream": True, "parameters": {"max_new_tokens": 6}}, "parameters.max_new_tokens", "limit of 5"),
        ("topic", {"stream": True}, "stream", "classification"),
        ("cosine", {"stream": True, "inputs": {"source_sentence": "a", "sentences": ["b"]}}, "inputs", "one input"),
    ],
)
def test_422_streams_that_cannot_be(
    client: TestClient, table: TaskTable, path: str, body: dict[str, Any], field: str | None, said: str
) -> None:
    passes = table.model.queues[path].engine.counters.trunk_passes
    found = error(client.post(f"/tasks/{path}", json={"inputs": "good", **body}), 422, "invalid_input")
    assert field in {problem.get("field") for problem in found["problems"]}
    assert said in found["message"]
    assert table.model.queues[path].engine.counters.trunk_passes == passes


def test_422_predict_has_no_stream(client: TestClient) -> None:
    body = {"inputs": "good", "tasks": ["forth"], "stream": True}
    found = error(client.post("/predict", json=body), 422, "invalid_input")
    assert [problem["field"] for problem in found["problems"]] == ["stream"]


def test_errors_before_the_first_event_have_their_status(
    client: TestClient, table: TaskTable, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error(client.post("/tasks/nothing", json={"inputs": "good", "stream": True}), 404, "unknown_task")
    hurried = replace(table, settings=table.settings.model_copy(update={"timeout_s": 1e-6}))
    late = TestClient(make_app(Root(hurried), assets=assets))
    error(late.post("/tasks/forth", json={"inputs": "good", "stream": True}), 504, "deadline_exceeded")
    trunk = table.model.queues["forth"]
    with trunk.scheduler._changed:
        trunk.scheduler._waiting.tokens += 600
    try:
        error(client.post("/tasks/forth", json={"inputs": "good", "stream": True}), 429, "overloaded")
    finally:
        with trunk.scheduler._changed:
            trunk.scheduler._waiting.tokens -= 600

    def fails(works: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(trunk.engine, "step", fails)
    response = client.post("/tasks/forth", json={"inputs": "good", "stream": True})
    assert "secret" not in error(response, 500, "internal")["message"]


def test_an_error_in_mid_stream_is_the_last_event(
    client: TestClient, table: TaskTable, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, body = table.model.queues["forth"], {"inputs": "good", "parameters": {"min_new_tokens": 5}, "stream": True}
    step, held = trunk.engine.step, threading.Event()
    steps: list[int] = []

    def stumbles(works: Any) -> Any:
        steps.append(len(works))
        if len(steps) > 1:
            raise ZeroDivisionError("secret")
        return step(works)

    monkeypatch.setattr(trunk.engine, "step", stumbles)
    first, last = events(client.post("/tasks/forth", json=body))
    assert first["index"] == 1
    assert last["error"]["code"] == "internal"
    assert last["error"]["request_id"]
    assert "secret" not in json.dumps(last)

    def waits(works: Any) -> Any:
        assert len(steps) < 1 or held.wait(30)
        return stumbles(works)

    steps.clear()
    monkeypatch.setattr(trunk.engine, "step", waits)
    hurried = replace(table, settings=table.settings.model_copy(update={"timeout_s": 0.5}))
    told = events(TestClient(make_app(Root(hurried), assets=assets)).post("/tasks/forth", json=body))
    held.set()
    assert [event.get("index") for event in told] == [1, None]
    assert told[-1]["error"]["code"] == "deadline_exceeded"


# over a socket


@dataclass
class Served:
    """A server in a thread. `steps` are the sizes of its engine's steps; beyond `limit` of them the engine waits."""

    table: TaskTable
    url: str = ""
    steps: list[int] = field(default_factory=list)
    limit: int = sys.maxsize

    def __post_init__(self) -> None:
        engine = self.table.model.queues["long"].engine
        step = engine.step

        def counted(works: Any) -> Any:
            until(lambda: len(self.steps) < self.limit)
            self.steps.append(len(works))
            return step(works)

        engine.step = counted  # type: ignore[method-assign]

    @property
    def scheduler(self) -> Scheduler:
        return self.table.model.queues["long"].scheduler


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


both = pytest.mark.parametrize("served", ["routes", "bentoml"], indirect=True)


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The app alone, or in BentoML with all of its middleware."""
    home = tmp_path_factory.mktemp("long")
    labels = {"labels": ["good", "bad"], "max_length": 48}
    sealed(home / "c", "gpt2", tasks={"long": ("generation", LONG), "topic": ("classification", labels)})
    living = load(Settings(model=(str(home / "c"),)))
    table = living.table
    made = Served(table)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
        app = make_app(Root(table), assets=home)
        if getattr(request, "param", None) == "bentoml":
            warnings.simplefilter("ignore")  # of BentoML's imports
            from mtserve.serve import service

            patched.setattr(service, "load", lambda settings, **_: living)
            app = service.make_service().to_asgi()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            made.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            until(lambda: server.started)
            yield made
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()
    table.model.close()


@both
def test_a_client_that_leaves_stops_its_generation(served: Served) -> None:
    body = {"inputs": "good", "parameters": ENDLESS, "stream": True}
    served.steps.clear()
    assert len(events(httpx.post(served.url + "/tasks/long", json=body))) == len(served.steps) == 80
    served.steps.clear()
    served.limit = 5
    with httpx.stream("POST", served.url + "/tasks/long", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        assert [json.loads(next(lines).removeprefix("data: "))["index"] for _ in range(2)] == [1, 2]
        assert served.scheduler._open  # had anything on the way collected the events, these two would not be here yet
    until(lambda: not served.scheduler._open)
    served.limit = sys.maxsize
    assert httpx.post(served.url + "/tasks/topic", json={"inputs": "good"}).status_code == 200
    assert len(served.steps) <= 5 + 1 + 1  # with the step under way, and the classification
    assert len(events(httpx.post(served.url + "/tasks/long", json=body))) == 80


def test_a_classification_is_answered_after_the_step_under_way(served: Served) -> None:
    async def check() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            body = {"inputs": "good", "parameters": ENDLESS, "stream": True}
            long = [asyncio.ensure_future(client.post("/tasks/long", json=body)) for _ in range(8)]
            await asyncio.to_thread(until, lambda: len(served.scheduler._open) == 8)
            for limit in range(1, 40):
                served.limit = limit
                await asyncio.to_thread(until, lambda limit=limit: len(served.steps) == limit)
                await asyncio.sleep(0.01)
            assert served.steps[-1] == 8
            asked = asyncio.ensure_future(client.post("/tasks/topic", json={"inputs": "good"}))
            await asyncio.to_thread(until, lambda: served.scheduler._waiting.tokens)
            served.limit = sys.maxsize
            assert (await asked).status_code == 200
            assert served.steps[39:42] == [8, 1, 8]
            assert {len(events(response)) for response in await asyncio.gather(*long)} == {80}

    served.steps.clear()
    served.limit = 0
    asyncio.run(check())


@both
def test_huggingface_clients_read_a_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import InferenceClient, constants
    from huggingface_hub.errors import HfHubHTTPError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # offline, it refuses the loopback too
    client = InferenceClient(model=served.url + "/tasks/long")
    whole = client.text_generation("good", max_new_tokens=6)
    assert isinstance(whole, str)
    assert "".join(client.text_generation("good", max_new_tokens=6, stream=True)) == whole
    told = list(client.text_generation("good", max_new_tokens=6, stream=True, details=True))
    assert [event.index for event in told] == list(range(1, len(told) + 1))
    assert "".join(event.token.text for event in told) == told[-1].generated_text == whole
    assert told[-1].details is not None
    assert told[-1].details.generated_tokens == len(told)
    assert client.text_generation("good", max_new_tokens=6, details=True).generated_text == whole
    sampled = [client.text_generation("good", max_new_tokens=6, do_sample=True, temperature=0.7, seed=3)] * 2
    assert sampled[0] == sampled[1]
    stopped = client.text_generation("good", max_new_tokens=6, stop=[whole[1:3]])
    assert stopped == whole[: whole.index(whole[1:3])]
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": 81}, {"top_k": 3}):
        with pytest.raises(HfHubHTTPError, match=next(iter(wrong))):
            list(client.text_generation("good", stream=True, **wrong))


# bad input


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"parameters": {"max_tokens": 3}}, "parameters.max_tokens", "not"),
        ({"parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens", "greater than or equal to 1"),
        ({"parameters": {"max_new_tokens": -5}}, "parameters.max_new_tokens", "greater than or equal to 1"),
        ({"parameters": {"max_new_tokens": 81}}, "parameters.max_new_tokens", "limit of 80"),
        ({"parameters": {"max_new_tokens": 10**30}}, "parameters.max_new_tokens", "limit of 80"),
        ({"parameters": {"max_new_tokens": 1.5}}, "parameters.max_new_tokens", "integer"),
        ({"parameters": {"num_beams": 17}}, "parameters.num_beams", "16"),
        (
            {"parameters": {"temperature": 0, "do_sample": True}},
            "parameters.temperature",
            "greater than or equal to 0.01",
        ),
        ({"parameters": {"temperature": 0.5}}, "parameters.temperature", "do_sample"),
        ({"parameters": {"stop_strings": [""]}}, "parameters.stop_strings", "1 character"),
        ({"inputs": "good " * 40}, None, "too long"),
        ({"inputs": ""}, "text", "no tokens"),
        ({"inputs": "  "}, "text", "no tokens"),
        ({"inputs": ["good", ["bad"]]}, None, "found a list"),
        ({"stream": "yes"}, "stream", "true or false"),
    ],
)
def test_422_bad_requests_of_a_generation(served: Served, body: dict[str, Any], field: str | None, said: str) -> None:
    before = len(served.steps)
    for stream in ({}, {"stream": True}):
        response = httpx.post(served.url + "/tasks/long", json={"inputs": "good", **stream, **body})
        found = error(response, 422, "invalid_input")
        if not (stream and isinstance(body.get("inputs"), list)):
            assert any((problem.get("field") or "").startswith(field or "") for problem in found["problems"])
            assert said in found["message"]
    assert len(served.steps) == before


def test_nulls_count_as_not_given(served: Served) -> None:
    plain = httpx.post(served.url + "/tasks/long", json={"inputs": "good"}).json()
    nulls = {"max_new_tokens": None, "temperature": None, "stop_strings": None}
    body = {"inputs": "good", "parameters": nulls, "stream": None}
    assert httpx.post(served.url + "/tasks/long", json=body).json() == plain


def test_special_tokens_in_a_text_stay_text(served: Served) -> None:
    answers = [httpx.post(served.url + "/tasks/long", json={"inputs": text}) for text in ("good", "good [EOS]")]
    tokens = [int(answer.headers["x-tokens"]) for answer in answers]
    assert tokens[1] > tokens[0] + 1
