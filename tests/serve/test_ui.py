"""The playground without a browser: its forms, how answers look, what is let through, the same answers as routes."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, SecretStr
from starlette.testclient import TestClient

from mtserve.errors import InputError, MissingExtraError
from mtserve.serve.app import make_app
from mtserve.serve.front import Front
from mtserve.serve.keys import Keys
from mtserve.serve.launch import command
from mtserve.serve.loading import check_settings
from mtserve.serve.table import Root, ServedTask, TaskTable
from mtserve.serve.ui import forms, shown
from mtserve.serve.ui.mounted import Playground
from mtserve.tasks import KINDS
from tests.serve.test_routes import error
from tests.tiny import GENERATION, OPTIONS

KEY = "a-key-of-the-tests"


class Visit:
    """A client of the routes with a playground, and what its page is made of."""

    def __init__(self, client: TestClient, root: Root) -> None:
        self.client, self.root = client, root
        self.config = client.get("/ui/config").json()
        self.parts = {part["id"]: part for part in self.config["components"]}

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """What happens on a click or at the start; `kind`: within its form."""
        under = {one["id"] for one in self._below(self.config["layout"], f"form-{kind}", inside=not kind)}
        return [one for one in self.config["dependencies"] if {target[0] for target in one["targets"]} & under]

    def _below(self, node: dict[str, Any], name: str, *, inside: bool) -> Iterator[dict[str, Any]]:
        inside = inside or (node["id"] in self.parts and self.parts[node["id"]]["props"].get("elem_id") == name)
        if inside:
            yield node
        for child in node.get("children") or ():
            yield from self._below(child, name, inside=inside)

    def run(self, kind: str) -> dict[str, Any]:
        """The event of a form's Run: the one with most inputs."""
        return max(self.events(kind), key=lambda one: len(one["inputs"]))

    def post(self, event: dict[str, Any], data: list[Any]) -> list[Any]:
        """What an event without the queue answers."""
        body = {"data": data, "fn_index": event["id"], "session_hash": "visit"}
        answer = self.client.post("/ui/gradio_api/run/predict", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"])

    def ask(self, served: ServedTask, **parameters: Any) -> list[Any]:
        """Run a task on its own sample."""
        kind = served.task.kind
        example, free = forms.fields(kind.example), forms.fields(kind.parameters)
        held = kind.sample(served.task.options).model_dump(mode="json", exclude_none=True)
        values = [served.name, *forms.show(example, held), *forms.show(free, parameters)]
        return self.post(self.run(kind.name), values)

    def follow(self, event: dict[str, Any], data: list[Any]) -> list[dict[str, Any]]:
        """The messages of an event of the queue, to its end."""
        body = {"data": data, "fn_index": event["id"], "session_hash": "stream"}
        assert self.client.post("/ui/gradio_api/queue/join", json=body).status_code == 200
        lines = self.client.get("/ui/gradio_api/queue/data", params={"session_hash": "stream"}).text.splitlines()
        messages = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        return [one for one in messages if one["msg"].startswith("process_")]


def visiting(table: TaskTable, assets: Path, *, streams: bool = False, **given: Any) -> tuple[TestClient, Root]:
    changed = table.settings.model_copy(update={"ui": True, "max_body_bytes": 100_000, **given})
    root = Root(replace(table, settings=changed, keys=Keys.of(changed)))
    playground = Playground(root)
    playground.open(streams=streams)
    app = Front(make_app(root, assets=assets, playground=playground), root=root)
    return TestClient(app, follow_redirects=False), root


@pytest.fixture(scope="module")
def visit(table: TaskTable, assets: Path) -> Iterator[Visit]:
    client, root = visiting(table, assets)
    with client:
        yield Visit(client, root)


@pytest.fixture(scope="module")
def stream(table: TaskTable, assets: Path) -> Iterator[Visit]:
    client, root = visiting(table, assets, streams=True)
    with client:
        yield Visit(client, root)


def raw(html: str) -> Any:
    """The JSON that is folded beneath an answer."""
    (said,) = re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)
    return json.loads(said.replace("&quot;", '"').replace("&#x27;", "'").replace("&lt;", "<").replace("&amp;", "&"))


class Inner(BaseModel):
    depth: int


