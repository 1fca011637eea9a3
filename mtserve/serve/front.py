"""What every request passes first, whatever its route: an ASGI app around the whole service. Knows no task.

In order: an id; for all but the probes an API key, where keys are set (so a route that is added later needs one too),
under /admin a key of its own, and on the playground's paths also as the password of HTTP Basic, since a browser can
send no other; no new request while the server drains. On the way out: the id as a header, a line of the access log,
metrics and spans.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtserve.errors import MtserveError, UnauthorizedError
from mtserve.serve import replies
from mtserve.serve.access import access
from mtserve.serve.exchange import Exchange, opened
from mtserve.serve.keys import password
from mtserve.serve.table import Root
from mtserve.serve.ui import PATH

PROBES = frozenset({"/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"})
ADMIN = "/admin/"
STRAIGHT = ("/predict", "/tasks", "/v2", ADMIN, PATH)
METRICS = "/metrics"
BASIC = {"WWW-Authenticate": 'Basic realm="mtserve", charset="UTF-8"'}


class Front:
    """`ended(exchange, status=…, seconds=…)` is told of every request but the probes'. `routes`, if given, get the
    requests of tasks straight away, past whatever `app` does around them."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        root: Root,
        ended: Callable[..., None] | None = None,
        routes: ASGIApp | None = None,
    ) -> None:
        self._app, self._root, self._ended = app, root, ended
        self._routes = routes or app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            attending = asyncio.create_task(self._root.attended())
            try:
                await self._app(scope, receive, send)
            finally:
                attending.cancel()
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # there are no routes for web sockets, and what is unknown does not come in
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        exchange = opened(headers.get("x-request-id", ""))
        path, began = scope["path"], time.perf_counter()
        exchange.plain = path.startswith("/v2")
        exchange.private = "no-store" in headers.get("cache-control", "").lower()  # RFC 9111, section 5.2.1.5
        status, sent = 499, 0  # nobody is there any more, unless an answer begins

        async def told(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.request_id
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        try:
            with self._root.entered():
                try:
                    self._admit(path, headers)
                except MtserveError as error:
                    keyless = isinstance(error, UnauthorizedError) and self._for_browsers(path)
                    await replies.failure(error, headers=BASIC if keyless else None)(scope, receive, told)
                else:
                    app = self._routes if path.startswith(STRAIGHT) else self._app
                    await app(scope, receive, told)
        except Exception:
            status = 500
            raise
        finally:
            if path not in PROBES:
                self._end(scope, exchange, status=status, sent=sent, seconds=time.perf_counter() - began)

    def _admit(self, path: str, headers: Headers) -> None:
        """Raise UnauthorizedError, or CapacityError while nothing is loaded or the server drains."""
        if path in PROBES:
            return
        table = self._root.table()
        if path.startswith(ADMIN) and table.admin_keys:
            table.admin_keys.check(headers.get("authorization"), headers.get("x-api-key"))
        elif not (path == METRICS and table.settings.open_metrics):
            given = headers.get("authorization")
            typed = password(given) if self._for_browsers(path) else None
            table.keys.check(given, typed or headers.get("x-api-key"))
        if path != METRICS:
            self._root.drain.refuse()

    def _for_browsers(self, path: str) -> bool:
        """Whether a key may come as a password that a browser asked for: on the playground's paths alone."""
        return self._root.table().settings.ui and (path == PATH or path.startswith(PATH + "/"))

    def _end(self, scope: Scope, exchange: Exchange, *, status: int, sent: int, seconds: float) -> None:
        if self._ended is not None:
            self._ended(exchange, status=status, seconds=seconds)
        if access.isEnabledFor(logging.INFO):
            access.info("%s", json.dumps(_line(scope, exchange, status, sent, seconds), ensure_ascii=False))


def _line(scope: Scope, exchange: Exchange, status: int, sent: int, seconds: float) -> dict[str, Any]:
    """What the access log says of a request: no header and no text, unless texts are asked for."""
    now, client = time.time(), scope.get("client")
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z",
        "request_id": exchange.request_id,
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "route": exchange.route,
        "status": status,
        "code": exchange.code or None,
        "tasks": list(exchange.tasks),
        "bytes": sent,
        "ms": round(seconds * 1000, 2),
        **exchange.usage,
    }
    return line if exchange.inputs is None else {**line, "inputs": exchange.inputs}
