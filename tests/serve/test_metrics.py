"""Metrics: what engine and scheduler tell is counted, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from mtserve.serve.app import make_app
from mtserve.serve.front import Front
from mtserve.serve.loading import load_table
from mtserve.serve.metrics import metrics
from mtserve.serve.table import Root
from mtserve.settings import Settings
from tests.serve.test_routes import TEXT, ok

ROOT = Path(__file__).parent.parent.parent


def sample(name: str, **labels: str) -> float:
    """Sum of a metric over the samples that have these labels."""
    found = [one for family in REGISTRY.collect() for one in family.samples if one.name == name]
    return sum(one.value for one in found if labels.items() <= one.labels.items())


@pytest.fixture(scope="module")
def client(checkpoints: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    table = load_table(Settings(model=checkpoints[:1]), observer=metrics().observer)
    metrics().publish(table)
    root = Root(table)
    app = make_app(root, assets=tmp_path_factory.mktemp("assets"))
    with TestClient(Front(app, root=root, ended=metrics().ended)) as made:
        yield made
    table.model.close()


def test_what_a_request_does_is_counted(client: TestClient) -> None:
    names = [
        "mtserve_batch_rows_sum",
        "mtserve_batch_rows_count",
        "mtserve_batch_tokens_sum",
        "mtserve_batch_tasks_sum",
    ]
    names += ["mtserve_padded_tokens_total", "mtserve_joined_rows_total", "mtserve_queue_wait_seconds_count"]
    before = {name: sample(name) for name in names}
    seconds = {stage: sample("mtserve_compute_seconds_total", stage=stage) for stage in ("tokenise", "trunk", "head")}
    answer = ok(client, "/predict", {"inputs": [TEXT, TEXT, "good"], "tasks": ["topic", "names"]})
    more = {name: sample(name) - value for name, value in before.items()}
    tokens = more["mtserve_batch_tokens_sum"]
    assert more == {
        "mtserve_batch_rows_sum": 2,  # distinct ones
        "mtserve_batch_rows_count": 1,
        "mtserve_batch_tokens_sum": tokens,
        "mtserve_batch_tasks_sum": 2,
        "mtserve_padded_tokens_total": tokens,  # the family is not padded
        "mtserve_joined_rows_total": 4,
        "mtserve_queue_wait_seconds_count": 1,
    }
    assert tokens < answer["usage"]["tokens"]
    assert all(sample("mtserve_compute_seconds_total", stage=stage) > value for stage, value in seconds.items())
    assert sample("mtserve_queue_rows") == sample("mtserve_queue_tokens") == 0
    for task in ("topic", "names"):
        assert sample("mtserve_requests_total", task=task, route="/predict", status="200") == 1
    assert sample("mtserve_request_seconds_count", route="/predict") == 1


def test_truncated_inputs_and_dropped_requests_are_counted(client: TestClient) -> None:
    ok(client, "/tasks/topic", {"inputs": ["good " * 300, "good"]})
    assert sample("mtserve_truncated_inputs_total", task="topic") == 1
    table = client.app._root.table()  # type: ignore[attr-defined]
    scheduler = table.model.queues["topic"].scheduler
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scheduler, "max_queue_tokens", 3)
        assert client.post("/tasks/topic", json={"inputs": TEXT}).status_code == 413
    assert sample("mtserve_dropped_requests_total", task="topic", reason="too_large") == 1


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    metrics()
    known = {one.name for family in REGISTRY.collect() for one in family.samples}
    known |= {
        f"{family.name}{end}" for family in REGISTRY.collect() for end in ("", "_total", "_bucket", "_sum", "_count")
    }
    board = json.loads((ROOT / "docs/grafana.json").read_text())
    asked = {
        name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"mtserve_\w+", t["expr"])
    }
    assert asked
    assert asked <= known
    documented = (ROOT / "docs/serving.md").read_text()
    ours = {family.name for family in REGISTRY.collect() if family.name.startswith("mtserve_")}
    assert not [name for name in ours if name not in documented]


def test_gauges_of_processes_that_ended_are_forgotten(tmp_path: Path) -> None:
    code = (
        "import os, sys; from mtserve.serve.metrics import exposition, metrics\n"
        "metrics().observer('abc').waiting(rows=3, tokens=9)\n"
        "print(exposition()[0].decode())"
    )
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the second finds what the first has left
        ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert 'mtserve_queue_rows{trunk="abc"} 3.0' in ended.stdout
