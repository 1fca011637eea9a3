"""What every route has around it: exceptions become responses, and whoever has left is waited for no longer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mtserve.errors import CapacityError, NotFiniteError, RequestError
from mtserve.serve import replies
from mtserve.serve.exchange import exchange
from mtserve.serve.spans import record

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")
logger = logging.getLogger(__name__)


def route(method: str, path: str, endpoint: Endpoint) -> Route:
    return Route(path, guarded(endpoint, path), methods=[method])


def guarded(endpoint: Endpoint, path: str = "") -> Endpoint:
    """The one place where exceptions become responses; a client sees the text of our own errors only."""

    @wraps(endpoint)
    async def inner(request: Request) -> Response:
        exchange().route = path
        try:
            answer = await endpoint(request)
            record(exchange())
            return answer
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; the access log shows it, as other servers do
        except Exception as error:
            return failed(request, error)

    return inner


def failed(request: Request, error: Exception) -> Response:
    if isinstance(error, (RequestError, CapacityError, NotFiniteError)):
        return replies.failure(error)
    found = exchange().request_id, request.method, request.url.path
    logger.error("request %s: %s %s failed", *found, exc_info=error)
    return replies.internal()


async def while_connected(request: Request, answer: Awaitable[T]) -> T:
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
