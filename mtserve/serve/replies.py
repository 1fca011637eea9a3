"""Answers and errors as HTTP responses. The statuses come from `mtserve.errors`; knows no task."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from mtserve.errors import MtserveError, OverloadedError
from mtserve.serve.answering import Usage

RETRY_AFTER_S = 1
_MESSAGE_CHARS = 400


def answer(content: Any, usage: Usage) -> JSONResponse:
    """An answer with what it cost in headers (`X-Tokens`, `X-Total-Time-Ms`, …)."""
    headers = {"X-" + name.replace("_", "-").title(): str(value) for name, value in usage.as_dict().items()}
    return JSONResponse(content, headers=headers)


def failure(error: MtserveError, *, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error's body, `{"error": {"code", "message", …}}`, under its status."""
    message = str(error)
    content = {"error": {"code": error.code, "message": message, **error.details()}}
    extra = {"X-Error-Message": header_safe(message), **(headers or {})}
    if isinstance(error, OverloadedError):
        extra["Retry-After"] = str(RETRY_AFTER_S)
    return JSONResponse(content, status_code=error.status, headers=extra)


def internal(request_id: str) -> JSONResponse:
    """The answer to anything unexpected: tells a client nothing but what to ask the operator about."""
    message = f"internal error; the server's log has the reason under request {request_id}"
    content = {"error": {"code": MtserveError.code, "message": message, "request_id": request_id}}
    headers = {"X-Error-Message": message, "X-Request-Id": request_id}
    return JSONResponse(content, status_code=MtserveError.status, headers=headers)


def header_safe(text: str) -> str:
    """Text as a header value may hold it: Latin-1, no control characters, not too long."""
    kept = "".join(c if " " <= c <= "~" or "\u00a0" <= c <= "\u00ff" else "?" for c in text)
    return kept if len(kept) <= _MESSAGE_CHARS else kept[: _MESSAGE_CHARS - 3] + "..."
