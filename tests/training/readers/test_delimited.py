"""Cells: bare quotes where there is no quoting, torn rows where there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtserve.errors import ConfigError
from tests.training.readers.helpers import both, faults, good


def test_glue_tsv_takes_quotes_for_text(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_bytes(
        b'index\tsentence1\tsentence2\tlabel\r\n0\t"Yes, he said.\tHe said "yes"\tentailment\r\n'
        b"\r\n1\ta\t\tb\r\n2\ta\tb\r\n"
    )
    records, bad = both(tmp_path, path="d.tsv", format="glue_tsv")
    assert [r.data for r in records] == [
        {"index": "0", "sentence1": '"Yes, he said.', "sentence2": 'He said "yes"', "label": "entailment"},
        {"index": "1", "sentence1": "a", "sentence2": None, "label": "b"},
    ]
    assert [(b.where, b.message) for b in bad] == [("d.tsv:5", "3 cells; the header has 4")]


def test_csv_goes_on_after_a_wrong_quote(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('a,b\n"x" y,1\nz,2\n"two\nlines" y,1\nan "inner" quote,3\n')
    records, bad = both(tmp_path, path="d.csv")
    assert [tuple(r.data.values()) for r in records] == [("z", "2"), ('an "inner" quote', "3")]
    assert [(b.where, b.message) for b in bad] == [
        ("d.csv:2", "',' expected after '\"' (the record begins in line 2)"),
        ("d.csv:5", "',' expected after '\"' (the record begins in line 4)"),
    ]


def test_a_quote_open_at_the_end_stops_everything(tmp_path: Path) -> None:
    """It may have swallowed any number of records."""
    (tmp_path / "d.csv").write_text('a,b\n1,2\n"x,1\n3,4\n5,6\n')
    with pytest.raises(ConfigError, match=r"d\.csv:3 cannot be read: unexpected end of data"):
        both(tmp_path, path="d.csv")


def test_stsb(tmp_path: Path) -> None:
    cells = 'main-news\theadlines\t2016\t0012\t%s\t"A" \'quote\tA "quote'
    rows = [
        cells % "4.250",
        cells % "5" + "\tsource\tsource",
        "",
        cells % "four",
        cells % "nan",
        cells % "1" + "\t" * 3,
        "a\tb",
    ]
    (tmp_path / "d.csv").write_text("\n".join(rows))
    records, bad = both(tmp_path, path="d.csv", format="stsb")
    shared = {"genre": "main-news", "file": "headlines", "year": "2016", "id": "0012"}
    texts = {"text": '"A" \'quote', "text_pair": 'A "quote'}
    assert [dict(r.data) for r in records] == [{**shared, **texts, "score": 4.25}, {**shared, **texts, "score": 5.0}]
    assert [b.where for b in bad] == ["d.csv:4", "d.csv:5", "d.csv:6", "d.csv:7"]
    assert [b.message.split(";")[0] for b in bad] == [
        "the score is no number: 'four'",
        "the score is no number: 'nan'",
        "10 cells",
        "2 cells",
    ]


def test_an_encoding_other_than_utf_8(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("text,label\nسلام,a\n".encode("cp1256"))
    assert good(tmp_path, path="d.csv", encoding="windows-1256") == [{"text": "سلام", "label": "a"}]
    assert [where for where, _ in faults(tmp_path, path="d.csv")] == ["d.csv:2"]
