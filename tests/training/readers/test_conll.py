"""Columns, sentences, and what is wrong with tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtserve.tasks.spans import invalid_tags, tags_to_spans
from tests.training.readers.helpers import both, faults, good
from training.readers.conll import to_iob2


def conll(**options: Any) -> dict[str, Any]:
    return {"path": "d.txt", "format": "conll", "options": options}


def test_sentences_documents_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(
        b"\xef\xbb\xbf-DOCSTART- -X- -X- O\r\n\r\nAna B-PER\r\nSilva\tI-PER\r\n\r\n \t\r\n- O\r\n"
        b"-DOCSTART- -X- O\r\nPorto  B-LOC \r\n"
    )
    records, bad = both(tmp_path, **conll())
    assert not bad
    assert [(r.where, r.data["words"], r.data["tags"], r.data["document"]) for r in records] == [
        ("d.txt:3", ["Ana", "Silva"], ["B-PER", "I-PER"], 1),
        ("d.txt:7", ["-"], ["O"], 1),
        ("d.txt:9", ["Porto"], ["B-LOC"], 2),
    ]


def test_columns_and_comments(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("# id 1\n1\tAna\tB-PER\tx\n# no tag\n2\tleft\tO\tx\n\n1\t#\tO\tx\n")
    found = good(tmp_path, **conll(token=1, tag=2, comments="#"))
    assert [(r["words"], r["tags"]) for r in found] == [(["Ana", "left"], ["B-PER", "O"]), (["#"], ["O"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("word", "no columns 0 and -1 for word and tag; found 1: 'word'"),
        (" O", "an empty word: ' O'"),
        ("\u00a0 O", "an empty word: '\\xa0 O'"),
        ("a I-x", "orphan tag: 'I-x' goes on where no entity is open (repair: true would mend it)"),
        ("a \u200f", "stray tag: '\\u200f' is no tag of the scheme (repair: true would mend it)"),
    ],
)
def test_a_fault_refuses_its_sentence(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "d.txt").write_text(f"a O\n\nb O\n{line}\nc O\n\nd O\n", encoding="utf-8")
    records, bad = both(tmp_path, **conll())
    assert [r.data["words"] for r in records] == [["a"], ["d"]]
    assert [(b.where, b.message) for b in bad] == [("d.txt:4", message)]


def test_faults_of_one_sentence_are_counted(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a B-x\nb I-y\nc ?\nd I-x\n")
    assert faults(tmp_path, **conll()) == [
        (
            "d.txt:2",
            "joined tag: 'I-y' goes on with another label than the open entity's (repair: true would mend it) "
            "(and 2 more in this sentence)",
        )
    ]
    assert good(tmp_path, **conll(repair=True)) == [
        {
            "words": ["a", "b", "c", "d"],
            "tags": ["B-x", "B-y", "O", "B-x"],
            "document": 0,
            "repairs": ["joined", "stray", "orphan"],
        }
    ]


@pytest.mark.parametrize(
    ("scheme", "tags", "made", "findings"),
    [
        ("iob1", "I-a I-a B-a I-b O I-a", "B-a I-a B-a B-b O B-a", []),
        ("bioes", "S-a B-a I-a E-a S-b O", "B-a B-a I-a I-a B-b O", []),
        ("bilou", "U-a B-a L-a O", "B-a B-a I-a O", []),
        ("bioes", "B-a E-a I-a S-a E-a", "B-a I-a B-a B-a B-a", [(2, "orphan"), (4, "orphan")]),
        ("iob2", "S-a E-a o B- - B", "O O O O O O", [(at, "stray") for at in range(6)]),
        ("iob2", "B-a-b I-a-b I-a", "B-a-b I-a-b B-a", [(2, "joined")]),
    ],
)
def test_schemes(scheme: str, tags: str, made: str, findings: list[tuple[int, str]]) -> None:
    assert to_iob2(tags.split(), scheme) == (made.split(), findings)


TAGS = st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b", "?", "S-a", "E-b", "U-a", "L-a"]), max_size=12)


@given(TAGS, st.sampled_from(["iob1", "iob2", "bioes", "bilou"]))
def test_what_comes_out_is_strict_iob2(tags: list[str], scheme: str) -> None:
    made, findings = to_iob2(tags, scheme)
    assert not list(invalid_tags(made))
    assert len(made) == len(tags)
    if scheme == "iob2":
        assert (made == tags) == (not findings) == (not list(invalid_tags(tags)))
        assert set(tags_to_spans(tags)) <= set(tags_to_spans(made)) or findings
    assert to_iob2(made, "iob2") == (made, [])
