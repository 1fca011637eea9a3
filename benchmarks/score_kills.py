"""One run of `mtserve score`, killed with SIGKILL at random moments and given again, beside one that was let be.

    python -m benchmarks.score_kills MODEL INPUT --task TASK [--task TASK…] [--kills 20] [--workers 1]

The moments are drawn over the time that the whole run took, after the start of each try; a try that ends before its
moment is the last, and the rest of the kills go into another run. Exit code 1 if the outputs differ by a byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("input")
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--part-rows", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ending", default="jsonl")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="score-kills-") as home:
        found = measured(chosen, Path(home))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    raise SystemExit(0 if found["equal"] else 1)


def measured(chosen: Any, home: Path) -> dict[str, Any]:
    whole, draw = home / f"whole.{chosen.ending}", random.Random(chosen.seed)  # noqa: S311
    began = time.monotonic()
    tried(command(chosen, whole), None)
    seconds = time.monotonic() - began
    killed, runs, equal = 0, 0, True
    committed: list[int] = []
    while killed < chosen.kills or runs == 0:
        output = home / f"killed-{runs}.{chosen.ending}"
        runs += 1
        while not output.exists():
            left = chosen.kills - killed
            after = draw.uniform(0, seconds) if left else None
            if tried(command(chosen, output), after):
                killed += 1
                committed.append(len(list(home.glob(f"{output.name}.parts/*-*.json"))))
        equal = equal and output.read_bytes() == whole.read_bytes()
    rows = whole.read_bytes().count(b"\n") if chosen.ending == "jsonl" else None
    return {
        "rows": rows,
        "seconds_of_a_whole_run": round(seconds, 1),
        "kills": killed,
        "runs": runs,
        "parts_there_after_each_kill": committed,
        "equal": equal,
    }


def command(chosen: Any, output: Path) -> list[str]:
    tasks = [word for task in chosen.task for word in ("--task", task)]
    options = ["--part-rows", str(chosen.part_rows), "--workers", str(chosen.workers)]
    return [sys.executable, "-m", "mtserve", "score", chosen.model, chosen.input, str(output), *tasks, *options]


def tried(argv: list[str], after: float | None) -> bool:
    """Whether the process, and all that it started, was killed before it ended."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    if process.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(argv)} ended with exit code {process.returncode}")
    return False


if __name__ == "__main__":
    main()
