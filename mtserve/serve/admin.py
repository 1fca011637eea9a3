"""Routes by which heads come to the running server and leave it, for whoever has a key of its operator."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mtserve.errors import InputError, Problem, RequestError, UnknownRouteError
from mtserve.manifest import check_task_name
from mtserve.serve.body import read
from mtserve.serve.exchange import exchange
from mtserve.serve.keeping import home
from mtserve.serve.routing import route
from mtserve.serve.table import Changes, Root

HEADS = "/admin/heads/{task}"
FLAGS = ("replace", "untuned")


def admin_routes(root: Root) -> list[Route]:
    """They are there only where keys for them are set."""

    async def put(request: Request) -> Response:
        changes, name = _allowed(request, root), _name(request)
        asked = _flags(request.query_params)
        was_there = name in root.table().tasks
        content = await read(request, limit=root.table().settings.max_head_bytes)

        async def come() -> None:
            with tempfile.TemporaryDirectory(dir=home(), prefix="coming-") as folder:
                file = Path(folder) / "head"
                await asyncio.to_thread(file.write_bytes, content)
                await changes.put(name, file, instead=asked["replace"], untuned=asked["untuned"])

        await asyncio.shield(come())  # whoever asked may leave, but a change that has begun goes on to its end
        return JSONResponse(root.table().task(name).listing(), status_code=200 if was_there else 201)

    async def remove(request: Request) -> Response:
        changes, name = _allowed(request, root), _name(request)
        _flags(request.query_params, allowed=())
        await asyncio.shield(changes.remove(name))
        return JSONResponse({"removed": name, "tasks": list(root.table().tasks)})

    return [route("PUT", HEADS, put), route("DELETE", HEADS, remove)]


def _allowed(request: Request, root: Root) -> Changes:
    if not root.table().admin_keys or root.changes is None:
        raise UnknownRouteError(f"no route {request.url.path}; it is there where MTSERVE_ADMIN_KEYS is set")
    return root.changes


def _name(request: Request) -> str:
    name: str = request.path_params["task"]
    try:
        check_task_name(name)
    except ValueError as error:
        raise RequestError(str(error)) from error
    exchange().tasks = (name,)
    return name


def _flags(given: Mapping[str, str], *, allowed: tuple[str, ...] = FLAGS) -> dict[str, bool]:
    """Raises InputError for another one than is allowed, or one that is neither true nor false."""
    problems = [
        Problem(f"not allowed here; allowed: {', '.join(allowed) or 'none'}", field=name)
        for name in given
        if name not in allowed
    ]
    values = {"true": True, "false": False}
    wrong = [name for name in given if name in allowed and given[name] not in values]
    problems += [Problem(f"must be true or false; found {given[name]!r}", field=name) for name in wrong]
    if problems:
        raise InputError(problems)
    return {name: values[given.get(name, "false")] for name in allowed}
