"""File to file: every kind and format, columns, several files, other places."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from mtserve.engine import Engine
from mtserve.errors import ConfigError
from mtserve.score import places
from mtserve.score.cutting import Limits
from mtserve.score.plan import Settings, TaskSettings
from mtserve.score.run import Here, Run, Summary
from tests.labelled import rows
from tests.score.test_offline import assert_near
from tests.tiny import tiny

SMALL = Limits(part_rows=5, part_chars=2**20, window_rows=2, window_chars=2**20)
ANSWERED = {"topic": "topic", "tags": "tags", "names": "names"}


@pytest.fixture(scope="module")
def encoder() -> Engine:
    return tiny("bert").engine


@pytest.fixture(scope="module")
def decoder() -> Engine:
    return tiny("gpt2", only=("forth", "topic")).engine


def texts(count: int) -> list[dict[str, Any]]:
    found = rows(tiny("bert", only=("topic",)), "topic", count)
    return [{"id": at, "text": row["text"]} for at, row in enumerate(found)]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def make(
    engine: Engine, source: Path | str, output: Path | str, *tasks: str, limits: Limits = SMALL, **more: Any
) -> Run:
    settings = {name: more.pop(name) for name in list(more) if name in Settings.model_fields}
    chosen = Settings(tasks={task: TaskSettings() for task in tasks}, **settings)
    return Run(engine.tasks, places.inputs(str(source)), str(output), chosen, limits=limits, **more)


def scored(engine: Engine, source: Path | str, output: Path | str, *tasks: str, **more: Any) -> Summary:
    return make(engine, source, output, *tasks, **more).score(Here(engine))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_once(engine: Engine, source: Path, output: Path) -> Summary:
    return scored(engine, source, output, "topic", "tags", metrics=False)


def test_answers_of_several_tasks_in_one_pass(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", texts(13))
    summary = scored(encoder, source, tmp_path / "out.jsonl", "topic", "names", limits=Limits())
    found = lines(tmp_path / "out.jsonl")
    assert [(row["id"], row["text"], row["error"]) for row in found] == [(r["id"], r["text"], None) for r in texts(13)]
    for task in ("topic", "names"):
        answers = encoder.predict(task, [row["text"] for row in texts(13)])
        assert [row[task] for row in found] == answers  # the plan of rows is the same: bit for bit
    told = summary.as_dict()
    assert (told["rows"], told["errors"], told["passes"], told["joined"]) == (13, 0, 1, 13)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_tasks_with_other_fields_have_their_texts_encoded_once(
    encoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    prepare = encoder.prepare_each

    def counted(asked: Any, items: Any) -> Any:
        calls.append([*asked])
        return prepare(asked, items)

    monkeypatch.setattr(encoder, "prepare_each", counted)
    source = write(tmp_path / "in.jsonl", texts(5))
    scored(encoder, source, tmp_path / "out.jsonl", "names", "topic", limits=Limits())  # words or a pair may be given
    assert calls == [["names", "topic"]]
    calls.clear()
    pairs = write(tmp_path / "pairs.jsonl", [{**one, "text_pair": "good"} for one in texts(5)])
    scored(encoder, pairs, tmp_path / "pairs-out.jsonl", "names", "topic", limits=Limits())
    assert calls == [["names"], ["topic"]]


@pytest.mark.parametrize("task", ["topic", "tags", "score", "cosine", "choice", "names"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv.gz", "parquet", "arrow"])
def test_every_kind_in_every_format(encoder: Engine, tmp_path: Path, task: str, ending: str) -> None:
    records = rows(tiny("bert", only=(task,)), task, 7)
    source, output = write(tmp_path / "in.jsonl", records), tmp_path / f"out.{ending}"
    scored(encoder, source, output, task, all_scores=True, **({"form": "flat"} if ending == "jsonl" else {}))
    kind, options = encoder.task(task).kind, encoder.task(task).options
    examples = [{name: row[name] for name in kind.example.model_fields if name in row} for row in records]
    for row, answer in zip(table(output), encoder.predict(task, examples), strict=True):
        for name, value in {**kind.flat(answer, options), "scores": answer}.items():
            assert_near(plain(row[f"{task}_{name}"], value), value)


def test_translations(decoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", texts(6))
    scored(decoder, source, tmp_path / "out.parquet", "forth", "topic")
    answers = decoder.predict("forth", [row["text"] for row in texts(6)])
    assert [row["forth_text"] for row in table(tmp_path / "out.parquet")] == [
        one[0]["generated_text"] for one in answers
    ]
    scored(decoder, source, tmp_path / "nested.parquet", "forth", form="nested")
    found = table(tmp_path / "nested.parquet")[0]["forth"][0]
    assert {name: value for name, value in found.items() if value is not None} == answers[0][0]


def table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return lines(path)
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".arrow":
        return feather.read_table(path).to_pylist()
    with places.opened(places.place(str(path))) as file:
        text = file.read().decode()
    return list(csv.DictReader(text.splitlines(), delimiter="\t" if ".tsv" in path.name else ","))


def plain(cell: Any, like: Any) -> Any:
    """A cell of text as what it stands for; of a table without the fields that are not there."""
    if isinstance(cell, str) and not isinstance(like, str):
        return json.loads(cell)
    if isinstance(cell, Mapping):
        return {name: value for name, value in cell.items() if value is not None}
    return [plain(one, "") for one in cell] if isinstance(cell, list) else cell


def test_columns_by_name_of_other_data_sets(encoder: Engine, tmp_path: Path) -> None:
    asked = {"question": {"stem": "what is it ?", "choices": [{"text": "a"}, {"text": "b"}]}}
    source = write(tmp_path / "in.jsonl", [asked])
    columns = {"question": "question.stem", "choices": "question.choices.text"}
    scored(encoder, source, tmp_path / "out.jsonl", "choice", columns=columns)
    wanted = encoder.predict("choice", [{"question": "what is it ?", "choices": ["a", "b"]}])[0]
    assert lines(tmp_path / "out.jsonl")[0]["choice"] == wanted
    (tmp_path / "in.csv").write_text("stem,one,two\nwhat is it ?,a,b\n")
    columns = {"question": "stem", "choices": ("one", "two")}
    scored(encoder, tmp_path / "in.csv", tmp_path / "out2.jsonl", "choice", columns=columns)
    assert lines(tmp_path / "out2.jsonl")[0]["choice"] == wanted


def test_tasks_that_read_other_columns(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"title": "good", "body": "bad", "text_pair": "fine"}])
    tasks = {"topic": TaskSettings(columns={"text": "title"}), "score": TaskSettings(columns={"text": "body"})}
    run = Run(encoder.tasks, places.inputs(str(source)), str(tmp_path / "out.jsonl"), Settings(tasks=tasks))
    run.score(Here(encoder))
    (found,) = lines(tmp_path / "out.jsonl")
    assert_near(found["topic"], encoder.predict("topic", [{"text": "good", "text_pair": "fine"}])[0])
    assert_near(found["score"], encoder.predict("score", [{"text": "bad", "text_pair": "fine"}])[0])


def test_kept_columns(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"id": 1, "text": "good", "more": {"a": [1]}}])
    for keep, wanted in (((), []), (("more", "id"), ["more", "id"]), (None, ["id", "text", "more"])):
        scored(encoder, source, tmp_path / f"{keep}.jsonl", "topic", keep=keep)
        assert list(lines(tmp_path / f"{keep}.jsonl")[0]) == [*wanted, "topic", "error"]
    with pytest.raises(ConfigError, match="there is no column idd to keep; the input has id, text, more"):
        scored(encoder, source, tmp_path / "x.jsonl", "topic", keep=("idd",))


def test_tables_keep_their_types(encoder: Engine, tmp_path: Path) -> None:
    when = pa.array([1, None, 3], pa.timestamp("us"))
    made = pa.table({"when": when, "n": pa.array([1, 2, 3], pa.int16()), "text": ["good", "bad", "fine"]})
    parquet.write_table(made, tmp_path / "in.parquet")
    scored(encoder, tmp_path / "in.parquet", tmp_path / "out.parquet", "topic")
    schema = parquet.read_schema(tmp_path / "out.parquet")
    assert schema.field("when").type == pa.timestamp("us")
    assert schema.field("n").type == pa.int16()
    assert list(pd.read_parquet(tmp_path / "out.parquet").topic_label) == [
        one[0]["label"] for one in encoder.predict("topic", ["good", "bad", "fine"])
    ]


# several files, other places


def test_files_of_a_folder_into_one_and_into_many(encoder: Engine, tmp_path: Path) -> None:
    home = tmp_path / "in"
    home.mkdir()
    write(home / "a.jsonl", texts(7))
    write(home / "b.jsonl", [])
    parquet.write_table(pa.Table.from_pylist(texts(3)), home / "c.parquet")
    scored(encoder, home, tmp_path / "one.csv", "topic")
    assert [row["id"] for row in table(tmp_path / "one.csv")] == [*map(str, range(7)), "0", "1", "2"]
    scored(encoder, home, f"{tmp_path}/many/", "topic")
    assert [len(lines(tmp_path / "many" / name)) for name in ("a.jsonl", "b.jsonl")] == [7, 0]
    assert len(table(tmp_path / "many" / "c.parquet")) == 3


def test_an_input_is_never_written(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", texts(2))
    with pytest.raises(ConfigError, match=r"in.jsonl is input and output at once"):
        make(encoder, tmp_path, source, "topic")


def test_numbers_that_json_has_not(encoder: Engine, tmp_path: Path) -> None:
    made = pa.table({"text": ["good", "bad"], "n": [float("nan"), 1.5], "more": [[float("inf")], [2.0]]})
    parquet.write_table(made, tmp_path / "in.parquet")
    scored(encoder, tmp_path / "in.parquet", tmp_path / "out.jsonl", "topic")
    assert [(row["n"], row["more"]) for row in lines(tmp_path / "out.jsonl")] == [(None, [None]), (1.5, [2.0])]


def test_data_sets_of_the_hub(encoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, config, split, streaming) == ("owner/name", "small", "train", True)
        return datasets.Dataset.from_list(texts(13)).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    scored(encoder, "hub:owner/name/small/train", tmp_path / "hub.jsonl", "topic")
    scored(encoder, write(tmp_path / "in.jsonl", texts(13)), tmp_path / "out.jsonl", "topic")
    assert (tmp_path / "hub.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_other_file_systems(encoder: Engine, tmp_path: Path, memory: Any) -> None:
    memory.pipe_file("/data/in.jsonl", write(tmp_path / "in.jsonl", texts(13)).read_bytes())
    scored(encoder, "memory://data/in.jsonl", "memory://data/out.jsonl", "topic")
    scored(encoder, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "topic")
    assert memory.cat_file("/data/out.jsonl") == (tmp_path / "out.jsonl").read_bytes()
    assert sorted(memory.ls("/data", detail=False)) == ["/data/in.jsonl", "/data/out.jsonl"]


@pytest.fixture
def memory() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    yield found
    found.rm("/data", recursive=True)
