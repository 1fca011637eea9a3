"""JSON schemas of a kind's requests and answers as components of an OpenAPI document. Pure; knows no path.

All of them come from the kind itself. A component's name begins with its task's, since labels make schemas differ by
task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter

from mtserve.chains import AnyChain
from mtserve.engine import Task
from mtserve.tasks.base import AnyKind

Schema = dict[str, Any]
STREAM = "Answer one input by server-sent events, one a token, as text-generation-inference does; the last has it all."
COMPONENTS = "#/components/schemas/"


def reference(name: str) -> Schema:
    """A reference to a component."""
    return {"$ref": COMPONENTS + name}


def add_task(schemas: dict[str, Schema], task: Task) -> None:
    """Put a task's `Request`, `Prediction` and `Answer`, with all that they use, among the components."""
    kind, prefix = task.kind, f"{task.name}."
    items = [_add(schemas, model, prefix) for model in kind.input_models()]
    text: list[Schema] = [{"type": "string"}] if kind.takes_text else []
    several = {"type": "array", "items": _any([*text, items[0]])}
    parameters = _add(schemas, kind.parameters, prefix)
    schemas[f"{prefix}Parameters"] = parameters
    streamed = {"stream": {"type": "boolean", "default": False, "description": STREAM}} if kind.streams else {}
    schemas[f"{prefix}Request"] = {
        "type": "object",
        "properties": {"inputs": _any([*text, *items, several]), "parameters": parameters, **streamed},
        "required": ["inputs"],
        "additionalProperties": False,
    }
    schemas[f"{prefix}Prediction"] = _prediction(task, schemas, prefix)
    schemas[f"{prefix}Answer"] = _any(_answers(kind, schemas, f"{prefix}Prediction"))


def add_chain(schemas: dict[str, Schema], chain: AnyChain, tasks: Mapping[str, Task]) -> None:
    """Put a chain's `Parameters` and `Prediction` among the components; those of its tasks are there."""
    names = (chain.first, chain.then)
    schemas[f"{chain.name}.Parameters"] = {
        "type": "object",
        "properties": {name: reference(f"{name}.Parameters") for name in names},
        "additionalProperties": False,
    }
    schema = TypeAdapter(chain.prediction).json_schema(ref_template=COMPONENTS + "{model}")
    for task in (tasks[name] for name in names):
        _enumerate(schema, task)
    schemas[f"{chain.name}.Prediction"] = _hoist(schema, schemas, f"{chain.name}.")


def _enumerate(schema: Schema, task: Task) -> None:
    """The task's labels as the only values of its label field."""
    for part in _parts([schema]):
        field = part.get("properties", {}).get(task.kind.label_field)
        if field is not None:
            field["enum"] = list(task.kind.label_names(task.options))


def _prediction(task: Task, schemas: dict[str, Schema], prefix: str) -> Schema:
    """The schema of one prediction, with the task's labels as the only values of its label field."""
    schema = task.kind.answer_schema(task.options)
    _enumerate(schema, task)
    return _hoist(schema, schemas, prefix)


def _answers(kind: AnyKind, schemas: Mapping[str, Schema], prediction: str) -> list[Schema]:
    """Schemas of the shapes that answers have: stand-ins go through `join` as predictions do.

    The stand-in of a prediction has the schemas of its fields where the prediction has their values.
    """
    resolved = schemas[prediction]
    if "$ref" in resolved:
        resolved = schemas[resolved["$ref"].removeprefix(COMPONENTS)]
    stand_in = dict(resolved.get("properties", {}))

    def schema(joined: Any) -> Schema:
        if joined is stand_in:
            return {"$ref": COMPONENTS + prediction}
        if isinstance(joined, list):
            return {"type": "array", "items": schema(joined[0])}
        return dict(joined)

    found: list[Schema] = []
    for shape in ["one", "list", *(kind.split(_least(model))[1] for model in kind.input_models()[1:])]:
        answer = schema(kind.join([stand_in], shape))
        if answer not in found:
            found.append(answer)
    return found


def _least(model: type[BaseModel]) -> dict[str, Any]:
    """A small instance of a flat model of texts and lists of texts."""
    schema = model.model_json_schema()["properties"]
    return {name: ["text"] if field["type"] == "array" else "text" for name, field in schema.items()}


def _add(schemas: dict[str, Schema], model: type[BaseModel], prefix: str) -> Schema:
    """Put a model among the components; the reference to it."""
    schema = model.model_json_schema(ref_template=COMPONENTS + "{model}")
    schemas[prefix + model.__name__] = _hoist(schema, schemas, prefix)
    return {"$ref": COMPONENTS + prefix + model.__name__}


def _hoist(schema: Schema, schemas: dict[str, Schema], prefix: str) -> Schema:
    """Move a schema's own definitions among the components, under names that begin with `prefix`."""
    definitions = schema.pop("$defs", {})
    for part in _parts([schema, *definitions.values()]):
        if "$ref" in part:
            part["$ref"] = COMPONENTS + prefix + part["$ref"].removeprefix(COMPONENTS)
    for name, definition in definitions.items():
        schemas[prefix + name] = definition
    return schema


def _parts(schemas: list[Any]) -> Iterator[Schema]:
    """Every object inside schemas, the schemas themselves included."""
    waiting = list(schemas)
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _any(schemas: list[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def error_body() -> Schema:
    """The body of every error."""
    problem = {"message": {"type": "string"}, "index": {"type": "integer"}, "field": {"type": "string"}}
    fields = {
        "code": {"type": "string"},
        "message": {"type": "string"},
        "problems": {"type": "array", "items": {"type": "object", "properties": problem, "required": ["message"]}},
        "tasks": {"type": "array", "items": {"type": "string"}},
        "request_id": {"type": "string"},
    }
    error = {"type": "object", "properties": fields, "required": ["code", "message"]}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
