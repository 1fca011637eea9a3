"""Serving five tasks of one trunk, beside other servers of five stock models, under load from another process.

    python -m benchmarks.serving [--peers PYTHON] [--infinity PYTHON] [--only SECTION,…]

    mixed      five tasks mixed, distinct texts: the most requests a second whose p99 stays within a limit
    several    one text for five tasks in one call, over one task: p50
    single     one short request over HTTP, over the engine's call in process; empty handlers beside it: p50
    overload   three times what was measured, for a while: what is answered, refused, lost; memory; recovery
    faults     bad inputs, clients that leave or stall, killed processes, SIGTERM: what else suffers, and which answers
    soak       a quarter of an hour of mixed requests: memory (only where asked for)
    memory     proportional set size on a trunk of BERT-base's size: one task, five tasks, and the others

Servers run one at a time and take turns. The checkpoint is made here: five classifications with equal options and
random heads on the demo's encoder; the others serve the same heads as stock models, and must give the same scores.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.encoding.contestants import ROOT
from benchmarks.encoding.subject import base_trunk, make_subject, open_text
from benchmarks.encoding.texts import few_texts, read_texts
from benchmarks.measuring import Lines, machine, say, show, timed
from benchmarks.resident import make_checkpoint
from benchmarks.serving.faults import faults
from benchmarks.serving.servers import HOST, PEERS, Running, Server, ServerError, agreement, ours, peers, running
from benchmarks.serving.soak import soak
from mtserve.checkpoint import Checkpoint
from mtserve.demo.run import packaged_trunk
from mtserve.interop.split import split_head
from mtserve.manifest import FP32, Profile
from mtserve.sealing import accept_profiles

TASKS = tuple(f"task{at}" for at in range(1, 6))
OPTIONS: dict[str, Any] = {"labels": [f"label{at}" for at in range(8)], "max_length": 128}
TOLERANCE = 1e-4
OVERLOAD_QUEUE = 4096


@dataclass
class Bench:
    """What all sections share. `p99_ms` is the limit under which requests a second are compared."""

    home: Path
    texts: Sequence[str]
    checkpoint: Path
    models: Path
    python: str | None
    infinity: str | None
    rounds: int = 3
    seconds: float = 6.0
    overload_s: float = 60.0
    p99_ms: float = 250.0
    calls: int = 300
    soak_s: float = 900.0
    failed: dict[str, str] = field(default_factory=dict)

    def contestants(self) -> list[Server]:
        found = [ours(self.checkpoint, "fp32"), ours(self.checkpoint, "bf16")]
        return found + (peers(self.models, self.python, self.infinity) if self.python else [])

    def start(self, server: Server) -> AbstractContextManager[Running]:
        return running(server, free_port(), self.home, self.texts[0])

    def load(self, one: Running, rate: float, seconds: float, **more: Any) -> dict[str, Any]:
        """All tasks in turn, each request with a text of its own."""
        asked = [one.server.asks(TASKS[at % 5], text) for at, text in enumerate(self.texts)]
        requests = [(path, json.dumps(body)) for path, body in asked]
        cpus = [max(os.sched_getaffinity(0))]  # of the load; a server has all
        job = {"host": HOST, "port": one.port, "rate": rate, "seconds": seconds, "requests": requests, "cpus": cpus}
        argv = [sys.executable, str(ROOT / "benchmarks/serving/load.py")]
        done = subprocess.run(
            argv, input=json.dumps(job | more), capture_output=True, text=True, check=True, timeout=600
        )
        outcome: dict[str, Any] = json.loads(done.stdout)
        return outcome


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def keeps_up(bench: Bench, one: Running, rate: float) -> bool:
    """Whether all requests of a rate are answered, 99 % of them within the limit, and the load came as it should; in
    one of two tries, as something else may run on the machine."""
    for _ in range(2):
        outcome = bench.load(one, rate, bench.seconds)
        answered = outcome["statuses"].get("200", 0) == outcome["sent"] and outcome["behind_s"] < 0.2
        if answered and quantile(outcome["latencies"], 0.99) * 1e3 <= bench.p99_ms:
            return True
    return False


def capacity(bench: Bench, one: Running, start: float) -> float:
    """The highest rate of a ladder (steps of an eighth) that it keeps up with; 0 if none above 2 a second."""
    for _ in range(2):
        bench.load(one, start, bench.seconds)  # warms up: kernels for new shapes are made
    rate = start
    while not keeps_up(bench, one, rate):
        rate /= 1.5
        if rate < 2:
            return 0.0
    while keeps_up(bench, one, rate * 1.125):
        rate *= 1.125
    return rate


def wanted(bench: Bench) -> dict[tuple[str, str], list[float]]:
    """Scores by the engine in process, fp32."""
    import mtserve

    engine = mtserve.load(bench.checkpoint, profile="fp32")
    found = {}
    for task in TASKS:
        for text in bench.texts[:4]:
            (labels,) = engine.predict(task, [text])
            found[task, text] = [one["score"] for one in sorted(labels, key=lambda one: one["label"])]
    return found


def mixed(bench: Bench) -> Lines:
    truth = wanted(bench)
    found: dict[tuple[str, str], list[float]] = {}
    off: dict[tuple[str, str], float] = {}
    contestants = bench.contestants()
    for number in range(bench.rounds):
        for server in contestants[number % len(contestants) :] + contestants[: number % len(contestants)]:
            key = server.name, server.precision
            if server.name in bench.failed:
                continue
            try:
                with bench.start(server) as one:
                    off[key] = agreement(one, bench.texts, truth)
                    allowed = 20 * TOLERANCE if server.precision == "bf16" else TOLERANCE
                    if off[key] > allowed:
                        raise ServerError(f"its scores differ by {off[key]:.3g}; allowed: {allowed}")
                    start = found[key][-1] / 1.125**2 if found.get(key) and found[key][-1] else 60.0
                    found.setdefault(key, []).append(capacity(bench, one, start))
                    say(f"  round {number + 1}: {server.name} {server.precision}: {found[key][-1]:.0f} a second")
            except ServerError as error:
                bench.failed[server.name] = str(error)
    reference = found["mtserve", "fp32"]
    processes = {(server.name, server.precision): server.processes for server in contestants}
    return [
        {
            "server": name, "precision": precision, "processes": processes[name, precision],
            "requests/s": statistics.median(rates), "least": min(rates), "most": max(rates),
            "ours in fp32 over it": statistics.median(a / b if b else float("inf")
                                                      for a, b in zip(reference, rates, strict=False)),
            "scores differ by": off[name, precision],
        }
        for (name, precision), rates in found.items()
    ]  # fmt: skip


def _p50(calls: Mapping[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Median milliseconds of calls that take turns, after some that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(times + 20):
        for name, call in calls.items():
            taken, _ = timed(call)
            if number >= 20:
                seconds[name].append(taken)
    return {name: 1e3 * statistics.median(found) for name, found in seconds.items()}


class Kept:
    """A connection that is kept, so that a call costs no handshake."""

    def __init__(self, port: int) -> None:
        import http.client

        self.connection = http.client.HTTPConnection(HOST, port, timeout=60)

    def post(self, path: str, body: Any) -> None:
        self.connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise ServerError(f"{path} answers {answer.status}")


def several(bench: Bench) -> Lines:
    lines: Lines = []
    for precision in ("fp32", "bf16"):
        with bench.start(ours(bench.checkpoint, precision)) as one:
            kept, texts = Kept(one.port), iter(bench.texts * 50)
            found = _p50(
                {
                    "one task": lambda kept=kept, texts=texts: kept.post(
                        "/predict", {"inputs": next(texts), "tasks": [TASKS[0]]}
                    ),
                    "five tasks": lambda kept=kept, texts=texts: kept.post(
                        "/predict", {"inputs": next(texts), "tasks": [*TASKS]}
                    ),
                },
                bench.calls,
            )
        lines += [
            {"precision": precision, "call": name, "p50 ms": value, "over one task": value / found["one task"]}
            for name, value in found.items()
        ]
    return lines


def single(bench: Bench) -> Lines:
    text = min(bench.texts, key=lambda one: abs(len(one.split()) - 12))
    lines: Lines = []
    empty = Server("empty", "", 1, lambda port: [sys.executable, str(PEERS / "empty.py"), str(port)], {},
                   lambda task, text: ("/empty", {"inputs": text}), lambda answer: [])  # fmt: skip
    argv = [sys.executable, "-m", "bentoml", "serve", "benchmarks.serving.peers.empty:Empty", "--host", HOST, "--port"]
    bento = Server("bento-empty", "", 1, lambda port: [*argv, str(port)], {}, empty.asks, empty.reads)
    for precision in ("fp32", "bf16"):
        inside = _in_process(bench, precision, text)
        with (
            running(ours(bench.checkpoint, precision), free_port(), bench.home, text) as one,
            running(empty, free_port(), bench.home, text) as bare,
            running(bento, free_port(), bench.home, text) as handler,
        ):
            calls: dict[str, Callable[[], Any]] = {
                "mtserve, over HTTP": partial(Kept(one.port).post, "/tasks/task1", {"inputs": text}),
                "empty @bentoml.api": partial(Kept(handler.port).post, "/empty", {"inputs": text}),
                "empty Starlette route": partial(Kept(bare.port).post, "/empty", {"inputs": text}),
            }
            found = {"engine in process": inside, **_p50(calls, bench.calls)}
        lines += [
            {"precision": precision, "call": name, "p50 ms": value, "above the engine, ms": value - inside}
            for name, value in found.items()
        ]
    return lines


def _in_process(bench: Bench, precision: str, text: str) -> float:
    """Median milliseconds of the engine's call, in a process of its own."""
    code = (
        "import json, statistics, sys, time, mtserve, torch\n"
        "torch.set_num_threads(2)\n"
        "engine = mtserve.load(sys.argv[1], profile=sys.argv[2], device='cpu', accepted_only=False, capture=True)\n"
        "found = []\n"
        "for _ in range(int(sys.argv[4]) + 20):\n"
        "    began = time.perf_counter()\n"
        "    engine.predict('task1', [sys.argv[3]])\n"
        "    found.append(time.perf_counter() - began)\n"
        "print(1e3 * statistics.median(found[20:]))\n"
    )
    argv = [sys.executable, "-W", "ignore", "-c", code, str(bench.checkpoint), precision, text, str(bench.calls)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300, cwd=ROOT)
    return float(done.stdout.splitlines()[-1])


