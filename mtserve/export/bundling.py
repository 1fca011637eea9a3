"""A checkpoint to a bundle, and whether it answers as the checkpoint does. Knows no terminal.

Invariants (tests/export/ holds them):
1. A bundle is whole or not there: it is written into a folder beside it, which gets its name at the end.
2. Every task of the bundle answered its golden rows (where there are none, its kind's sample) and all calibration rows
   that there are, in ONNX Runtime and in PyTorch in fp32; what came out of the latter is in the manifest. An fp32
   bundle's logits differ by at most the tolerance of fp32; one of fewer bits is accepted as `mtserve tune` accepts a
   profile. Nothing is written that was not accepted.
3. Tensors that several graphs share, or that a head ties to the trunk, are in it once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mtserve.backends.eager import EagerBackend
from mtserve.backends.runtime import Runtime
from mtserve.bundle import GRAPHS, WEIGHTS, Dtype, Exported
from mtserve.checkpoint import Checkpoint, sha256_file
from mtserve.comparison import Answered, Cases, changed, difference
from mtserve.engine import Engine
from mtserve.errors import ExportError
from mtserve.export import quantizing
from mtserve.export.made import Made
from mtserve.folder import Writer, sync
from mtserve.golden import check_golden, golden_rows
from mtserve.loading import load_checkpoint
from mtserve.manifest import MANIFEST, Change, GoldenRow, Profile, checked_manifest, format_of
from mtserve.sealing import commit
from mtserve.tuning import MAX_FLIPS, Verdict, judge

_ROUNDS = 15


@dataclass(frozen=True)
class Tried:
    """A way to make the bundle, and what it was like: bytes of its weights, and the median time of one short request,
    with that of ONNX in fp32 beside it."""

    variant: str
    verdict: Verdict
    bytes: int
    short_ms: float
    fp32_ms: float


@dataclass(frozen=True)
class Report:
    """All of an export. `bundle` is None where none was accepted."""

    dtype: Dtype
    tried: Sequence[Tried]
    bundle: Checkpoint | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        bundle = self.bundle
        return {
            "dtype": self.dtype,
            "bundle": None if bundle is None else str(bundle.folder),
            "bytes": None if bundle is None else sum(entry.size for entry in bundle.manifest.files.values()),
            "tried": [{**vars(one), "verdict": one.verdict.as_dict()} for one in self.tried],
        }


def export(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: Dtype = "fp32",
    only: Sequence[str] = (),
    fuse: bool = False,
    max_flips: float = MAX_FLIPS,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Write a checkpoint, or `only` some tasks of it, as a bundle into a folder that is empty or not there.

    A chain goes with its two tasks. `fuse` joins operators for the kernels that ONNX Runtime has for them, which fp16
    always does. Raises ExportError for a family or a head that cannot be exported, a folder that is not empty, and a
    task that is not there.
    """
    checkpoint.check_torch("exporting it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is not empty; a bundle is written into a folder of its own")
    names = _chosen(checkpoint, only)
    base = load_checkpoint(checkpoint, profile="fp32", device="cpu", accepted_only=False)
    base = Engine([base.tasks[name] for name in names], base.backend, base.text)
    cases = [Cases.of(checkpoint, task) for task in base.tasks.values()]
    wanted = [Answered.by(base, one) for one in cases]
    golden = {
        name: checkpoint.golden(name) or golden_rows(base, name, [task.kind.sample(task.options)])
        for name, task in base.tasks.items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-exporting-") as aside:
        say(f"exporting {', '.join(names)}")
        backend = base.backend
        assert isinstance(backend, EagerBackend)
        made = Made.of(backend.model, names, fuse=fuse or dtype == "fp16", keeps=backend.keeps)
        mark = sha256_file(checkpoint.folder / MANIFEST)
        plain = Path(aside) / "fp32"
        entry = made.write(plain, "fp32", checkpoint=mark)
        reference = _opened(plain, entry, checkpoint, base)
        tried: list[Tried] = []
        for variant in quantizing.VARIANTS[dtype]:
            home = Path(aside) / f"made-{len(tried)}"
            entry = made.write(home, dtype, variant, checkpoint=mark)
            engine = _opened(home, entry, checkpoint, base)
            say(f"{variant or dtype}: answering the calibration rows of {len(names)} tasks")
            verdict = _judged(engine, wanted, golden, entry, max_flips)
            slow, quick = _short_ms(reference, engine)
            tried.append(Tried(variant or dtype, verdict, (home / WEIGHTS).stat().st_size, quick, slow))
            if verdict.accepted:
                _finish(home, checkpoint, entry, verdict, max_flips)
                if folder.exists():
                    folder.rmdir()
                home.replace(folder)
                sync(folder.parent)
                return Report(dtype, tried, Checkpoint.open(folder))
    return Report(dtype, tried, None)


def _chosen(checkpoint: Checkpoint, only: Sequence[str]) -> list[str]:
    names = [task.name for task in checkpoint.manifest.tasks]
    for name in only:
        if name not in names:
            raise ExportError(f"{checkpoint.folder} has no task {name!r}; its tasks: {', '.join(names)}")
    return [name for name in names if not only or name in only]


def _opened(folder: Path, exported: Exported, checkpoint: Checkpoint, base: Engine) -> Engine:
    """An engine over graphs on the CPU, with the tasks of another one."""
    from mtserve.backends.onnx import OnnxBackend
    from mtserve.backends.sessions import Graphs

    opened = Graphs(folder, exported, Runtime(device="cpu", threads=torch.get_num_threads()))
    return Engine(base.tasks.values(), OnnxBackend(opened, pad_id=checkpoint.manifest.text.pad_id), base.text)


def _judged(
    engine: Engine,
    wanted: Sequence[Answered],
    golden: Mapping[str, Sequence[GoldenRow]],
    exported: Exported,
    max_flips: float,
) -> Verdict:
    """Of the bundle's answers to calibration and golden rows. In fp32 only rounding may differ, so the logits decide,
    and rows are wanted of no task."""
    tasks: dict[str, Change] = {}
    missing = []
    worst = max(check_golden(engine, name, rows, tolerance=1).difference for name, rows in golden.items())
    for fp32 in wanted:
        name = fp32.cases.task.name
        if not fp32.cases.examples:
            missing.append(name)
            continue
        other = Answered.by(engine, fp32.cases)
        off = difference(fp32, other)
        worst = max(worst, off)
        tasks[name] = changed(fp32, other).model_copy(update={"difference": off if off < float("inf") else None})
    if exported.dtype != "fp32":
        return judge(exported.profile, tasks, worst=worst, missing=missing, max_flips=max_flips, speed=0.0)
    found = judge("fp32", tasks, worst=worst, missing=missing, max_flips=max_flips, speed=0.0)
    exact = worst <= found.tolerance
    reason = "" if exact else f"logits differ by {worst:.1e}, at most {found.tolerance:.0e} allowed"
    return replace(found, name=exported.profile, accepted=exact, reason=reason)


def _short_ms(*engines: Engine) -> list[float]:
    """Median milliseconds of the trunk's work for one short input, taking turns."""
    times: list[list[float]] = [[] for _ in engines]
    task = next(iter(engines[0].tasks.values()))
    for _ in range(_ROUNDS):
        for engine, found in zip(engines, times, strict=True):
            work = engine.prepare(task.name, task.kind.sample(task.options))
            began = time.perf_counter()
            engine.step([work])
            found.append(1e3 * (time.perf_counter() - began))
    return [median(found) for found in times]


def _finish(home: Path, checkpoint: Checkpoint, exported: Exported, verdict: Verdict, max_flips: float) -> None:
    """What a bundle has beside graphs, and its manifest last."""
    before, names = checkpoint.manifest, list(exported.heads)
    writer = Writer(home)
    for path in (GRAPHS, WEIGHTS, *(head.path for head in exported.heads.values())):
        sync(home / path)
        writer.note(path)
    tasks = [checkpoint.task(name) for name in names]
    for path in ["tokenizer.json", *(p for task in tasks for p in (task.golden, task.calibration) if p is not None)]:
        writer.write(path, (checkpoint.folder / path).read_bytes())
    measured = Profile(
        tolerance=verdict.tolerance,
        flips=verdict.flips,
        rows=verdict.rows,
        max_flips=max_flips,
        tasks=dict(verdict.tasks),
    )
    chains = [chain for chain in before.chains if {chain.first, chain.then} <= set(names)]
    bare: dict[str, Any] = {"weights": None, "config": None, "tied": {}}
    raw = {
        "format": format_of(chains),
        "artefact": "bundle",
        "written_by": before.written_by,
        "trunk": before.trunk.model_copy(update={"weights": WEIGHTS}).model_dump(mode="json"),
        "text": before.text.model_dump(mode="json"),
        "tasks": [task.model_copy(update=bare).model_dump(mode="json") for task in tasks],
        "chains": [chain.model_dump(mode="json") for chain in chains],
        "profiles": {exported.profile: measured.model_dump(mode="json")},
        "exported": exported.model_dump(mode="json"),
        "files": {path: entry.model_dump(mode="json") for path, entry in writer.files.items()},
        "provenance": before.provenance,
    }
    card = checkpoint.folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    (home / "README.md").write_text(text.rstrip() + "\n\n" + _told(exported, verdict), encoding="utf-8")
    commit(home, checked_manifest(raw, home / MANIFEST))


def _told(exported: Exported, verdict: Verdict) -> str:
    """The card's section on the bundle."""
    lines = [
        "## ONNX",
        "",
        f"Exported in {exported.dtype}{f' ({exported.variant})' if exported.variant else ''} by PyTorch "
        f"{exported.versions['torch']}; run by ONNX Runtime {exported.versions['onnxruntime']} beside PyTorch in fp32:",
        "",
        "| task | rows | metric | PyTorch | ONNX | decided otherwise | largest difference of a logit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in verdict.tasks.items():
        off = "" if one.difference is None else f"{one.difference:.1e}"
        score = f"{one.fp32:.4f} | {one.fp32 + one.change:.4f}"
        lines.append(f"| {name} | {one.rows} | {one.metric} | {score} | {one.flips} | {off} |")
    return "\n".join(lines) + "\n"