class Strange(BaseModel):
    """Every type that a kind of tomorrow may have."""

    title: str
    note: str | None = None
    parts: tuple[str, ...] = ()
    rate: float = Field(0.5, gt=0, le=1, description="How fast.")
    count: int | None = Field(None, ge=2)
    loud: bool = False
    sure: bool | None = None
    mode: Literal["a", "b"] = "a"
    inner: Inner | None = None
    either: int | str = 3


def test_a_form_has_a_field_of_its_type_for_everything() -> None:
    form = {field.name: field for field in forms.fields(Strange)}
    assert {name: field.shape for name, field in form.items()} == {
        **{"title": "text", "note": "text", "parts": "lines", "rate": "number", "count": "integer", "loud": "flag"},
        **{"sure": "choice", "mode": "choice", "inner": "json", "either": "json"},
    }
    assert (form["sure"].choices, form["mode"].choices, form["title"].required) == ((True, False), ("a", "b"), True)
    assert form["rate"].about == "How fast. (above 0, at most 1)"
    assert form["parts"].about == "One a line."
    assert form["count"].label == "Count"


def test_only_what_was_changed_is_sent() -> None:
    form = forms.fields(Strange)
    untouched = forms.show(form, {"title": "x"})
    assert forms.read(form, untouched) == {"title": "x"}
    filled = ["t", "n", "one\n\n two \n", 0.25, 4.0, True, False, "b", '{"depth": 2}', '"s"']
    found = forms.read(form, filled)
    assert found == {
        **{"title": "t", "note": "n", "parts": ["one", " two "], "rate": 0.25, "count": 4, "loud": True},
        **{"sure": False, "mode": "b", "inner": {"depth": 2}, "either": "s"},
    }
    assert isinstance(found["count"], int)
    assert forms.read(form, ["", *filled[1:]])["title"] == ""  # the task says what is wrong with it
    assert forms.read(form, [*filled[:4], 2.5, *filled[5:]])["count"] == 2.5
    with pytest.raises(InputError, match="inner: is not JSON"):
        forms.read(form, [*filled[:8], "{", "1"])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_sample_of_every_kind_goes_through_its_form(kind: str) -> None:
    one = KINDS[kind]
    raw_options = next(given for name, given in {**OPTIONS, **GENERATION}.values() if name == kind)
    sample = one.sample(one.options.model_validate(raw_options))
    form = forms.fields(one.example)
    shown_values = forms.show(form, sample.model_dump(mode="json", exclude_none=True))
    assert one.parse(forms.read(form, shown_values)) == sample
    free = forms.fields(one.parameters)
    assert forms.read(free, forms.show(free, {})) == {}


def looks(prediction: Any, inputs: Any, **options: Any) -> str:
    served: Any = SimpleNamespace(task=SimpleNamespace(options=SimpleNamespace(model_dump=lambda: options)))
    return shown.answered(prediction, inputs, served, joined=prediction)


def test_scores_are_bars_that_fit() -> None:
    html = looks([{"label": "<b>", "score": 0.75}, {"label": "c", "score": 0.25}], "x")
    assert re.findall(r"width:([\d.]+)%", html) == ["75.0", "25.0"]
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    logits = looks([{"label": "a", "score": 4.0}, {"label": "b", "score": -4.0}], "x")
    assert re.findall(r"width:([\d.]+)%", logits) == ["100.0", "0.0"]
    assert "and 6 more" in looks([{"label": str(n), "score": 0.0} for n in range(30)], "x")
    assert "width:50.0%" in looks({"score": 2.5}, {}, low=0.0, high=5.0)
    assert "width:100.0%" in looks({"score": 7.0}, {}, low=0.0, high=5.0)


