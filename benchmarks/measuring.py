"""How the benchmarks of generation measure and tell: rounds in which contestants take turns, tables, the machine.

Knows no model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.subject import TEXTS

Lines = list[dict[str, Any]]
Call = Callable[[], tuple[float, Any]]
"""A contestant's turn: the seconds that it took, and what it made."""


@dataclass(frozen=True)
class How:
    """What is measured, and how often. `pause_s` lets the threads of the last contestant fall asleep."""

    texts: Sequence[str] = tuple(TEXTS)
    rounds: int = 5
    new_tokens: int = 48
    requests: Sequence[int] = (1, 8, 32)
    prompts: Sequence[int] = (16, 64, 256)
    questions: Sequence[int] = (20, 60, 120)
    arrivals: int = 60
    memory_bytes: int = 2**30
    pause_s: float = 0.3
    threads: int = 2
    ctranslate2: str | None = None


QUICK = How(
    texts=tuple(TEXTS[:3]), rounds=1, new_tokens=4, requests=(1, 3), prompts=(4, 9), questions=(20,), arrivals=3,
    memory_bytes=2**22, pause_s=0, threads=1,
)  # fmt: skip


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def rounds(how: How, calls: Mapping[str, Call], *, times: int = 1) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every contestant in each round, and what each made last; there are `times` as many rounds as asked.

    Who begins changes from round to round; a first one warms up and does not count.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    made: dict[str, Any] = {}
    for number in range(how.rounds * times + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(how.pause_s)
            taken, made[name] = calls[name]()
            if number:
                seconds[name].append(taken)
    return seconds, made


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def bandwidths(size: int) -> dict[str, float]:
    """Bytes a second of the memory, the best of some passes over a buffer of so many bytes."""
    source, vector = torch.ones(size // 4).view(-1, 1024), torch.ones(1024)
    target = torch.empty_like(source)
    moves: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy, bytes read and written": (2 * size, lambda: target.copy_(source)),
        "read by a sum": (size, lambda: source.sum()),
        "read by matrix x vector": (size, lambda: source @ vector),
    }
    return {name: count / min(timed(move)[0] for _ in range(6)) for name, (count, move) in moves.items()}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def show(title: str, lines: Lines) -> None:
    """A table with a column for each key of the lines."""
    cells = [[*lines[0]], *([_cell(value) for value in line.values()] for line in lines)] if lines else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    say(f"\n{title}")
    for row in cells:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    return str(value) if not isinstance(value, float) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((row.split(":")[1].strip() for row in rows if row.startswith("model name")), "unknown")
    found: dict[str, Any] = {"processor": processor, "cores": len(os.sched_getaffinity(0))}
    return found | {"threads": torch.get_num_threads()} | {n: version(n) for n in ("torch", "transformers", "numpy")}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, How]:
    """The arguments with those that all these benchmarks take; torch gets its threads."""
    parser.add_argument("location", nargs="?", help="a checkpoint or a trunk's folder; by default the demo's trunk")
    parser.add_argument("--task", help="which task of generation of a checkpoint; the first by default")
    parser.add_argument("--threads", type=int, help=f"{How.threads} by default")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--quick", action="store_true", help="a few tokens once, to see that it runs")
    chosen = parser.parse_args(argv)
    how = QUICK if chosen.quick else How()
    how = replace(how, threads=chosen.threads or how.threads)
    torch.set_num_threads(how.threads)
    return chosen, how


def report(sections: Mapping[str, Callable[[], Lines]], *, into: Path | None) -> None:
    """Run sections, show their tables, and write them down after each."""
    found: dict[str, Any] = {"machine": machine()}
    say(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    for name, run in sections.items():
        taken, found[name] = timed(run)
        show(f"{name} ({taken:.0f} s)", found[name])
        if into is not None:
            into.write_text(json.dumps(found, indent=1), encoding="utf-8")
