"""What a fault of one client, or of a process, does to the others: their answers are checked while it lasts.

Every request of theirs has a connection of its own and ends as `right`, `wrong` (other scores than the engine's), its
status, `broken` (the connection ended before the answer), `refused` (nobody listens) or `timeout`.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from benchmarks.measuring import Lines, say
from benchmarks.serving.servers import HOST, Running, Server, descendants

Truth = Mapping[tuple[str, str], Sequence[float]]
CLIENTS, PAUSE_S, TIMEOUT_S, TOLERANCE = 4, 0.1, 15.0, 2e-3
WRONG: Sequence[Any] = (3, None, {"more": 1}, ["good", 3])
_HEAD = "POST {path} HTTP/1.1\r\nHost: loopback\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"


def ask(port: int, path: str, body: Any) -> tuple[str, Any]:
    """(how it ended, the parsed answer)."""
    with closing(http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_S)) as connection:
        try:
            connection.connect()
        except TimeoutError:
            return "timeout", None
        except OSError:
            return "refused", None
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            raw = answer.read()
        except TimeoutError:
            return "timeout", None
        except (OSError, http.client.HTTPException):
            return "broken", None
        return str(answer.status), json.loads(raw) if answer.status == 200 else None


class Others:
    """Clients that send right requests at a steady pace, and check what they get."""

    def __init__(self, one: Running, truth: Truth) -> None:
        self.ended: Counter[str] = Counter()
        self.longest_s = 0.0
        self.times: list[tuple[float, str]] = []
        self._one, self._truth = one, truth
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Others:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        wanted = [*self._truth.items()]
        while not self._stop.is_set():
            (task, text), scores = wanted[number % len(wanted)]
            number += 1
            began = time.monotonic()
            how, answer = ask(self._one.port, *self._one.server.asks(task, text))
            if how == "200":
                off = [abs(a - b) for a, b in zip(self._one.server.reads(answer), scores, strict=True)]
                how = "right" if max(off) <= TOLERANCE else "wrong"
            with self._lock:
                self.ended[how] += 1
                self.times.append((time.monotonic(), how))
                if how == "right":
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
            self._stop.wait(PAUSE_S)


def bad_inputs(one: Running, end: float) -> Counter[str]:
    """Twenty a second."""
    found: Counter[str] = Counter()
    while time.monotonic() < end:
        for value in WRONG:
            found[ask(one.port, *one.server.asks("task1", value))[0]] += 1  # type: ignore[arg-type]
            time.sleep(0.05)
    return found


def clients_leave(one: Running, end: float) -> Counter[str]:
    """Thirty a second send a request and go."""
    path, body = one.server.asks("task2", "they leave before the answer is there, whatever it may be " * 4)
    raw = json.dumps(body).encode()
    found: Counter[str] = Counter()
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection((HOST, one.port), timeout=5) as made:
            made.sendall(_HEAD.format(path=path, size=len(raw)).encode() + raw)
            found["left"] += 1
        time.sleep(0.03)
    return found


def oversize(one: Running, end: float) -> Counter[str]:
    """Texts of ten and of one half million characters, one after another."""
    found: Counter[str] = Counter()
    while time.monotonic() < end:
        for size in (10_000_000, 500_000):
            how = ask(one.port, *one.server.asks("task3", "word " * (size // 5)))[0]
            found[f"{size // 1000} k: {how}"] += 1
    return found


def clients_stall(one: Running, end: float) -> Counter[str]:
    """A hundred send half a body, and nothing more."""
    path, body = one.server.asks("task4", "never sent to its end")
    raw = json.dumps(body).encode()
    made = [socket.create_connection((HOST, one.port), timeout=5) for _ in range(100)]
    for each in made:
        each.sendall(_HEAD.format(path=path, size=len(raw)).encode() + raw[: len(raw) // 2])
    time.sleep(max(0.0, end - time.monotonic()))
    for each in made:
        each.close()
    return Counter({"stalled": len(made)})


def slow_readers(one: Running, end: float) -> Counter[str]:
    """Twenty send fifty requests each, and read no answer."""
    path, body = one.server.asks("task5", "its answer is not read")
    raw = json.dumps(body).encode()
    made = [socket.create_connection((HOST, one.port), timeout=5) for _ in range(20)]
    for each in made:
        with suppress(OSError):
            each.sendall((_HEAD.format(path=path, size=len(raw)).encode() + raw) * 50)
    time.sleep(max(0.0, end - time.monotonic()))
    for each in made:
        each.close()
    return Counter({"unread": 50 * len(made)})


def killed(one: Running, end: float) -> Counter[str]:
    """SIGKILL for the process with the most memory, which computes."""
    pids = [pid for pid in descendants(one.process.pid) if pid != one.process.pid] or [one.process.pid]
    largest = max(pids, key=_resident)
    os.kill(largest, signal.SIGKILL)
    time.sleep(max(0.0, end - time.monotonic()))
    return Counter({"killed": 1})


def told_to_end(one: Running, end: float) -> Counter[str]:
    """SIGTERM for the server."""
    one.process.send_signal(signal.SIGTERM)
    time.sleep(max(0.0, end - time.monotonic()))
    return Counter({"ended" if one.process.poll() is not None else "still runs": 1})


FAULTS: Mapping[str, tuple[Callable[[Running, float], Counter[str]], float]] = {
    "bad inputs": (bad_inputs, 6.0),
    "clients leave": (clients_leave, 6.0),
    "oversize texts": (oversize, 6.0),
    "clients stall": (clients_stall, 6.0),
    "slow readers": (slow_readers, 6.0),
    "killed": (killed, 45.0),
    "SIGTERM": (told_to_end, 6.0),
}


def faults(servers: Sequence[Server], start: Callable[[Server], Any], truth: Truth) -> Lines:
    """Each fault in turn, while others are served; `start(server)` is a context in which one runs."""
    lines: Lines = []
    for server in servers:
        with start(server) as one:
            for name, (fault, seconds) in FAULTS.items():
                with Others(one, truth) as others:
                    time.sleep(1.0)
                    began = time.monotonic()
                    done = fault(one, began + seconds)
                failed = {how: count for how, count in others.ended.items() if how not in ("right", "wrong")}
                late = [at - began for at, how in others.times if how != "right"]
                lines.append(
                    {
                        "server": server.name, "fault": name, "its requests": json.dumps(done),
                        "others right": others.ended["right"], "wrong": others.ended["wrong"],
                        "failed": json.dumps(failed), "longest ms": 1e3 * others.longest_s,
                        "last failure after s": max(late, default=0.0),
                    }
                )  # fmt: skip
                say(f"  {lines[-1]}")
    return lines


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
