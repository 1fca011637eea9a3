"""The routes as a Starlette app over a root that may change while it serves. Knows no BentoML."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from mtserve.errors import MethodError, UnknownRouteError
from mtserve.serve import replies
from mtserve.serve.admin import admin_routes
from mtserve.serve.answering import answer_task, answer_tasks, note_inputs, stream_task
from mtserve.serve.body import read_object
from mtserve.serve.docs_page import PAGE
from mtserve.serve.exchange import exchange
from mtserve.serve.metrics import exposition
from mtserve.serve.openapi import document
from mtserve.serve.routing import failed, guarded, route, while_connected
from mtserve.serve.table import Root, TaskTable
from mtserve.serve.v2 import v2_routes

TASK_FIELDS = ("inputs", "parameters", "stream")
PREDICT_FIELDS = ("inputs", "tasks", "parameters")


def make_app(root: Root, *, assets: Path, playground: ASGIApp | None = None) -> Starlette:
    """All routes; `assets` is a folder with the files of Swagger UI, `playground` what answers under /ui, if any."""

    async def openapi(request: Request) -> Response:
        return JSONResponse(document(root.table(), url=str(request.base_url).rstrip("/")))

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
        note_inputs(table, body)
        asked = answer_tasks(
            table, inputs=body["inputs"], tasks=body.get("tasks"), parameters=body.get("parameters", {})
        )
        outputs, usage = await while_connected(request, asked)
        return replies.answer({"outputs": outputs, "usage": usage.as_dict()}, usage)

    routes: list[Route | Mount] = [
        route("GET", "/", _to_docs),
        route("GET", "/docs", _docs),
        Mount("/docs/assets", StaticFiles(directory=assets)),
        route("GET", "/openapi.json", openapi),
        route("GET", "/livez", _live),
        route("GET", "/readyz", ready),
        route("GET", "/metrics", _metrics),
        route("GET", "/tasks", tasks),
        route("POST", "/tasks/{task}", one_task),
        route("POST", "/predict", predict),
        *v2_routes(root),
        *admin_routes(root),
    ]
    if playground is not None:
        routes += [Route("/ui", playground), Route("/ui/{path:path}", playground)]

    async def other(request: Request) -> Response:
        """Whatever no route takes: another method of a known path, or an unknown path."""
        for one in routes:
            if isinstance(one, Route) and one.matches(request.scope)[0] is Match.PARTIAL:
                allowed = ", ".join(sorted(one.methods or ()))
                error = MethodError(f"{request.method} is not possible here; allowed: {allowed}")
                return replies.failure(error, headers={"Allow": allowed})
        raise UnknownRouteError(f"no route {request.url.path}; GET /tasks lists the tasks, /docs shows all routes")

    everything = Route("/{path:path}", guarded(other))
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


async def _answered(request: Request, table: TaskTable) -> Response:
    """The answer of one task, whole or as a stream."""
    served = table.task(request.path_params["task"])
    exchange().tasks = (served.name,)
    table.model.refuse(served.key)
    body = await read_object(request, table.settings, fields=TASK_FIELDS)
    note_inputs(table, body)
    asked = (table, served, body["inputs"], body.get("parameters", {}))
    if not body.get("stream"):
        return replies.answer(*await while_connected(request, answer_task(*asked)))
    events = stream_task(*asked)
    first = await while_connected(request, anext(events))  # until then, an error is an ordinary response
    return replies.EventStream(first, events, failed=partial(failed, request))


async def _asset_failure(request: Request, error: Exception) -> Response:
    return replies.failure(UnknownRouteError(f"no route {request.url.path}"))
