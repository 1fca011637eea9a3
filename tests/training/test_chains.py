"""Chains of a run file: checked before training, sealed into the checkpoint, and dropped with their tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtserve
from mtserve import surgery
from mtserve.chains import Spans
from mtserve.errors import ConfigError
from tests.training.conftest import Run
from tests.training.test_run import run
from training.__main__ import main
from training.preview import preview
from training.runfile import find, read_config

TASKS = {"names": "token_classification", "topic": "classification"}
CHAIN = {"link": "spans", "first": "names", "then": "topic", "labels": ["person"]}


def test_a_run_seals_its_chains(run_file: Run) -> None:
    result = run(run_file(TASKS, chains={"about": CHAIN}), "training.epochs=40", "training.learning_rate=0.01")
    assert result.checkpoint.manifest.chains == (Spans(name="about", first="names", then="topic", labels=("person",)),)
    engine = mtserve.load(result.folder)
    texts = ["the ana in may", "the silva in may"]
    found = engine.predict("about", texts)
    spans = [[one for one in some if one["entity_group"] == "person"] for some in engine.predict("names", texts)]
    assert [[one["word"] for one in some] for some in found] == [[one["word"] for one in some] for some in spans]
    assert any(found)
    assert "about" in (result.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["chains.about.labels=[nobody]"], "chains: chain 'about': 'names' has no label 'nobody'; allowed: per"),
        (["chains.about.first=topic"], "chain 'about': first 'topic' is a classification"),
        (["chains.about.then=gone"], r"chains\.about: wanted are another name and two of names, topic"),
        (["chains.topic={link: spans, first: names, then: topic}"], r"chains\.topic: wanted are another name"),
        (["chains.about.lable=x"], "chain 'about': lable: not allowed here; allowed: name, first, then, link"),
        (["chains.about=3"], "chain 'about' must be a mapping; found a number"),
        (["result=trunk"], "chains: allowed with result: checkpoint"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_before_training(run_file: Run, changes: list[str], message: str) -> None:
    path = run_file(TASKS, chains={"about": CHAIN})
    with pytest.raises(ConfigError, match=message):
        preview(read_config(path, changes), base=path.parent)
    assert not (path.parent / "out").exists()


def test_a_plan_says_it_on_the_command_line(run_file: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_file(TASKS, chains={"about": {**CHAIN, "labels": ["nobody"]}})
    assert main(["--plan", str(path)]) == 2
    assert "'names' has no label 'nobody'" in capsys.readouterr().err


def test_a_chain_goes_with_a_task_that_is_left_out(run_file: Run) -> None:
    path = run_file(TASKS, chains={"about": CHAIN})
    assert list(read_config(path).chains) == ["about"]
    assert read_config(path, ["tasks.topic=null"]).chains == {}
    assert read_config(path, ["chains.about=null"]).chains == {}
    config = read_config(path)
    assert type(config).model_validate(config.model_dump()) == config


def test_new_heads_must_go_with_the_chains_that_are_there(run_file: Run) -> None:
    home = run(run_file(TASKS, chains={"about": CHAIN}), "training.max_steps=2").folder
    more = {"trunk": str(home), "output": str(home), "result": "heads", "overwrite": True}
    wrong = run_file({"names": "token_classification"}, **more)
    for data in wrong.parent.glob("names.*.jsonl"):
        data.write_text(data.read_text().replace("person", "animal"))
    with pytest.raises(ConfigError, match="chains: chain 'about': 'names' has no label 'person'; allowed: animal, pl"):
        run(wrong, "training.max_steps=2")
    checkpoint = run(run_file({"topic": "classification"}, **more), "training.max_steps=2").checkpoint
    assert [chain.name for chain in checkpoint.manifest.chains] == ["about"]
    assert surgery.remove_chains(checkpoint, ["about"]).manifest.format == 1


@pytest.mark.parametrize(
    ("recipe", "form", "chains"),
    [
        ("arabic_hotels", "hub", ["opinions"]),
        ("arabic_hotels", "tune", ["opinions"]),
        ("shakespeare", "strap", ["best_original", "best_modern"]),
        ("shakespeare", "local", ["best_original", "best_modern"]),
        ("shakespeare", "judge", []),
    ],
)
def test_recipes_have_chains_where_their_tasks_are(recipe: str, form: str, chains: list[str]) -> None:
    config = read_config(find(recipe), [f"form={form}"])
    assert list(config.chains) == chains
    for chain in config.chains.values():
        assert tuple(config.tasks[name].kind for name in (chain.first, chain.then)) == chain.kinds


def test_the_span_stands_where_the_reader_puts_a_target(tmp_path: Path) -> None:
    """The chain of the hotels makes the examples that its second task was trained on."""
    from mtserve.tasks import KINDS
    from training.readers.absa import AbsaOptions, read_absa
    from training.readers.record import Files

    xml = (
        '<Reviews><Review rid="1"><sentences><sentence id="1:0"><text>the room was good</text><Opinions>'
        '<Opinion target="room" category="ROOMS#GENERAL" polarity="positive" from="4" to="8"/>'
        "</Opinions></sentence></sentences></Review></Reviews>"
    )
    (tmp_path / "one.xml").write_text(xml)
    (record,) = read_absa(Files((tmp_path / "one.xml",)), AbsaOptions(view="sentiment"))
    kind = KINDS["token_classification"]
    (span,) = read_config(find("arabic_hotels")).chains.values()
    (item,) = span.items(
        kind.parse("the room was good"),
        [{"entity_group": "target", "score": 1.0, "word": "room", "start": 4, "end": 8}],
    )
    assert item == {name: record.data[name] for name in ("text", "text_pair")}  # type: ignore[union-attr]
