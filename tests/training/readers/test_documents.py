"""Plain sentences, and the pairs of next sentence prediction."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtserve.errors import ConfigError
from tests.training.readers.helpers import both, good


def test_sentences_and_their_documents(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text('\n\none "two\n  \n\nthree\nfour\n')
    assert good(tmp_path, path="d.txt", format="lines") == [
        {"text": 'one "two', "document": 1},
        {"text": "three", "document": 2},
        {"text": "four", "document": 2},
    ]


def test_half_of_the_pairs_are_random_ones_of_other_documents(tmp_path: Path) -> None:
    documents = [
        [f"{name}{at}" for at in range(size)] for name, size in (("a", 1), ("b", 30), ("c", 2), ("d", 8), ("e", 1))
    ]
    (tmp_path / "d.txt").write_text("\n\n".join("\n".join(lines) for lines in documents))
    found = good(tmp_path, path="d.txt", format="sentence_pairs", options={"seed": 3})
    assert len(found) == 29 + 1 + 7
    assert [r["label"] for r in found].count("random") == 18
    for record in found:
        text, other = record["text"], record["text_pair"]
        assert text[0] == "abcde"[record["document"] - 1]
        if record["label"] == "next":
            assert other == f"{text[0]}{int(text[1:]) + 1}"
        else:
            assert other[0] != text[0]
    assert {r["text_pair"] for r in found} & {"a0", "e0"}, "documents of one sentence serve as random ones"
    assert found == good(tmp_path, path="d.txt", format="sentence_pairs", options={"seed": 3})
    assert found != good(tmp_path, path="d.txt", format="sentence_pairs", options={"seed": 4})


def test_every_sentence_of_other_documents_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a0\na1\n\nb0\nb1\nb2\n\nc0\n")
    drawn: set[tuple[str, str]] = set()
    for seed in range(200):
        found = good(tmp_path, path="d.txt", format="sentence_pairs", options={"seed": seed})
        drawn |= {(r["text"], r["text_pair"]) for r in found if r["label"] == "random"}
    expected = {("a0", other) for other in ("b0", "b1", "b2", "c0")}
    assert drawn == expected | {(text, other) for text in ("b0", "b1") for other in ("a0", "a1", "c0")}


def test_one_document_is_refused_and_damage_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a\nb\n")
    with pytest.raises(
        ConfigError,
        match=r"d\.txt needs several documents, with empty lines between them, or document_lines; found one",
    ):
        both(tmp_path, path="d.txt", format="sentence_pairs")
    (tmp_path / "d.txt").write_bytes(b"a\nb\xff\nc\n\nd\n")
    records, bad = both(tmp_path, path="d.txt", format="sentence_pairs")
    assert [b.where for b in bad] == ["d.txt:2"]
    assert [(r.data["text"], r.data["text_pair"]) for r in records] == []


def test_so_many_lines_are_a_document_where_empty_lines_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("".join(f"{at}\n" for at in range(25)))
    options = {"document_lines": 10}
    found = good(tmp_path, path="d.txt", format="sentence_pairs", options=options)
    assert [int(r["text"]) for r in found] == [*range(9), *range(10, 19), *range(20, 24)]
    for record in found:
        here, there = int(record["text"]), int(record["text_pair"])
        assert (there == here + 1) if record["label"] == "next" else (here // 10 != there // 10)
    assert {r["label"] for r in found} == {"next", "random"}
