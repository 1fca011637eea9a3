"""The OpenAPI document: it hangs together, and says of every task what the server does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from mtserve.serve.openapi import document
from mtserve.serve.table import TaskTable
from tests.serve.schemas import problems, resolve
from tests.tiny import GENERATION, OPTIONS


@pytest.fixture(scope="module")
def spec(table: TaskTable) -> dict[str, Any]:
    return json.loads(json.dumps(document(table)))  # type: ignore[no-any-return]


def parts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from parts(inner)


def test_every_task_has_its_path_and_every_reference_resolves(spec: dict[str, Any]) -> None:
    assert spec["openapi"] == "3.1.0"
    assert {f"/tasks/{name}" for name in [*OPTIONS, *GENERATION]} < set(spec["paths"])
    references = {part["$ref"] for part in parts(spec) if "$ref" in part}
    assert references
    for reference in references:
        assert resolve(spec, reference)
    assert not any("$defs" in part for part in parts(spec))
    operations = [operation["operationId"] for path in spec["paths"].values() for operation in path.values()]
    assert len(set(operations)) == len(operations)


def test_component_names_are_allowed(spec: dict[str, Any]) -> None:
    for name in spec["components"]["schemas"]:
        assert all(c.isalnum() or c in ".-_" for c in name)


@pytest.mark.parametrize("name", [*OPTIONS, *GENERATION])
def test_examples_and_answers_fit_their_schemas(spec: dict[str, Any], client: TestClient, name: str) -> None:
    operation = spec["paths"][f"/tasks/{name}"]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    example = body["example"]
    assert problems(spec, body["schema"], example) == []
    answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
    for request in (example, {"inputs": [example["inputs"]] * 2}):
        assert problems(spec, body["schema"], request) == []
        response = client.post(f"/tasks/{name}", json=request)
        assert response.status_code == 200, response.text
        assert problems(spec, answer, response.json()) == []
        declared = {header.lower() for header in operation["responses"]["200"]["headers"]}
        assert declared <= set(response.headers)
    assert problems(spec, body["schema"], {"inputs": 3})
    assert problems(spec, body["schema"], {**example, "more": 1})
    assert problems(spec, answer, {"wrong": 1})


@pytest.mark.parametrize("name", [*OPTIONS, *GENERATION])
def test_streams_are_declared_where_there_are_any(spec: dict[str, Any], client: TestClient, name: str) -> None:
    operation = spec["paths"][f"/tasks/{name}"]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    request = {**body["example"], "stream": True}
    response = client.post(f"/tasks/{name}", json=request)
    if name in GENERATION:
        assert problems(spec, body["schema"], request) == []
        assert problems(spec, body["schema"], {**request, "stream": "yes"})
        assert response.headers["content-type"].split(";")[0] in operation["responses"]["200"]["content"]
    else:
        assert problems(spec, body["schema"], request)
        assert list(operation["responses"]["200"]["content"]) == ["application/json"]
        assert response.status_code == 422


def test_labels_are_enumerated(spec: dict[str, Any]) -> None:
    schemas = spec["components"]["schemas"]
    assert schemas["topic.LabelScore"]["properties"]["label"]["enum"] == ["good", "bad", "fine"]
    assert schemas["tags.LabelScore"]["properties"]["label"]["enum"] == ["red", "green"]
    assert schemas["names.SpanScore"]["properties"]["entity_group"]["enum"] == ["person", "place"]


def test_a_task_whose_name_begins_with_another_keeps_its_labels(table: TaskTable) -> None:
    longer = replace(table.task("tags"), task=replace(table.task("tags").task, name="topic.more"))
    tasks = {"topic.more": longer, "topic": table.task("topic")}
    schemas = document(replace(table, tasks=tasks))["components"]["schemas"]
    assert schemas["topic.more.LabelScore"]["properties"]["label"]["enum"] == ["red", "green"]
    assert schemas["topic.LabelScore"]["properties"]["label"]["enum"] == ["good", "bad", "fine"]


def test_sentence_similarity_is_declared(spec: dict[str, Any], client: TestClient) -> None:
    operation = spec["paths"]["/tasks/cosine"]["post"]
    request = {"inputs": {"source_sentence": "a dog", "sentences": ["a pet", "the town"]}}
    assert problems(spec, operation["requestBody"]["content"]["application/json"]["schema"], request) == []
    answer = client.post("/tasks/cosine", json=request).json()
    assert len(answer) == 2
    assert problems(spec, operation["responses"]["200"]["content"]["application/json"]["schema"], answer) == []


def test_predict_fits_its_schema(spec: dict[str, Any], client: TestClient) -> None:
    operation = spec["paths"]["/predict"]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    assert problems(spec, body["schema"], body["example"]) == []
    response = client.post("/predict", json=body["example"])
    assert response.status_code == 200, response.text
    assert problems(spec, operation["responses"]["200"]["content"]["application/json"]["schema"], response.json()) == []


def test_errors_fit_their_schema(spec: dict[str, Any], client: TestClient) -> None:
    responses = spec["components"]["responses"]
    assert set(responses) == {"400", "401", "404", "405", "413", "422", "429", "500", "503", "504"}
    for method, path, body in [
        ("post", "/tasks/topic", {"inputs": [1]}),
        ("post", "/tasks/no", {}),
        ("get", "/no", {}),
    ]:
        answer = client.request(method, path, json=body)
        schema = responses[str(answer.status_code)]["content"]["application/json"]["schema"]
        assert problems(spec, schema, answer.json()) == []


def test_the_document_is_served(table: TaskTable, client: TestClient) -> None:
    """With this server's own address in its examples."""
    assert client.get("/openapi.json").json() == json.loads(json.dumps(document(table, url="http://testserver")))
