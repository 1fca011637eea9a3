"""A request's bytes to a checked JSON object. Knows no task.

Refused here, before anything of it is used: what is larger than the limits, what is not JSON (NaN, Infinity and
numbers beyond a double included), strings that are no valid Unicode, and fields that the route does not have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from typing import Any

from starlette.requests import Request

from mtserve.errors import InputError, Problem, RequestError, TooLargeError
from mtserve.settings import Settings


async def read_object(request: Request, settings: Settings, *, fields: Collection[str]) -> dict[str, Any]:
    """The JSON object in a request's body. Raises TooLargeError, RequestError (not JSON) or InputError."""
    return check_object(parse(await read(request, limit=settings.max_body_bytes)), settings, fields=fields)


async def read(request: Request, *, limit: int) -> bytes:
    """The body, read in chunks: neither a false content-length nor a missing one lets more than `limit` bytes in."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def parse(body: bytes) -> Any:
    """JSON by RFC 8259. Raises RequestError with what is wrong."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_constant, parse_float=_number)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} cannot be read") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def check_object(value: Any, settings: Settings, *, fields: Collection[str]) -> dict[str, Any]:
    """An object with no other fields than these, and no string over the limits. Raises as `read_object`."""
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object with {', '.join(fields)}")
    for text in _strings(value):
        if len(text) > settings.max_text_chars:
            raise TooLargeError(f"a text has {len(text)} characters; at most {settings.max_text_chars} are allowed")
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise InputError("a text holds half of a surrogate pair, which is no Unicode character")
    allowed = ", ".join(fields)
    problems = [Problem(f"not allowed here; allowed: {allowed}", field=name) for name in value if name not in fields]
    if "inputs" not in value:
        problems.append(Problem("is missing", field="inputs"))
    if not isinstance(value.get("parameters", {}), dict):
        problems.append(Problem("must be an object", field="parameters"))
    if not isinstance(value.get("stream"), bool | None):
        problems.append(Problem("must be true or false", field="stream"))
    if problems:
        raise InputError(problems)
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, names of fields included."""
    open_values = [value]
    while open_values:
        current = open_values.pop()
        if isinstance(current, str):
            yield current
        elif isinstance(current, dict):
            open_values += current
            open_values += current.values()
        elif isinstance(current, list):
            open_values += current


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is beyond the range of a number")
    return number


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the body is larger than {limit} bytes")
