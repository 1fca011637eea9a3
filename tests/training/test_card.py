"""The model card, read back as a hub and as a reader of Markdown would."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from mtserve.tasks.overlap import signatures
from tests.training.fake_data import task
from training.config import RunConfig
from training.data.audit import audit
from training.report.card import card
from training.report.evaluate import Scores

TEXTS = [{"text": "one", "label": "a|b"}, {"text": "two", "label": "<i>"}]
FORTH = [{"text": "here ``` is", "target": "it"}]


@pytest.fixture
def made() -> dict[str, Any]:
    """What a run of two tasks hands to its card."""
    config = RunConfig.model_validate(
        {
            "trunk": "org/trunk",
            "output": "out",
            "license": "apache-2.0",
            "tasks": {
                "topic": {
                    "kind": "classification",
                    "train": {"path": "a/topic.train.csv"},
                    "eval": {"path": "a/topic.eval.csv"},
                    "test": {"path": "a/topic.test.csv"},
                    "license": "CC-BY-4.0",
                },
                "forth": {
                    "kind": "generation",
                    "options": {"template": "```{source}```{target}"},
                    "train": {"hub": "org/pairs", "split": "train"},
                    "eval": {"hub": "org/pairs", "split": "validation"},
                    "judge": {"checkpoint": "runs/judge", "task": "style", "label": "old"},
                },
            },
        }
    )
    labels = {"labels": ["a|b", "<i>"]}
    data: dict[str, Any] = {
        "topic": task("classification", labels, train=TEXTS, eval=TEXTS[:1], test=TEXTS[1:]),
        "forth": task("generation", {}, train=FORTH, eval=[{"text": "there", "target": "so"}]),
    }
    report: Any = {label: {"precision": 0.25, "recall": 0.5, "f1": 0.125, "support": 7} for label in labels["labels"]}
    topic = Scores(
        "macro_f1",
        {"accuracy": 0.75, "macro_f1": 0.5, "mcc": -0.25},
        {"majority": {"accuracy": 0.375, "macro_f1": 0.1, "mcc": 0.0}},
        examples=40,
        resamples=1000,
        intervals={"macro_f1": (0.4, 0.6), "accuracy": (0.7, 0.8), "mcc": (-0.3, -0.2)},
        report=report,
        confusion=[[1, 0], [0, 1]],
    )
    baselines = {"majority": {"bleu": 0.0}, "copy": {"bleu": 0.0625}, "zero-shot": {"bleu": 0.125}}
    forth = Scores("bleu", {"bleu": 0.875}, baselines, examples=30, resamples=100)
    test = Scores("macro_f1", {"macro_f1": 0.4375}, {"majority": {"macro_f1": 0.3125}}, split="test", examples=20)
    return {
        "config": config,
        "data": data,
        "scores": {"topic": topic, "forth": forth},
        "test": {"topic": test},
        "audit": audit(data),
        "source": "org/trunk",
        "command": "python -m training run.yaml",
        "versions": {"torch": "9.9"},
        "figures": ["figures/curves.png", "figures/confusion-topic.png"],
    }


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as lines of cells."""
    found: list[list[list[str]]] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            found.append([])
        elif not line.startswith("| ---"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [rows for rows in found if rows]


def test_hubs_read_licence_and_results(made: dict[str, Any]) -> None:
    read = ModelCard(card(**made)).data
    assert (read.license, read.library_name, read.tags) == ("apache-2.0", "mtserve", ["multitask"])
    found = [
        (r.task_type, r.task_name, r.dataset_name, r.dataset_split, r.metric_type, r.metric_name, r.metric_value)
        for r in read.eval_results
    ]
    of_topic = ("text-classification", "topic", "a/topic.eval.csv", "eval")
    assert found == [
        (*of_topic, "accuracy", "accuracy", 0.75),
        (*of_topic, "f1", "macro_f1", 0.5),
        (*of_topic, "matthews_correlation", "mcc", -0.25),
        ("text-generation", "forth", "org/pairs/validation", "eval", "bleu", "bleu", 0.875),
        ("text-classification", "topic", "a/topic.test.csv", "test", "f1", "macro_f1", 0.4375),
    ]


def test_tables_hold_every_number(made: dict[str, Any]) -> None:
    text = card(**made)
    kinds, scores, test, labels, sources, lengths = tables(text)
    assert kinds[1] == ["topic", "classification", r"a\|b, &lt;i>"]
    assert scores == [
        ["task", "metric", "value", "95% interval", "majority", "copy", "zero-shot"],
        ["topic", "macro_f1", "0.500", "0.400 to 0.600", "0.100", "", ""],
        ["topic", "accuracy", "0.750", "0.700 to 0.800", "0.375", "", ""],
        ["topic", "mcc", "-0.250", "-0.300 to -0.200", "0.000", "", ""],
        ["forth", "bleu", "0.875", "", "0.000", "0.062", "0.125"],
    ]
    assert test == [["task", "metric", "value", "majority"], ["topic", "macro_f1", "0.438", "0.312"]]
    assert labels[1] == [r"a\|b", "0.250", "0.500", "0.125", "7"]
    assert ["topic", "test", "`a/topic.test.csv`", "CC-BY-4.0", f"`{'0' * 64}`"] in sources
    assert ["forth", "train", "`org/pairs/train`", "not stated", f"`{'0' * 64}`"] in sources
    assert len(lengths) == 6
    assert "(resamples: 1000 for topic; 100 for forth)" in text
    assert "(examples: topic 40, forth 30)" in text
    assert "- topic eval: 1 of 1 inputs (100.0%) are also in topic train." in text
    assert f"- chrf: sacreBLEU {signatures()['chrf']}" in text
    assert "`style_accuracy` of forth: answers that the task style of `runs/judge` calls old;" in text
    assert "Of this checkpoint: apache-2.0." in text
    assert "torch 9.9" in text
    assert "Seed 0" in text


def test_the_config_stands_whole_inside_its_fence(made: dict[str, Any]) -> None:
    (block,) = re.findall(r"\n````yaml\n(.*?)\n````\n", card(**made), flags=re.DOTALL)
    assert RunConfig.model_validate(yaml.safe_load(block)) == made["config"]
    assert "```{source}```{target}" in block


def test_pictures_are_shown_where_they_are(made: dict[str, Any]) -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", card(**made))
    assert shown == ["figures/confusion-topic.png", "figures/curves.png"]
    assert "![" not in card(**{**made, "figures": ()})


def test_a_card_without_licence_or_labels(made: dict[str, Any]) -> None:
    bare = {**made["scores"]["topic"].__dict__, "report": {}, "confusion": None, "intervals": {}, "resamples": 0}
    given = {**made, "config": made["config"].model_copy(update={"license": None}), "test": {}}
    text = card(**{**given, "scores": {"topic": Scores(**bare)}})
    assert ModelCard(text).data.license is None
    assert "Of this checkpoint: not stated." in text
    assert "bootstrap" not in text
    assert "sacreBLEU" not in text
    assert "each label" not in text


def test_usage_runs_as_written(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)\n```", card(**made), flags=re.DOTALL)
    asked: list[Any] = []
    engine = SimpleNamespace(predict=lambda *given: asked.append(given))
    monkeypatch.setattr("mtserve.load", lambda folder: engine)
    exec(code, {})
    ((name, items),) = asked
    assert name == "topic"
    made["data"]["topic"].kind.parse(items[0])
    trunk = card(**{**made, "config": made["config"].model_copy(update={"result": "trunk"})})
    assert "AutoModel.from_pretrained" in trunk
    assert "A trunk for plain Transformers: `org/trunk`, trained on 2 tasks." in trunk
