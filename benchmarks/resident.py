"""Resident memory and disk of one task, of five tasks on one trunk, and of five separate stock models.

    python -m benchmarks.resident TRUNK     (a folder or hub id; the demo's packaged encoder by default)

Each case runs in a process of its own: load, answer one input of every task, then read the resident set from the
operating system. The first line is a process that has only imported the same libraries.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "topic": ("classification", {"labels": [f"label{i}" for i in range(8)]}),
    "mood": ("classification", {"labels": ["negative", "neutral", "positive"]}),
    "alike": ("similarity", {}),
    "choice": ("multiple_choice", {}),
    "names": ("token_classification", {"labels": ["person", "place", "organisation"]}),
}
STOCK = {
    "classification": "AutoModelForSequenceClassification",
    "similarity": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "token_classification": "AutoModelForTokenClassification",
}


def resident_mib() -> float:
    """Resident set of this process now, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def make_checkpoint(trunk_folder: Path, folder: Path, tasks: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """A checkpoint of these tasks (their kinds and options) with fresh heads."""
    from mtserve.model import Model
    from mtserve.sealing import seal
    from mtserve.tasks import KINDS
    from mtserve.text import text_spec
    from mtserve.trunk import load_trunk
    from mtserve.weights import task_part, trunk_part

    model = Model(load_trunk(str(trunk_folder)))
    tokenizer_json = (trunk_folder / "tokenizer.json").read_text(encoding="utf-8")
    parts = []
    for name, (kind, raw) in tasks.items():
        options = KINDS[kind].options.model_validate(raw)
        model.add(name, KINDS[kind].head(options))
        parts.append(task_part(model, name, kind=kind, options=options))
    spec = text_spec(tokenizer_json, pad_id=model.trunk.config.pad_token_id or 0, eos_id=None)
    seal(
        folder,
        trunk_part(model, source=trunk_folder.name),
        tasks=parts,
        tokenizer_json=tokenizer_json,
        text=spec,
        provenance={},
        card="benchmark\n",
        written_by="benchmarks",
    )


def libraries() -> None:
    import mtserve.backends.eager
    import mtserve.weights  # noqa: F401


def ours(folder: str) -> None:
    import mtserve

    engine = mtserve.load(folder)
    for task in engine.tasks.values():
        engine.predict(task.name, [task.kind.sample(task.options)])


def separate(trunk: str) -> list[Any]:
    """One stock model a task, as people serve them today, all in this one process."""
    import torch
    import transformers

    models = []
    for kind, _ in TASKS.values():
        model = getattr(transformers, STOCK[kind]).from_pretrained(trunk, dtype=torch.float32).eval()
        ids = torch.ones((1, 1, 12) if kind == "multiple_choice" else (1, 12), dtype=torch.long)
        with torch.inference_mode():
            model(input_ids=ids)
        models.append(model)
    return models


def measure(case: str, argument: str) -> float:
    """Resident MiB of a case, from a child process."""
    argv = [sys.executable, "-m", "benchmarks.resident", "--child", case, argument]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
    return float(json.loads(done.stdout.splitlines()[-1]))


def disk_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trunk", nargs="?")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, argument = arguments.child
        kept = {"libraries": lambda _: libraries(), "ours": ours, "separate": separate}[case](argument)
        sys.stdout.write(f"\n{resident_mib():.1f}\n")
        del kept
        return
    from mtserve.demo.run import packaged_trunk
    from mtserve.resolve import resolve

    trunk = resolve(arguments.trunk) if arguments.trunk else packaged_trunk()
    with tempfile.TemporaryDirectory() as home:
        one, five = Path(home) / "one", Path(home) / "five"
        make_checkpoint(trunk, one, {"topic": TASKS["topic"]})
        make_checkpoint(trunk, five, TASKS)
        base = measure("libraries", "-")
        rows = [
            ("libraries alone", base, 0.0),
            ("one task", measure("ours", str(one)), disk_mib(one)),
            ("five tasks, one trunk", measure("ours", str(five)), disk_mib(five)),
            ("five stock models, one process", measure("separate", str(trunk)), 5 * disk_mib(one)),
        ]
    print("case                             resident MiB   above libraries   disk MiB")  # noqa: T201
    for name, resident, disk in rows:
        print(f"{name:32} {resident:12.0f} {resident - base:17.0f} {disk:10.1f}")  # noqa: T201


if __name__ == "__main__":
    main()
