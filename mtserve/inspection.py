"""What is in a model, whether it is intact, and how it differs from another one. Knows no terminal and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from pydantic import ValidationError

from mtserve.checkpoint import Checkpoint
from mtserve.comparison import Answered, Cases
from mtserve.decisions import flipped
from mtserve.engine import Engine
from mtserve.golden import GoldenReport, check_golden, largest_difference
from mtserve.loading import load_checkpoint
from mtserve.profiles import PRECISIONS
from mtserve.tasks.base import AnyKind

MOST_COMPARED = 200


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint as JSON-ready facts: trunk, tasks in order, sizes."""
    manifest = checkpoint.manifest
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    heads = sum(size for name, size in sizes.items() if name.startswith("heads/"))
    tasks = [
        {
            "name": task.name,
            "kind": task.kind,
            "labels": list(task.handler.label_names(task.parsed_options)),
            "options": task.options,
            **_preparation(task.parsed_options.preparation, manifest.text.preparation),
            "metrics": task.metrics,
            "tied": task.tied,
            "golden_rows": len(checkpoint.golden(task.name)),
            "calibration_rows": len(checkpoint.calibration(task.name)),
        }
        for task in manifest.tasks
    ]
    return {
        "folder": str(checkpoint.folder),
        "artefact": manifest.artefact,
        "exported": None if manifest.exported is None else manifest.exported.model_dump(mode="json"),
        "format": manifest.format,
        "written_by": manifest.written_by,
        "trunk": manifest.trunk.model_dump(mode="json"),
        "text": manifest.text.model_dump(mode="json"),
        "tasks": tasks,
        "chains": [chain.model_dump(mode="json") for chain in manifest.chains],
        "profiles": {name: profile.model_dump(mode="json") for name, profile in manifest.profiles.items()},
        "bytes": {"all": sum(sizes.values()), "trunk": sizes[manifest.trunk.weights], "heads": heads},
        "provenance": manifest.provenance,
    }


def _preparation(own: tuple[str, ...] | None, shared: tuple[str, ...]) -> dict[str, Any]:
    """The steps in force for a task, and whether its rows can be those of the checkpoint's other tasks."""
    return {"preparation": list(shared if own is None else own), "shares_passes": own is None or own == shared}


def verify(checkpoint: Checkpoint) -> list[GoldenReport]:
    """Read every byte, load the model and encode the golden rows of every task again, in fp32 or as a bundle does.

    Raises CheckpointError where a hash differs; whether golden rows are reproduced is in the reports.
    """
    checkpoint.verify()
    return golden_reports(checkpoint, load_checkpoint(checkpoint, profile=_exact(checkpoint)))


def _exact(checkpoint: Checkpoint) -> str:
    """The profile to compare in: fp32, or the only one that a bundle has."""
    exported = checkpoint.manifest.exported
    return "fp32" if exported is None else exported.profile


def verify_profiles(checkpoint: Checkpoint) -> dict[str, list[GoldenReport]]:
    """As `verify`, in fp32 and then in every other accepted profile that this machine has units for."""
    found = {_exact(checkpoint): verify(checkpoint)}
    if checkpoint.manifest.exported is not None:
        return found
    from mtserve.backends.hardware import device, hardware

    there = hardware(device())
    for name in checkpoint.manifest.profiles:
        if name in PRECISIONS and name not in found and PRECISIONS[name].pays(there):
            found[name] = golden_reports(checkpoint, load_checkpoint(checkpoint, profile=name))
    return found


def golden_reports(checkpoint: Checkpoint, engine: Engine) -> list[GoldenReport]:
    """One report for each task, over its golden rows, with the tolerance of the profile in force."""
    tolerance = checkpoint.manifest.tolerance(engine.backend.profile)
    return [
        check_golden(engine, task.name, checkpoint.golden(task.name), tolerance=tolerance)
        for task in checkpoint.manifest.tasks
    ]


def compare(one: Checkpoint, other: Checkpoint) -> dict[str, Any]:
    """How two checkpoints differ: trunk, tasks and options, and for each common task the answers to the first one's
    calibration rows, both in fp32 or as a bundle does (largest difference of a logit, rows that are decided otherwise,
    and where the options are the same the metric of both)."""
    left = {task.name: task for task in one.manifest.tasks}
    right = {task.name: task for task in other.manifest.tasks}
    common = [name for name in left if name in right and left[name].kind == right[name].kind]
    engines = (
        load_checkpoint(one, profile=_exact(one), accepted_only=False),
        load_checkpoint(other, profile=_exact(other), accepted_only=False),
    )
    return {
        "same_trunk": one.manifest.trunk.fingerprint == other.manifest.trunk.fingerprint,
        "only_here": [name for name in left if name not in right],
        "only_there": [name for name in right if name not in left],
        "other_kind": [name for name in left if name in right and name not in common],
        "tasks": {
            name: {
                "same_options": left[name].options == right[name].options,
                **_answers_differ(engines, name, one, scored=left[name].options == right[name].options),
            }
            for name in common
        },
    }


def _answers_differ(engines: tuple[Engine, Engine], task: str, rows: Checkpoint, *, scored: bool) -> dict[str, Any]:
    """Both engines' answers to the task's calibration rows, of which there may be none; the difference is None between
    outputs of other shapes, or where one is no finite number. `scored`: with both metrics where rows have truths."""
    held = engines[0].task(task)
    records = rows.calibration(task)[:MOST_COMPARED]
    fields = held.kind.example.model_fields
    examples = [held.kind.parse({name: record[name] for name in fields if name in record}) for record in records]
    both = {
        side: Answered.by(engine, Cases(held, [], examples))
        for side, engine in zip(("here", "there"), engines, strict=True)
    }
    here, there = both.values()
    changed = sum(flipped(a, b, held.options) for a, b in zip(here.predictions, there.predictions, strict=True))
    worst = 0.0
    for a, b in zip(here.logits, there.logits, strict=True):
        for x, y in zip(a, b, strict=False):
            worst = max(worst, largest_difference(x, y))
    found: dict[str, Any] = {
        "rows": len(examples),
        "flips": changed,
        "largest_logit_difference": worst if isfinite(worst) else None,
    }
    labelled = _labelled(held.kind, records) if scored else []
    if labelled:
        scores = {side: replace(of, cases=Cases(held, labelled, examples)).score() for side, of in both.items()}
        found["metric"] = {"name": held.kind.metric, **scores}
    return found


def _labelled(kind: AnyKind, records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Records as labelled examples; none where one of them has no truth."""
    try:
        return [kind.labelled.model_validate(record) for record in records]
    except ValidationError:
        return []
