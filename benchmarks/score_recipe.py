"""All records of a recipe's files, its training splits included, through `mtserve score` with a checkpoint of it.

    python -m benchmarks.score_recipe CHECKPOINT RECIPE [key=value …] [--ending parquet]

The recipe's readers write every source as JSON lines (what they cannot read is counted), and `mtserve score --metrics`
answers those. Prints a line a source; exit code 1 if a run ended otherwise than with an answer or an error a row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtserve.tasks import KINDS
from training.config import RunConfig, TaskConfig
from training.data.source import Source, read
from training.readers.record import BadRecord
from training.runfile import base_of, find, read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*")
    parser.add_argument("--ending", default="parquet", choices=("jsonl", "csv", "parquet"))
    parser.add_argument("--only", action="append", help="a task")
    parser.add_argument("--limit", type=int, help="rows of a source; where a task generates, all take hours on a CPU")
    chosen = parser.parse_args()
    path = find(chosen.recipe)
    config = read_config(path, chosen.changes)
    failed = False
    with tempfile.TemporaryDirectory(prefix="score-recipe-") as home:
        for task, split, source in sources(config):
            if chosen.only and task not in chosen.only:
                continue
            rows = Path(home) / f"{task}-{split}.jsonl"
            written, bad = write(source, config.data_home(base_of(path)), rows, limit=chosen.limit)
            found = scored(chosen, task, config.tasks[task], source, rows)
            failed = failed or found.get("rows") != written
            about = {"task": task, "split": split, "source": source.shown, "unreadable": bad, "written": written}
            sys.stdout.write(json.dumps({**about, **found}) + "\n")
            sys.stdout.flush()
    raise SystemExit(failed)


def sources(config: RunConfig) -> Iterator[tuple[str, str, Source]]:
    """Every file of every task that a checkpoint answers."""
    for name, task in config.tasks.items():
        for split in ("train", "eval", "test"):
            of = getattr(task, split)
            if isinstance(of, Source) and task.kind in KINDS:
                yield name, split, of


def write(source: Source, base: Path, to: Path, *, limit: int | None) -> tuple[int, int]:
    """How many records there are, and how many places hold none."""
    rows = bad = 0
    with to.open("w", encoding="utf-8") as file:
        for record in read(source, base):
            if isinstance(record, BadRecord):
                bad += 1
                continue
            if limit is not None and rows == limit:
                break
            file.write(json.dumps({**record.data, "where": record.where}, ensure_ascii=False, default=str) + "\n")
            rows += 1
    return rows, bad


def scored(chosen: Any, name: str, task: TaskConfig, source: Source, rows: Path) -> dict[str, Any]:
    columns = [word for field, column in source.columns.items() for word in ("--column", f"{field}={column}")]
    output = rows.with_suffix(f".out.{chosen.ending}")
    argv = [
        sys.executable,
        "-m",
        "mtserve",
        "score",
        chosen.checkpoint,
        str(rows),
        str(output),
        "--task",
        name,
        *columns,
    ]
    run = subprocess.run([*argv, "--metrics", "--json"], capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1) or not output.exists():
        return {"exit": run.returncode, "said": run.stderr[-500:]}
    summary = json.loads(run.stdout)
    kept = ("rows", "errors", "truncated", "labelled", "tokens", "seconds", "rows_per_s")
    return {"exit": run.returncode, **{key: summary[key] for key in kept}, "metrics": summary["metrics"].get(name)}


if __name__ == "__main__":
    main()
