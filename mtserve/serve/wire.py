"""How an API worker and the model process talk: frames of JSON over a Unix socket, nothing else.

A frame is its length (4 bytes, big-endian, at most LARGEST) and that many bytes of a JSON object in UTF-8. On a
connection, the model process speaks first:

    {"facts": …}                                                     how it computes, once it can answer
    ← {"id", "asked", "items", "timeout_s", "stream", "request_id"}  a question; ids are the asking side's
    ← {"drop": id}                                                   nobody waits for it any more
    {"id", "outputs", "usage"}                                       an answer
    {"id", "event"} …, {"id", "end": true}                           one that is read along
    {"id", "error"}                                                  or what went wrong, which ends it too

Invariants (tests/serve/test_remote.py holds them): each question gets one ending (answer, end or error) unless it was
dropped or the connection ended; questions of a connection do not wait for each other; when a connection ends, nothing
that was asked on it goes on; errors arrive as the class that they were, with all that the client is to be told.
"""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any

from mtserve.errors import InputError, MtserveError, OverloadedError, Problem

LARGEST = 2**28
HEAD = 4


def packed(frame: dict[str, Any]) -> bytes:
    """A frame's bytes. Raises ValueError for what is no JSON, or too large."""
    body = json.dumps(frame, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > LARGEST:
        raise ValueError(f"a message has {len(body)} bytes; at most {LARGEST} are possible")
    return len(body).to_bytes(HEAD, "big") + body


def length(head: bytes) -> int:
    """Of the frame that a head begins. Raises ValueError."""
    size = int.from_bytes(head, "big")
    if size > LARGEST:
        raise ValueError(f"a message of {size} bytes cannot be")
    return size


async def receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next frame. Raises IncompleteReadError where the connection ended, ValueError for what is no frame."""
    found: dict[str, Any] = json.loads(await reader.readexactly(length(await reader.readexactly(HEAD))))
    return found


def error_frame(error: MtserveError) -> dict[str, Any]:
    """An error as JSON."""
    frame: dict[str, Any] = {"code": error.code, "message": str(error)}
    if isinstance(error, InputError):
        frame["problems"] = [vars(problem) for problem in error.problems]
    if isinstance(error, OverloadedError):
        frame["retry_after_s"] = error.retry_after_s
    return frame


def error_of(frame: dict[str, Any]) -> MtserveError:
    """The error that a frame tells of."""
    message, kind = frame["message"], _classes().get(frame["code"], MtserveError)
    if kind is InputError:
        return InputError(Problem(**problem) for problem in frame["problems"])
    if kind is OverloadedError:
        return OverloadedError(message, retry_after_s=frame["retry_after_s"])
    error = kind.__new__(kind)  # their own arguments were for the message, which is made
    Exception.__init__(error, message)
    return error


@cache
def _classes() -> dict[str, type[MtserveError]]:
    """Every class of error by its code."""
    found, left = {}, [MtserveError]
    while left:
        kind = left.pop()
        found[kind.code] = kind
        left += kind.__subclasses__()
    return found