def test_spans_are_marked_where_they_are() -> None:
    text = "Ana <Silva> & Oslo"
    spans = [
        {"entity_group": "place", "start": 14, "end": 18, "score": 0.5},
        {"entity_group": "person", "start": 0, "end": 11, "score": 0.9},
        {"entity_group": "inside", "start": 4, "end": 11, "score": 0.8},
    ]
    html = looks(spans, text)
    marks = r'<mark class="(c\d)">(.*?)<small>(.*?)</small></mark>'
    assert re.findall(marks, html) == [("c0", "Ana &lt;Silva&gt;", "person 0.90"), ("c1", "Oslo", "place 0.50")]
    assert re.sub(r"<small>.*?</small>|</?mark.*?>", "", html).startswith(
        '<div class="answer"><p class="marked">Ana &lt;Silva&gt; &amp; Oslo</p>'
    )
    words = looks([{"entity_group": "x", "start": 4, "end": 6}], {"words": ["ana", "in"]})
    assert re.findall(marks, words)[0][1:] == ("in", "x")
    assert "Nothing was found" in looks([], text)


def test_an_answer_of_no_known_shape_is_json() -> None:
    html = looks({"points": ["</pre><script>"]}, "x")
    assert "<details open>" in html
    assert "<script>" not in html
    assert raw(html.replace("&gt;", ">")) == {"points": ["</pre><script>"]}
    texts = looks([{"generated_text": "<i>", "finish_reason": "length", "score": -1.5}], "x")
    assert ">&lt;i&gt;<" in texts
    assert "ended by length, score -1.500" in texts


def test_without_the_setting_there_is_no_playground(client: TestClient) -> None:
    for path in ("/ui", "/ui/", "/ui/config"):
        error(client.get(path), 404, "not_found")
    code = "import sys, mtserve.serve.service; print('gradio' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "False"


def test_without_gradio_no_server_starts(
    checkpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch, table: TaskTable
) -> None:
    monkeypatch.setattr("mtserve.serve.loading.find_spec", lambda name: None)
    check_settings(table.settings)
    monkeypatch.setenv("MTSERVE_UI", "true")
    with pytest.raises(MissingExtraError, match=r"playground.*pip install 'mtserve\[ui\]'"):
        command(checkpoints, port=3999)


def test_the_page_is_let_through_and_little_else(visit: Visit) -> None:
    moved = visit.client.get("/ui")
    assert (moved.status_code, moved.headers["location"]) == (307, "ui/")
    page = visit.client.get("/ui/", headers={"Accept-Encoding": "br"})
    assert page.status_code == 200
    assert "manifest.json" not in page.text.split("<body")[0]
    loaded = re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"([^\"]*)\"", page.text)
    assert loaded
    assert not [url for url in loaded if url.startswith(("http", "//"))]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.g" not in page.text + visit.client.get("/ui/theme.css").text
    assert not visit.config["analytics_enabled"]
    assert not visit.config["connect_heartbeat"]  # else an open page would hold up the server's end
    closed = ["gradio_api/file=/etc/passwd", "gradio_api/upload", "gradio_api/call/run", "gradio_api/proxy=http://x/"]
    closed += ["login", "logout", "monitoring", "docs", "gradio_api/vibe-code/", "gradio_api/stream/x", "robots.txt"]
    closed += [
        "gradio_api/mcp/",
        "static/..%2fconfig",
        "gradio_api/runs",
        "openapi.json",
        "gradio_api/component_server",
    ]
    for path in closed:
        for method in ("GET", "POST"):
            error(visit.client.request(method, f"/ui/{path}"), 404, "not_found")
    error(visit.client.get("/uix"), 404, "not_found")
    error(visit.client.get("/nothing"), 404, "not_found")
    error(visit.client.get("/predict"), 405, "method_not_allowed")
    error(visit.client.get("/ui/gradio_api/run/predict"), 405, "method_not_allowed")
    error(visit.client.options("/ui/", headers={"Origin": "https://elsewhere.example"}), 405, "method_not_allowed")
    framed = visit.client.get("/ui/config", headers={"Origin": "https://elsewhere.example"})
    assert not [name for name in framed.headers if name.startswith("access-control")]
    sent = visit.client.post("/ui/gradio_api/run/predict", content="{}", headers={"Content-Type": "text/plain"})
    error(sent, 400, "bad_request")
    large = {"data": ["x" * 200_000], "fn_index": 0, "session_hash": "s"}
    error(visit.client.post("/ui/gradio_api/run/predict", json=large), 413, "too_large")


