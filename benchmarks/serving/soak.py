"""A long run of mixed requests at a moderate rate: does memory stay where it is, is anything lost?"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from benchmarks.encoding.contestants import ROOT
from benchmarks.measuring import Lines, say
from benchmarks.serving.servers import HOST, Running, Server

CHUNK_S, SAMPLE_S = 15.0, 1.0


def requests(texts: Sequence[str], tasks: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(path, body) without end, no text twice: mostly one text for one task; of a hundred, ten ask five tasks about
    four texts, four are wrong, three hold a text of 100,000 characters, one has 200 inputs."""
    chance, number = random.Random(0), itertools.count()  # noqa: S311

    def text() -> str:
        at = next(number)
        return f"{texts[at % len(texts)]} {at}"

    while True:
        task, drawn = chance.choice(tasks), chance.random()
        if drawn < 0.10:
            path, body = "/predict", {"inputs": [text() for _ in range(4)], "tasks": [*tasks]}
        elif drawn < 0.14:
            wrong: list[Any] = [3, None, ["good", 3], {"text": "x", "more": 1}]
            path, body = f"/tasks/{task}", {"inputs": chance.choice(wrong)}
        elif drawn < 0.17:
            path, body = f"/tasks/{task}", {"inputs": (text() + " ") * (100_000 // 50)}
        elif drawn < 0.18:
            path, body = f"/tasks/{task}", {"inputs": [text() for _ in range(200)]}
        else:
            path, body = f"/tasks/{task}", {"inputs": text()}
        yield path, json.dumps(body)


def soak(servers: Sequence[Server], start: Any, texts: Sequence[str], tasks: Sequence[str], *, seconds: float,
         rate: float) -> Lines:  # fmt: skip
    """`start(server)` is a context in which one runs. It is warmed up by requests of one to 200 texts, so that kernels
    for most sizes of a pass are there. Growth is from the minutes 2 and 3 to the last two, of the medians of samples,
    since what is freed goes back to the system in steps."""
    lines: Lines = []
    for server in servers:
        with start(server) as one:
            for many in [*range(1, 41), *range(44, 201, 4)]:
                one.ask(*server.asks(tasks[many % len(tasks)], [f"{texts[at]} {many}" for at in range(many)]))
            source, found, statuses, late = requests(texts, tasks), list[list[int]](), Counter[str](), list[float]()
            for _ in range(round(seconds / CHUNK_S)):
                outcome, sampled = _load(one, [*itertools.islice(source, int(rate * CHUNK_S))], rate)
                statuses.update(outcome["statuses"])
                late.append(sorted(outcome["latencies"])[int(0.99 * len(outcome["latencies"]))])
                found.append(sampled)
                middle = statistics.median(sampled) / 2**20
                say(f"  {server.name}: {middle:.1f} MiB, p99 {late[-1] * 1e3:.0f} ms, {dict(statuses)}")
        minute = round(60 / CHUNK_S)
        parts = found[minute : 3 * minute], found[-2 * minute :]
        early, last = (statistics.median(itertools.chain(*part)) for part in parts)
        lines.append(
            {
                "server": server.name, "precision": server.precision, "minutes": seconds / 60, "sent/s": rate,
                "statuses": json.dumps(statuses), "p99 ms": 1e3 * statistics.median(late),
                "MiB early": early / 2**20, "MiB late": last / 2**20, "grew by": last / early - 1,
            }
        )  # fmt: skip
    return lines


def _load(one: Running, asked: Sequence[tuple[str, str]], rate: float) -> tuple[dict[str, Any], list[int]]:
    """The outcome, and the server's bytes on the way."""
    job = {"host": HOST, "port": one.port, "rate": rate, "seconds": CHUNK_S, "requests": asked}
    argv = [sys.executable, str(ROOT / "benchmarks/serving/load.py")]
    sampled: list[int] = []
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(
            subprocess.run, argv, input=json.dumps(job), capture_output=True, text=True, check=True, timeout=300
        )
        while not wait([running], timeout=SAMPLE_S).done:
            sampled.append(one.resident_bytes())
    outcome: dict[str, Any] = json.loads(running.result().stdout)
    return outcome, sampled or [one.resident_bytes()]
