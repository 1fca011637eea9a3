"""The client by itself: what it sends, what it makes of errors, when it asks again. With a server: tests/serve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mtserve import client as module
from mtserve.client import Client
from mtserve.errors import CapacityError, InputError, MtserveError, OverloadedError, Problem, UnknownTaskError


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(module.time, "sleep", found.append)
    return found


def client(*answers: httpx.Response | Exception, **how: Any) -> tuple[Client, list[httpx.Request]]:
    """One that is given these answers in turn, and what it asks."""
    left, asked = iter(answers), list[httpx.Request]()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    return Client("http://server/", transport=httpx.MockTransport(answer), **how), asked


def failed(status: int, code: str, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    return httpx.Response(status, json={"error": {"code": code, "message": "no", **more}}, headers=headers)


def test_what_is_asked() -> None:
    made, asked = client(httpx.Response(200, json=[1]), httpx.Response(200, json={"outputs": {"a": [2]}}), api_key="k")
    assert made.predict("intent", "hello", {"top_k": 1}) == [1]
    assert made.predict_tasks(["hello"], ["a"], {"a": {"top_k": 2}}) == {"a": [2]}
    assert [str(one.url) for one in asked] == ["http://server/tasks/intent", "http://server/predict"]
    assert [one.headers["authorization"] for one in asked] == ["Bearer k"] * 2
    assert json.loads(asked[0].content) == {"inputs": "hello", "parameters": {"top_k": 1}}
    assert json.loads(asked[1].content) == {"inputs": ["hello"], "tasks": ["a"], "parameters": {"a": {"top_k": 2}}}


def test_one_text_is_one_input() -> None:
    made, asked = client(httpx.Response(200, json={"outputs": {"a": [2]}}))
    assert made.predict_tasks("hello", ("a",)) == {"a": [2]}
    assert json.loads(asked[0].content) == {"inputs": "hello", "tasks": ["a"], "parameters": {}}


def test_an_overloaded_server_is_asked_again_when_it_says(waits: list[float]) -> None:
    busy = [failed(429, "overloaded", headers={"Retry-After": str(wait)}) for wait in (3, 1)]
    made, asked = client(*busy, httpx.Response(200, json=[1]))
    assert made.predict("intent", "hello") == [1]
    assert (waits, len(asked)) == ([3, 1], 3)
    made, asked = client(*[failed(429, "overloaded", headers={"Retry-After": "2"}) for _ in range(3)], retries=2)
    with pytest.raises(OverloadedError) as caught:
        made.predict("intent", "hello")
    assert (caught.value.retry_after_s, waits[2:], len(asked)) == (2, [2, 2], 3)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (failed(404, "unknown_task", tasks=["a"]), UnknownTaskError, "no"),
        (failed(422, "invalid_input", problems=[{"message": "is missing", "index": 1, "field": "text"}]), InputError,
         "input 1: text: is missing"),
        (failed(503, "unavailable"), CapacityError, "no"),
        (failed(418, "of_another_version"), MtserveError, "no"),
        (httpx.Response(502, text="<html>bad gateway"), CapacityError, "HTTP 502: <html>bad gateway"),
        (httpx.Response(400, json={"error": "text"}), MtserveError, "HTTP 400"),
        (httpx.ConnectError("refused"), CapacityError, "http://server does not answer: refused"),
    ],
)  # fmt: skip
def test_errors_are_those_of_the_engine(
    answer: httpx.Response | Exception, kind: type[MtserveError], said: str, waits: list[float]
) -> None:
    made, _ = client(answer)
    with pytest.raises(kind, match=said) as caught:
        made.predict("intent", ["hello", {}])
    assert type(caught.value) is kind
    if isinstance(caught.value, InputError):
        assert caught.value.problems == (Problem("is missing", 1, "text"),)
    if isinstance(caught.value, UnknownTaskError):
        assert caught.value.details() == {"tasks": ["a"]}
    assert waits == []


def stream(*lines: str) -> httpx.Response:
    return httpx.Response(200, content="".join(f"data: {line}\n\n" for line in lines).encode())


def test_streams(waits: list[float]) -> None:
    made, asked = client(failed(429, "overloaded", headers={"Retry-After": "4"}), stream('{"a": 1}', '{"a": 2}'))
    assert list(made.stream("forth", "hello", {"num_beams": 1})) == [{"a": 1}, {"a": 2}]
    assert waits == [4]
    assert json.loads(asked[1].content) == {"inputs": "hello", "parameters": {"num_beams": 1}, "stream": True}
    made, _ = client(stream('{"a": 1}', '{"error": {"code": "deadline_exceeded", "message": "late"}}'))
    events: Iterator[Any] = made.stream("forth", "hello")
    assert next(events) == {"a": 1}
    with pytest.raises(CapacityError, match="late"):
        next(events)


def test_readiness() -> None:
    asks: list[tuple[httpx.Response | Exception, bool]] = [
        (httpx.Response(200), True),
        (httpx.Response(503), False),
        (httpx.ConnectError("refused"), False),
    ]
    for answer, ready in asks:
        with client(answer)[0] as made:
            assert made.is_ready() is ready
