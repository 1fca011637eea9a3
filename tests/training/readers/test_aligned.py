"""Aligned text: parallel files, and the layout with labels and paraphrases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtserve.errors import ConfigError
from tests.training.readers.helpers import both, faults, good

SIDES = {"source": "new", "target": "old"}


def parallel(new: str, old: str, base: Path, **options: Any) -> dict[str, Any]:
    (base / "train.new.tok").write_text(new)
    (base / "train.old.tok").write_text(old)
    return {"path": ".", "split": "train", "format": "parallel", "options": {**SIDES, "suffix": ".tok", **options}}


def test_pairs_and_styles(tmp_path: Path) -> None:
    source = parallel('You "are\nGo\n', "Thou art\nGo hence", tmp_path)
    assert good(tmp_path, **source) == [
        {"text": 'You "are', "target": "Thou art", "pair": 1, "repairs": []},
        {"text": "Go", "target": "Go hence", "pair": 2, "repairs": []},
    ]
    source["options"]["view"] = "style"
    records, _ = both(tmp_path, **source)
    assert [(r.where, r.data["text"], r.data["label"], r.data["pair"]) for r in records] == [
        ("train.new.tok:1", 'You "are', "new", 1),
        ("train.old.tok:1", "Thou art", "old", 1),
        ("train.new.tok:2", "Go", "new", 2),
        ("train.old.tok:2", "Go hence", "old", 2),
    ]


@pytest.mark.parametrize("view", ["translate", "style"])
@pytest.mark.parametrize("equal", [{1}, {3}, {1, 2, 4, 5}, {2, 5}, set()])
def test_equal_pairs_are_left_out_and_counted(tmp_path: Path, view: str, equal: set[int]) -> None:
    old = "".join(f"{n}\n" if n in equal else f"{n}!\n" for n in range(1, 6))
    source = parallel("1\n2\n3\n4\n5\n", old, tmp_path, view=view, drop_equal=True)
    found = good(tmp_path, **source)
    assert {record["pair"] for record in found} == {1, 2, 3, 4, 5} - equal
    kinds = [kind for record in found for kind in record.get("repairs", [])]
    assert kinds == ["equal_pair"] * len(equal)


def test_lines_that_are_empty(tmp_path: Path) -> None:
    """On both sides they are no pair; on one side they are a fault of this pair."""
    source = parallel("a\n\n \nd\n\n", "a\n\nc\nd\n\n", tmp_path)
    assert [r.data["pair"] for r in both(tmp_path, **source)[0]] == [1, 4]
    assert faults(tmp_path, **source) == [("train.new.tok:3", "an empty line beside one that is not")]


@pytest.mark.parametrize(
    ("new", "old", "sizes"), [("a\nb\nc", "a\n", (3, 1)), ("", "a\nb\n", (0, 2)), ("a", "a\n\n", (1, 2))]
)
def test_files_of_different_length(tmp_path: Path, new: str, old: str, sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="found train.new.tok {}, train.old.tok {}".format(*sizes)):
        both(tmp_path, **parallel(new, old, tmp_path))


def test_a_missing_side(tmp_path: Path) -> None:
    source = parallel("a", "b", tmp_path)
    with pytest.raises(ConfigError, match=r"dev\.new\.tok does not exist"):
        both(tmp_path, **{**source, "split": "dev"})


@pytest.fixture
def strap(tmp_path: Path) -> Path:
    for name, text in {
        "input0.txt": "Thou art\nYou are\nGo hence\n",
        "label": "original\nmodern\noriginal\n",
        "paraphrase_250_input0.txt": "you are\nyou're\nleave\n",
    }.items():
        (tmp_path / f"dev.{name}").write_text(text)
    return tmp_path


def test_strap_pairs_of_a_style(strap: Path) -> None:
    options = {"style": "original"}
    assert good(strap, path=".", split="dev", format="strap", options=options) == [
        {"text": "you are", "target": "Thou art", "pair": 1},
        {"text": "leave", "target": "Go hence", "pair": 3},
    ]
    with pytest.raises(ConfigError, match=r"dev\.label has no style 'old'; found modern, original"):
        good(strap, path=".", split="dev", format="strap", options={"style": "old"})


def test_strap_has_three_classes_with_paraphrases_and_two_without(strap: Path) -> None:
    source = {"path": ".", "split": "dev", "format": "strap", "options": {"view": "style"}}
    found = good(strap, **source)
    assert [(r["text"], r["label"]) for r in found[:4]] == [
        ("Thou art", "original"),
        ("you are", "translate"),
        ("You are", "modern"),
        ("you're", "translate"),
    ]
    assert [r["label"] for r in found].count("translate") == len(found) // 2 == 3
    (strap / "dev.paraphrase_250_input0.txt").unlink()
    assert [r["label"] for r in good(strap, **source)] == ["original", "modern", "original"]
    with pytest.raises(ConfigError, match=r"dev\.paraphrase_250_input0\.txt does not exist"):
        good(strap, path=".", split="dev", format="strap", options={"style": "modern"})


def test_strap_of_a_trailing_empty_line_and_an_empty_label(strap: Path) -> None:
    for name in ("input0.txt", "paraphrase_250_input0.txt"):
        (strap / f"dev.{name}").write_text("a\nb\nc\n\n")
    (strap / "dev.label").write_text("x\n\ny\r\n\n")
    records, bad = both(strap, path=".", split="dev", format="strap", options={"view": "style"})
    assert [r.data["label"] for r in records] == ["x", "translate", "y", "translate"]
    assert [b.where for b in bad] == ["dev.label:2"]
