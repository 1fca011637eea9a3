"""Every GPU figure and GPU test of the project, without network, in under ten minutes; one table and a JSON file.

    python -m benchmarks.gpu_check [--json FILE] [--only SECTION,…] [--cpu-dry-run]

matrix rate   operations a second of matrix products, best of several shapes: what `share` is of
speed         an encoder of BERT-base shapes: real tokens a second at several lengths, without padding and with it
memory        most that was allocated on the device meanwhile, weights included
latency       short requests, from rows to logits, with and without CUDA graphs
agreement     largest difference from a CPU in fp32; FAILED where it is more than the precision explains
way           what the backend found that it can do here
onnx          the same encoder as a bundle, on CUDA's provider of ONNX Runtime, where that is installed
decoding      a Llama-like trunk: tokens a second of several sequences at once
training      one tiny run in fp16, bf16 and TF32
tests         those that need a GPU

Exit code 0: all is fine; 1: something failed; 2: there is no GPU. A section that fails is a line, and the others run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import bundles, encoder, others
from benchmarks.gpu_check.encoder import Encoder
from benchmarks.gpu_check.lines import FAILED, TINY, Line, Sizes, failed
from benchmarks.measuring import machine, say, show

SECTIONS: dict[str, Callable[[Encoder], Iterator[Line]]] = {
    "rates": encoder.rates,
    "agreement": encoder.agreement,
    "latency": encoder.latency,
    "speed": encoder.speed,
    "onnx": bundles.bundles,
    "decoding": others.decoding,
    "training": others.training,
    "tests": others.tests,
}
MOST_S = 420
"""No section begins later than this."""


def hardware(device: torch.device) -> dict[str, Any]:
    found = machine()
    if device.type != "cuda":
        return found | {"gpu": "none: figures of a dry run mean nothing"}
    about = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": about.name,
        "capability": f"{about.major}.{about.minor}",
        "gpu GiB": round(about.total_memory / 2**30, 1),
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help="write the figures here")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--cpu-dry-run", action="store_true", help="every path once on a CPU, at tiny sizes")
    chosen = parser.parse_args(argv)
    names = chosen.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]}; allowed: {', '.join(SECTIONS)}")
    if not chosen.cpu_dry_run and not torch.cuda.is_available():
        sys.stderr.write(
            f"There is no GPU that PyTorch {torch.__version__} sees; --cpu-dry-run runs the paths without.\n"
        )
        return 2
    device = torch.device("cpu" if chosen.cpu_dry_run else f"cuda:{torch.cuda.current_device()}")
    if chosen.cpu_dry_run:
        torch.set_num_threads(1)  # tensors this small are computed faster by one thread
    of = Encoder(TINY if chosen.cpu_dry_run else Sizes(), device)
    found: dict[str, Any] = {"machine": hardware(device), "lines": [], "seconds": {}}
    lines = _run(of, names, found, chosen.json)
    say(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    show("GPU check", [line.shown() for line in lines])
    wrong = sum(line.outcome == FAILED for line in lines)
    say(f"\n{len(lines)} lines, {wrong} of them failed; written to {chosen.json}")
    return 1 if wrong else 0


def _run(of: Encoder, names: Sequence[str], found: dict[str, Any], into: Path) -> list[Line]:
    """The lines of sections; what is known is written down after each."""
    lines: list[Line] = []
    begun = time.monotonic()
    for name in names:
        started = time.monotonic()
        if started - begun > MOST_S:
            lines.append(Line(name, f"left out: {MOST_S} s had passed", outcome=FAILED))
            continue
        try:
            lines.extend(SECTIONS[name](of))  # those before a failure are kept
        except Exception as error:  # whatever it is, the other sections may tell more
            lines.append(failed(name, error))
        found["seconds"][name] = round(time.monotonic() - started, 1)
        found["lines"] = [line.shown() | {"share": line.share} for line in lines]
        into.write_text(json.dumps(found, indent=1), encoding="utf-8")
        say(f"{name}: {found['seconds'][name]} s")
    return lines


if __name__ == "__main__":
    sys.exit(main())
