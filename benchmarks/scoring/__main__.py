"""Scoring a Parquet file, contestants in turns, each turn a process of its own that loads its model first.

    python -m benchmarks.scoring CHECKPOINT INPUT.parquet --trunk TRUNK [--rows 4096] [--rounds 3] [--peers PYTHON]

INPUT has a column `text`. One task and three over the same texts; rates are rows a second without loading, ratios are
medians of the ratios within a round. PYTHON has sentence-transformers and CTranslate2 (see the Makefile); the latter
takes part in fp32 alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mtserve.backends.machine import usable_cores
from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from mtserve.interop.split import split_head

_TEXT = ("classification", "token_classification")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("--trunk", required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--profile", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peers")
    parser.add_argument("--only", action="append", help="a contestant; score is always to be among them")
    chosen = parser.parse_args()
    checkpoint = Checkpoint.open(chosen.checkpoint)
    kinds = {task.name: task.kind for task in checkpoint.manifest.tasks if task.kind in _TEXT}
    with tempfile.TemporaryDirectory(prefix="scoring-") as home:
        stock = {name: str(Path(home) / name) for name in kinds if _split(checkpoint, name, Path(home) / name)}
        names = [*stock][:3]
        source = _cut(chosen.input, chosen.rows, Path(home) / "in.parquet")
        shared = {
            "model": str(chosen.checkpoint.resolve()),
            "input": str(source),
            "output": str(Path(home) / "out.parquet"),
            "stock": stock,
            "kinds": kinds,
            "trunk": chosen.trunk,
            "threads": chosen.threads,
            "batch": chosen.batch,
            "profile": chosen.profile,
        }
        others = [] if not chosen.peers else ["sentences", *(["ctranslate"] if chosen.profile == "fp32" else [])]
        contestants = chosen.only or ["engine", "score", "http", "pipeline", *others]
        found = {}
        for tasks in (names[:1], names):
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for number in range(chosen.rounds):
                for name in contestants[number % len(contestants) :] + contestants[: number % len(contestants)]:
                    python = chosen.peers if name in others else sys.executable
                    request = {**shared, "contestant": name, "tasks": tasks}
                    seconds[name].append(_turn(python, request, Path(home) / "request.json"))
            found[f"{len(tasks)} tasks"] = _told(seconds, chosen.rows)
    about = {"rows": chosen.rows, "threads": chosen.threads, "profile": chosen.profile, "tasks": names}
    sys.stdout.write(json.dumps({**about, **found}, indent=1) + "\n")


def _told(seconds: dict[str, list[float]], rows: int) -> dict[str, Any]:
    ours = seconds["score"]
    return {
        "rows_per_s": {name: round(rows / statistics.median(of), 1) for name, of in seconds.items()},
        "score_over": {
            name: round(statistics.median(a / b for a, b in zip(of, ours, strict=True)), 3)
            for name, of in seconds.items()
        },
    }


def _turn(python: str, request: dict[str, Any], path: Path) -> float:
    path.write_text(json.dumps(request), encoding="utf-8")
    argv = [python, "-m", "benchmarks.scoring.contestants", str(path)]
    run = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if run.returncode:
        raise SystemExit(f"{request['contestant']} failed: {run.stderr[-2000:]}")
    return float(json.loads(run.stdout.splitlines()[-1])["seconds"])


def _split(checkpoint: Checkpoint, task: str, folder: Path) -> bool:
    try:
        split_head(checkpoint, task, folder)
    except ConfigError:
        return False
    return True


def _cut(source: Path, rows: int, to: Path) -> Path:
    from pyarrow import parquet

    table = parquet.read_table(source, columns=["text"])
    if table.num_rows < rows:
        raise SystemExit(f"{source} has {table.num_rows} rows; {rows} were asked for")
    parquet.write_table(table.slice(0, rows), to)
    return to


if __name__ == "__main__":
    main()
