"""Servers under load: how each is started, asked and read. Measures nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.encoding.contestants import ROOT
from mtserve.serve.launch import SERVICE

HOST = "127.0.0.1"
PEERS = ROOT / "benchmarks/serving/peers"
_START_S = 180
_END_S = 40


class ServerError(Exception):
    """A server did not start, or answers otherwise than ours."""


@dataclass(frozen=True)
class Server:
    """A server of the five tasks.

    processes   in which it computes
    argv        given a port
    env         beside this process's
    asks        (path, body) of one text for a task
    reads       an answer's scores, in the order of the labels
    """

    name: str
    precision: str
    processes: int
    argv: Callable[[int], Sequence[str]]
    env: Mapping[str, str]
    asks: Callable[[str, str], tuple[str, Any]]
    reads: Callable[[Any], list[float]]
    note: str = ""


@dataclass
class Running:
    """A server that answers at `port`."""

    server: Server
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    notes: list[str] = field(default_factory=list)

    def ask(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, parsed body); status 0 where nothing answers."""
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, None
        except (OSError, ValueError):
            return 0, None

    def resident_bytes(self) -> int:
        """Proportional set size of all of its processes: memory that several share counts once (Linux)."""
        found = 0
        for pid in descendants(self.process.pid):
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            except OSError:
                continue
            found += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
        return found


def descendants(root: int) -> list[int]:
    """Process ids of a process and all that it started, itself first."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                stat = (folder / "stat").read_text(encoding="utf-8")
            except OSError:
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


@contextmanager
def running(server: Server, port: int, home: Path, probe: str) -> Iterator[Running]:
    """Start a server, wait until it answers `probe` for each task, and end it by its own process id."""
    log = home / (re.sub(r"\W+", "-", f"{server.name} {server.precision}") + ".log")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "BENTOML_HOME": str(home / "bentoml"), **server.env}
    env |= {"BENTOML_DO_NOT_TRACK": "True", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as said:
        process = subprocess.Popen(
            server.argv(port), env=env, cwd=home, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    made = Running(server, process, port, log)
    try:
        end = time.monotonic() + _START_S
        while made.ask(*server.asks("task1", probe))[0] != 200:
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
                raise ServerError(f"{server.name} did not start: {' | '.join(tail)}")
            time.sleep(0.3)
        yield made
    finally:
        pids = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            made.notes.append("did not end on SIGTERM")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(10)


def ours(checkpoint: Path, precision: str, **settings: str) -> Server:
    """mtserve at its defaults but for the precision, so that it equals that of the peers, and these settings."""
    env = {"MTSERVE_MODEL": json.dumps([str(checkpoint)]), "MTSERVE_PROFILE": precision, **settings}
    argv = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", HOST, "--port"]
    return Server(
        "mtserve" if "MTSERVE_WORKERS" not in settings else f"mtserve, {settings['MTSERVE_WORKERS']} workers",
        precision,
        1,
        lambda port: [*argv, str(port)],
        env,
        lambda task, text: (f"/tasks/{task}", {"inputs": text}),
        lambda answer: [one["score"] for one in sorted(answer[0], key=lambda one: one["label"])],
    )


def peers(models: Path, python: str, infinity: str | None) -> list[Server]:
    """Those that serve five stock models, fp32, with dynamic batching as each has it."""
    threads = {"OMP_NUM_THREADS": "1", "MODELS": str(models)}
    both = {"OMP_NUM_THREADS": "2", "MODELS": str(models)}
    found = [
        Server(
            "LitServe, five APIs", "fp32", 5,
            lambda port: [python, str(PEERS / "litserve_five.py"), str(models), str(port)], threads,
            lambda task, text: (f"/{task}", {"inputs": text}), lambda answer: answer["scores"],
        ),
        Server(
            "mosec, five routes", "fp32", 5,
            lambda port: [python, str(PEERS / "mosec_five.py"), "--port", str(port), "--address", HOST], threads,
            lambda task, text: (f"/{task}", {"inputs": text}), lambda answer: answer["scores"],
        ),
        Server(
            "BentoML batchable", "fp32", 1,
            lambda port: [sys.executable, "-m", "bentoml", "serve", "benchmarks.serving.peers.bento_batchable:Five",
                          "--host", HOST, "--port", str(port)], both,
            lambda task, text: (f"/{task}", {"inputs": [text]}), lambda answer: answer[0],
        ),
    ]  # fmt: skip
    if infinity is not None:
        names = [folder.name for folder in sorted(models.iterdir())]
        many = [part for name in names for part in ("--model-id", str(models / name), "--served-model-name", name)]
        tool = str(Path(infinity).with_name("infinity_emb"))
        found.append(
            Server(
                "infinity, /classify", "fp32", 1,
                lambda port: [tool, "v2", *many, "--engine", "torch", "--device", "cpu", "--dtype", "float32",
                              "--host", HOST, "--port", str(port), "--no-bettertransformer"], both,
                lambda task, text: ("/classify", {"model": task, "input": [text]}),
                lambda answer: [one["score"] for one in sorted(answer["data"][0], key=lambda one: one["label"])],
            )
        )  # fmt: skip
    return found


def agreement(one: Running, texts: Sequence[str], wanted: Mapping[tuple[str, str], list[float]]) -> float:
    """The largest difference of a score from those wanted. Raises ServerError where it does not answer."""
    worst = 0.0
    for (task, text), scores in wanted.items():
        status, answer = one.ask(*one.server.asks(task, text))
        if status != 200:
            raise ServerError(f"{one.server.name} answers {status}")
        found = one.server.reads(answer)
        worst = max(worst, *(abs(a - b) for a, b in zip(found, scores, strict=True)))
    return worst
