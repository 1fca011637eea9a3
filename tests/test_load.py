"""The load of the serving benchmark: its requests all end, and are timed from when they were due."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from benchmarks.serving import __main__ as serving
from benchmarks.serving.load import Load

Handler = Callable[[str, bytes], Awaitable[tuple[int, bytes] | None]]


def outcome(handler: Handler, **job: Any) -> dict[str, Any]:
    """What a load finds at a server that answers each (path, body), or ends the connection for None."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.lower().partition("content-length: ")[2].partition("\r")[0])
                answer = await handler(head.split()[1], await reader.readexactly(size))
                if answer is None:
                    return
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (answer[0], len(answer[1]), answer[1]))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def main() -> dict[str, Any]:
        async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await Load({"host": "127.0.0.1", "port": port, "times": True, **job}).run()

    return asyncio.run(main())


def test_every_request_ends_and_goes_where_it_should() -> None:
    seen: list[tuple[str, bytes]] = []

    async def answers(path: str, body: bytes) -> tuple[int, bytes] | None:
        seen.append((path, body))
        return {"/a": (200, b"{}"), "/b": (429, b"no"), "/c": None}[path]

    found = outcome(answers, rate=300, seconds=0.1, requests=[["/a", "1"], ["/b", "22"], ["/c", "\u00e9"]])
    assert found["sent"] == 30
    assert found["statuses"] == {"200": 10, "429": 10, "broken": 10}
    assert len(found["latencies"]) == 10
    assert len(found["ends"]) == 30
    assert {("/a", b"1"), ("/b", b"22"), ("/c", "\u00e9".encode())} == set(seen)


def test_latency_counts_from_the_time_that_was_due() -> None:
    async def slow(path: str, body: bytes) -> tuple[int, bytes]:
        await asyncio.sleep(0.05)
        return 200, b"{}"

    found = outcome(slow, rate=100, seconds=0.2, requests=[["/", ""]], connections=1)  # one at a time: a queue forms
    assert found["statuses"] == {"200": 20}
    assert max(found["latencies"]) > 0.5


def test_a_request_without_an_answer_times_out() -> None:
    async def never(path: str, body: bytes) -> tuple[int, bytes]:
        await asyncio.sleep(5)
        return 200, b""

    found = outcome(never, rate=50, seconds=0.1, requests=[["/", ""]], timeout_s=0.1)
    assert found["statuses"] == {"timeout": 5}


@pytest.mark.parametrize(("limit", "start"), [(100.0, 40.0), (7.0, 60.0), (300.0, 290.0)])
def test_the_ladder_finds_the_rate(limit: float, start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bench:
        seconds = 1.0

        def load(self, *_: Any) -> None: ...

    monkeypatch.setattr(serving, "keeps_up", lambda bench, one, rate: rate <= limit)
    found = serving.capacity(Bench(), None, start)  # type: ignore[arg-type]
    assert limit / 1.6 < found <= limit
