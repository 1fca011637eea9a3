"""CommonsenseQA (Talmor et al., 2019), as its own JSON lines nest a question and as the hub's columns hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.readers.jsonl import read_jsonl
from training.readers.record import Files, NoOptions, Records, converted


def read_commonsenseqa(files: Files, options: NoOptions) -> Records:
    """Records of id, question, choices, and answer where there is one: the index of the choice with the key's label."""
    return converted(read_jsonl(files, options), convert)


def convert(data: Mapping[str, Any]) -> dict[str, Any]:
    """One question of either form. Raises ValueError."""
    inner = data.get("question")
    stem, choices = (inner.get("stem"), inner.get("choices")) if isinstance(inner, Mapping) else (inner, None)
    choices = data.get("choices") if choices is None else choices
    if isinstance(choices, Mapping):
        labels, texts = choices.get("label"), choices.get("text")
    elif isinstance(choices, list) and all(isinstance(one, Mapping) for one in choices):
        labels, texts = [one.get("label") for one in choices], [one.get("text") for one in choices]
    else:
        raise ValueError(f"a question needs choices of label and text; found {choices!r:.60}")
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise ValueError(f"choices need equally many labels and texts; found {labels!r:.60} and {texts!r:.60}")
    made = {"id": data.get("id"), "question": stem, "choices": texts}
    if (key := data.get("answerKey")) in (None, ""):
        return made
    if labels.count(key) != 1:
        raise ValueError(f"answerKey {key!r:.60} is not the label of one choice; found {labels!r:.60}")
    return {**made, "answer": labels.index(key)}