def test_every_task_answers_as_its_route_does(visit: Visit) -> None:
    for served in visit.root.table().tasks.values():
        answer, facts, curl, python = visit.ask(served)
        asked = served.example()
        assert raw(answer) == visit.client.post(served.url, json=asked).json(), served.name
        assert re.search(r"<li>\d+ tokens</li><li>\d+ trunk pass", facts)
        assert f"curl http://testserver{served.url} " in curl["value"]
        assert json.loads(curl["value"].split("-d ")[1].strip("'").replace("'\"'\"'", "'")) == asked
        assert f"client.predict({served.name!r}, {asked['inputs']!r})" in python["value"]


def test_parameters_go_along_and_errors_are_told_in_full(visit: Visit) -> None:
    served = visit.root.table().task("topic")
    answer, _, curl, _ = visit.ask(served, top_k=1)
    assert len(raw(answer)[0] if isinstance(raw(answer)[0], list) else raw(answer)) == 1
    assert '"parameters": {"top_k": 1}' in curl["value"]
    wrong, facts, curl, _ = visit.ask(served, top_k=0)
    told = visit.client.post(served.url, json={**served.example(), "parameters": {"top_k": 0}}).json()["error"]
    assert told["message"].split("'")[0] in wrong
    assert 'role="alert"' in wrong
    assert (facts, curl["visible"]) == ("", True)


