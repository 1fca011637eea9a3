"""What a second task on the same texts costs where trunk outputs are kept, beside the first one and beside none kept.

    python -m benchmarks.reuse CHECKPOINT --first intent --second sentiment

Two engines over one checkpoint, one of which keeps outputs, take turns; each round has texts of its own. `step` is the
trunk and the heads alone; `whole` also tokenises and decodes, as `Engine.predict` does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import ratio, say
from benchmarks.subject import TEXTS
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.loading import load_checkpoint


def texts(count: int, number: int, *, sentences: int) -> list[str]:
    """So many texts of so many sentences, of which no two rounds share one."""
    return [
        f"{number} {at}: " + " ".join(TEXTS[(at + k) % len(TEXTS)] for k in range(sentences)) for at in range(count)
    ]


def asked(engine: Engine, task: str, items: list[str]) -> dict[str, float]:
    """Seconds of one task on all items."""
    began = time.perf_counter()
    works = engine.prepare_all(task, items)
    prepared = time.perf_counter()
    engine.complete(works)
    stepped = time.perf_counter()
    for work in works:
        engine.finish(work)
    return {"step": stepped - prepared, "whole": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--first", required=True)
    parser.add_argument("--second", required=True)
    parser.add_argument("--mib", type=int, default=64, help="Of outputs that are kept.")
    parser.add_argument("--count", type=int, default=128, help="Texts of a round.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    checkpoint = Checkpoint.open(given.checkpoint)
    common: dict[str, Any] = {"profile": given.profile, "capture": True}
    engines = {
        "none kept": load_checkpoint(checkpoint, **common),
        "kept": load_checkpoint(checkpoint, keep_bytes=given.mib * 2**20, **common),
    }
    for sentences in (1, 4):
        found: dict[tuple[str, str, str], list[float]] = {}
        for number in range(given.rounds + 1):
            items = texts(given.count, number, sentences=sentences)
            for name, engine in engines.items():
                for task in (given.first, given.second):
                    for what, seconds in asked(engine, task, items).items():
                        if number:  # the first round warms up
                            found.setdefault((name, task, what), []).append(seconds)
        tokens = sum(len(row) for work in engines["kept"].prepare_all(given.first, items) for row in work.prompt)
        say(f"{given.count} texts of {tokens / given.count:.0f} tokens, {given.profile}, {given.threads} threads")
        for what in ("step", "whole"):
            for name in engines:
                first, second = (found[name, task, what] for task in (given.first, given.second))
                say(f"  {what:6}{name:10} second task over first: {ratio(second, first):.3f}")
            kept, none = (found[name, given.first, what] for name in ("kept", "none kept"))
            say(f"  {what:6}first task, keeping over not: {ratio(kept, none):.3f}")
        kept_bytes = engines["kept"].backend.kept_bytes
        say(f"  kept: {kept_bytes / 2**20:.1f} of {given.mib} MiB")
        assert kept_bytes <= given.mib * 2**20


if __name__ == "__main__":
    main()
