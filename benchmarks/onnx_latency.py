"""A short request, and batches: ONNX bundles beside the checkpoint in PyTorch, each in a process of its own, in turns.

    python -m benchmarks.onnx_latency CHECKPOINT BUNDLE… [--rounds 30] [--threads N]

Milliseconds of an engine's pass, trunk and head, without tokenising: medians of interleaved rounds. Rows are random
words of the tokenizer. Threads that wait spin for a while: processes of PyTorch let them sleep soon, as servers do, and
there is a pause before each turn, so that none takes the time of the one whose turn it is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from mtserve.backends.machine import usable_cores
from mtserve.backends.runtime import Runtime
from mtserve.batching import Batch
from mtserve.checkpoint import Checkpoint
from mtserve.loading import load_checkpoint
from mtserve.rows import Row, make_row

SHAPES = ((1, 16), (1, 32), (1, 128), (8, 32), (32, 32), (32, 128))
_PAUSE_S = 0.05  # until the threads of the one before have gone to sleep
PROFILES = ("fp32", "bf16", "int8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--task", help="whose head answers; the first one by default")
    chosen = parser.parse_args(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    manifest = Checkpoint.open(chosen.checkpoint).manifest
    task, longest = chosen.task or manifest.tasks[0].name, manifest.trunk.max_length or SHAPES[-1][1]
    given = {f"PyTorch {profile}": (chosen.checkpoint, profile) for profile in PROFILES}
    for path in chosen.bundles:
        exported = Checkpoint.open(path).manifest.exported
        assert exported is not None
        given[f"ONNX {exported.dtype} {exported.variant}".rstrip()] = path, exported.profile
    with Apart(given, task, chosen.threads) as apart:
        found = {f"{rows} x {seq}": apart.turns(rows, seq, chosen.rounds) for rows, seq in SHAPES if seq <= longest}
    report = {"threads": chosen.threads, "rounds": chosen.rounds, "task": task, "ms": found}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


class Apart:
    """Contestants, each loaded in a process that waits for its turn."""

    def __init__(self, given: dict[str, tuple[Path, str]], task: str, threads: int) -> None:
        context, self.ends, self.processes = multiprocessing.get_context("spawn"), dict[str, Connection](), []
        for name, (folder, profile) in given.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_contestant, args=(theirs, folder, profile, task, threads), daemon=True)
            process.start()
            self.ends[name] = ours
            self.processes.append(process)

    def __enter__(self) -> Apart:
        for name, end in self.ends.items():
            assert end.recv() == "ready", name
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.ends.values():
            end.send(None)
        for process in self.processes:
            process.join(30)

    def turns(self, rows: int, seq: int, rounds: int) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in self.ends}
        for turn in range(rounds + 2):
            for name, end in self.ends.items():
                time.sleep(_PAUSE_S)
                end.send((rows, seq))
                taken = end.recv()
                if turn > 1:
                    times[name].append(taken)
        return {name: round(statistics.median(each), 2) for name, each in times.items()}


def _contestant(end: Connection, folder: Path, profile: str, task: str, threads: int) -> None:
    checkpoint = Checkpoint.open(folder)
    if checkpoint.manifest.exported is None:
        import torch

        torch.set_num_threads(threads)
    runtime = Runtime(device="cpu", threads=threads)
    engine = load_checkpoint(
        checkpoint, profile=profile, accepted_only=False, capture=True, device="cpu", runtime=runtime
    )
    end.send("ready")
    while (shape := end.recv()) is not None:
        rows, seq = shape
        some = tuple(_row(seq, at, engine.text.vocab_size) for at in range(rows))
        batch = Batch(some, {task: tuple(range(rows))})
        began = time.perf_counter()
        engine.backend.run(batch)
        end.send(1e3 * (time.perf_counter() - began))


def _row(seq: int, seed: int, vocabulary: int) -> Row:
    ids = np.random.default_rng(seed).integers(vocabulary // 10, vocabulary, seq)
    return make_row(ids, [0] * seq, [(0, 0)] * seq, [False] * seq)


if __name__ == "__main__":
    main()
