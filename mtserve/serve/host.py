"""A loaded model over a Unix socket: whoever connects asks it, is told of its changes, and says which tables it uses.

The frames are those of `mtserve.serve.wire`. Knows no HTTP and no settings.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtserve.errors import MtserveError, as_frame
from mtserve.serve.model import Model
from mtserve.serve.remote import Facts
from mtserve.serve.table import Changes
from mtserve.serve.wire import packed, receive

logger = logging.getLogger(__name__)
KNOWN_S = 5.0
"""How long a change waits until every worker has said that it knows."""


@dataclass(eq=False)
class _Worker:
    """One connection: the number of the table that it has, and of the first that its requests may hold."""

    writer: asyncio.StreamWriter
    at: int
    oldest: int


class Host:
    """The model of this process. `released` is told from which table on any worker may hold one."""

    def __init__(
        self,
        model: Model,
        facts: Facts,
        *,
        changes: Changes | None = None,
        released: Callable[[int], None] = lambda oldest: None,
    ) -> None:
        self._model, self._facts, self._changes, self._released = model, facts, changes, released
        self._workers: set[_Worker] = set()
        self._heard = asyncio.Condition()

    async def serve(self, path: Path, *, stopped: asyncio.Event) -> None:
        """Answer whoever connects, until told to stop. What is asked on a connection ends with it."""
        connections: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            worker = _Worker(writer, self._number, self._number)
            self._workers.add(worker)
            try:
                writer.write(packed({"facts": self._facts}))
                await self._converse(worker, reader)
            except (OSError, asyncio.IncompleteReadError):
                pass  # the worker is gone
            except asyncio.CancelledError:
                pass  # we are to stop
            finally:
                connections.discard(task)
                self._workers.discard(worker)
                writer.close()
                await self._hear()

        path.unlink(missing_ok=True)  # of a process that was killed
        server = await asyncio.start_unix_server(connected, path)
        await stopped.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def announce(self, facts: Facts) -> None:
        """Tell every worker of a change, and wait until all know it; one that does not say so is not waited for."""
        self._facts = facts
        for worker in self._workers:
            worker.writer.write(packed({"facts": facts}))
        with suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_S), self._heard:
                await self._heard.wait_for(lambda: all(worker.at >= self._number for worker in self._workers))
        self._release()

    @property
    def _number(self) -> int:
        return int(self._facts["live"]["number"])

    def _release(self) -> None:
        self._released(min((worker.oldest for worker in self._workers), default=self._number))

    async def _hear(self) -> None:
        async with self._heard:
            self._heard.notify_all()
        self._release()

    async def _converse(self, worker: _Worker, reader: asyncio.StreamReader) -> None:
        """Take questions as they come, each answered by a task of its own."""
        answering: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                frame = await receive(reader)
                if "at" in frame:
                    worker.at, worker.oldest = frame["at"], frame["oldest"]
                    await self._hear()
                    continue
                if "drop" in frame:
                    if task := answering.get(frame["drop"]):
                        task.cancel()
                    continue
                number = frame["id"]
                answering[number] = asyncio.create_task(self._answer(frame, worker.writer))
                answering[number].add_done_callback(lambda _, number=number: answering.pop(number))  # type: ignore[misc]
        finally:
            for task in list(answering.values()):
                task.cancel()

    async def _answer(self, frame: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number = frame["id"]
        try:
            if "change" in frame:
                frame_out = packed({"id": number, **await asyncio.shield(self._changed(frame["change"]))})
            elif frame["stream"]:
                frame_out = packed({"id": number, **await self._streamed(frame, writer)})
            else:
                how = {"timeout_s": frame["timeout_s"], "private": frame["private"]}
                outputs, usage = await self._model.predict(frame["asked"], frame["items"], **how)
                frame_out = packed({"id": number, "outputs": outputs, "usage": usage.as_dict()})
        except MtserveError as error:
            frame_out = packed({"id": number, "error": as_frame(error)})
        except Exception:  # whatever it is, the question must end, and the process go on
            logger.exception("request %s failed in the model process", frame["request_id"])
            failed = MtserveError("the model process failed; the server's log has the reason")
            frame_out = packed({"id": number, "error": as_frame(failed)})
        writer.write(frame_out)

    async def _streamed(self, frame: dict[str, Any], writer: asyncio.StreamWriter) -> dict[str, Any]:
        asked, items, timeout_s = (frame[name] for name in ("asked", "items", "timeout_s"))
        async with aclosing(self._model.stream(asked, items, timeout_s=timeout_s)) as events:
            async for event in events:
                writer.write(packed({"id": frame["id"], "event": event}))
                await writer.drain()
        return {"end": True}

    async def _changed(self, change: dict[str, Any]) -> dict[str, Any]:
        assert self._changes is not None
        if change["file"] is None:
            await self._changes.remove(change["task"])
        else:
            how = {"instead": change["instead"], "untuned": change["untuned"]}
            await self._changes.put(change["task"], Path(change["file"]), **how)
        return {"end": True}
