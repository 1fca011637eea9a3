"""What a user meets in the first hour is a sentence, said before training, and paths are where one expects them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml

import training.data.source
from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError, ResolveError
from tests.training.conftest import Run, rows, write_jsonl
from training.__main__ import main
from training.compare import compare
from training.data import records
from training.finish import Result
from training.run import train
from training.runfile import read_config

_SHORT = ("training.max_steps=1", "resamples=0")


def run(path: Path, *overrides: str) -> Result | None:
    return train(read_config(path, [*_SHORT, *overrides]), base=path.parent)


def test_a_run_with_states_may_write_into_the_working_directory(
    run_file: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    path = run_file({"topic": "classification"})
    monkeypatch.chdir(tmp_path / "here")
    run(path, "output=.", "training.save_steps=1")
    assert [task.name for task in Checkpoint.open(tmp_path / "here").manifest.tasks] == ["topic"]
    assert not (tmp_path / "here.training").exists()


def test_an_output_below_a_file_is_refused_before_training(run_file: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"file is no folder"):
        run(run_file({"topic": "classification"}), f"output={tmp_path / 'file' / 'x'}")


def test_a_trunk_never_replaces_a_checkpoint(run_file: Run, tmp_path: Path) -> None:
    path = run_file({"topic": "classification"})
    run(path)
    with pytest.raises(ConfigError, match="holds a checkpoint, which a trunk cannot replace"):
        run(path, "result=trunk", "overwrite=true")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_comparison_looks_for_all_trunks_before_it_trains_on_one(
    run_file: Run, tmp_path: Path, trunk_folder: Any
) -> None:
    path = run_file({"topic": "classification"})
    config = read_config(path, _SHORT)
    with pytest.raises(ResolveError, match=r"\./nowhere"):
        compare(config, trunks=[str(trunk_folder("bert")), "./nowhere"], base=path.parent, command="")
    assert not (tmp_path / "out").exists()


def test_a_plan_is_made_for_each_of_several_trunks(
    run_file: Run, trunk_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trunks = [str(trunk_folder(family)) for family in ("bert", "gpt2")]
    assert main([str(run_file({"topic": "classification"})), "--plan", *(f"--trunk={one}" for one in trunks)]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("trunk ")] == [f"trunk {one}" for one in trunks]
    assert said.count("mixture proportional") == 2


def test_data_named_for_a_recipe_is_looked_for_in_the_working_directory(
    tmp_path: Path, trunk_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "mine.jsonl", rows("token_classification", 12))
    source = "{path: mine.jsonl, format: jsonl}"
    mine = [f"tasks.entities.{which}={source}" for which in ("train", "eval")]
    trunk = f"trunk={trunk_folder('bert')}"
    given = ["arabic_ner", trunk, *mine, "tasks.entities.options={max_length: 64}", "--plan"]
    assert main(given) == 0, capsys.readouterr().err
    assert "entities" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_named(
    run_file: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(ConfigError, match=r"file.mtserve cannot hold the tables .* allowed: HF_DATASETS_CACHE=FOLDER"):
        run(run_file({"topic": "classification"}))


def test_a_full_disk_is_said(run_file: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        run(run_file({"topic": "classification"}))


def test_data_without_permission_is_said(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(training.data.source, "sha256_file", closed)
    with pytest.raises(ConfigError, match=r"topic.train.jsonl cannot be read: Permission denied"):
        run(run_file({"topic": "classification"}))


def test_a_part_that_takes_no_record_says_so(run_file: Run, tmp_path: Path) -> None:
    path = run_file({"topic": "classification"})
    write_jsonl(tmp_path / "topic.train.jsonl", [{**row, "by": "one"} for row in rows("classification", 12)])
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["tasks"]["topic"]["eval"] = {"carve": 0.01, "by": "by"}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tasks.topic.eval: 0.01 of train by by, seed 0, takes no record"):
        run(path)


def test_wrong_class_weights_name_their_task(run_file: Run) -> None:
    with pytest.raises(ConfigError, match=r"^tasks.match.class_weights: the loss of similarity"):
        run(run_file({"topic": "classification", "match": "similarity"}), "tasks.match.class_weights=balanced")


def test_files_of_others_beside_states_and_a_damaged_mark_are_no_tracebacks(run_file: Run, tmp_path: Path) -> None:
    path, states = run_file({"topic": "classification"}), tmp_path / "out.training"
    (states / "checkpoint-9 (copy)").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no state to go on from"):
        run(path, "resume=true")
    (states / "checkpoint-9").mkdir()
    (states / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9}', encoding="utf-8")
    (states / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="states of another run"):
        run(path, "resume=true")


def test_tables_of_another_stemmer_are_not_taken_for_those_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for version in ("1", "2"):

        def one(name: str, version: str = version) -> list[SimpleNamespace]:
            return [SimpleNamespace(version=version if name == "snowballstemmer" else "0")]

        monkeypatch.setattr(records, "distributions", one)
        records._code.cache_clear()
        found[version] = records.mark("records")
    records._code.cache_clear()
    assert found["1"] != found["2"]


def test_a_comparison_goes_on_with_the_trunks_that_are_not_done(
    run_file: Run, trunk_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_file({"topic": "classification"})
    config = read_config(path)
    trunks = [str(trunk_folder("bert")), str(trunk_folder("roberta"))]
    trained: list[str] = []
    broken = ["tiny-roberta"]

    def counted(one: Any, **where: Any) -> Any:
        trained.append(Path(one.trunk).name)
        if trained[-1] in broken:
            raise KeyboardInterrupt
        return train(one, **where)

    monkeypatch.setattr("training.compare.train", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(config, trunks=trunks, base=path.parent, command="")
    broken.clear()
    whole = compare(config, trunks=trunks, base=path.parent, command="")
    assert trained == ["tiny-bert", "tiny-roberta", "tiny-roberta"]
    assert whole[0] == ("task", "split", "metric", "tiny-bert", "tiny-roberta")
    assert compare(config, trunks=trunks, base=path.parent, command="") == whole
    assert len(trained) == 3
    with pytest.raises(ConfigError, match="already holds a checkpoint"):
        compare(config.model_copy(update={"seed": 5}), trunks=trunks, base=path.parent, command="")
    data = path.parent / "topic.eval.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("town", "river", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="already holds a checkpoint"):
        compare(config, trunks=trunks, base=path.parent, command="")
