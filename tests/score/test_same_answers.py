"""The same rows by every way in: `predict`, `Engine.score`, files, a server and, where Ray is installed, a cluster.

Each way gets the rows at once, so that all plan the same batches: their answers are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mtserve.engine import Engine
from mtserve.score.cutting import Limits
from mtserve.score.run import Here, Workers
from mtserve.score.workers import engine_for
from mtserve.settings import Settings
from tests.labelled import rows
from tests.score.test_run import lines, make, plain, table, write
from tests.serve.conftest import asking, loaded, sealed
from tests.tiny import GENERATION, OPTIONS, tiny

ENCODER: dict[str, tuple[str, dict[str, Any]]] = {  # with random weights every pair is at a limit, no word is named
    **OPTIONS,
    "names": ("token_classification", {"labels": ["a", "b", "c", "d", "e"], "max_length": 48}),
    "score": ("similarity", {"low": 0, "high": 5, "method": "both", "max_length": 48}),
}
FAMILIES = {"bert": ENCODER, "gpt2": GENERATION}
EVERY = [(family, task) for family, tasks in FAMILIES.items() for task in tasks]
COUNT = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("models")
    return {family: str(sealed(home / family, family, tasks=tasks).folder) for family, tasks in FAMILIES.items()}


@pytest.fixture(scope="module")
def engines(folders: dict[str, str]) -> dict[str, Engine]:
    return {family: engine_for(folder, Settings(threads=1)) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def server(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    assets = tmp_path_factory.mktemp("assets")
    (assets / "swagger-ui-bundle.js").write_text("// the bundle")
    with loaded(Settings(model=tuple(folders.values()), threads=1)) as made, asking(made, assets) as client:
        yield client


def asked(family: str, task: str) -> list[dict[str, Any]]:
    """Rows without their truths."""
    small = tiny(family, tasks={task: FAMILIES[family][task]})
    fields = small.engine.task(task).kind.example.model_fields
    return [{name: row[name] for name in row if name in fields} for row in rows(small, task, COUNT)]


def of_files(engine: Engine, task: str, folder: Path, by: Workers) -> Iterator[tuple[str, list[Any]]]:
    """Answers in files of each kind."""
    for ending in ("jsonl", "parquet"):
        output = folder / f"out.{ending}"
        make(engine, folder / "in.jsonl", output, task, form="nested", keep=(), limits=Limits()).score(by)
        found = lines(output) if ending == "jsonl" else table(output)
        assert [row["error"] for row in found] == [None] * COUNT
        yield ending, [plain(row[task], []) for row in found]


@pytest.mark.parametrize(("family", "task"), EVERY)
def test_every_way_in_gives_the_same_answers(
    family: str, task: str, engines: dict[str, Engine], server: TestClient, tmp_path: Path
) -> None:
    engine, items = engines[family], asked(family, task)
    write(tmp_path / "in.jsonl", items)
    wanted = engine.predict(task, items)
    assert len({repr(answer) for answer in wanted}) > COUNT // 2  # rows that differ
    assert [one[task] for one in engine.score(iter(items), [task])] == wanted
    for ending, found in of_files(engine, task, tmp_path, Here(engine)):
        assert found == wanted, ending
    response = server.post(f"/tasks/{task}", json={"inputs": items})
    assert response.status_code == 200, response.text
    assert response.json() == wanted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cluster_gives_the_same_answers(
    family: str, folders: dict[str, str], engines: dict[str, Engine], tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    from mtserve.score.cluster import Cluster

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for task in FAMILIES[family]:
            items, home = asked(family, task), tmp_path / task
            home.mkdir()
            write(home / "in.jsonl", items)
            by = Cluster(folders[family], Settings(threads=1), 1)
            for ending, found in of_files(engines[family], task, home, by):
                assert found == engines[family].predict(task, items), (task, ending)
    finally:
        ray.shutdown()
