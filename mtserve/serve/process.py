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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mtserve.errors import SetupError
from mtserve.golden import GoldenReport
from mtserve.loading import InForce
from mtserve.profiles import Hardware
from mtserve.serve.host import Host
from mtserve.serve.live import Base, Live, grouped
from mtserve.serve.living import Living
from mtserve.serve.loading import check_settings, load
from mtserve.serve.metrics import metrics
from mtserve.serve.remote import Facts, RemoteModel
from mtserve.serve.supervision import EXIT_CODE, give_up
from mtserve.serve.table import Root, ServedTrunk, TaskTable
from mtserve.settings import Settings, read_settings


def facts_of(base: Base, live: Live) -> Facts:
    """What a worker must know of a loaded model beside the checkpoints, as JSON."""
    trunks = []
    for trunk in base.trunks:
        how, hardware = asdict(trunk.in_force), trunk.in_force.hardware
        how["hardware"] = {"device": hardware.device, "flags": sorted(hardware.flags)}
        trunks.append({"in_force": how, "threads": trunk.threads, "fingerprint": trunk.entry.fingerprint})
    golden = {name: asdict(report) for name, report in base.golden.items()}
    return {"trunks": trunks, "golden": golden, "live": live.as_json()}


def remote_base(settings: Settings, path: str, facts: Facts) -> tuple[Base, RemoteModel]:
    """What a worker serves, whose model is the process at `path`. Raises what `check_settings` raises, and SetupError
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
    golden = {name: GoldenReport(**report) for name, report in facts["golden"].items()}
    model = RemoteModel(path, facts)
    return Base(checkpoints, trunks, golden, settings, model), model


def follow(root: Root, settings: Settings, path: str, facts: Facts) -> TaskTable:
    """Make a root serve the model of the process at `path`, and whatever heads come to that; the first table."""
    base, model = remote_base(settings, path, facts)

    def told(later: Facts) -> None:
        root.swap(base.table(Live.of_json(later["live"])))

    model.told = told
    root.changes, root.released, root.attend = model, model.using, model.attend
    return base.table(Live.of_json(facts["live"]))


def hosted(living: Living) -> Host:
    """A loaded model with whoever connects, who are told of its changes, and say which tables they use."""
    host = Host(living.model, facts_of(living.base, living.live), changes=living, released=living.release)

    async def announce(table: TaskTable) -> None:
        await host.announce(facts_of(living.base, living.live))

    living.announce = announce
    return host


def _when_input_ends(stop: Any) -> None:
    sys.stdin.buffer.read()
    stop()


async def _main(living: Living, path: Path) -> None:
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    stop = partial(loop.call_soon_threadsafe, stopped.set)
    threading.Thread(target=_when_input_ends, args=(stop,), daemon=True).start()
    await hosted(living).serve(path, stopped=stopped)


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
        living = load(read_settings(), observer=metrics().observer)
    except SetupError as error:
        give_up(error)
        raise SystemExit(EXIT_CODE) from error
    metrics().publish(living.table)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_main(living, Path(sys.argv[1])))
    living.model.close()


if __name__ == "__main__":
    main()
