"""Requests at a steady rate while heads come, are replaced and leave: is one lost, or answered by one that is not live?

    python -m benchmarks.living CHECKPOINT --task intent --requests 10000 --changes 100 --workers 2

CHECKPOINT is served, with the task as `steady`, whose head is replaced again and again, and `guest`, which comes, is
replaced and leaves. Each version of the head has labels that say which it is, so that an answer tells by whom it was
given. A version is live from when the change that brings it was asked for until the one that ends it was answered; an
answer has to come from one that was live at some time between its request and itself. That the guest is unknown may be
the answer only where it was not there all the time between.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measuring import say
from benchmarks.serving.__main__ import free_port, quantile
from benchmarks.serving.servers import HOST, ours, running
from mtserve.checkpoint import Checkpoint
from mtserve.head_file import pack_head
from mtserve.safetensors_file import copy_with, read_metadata
from mtserve.serve.heads_folder import version_of

KEY = "key-of-the-operator"
TEXT = "my parcel never came, number"
_PAUSE_S = 0.2
"""For how long nobody asks for `guest` before it leaves, since a request for a task that is gone is no failure."""


@dataclass
class Versions:
    """From when to when each version was live, in seconds of one clock; until infinity where it still is."""

    began: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    surely: list[list[float]] = field(default_factory=list)
    """From when to when there was one of them for sure."""

    def live(self, version: str, begin: float, end: float) -> bool:
        """Whether it was at some time between the two."""
        return self.began.get(version, float("inf")) <= end and self.ended.get(version, float("inf")) >= begin

    def there(self, begin: float, end: float) -> bool:
        """Whether there was one all the time between the two."""
        return any(first <= begin and end <= last for first, last in self.surely)


def versions(checkpoint: Path, task: str, folder: Path, count: int) -> list[Path]:
    """Files of one head whose labels say their number."""
    pack_head(Checkpoint.open(checkpoint), task, folder / "head")
    said = json.loads(read_metadata(folder / "head")["mtserve-head"])
    labels = said["entry"]["options"]["labels"]
    found = []
    for number in range(count):
        said["entry"]["options"]["labels"] = [f"v{number}.{label}" for label in labels]
        copy_with({"mtserve-head": json.dumps(said)}, folder / "head", folder / f"v{number}")
        found.append(folder / f"v{number}")
    return found


class Run:
    """One run against a server at a port."""

    def __init__(self, port: int, files: Sequence[Path], *, requests: int, rate: float, changes: int) -> None:
        self.files, self.requests, self.rate, self.changes = files, requests, rate, changes
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=f"http://{HOST}:{port}", limits=limits, timeout=60)
        self.live = {"steady": Versions(), "guest": Versions()}
        self.asked = ["steady"]
        self.wrong: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.by_version: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.change_s: list[float] = []

    async def run(self) -> None:
        async with self.client:
            await self.change("steady", 0)
            changing = asyncio.create_task(self.change_all())
            began, asking = time.monotonic(), set[asyncio.Task[None]]()
            for number in range(self.requests):
                await asyncio.sleep(max(0.0, began + number / self.rate - time.monotonic()))
                asking.add(asyncio.create_task(self.ask(number)))
            await asyncio.gather(*asking)
            await changing

    async def ask(self, number: int) -> None:
        task = random.choice(self.asked)  # noqa: S311
        begin = time.monotonic()
        answer = await self.client.post(f"/tasks/{task}", json={"inputs": f"{TEXT} {number}"})
        end = time.monotonic()
        self.statuses[answer.status_code] += 1
        self.latencies.append(end - begin)
        if answer.status_code == httpx.codes.NOT_FOUND and not self.live[task].there(begin, end):
            return
        if answer.status_code != httpx.codes.OK:
            self.wrong.append(f"{task}: {answer.status_code} {answer.text[:200]}")
            return
        (version,) = {one["label"].partition(".")[0] for one in answer.json()[0]}
        self.by_version[version] += 1
        if not self.live[task].live(version, begin, end):
            self.wrong.append(f"{task}: answered by {version}, which was not live")

    async def change_all(self) -> None:
        """Changes spread over the run: the steady head is replaced, the guest comes, is replaced, and leaves."""
        seconds, began, guest = self.requests / self.rate, time.monotonic(), False
        for number in range(self.changes):
            await asyncio.sleep(max(0.0, began + number * seconds / self.changes - time.monotonic()))
            match number % 4:
                case 0:
                    await self.change("steady", number + 1)
                case 3:
                    self.asked = ["steady"]
                    await asyncio.sleep(_PAUSE_S)
                    await self.change("guest", None)
                    guest = False
                case _:
                    await self.change("guest", number + 1)
                    guest = True
            self.asked = ["steady", "guest"] if guest else ["steady"]

    async def change(self, task: str, number: int | None) -> None:
        """Bring a version of a head, or let the task leave."""
        headers, path, live = {"X-API-Key": KEY}, f"/admin/heads/{task}", self.live[task]
        last = next((version for version in live.began if version not in live.ended), None)
        begin = time.monotonic()
        if number is None:
            live.surely[-1][1] = begin
            answer = await self.client.delete(path, headers=headers)
        else:
            live.began[f"v{number}"] = begin
            content = self.files[number].read_bytes()
            answer = await self.client.put(path, params={"replace": "true"}, content=content, headers=headers)
        answer.raise_for_status()
        end = time.monotonic()
        self.change_s.append(end - begin)
        if answer.status_code == httpx.codes.CREATED:
            live.surely.append([end, float("inf")])
        if last is not None:
            live.ended[last] = end


def measured(checkpoint: Path, task: str, *, requests: int, rate: float, changes: int, workers: int) -> dict[str, Any]:
    """Serve, change, ask; what became of all that was asked."""
    with tempfile.TemporaryDirectory(prefix="mtserve-living-") as home:
        files = versions(checkpoint, task, Path(home), changes + 1)
        assert len({version_of(file) for file in files}) == len(files)
        settings = {"MTSERVE_ADMIN_KEYS": KEY, "MTSERVE_WORKERS": str(workers), "MTSERVE_ACCESS_LOG": "false"}
        server = replace(
            ours(checkpoint, "fp32", **settings), asks=lambda _, text: (f"/tasks/{task}", {"inputs": text})
        )
        with running(server, free_port(), Path(home), TEXT) as one:
            run = Run(one.port, files, requests=requests, rate=rate, changes=changes)
            before = one.resident_bytes()
            with suppress(KeyboardInterrupt):
                asyncio.run(run.run())
            after = one.resident_bytes()
    return {
        "workers": workers,
        "requests": sum(run.statuses.values()),
        "changes": len(run.change_s),
        "versions that answered": len(run.by_version),
        "answered": run.statuses[200],
        "told that the guest is gone": run.statuses[404],
        "failed or wrong": len(run.wrong),
        "first": run.wrong[:3],
        "p50 ms": 1e3 * quantile(run.latencies, 0.5),
        "p99 ms": 1e3 * quantile(run.latencies, 0.99),
        "a change, p50 ms": 1e3 * quantile(run.change_s, 0.5),
        "MiB before": before / 2**20,
        "MiB after": after / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", required=True, help="A classification task of it.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=100.0, help="Requests a second.")
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    found = measured(
        given.checkpoint.resolve(), given.task, requests=given.requests, rate=given.rate, changes=given.changes,
        workers=given.workers,
    )  # fmt: skip
    for name, value in found.items():
        say(f"{name:28} {value:.1f}" if isinstance(value, float) else f"{name:28} {value}")
    raise SystemExit(1 if found["failed or wrong"] else 0)


if __name__ == "__main__":
    main()
