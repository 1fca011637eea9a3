"""A short request, and batches: ONNX bundles beside the checkpoint in PyTorch, in one process, taking turns.

    python -m benchmarks.onnx_latency CHECKPOINT BUNDLE… [--rounds 40] [--threads N]

Milliseconds of an engine's step, trunk and heads, without tokenising: medians of interleaved rounds. Rows are random
words of the tokenizer; a row stands for all tasks of the checkpoint that take a text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mtserve.backends.machine import usable_cores
from mtserve.backends.runtime import Runtime
from mtserve.batching import Batch
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.loading import load_checkpoint
from mtserve.rows import Row, make_row

SHAPES = ((1, 16), (1, 32), (1, 128), (8, 32), (32, 32), (32, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--task", help="whose head answers; the first one by default")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    checkpoint = Checkpoint.open(chosen.checkpoint)
    engines = {
        f"PyTorch {profile}": load_checkpoint(checkpoint, profile=profile, accepted_only=False, capture=True)
        for profile in ("fp32", "bf16", "int8")
    }
    for path in chosen.bundles:
        bundle = Checkpoint.open(path)
        assert bundle.manifest.exported is not None
        name = f"ONNX {bundle.manifest.exported.dtype} {bundle.manifest.exported.variant}".rstrip()
        engines[name] = load_checkpoint(bundle, runtime=Runtime(device="cpu", threads=chosen.threads))
    longest = checkpoint.manifest.trunk.max_length or SHAPES[-1][1]
    shapes = [(rows, seq) for rows, seq in SHAPES if seq <= longest]
    task = chosen.task or checkpoint.manifest.tasks[0].name
    found = {f"{rows} x {seq}": _turns(engines, task, rows, seq, chosen.rounds) for rows, seq in shapes}
    sys.stdout.write(
        json.dumps({"threads": chosen.threads, "rounds": chosen.rounds, "task": task, "ms": found}, indent=1) + "\n"
    )


def _turns(engines: dict[str, Engine], task: str, rows: int, seq: int, rounds: int) -> dict[str, float]:
    some = tuple(_row(seq, at, next(iter(engines.values())).text.vocab_size) for at in range(rows))
    batch = Batch(some, {task: tuple(range(rows))})
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 2):
        for name, engine in engines.items():
            began = time.perf_counter()
            engine.backend.run(batch)
            if turn > 1:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: round(statistics.median(each), 2) for name, each in times.items()}


def _row(seq: int, seed: int, vocabulary: int) -> Row:
    ids = np.random.default_rng(seed).integers(vocabulary // 10, vocabulary, seq)
    return make_row(ids, [0] * seq, [(0, 0)] * seq, [False] * seq)


if __name__ == "__main__":
    main()
