"""Rows of files in each format, and what becomes of those that are damaged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from mtserve.errors import ConfigError, ResolveError
from mtserve.score import places, records
from mtserve.score.records import Record, read

ROWS = [{"text": 'good, "really"\nso', "n": 1}, {"text": "ünïcode 🙂", "n": 2}, {"text": "x", "n": 3}]


def of(path: Path, **more: Any) -> list[Record]:
    (place,) = places.inputs(str(path), **more)
    return list(read(place))


def cells(path: Path, **more: Any) -> list[Any]:
    found = of(path, **more)
    assert [one.number for one in found] == list(range(len(found)))
    assert not [one.problem for one in found if one.problem]
    return [dict(one.cells) for one in found]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    text = "".join(json.dumps(row) + "\n" for row in ROWS)[:-1]  # the last line needs no end
    path.write_bytes(places.compressed(text.encode(), places.place(str(path)).compression))
    assert cells(path) == ROWS


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
def test_cells_of_text(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    mark = "\t" if "tsv" in ending else ","
    lines = f'text{mark}n\n"good, ""really""\nso"{mark}1\n\nünïcode 🙂{mark}2\nx{mark}\n'
    path.write_bytes(places.compressed(lines.encode("utf-8-sig"), places.place(str(path)).compression))
    assert cells(path) == [
        {"text": ROWS[0]["text"], "n": "1"},
        {"text": ROWS[1]["text"], "n": "2"},
        {"text": "x", "n": None},
    ]


def test_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "rte.tsv").write_text('index\tsentence1\n0\t"Open quote\n1\ta "word" in it\n', encoding="utf-8")
    found = cells(tmp_path / "rte.tsv", quotes=False)
    assert [one["sentence1"] for one in found] == ['"Open quote', 'a "word" in it']


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
def test_tables(tmp_path: Path, ending: str) -> None:
    path, table = tmp_path / f"rows.{ending}", pa.Table.from_pylist(ROWS)
    if ending == "parquet":
        parquet.write_table(table, path, row_group_size=2)
    elif ending == "feather":
        feather.write_feather(table, path)
    else:
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert cells(path) == ROWS


BAD_LINES = [
    (b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "not JSON"),
    (b'{"text": "a"}\n[1]\n{"text": "b"}\n', "not a JSON object"),
    (b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', "not UTF-8 at byte 10 of the line"),
    (b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}\n', "not JSON"),
    (b'{"text": "a"}\n{"text": NaN}\n{"text": "b"}\n', "NaN is no JSON"),
    (b'{"text": "a"}\n' + b"[" * 100_000 + b'\n{"text": "b"}\n', "not JSON"),
]


@pytest.mark.parametrize(("content", "said"), BAD_LINES)
def test_a_bad_line_harms_no_other(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    first, bad, last = of(tmp_path / "rows.jsonl")
    assert (first.cells, last.cells, bad.number) == ({"text": "a"}, {"text": "b"}, 1)
    assert said in str(bad.problem)


def test_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b')
    found = of(tmp_path / "rows.jsonl")
    assert [one.problem is None for one in found] == [True, False]


def test_a_stream_that_breaks_off(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(5000)))
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    *good, bad = of(tmp_path / "rows.jsonl.gz")
    assert len(good) > 10
    assert "cannot be read on from here" in str(bad.problem)


BAD_CELLS = [
    (b"text,n\na,1\nb\nc,3\n", "1 cells; the header has 2 (line 3)"),
    (b"text,n\na,1\n\xff,2\nc,3\n", "not UTF-8 at byte 0 of line 3"),
]


@pytest.mark.parametrize(("content", "said"), BAD_CELLS)
def test_a_bad_row_of_cells_harms_no_other(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    first, bad, last = of(tmp_path / "rows.csv")
    assert (first.cells["text"], last.cells["text"], bad.problem) == ("a", "c", said)


def test_a_quote_that_is_never_closed(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'text,n\na,1\n"b,2\nc,3\n')
    first, bad = of(tmp_path / "rows.csv")
    assert first.cells["text"] == "a"
    assert "the row begins in line 3" in str(bad.problem)


def test_a_huge_line_and_a_huge_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CELL", 1000)
    long = "x" * 5000
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "{long}"}}\n{{"text": "b"}}\n')
    first, bad, last = of(tmp_path / "rows.jsonl")
    assert (first.cells["text"], bad.problem, last.cells["text"]) == ("a", "longer than 1000 bytes", "b")


@pytest.mark.parametrize("content", [b"", b"a,a\n1,2\n", b"\xff,b\n1,2\n"])
def test_a_header_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ConfigError, match="header"):
        of(tmp_path / "rows.csv")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_table_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no table at all, whatever its name says")
    with pytest.raises(ResolveError, match=f"{name} is no"):
        of(tmp_path / name)


def test_files_of_a_folder_and_of_a_glob(tmp_path: Path) -> None:
    counted = ("b.jsonl", "a.jsonl", "sub/c.csv")
    for name in (*counted, "_SUCCESS", ".hidden.jsonl", "notes.txt", "out.jsonl.parts/x.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text\n")
    names = [Path(one.url).name for one in places.inputs(str(tmp_path))]
    assert names == ["a.jsonl", "b.jsonl", "c.csv"]
    assert [one.name for one in places.inputs(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ResolveError, match="names no file"):
        places.inputs(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ConfigError, match=r"format of .*notes.txt is not known"):
        places.inputs(str(tmp_path / "notes.txt"))
    with pytest.raises(ConfigError, match="compressed inside"):
        places.place("rows.parquet.gz")


def test_names_on_the_hub() -> None:
    assert records.hub_parts("hub:nyu-mll/glue/rte/validation") == ("nyu-mll/glue", "rte", "validation")
    assert records.hub_parts("hub:a/b/train") == ("a/b", None, "train")
    with pytest.raises(ConfigError, match="allowed is hub:"):
        records.hub_parts("hub:b/train")
