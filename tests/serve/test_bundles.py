"""The tests of routes and streams once more, over bundles instead of checkpoints: serving knows no difference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mtserve.checkpoint import Checkpoint
from mtserve.export.bundling import export
from mtserve.serve.app import make_app
from mtserve.serve.front import Front
from mtserve.serve.loading import load_table
from mtserve.serve.table import Root, TaskTable
from mtserve.settings import Settings
from tests.serve.test_routes import *  # noqa: F403
from tests.serve.test_streaming import *  # noqa: F403


@pytest.fixture(scope="session")
def bundles(checkpoints: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    home, made = tmp_path_factory.mktemp("bundles"), []
    for at, folder in enumerate(checkpoints):
        report = export(Checkpoint.open(Path(folder)), home / str(at))
        assert report.bundle is not None, report
        made.append(str(report.bundle.folder))
    return made[0], made[1]


@pytest.fixture(scope="session")
def limits(bundles: tuple[str, str]) -> Settings:
    small: dict[str, Any] = {"max_inputs": 20, "max_body_bytes": 20_000, "max_text_chars": 5_000}
    return Settings(model=bundles, max_queue_tokens=600, **small)


@pytest.fixture(scope="session")
def table(limits: Settings) -> Iterator[TaskTable]:
    made = load_table(limits)
    yield made
    made.model.close()


@pytest.fixture(scope="session")
def client(table: TaskTable, assets: Path) -> Iterator[TestClient]:
    root = Root(table)
    with TestClient(Front(make_app(root, assets=assets), root=root), follow_redirects=False) as made:
        yield made


def test_the_listing_names_every_task(client: TestClient) -> None:  # type: ignore[no-redef]  # that of checkpoints
    listed = client.get("/tasks").json()["tasks"]
    assert {task["profile"] for task in listed} == {"onnx-fp32"}
    assert {(task["padding_free"], task["device"], task["golden"]["checked"]) for task in listed} == {
        (False, "cpu", True)
    }
