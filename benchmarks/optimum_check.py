"""A bundle beside what optimum-onnx makes of the same tasks: answers, sizes, speed of a short request.

    python -m benchmarks.optimum_check CHECKPOINT BUNDLE --peers PYTHON

`mtserve heads split` gives a stock model a task, but for those without a stock model; PYTHON (an environment with
optimum-onnx, see the Makefile) exports and quantises each with optimum's own tools. Rows are the golden rows of all
tasks. Exit code 1 if fp32 logits differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtserve.backends.runtime import Runtime
from mtserve.batching import Batch
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.errors import ConfigError
from mtserve.interop.split import split_head
from mtserve.loading import load_checkpoint
from mtserve.rows import Row

_ROUNDS = 20
_STOCK = ("classification", "similarity", "token_classification", "multiple_choice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--peers", required=True, help="Python of the environment with optimum-onnx")
    chosen = parser.parse_args()
    checkpoint, bundle = Checkpoint.open(chosen.checkpoint), Checkpoint.open(chosen.bundle)
    engine = load_checkpoint(bundle, runtime=Runtime(device="cpu"))
    with tempfile.TemporaryDirectory(prefix="optimum-") as home:
        rows = _rows(checkpoint, engine)
        models = dict(_stock(checkpoint, Path(home) / "stock"))
        if not models:
            raise SystemExit(f"{chosen.checkpoint} has no task that is a stock model: nothing to compare")
        request = Path(home) / "request.json"
        given = [[row.ids.tolist(), row.type_ids.tolist()] for row in rows]
        request.write_text(json.dumps({"models": models, "rows": given, "home": home}))
        peer = str(Path(__file__).parent / "optimum_peer.py")
        run = subprocess.run([chosen.peers, peer, str(request)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"the peer failed: {run.stderr[-3000:]}")
    theirs: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    report = {task: _beside(engine, task, rows, of) for task, of in theirs.items()}
    sizes = {name: sum(of[name]["bytes"] for of in theirs.values()) / 1e6 for name in ("fp32", "int8")}
    ours = sum(entry.size for name, entry in bundle.manifest.files.items() if name.endswith((".onnx", ".safetensors")))
    told = {"rows": len(rows), "graphs_mb": {"bundle": ours / 1e6, "optimum, all tasks": sizes}, "tasks": report}
    sys.stdout.write(json.dumps(told, indent=1) + "\n")
    raise SystemExit(any(of["difference"] > 1e-4 for of in report.values()))


def _stock(checkpoint: Checkpoint, home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each task that is a stock model of one pass, with its folder and kind."""
    for task in checkpoint.manifest.tasks:
        if task.kind in _STOCK:
            try:
                split_head(checkpoint, task.name, home / task.name)
            except ConfigError:
                continue
            yield task.name, {"folder": str(home / task.name), "kind": task.kind}


def _rows(checkpoint: Checkpoint, engine: Engine) -> list[Row]:
    """Of all golden rows, whatever their task."""
    found: dict[Any, Row] = {}
    for name, task in engine.tasks.items():
        for golden in checkpoint.golden(name):
            for row in engine.prepare(name, task.kind.parse(golden.input)).rows:
                found[row.key] = row
    return [*found.values()]


def _beside(engine: Engine, task: str, rows: list[Row], theirs: dict[str, Any]) -> dict[str, Any]:
    batch = Batch(tuple(rows), {task: tuple(range(len(rows)))})
    options = engine.task(task).options
    low, high = getattr(options, "low", 0.0), getattr(options, "high", 1.0)  # a stock model of scores gives their range
    ours = [low + (high - low) * one for one in engine.backend.run(batch)[task]]
    exact = [np.asarray(one, np.float32) for one in theirs["fp32"]["logits"]]
    lossy = [np.asarray(one, np.float32) for one in theirs["int8"]["logits"]]
    alone, times = Batch((rows[0],), {task: (0,)}), []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        engine.backend.run(alone)
        times.append(1e3 * (time.perf_counter() - began))
    return {
        "difference": max(float(np.abs(a - b).max()) for a, b in zip(ours, exact, strict=True)),
        "difference_of_their_int8": max(float(np.abs(a - b).max()) for a, b in zip(exact, lossy, strict=True)),
        "ms": {"bundle": statistics.median(times), "fp32": theirs["fp32"]["ms"], "int8": theirs["int8"]["ms"]},
    }


if __name__ == "__main__":
    main()
