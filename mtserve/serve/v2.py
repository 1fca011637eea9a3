"""Routes of the Open Inference Protocol: every task is a model of version 1. What goes in and out: `tensors.py`."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import mtserve
from mtserve.errors import RequestError, UnknownRouteError
from mtserve.serve.answering import answer_items
from mtserve.serve.body import check_object, parse, read
from mtserve.serve.exchange import exchange
from mtserve.serve.routing import route, while_connected
from mtserve.serve.table import Root, ServedTask, TaskTable
from mtserve.serve.tensors import inputs_of, outputs_of, read_request, write_answer

VERSION = "1"
FIELDS = ("inputs", "parameters", "outputs", "id")
_HEAD = "inference-header-content-length"


def v2_routes(root: Root) -> list[Route]:
    """All that the protocol asks of a server that takes requests over REST."""

    async def server(request: Request) -> Response:
        extensions = ["binary_tensor_data"]
        return JSONResponse({"name": "mtserve", "version": mtserve.__version__, "extensions": extensions})

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        await root.check()
        return JSONResponse({"ready": True})

    async def model(request: Request) -> Response:
        task = _model(request, root.table()).task
        inputs, outputs = ([one.as_dict() for one in of(task)] for of in (inputs_of, outputs_of))
        platform = f"mtserve_{task.kind.name}"
        about = {"name": task.name, "versions": [VERSION], "platform": platform}
        return JSONResponse({**about, "inputs": inputs, "outputs": outputs})

    async def model_ready(request: Request) -> Response:
        name = _model(request, root.table()).name
        await root.check()
        return JSONResponse({"name": name, "ready": True})

    async def infer(request: Request) -> Response:
        return await _inferred(request, root.table())

    found = [
        route("GET", "/v2", server),
        route("GET", "/v2/health/live", live),
        route("GET", "/v2/health/ready", ready),
    ]
    for path in ("/v2/models/{task}", "/v2/models/{task}/versions/{version}"):
        found += [
            route("GET", path, model),
            route("GET", path + "/ready", model_ready),
            route("POST", path + "/infer", infer),
        ]
    return found


async def _inferred(request: Request, table: TaskTable) -> Response:
    served = _model(request, table)
    exchange().tasks = (served.name,)
    table.model.refuse(served.key)
    content = await read(request, limit=table.settings.max_body_bytes)
    head = _head_length(request, content)
    body = check_object(parse(content[:head]), table.settings, fields=FIELDS)
    asked = read_request(body, content[head:], served.task)
    check_object({"inputs": asked.items}, table.settings, fields=("inputs",))  # texts that came as binary
    if table.settings.log_texts:
        exchange().inputs = asked.items
    predictions, usage = await while_connected(request, answer_items(table, served, asked.items, asked.parameters))
    said, behind = write_answer(asked, served.task, predictions)
    headers = {"X-Tokens": str(usage.as_dict()["tokens"])}
    if not behind:
        return JSONResponse(said, headers=headers)
    begin = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    headers["Inference-Header-Content-Length"] = str(len(begin))
    return Response(begin + behind, media_type="application/octet-stream", headers=headers)


def _head_length(request: Request, content: bytes) -> int:
    """How much of a body is JSON; the rest are binary tensors. Raises RequestError."""
    given: Any = request.headers.get(_HEAD)
    if given is None:
        return len(content)
    if not given.isdecimal() or int(given) > len(content):
        raise RequestError(f"Inference-Header-Content-Length is {given!r:.40}; the body has {len(content)} bytes")
    return int(given)


def _model(request: Request, table: TaskTable) -> ServedTask:
    """Raises UnknownTaskError, and UnknownRouteError for a version that there is not."""
    found = table.task(request.path_params["task"])
    if (version := request.path_params.get("version", VERSION)) != VERSION:
        raise UnknownRouteError(f"model {found.name!r} has no version {version!r:.40}; its only one is {VERSION}")
    return found
