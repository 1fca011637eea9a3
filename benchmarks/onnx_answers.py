"""Whole evaluation splits, answered by a checkpoint that accepts fp32 alone and by a bundle of it: how many differ.

    python -m benchmarks.onnx_answers CHECKPOINT BUNDLE RUN [KEY=VALUE…]

RUN is a run file or a recipe, as for `python -m training`; its data are read, nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys

from mtserve.decisions import flipped
from training.report.answers import answers
from training.report.command import sealed
from training.runfile import base_of, find, read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("bundle")
    parser.add_argument("run")
    parser.add_argument("changes", nargs="*")
    chosen = parser.parse_args()
    path = find(chosen.run)
    config, base, found = read_config(path, chosen.changes), base_of(path), {}
    ours, theirs = (sealed(config, base, one) for one in (chosen.checkpoint, chosen.bundle))
    for name, (engine, of) in ours.items():
        options = engine.task(name).options
        plain, exported = answers(engine, name, of, split="eval"), answers(theirs[name][0], name, of, split="eval")
        flips = sum(flipped(one, other, options) for one, other in zip(plain, exported, strict=True))
        found[name] = {"examples": len(plain), "decided otherwise": flips}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
