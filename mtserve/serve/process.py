"""The model process behind several API workers: one copy of each trunk, asked over a Unix socket. Knows no HTTP.

    python -m mtserve.serve.process SOCKET

Settings are those of the server (MTSERVE_*). It listens when it can answer, and ends when its standard input does: that
is a pipe from the server's parent process, which ends after the workers. It ends with exit code 2 and one sentence, and
the whole server with it, where it cannot start.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mtserve.errors import MtserveError, SetupError, as_frame
from mtserve.golden import GoldenReport
from mtserve.loading import InForce
from mtserve.profiles import Hardware
from mtserve.serve.loading import check_settings, grouped, load_table, make_table
from mtserve.serve.metrics import metrics
from mtserve.serve.model import Model
from mtserve.serve.remote import Facts, RemoteModel
from mtserve.serve.supervision import EXIT_CODE, give_up
from mtserve.serve.table import ServedTrunk, TaskTable
from mtserve.serve.wire import packed, receive
from mtserve.settings import Settings, read_settings

logger = logging.getLogger(__name__)


def facts_of(table: TaskTable) -> Facts:
    """What a worker must know of a loaded table beside the checkpoints, as JSON."""
    trunks = []
    for trunk in table.trunks:
        how, hardware = asdict(trunk.in_force), trunk.in_force.hardware
        how["hardware"] = {"device": hardware.device, "flags": sorted(hardware.flags)}
        trunks.append({"in_force": how, "threads": trunk.threads, "fingerprint": trunk.entry.fingerprint})
    golden = {name: None if task.golden is None else asdict(task.golden) for name, task in table.tasks.items()}
    return {"trunks": trunks, "golden": golden}


def remote_table(settings: Settings, path: str, facts: Facts) -> TaskTable:
    """The table of a worker, whose model is the process at `path`. Raises what `check_settings` raises, and SetupError
    where the process has other checkpoints."""
    checkpoints = check_settings(settings)
    trunks = []
    for together, said in zip(grouped(checkpoints), facts["trunks"], strict=True):
        entry, how = together[0].manifest.trunk, said["in_force"]
        if entry.fingerprint != said["fingerprint"]:
            raise SetupError(f"{settings.model}: the model process has loaded other checkpoints")
        flags = frozenset(how["hardware"]["flags"])
        in_force = InForce(**{**how, "hardware": Hardware(how["hardware"]["device"], flags)})
        trunks.append(ServedTrunk(entry, in_force, said["threads"]))
    golden = {name: GoldenReport(**report) for name, report in facts["golden"].items() if report is not None}
    return make_table(checkpoints, trunks, golden, settings, RemoteModel(path, facts))


async def serve(model: Model, facts: Facts, path: Path, *, stopped: asyncio.Event) -> None:
    """Answer whoever connects, until told to stop. What is asked on a connection ends with it."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            writer.write(packed({"facts": facts}))
            await _converse(model, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the worker is gone
        except asyncio.CancelledError:
            pass  # we are to stop
        finally:
            connections.discard(task)
            writer.close()

    path.unlink(missing_ok=True)  # of a process that was killed
    server = await asyncio.start_unix_server(connected, path)
    await stopped.wait()
    server.close()
    for task in list(connections):
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


async def _converse(model: Model, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take questions as they come, each answered by a task of its own."""
    answering: dict[int, asyncio.Task[None]] = {}
    try:
        while True:
            frame = await receive(reader)
            if "drop" in frame:
                if task := answering.get(frame["drop"]):
                    task.cancel()
                continue
            number = frame["id"]
            answering[number] = asyncio.create_task(_answer(model, frame, writer))
            answering[number].add_done_callback(lambda _, number=number: answering.pop(number))  # type: ignore[misc]
    finally:
        for task in list(answering.values()):
            task.cancel()


async def _answer(model: Model, frame: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    number, asked, items, timeout_s = (frame[name] for name in ("id", "asked", "items", "timeout_s"))
    try:
        if frame["stream"]:
            async with aclosing(model.stream(asked, items, timeout_s=timeout_s)) as events:
                async for event in events:
                    writer.write(packed({"id": number, "event": event}))
                    await writer.drain()
            answer: dict[str, Any] = {"end": True}
        else:
            outputs, usage = await model.predict(asked, items, timeout_s=timeout_s)
            answer = {"outputs": outputs, "usage": usage.as_dict()}
        frame_out = packed({"id": number, **answer})
    except MtserveError as error:
        frame_out = packed({"id": number, "error": as_frame(error)})
    except Exception:  # whatever it is, the question must end, and the process go on
        logger.exception("request %s failed in the model process", frame["request_id"])
        failed = MtserveError("the model process failed; the server's log has the reason")
        frame_out = packed({"id": number, "error": as_frame(failed)})
    writer.write(frame_out)


def _when_input_ends(stop: Any) -> None:
    sys.stdin.buffer.read()
    stop()


async def _main(table: TaskTable, path: Path) -> None:
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    stop = partial(loop.call_soon_threadsafe, stopped.set)
    threading.Thread(target=_when_input_ends, args=(stop,), daemon=True).start()
    await serve(table.model, facts_of(table), path, stopped=stopped)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of the server, it is for the workers
    shown = "%(asctime)s [%(levelname)s] [model] %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=shown, datefmt="%Y-%m-%dT%H:%M:%S%z")
    try:
        table = load_table(read_settings(), observer=metrics().observer)
    except SetupError as error:
        give_up(error)
        raise SystemExit(EXIT_CODE) from error
    metrics().publish(table)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_main(table, Path(sys.argv[1])))
    table.model.close()


if __name__ == "__main__":
    main()
