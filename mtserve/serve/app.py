"""The routes as a Starlette app over a root that may change while it serves. Knows no BentoML."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles

from mtserve.errors import CapacityError, MethodError, NotFiniteError, RequestError, UnknownRouteError
from mtserve.serve import replies
from mtserve.serve.answering import answer_task, answer_tasks, stream_task
from mtserve.serve.body import read_object
from mtserve.serve.docs_page import PAGE
from mtserve.serve.exchange import exchange
from mtserve.serve.metrics import exposition
from mtserve.serve.openapi import document
from mtserve.serve.spans import record
from mtserve.serve.table import Root, TaskTable

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")
TASK_FIELDS = ("inputs", "parameters", "stream")
PREDICT_FIELDS = ("inputs", "tasks", "parameters")
logger = logging.getLogger(__name__)


def make_app(root: Root, *, assets: Path) -> Starlette:
    """All routes; `assets` is a folder with the files of Swagger UI."""

    async def openapi(request: Request) -> Response:
        return JSONResponse(document(root.table()))

    async def ready(request: Request) -> Response:
        await root.check()
        return PlainTextResponse("\n")

    async def tasks(request: Request) -> Response:
        return JSONResponse(root.table().listing())

    async def one_task(request: Request) -> Response:
        return await _answered(request, root.table())

    async def predict(request: Request) -> Response:
        table = root.table()
        body = await read_object(request, table.settings, fields=PREDICT_FIELDS)
        _note_inputs(table, body)
        asked = answer_tasks(
            table, inputs=body["inputs"], tasks=body.get("tasks"), parameters=body.get("parameters", {})
        )
        outputs, usage = await _while_connected(request, asked)
        return replies.answer({"outputs": outputs, "usage": usage.as_dict()}, usage)

    routes: list[Route | Mount] = [
        _route("GET", "/", _to_docs),
        _route("GET", "/docs", _docs),
        Mount("/docs/assets", StaticFiles(directory=assets)),
        _route("GET", "/openapi.json", openapi),
        _route("GET", "/livez", _live),
        _route("GET", "/readyz", ready),
        _route("GET", "/metrics", _metrics),
        _route("GET", "/tasks", tasks),
        _route("POST", "/tasks/{task}", one_task),
        _route("POST", "/predict", predict),
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


async def _to_docs(request: Request) -> Response:
    return RedirectResponse("docs")


async def _docs(request: Request) -> Response:
    return HTMLResponse(PAGE)


async def _live(request: Request) -> Response:
    return PlainTextResponse("\n")


async def _metrics(request: Request) -> Response:
    return Response(*exposition())


def _route(method: str, path: str, endpoint: Endpoint) -> Route:
    return Route(path, _guarded(endpoint, path), methods=[method])


def _guarded(endpoint: Endpoint, route: str = "") -> Endpoint:
    """The one place where exceptions become responses; a client sees the text of our own errors only."""

    @wraps(endpoint)
    async def inner(request: Request) -> Response:
        exchange().route = route
        try:
            answer = await endpoint(request)
            record(exchange())
            return answer
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; the access log shows it, as other servers do
        except Exception as error:
            return _failed(request, error)

    return inner


def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, (RequestError, CapacityError, NotFiniteError)):
        return replies.failure(error)
    found = exchange().request_id, request.method, request.url.path
    logger.error("request %s: %s %s failed", *found, exc_info=error)
    return replies.internal()


async def _answered(request: Request, table: TaskTable) -> Response:
    """The answer of one task, whole or as a stream."""
    served = table.task(request.path_params["task"])
    exchange().tasks = (served.name,)
    table.model.refuse(served.name)
    body = await read_object(request, table.settings, fields=TASK_FIELDS)
    _note_inputs(table, body)
    asked = (table, served, body["inputs"], body.get("parameters", {}))
    if not body.get("stream"):
        return replies.answer(*await _while_connected(request, answer_task(*asked)))
    events = stream_task(*asked)
    first = await _while_connected(request, anext(events))  # until then, an error is an ordinary response
    return replies.EventStream(first, events, failed=partial(_failed, request))


def _note_inputs(table: TaskTable, body: Mapping[str, Any]) -> None:
    if table.settings.log_texts:
        exchange().inputs = body["inputs"]


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
