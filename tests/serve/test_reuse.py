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


def test_a_bundle_keeps_them_too(checkpoints: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtserve.backends.onnx import OnnxBackend
    from mtserve.checkpoint import Checkpoint
    from mtserve.export.bundling import export
    from mtserve.loading import load_checkpoint

    bundle = export(Checkpoint.open(Path(checkpoints[0])), tmp_path / "bundle").bundle
    assert bundle is not None
    plain, kept = load_checkpoint(bundle), load_checkpoint(bundle, keep_bytes=10**6)
    texts = [TEXT["inputs"], "good", "a man is feeding his dog", "good"]
    computed = []
    for task in ("names", "topic", "tags"):
        assert _rounded(kept.predict(task, texts)) == _rounded(plain.predict(task, texts))
        computed.append(kept.counters.tokens)
    assert computed[1:] == computed[:1] * 2
    assert kept.counters.trunk_passes == 1
    pairs = [{"text": text, "text_pair": "good"} for text in texts]
    assert _rounded(kept.predict("score", [*pairs, *pairs[:1]])) == _rounded(
        plain.predict("score", [*pairs, *pairs[:1]])
    )
    some = [*texts, "red", "ana"]  # of which two are new
    before = kept.counters.tokens
    assert _rounded(kept.predict("topic", some)) == _rounded(plain.predict("topic", some))
    assert kept.counters.tokens - before == sum(len(w.prompt[0]) for w in kept.prepare_all("topic", some[-2:]))
    assert isinstance(kept.backend, OnnxBackend)
    assert 0 < kept.backend.kept_bytes <= 10**6
    monkeypatch.setattr("mtserve.backends.sessions.Graphs.bound", True)
    with pytest.raises(ConfigError, match="stay on the GPU"):
        load_checkpoint(bundle, keep_bytes=10**6)


def _rounded(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_rounded(value) for value in found]
    return pytest.approx(found, abs=1e-5) if isinstance(found, float) else found
