"""Judges of style, the untrained trunk's answers, and `python -m training evaluate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mtserve
from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from mtserve.tasks.overlap import signatures
from tests.tiny import tiny, write_checkpoint
from tests.training.conftest import Run
from tests.training.fake_data import task
from training.__main__ import main
from training.config import JudgeConfig, RunConfig
from training.report.answers import answers, prompted
from training.report.beside import Beside, Judge, beside, open_judge
from training.report.evaluate import evaluate, scored
from training.runfile import read_config

TEMPLATES = {"template": "{source} [SEP]{target}", "max_new_tokens": 5, "max_length": 48}
OTHER = "one : {source} [SEP]{target}"
PAIRS = [
    {"text": "you are red", "target": "thou red"},
    {"text": "thou town", "target": "the town"},
    {"text": "a river", "target": "thou river"},
    {"text": "a town", "target": "thou town"},
]
FORTH = task("generation", TEMPLATES, train=PAIRS, eval=PAIRS, test=PAIRS[:2])


def of_words() -> Judge:
    """A judge that calls old what has a `thou`, and must never be asked for an empty text."""

    def predict(name: str, items: list[dict[str, str]]) -> list[Any]:
        assert all(item["text"].strip() for item in items)
        ranked = (["old", "new"] if "thou" in item["text"] else ["new", "old"] for item in items)
        return [[{"label": label, "score": 0.5} for label in one] for one in ranked]

    engine: Any = SimpleNamespace(predict=predict)
    return Judge(engine, "style", "old")


def said(*texts: str) -> list[Any]:
    return [[{"generated_text": text}, {"generated_text": "thou second best"}] for text in texts]


def test_a_judge_says_how_many_answers_have_the_style_and_how_good_it_is_itself() -> None:
    """Old are 2 of 4 answers; of the targets 3 of 4 are called old, of the sources 3 of 4 are not."""
    given = said("thou art", "", "you", "thou thou")
    zero_shot = {"eval": said("thou", "thou", "thou", ""), "test": said("", "")}
    found = scored(given, "forth", FORTH, resamples=30, beside=Beside(of_words(), zero_shot))
    judged = {name: value for name, value in found.metrics.items() if name.startswith("style")}
    assert judged == {"style_accuracy": 0.5, "style_accuracy_targets": 0.75, "style_accuracy_sources": 0.75}
    assert {name: of["style_accuracy"] for name, of in found.baselines.items()} == {
        "majority": 0,
        "copy": 0.25,
        "zero-shot": 0.75,
    }
    low, high = found.intervals["style_accuracy"]
    assert 0 <= low < 0.5 < high <= 1
    alone = scored(given, "forth", FORTH, resamples=30)
    assert alone.metrics == {name: value for name, value in found.metrics.items() if name not in judged}
    assert alone.intervals == {name: limits for name, limits in found.intervals.items() if name not in judged}
    assert list(alone.baselines) == ["majority", "copy"]
    assert of_words().says([]).tolist() == []


def test_a_judge_is_a_classification_of_a_sealed_checkpoint(tmp_path: Path) -> None:
    small = tiny("bert", only=("topic", "score"))
    write_checkpoint(tmp_path / "judge", small)
    judge = open_judge(JudgeConfig(checkpoint="judge", task="topic", label="bad"), tmp_path, of="forth")
    texts = ["the town is red", "awful soup", "a man is kind", "", "one book"]
    best = [one[0]["label"] for one in small.engine.predict("topic", [{"text": text} for text in texts])]
    labels = {label: Judge(small.engine, "topic", label).says(texts).tolist() for label in ("good", "bad", "fine")}
    assert labels == {label: [b == label and bool(t) for b, t in zip(best, texts, strict=True)] for label in labels}
    assert judge.says(texts).tolist() == labels["bad"]
    for name, label in (("topic", "old"), ("score", "bad"), ("style", "bad")):
        with pytest.raises(
            ConfigError, match=r"tasks\.forth\.judge: judge has no .*; allowed: topic: good, bad, fine$"
        ):
            open_judge(JudgeConfig(checkpoint="judge", task=name, label=label), tmp_path, of="forth")


def config_of(**extra: Any) -> RunConfig:
    pairs = {"path": "pairs.jsonl"}
    section = {"kind": "generation", "options": TEMPLATES, "train": pairs, "eval": pairs, **extra}
    return RunConfig.model_validate({"trunk": "t", "output": "o", "tasks": {"forth": section}})


def test_the_untrained_trunk_answers_under_its_own_template() -> None:
    engine = tiny("gpt2", only=("forth",)).engine
    (found,) = beside(config_of(zero_shot=OTHER), {"forth": FORTH}, base=Path(), untrained=engine).values()
    options = {**TEMPLATES, "template": OTHER}
    other = tiny("gpt2", tasks={"forth": ("generation", options)}).engine
    texts = [{"text": pair["text"]} for pair in PAIRS]
    assert found.zero_shot == {"eval": other.predict("forth", texts), "test": other.predict("forth", texts[:2])}
    assert found.zero_shot["eval"] != engine.predict("forth", texts)
    assert evaluate(engine, "forth", FORTH, beside=found).baselines["zero-shot"].keys() >= {"bleu", "exact_match"}
    (without,) = beside(config_of(), {"forth": FORTH}, base=Path(), untrained=engine).values()
    assert without == Beside()
    with pytest.raises(ConfigError, match=r"tasks\.forth\.zero_shot: template must contain \{source\} and \{target\}"):
        prompted(engine, "forth", FORTH, "Say {source}")


def test_answers_are_asked_for_with_parameters() -> None:
    engine = tiny("gpt2", only=("forth",)).engine
    asked = [{"text": pair["text"]} for pair in PAIRS]
    parameters = {"num_return_sequences": 2, "num_beams": 2}
    assert answers(engine, "forth", FORTH, parameters=parameters) == engine.predict("forth", asked, parameters)
    with pytest.raises(ConfigError, match=r"tasks\.forth, eval: .*max_new_tokens"):
        answers(engine, "forth", FORTH, parameters={"max_new_tokens": 500})


def test_only_generations_are_judged() -> None:
    rows = {"path": "a.csv"}
    for extra in ({"zero_shot": OTHER}, {"judge": {"checkpoint": "j", "task": "t", "label": "l"}}):
        section = {"kind": "classification", "train": rows, "eval": rows, **extra}
        with pytest.raises(ValueError, match="zero_shot and judge are of generated text; allowed: neither"):
            RunConfig.model_validate({"trunk": "t", "output": "o", "tasks": {"topic": section}})


@pytest.fixture
def run(run_file: Run, tmp_path: Path) -> Path:
    """The run file of a generation and a classification, with a judge beside it; nothing is trained yet."""
    write_checkpoint(tmp_path / "judge", tiny("bert", only=("topic",)))
    return run_file({"forth": "generation", "topic": "classification"}, "gpt2")


BESIDE = [f"tasks.forth.zero_shot='{OTHER}'", "tasks.forth.judge={checkpoint: judge, task: topic, label: good}"]


def cells(text: str) -> dict[tuple[str, str], list[str]]:
    """The lines of a printed table by task and metric."""
    return {(line[0], line[1]): line for line in map(str.split, text.splitlines()) if len(line) > 2}


def test_a_run_reports_what_stands_beside_it_and_is_measured_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *BESIDE]) == 0
    trained = capsys.readouterr().out
    assert trained.splitlines()[0].split()[-3:] == ["majority", "copy", "zero-shot"]
    assert f"bleu: sacreBLEU {signatures()['bleu']}" in trained.splitlines()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| forth | style_accuracy_sources |" in card
    held = Checkpoint.open(tmp_path / "out")
    assert {"style_accuracy", "style_accuracy_targets", "bleu", "pinc"} <= held.task("forth").metrics.keys()

    file = tmp_path / "answers.jsonl"
    assert main(["evaluate", str(tmp_path / "out"), str(run), *BESIDE, "--predictions", str(file)]) == 0
    out = capsys.readouterr().out
    found, metrics = cells(out), {name: held.task(name).metrics for name in ("forth", "topic")}
    for name, of in metrics.items():
        assert {metric: found[name, metric][2] for metric in of} == {metric: f"{v:.3f}" for metric, v in of.items()}
    assert "examples of eval: forth 6, topic 6" in out
    assert f"chrf: sacreBLEU {signatures()['chrf']}" in out.splitlines()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["task"] for line in lines] == ["forth"] * 6 + ["topic"] * 6
    engine = mtserve.load(tmp_path / "out")
    assert [line["prediction"] for line in lines[:6]] == engine.predict("forth", [line["text"] for line in lines[:6]])
    assert lines[0].keys() == {"task", "text", "target", "prediction"}

    asked = ["--parameters", '{"max_new_tokens": 1}', "--predictions", str(file)]
    assert main(["evaluate", str(tmp_path / "out"), str(run), *asked]) == 0
    one = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["prediction"]
    assert one == engine.predict("forth", [lines[0]["text"]], {"max_new_tokens": 1})[0]
    assert ("forth", "style_accuracy") not in cells(capsys.readouterr().out)


def test_the_untrained_trunk_is_measured_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "answers.jsonl"
    assert main(["evaluate", "--zero-shot", str(run), *BESIDE, "--predictions", str(file)]) == 0
    found = cells(capsys.readouterr().out)
    assert {task for task, _ in found} >= {"forth"}
    assert "topic" not in {task for task, _ in found}
    assert ("forth", "style_accuracy") in found
    config = read_config(run, BESIDE)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    tasks = {"forth": ("generation", {**config.tasks["forth"].options, "template": OTHER})}
    other = tiny("gpt2", tasks=tasks).engine
    assert [line["prediction"] for line in lines] == other.predict("forth", [line["text"] for line in lines])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--zero-shot", "RUN"], "no task of the run file has a zero_shot template"),
        (
            ["JUDGE", "RUN", "tasks.topic.kind=similarity", "tasks.topic.options={}"],
            r"topic.kind: similarity; in .* it is",
        ),
        (["JUDGE", "RUN", "--split", "test"], "tasks.topic has no split 'test'; it has train, eval"),
        (["JUDGE", "RUN", "--parameters", '{"num_beams": 2}'], "parameters: no task here knows all of num_beams"),
        (["JUDGE", "RUN", "--parameters", '{"top_k": 0}'], "tasks.topic, eval: .*top_k"),
        (["JUDGE", "RUN", "--parameters", "[]"], "--parameters must be a JSON object"),
        (["JUDGE", "RUN", "--parameters", "{"], "--parameters is no JSON"),
        (["JUDGE", "RUN", "--predictions", "no/such/file"], "no/such is no folder"),
        (["RUN", "RUN"], "run.yaml"),
        (["JUDGE", "no.yaml"], "no.yaml is no file and no recipe"),
    ],
)
def test_what_cannot_be_measured(
    run: Path, tmp_path: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(run), "JUDGE": str(tmp_path / "judge")}
    assert main(["evaluate", *(names.get(one, one) for one in given)]) == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])


def test_a_checkpoint_and_a_run_file_are_both_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "checkpoint"])
    assert "CHECKPOINT and RUN are both wanted" in capsys.readouterr().err
