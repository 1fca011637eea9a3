"""A task table as an OpenAPI 3.1 document: each task has its own path with its labels, schemas and example. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import mtserve
from mtserve import errors
from mtserve.chains import AnyChain
from mtserve.errors import HeadError, MtserveError
from mtserve.manifest import TASK_NAME
from mtserve.serve.admin import HEADS
from mtserve.serve.examples import chain_snippets, fenced, markdown
from mtserve.serve.schemas import STREAM, Schema, add_chain, add_task, error_body, reference
from mtserve.serve.table import ServedTask, TaskTable

ID_HEADER = {"X-Request-Id": {"description": "The request's own, or a new one.", "schema": {"type": "string"}}}
HEADERS = {
    "X-Inputs": ("integer", "Inputs that were asked about."),
    "X-Tokens": ("integer", "Tokens of all rows that were asked for."),
    "X-Truncated": ("integer", "Inputs of which some text was cut; those that chains make count too."),
    "X-Trunk-Passes": ("integer", "Trunk passes in which the request took part."),
    "X-Prepare-Time-Ms": ("number", "Time for tokenising."),
    "X-Queue-Time-Ms": ("number", "Time until the engine was free."),
    "X-Run-Time-Ms": ("number", "Time for running and decoding."),
    "X-Total-Time-Ms": ("number", "Time from the checked body to the answer."),
}


def document(table: TaskTable, *, url: str = "http://localhost:3000") -> Schema:
    """The OpenAPI document of a table; `url` is that of the server, for its examples."""
    schemas: dict[str, Schema] = {"Error": error_body()}
    paths: Schema = {}
    for served in table.tasks.values():
        add_task(schemas, served.task)
        paths[served.url] = {"post": _task_operation(served, markdown(served, url, keys=bool(table.keys)))}
    for chain in table.chains.values():
        add_chain(schemas, chain, table.members(chain))
    schemas["Predict"], schemas["Predictions"] = _predict_request(table), _predict_answer(table)
    paths["/predict"] = {"post": _predict_operation(table, url)}
    paths["/tasks"] = {
        "get": _get("Names, kinds, labels, options and metrics of all tasks, and their chains", "listing")
    }
    if table.admin_keys:
        paths[HEADS] = _admin_operations()
    paths["/livez"] = {"get": _get("Whether the process lives", "live")}
    paths["/readyz"] = {"get": _get("Whether the server takes requests", "ready")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mtserve", "version": mtserve.__version__, "summary": "One encoder, every task."},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": dict(_error_responses(admin=bool(table.admin_keys))),
            **_security_schemes(table),
        },
        **({"security": [{"bearer": []}, {"header": []}]} if table.keys else {}),
    }


def _security_schemes(table: TaskTable) -> Schema:
    if not (table.keys or table.admin_keys):
        return {}
    bearer, header = {"type": "http", "scheme": "bearer"}, {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    return {"securitySchemes": {"bearer": bearer, "header": header}}


def _task_operation(served: ServedTask, examples: str) -> Schema:
    kind = served.task.kind
    labels = ", ".join(kind.label_names(served.task.options))
    about = f"Labels: {labels}." if labels else (inspect.getdoc(inspect.getmodule(kind)) or "")
    return {
        "operationId": f"task_{served.name}",
        "tags": [kind.name],
        "summary": f"{kind.name}: {served.name}",
        "description": f"{about}\n\n{examples}",
        "requestBody": _json_body(f"{served.name}.Request", served.example()),
        "responses": _responses(f"{served.name}.Answer", streams=kind.streams),
    }


def _admin_operations() -> Schema:
    """For whoever has a key of the operator; see `mtserve.serve.admin`."""
    task = {"name": "task", "in": "path", "required": True, "schema": {"type": "string", "pattern": TASK_NAME}}
    flag: Schema = {"in": "query", "schema": {"type": "boolean", "default": False}}
    flags = [
        {"name": "replace", "description": "Whether it may take the place of a task of that name.", **flag},
        {"name": "untuned", "description": "Whether the profile in force may be one that was not measured.", **flag},
    ]
    common = {"tags": ["admin"], "security": [{"bearer": []}, {"header": []}]}
    listing: Schema = {"application/json": {"schema": {"type": "object"}}}
    errors = {s: {"$ref": f"#/components/responses/{s}"} for s, _ in _error_responses(admin=True)}
    came = {"description": "The task as GET /tasks lists it", "headers": ID_HEADER, "content": listing}
    left = {"description": "Its name, and those of the tasks that are left", "headers": ID_HEADER, "content": listing}
    return {
        "put": {
            "operationId": "put_head",
            "summary": "A head comes to the running server (`mtserve heads push`)",
            "parameters": [task, *flags],
            "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {}}}},
            "responses": {"200": came, "201": came, **errors},
            **common,
        },
        "delete": {
            "operationId": "delete_head",
            "summary": "A task leaves the running server",
            "parameters": [task],
            "responses": {"200": left, **errors},
            **common,
        },
    }


def _predict_operation(table: TaskTable, url: str) -> Schema:
    first = next(iter(table.tasks.values()))
    same = [task.name for task in table.tasks.values() if task.example() == first.example()]
    example = {"inputs": [first.example()["inputs"]], "tasks": same[:3]}
    return {
        "operationId": "predict",
        "tags": ["all tasks"],
        "summary": "The same inputs for several tasks, encoded once, and for chains of tasks",
        "description": "\n\n".join(_about(table, chain, url) for chain in table.chains.values()),
        "requestBody": _json_body("Predict", example),
        "responses": _responses("Predictions"),
    }


def _about(table: TaskTable, chain: AnyChain, url: str) -> str:
    """A chain in a sentence, and a request to it."""
    said = f"`{chain.name}` chains `{chain.first}` and `{chain.then}` by {chain.link}."
    return f"{said}\n\n{fenced(chain_snippets(chain, table.tasks[chain.first], url, keys=bool(table.keys)))}"


def _predict_request(table: TaskTable) -> Schema:
    one: list[Schema] = [{"type": "string"}, {"type": "object"}]
    parameters = {name: reference(f"{name}.Parameters") for name in [*table.tasks, *table.chains]}
    names = {"type": "string", "enum": [*table.tasks, *table.chains]}
    return {
        "type": "object",
        "properties": {
            "inputs": {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}}]},
            "tasks": {"type": "array", "items": names, "minItems": 1, "uniqueItems": True},
            "parameters": {"type": "object", "properties": parameters, "additionalProperties": False},
        },
        "required": ["inputs", "tasks"],
        "additionalProperties": False,
    }


def _predict_answer(table: TaskTable) -> Schema:
    names = [*table.tasks, *table.chains]
    outputs = {name: {"type": "array", "items": reference(f"{name}.Prediction")} for name in names}
    usage = {
        header.removeprefix("X-").replace("-", "_").lower(): {"type": kind, "minimum": 0, "description": text}
        for header, (kind, text) in HEADERS.items()
    }
    return {
        "type": "object",
        "properties": {
            "outputs": {"type": "object", "properties": outputs},
            "usage": {"type": "object", "properties": usage, "required": list(usage)},
        },
        "required": ["outputs", "usage"],
    }


def _json_body(component: str, example: Schema) -> Schema:
    content = {"schema": reference(component), "example": example}
    return {"required": True, "content": {"application/json": content}}


def _responses(component: str, *, streams: bool = False) -> Schema:
    headers = {name: {"description": text, "schema": {"type": kind}} for name, (kind, text) in HEADERS.items()}
    headers |= ID_HEADER
    content: Schema = {"application/json": {"schema": reference(component)}}
    if streams:
        content["text/event-stream"] = {"schema": {"description": STREAM}}
    answered = {"description": "The answer", "headers": headers, "content": content}
    return {"200": answered, **{s: {"$ref": f"#/components/responses/{s}"} for s, _ in _error_responses()}}


def _get(summary: str, operation: str) -> Schema:
    responses = {"200": {"description": "Yes, or the listing"}, "503": {"$ref": "#/components/responses/503"}}
    return {"operationId": operation, "tags": ["server"], "summary": summary, "responses": responses}


def _error_responses(*, admin: bool = False) -> Iterator[tuple[str, Schema]]:
    """(status, response) of every status that the error classes have, in order; of changes of heads for `admin`."""
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, MtserveError)]
    classes = [c for c in classes if admin or c is not HeadError]
    for status in sorted({c.status for c in classes}):
        codes = sorted({c.code for c in classes if c.status == status and not issubclass(c, errors.SetupError)})
        content = {"application/json": {"schema": reference("Error")}}
        yield str(status), {"description": f"Error: {', '.join(codes)}", "headers": ID_HEADER, "content": content}
