"""A server that keeps trunk outputs: second tasks, private requests, its metrics, and bundles."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mtserve.errors import ConfigError
from mtserve.serve.app import make_app
from mtserve.serve.exchange import opened
from mtserve.serve.front import Front
from mtserve.serve.loading import load
from mtserve.serve.metrics import metrics
from mtserve.serve.table import Root
from mtserve.settings import Settings

TEXT = {"inputs": "ana silva moved from porto to oslo"}


def counted(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def test_a_later_task_on_the_same_text_runs_no_trunk(checkpoints: tuple[str, str], assets: Path) -> None:
    table = load(Settings(model=checkpoints[:1], cache_mib=1), observer=metrics().observer).table
    with TestClient(Front(make_app(root := Root(table), assets=assets), root=root)) as client:

        def passes(task: str, **headers: str) -> int:
            return int(client.post(f"/tasks/{task}", json=TEXT, headers=headers).headers["x-trunk-passes"])

        reused, computed = (counted(client, f"mtserve_{what}_rows_total") for what in ("reused", "computed"))
        private = {"Cache-Control": "no-store"}
        assert [passes("topic", **private), passes("topic", **private)] == [1, 1]
        assert [passes("topic"), passes("names"), passes("tags"), passes("topic", **private)] == [1, 0, 0, 1]
        both = client.post("/predict", json={**TEXT, "inputs": [TEXT["inputs"]], "tasks": ["topic", "tags"]}).json()
        assert both["usage"]["trunk_passes"] == 0
        assert counted(client, "mtserve_reused_rows_total") - reused == 3
        assert counted(client, "mtserve_computed_rows_total") - computed == 4
        assert 0 < counted(client, "mtserve_kept_outputs_bytes") <= 2**20
    table.model.close()


def test_private_requests_are_private_in_the_model_process_too(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    from mtserve.serve.process import facts_of, hosted
    from mtserve.serve.remote import RemoteModel

    async def main() -> None:
        living = load(Settings(model=checkpoints[:1], cache_mib=1))
        path, stopped = tmp_path / "socket", asyncio.Event()
        answering = asyncio.create_task(hosted(living).serve(path, stopped=stopped))
        while not path.exists():
            await asyncio.sleep(0.01)
        remote = RemoteModel(str(path), facts_of(living.base, living.live))
        opened("")

        async def passes(**how: Any) -> int:
            _, usage = await remote.predict({"topic": None}, [TEXT["inputs"]], timeout_s=30, **how)
            return usage.trunk_passes

        assert [await passes(private=True), await passes(), await passes(private=True), await passes()] == [1, 1, 1, 0]
        stopped.set()
        await answering
        living.model.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_bundle_keeps_none(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    from mtserve.checkpoint import Checkpoint
    from mtserve.export.bundling import export

    bundle = export(Checkpoint.open(Path(checkpoints[0])), tmp_path / "bundle").bundle
    assert bundle is not None
    with pytest.raises(ConfigError, match="is a bundle, of which no trunk outputs can be kept"):
        load(Settings(model=(str(bundle.folder),), cache_mib=1))
