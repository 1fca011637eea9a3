"""The routes as a Starlette app over a root that may change while it serves. Knows no BentoML."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles

from mtserve.errors import MethodError, MtserveError, UnknownRouteError
from mtserve.serve import replies
from mtserve.serve.answering import answer_task, answer_tasks, stream_task
from mtserve.serve.body import read_object
from mtserve.serve.docs_page import PAGE
from mtserve.serve.openapi import document
from mtserve.serve.table import Root, TaskTable

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")
TASK_FIELDS = ("inputs", "parameters", "stream")
PREDICT_FIELDS = ("inputs", "tasks", "parameters")
logger = logging.getLogger(__name__)


def make_app(root: Root, *, assets: Path) -> Starlette:
    """All routes; `assets` is a folder with the files of Swagger UI."""

    async def to_docs(request: Request) -> Response:
        return RedirectResponse("docs")

    async def docs(request: Request) -> Response:
        return HTMLResponse(PAGE)

    async def openapi(request: Request) -> Response:
        return JSONResponse(document(root.table()))

    async def live(request: Request) -> Response:
        return PlainTextResponse("\n")

    async def ready(request: Request) -> Response:
        root.ready_table()
        return PlainTextResponse("\n")

    async def tasks(request: Request) -> Response:
        return JSONResponse(root.table().listing())

    async def one_task(request: Request) -> Response:
        return await _answered(request, root.ready_table())

    async def predict(request: Request) -> Response:
        table = root.ready_table()
        body = await read_object(request, table.settings, fields=PREDICT_FIELDS)
        asked = answer_tasks(
            table, inputs=body["inputs"], tasks=body.get("tasks"), parameters=body.get("parameters", {})
        )
        outputs, usage = await _while_connected(request, asked)
        return replies.answer({"outputs": outputs, "usage": usage.as_dict()}, usage)

    routes: list[Route | Mount] = [
        Route("/", _guarded(to_docs), methods=["GET"]),
        Route("/docs", _guarded(docs), methods=["GET"]),
        Mount("/docs/assets", StaticFiles(directory=assets)),
        Route("/openapi.json", _guarded(openapi), methods=["GET"]),
        Route("/livez", _guarded(live), methods=["GET"]),
        Route("/readyz", _guarded(ready), methods=["GET"]),
        Route("/tasks", _guarded(tasks), methods=["GET"]),
        Route("/tasks/{task}", _guarded(one_task), methods=["POST"]),
        Route("/predict", _guarded(predict), methods=["POST"]),
    ]

    async def other(request: Request) -> Response:
        """Whatever no route takes: another method of a known path, or an unknown path."""
        for route in routes:
            if isinstance(route, Route) and route.matches(request.scope)[0] is Match.PARTIAL:
                allowed = ", ".join(sorted(route.methods or ()))
                error = MethodError(f"{request.method} is not possible here; allowed: {allowed}")
                return replies.failure(error, headers={"Allow": allowed})
        raise UnknownRouteError(f"no route {request.url.path}; GET /tasks lists the tasks, /docs shows all routes")

    everything = Route("/{path:path}", _guarded(other))
    everything.methods = None  # all of them
    return Starlette(routes=[*routes, everything], exception_handlers={HTTPException: _asset_failure})


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The one place where exceptions become responses; a client sees the text of our own errors only."""

    @wraps(endpoint)
    async def inner(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; the access log shows it, as other servers do
        except Exception as error:
            return _failed(request, error)

    return inner


def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, MtserveError) and error.status != MtserveError.status:
        return replies.failure(error)
    request_id = uuid.uuid4().hex[:16]
    logger.error("request %s: %s %s failed", request_id, request.method, request.url.path, exc_info=error)
    return replies.internal(request_id)


async def _answered(request: Request, table: TaskTable) -> Response:
    """The answer of one task, whole or as a stream."""
    served = table.task(request.path_params["task"])
    body = await read_object(request, table.settings, fields=TASK_FIELDS)
    asked = (table, served, body["inputs"], body.get("parameters", {}))
    if not body.get("stream"):
        return replies.answer(*await _while_connected(request, answer_task(*asked)))
    events = stream_task(*asked)
    first = await _while_connected(request, anext(events))  # until then, an error is an ordinary response
    return replies.EventStream(first, events, failed=partial(_failed, request))


async def _while_connected(request: Request, answer: Awaitable[T]) -> T:
    """Await an answer, but cancel it when the client goes away. Raises ClientDisconnect then."""
    asked = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return asked.result()
        raise ClientDisconnect
    finally:
        asked.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _asset_failure(request: Request, error: Exception) -> Response:
    return replies.failure(UnknownRouteError(f"no route {request.url.path}"))
