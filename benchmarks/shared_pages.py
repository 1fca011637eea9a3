"""What processes that open one bundle share of it (Linux): resident memory of each, and with shared pages divided.

python -m benchmarks.shared_pages BUNDLE [--processes 2]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

_OPENED = """
import sys
from mtserve.loading import load
engine = load(sys.argv[1])
for task in engine.tasks.values():
    engine.predict(task.name, [task.kind.sample(task.options)])
print("ready", flush=True)
input()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    argv = [sys.executable, "-c", _OPENED, chosen.bundle]
    crew = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(chosen.processes)
    ]
    for one in crew:
        assert one.stdout is not None
        one.stdout.readline()
    found = [{**_sums(f"/proc/{one.pid}/smaps_rollup"), "weights": _mapped(one.pid)} for one in crew]
    for one in crew:
        one.communicate("\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def _sums(path: str, of: str = "") -> dict[str, float]:
    """MiB by name, over all mappings, or those whose line holds `of`."""
    sums, counts = dict.fromkeys(("Rss", "Pss", "Shared_Clean"), 0), True
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            counts = of in line
        elif counts and (name := line.partition(":")[0]) in sums:
            sums[name] += int(line.split()[1])
    return {name: round(kib / 1024, 1) for name, kib in sums.items()}


def _mapped(pid: int) -> dict[str, float]:
    return _sums(f"/proc/{pid}/smaps", "weights.safetensors")


if __name__ == "__main__":
    main()
