"""Run files: overrides, and errors that say what was wrong, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mtserve.errors import ConfigError
from tests.training.conftest import Run
from training.prepare import prepare
from training.runfile import read_config


@pytest.fixture
def run(run_file: Run) -> Path:
    return run_file({"topic": "classification", "score.v2": "similarity"})


def test_overrides_replace_and_add(run: Path) -> None:
    config = read_config(
        run,
        [
            "seed=7",
            "training.learning_rate=2e-5",
            "training.max_steps=null",
            "tasks.topic.weight=2",
            "tasks.score.v2.options.method=cosine",
            "tasks.topic.train.columns.text=body",
            "output=a=b",
        ],
    )
    assert config.seed == 7
    assert config.training.learning_rate == 2e-5
    assert config.training.max_steps is None
    assert config.tasks["topic"].weight == 2
    assert config.tasks["score.v2"].options == {"max_length": 32, "high": 5, "method": "cosine"}
    assert config.tasks["topic"].train.columns == {"text": "body"}
    assert config.output == "a=b"


def test_null_leaves_a_task_out(run: Path) -> None:
    assert list(read_config(run, ["tasks.topic=null"]).tasks) == ["score.v2"]
    assert list(read_config(run, ["tasks.score.v2=null"]).tasks) == ["topic"]
    assert read_config(run, ["tasks.topic.license=null"]).tasks["topic"].license is None
    with pytest.raises(ConfigError, match=r"tasks\.topics cannot be left out: the tasks are topic, score\.v2"):
        read_config(run, ["tasks.topics=null"])
    with pytest.raises(ConfigError, match="tasks: "):
        read_config(run, ["tasks.topic=null", "tasks.score.v2=null"])


def test_batch_size_of_a_task_wins(run: Path) -> None:
    config = read_config(run, ["tasks.topic.batch_size=2"])
    assert (config.batch_size("topic"), config.batch_size("score.v2")) == (2, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=1", r"training: unknown key 'epoch'; allowed: epochs, max_steps"),
        ("sead=1", r"unknown key 'sead'; allowed: trunk, trunk_name, output"),
        ("training.epochs=-1", r"training\.epochs: input should be greater than 0; found -1"),
        ("training.bf16=perhaps", r"training\.bf16: .*found 'perhaps'"),
        ("tasks.topic.kind=klass", r"tasks\.topic\.kind: 'klass' is no kind of task; allowed: classification, "),
        ("tasks.topic.options.max_len=3", r"tasks\.topic: unknown option 'max_len'; allowed: max_length"),
        ("tasks.topic.eval.columns.body=x", r"unknown example field 'body'; allowed: text, text_pair, label"),
        ("tasks.Topic={}", r"'Topic' is no task name|tasks\.Topic"),
        ("tasks.topic.train={}", r"tasks\.topic\.train: give either path or hub"),
        ("tasks.topic.train.split=x", r"tasks\.topic\.train: split goes with hub, not with path"),
        ("tasks.topic.train.path=x.txt", r"'x\.txt' has no known format; allowed: \.jsonl, \.csv"),
        ("tasks.topic.train={hub: glue}", r"tasks\.topic\.train: a hub data set needs a split"),
        ("tasks={}", r"tasks: dictionary should have at least 1 item"),
        ("mixture=random", r"mixture\.strategy: input should be 'proportional', .*; found 'random'"),
        ("seed", r"'seed' is no override; allowed: dotted\.key=value"),
        ("seed.x=1", r"seed\.x cannot be set: seed is 3, not a mapping"),
        ("trunk=[", r"trunk=\[ is not YAML"),
    ],
)
def test_errors_name_what_is_allowed(run: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(run, ["seed=3", override])


def test_run_file_faults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds no mapping; a run file has the keys trunk, trunk_name, output"):
        read_config(path)
    path.write_bytes(b"trunk: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config(path)
    path.write_text("output: x\n")
    with pytest.raises(ConfigError, match="trunk: field required"):
        read_config(path)


def test_forms_are_laid_over_the_file_and_overrides_over_both(run_file: Run) -> None:
    path = run_file({"topic": "classification"})
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    forms = {"hub": {"seed": 5, "training": {"epochs": 7}}, "data_dir": {"seed": 6}}
    path.write_text(yaml.safe_dump({**raw, "form": "hub", "forms": forms}), encoding="utf-8")
    assert (read_config(path).seed, read_config(path).training.epochs, read_config(path).training.batch_size) == (
        5,
        7,
        4,
    )
    assert read_config(path, ["data_dir=x"]).seed == 6
    assert read_config(path, ["data_dir=x", "form=hub", "training.epochs=2"]).training.epochs == 2
    assert read_config(path, ["data_dir=x", "form=hub"]).seed == 5
    assert read_config(path, ["data_dir=x", "seed=9"]).seed == 9
    with pytest.raises(ConfigError, match="form 'hob' is not there; allowed: data_dir, hub"):
        read_config(path, ["data_dir=x", "form=hob"])


def test_one_name_stands_for_a_list_of_one(run_file: Run) -> None:
    path = run_file({"topic": "classification"})
    config = read_config(path, ["training.freeze=trunk", "training.report_to=tensorboard", "preparation=tatweel"])
    assert (config.training.freeze, config.training.report_to) == (("trunk",), ("tensorboard",))
    assert config.preparation == ("tatweel",)


def test_a_trunk_without_a_named_preparation_is_said(run_file: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_file({"topic": "classification"})
    prepare(read_config(path, ["preparations={some-other: [arabert]}"]), base=path.parent)
    said = capsys.readouterr().err
    assert "no preparation is named for" in said
    assert "named: some-other. Its texts are prepared by no step" in said
    prepare(read_config(path, ["preparations={tiny-bert: [tatweel]}"]), base=path.parent)
    assert "no preparation is named" not in capsys.readouterr().err
