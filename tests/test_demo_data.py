"""The demo's data: enough of it, well formed, and held-out rows that share no template with training rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mtserve.demo
from mtserve.tasks import KINDS

DATA = Path(mtserve.demo.__file__).parent / "data"
TASKS = {
    "intent": "classification",
    "sentiment": "classification",
    "similarity": "similarity",
    "everyday": "multiple_choice",
    "entities": "token_classification",
    "style": "generation",
}
LEAST = dict.fromkeys(TASKS, (200, 50)) | {"style": (330, 40)}


def rows(task: str, split: str) -> list[dict[str, Any]]:
    lines = (DATA / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts(row: dict[str, Any]) -> list[str]:
    return [row[name] for name in ("text", "text_pair", "question") if name in row]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ngrams(row: dict[str, Any], size: int) -> set[tuple[str, ...]]:
    return {tuple(w[i : i + size]) for w in map(words, texts(row)) for i in range(len(w) - size + 1)}


@pytest.mark.parametrize("task", TASKS)
def test_there_are_enough_valid_rows(task: str) -> None:
    labelled = KINDS[TASKS[task]].labelled
    for split, least in zip(("train", "heldout"), LEAST[task], strict=True):
        found = rows(task, split)
        assert len(found) >= least
        for row in found:
            labelled.model_validate(row)
        assert len({json.dumps(texts(row)) for row in found}) == len(found)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_rows_share_no_template_with_training_rows(task: str) -> None:
    """No five words in a row, no text, and no skeleton (the text with its spans blanked) in common."""
    train, heldout = rows(task, "train"), rows(task, "heldout")
    seen = set().union(*(ngrams(row, 5) for row in train))
    for row in heldout:
        assert not ngrams(row, 5) & seen, texts(row)
    skeletons = {skeleton(row) for row in train}
    assert not skeletons & {skeleton(row) for row in heldout}


def skeleton(row: dict[str, Any]) -> str:
    text = " | ".join(texts(row))
    for span in reversed(row.get("spans", [])):
        text = text[: span["start"]] + "_" + text[span["end"] :]
    return " ".join(words(text))


def test_names_of_held_out_rows_are_new() -> None:
    def names(split: str) -> list[str]:
        return [row["text"][s["start"] : s["end"]] for row in rows("entities", split) for s in row["spans"]]

    known = set(names("train"))
    heldout = names("heldout")
    assert sum(name in known for name in heldout) <= 0.25 * len(heldout)


def test_style_pairs_are_short_and_differ_and_their_thou_is_no_you() -> None:
    pairs = rows("style", "train") + rows("style", "heldout")
    for row in pairs:
        assert 4 <= len(words(row["text"])) <= 16, row
        assert words(row["text"]) != words(row["target"]), row
        assert not re.search(r"\b(thou (are|have|do|will|shall|can|were)|your)\b", row["target"].lower()), row
    for field in ("text", "target"):
        assert len({" ".join(words(row[field])) for row in pairs}) == len(pairs)
