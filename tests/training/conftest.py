"""Runs small enough for tests: random trunks in folders, a few rows a task, and run files over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import TOKENIZER_JSON, trunk_of

Run = Callable[..., Path]

_SIDES = {"good": "great", "bad": "awful", "fine": "one"}
_NAMES = ("ana", "silva", "red", "green", "blue")


def rows(kind: str, count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Labelled examples of a kind; those of one kind have equally many tokens, and differ."""
    made: list[dict[str, Any]] = []
    for number in range(start, start + count):
        label = list(_SIDES)[number % 3]
        name, word = _NAMES[number % 5], f"{_SIDES[label]} {_NAMES[number // 3 % 5]}"
        if kind == "classification":
            made.append({"text": f"the {word} town", "label": label})
        elif kind == "similarity":
            made.append({"text": f"the {word}", "text_pair": f"the {name} town", "score": float(number % 6)})
        elif kind == "multiple_choice":
            made.append({"question": f"what rain {name}", "choices": ["red", "green", word], "answer": number % 3})
        elif kind == "token_classification":
            span = {"start": 4, "end": 4 + len(name), "label": "person" if number % 5 < 2 else "place"}
            made.append({"text": f"the {name} in may", "spans": [span]})
        else:
            made.append({"text": f"the {word}", "target": f"{name} town"})
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "classification": {"max_length": 32},
    "similarity": {"max_length": 32, "high": 5},
    "multiple_choice": {"max_length": 32},
    "token_classification": {"max_length": 32},
    "generation": {"max_length": 32, "max_new_tokens": 4, "template": "{source} [SEP]{target}"},
}


class Held(list[Any]):
    """Features in memory, read as those of a table are."""

    def of(self, indexes: Sequence[int]) -> list[Any]:
        return [self[index] for index in indexes]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are computed faster by one thread, far faster on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trunk_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a random trunk of a family and its tokenizer, as a hub model's folder looks."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("trunk") / f"tiny-{family}"
            trunk_of(family).save_pretrained(made[family])
            (made[family] / "tokenizer.json").write_text(TOKENIZER_JSON, encoding="utf-8")
        return made[family]

    return folder


@pytest.fixture
def run_file(tmp_path: Path, trunk_folder: Callable[[str], Path]) -> Run:
    """Writes the data of some tasks (name -> kind) and a run file over them."""

    def write(tasks: dict[str, str], family: str = "bert", **extra: Any) -> Path:
        sections: dict[str, Any] = {}
        for name, kind in tasks.items():
            write_jsonl(tmp_path / f"{name}.train.jsonl", rows(kind, 12))
            write_jsonl(tmp_path / f"{name}.eval.jsonl", rows(kind, 6, start=30))
            sections[name] = {
                "kind": kind,
                "options": OPTIONS[kind],
                "train": {"path": f"{name}.train.jsonl"},
                "eval": {"path": f"{name}.eval.jsonl"},
            }
        config = {
            "trunk": str(trunk_folder(family)),
            "output": str(tmp_path / "out"),
            "tasks": sections,
            "training": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2},
            "golden_rows": 2,
            "resamples": 20,
            **extra,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return tmp_path / "run.yaml"

    return write
