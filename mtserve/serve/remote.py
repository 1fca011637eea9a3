"""The model of another process, which several API workers share: connecting, asking, giving up. Knows no HTTP.

One connection has all questions of a worker. When it ends, because the process did, those under way fail with
CapacityError, and so do new ones until the process is there again (`mtserve.serve.keeping` starts it).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from mtserve.errors import CapacityError, SetupError, of_frame
from mtserve.serve.exchange import exchange
from mtserve.serve.model import Asked, Usage
from mtserve.serve.wire import HEAD, length, packed, receive
from mtserve.ticket import late

Facts = Mapping[str, Any]
MARGIN_S = 2.0
"""By how much we wait longer than the process takes, whose own deadline comes first unless it hangs."""
_PAUSE_S = 0.1
_CHANGE_S = 300.0


def wait_for_facts(path: str) -> Facts:
    """What a model process says of itself, once it listens. Raises SetupError when the parent of this process ends."""
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.connect(path)
                stream = made.makefile("rb")
                facts: Facts = json.loads(stream.read(length(stream.read(HEAD))))["facts"]
                return facts
        except (OSError, ValueError):  # not yet, or it ended meanwhile
            time.sleep(_PAUSE_S)
    raise SetupError("the server ended before its model process was there")


class RemoteModel:
    """Asks the process that listens at `path`; it must say the same `facts` of itself each time it is started, but for
    heads that came and left. `told` is given the facts when those have changed."""

    def __init__(self, path: str, facts: Facts) -> None:
        self._path, self._facts = path, facts
        self._oldest = self._number
        self.told: Callable[[Facts], None] = lambda facts: None
        self._ids = itertools.count()
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None

    async def predict(
        self, asked: Asked, items: Sequence[Any], *, timeout_s: float, private: bool = False
    ) -> tuple[dict[str, list[Any]], Usage]:
        async with self._answers(asked, items, timeout_s=timeout_s, stream=False, private=private) as answers:
            answer = await _next(answers, timeout_s)
        return answer["outputs"], Usage(**answer["usage"])

    async def stream(self, asked: Asked, items: Sequence[Any], *, timeout_s: float) -> AsyncGenerator[Any, None]:
        end = time.monotonic() + timeout_s
        async with self._answers(asked, items, timeout_s=timeout_s, stream=True) as answers:
            while "end" not in (answer := await _next(answers, end - time.monotonic())):
                yield answer["event"]

    async def put(self, name: str, file: Path, *, instead: bool = False, untuned: bool = False) -> None:
        """Bring a head to the process, which reads the file. Raises as `mtserve.serve.living.Living.put`."""
        await self._change({"task": name, "file": str(file), "instead": instead, "untuned": untuned})

    async def remove(self, name: str) -> None:
        """Raises as `mtserve.serve.living.Living.remove`."""
        await self._change({"task": name, "file": None, "instead": False, "untuned": False})

    async def attend(self) -> None:
        """Stay connected, so that changes are heard of."""
        while True:
            with suppress(CapacityError):
                await (await self._connected()).over.wait()
            await asyncio.sleep(_PAUSE_S)

    def using(self, oldest: int) -> None:
        """Tell the process from which table on, by number, requests here may hold one."""
        self._oldest = oldest
        if self._connection is not None and not self._connection.ended:
            self._connection.write({"at": self._number, "oldest": oldest})

    def refuse(self, task: str) -> None:
        """Only the process knows."""

    async def check(self) -> None:
        await self._connected()

    def close(self) -> None:
        """Nothing is accepted here, so nothing is left to answer; the connection ends with the process."""

    @property
    def _number(self) -> int:
        return int(self._facts["live"]["number"])

    async def _change(self, change: dict[str, Any]) -> None:
        connection, number = await self._connected(), next(self._ids)
        question = {"id": number, "change": change, "request_id": exchange().request_id}
        async with connection.asked(number, question) as answers:
            await _next(answers, _CHANGE_S)

    def _heard(self, facts: Facts) -> None:
        """What the process says of itself, at first or after a change."""
        if facts["live"] != self._facts["live"]:
            self._facts = facts
            self.told(facts)
        self.using(self._oldest)

    @asynccontextmanager
    async def _answers(
        self, asked: Asked, items: Sequence[Any], *, timeout_s: float, stream: bool, private: bool = False
    ) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
        """What comes for one question; it is dropped when nobody reads its answer to the end."""
        connection, number = await self._connected(), next(self._ids)
        question = {"id": number, "asked": asked, "items": items, "timeout_s": timeout_s, "stream": stream}
        question |= {"private": private, "request_id": exchange().request_id}
        async with connection.asked(number, question) as answers:
            yield answers

    async def _connected(self) -> _Connection:
        """The connection, made if there is none. Raises CapacityError."""
        async with self._connecting:
            if self._connection is None or self._connection.ended:
                self._connection = None
                try:
                    reader, writer = await asyncio.open_unix_connection(self._path)
                    facts = (await receive(reader))["facts"]
                except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                    raise CapacityError("the model process is not there; it is being started") from error
                if {**facts, "live": 0} != {**self._facts, "live": 0}:
                    writer.close()
                    raise CapacityError("the checkpoint was replaced while the server runs: it must be started anew")
                self._connection = _Connection(reader, writer, self._heard)
                self._heard(facts)
            return self._connection


class _Connection:
    """One connection, and who waits for what on it."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Callable[[Facts], None]
    ) -> None:
        self.ended, self.over = False, asyncio.Event()
        self._heard = heard
        self._reader, self._writer = reader, writer
        self._waiting: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._task = asyncio.create_task(self._read())

    @asynccontextmanager
    async def asked(self, number: int, question: dict[str, Any]) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
        answers = self._waiting[number] = asyncio.Queue()
        try:
            self._writer.write(packed(question))
            await self._writer.drain()
            yield answers
        except ConnectionError as error:
            raise _gone() from error
        finally:
            if self._waiting.pop(number, None) is not None and not self.ended:
                self._writer.write(packed({"drop": number}))

    def write(self, frame: dict[str, Any]) -> None:
        self._writer.write(packed(frame))

    async def _read(self) -> None:
        """Hand out what comes; at its end, or the connection's, nobody waits any more."""
        try:
            while True:
                frame = await receive(self._reader)
                if "facts" in frame:
                    self._heard(frame["facts"])
                    continue
                found = self._waiting.get(frame["id"])
                if found is not None:
                    found.put_nowait(frame)
                    if "event" not in frame:
                        del self._waiting[frame["id"]]
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass
        finally:
            self.ended = True
            self.over.set()
            self._writer.close()
            for queue in self._waiting.values():
                queue.put_nowait({"gone": True})


async def _next(answers: asyncio.Queue[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    """The next frame of an answer. Raises the error that it is, DeadlineError, or CapacityError."""
    try:
        async with asyncio.timeout(timeout_s + MARGIN_S):
            frame = await answers.get()
    except TimeoutError as error:
        raise late() from error
    if "gone" in frame:
        raise _gone()
    if "error" in frame:
        raise of_frame(frame["error"])
    return frame


def _gone() -> CapacityError:
    return CapacityError("the model process ended before it had answered; it is being started again")
