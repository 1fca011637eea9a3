"""Two tiny random checkpoints, a BERT and a GPT-2, and the app over both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mtserve.checkpoint import Checkpoint
from mtserve.golden import golden_rows
from mtserve.sealing import seal
from mtserve.serve.app import make_app
from mtserve.serve.front import Front
from mtserve.serve.living import Living
from mtserve.serve.loading import load
from mtserve.serve.table import Root, TaskTable
from mtserve.settings import Settings
from mtserve.weights import task_part, trunk_part
from tests.tiny import GENERATION, TOKENIZER_JSON, tiny


def sealed(
    folder: Path,
    family: str,
    *,
    only: tuple[str, ...] | None = None,
    tasks: dict[str, tuple[str, dict[str, Any]]] | None = None,
    golden: bool = True,
    wrong: str = "",
) -> Checkpoint:
    """A tiny random checkpoint; with one golden row a task, or none; that of task `wrong` has other logits."""
    made = tiny(family, only=only, tasks=tasks)
    parts = []
    for task in made.tasks:
        part = task_part(made.model, task.name, kind=task.kind.name, options=task.options, metrics={"metric": 0.5})
        if golden:
            rows = golden_rows(made.engine, task.name, [task.kind.sample(task.options)])
            if task.name == wrong:
                rows = [row.model_copy(update={"logits": [[9.0] * len(row.logits[0])]}) for row in rows]
            part = replace(part, golden=rows)
        parts.append(part)
    return seal(
        folder,
        trunk_part(made.model, source=f"tiny-{family}"),
        tasks=parts,
        tokenizer_json=TOKENIZER_JSON,
        text=made.spec,
        provenance={},
        card="# tiny",
        written_by="tests",
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a checkpoint with every one-pass kind, and of one with two generation tasks."""
    home = tmp_path_factory.mktemp("checkpoints")
    sealed(home / "encoder", "bert")
    sealed(home / "decoder", "gpt2", only=tuple(GENERATION))
    return str(home / "encoder"), str(home / "decoder")


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for the files of Swagger UI."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "swagger-ui-bundle.js").write_text("// the bundle")
    return folder


def small_limits(models: tuple[str, str]) -> Settings:
    """Limits small enough to run into."""
    small: dict[str, Any] = {"max_inputs": 20, "max_body_bytes": 20_000, "max_text_chars": 5_000}
    return Settings(model=models, max_queue_tokens=600, **small)


@contextmanager
def loaded(limits: Settings) -> Iterator[TaskTable]:
    made = load(limits)
    yield made.table
    made.model.close()


def asking(table: TaskTable, assets: Path) -> TestClient:
    root = Root(table)
    return TestClient(Front(make_app(root, assets=assets), root=root), follow_redirects=False)


@pytest.fixture(scope="session")
def limits(checkpoints: tuple[str, str]) -> Settings:
    return small_limits(checkpoints)


@pytest.fixture(scope="session")
def living(limits: Settings) -> Iterator[Living]:
    made = load(limits)
    yield made
    made.model.close()


@pytest.fixture(scope="session")
def table(living: Living) -> TaskTable:
    return living.table


@pytest.fixture(scope="session")
def client(table: TaskTable, assets: Path) -> Iterator[TestClient]:
    with asking(table, assets) as made:
        yield made
