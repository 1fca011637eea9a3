"""A Ray cluster on this machine: the bytes of one process, also when an actor is killed; where Ray is installed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtserve.checkpoint import Checkpoint
from mtserve.score.cluster import Cluster
from mtserve.settings import Settings
from tests.score.test_run import make, run_once, texts, write
from tests.tiny import tiny, write_checkpoint

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny("bert", only=("topic", "tags")))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_cluster_writes_what_one_process_writes(checkpoint: Checkpoint, tmp_path: Path, ending: str) -> None:
    home, engine = tmp_path / "in", tiny("bert", only=("topic", "tags")).engine
    home.mkdir()
    write(home / "a.jsonl", [*texts(23), {"id": 23}])
    write(home / "b.jsonl", [])
    write(home / "c.jsonl", texts(9))
    wanted = run_once(engine, home, tmp_path / f"one.{ending}")
    run = make(engine, home, tmp_path / f"ray.{ending}", "topic", "tags")
    summary = run.score(Cluster(str(checkpoint.folder), Settings(), 2))
    assert (tmp_path / f"ray.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes()
    for name in ("rows", "errors", "tokens", "joined"):
        assert summary.counts[name] == wanted.counts[name]


def test_an_actor_that_is_killed_costs_time_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, engine = write(tmp_path / "in.jsonl", texts(600)), tiny("bert", only=("topic", "tags")).engine
    run_once(engine, source, tmp_path / "one.jsonl")
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            if len(list(tmp_path.glob("ray.jsonl.parts/*-*.json"))) >= 3:
                for process in psutil.process_iter(["cmdline"]):
                    if "_Actor" in " ".join(process.info["cmdline"] or ()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    make(engine, source, tmp_path / "ray.jsonl", "topic", "tags").score(Cluster(str(checkpoint.folder), Settings(), 1))
    assert killed
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