def overload(bench: Bench) -> Lines:
    """Ours alone, with a queue of some seconds: goodput beside the capacity that the same load finds just before."""
    server = ours(bench.checkpoint, "fp32", MTSERVE_MAX_QUEUE_TOKENS=str(OVERLOAD_QUEUE))
    with bench.start(server) as one:
        rate = capacity(bench, one, 60.0)
        bench.load(one, 3 * rate, 5.0, connections=4096, timeout_s=90)  # full batches: what they need stays
        before = one.resident_bytes()
        outcome = bench.load(one, 3 * rate, bench.overload_s, times=True, connections=4096, timeout_s=90)
        recovery = bench.load(one, rate / 2, 6.0, times=True)
        after = one.resident_bytes()
    late = [at for at, status in recovery["ends"] if status != "200"]
    statuses = outcome["statuses"]
    good = sum(status == "200" and at <= bench.overload_s for at, status in outcome["ends"]) / bench.overload_s
    refused = {status: count for status, count in statuses.items() if status != "200"}
    return [
        {
            "queue, tokens": OVERLOAD_QUEUE, "capacity/s": rate, "sent/s": 3 * rate, "answered/s": good,
            "goodput over capacity": good / rate, "others": json.dumps(refused),
            "lost": outcome["sent"] - sum(statuses.values()), "load behind s": outcome["behind_s"],
            "p99 ms": 1e3 * quantile(outcome["latencies"], 0.99), "memory grew": after / before - 1,
            "recovered after s": max(late, default=0.0),
        }
    ]  # fmt: skip


