"""Every format gives the same records, and every fault has its place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from pydantic import ValidationError

from mtserve.errors import ConfigError
from tests.shared_data import ROOT
from training.data.source import Source, fingerprint, read
from training.readers import FORMATS, BadRecord, Record

RECORDS = [{"text": 'Ein Gruß, "ja"', "label": "good"}, {"text": "two\nlines", "label": "bad"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def records(source: Source, base: Path) -> list[dict[str, Any]]:
    found = list(read(source, base))
    assert all(isinstance(record, Record) for record in found)
    return [dict(record.data) for record in found if isinstance(record, Record)]


def test_jsonl_with_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\r\n\r\n"
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert records(Source(path="d.jsonl"), tmp_path) == RECORDS


def test_jsonl_faults_have_their_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"a": 1}\n{"a": \n\n[1]\n{"a": "\xff"}\n{"a": 2}')
    found = list(read(Source(path="d.jsonl"), tmp_path))
    assert [record.where for record in found] == ["d.jsonl:1", "d.jsonl:2", "d.jsonl:4", "d.jsonl:5", "d.jsonl:6"]
    bad = [record.message for record in found if isinstance(record, BadRecord)]
    assert [message.split(":")[0] for message in bad] == ["not JSON", "no JSON object", "not UTF-8"]


def test_csv_keeps_text_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(
        b'\xef\xbb\xbftext,label\r\n"a, ""b""\r\nc",01\r\nNA,\r\nx,y,z\r\n\r\nnull,1.0\r\n'
    )
    found = list(read(Source(path="d.csv"), tmp_path))
    assert [r.data for r in found if isinstance(r, Record)] == [
        {"text": 'a, "b"\r\nc', "label": "01"},
        {"text": "NA", "label": None},
        {"text": "null", "label": "1.0"},
    ]
    assert [(r.where, r.message) for r in found if isinstance(r, BadRecord)] == [
        ("d.csv:5", "3 cells; the header has 2")
    ]


def test_tsv(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("text\tlabel\na, b\tc\n")
    assert records(Source(path="d.tsv"), tmp_path) == [{"text": "a, b", "label": "c"}]


def test_parquet_names_its_classes(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["good", "bad"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    raw = {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}
    datasets.Dataset.from_dict(raw, features=features).to_parquet(tmp_path / "d.parquet")
    assert records(Source(path="d.parquet"), tmp_path) == [
        {"text": "a", "label": "bad", "tags": ["O", "B-x"]},
        {"text": "b", "label": "good", "tags": []},
        {"text": "c", "label": None, "tags": ["B-x"]},
    ]


def test_data_set_folder_with_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{split} {i}", "label": str(i)}) + "\n" for i in range(2)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    source = Source(hub="set", split="validation")
    found = list(read(source, tmp_path))
    assert [r.where for r in found] == ["set/validation:1", "set/validation:2"]
    assert records(source, tmp_path)[1] == {"text": "validation 1", "label": "1"}
    assert fingerprint(source, tmp_path) == fingerprint(source, tmp_path)
    with pytest.raises(ConfigError, match="set/test cannot be read"):
        records(Source(hub="set", split="test"), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"a,a\n1,2\n", "header line of distinct names"),
        ("d.csv", b'a,b\n"1,2\n', "d.csv:2 cannot be read: unexpected end of data"),
        ("d.csv", b"a\xff\n1\n", "the header line of d.csv is not UTF-8"),
        ("d.parquet", b"no parquet", "d.parquet cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        records(Source(path=name), tmp_path)


def test_missing_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl does not exist"):
        read(Source(path="none.jsonl"), tmp_path)
    with pytest.raises(ConfigError, match="nobody/nothing/train cannot be read"):
        records(Source(hub="nobody/nothing", split="train"), tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "d.jsonl", "hub": "d"}, "give either path or hub"),
        ({"path": "d.jsonl", "format": "jsnol"}, "unknown format 'jsnol'; allowed: absa, commonsenseqa, conll, csv"),
        ({"path": "d.txt"}, r"'d.txt' has no known format; allowed: .jsonl, .csv, .tsv, .parquet, or format: absa"),
        ({"path": "d", "format": "parallel"}, "format parallel needs a split"),
        ({"path": "d.txt", "format": "conll", "split": "dev"}, "split goes with hub, not with path"),
        ({"hub": "d", "split": "train", "format": "csv"}, "format csv is of files; allowed with hub: commonsenseqa"),
        ({"path": "d.xml", "format": "absa", "encoding": "utf-8"}, "text files; d.xml states its own"),
        ({"hub": "d", "split": "train", "encoding": "utf-8"}, "text files; d/train states its own"),
        ({"path": "d.csv", "encoding": "utf-9"}, "unknown encoding 'utf-9'"),
        ({"path": "d.csv", "encoding": "base64"}, "unknown encoding 'base64'"),
        ({"path": "d.txt", "format": "conll", "options": {"tags": 1}}, "options of conll: unknown key 'tags'"),
        ({"path": "d.txt", "format": "conll", "options": {"scheme": "io"}}, "conll: scheme: Input should be"),
        ({"path": "d.csv", "options": {"header": 1}}, "options of csv: unknown key 'header'; allowed: "),
        ({"hub": "d", "split": "train", "options": {"a": 1}}, "options of d/train: unknown key 'a'"),
        ({"path": "d", "split": "x", "format": "strap"}, "view translate needs a style"),
        ({"path": "d", "split": "x", "format": "strap", "options": {"view": "style", "style": "a"}}, "takes all"),
    ],
)
def test_what_a_source_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Source(**given)


def test_shown() -> None:
    assert Source(path="d.csv").shown == "d.csv"
    assert Source(path="d", split="train", format="parallel", options={"source": "a", "target": "b"}).shown == "d/train"
    assert Source(hub="glue", config="rte", split="train").shown == "glue/rte/train"


def test_fingerprint_is_of_bytes_and_of_how_they_are_read(tmp_path: Path) -> None:
    for name, text in (("train.a", "x\n"), ("train.b", "y\n"), ("dev.a", "x\n"), ("dev.b", "y\n"), ("d.csv", "a\nb\n")):
        (tmp_path / name).write_text(text)
    shutil.copy(tmp_path / "d.csv", tmp_path / "e.csv")

    def of(**changed: Any) -> str:
        given = {"path": ".", "split": "train", "format": "parallel", "options": {"source": "a", "target": "b"}}
        return fingerprint(Source(**{**given, **changed}), tmp_path)

    assert of() == of(options={"source": "a", "target": "b", "view": "translate"}, columns={"text": "target"})
    others = [of(), of(split="dev"), of(encoding="cp1256"), of(options={"source": "b", "target": "a"})]
    (tmp_path / "train.b").write_text("z\n")
    assert len({of(), *others}) == 5
    assert fingerprint(Source(path="d.csv"), tmp_path) == fingerprint(Source(path="e.csv"), tmp_path)
    assert fingerprint(Source(path="d.csv"), tmp_path) != fingerprint(Source(path="d.csv", format="tsv"), tmp_path)


def test_the_documentation_shows_every_format_and_option() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    shown = [Source(**yaml.safe_load(block)["train"]) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert {source.format_name for source in shown if source.path} >= set(FORMATS) - {"jsonl", "tsv", "parquet"}
    for name, rules in FORMATS.items():
        assert f"`{name}`" in text
        for option in rules.options.model_fields:
            assert f"`{option}" in text, f"{option} of {name}"
