"""Several processes over one model: the same output, and what happens when one of them ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtserve.checkpoint import Checkpoint
from mtserve.score.workers import Processes, WorkerError
from mtserve.settings import Settings
from tests.score.test_run import SMALL, lines, make, run_once, texts, write
from tests.tiny import tiny, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny("bert", only=("topic", "tags")))


def test_workers_write_what_one_process_writes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*texts(23), {"id": 23}])
    run_once(tiny("bert", only=("topic", "tags")).engine, source, tmp_path / "one.jsonl")
    run = make(tiny("bert", only=("topic", "tags")).engine, source, tmp_path / "two.jsonl", "topic", "tags")
    summary = run.score(Processes(str(checkpoint.folder), Settings(), 2))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert (summary.counts["rows"], summary.counts["errors"]) == (24, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "one.jsonl", "two.jsonl"]


def test_a_worker_that_is_killed_costs_no_committed_part(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(400)), tmp_path / "out.jsonl"
    engine = tiny("bert", only=("topic", "tags")).engine
    run = make(engine, source, output, "topic", "tags")
    killed: list[int] = []

    def kill() -> None:
        while not list(tmp_path.glob("*.parts/*-*.json")):
            time.sleep(0.01)
        for child in psutil.Process().children():
            if "spawn_main" in " ".join(child.cmdline()):
                killed.append(child.pid)
                os.kill(child.pid, signal.SIGKILL)
                return

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(WorkerError, match="a worker ended with exit code -9; the same command goes on"):
        run.score(Processes(str(checkpoint.folder), Settings(), 2))
    thread.join()
    assert killed
    summary = run_once(engine, source, output)
    assert summary.reused >= SMALL.part_rows
    assert [row["id"] for row in lines(output)] == list(range(400))


def test_what_a_worker_cannot_do_is_said(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: Any) -> None:
    source = write(tmp_path / "in.jsonl", texts(3))
    run = make(tiny("bert", only=("topic", "tags")).engine, source, tmp_path / "out.jsonl", "topic", "tags")
    with pytest.raises(Exception, match="nowhere"):
        run.score(Processes(str(tmp_path / "nowhere"), Settings(), 1))