def memory(bench: Bench) -> Lines:
    trunk = base_trunk(packaged_trunk(), bench.home / "base")
    made = {count: bench.home / f"base-{count}" for count in (1, 5)}
    for count, folder in made.items():
        make_checkpoint(trunk, folder, dict.fromkeys(TASKS[:count], ("classification", OPTIONS)))
    models = split(made[5], bench.home / "base-models")
    contestants = [("one task", ours(made[1], "fp32")), ("five tasks", ours(made[5], "fp32"))]
    contestants += [
        ("five tasks", one) for one in (peers(models, bench.python, bench.infinity) if bench.python else [])
    ]
    lines: Lines = []
    for what, server in contestants:
        try:
            with bench.start(server) as one:
                for task in TASKS[: 1 if what == "one task" else 5]:
                    one.ask(*server.asks(task, bench.texts[1]))
                found = one.resident_bytes()
            lines.append({"server": server.name, "what": what, "processes": server.processes, "MiB": found / 2**20})
        except ServerError as error:
            bench.failed[f"{server.name}, memory"] = str(error)
    for line in lines:
        line["over ours with one task"] = line["MiB"] / lines[0]["MiB"]
    return lines


def split(checkpoint: Path, folder: Path) -> Path:
    """Each task as a stock model, whose tokenizer an older Transformers reads too."""
    opened = Checkpoint.open(checkpoint)
    for task in TASKS:
        split_head(opened, task, folder / task)
        config = folder / task / "tokenizer_config.json"
        said = json.loads(config.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(said), encoding="utf-8")
    return folder


