"""The tests of routes and streams once more, over bundles instead of checkpoints: serving knows no difference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mtserve.checkpoint import Checkpoint
from mtserve.export.bundling import export
from mtserve.serve.table import TaskTable
from tests.serve.conftest import asking, loaded, small_limits
from tests.serve.test_routes import *  # noqa: F403
from tests.serve.test_streaming import *  # noqa: F403

pytestmark = pytest.mark.xdist_group("bundles")


@pytest.fixture(scope="session")
def bundles(checkpoints: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    home, made = tmp_path_factory.mktemp("bundles"), []
    for at, folder in enumerate(checkpoints):
        report = export(Checkpoint.open(Path(folder)), home / str(at))
        assert report.bundle is not None, report
        made.append(str(report.bundle.folder))
    return made[0], made[1]


@pytest.fixture(scope="session")
def table(bundles: tuple[str, str]) -> Iterator[TaskTable]:
    with loaded(small_limits(bundles)) as made:
        yield made


@pytest.fixture(scope="session")
def client(table: TaskTable, assets: Path) -> Iterator[TestClient]:
    with asking(table, assets) as made:
        yield made


def test_the_listing_names_every_task(client: TestClient) -> None:  # type: ignore[no-redef]  # that of checkpoints
    listed = client.get("/tasks").json()["tasks"]
    assert {task["profile"] for task in listed} == {"onnx-fp32"}
    assert {(task["padding_free"], task["device"], task["golden"]["checked"]) for task in listed} == {
        (False, "cpu", True)
    }
