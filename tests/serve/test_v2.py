"""The Open Inference Protocol in process: every task as a model, tensors as JSON and as bytes, its form of errors."""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mtserve.serve.table import TaskTable
from mtserve.serve.tensors import inputs_of, outputs_of, read_request, write_answer
from tests.tiny import GENERATION, OPTIONS, tiny

TEXTS = ["the parcel arrived two days late", "ana silva moved from porto to oslo"]
EVERY = [*OPTIONS, *GENERATION]


def tensor(name: str, data: list[Any], shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [len(data)] if shape is None else shape, "data": data}


def ok(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def tensors_of(example: dict[str, Any]) -> list[dict[str, Any]]:
    """One example as tensors of one row."""
    return [
        tensor(name, [value]) if isinstance(value, str) else tensor(name, value, [1, len(value)])
        for name, value in example.items()
    ]


def column(answer: dict[str, Any], name: str) -> Any:
    return next(one["data"] for one in answer["outputs"] if one["name"] == name)


def test_server_and_health(client: TestClient) -> None:
    about = ok(client.get("/v2"))
    assert (about["name"], about["extensions"]) == ("mtserve", ["binary_tensor_data"])
    assert ok(client.get("/v2/health/live")) == {"live": True}
    assert ok(client.get("/v2/health/ready")) == {"ready": True}


@pytest.mark.parametrize("task", EVERY)
@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_every_task_answers_as_its_own_route_does(
    client: TestClient, table: TaskTable, task: str, version: str
) -> None:
    kind, options = table.task(task).task.kind, table.task(task).task.options
    about = ok(client.get(f"/v2/models/{task}{version}"))
    assert (about["name"], about["versions"], about["platform"]) == (task, ["1"], f"mtserve_{kind.name}")
    assert ok(client.get(f"/v2/models/{task}{version}/ready")) == {"name": task, "ready": True}
    example = kind.sample(options).model_dump(mode="json", exclude_none=True)
    asked = {"id": "one", "inputs": tensors_of(example)}
    answer = ok(client.post(f"/v2/models/{task}{version}/infer", json=asked))
    assert (answer["model_name"], answer["model_version"], answer["id"]) == (task, "1", "one")
    assert [one["name"] for one in answer["outputs"]] == [one["name"] for one in about["outputs"]]
    assert [one["datatype"] for one in answer["outputs"]] == [one["datatype"] for one in about["outputs"]]
    wanted = ok(client.post("/predict", json={"inputs": [example], "tasks": [task]}))["outputs"][task]
    assert [json.loads(cell) for cell in column(answer, "prediction")] == wanted
    for name, value in kind.flat(wanted[0], options).items():
        found = column(answer, name)[0]
        assert (found if isinstance(value, str | float | int) else json.loads(found)) == value


def test_several_rows_of_several_texts(client: TestClient) -> None:
    questions = tensor("question", ["what do you open ?", "what ?"], [2, 1])
    rows = [["an umbrella", "a book", "soup"], ["a dog", "a pet"]]
    wide = tensor("choices", [[*rows[0]], [*rows[1], ""]], [2, 3])
    cells = tensor("choices", [json.dumps(row) for row in rows])
    inputs = [{"question": q, "choices": row} for q, row in zip(questions["data"], rows, strict=True)]
    wanted = ok(client.post("/tasks/choice", json={"inputs": inputs}))
    for choices in (wide, cells):
        answer = ok(client.post("/v2/models/choice/infer", json={"inputs": [questions, choices]}))
        assert [json.loads(cell) for cell in column(answer, "prediction")] == wanted
        assert column(answer, "index") == [one[0]["index"] for one in wanted]


@pytest.mark.parametrize("cell", ["[" * 4_000, "{}", "no list", "3"])
def test_cells_that_are_no_lists_are_said(client: TestClient, cell: str) -> None:
    asked = {"inputs": [tensor("question", ["what ?"]), tensor("choices", [cell])]}
    response = client.post("/v2/models/choice/infer", json=asked)
    assert response.status_code == 422, response.text
    assert "must be a list as JSON" in response.json()["error"]


def test_parameters_and_chosen_outputs(client: TestClient) -> None:
    asked = {
        "inputs": [tensor("text", TEXTS)],
        "parameters": {"top_k": 1, "binary_data_output": False, "priority": 0},
        "outputs": [{"name": "label"}, {"name": "prediction"}],
    }
    answer = ok(client.post("/v2/models/topic/infer", json=asked))
    assert [one["name"] for one in answer["outputs"]] == ["label", "prediction"]
    assert [len(json.loads(cell)) for cell in column(answer, "prediction")] == [1, 1]


def test_binary_tensors_in_and_out(client: TestClient) -> None:
    content = b"".join(struct.pack("<I", len(text)) + text.encode() for text in TEXTS)
    head = {"name": "text", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(content)}}
    asked = {"inputs": [head], "outputs": [{"name": "score", "parameters": {"binary_data": True}}, {"name": "label"}]}
    begin = json.dumps(asked).encode()
    headers = {"Inference-Header-Content-Length": str(len(begin))}
    response = client.post("/v2/models/topic/infer", content=begin + content, headers=headers)
    assert response.status_code == 200, response.text
    size = int(response.headers["Inference-Header-Content-Length"])
    said, behind = json.loads(response.content[:size]), response.content[size:]
    wanted = ok(client.post("/tasks/topic", json={"inputs": TEXTS}))
    assert said["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert struct.unpack("<2d", behind) == pytest.approx([one[0]["score"] for one in wanted], abs=1e-6)
    assert column({"outputs": said["outputs"][1:]}, "label") == [one[0]["label"] for one in wanted]


def text(data: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": [{**tensor("text", data), **more}]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": []}, "inputs: must be a list of tensors"),
        ({}, "inputs: is missing"),
        ({"inputs": [tensor("txet", ["a"])]}, "'txet' is no input of this model; allowed: text, text_pair"),
        (text(["a"], datatype="FP32"), "inputs.text: datatype must be BYTES; found 'FP32'"),
        (text(["a"], shape=[2]), r"inputs.text: a tensor of shape \[2\] has 2 elements; found 1"),
        (text(["a", "b"], shape=[1, 2]), r"inputs.text: shape must be \[n\] or \[n, 1\]"),
        (text([3]), "inputs.text: every element must be a string"),
        (text("a", shape=[1]), "a tensor of shape"),
        (text([[["a"]]], shape=[1]), "inputs.text: every element must be a string"),
        ({"inputs": [{**tensor("text", ["a"]), "name": ["text"]}]}, "is no input of this model"),
        (text(["a"], parameters=3), "parameters of a tensor must be an object"),
        (text(["a"], parameters={"binary_data_size": 9}), "binary_data_size is 9; 0 bytes are left"),
        ({"inputs": [tensor("text", ["a", "b"]), tensor("text_pair", ["c"])]}, "equally many rows; found: text 2"),
        ({**text(["a"]), "outputs": [{"name": "x"}]}, "'x' is no output of this model; allowed: label, score, pred"),
        ({**text(["a"]), "parameters": {"top_k": 0}}, "top_k"),
        ({**text(["a"]), "more": 1}, "more: not allowed here"),
    ],
)
def test_wrong_requests_are_errors_in_the_protocols_own_form(client: TestClient, body: Any, said: str) -> None:
    response = client.post("/v2/models/topic/infer", json=body)
    assert response.status_code in (400, 422)
    assert list(response.json()) == ["error"]
    assert re.search(said, response.json()["error"]), response.json()


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/v2/models/nothing", 404, "unknown task 'nothing'"),
        ("/v2/models/topic/versions/2/ready", 404, "has no version '2'; its only one is 1"),
        ("/v2/nothing", 404, "no route"),
        ("/v2/models/topic/infer", 405, "allowed: POST"),
    ],
)
def test_what_is_not_there(client: TestClient, path: str, status: int, said: str) -> None:
    response = client.get(path)
    assert response.status_code == status
    assert said in response.json()["error"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x05\0\0\0abc", "within an element"),
        (b"\x05\0", "within the length"),
        (b"\x01\0\0\0\xff", "is not UTF-8"),
    ],
)
def test_broken_binary_tensors(client: TestClient, content: bytes, said: str) -> None:
    head = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(content)}}
    begin = json.dumps({"inputs": [head]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(begin))}
    response = client.post("/v2/models/topic/infer", content=begin + content, headers=headers)
    assert (response.status_code, said in response.json()["error"]) == (400, True)
    for length in ("x", str(10**6)):
        headers = {"Inference-Header-Content-Length": length}
        assert client.post("/v2/models/topic/infer", content=begin, headers=headers).status_code == 400
    more = client.post(
        "/v2/models/topic/infer",
        content=json.dumps(text(["a"])).encode() + b"abc",
        headers={"Inference-Header-Content-Length": str(len(json.dumps(text(["a"]))))},
    )
    assert "3 bytes of the body belong to no input" in more.json()["error"]


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1))
def test_texts_go_through_bytes_unchanged(texts: list[str]) -> None:
    task = tiny("bert", only=("topic",)).engine.task("topic")
    content = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    head = {**tensor("text", texts), "parameters": {"binary_data_size": len(content)}}
    del head["data"]
    assert read_request({"inputs": [head]}, content, task).items == [{"text": text} for text in texts]


@pytest.mark.parametrize("task", EVERY)
def test_outputs_have_the_types_that_the_metadata_say(task: str) -> None:
    made = tiny("gpt2" if task in GENERATION else "bert", only=(task,)).engine
    one = made.task(task)
    example = one.kind.sample(one.options).model_dump(mode="json", exclude_none=True)
    asked = read_request({"inputs": tensors_of(example)}, b"", one)
    assert {tensor.name for tensor in inputs_of(one)} >= set(example)
    said, behind = write_answer(asked, one, made.predict(task, [example]))
    types = {"BYTES": str, "FP64": float, "INT64": int, "BOOL": bool}
    for wanted, found in zip(outputs_of(one), said["outputs"], strict=True):
        assert (wanted.name, wanted.datatype) == (found["name"], found["datatype"])
        assert all(isinstance(cell, types[wanted.datatype]) for cell in found["data"])
    assert behind == b""
