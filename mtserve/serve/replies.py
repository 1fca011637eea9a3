"""Answers and errors as HTTP responses. The statuses come from `mtserve.errors`; knows no task."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mtserve.errors import MtserveError, OverloadedError, UnauthorizedError
from mtserve.serve.exchange import exchange
from mtserve.serve.model import Usage

_MESSAGE_CHARS = 400


def answer(content: Any, usage: Usage) -> JSONResponse:
    """An answer with what it cost in headers (`X-Tokens`, `X-Total-Time-Ms`, …)."""
    headers = {"X-" + name.replace("_", "-").title(): str(value) for name, value in usage.as_dict().items()}
    return JSONResponse(content, headers=headers)


class EventStream(StreamingResponse):
    """Server-sent events (WHATWG HTML, section 9.2): one `data:` line of JSON each; an error is the last one.

    The source is closed when the response ends, be it because the client left.
    """

    def __init__(self, first: Any, more: AsyncGenerator[Any, None], *, failed: Callable[[Exception], Response]) -> None:
        self._more, self._failed = more, failed
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter: nginx is not to collect it
        super().__init__(self._lines(first), media_type="text/event-stream", headers=headers)

    async def _lines(self, first: Any) -> AsyncIterator[bytes]:
        try:
            yield _data(_json(first))
            async for event in self._more:
                yield _data(_json(event))
        except Exception as error:  # as for any response, but its start is sent
            yield _data(bytes(self._failed(error).body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._more):
            await super().__call__(scope, receive, send)


def _json(event: Any) -> bytes:
    return json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _data(line: bytes) -> bytes:
    return b"data: " + line + b"\n\n"


def failure(error: MtserveError, *, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error's body, `{"error": {"code", "message", …}}`, under its status."""
    message = str(error)
    now = exchange()
    now.code = error.code
    told = {"code": error.code, "message": message, **error.details(), "request_id": now.request_id}
    content = {"error": message if now.plain else told}
    extra = {"X-Error-Message": header_safe(message), **(headers or {})}
    if isinstance(error, UnauthorizedError):
        extra.setdefault("WWW-Authenticate", "Bearer")
    if isinstance(error, OverloadedError):
        extra["Retry-After"] = str(error.retry_after_s)
    return JSONResponse(content, status_code=error.status, headers=extra)


def internal() -> JSONResponse:
    """The answer to anything unexpected: tells a client nothing but what to ask the operator about."""
    return failure(MtserveError(f"internal error; the server's log has the reason under {exchange().request_id}"))


def header_safe(text: str) -> str:
    """Text as a header value may hold it: Latin-1, no control characters, not too long."""
    kept = "".join(c if " " <= c <= "~" or "\u00a0" <= c <= "\u00ff" else "?" for c in text)
    return kept if len(kept) <= _MESSAGE_CHARS else kept[: _MESSAGE_CHARS - 3] + "..."