def test_the_log_knows_what_was_asked(visit: Visit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mtserve.access"):
        visit.ask(visit.root.table().task("topic"))
    (line,) = [json.loads(r.getMessage()) for r in caplog.records if r.name == "mtserve.access"]
    assert (line["route"], line["tasks"], line["inputs"]) == ("/ui", ["topic"], 1)
    assert line["trunk_passes"] == 1


def test_several_tasks_share_the_pass(visit: Visit) -> None:
    (run,) = [one for one in visit.events() if len(one["inputs"]) == 2 and len(one["outputs"]) == 3]
    names = ["topic", "tags", "names"]
    answers, facts, curl = visit.post(run, ["the parcel arrived late", names])
    told = visit.client.post("/predict", json={"inputs": ["the parcel arrived late"], "tasks": names}).json()
    assert re.findall(r"<h3>(\w+) ", answers) == names
    assert [raw(f"<pre>{one}</pre>") for one in re.findall(r"<pre>(.*?)</pre>", answers, re.DOTALL)] == [
        of[0] for of in told["outputs"].values()
    ]
    assert "<li>1 trunk pass</li>" in facts
    assert "http://testserver/predict" in curl["value"]
    wrong, _, _ = visit.post(run, ["x", []])
    assert "at least one task" in wrong


def test_a_page_sees_the_tasks_there_are(visit: Visit) -> None:
    (load,) = [one for one in visit.config["dependencies"] if one["targets"][0][1] == "load"]
    before = visit.root.table()
    assert visit.post(load, [])[0]["choices"] == [[name, name] for name in before.tasks]
    gone = before.task("topic")
    kept = {name: task for name, task in before.tasks.items() if name != "topic"}
    visit.root.swap(replace(before, tasks=kept))
    try:
        assert visit.post(load, [])[0]["choices"] == [[name, name] for name in kept]
        told = visit.ask(gone)[0]
        assert "unknown task &#x27;topic&#x27;" in told
        assert "reload the page" in told
        (picked,) = [one for one in visit.config["dependencies"] if one["targets"][0][1] == "input" and one["inputs"]]
        assert "reload the page" in visit.post(picked, ["topic"])[0]
        visit.root.swap(None)
        error(visit.client.get("/ui/"), 503, "unavailable")
    finally:
        visit.root.swap(before)


def test_an_answer_grows_on_the_page(stream: Visit) -> None:
    served = stream.root.table().task("forth")
    run = stream.run("generation")
    assert run["queue"]
    free = forms.fields(served.task.kind.parameters)
    values = ["forth", True, served.example()["inputs"], *forms.show(free, {})]
    messages = stream.follow(run, values)
    assert messages[-1]["msg"] == "process_completed"
    growing = [one["output"]["data"] for one in messages if one["msg"] == "process_generating"]
    assert len(growing) > 2
    whole = stream.client.post(served.url, json=served.example()).json()[0]["generated_text"]
    (answer, facts, _, _), (_, _, curl, python) = messages[-1]["output"]["data"], growing[0]
    assert f">{whole}<" in answer
    assert "ended by" in facts
    assert curl["value"].startswith("curl -N ")
    assert "client.stream('forth', " in python["value"]
    values[1] = False
    assert whole in stream.follow(run, values)[-1]["output"]["data"][0]


async def left(app: Any, session: str) -> None:
    """Follow a stream as a browser does that closes its page."""
    begun: list[Any] = []

    async def receive() -> dict[str, Any]:
        while not any(b"process_generating" in message.get("body", b"") for message in begun):
            await asyncio.sleep(0.02)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        begun.append(message)

    path, query = "/ui/gradio_api/queue/data", f"session_hash={session}".encode()
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": query}
    around = {"headers": [(b"host", b"testserver")], "scheme": "http", "http_version": "1.1", "root_path": ""}
    await app({**scope, **around, "client": ("tests", 1), "server": ("testserver", 80)}, receive, send)


@pytest.mark.parametrize("how", ["stop", "leave"])
def test_stopping_or_leaving_gives_the_answer_up(stream: Visit, how: str) -> None:
    ended: list[str] = []

    class Endless:
        """A model whose answer never ends."""

        def refuse(self, task: str) -> None:
            pass

        async def stream(self, asked: Any, items: Any, *, timeout_s: float) -> AsyncGenerator[Any, None]:
            try:
                for index in range(100_000):
                    yield {"index": index, "token": {"text": "on"}}
                    await asyncio.sleep(0.05)
            finally:
                ended.append("given up")

    before = stream.root.table()
    stream.root.swap(replace(before, model=Endless()))  # type: ignore[arg-type]
    try:
        run = stream.run("generation")
        data = ["forth", True, "x", *forms.show(forms.fields(KINDS["generation"].parameters), {})]
        body = {"data": data, "fn_index": run["id"], "session_hash": how}
        joined = stream.client.post("/ui/gradio_api/queue/join", json=body).json()
        time.sleep(0.5)
        assert not ended
        if how == "stop":
            stop = {"session_hash": how, "fn_index": run["id"], "event_id": joined["event_id"]}
            assert stream.client.post("/ui/gradio_api/cancel", json=stop).status_code == 200
        else:
            assert stream.client.portal is not None
            stream.client.portal.call(left, stream.client.app, how)
        end = time.monotonic() + 10
        while not ended and time.monotonic() < end:
            stream.client.get("/livez")
            time.sleep(0.05)
        assert ended == ["given up"]
    finally:
        stream.root.swap(before)


def basic(password: str, name: str = "me") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def test_a_key_is_the_password_of_the_page(table: TaskTable, assets: Path) -> None:
    client, _ = visiting(table, assets, api_keys=(SecretStr(KEY),))
    inside = ["/ui", "/ui/", "/ui/config", "/ui/theme.css", "/ui/gradio_api/queue/data", "/ui/gradio_api/run/predict"]
    with client:
        for path in inside:
            for headers in (
                {},
                basic(KEY + "x"),
                basic(""),
                {"Authorization": "Basic ???"},
                {"Authorization": "Basic"},
            ):
                refused = client.get(path, headers=headers)
                assert KEY not in error(refused, 401, "unauthorized")["message"]
                assert refused.headers["www-authenticate"] == 'Basic realm="mtserve", charset="UTF-8"'
            for headers in (basic(KEY), basic(KEY, ""), {"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
                assert client.get(path, headers=headers).status_code != 401
        for path in ("/tasks", "/docs", "/predict", "/uix", "/metrics"):
            refused = client.get(path, headers=basic(KEY))
            error(refused, 401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
        client.headers.update(basic(KEY))
        visit = Visit(client, Root())
        answer, _, curl, python = visit.ask(table.task("topic"))
        assert "bars" in answer
        assert "$MTSERVE_API_KEY" in curl["value"]
        assert KEY not in curl["value"] + python["value"]


def test_behind_a_proxy_the_page_asks_the_proxy(visit: Visit) -> None:
    assert visit.config["root"] == "http://testserver/ui"
    seen = {"X-Forwarded-Host": "models.example", "X-Forwarded-Proto": "https"}
    assert visit.client.get("/ui/config", headers=seen).json()["root"] == "https://models.example/ui"
