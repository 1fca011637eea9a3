"""How an API worker and the model process talk: frames of JSON over a Unix socket, nothing else.

A frame is its length (4 bytes, big-endian, at most LARGEST) and that many bytes of a JSON object in UTF-8. On a
connection, the model process speaks first:

    {"facts": …}                                                     how it computes, once it can answer; then again
                                                                     after each change of its heads
    ← {"at", "oldest"}                                               the numbers of the table that a worker has, and of
                                                                     the first that its requests may still hold
    ← {"id", "asked", "items", "timeout_s", "stream", "private", "request_id"}
                                                                     a question; ids are the asking side's
    ← {"drop": id}                                                   nobody waits for it any more
    {"id", "outputs", "usage"}                                       an answer
    {"id", "event"} …, {"id", "end": true}                           one that is read along
    {"id", "error"}                                                  or what went wrong, which ends it too
    ← {"id", "change": {"task", "file", "instead", "untuned"}}       a head comes, or with file null leaves; its end
                                                                     comes when every worker has said that it knows

Invariants (tests/serve/test_remote.py holds them): each question gets one ending (answer, end or error) unless it was
dropped or the connection ended; questions of a connection do not wait for each other; when a connection ends, nothing
that was asked on it goes on; errors arrive as the class that they were, with all that the client is to be told.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

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
