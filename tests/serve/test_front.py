"""What every request passes: ids, keys, draining, log, metrics and spans."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from mtserve.errors import ConfigError, UnauthorizedError
from mtserve.serve.access import PAUSE_S, Lines
from mtserve.serve.app import make_app
from mtserve.serve.draining import Drain
from mtserve.serve.exchange import Exchange
from mtserve.serve.front import Front
from mtserve.serve.keys import Keys
from mtserve.serve.model import LocalModel
from mtserve.serve.table import Root, TaskTable
from mtserve.settings import Settings, read_settings
from tests.serve.test_routes import error, ok

KEY, OTHER = "a-key-of-the-tests", "another-key-of-the-tests"


def fronted(table: TaskTable, assets: Path, ended: Any = None, **given: Any) -> tuple[TestClient, Root]:
    """A client of the routes behind the front, with other settings."""
    changed = table.settings.model_copy(update=given)
    root = Root(replace(table, settings=changed, keys=Keys.of(changed)))
    return TestClient(Front(make_app(root, assets=assets), root=root, ended=ended), follow_redirects=False), root


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """Lines of the access log so far."""
    with caplog.at_level(logging.INFO, logger="mtserve.access"):
        yield lambda: [json.loads(r.getMessage()) for r in caplog.records if r.name == "mtserve.access"]


def test_each_answer_has_an_id_and_errors_name_it(table: TaskTable, assets: Path) -> None:
    client, _ = fronted(table, assets)
    made = {client.get("/tasks").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    sent = client.post("/tasks/nothing", json={"inputs": "x"}, headers={"X-Request-Id": "from:me-1"})
    assert sent.headers["x-request-id"] == "from:me-1"
    assert error(sent, 404, "unknown_task")["request_id"] == "from:me-1"
    for strange in ("a b", "x" * 65, 'a"b', "\u00e9"):
        headers = {"X-Request-Id": strange.encode("latin-1")}
        assert client.get("/tasks", headers=headers).headers["x-request-id"] not in ("", strange)


@pytest.mark.parametrize("digest", [False, True])
def test_keys_open_every_route_but_the_probes(table: TaskTable, assets: Path, tmp_path: Path, digest: bool) -> None:
    inside = f"sha256:{hashlib.sha256(OTHER.encode()).hexdigest()}" if digest else OTHER
    (tmp_path / "keys").write_text(f"# of the tests\n\n{inside}\n")
    client, _ = fronted(table, assets, api_keys=(SecretStr(KEY),), api_keys_file=tmp_path / "keys")
    routes = [("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/tasks"), ("POST", "/tasks/topic")]
    routes += [("POST", "/predict"), ("GET", "/nothing"), ("GET", "/metrics"), ("GET", "/docs/assets/x.js")]
    for method, path in routes:
        for headers in ({}, {"X-API-Key": KEY + "x"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer"}):
            refused = client.request(method, path, headers=headers)
            assert KEY not in error(refused, 401, "unauthorized")["message"]
            assert refused.headers["www-authenticate"] == "Bearer"
        for key in (KEY, OTHER):
            assert client.request(method, path, headers={"Authorization": f"Bearer {key}"}).status_code != 401
            assert client.request(method, path, headers={"x-api-key": key}).status_code != 401
    assert [client.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
    described = client.get("/openapi.json", headers={"X-API-Key": KEY}).json()
    assert set(described["components"]["securitySchemes"]) == {"bearer", "header"}


def test_metrics_may_be_open(table: TaskTable, assets: Path) -> None:
    client, _ = fronted(table, assets, api_keys=(SecretStr(KEY),), open_metrics=True)
    assert "python_info" in client.get("/metrics").text
    assert client.get("/metrics/other").status_code == 401


def test_without_keys_everybody_may_come_in(table: TaskTable, assets: Path) -> None:
    client, _ = fronted(table, assets)
    answer = client.get("/tasks", headers={"Origin": "https://elsewhere.example"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]  # no CORS
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_all_known_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys.of(Settings(api_keys=(SecretStr(KEY), SecretStr(OTHER))))
    keys.check(None, KEY)
    assert len(compared) == 2
    with pytest.raises(UnauthorizedError):
        keys.check(None, "unknown")


def test_keys_stay_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTSERVE_API_KEYS", f"{KEY},{OTHER}")
    settings = read_settings()
    assert KEY not in repr(settings)
    assert len(Keys.of(settings)._digests) == 2
    monkeypatch.setenv("MTSERVE_API_KEYS", f'["{KEY}", 3')
    with pytest.raises(ConfigError, match="MTSERVE_API_KEYS") as raised:
        read_settings()
    assert KEY not in str(raised.value)
    monkeypatch.delenv("MTSERVE_API_KEYS")
    for content in ("", "# nothing\n"):
        (tmp_path / "empty").write_text(content)
        with pytest.raises(ConfigError, match="holds no key"):
            Keys.of(Settings(api_keys_file=tmp_path / "empty"))
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.of(Settings(api_keys_file=tmp_path / "missing"))


def test_a_draining_server_refuses_and_probes_say_so(table: TaskTable, assets: Path) -> None:
    client, root = fronted(table, assets)
    root.drain.begun = True
    for method, path in [("POST", "/tasks/topic"), ("GET", "/tasks"), ("GET", "/readyz")]:
        error(client.request(method, path, json={}), 503, "unavailable")
    assert client.get("/livez").status_code == 200


def test_sigterm_waits_for_what_is_under_way() -> None:
    ended = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    try:
        drain = Drain()
        drain.hold_back_sigterm(10)
        with drain.entered():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert (drain.begun, ended) == (True, [])
        for _ in range(200):
            time.sleep(0.01)
            if ended:
                break
        assert ended == [signal.SIGTERM]
        drain = Drain()
        drain.hold_back_sigterm(10)
        with drain.entered():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # the second one is not held back
            assert len(ended) >= 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_access_log_tells_what_was_asked_and_no_texts(table: TaskTable, assets: Path, lines: Any) -> None:
    client, _ = fronted(table, assets)
    ok(client, "/predict", {"inputs": ["a secret text", "b"], "tasks": ["topic", "names"]})
    client.post("/tasks/topic", json={"inputs": 3}, headers={"X-Request-Id": "mine"})
    client.get("/livez")
    answered, refused = lines()
    assert answered["route"] == "/predict"
    assert answered["tasks"] == ["topic", "names"]
    assert (answered["status"], answered["code"], answered["inputs"]) == (200, None, 2)
    assert answered["trunk_passes"] == 1
    assert answered["bytes"] > 0
    assert {"time", "client", "method", "ms", "queue_time_ms"} <= set(answered)
    assert (refused["status"], refused["code"], refused["request_id"]) == (422, "invalid_input", "mine")
    assert (refused["route"], refused["path"]) == ("/tasks/{task}", "/tasks/topic")
    assert "secret" not in json.dumps([answered, refused])


def test_the_access_log_holds_texts_where_asked(table: TaskTable, assets: Path, lines: Any) -> None:
    client, _ = fronted(table, assets, log_texts=True)
    ok(client, "/tasks/topic", {"inputs": "good"})
    ok(client, "/predict", {"inputs": ["bad"], "tasks": ["topic"]})
    assert [line["inputs"] for line in lines()] == ["good", ["bad"]]


def test_the_end_of_every_request_is_told(table: TaskTable, assets: Path) -> None:
    told: list[tuple[str, tuple[str, ...], int]] = []

    def ended(exchange: Exchange, *, status: int, seconds: float) -> None:
        assert seconds > 0
        told.append((exchange.route, exchange.tasks, status))

    client, _ = fronted(table, assets, ended)
    ok(client, "/predict", {"inputs": "good", "tasks": ["topic", "names"]})
    client.post("/tasks/topic", content=b"{")
    client.post("/tasks/forth", json={"inputs": "good", "stream": True, "parameters": {"max_new_tokens": 2}})
    client.get("/nothing")
    client.get("/readyz")
    assert told == [
        ("/predict", ("topic", "names"), 200),
        ("/tasks/{task}", ("topic",), 400),
        ("/tasks/{task}", ("forth",), 200),
        ("", (), 404),
    ]


def test_spans_of_the_stages_stand_under_the_requests(table: TaskTable, assets: Path) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    client, _ = fronted(table, assets)
    app = client.app

    async def traced(scope: Any, receive: Any, send: Any) -> None:
        with provider.get_tracer("test").start_as_current_span("http"):
            await app(scope, receive, send)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trace, "get_tracer", provider.get_tracer)
        ok(TestClient(traced), "/tasks/topic", {"inputs": "good"})
    *stages, http = exporter.get_finished_spans()
    assert [span.name for span in stages] == ["mtserve.tokenise", "mtserve.queue", "mtserve.run"]
    assert all(span.parent and span.parent.span_id == http.context.span_id for span in stages)
    assert all(span.start_time <= span.end_time for span in stages)
    assert http.attributes["mtserve.tasks"] == ("topic",)
    assert http.attributes["mtserve.inputs"] == 1


def test_lines_of_the_access_log_are_written_some_at_a_time() -> None:
    class Counting(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            return super().write(text)

    stream, logger = Counting(), logging.Logger("apart")
    logger.addHandler(Lines(stream))
    logger.info("%s", "first")
    assert stream.getvalue() == "first\n"  # no event loop runs, so nothing would write it later

    async def serve() -> None:
        for number in range(50):
            logger.info("%d", number)
        assert stream.writes == 1
        await asyncio.sleep(2 * PAUSE_S)

    asyncio.run(serve())
    assert stream.writes == 2
    assert stream.getvalue().splitlines() == ["first", *map(str, range(50))]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # BentoML's imports
@pytest.mark.filterwarnings("ignore:The `__get_pydantic_core_schema__` method:DeprecationWarning")
def test_requests_of_tasks_pass_bentomls_middleware_only_where_they_are_traced() -> None:
    from mtserve.serve.service import make_service

    def passed() -> list[str]:
        """What the app of the service's BentoML is asked for."""
        front, seen = make_service().to_asgi(), list[str]()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["path"])
            await PlainTextResponse("")(scope, receive, send)

        front._app = app
        client = TestClient(front)
        for path in ("/livez", "/healthz"):
            client.get(path)
        front._root.swap(TaskTable({}, Settings(), LocalModel({})))
        for path in ("/predict", "/tasks/topic", "/tasks", "/docs.json"):
            client.get(path)
        return seen

    assert passed() == ["/livez", "/healthz", "/docs.json"]
    traced = make_service()
    traced.config["tracing"] = {"sample_rate": 0.5}
    front = traced.to_asgi()
    assert front._routes is front._app
