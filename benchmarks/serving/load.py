"""Load at a constant rate, whatever the server does (an open loop). Standard library only; a process of its own.

A job is JSON on stdin, its outcome JSON on stdout. Requests are sent when their time has come, on a free connection or
a new one; latency counts from that time, so that a server that stalls is not spared (no coordinated omission). Every
request ends as an answer with a status, as `timeout`, or as `broken` (the connection ended before its answer).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Load:
    """One job: `host`, `port`, `requests` (path and body each, taken in turn), `rate` a second, `seconds`, and the most
    `connections`; `timeout_s` of a request. With `headers`, those are sent too."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        more = "".join(f"{name}: {value}\r\n" for name, value in job.get("headers", {}).items())
        self.requests = [
            (
                f"POST {path} HTTP/1.1\r\nHost: {job['host']}\r\nContent-Type: application/json\r\n{more}"
                f"Content-Length: {len(body.encode())}\r\n\r\n{body}"
            ).encode()
            for path, body in job["requests"]
        ]
        self.free: list[Connection] = []
        self.open = asyncio.Semaphore(job.get("connections", 512))
        self.latencies: list[float] = []
        self.ends: list[tuple[float, str]] = []

    async def run(self) -> dict[str, Any]:
        count = int(self.job["rate"] * self.job["seconds"])
        began, sent = time.perf_counter(), []
        for number in range(count):
            due = began + number / self.job["rate"]
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            sent.append(asyncio.create_task(self.one(self.requests[number % len(self.requests)], due)))
        behind = time.perf_counter() - began - (count - 1) / self.job["rate"]
        await asyncio.gather(*sent)
        for _, writer in self.free:
            writer.close()
        statuses: dict[str, int] = {}
        for _, status in self.ends:
            statuses[status] = statuses.get(status, 0) + 1
        return {
            "sent": count,
            "seconds": time.perf_counter() - began,
            "behind_s": behind,
            "statuses": statuses,
            "latencies": self.latencies,
            "ends": [(at - began, status) for at, status in self.ends] if self.job.get("times") else [],
        }

    async def one(self, request: bytes, due: float) -> None:
        async with self.open:
            try:
                async with asyncio.timeout(self.job.get("timeout_s", 60)):
                    status = await self.ask(request)
            except TimeoutError:
                status = "timeout"
            except (OSError, ValueError, asyncio.IncompleteReadError):
                status = "broken"
        now = time.perf_counter()
        self.ends.append((now, status))
        if status == "200":
            self.latencies.append(now - due)

    async def ask(self, request: bytes) -> str:
        for again in (False, True):  # a kept connection may have ended meanwhile; a new one has not
            fresh = again or not self.free
            reader, writer = (
                await asyncio.open_connection(self.job["host"], self.job["port"]) if fresh else self.free.pop()
            )
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
            except (OSError, asyncio.IncompleteReadError):
                writer.close()
                if fresh:
                    raise
                continue
            except asyncio.CancelledError:
                writer.close()
                raise
            first, *lines = head.decode("latin-1").split("\r\n")
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            if fields.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    await reader.readexactly(size + 2)
                await reader.readexactly(2)
            else:
                await reader.readexactly(int(fields["content-length"]))
            if fields.get("connection", "").lower() == "close":
                writer.close()
            else:
                self.free.append((reader, writer))
            return first.split()[1]
        raise OSError("the connection ended twice")


def main() -> None:
    job = json.load(sys.stdin)
    if job.get("cpus"):
        os.sched_setaffinity(0, job["cpus"])
    json.dump(asyncio.run(Load(job).run()), sys.stdout)


if __name__ == "__main__":
    main()
