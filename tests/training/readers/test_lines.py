"""Encodings, line ends and damage, the same in every format of lines."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtserve.errors import ConfigError
from tests.training.readers.helpers import both, faults, good
from training.data.source import Source, read
from training.readers import FORMATS, BadRecord, Record

LINES = [f for f, rules in FORMATS.items() if rules.encoded]
OPTIONS: dict[str, dict[str, Any]] = {
    "parallel": {"source": "a", "target": "b"},
    "strap": {"view": "style"},
    "conll": {"repair": True},
}
TEXTS = ['Ein Gruß, so "weit', "مرحبا ۔"]


def source(name: str, **more: Any) -> dict[str, Any]:
    place: dict[str, Any] = {"path": "d"} if FORMATS[name].layout is None else {"path": ".", "split": "d"}
    return {**place, "format": name, "options": OPTIONS.get(name, {}), **more}


def write(base: Path, name: str, content: bytes) -> None:
    """The content as every file of a format."""
    ends = {"parallel": (".a", ".b"), "strap": (".input0.txt", ".label", ".paraphrase_250_input0.txt")}
    for end in ends.get(name, ("",)):
        (base / f"d{end}").write_bytes(content)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("encoding", "given", "mark"),
    [
        ("utf-8", None, b""),
        ("utf-8", None, codecs.BOM_UTF8),
        ("utf-8", "cp1256", codecs.BOM_UTF8),
        ("utf-16-le", None, codecs.BOM_UTF16_LE),
        ("utf-16-be", "utf-16", codecs.BOM_UTF16_BE),
        ("utf-16-le", "utf-16", b""),
        ("utf-16-be", "utf-16-be", b""),
    ],
)
def test_encodings_marks_and_line_ends(
    tmp_path: Path, encoding: str, given: str | None, mark: bytes, newline: str
) -> None:
    texts = [*TEXTS, "\u0a0a\u0a00\u000b\u2028\x85 end"]  # bytes and characters that look like line ends
    (tmp_path / "d.txt").write_bytes(mark + newline.join(texts).encode(encoding))
    found = good(tmp_path, path="d.txt", format="lines", encoding=given)
    assert [record["text"] for record in found] == texts


def test_windows_1256(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes("سلام\nمرحبا\n".encode("windows-1256"))
    assert [r["text"] for r in good(tmp_path, path="d.txt", format="lines", encoding="windows-1256")] == [
        "سلام",
        "مرحبا",
    ]
    assert faults(tmp_path, path="d.txt", format="lines")[0] == (
        "d.txt:1",
        "not UTF-8: invalid continuation byte at byte 0 of the line",
    )


def test_a_damaged_line_costs_its_record_alone(tmp_path: Path) -> None:
    """A line that is not in the encoding, and one with a NUL; the second sentence of CoNLL holds one of them."""
    (tmp_path / "d").write_bytes(b"a O\n\nb\xff O\nc O\n\nd\0 O\n\ne O")
    records, bad = both(tmp_path, path="d", format="conll")
    assert [r.data["words"] for r in records] == [["a"], ["e"]]
    assert [b.where for b in bad] == ["d:3", "d:6"]
    assert bad[1].message == "holds a NUL character (is the encoding right?)"
    (tmp_path / "d").write_bytes(b'x,y\n1,2\n3,\xff\n"5\n\xff",6\n7,\0\n9,10')
    records, bad = both(tmp_path, path="d", format="csv")
    assert [r.data["x"] for r in records] == ["1", "9"]
    assert [b.where for b in bad] == ["d:3", "d:5", "d:6"]


def test_torn_utf_16(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes("one\ntwo\n".encode("utf-16")[:-1])
    assert [r["text"] for r in (dict(r.data) for r in both(tmp_path, path="d", format="lines")[0])] == ["one"]
    assert faults(tmp_path, path="d", format="lines") == [
        ("d:2", "not UTF-16-LE: truncated data at byte 6 of the line")
    ]


@pytest.mark.parametrize("name", LINES)
def test_a_very_long_line(tmp_path: Path, name: str) -> None:
    """Two million characters: a record, or a bad one with its place; the csv module takes no cell of that length."""
    long = "x" * 2_000_000
    line = {"jsonl": json.dumps({"text": long}), "conll": f"{long} O", "stsb": f"g\tf\ty\t1\t2.5\t{long}\tb"}.get(
        name, long
    )
    write(tmp_path, name, f"{line}\n\n{line}\n".encode())
    if name in ("csv", "tsv", "glue_tsv"):
        with pytest.raises(ConfigError, match="field larger than field limit"):
            both(tmp_path, **source(name))
        write(tmp_path, name, f"text\n{line}\nshort\n".encode())
    elif name == "sentence_pairs":
        write(tmp_path, name, f"a\n{line}\n\nb\n".encode())
    records, bad = both(tmp_path, **source(name))
    if name in ("csv", "tsv", "glue_tsv"):
        assert [r.data for r in records] == [{"text": "short"}]
    assert [b.where for b in bad] == (["d:2"] if "sv" in name else ["d:1", "d:3"] if name == "commonsenseqa" else [])
    assert bool(records) == (name != "commonsenseqa")


@pytest.mark.parametrize("name", LINES)
def test_an_empty_file_has_no_records(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, b"")
    if name in ("csv", "tsv", "glue_tsv"):
        with pytest.raises(ConfigError, match="d needs a header line of distinct names; found ''"):
            both(tmp_path, **source(name))
    else:
        assert both(tmp_path, **source(name)) == ([], [])


@pytest.mark.parametrize("name", LINES)
@example(b'"')
@example(b"[" * 20_000)
@example(b'{"a": "\\ud800"}')
@example(b'{"question": {"stem": 1, "choices": [[]]}}')
@example(b"\xff\xfe\n")
@example(b"a\n\n\0\n\rb\r\n\t-\t\n B-")
@given(st.binary(max_size=200) | st.text(alphabet='"{}[],:\t\r\n \0aOBI-5.é\u200f', max_size=80).map(str.encode))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_raise_anything_but_a_config_error(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, name, content)
    for encoding in (None, "utf-16-be", "cp1256"):
        try:
            found = list(read(Source(**source(name, encoding=encoding)), tmp_path))
        except ConfigError:
            continue
        for record in found:
            assert record.where.startswith("d")
            if isinstance(record, Record):
                json.dumps(dict(record.data), ensure_ascii=False).encode()  # text that can be tokenised and stored
            else:
                assert isinstance(record, BadRecord)
                assert record.message
