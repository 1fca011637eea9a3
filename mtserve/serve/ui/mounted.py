"""The playground as an ASGI app under /ui: what of Gradio is let through, and in what it is wrapped. Knows no task.

Gradio's app has routes for files, uploads, proxies, logins and more, none of which this page needs. So only the paths
of `_OPEN` reach it; all others are unknown here. Bodies are read under the server's own limit, and an answer that
nobody waits for is given up. A header tells browsers to load nothing from elsewhere; no other page may frame this one
or ask in its name.
"""

from __future__ import annotations

import asyncio
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtserve.errors import MethodError, MtserveError, RequestError, UnknownRouteError
from mtserve.serve import replies
from mtserve.serve.body import read
from mtserve.serve.exchange import exchange
from mtserve.serve.routing import while_connected
from mtserve.serve.table import Root
from mtserve.serve.ui import PATH
from mtserve.serve.ui.style import STYLE

_OPEN = re.compile(
    r"/|/config|/theme\.css|/(assets|static|svelte)/[\w./-]+|/gradio_api/(run/predict|queue/join|queue/data|cancel|reset)"
)
_ASKING = frozenset(f"/gradio_api/{name}" for name in ("run/predict", "queue/join", "cancel", "reset"))
_SESSIONS = 200  # of which Gradio keeps what it changed in their pages
_MANIFEST, _ICON = re.compile(rb'<link rel="manifest"[^>]*>'), b'<link rel="icon" href="data:,">'
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


class Playground:
    """An ASGI app for /ui and what is below. Gradio is imported by `open`, or else by the first request."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._app: Any = None
        self._page: Any = None
        self._started = False

    def open(self, *, streams: bool = True) -> None:
        """Make the page; `streams` is whether one process serves all of a visitor's requests."""
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "True"
        with ThreadPoolExecutor(1) as apart:  # where no event loop runs, Gradio would leave one behind
            apart.submit(asyncio.run, self._make(streams=streams)).result()

    async def _make(self, *, streams: bool) -> None:
        import gradio
        from fastapi import FastAPI

        from mtserve.serve.ui.page import make_page

        page = make_page(self._root, streams=streams).queue(default_concurrency_limit=None)
        page.state_session_capacity = _SESSIONS
        self._app, self._page = FastAPI(openapi_url=None), page
        off: dict[str, Any] = {"run_history": False, "mcp_server": False, "ssr_mode": False, "enable_monitoring": False}
        look: dict[str, Any] = {"css": STYLE, "theme": _theme(), "footer_links": []}
        gradio.mount_gradio_app(self._app, page, path=PATH, show_error=False, **look, **off)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange().route = PATH
        path = scope["path"].removeprefix(PATH)
        if not path:
            await RedirectResponse(PATH.removeprefix("/") + "/")(scope, receive, send)
            return
        try:
            _check(scope, path)
            receive = await self._limited(scope, receive)
        except MtserveError as error:
            await replies.failure(error)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        dropped = {b"origin", b"accept-encoding" if path == "/" else b""}  # CORS is off; the page is to be read here
        scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name not in dropped]}
        how = {"/": _rewritten, "/gradio_api/run/predict": _while_connected}.get(path, _plainly)
        await how(await self._ready(), scope, receive, _guarded(send))

    async def _ready(self) -> Any:
        """Gradio's app, with the queue that it starts in the event loop."""
        if self._app is None:
            self.open()
        if not self._started:
            self._started = True
            self._page.run_startup_events()
            await self._page.run_extra_startup_events()
        return self._app

    async def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """What gives the request's body again, read whole. Raises TooLargeError."""
        if scope["method"] != "POST":
            return receive
        held = [await read(Request(scope, receive), limit=self._root.table().settings.max_body_bytes)]

        async def again() -> Message:
            return {"type": "http.request", "body": held.pop()} if held else await receive()

        return again


def _check(scope: Scope, path: str) -> None:
    """Raise RequestError (a kind of it) for what the page does not ask. What other pages may send here without being
    asked by the browser first is no JSON, so they can send nothing."""
    if not _OPEN.fullmatch(path) or ".." in path:
        raise UnknownRouteError(f"no route {scope['path']}")
    allowed = ("POST",) if path in _ASKING else ("GET", "HEAD")
    if scope["method"] not in allowed:
        raise MethodError(f"{scope['method']} is not possible here; allowed: {', '.join(allowed)}")
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    if path in _ASKING and kind != "application/json":
        raise RequestError(f"the body must be application/json; found {kind or 'no type'}")


async def _plainly(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


async def _while_connected(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Give up what is asked when the browser leaves; only we listen for that."""
    body = await receive()

    async def once() -> Message:
        nonlocal body
        found, body = body, {}
        return found or await asyncio.get_running_loop().create_future()

    with suppress(ClientDisconnect):
        await while_connected(Request(scope, receive), app(scope, once, send))


async def _rewritten(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """The page without its link to a manifest at the root of the host, which is not its own; and with an empty icon,
    since browsers look for one there too."""
    start: Message = {}
    parts: list[bytes] = []

    async def held(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        if message["type"] != "http.response.body":
            return
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            page = _MANIFEST.sub(_ICON, b"".join(parts))
            MutableHeaders(raw=start["headers"])["Content-Length"] = str(len(page))
            await send(start)
            await send({"type": "http.response.body", "body": page})

    await app(scope, receive, held)


def _guarded(send: Send) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = _POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "same-origin"
        await send(message)

    return told


def _theme() -> Any:
    """Fonts of the reader's own system, since those of the web are elsewhere."""
    from gradio.themes import Default

    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    return Default(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono)
