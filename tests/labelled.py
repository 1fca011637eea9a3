"""Tiny checkpoints with labelled calibration rows, whose truths are what the model answers in fp32."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtserve.checkpoint import Checkpoint
from mtserve.golden import golden_rows
from mtserve.sealing import seal
from mtserve.weights import task_part, trunk_part
from tests.tiny import CORPUS, TOKENIZER_JSON, Tiny

WORDS = CORPUS.split()


def rows(small: Tiny, task: str, count: int) -> list[dict[str, Any]]:
    """Labelled records of a task; equal ones in every run."""
    draw = random.Random(task)
    kind, found = small.engine.task(task).kind.name, []
    for _ in range(count):
        one, other = (" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(2))
        if kind == "multiple_choice":
            found.append({"question": one, "choices": other.split()[:3]})
        elif kind == "similarity":
            found.append({"text": one, "text_pair": other})
        else:
            found.append({"text": one})
    if kind == "generation":
        return [{**record, "target": "a tin of soup"} for record in found]
    answers = small.engine.predict(task, found)
    return [{**record, **_truth(kind, answer)} for record, answer in zip(found, answers, strict=True)]


def _truth(kind: str, answer: Any) -> dict[str, Any]:
    if kind == "classification":
        likely = [one["label"] for one in answer if one["score"] >= 0.5]
        return {"label": likely[0] if len(likely) == 1 and len(answer) > 2 else answer[0]["label"]}
    if kind == "similarity":
        return {"score": answer["score"]}
    if kind == "multiple_choice":
        return {"answer": answer[0]["index"]}
    return {"spans": [{"start": s["start"], "end": s["end"], "label": s["entity_group"]} for s in answer]}


def write_labelled(folder: Path, small: Tiny, *, count: int = 12, bare: tuple[str, ...] = ()) -> Checkpoint:
    """A checkpoint with golden rows, and so many calibration rows a task, but for the tasks named in `bare`."""
    parts = []
    for task in small.tasks:
        part = task_part(small.model, task.name, kind=task.kind.name, options=task.options)
        golden = golden_rows(small.engine, task.name, [task.kind.sample(task.options)])
        calibration = [] if task.name in bare else rows(small, task.name, count)
        parts.append(replace(part, golden=golden, calibration=calibration))
    return seal(
        folder,
        trunk_part(small.model, source="random"),
        tasks=parts,
        tokenizer_json=TOKENIZER_JSON,
        text=small.spec,
        provenance={},
        card="# tiny\n",
        written_by="tests",
    )