def _whole(path: str) -> str:
    """Servers have other working folders; the link of a virtual environment stays one."""
    return str(Path(path).absolute())


def soaked(bench: Bench) -> Lines:
    servers = [ours(bench.checkpoint, "fp32")]
    return soak(servers, bench.start, bench.texts, TASKS, seconds=bench.soak_s, rate=20.0)


def faulty(bench: Bench) -> Lines:
    servers = [ours(bench.checkpoint, "fp32"), ours(bench.checkpoint, "fp32", MTSERVE_WORKERS="2")]
    servers += peers(bench.models, bench.python, bench.infinity) if bench.python else []
    return faults(servers, bench.start, wanted(bench))


SECTIONS: dict[str, Callable[[Bench], Lines]] = {
    "mixed": mixed,
    "several": several,
    "single": single,
    "overload": overload,
    "memory": memory,
    "faults": faulty,
    "soak": soaked,
}


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--only",
        type=lambda raw: raw.split(","),
        default=[one for one in SECTIONS if one != "soak"],
        metavar="SECTION,…",
    )
    made.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="of stsb, rte, commonsenseqa")
    made.add_argument("--peers", type=_whole, help="the Python of the peers' environment (benchmarks/peers.txt)")
    made.add_argument("--infinity", type=_whole, help="the Python of infinity's (benchmarks/peers-infinity.txt)")
    made.add_argument("--rounds", type=int, default=Bench.rounds)
    made.add_argument("--seconds", type=float, default=Bench.seconds, help="of one step of a ladder")
    made.add_argument("--overload-seconds", type=float, default=Bench.overload_s)
    made.add_argument("--soak-seconds", type=float, default=Bench.soak_s)
    made.add_argument("--json", type=Path, help="write the figures here, after every section")
    chosen = made.parse_args(argv)
    with tempfile.TemporaryDirectory() as raw:
        home = Path(raw)
        subject = make_subject(packaged_trunk(), home / "subject")
        checkpoint = home / "checkpoint"
        make_checkpoint(subject, checkpoint, dict.fromkeys(TASKS, ("classification", OPTIONS)))
        accept_profiles(Checkpoint.open(checkpoint), {"fp32": FP32, "bf16": Profile(tolerance=0.5)})
        text = open_text(subject)
        texts = (read_texts(chosen.data, text) if chosen.data.is_dir() else few_texts(text)).singles
        models = split(checkpoint, home / "models")
        how = {"rounds": chosen.rounds, "seconds": chosen.seconds, "overload_s": chosen.overload_seconds}
        how |= {"soak_s": chosen.soak_seconds}
        bench = Bench(home, texts, checkpoint, models, chosen.peers, chosen.infinity, **how)
        found: dict[str, Any] = {"machine": machine()}
        say(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
        for name in chosen.only:
            taken, found[name] = timed(lambda name=name: SECTIONS[name](bench))  # type: ignore[misc]
            show(f"{name} ({taken:.0f} s)", found[name])
            if chosen.json is not None:
                chosen.json.write_text(json.dumps({**found, "failed": bench.failed}, indent=1), encoding="utf-8")
        for name, why in bench.failed.items():
            say(f"{name} took no part: {why}")


if __name__ == "__main__":
    main()
