"""Memory and time of `mtserve score` on files of 10³ to 10⁶ short rows, each run a process of its own.

    python -m benchmarks.score_memory MODEL TEXTS --task TASK [--rows 1000 --rows 1000000] [--figure PNG]

TEXTS: a file of text. A row is three to eight of its words, one after another, and its number: no two are equal.
Memory is the resident set of the process, read ten times a second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

_LOOK_S = 0.1
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--rows", action="append", type=int)
    parser.add_argument("--ending", default="jsonl", choices=("jsonl", "csv", "parquet"))
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="score-memory-") as folder:
        for rows in chosen.rows or [10**power for power in range(3, 7)]:
            one = measured(chosen, rows, Path(folder))
            sys.stdout.write(json.dumps({name: value for name, value in one.items() if name != "memory"}) + "\n")
            sys.stdout.flush()
            found.append(one)
    if chosen.figure:
        draw(found, chosen.figure)


def measured(chosen: Any, rows: int, home: Path) -> dict[str, Any]:
    source, output = home / "in.jsonl", home / f"out-{rows}.{chosen.ending}"
    with source.open("w", encoding="utf-8") as file:
        for number, text in enumerate(itertools.islice(short(chosen.texts), rows)):
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    tasks = [word for task in chosen.task for word in ("--task", task)]
    argv = [sys.executable, "-m", "mtserve", "score", chosen.model, str(source), str(output), *tasks, "--json"]
    began, memory = time.monotonic(), list[tuple[float, float]]()
    with (home / "said").open("wb") as said, subprocess.Popen(argv, stdout=said, stderr=subprocess.DEVNULL) as process:
        looked = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory.append((time.monotonic() - began, looked.memory_info().rss / MIB))
            except psutil.Error:
                break
            time.sleep(_LOOK_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with exit code {process.returncode}")
    summary = json.loads((home / "said").read_text(encoding="utf-8"))
    picked = {name: summary[name] for name in ("rows", "errors", "tokens", "seconds", "rows_per_s", "padding")}
    working = sorted(mib for at, mib in memory if at > memory[-1][0] / 2)
    peak = max(mib for _, mib in memory)
    sizes = {"input_mib": round(source.stat().st_size / MIB, 1), "output_mib": round(output.stat().st_size / MIB, 1)}
    about = {**picked, "wall_s": round(memory[-1][0], 1), **sizes, "peak_mib": round(peak)}
    return {**about, "median_of_second_half_mib": round(working[len(working) // 2]), "memory": memory}


def short(texts: Path) -> Iterator[str]:
    """Short texts without end, no two of them equal."""
    words = itertools.cycle(texts.read_text(encoding="utf-8").split())
    for number in itertools.count():
        yield " ".join([*itertools.islice(words, 3 + number % 6), str(number)])


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.semilogx([one["rows"] for one in found], [one["peak_mib"] for one in found], marker="o")
    left.set(xlabel="rows", ylabel="peak resident MiB", ylim=(0, None), title="Peak by size of the file")
    for one in found:
        times, mib = zip(*one["memory"], strict=True)
        right.plot([at / times[-1] for at in times], mib, label=f"{one['rows']:,} rows", linewidth=1)
    right.set(xlabel="share of the run", ylabel="resident MiB", ylim=(0, None), title="Over the run")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
