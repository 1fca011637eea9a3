"""Chains: what a link hands on and how it is joined, what the manifest refuses, and chains that come and go."""

from __future__ import annotations

import json
import re
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mtserve import surgery
from mtserve.chains import LINKS, AnyChain, FollowedSpan, Member, Rerank, Spans, calls, grouped, make_chain
from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError, InputError, UnknownTaskError
from mtserve.interop.split import split_head
from mtserve.loading import load
from mtserve.manifest import MANIFEST, read_manifest
from mtserve.tasks import KINDS
from mtserve.tasks.classification import ClassificationOptions
from mtserve.weights import load_model, task_part
from tests.shared_data import ROOT
from tests.test_cli import run
from tests.tiny import tiny, write_checkpoint

ENCODER: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("token_classification", {"labels": ["a", "b", "c"], "max_length": 48}),
    "topic": ("classification", {"labels": ["good", "bad", "fine"], "max_length": 48}),
    "score": ("similarity", {"low": 0, "high": 5, "max_length": 48}),
}
DECODER: dict[str, tuple[str, dict[str, Any]]] = {
    "forth": ("generation", {"template": "{source} [SEP]{target}", "max_new_tokens": 5, "max_length": 48}),
    "style": ("classification", {"labels": ["old", "new"], "max_length": 48}),
}
SPANS = Spans(name="opinions", first="names", then="topic")
RERANK = Rerank(name="best", first="forth", then="style", label="old", candidates=3)
MEMBERS = {
    name: Member(KINDS[kind], KINDS[kind].options.model_validate(raw))
    for name, (kind, raw) in {**ENCODER, **DECODER}.items()
}
TEXTS = ["ana silva moved from porto to oslo in may", "good", "the parcel arrived two days late , but kind"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chains") / "bert"
    return surgery.add_chain(write_checkpoint(folder, tiny("bert", tasks=ENCODER)), SPANS).folder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chains") / "gpt2"
    return surgery.add_chain(write_checkpoint(folder, tiny("gpt2", tasks=DECODER)), RERANK).folder


@pytest.fixture
def folder(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "bert"))


# what links hand on

found = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5), st.sampled_from("abc")), max_size=6)


@given(found=found, labels=st.none() | st.sets(st.sampled_from("abc"), min_size=1).map(sorted))
def test_1_every_span_is_followed_once_and_in_order(found: list[Any], labels: Any) -> None:
    text = "one two three four five six seven eight"
    spans = [
        {"entity_group": label, "score": 0.5, "word": text[at : at + size], "start": at, "end": at + size}
        for at, size, label in found
    ]
    chain = Spans(name="x", first="names", then="topic", labels=labels)
    items = chain.items(MEMBERS["names"].kind.parse(text), spans)
    followed = [span for span in spans if labels is None or span["entity_group"] in labels]
    assert items == [{"text": text, "text_pair": span["word"]} for span in followed]
    joined = chain.joined(spans, [[{"label": str(n), "score": 1.0}] for n in range(len(items))])
    assert [{name: value for name, value in one.items() if name != "then"} for one in joined] == followed
    assert [one["then"][0]["label"] for one in joined] == [str(n) for n in range(len(items))]


@pytest.mark.parametrize(
    ("fields", "item"),
    [
        ({"span": "text", "text": "text_pair"}, {"text": "oslo", "text_pair": "to oslo"}),
        ({"span": "text", "text": None}, {"text": "oslo"}),
    ],
)
@pytest.mark.parametrize("example", ["to oslo", {"words": ["to", "oslo"]}])
def test_the_chain_says_which_field_has_the_span(fields: Any, item: Any, example: Any) -> None:
    chain = Spans(name="x", first="names", then="topic", **fields)
    kind = MEMBERS["names"].kind
    assert chain.items(kind.parse(example), [{"word": "oslo", "entity_group": "a"}]) == [item]


@given(
    texts=st.lists(st.sampled_from(["", " ", "one", "two", "three"]), min_size=1, max_size=6),
    scores=st.lists(st.sampled_from([0.0, 0.25, 0.25, 1.0]), min_size=6, max_size=6),
)
def test_2_candidates_are_ranked_by_the_label_and_by_their_order(texts: list[str], scores: list[float]) -> None:
    made = [{"generated_text": text, "score": -float(at), "at": at} for at, text in enumerate(texts)]
    items = RERANK.items(MEMBERS["forth"].kind.parse("x"), made)
    assert items == [{"text": text} for text in texts if text.strip()]
    answers = [[{"label": "new", "score": 9.0}, {"label": "old", "score": scores[n]}] for n in range(len(items))]
    ranked: Any = RERANK.joined(made, answers)
    assert sorted(one["at"] for one in ranked) == list(range(len(made)))  # a permutation
    assert all({**one, "then": 0} == {**made[one["at"]], "then": 0} for one in ranked)  # all else as it was
    said = [[one["score"] for one in each["then"] if one["label"] == "old"] for each in ranked]
    assert [len(one) for one in said] == [1] * len(items) + [0] * (len(made) - len(items))
    keys = [(-one[0] if one else 1.0, each["at"]) for one, each in zip(said, ranked, strict=True)]
    assert keys == sorted(keys)


def test_steps_that_are_the_same_are_one_call_and_others_are_apart() -> None:
    assert calls({"topic": {}}, []) == [{"topic": {}}]
    assert calls({"names": {}}, [("names", {}), ("names", {"x": 1}), ("forth", {})]) == [
        {"names": {}, "forth": {}},
        {"names": {"x": 1}},
    ]
    assert grouped("abc", [[1, 2], [], [3]]) == [["a", "b"], [], ["c"]]


# parameters


def test_parameters_are_those_of_the_tasks_by_name() -> None:
    given = {"names": {"aggregation_strategy": "max"}, "topic": {"top_k": 1}}
    assert SPANS.steps(given, MEMBERS) == (given["names"], given["topic"])
    assert SPANS.steps(None, MEMBERS) == ({}, {})


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({}, {"num_return_sequences": 3, "num_beams": 3}),
        ({"num_beams": 5}, {"num_return_sequences": 3, "num_beams": 5}),
        ({"do_sample": True, "seed": 1}, {"do_sample": True, "seed": 1, "num_return_sequences": 3}),
        ({"num_return_sequences": 2}, {"num_return_sequences": 2, "num_beams": 2}),
    ],
)
def test_candidates_come_from_beams_unless_they_are_sampled(given: Any, first: Any) -> None:
    assert RERANK.steps({"forth": given}, MEMBERS).first == first


@pytest.mark.parametrize(
    ("chain", "given", "problems"),
    [
        (SPANS, {"other": {}}, ["parameters.other: not allowed here; allowed: names, topic"]),
        (SPANS, {"topic": 3}, ["parameters.topic: must be an object; found a number"]),
        (SPANS, {"names": {"aggregation_strategy": "none"}}, ["parameters.names.aggregation_strategy: none gives"]),
        (
            SPANS,
            {"names": {"beam": 1}, "topic": {"top_k": 0}},
            ["parameters.names.beam: not allowed", "parameters.topic.top_k: Input should be"],
        ),
        (RERANK, {"style": {"top_k": 1, "threshold": 0.1}}, ["parameters.style.top_k: leaves out labels", "threshold"]),
        (RERANK, {"forth": {"num_beams": 2}}, ["parameters.forth.num_return_sequences: 3 answers need"]),
    ],
)
def test_every_wrong_parameter_is_named(chain: AnyChain, given: Any, problems: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        chain.steps(given, MEMBERS)
    assert len(caught.value.problems) == len(problems)
    for said, wanted in zip(map(str, caught.value.problems), problems, strict=True):
        assert wanted in said


# what a manifest refuses

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"first": "nobody"}, "chain 'x': no task 'nobody'; allowed: names, topic, score"),
    ({"first": "topic"}, "chain 'x': first 'topic' is a classification; allowed: a token_classification"),
    ({"then": "score"}, "chain 'x': then 'score' is a similarity; allowed: a classification"),
    ({"labels": ["a", "z"]}, "chain 'x': 'names' has no label 'z'; allowed: a, b, c"),
    ({"span": "text"}, "span in text and text in text; allowed: two fields, or the span in text"),
    ({"link": "rerank", "label": "good"}, "first 'names' is a token_classification; allowed: a generation"),
    ({"name": "topic"}, "task names must be distinct"),
    ({"name": "a b"}, "'a b' is no task name"),
    ({"more": 1}, "more"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_manifest_refuses_a_chain_that_cannot_be(folder: Path, change: Any, message: str) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    raw["chains"] = [{"name": "x", "link": "spans", "first": "names", "then": "topic", **change}]
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("label", "candidates", "message"),
    [("gone", 3, "'style' has no label 'gone'; allowed: old, new"), ("old", 99, "less than or equal to 16")],
)
def test_ranking_needs_a_label_and_a_number_that_can_be(label: str, candidates: int, message: str) -> None:
    fields = {"link": "rerank", "first": "forth", "then": "style", "label": label, "candidates": candidates}
    with pytest.raises(ValueError, match=message):
        make_chain("x", fields).check(MEMBERS)


def test_only_a_manifest_with_chains_has_the_newer_format(folder: Path) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    assert raw["format"] == 2
    without = surgery.remove_chains(Checkpoint.open(folder), ["opinions"])
    raw = json.loads((folder / MANIFEST).read_text())
    assert (raw["format"], "chains" in raw) == (1, False)
    surgery.add_chain(without, SPANS)
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(CheckpointError, match="format 1 with 1 chains; needed: 2"):
        read_manifest(folder)


# chains and heads that come and go


def test_5_a_chain_changes_the_manifest_and_the_cards_end(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    checkpoint = surgery.add_chain(Checkpoint.open(folder), SPANS.linked({}, name="again"))
    checkpoint.verify()
    assert [chain.name for chain in checkpoint.manifest.chains] == ["opinions", "again"]
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} == {MANIFEST, "README.md"}
    assert "added chain `again`" in (folder / "README.md").read_text()
    for name, message in (("topic", "has a task 'topic' already"), ("again", "has a chain 'again' already")):
        with pytest.raises(CheckpointError, match=message):
            surgery.add_chain(checkpoint, SPANS.linked({}, name=name))
    with pytest.raises(CheckpointError, match="has no chain 'gone'; its chains: opinions, again"):
        surgery.remove_chains(checkpoint, ["gone"])


def test_5_a_task_of_a_chain_is_renamed_in_it_and_not_removed(folder: Path, tmp_path: Path) -> None:
    wanted = load(folder, profile="fp32").predict("opinions", TEXTS)
    checkpoint = surgery.rename_head(Checkpoint.open(folder), "names", "targets")
    assert checkpoint.manifest.chains == (SPANS.linked({"names": "targets"}),)
    assert load(folder, profile="fp32").predict("opinions", TEXTS) == wanted
    with pytest.raises(CheckpointError, match="task 'targets' is used by chain 'opinions'"):
        surgery.remove_heads(checkpoint, ["score", "targets"])
    with pytest.raises(CheckpointError, match="has a chain 'opinions' already"):
        surgery.rename_head(checkpoint, "topic", "opinions")
    said = split_head(checkpoint, "topic", tmp_path / "stock")
    assert any("chain 'opinions'" in one for one in said)


def test_5_a_head_that_replaces_one_must_go_with_its_chains(folder: Path) -> None:
    surgery.add_chain(Checkpoint.open(folder), Spans(name="some", first="names", then="topic", labels=("c",)))
    checkpoint = Checkpoint.open(folder)
    files = sorted(folder.rglob("*"))
    made = tiny("bert", tasks={"names": ("token_classification", {"labels": ["a", "b"], "max_length": 48})})
    part = task_part(made.model, "names", kind="token_classification", options=made.tasks[0].options)
    with pytest.raises(CheckpointError, match="chain 'some': 'names' has no label 'c'; allowed: a, b"):
        surgery.add_heads(checkpoint, [part], instead=True)
    other = ClassificationOptions(labels=("a", "b", "c"), max_length=48)
    part = task_part(load_model(checkpoint), "topic", kind="classification", options=other)
    assert sorted(folder.rglob("*")) == files
    assert len(surgery.add_heads(checkpoint, [part], instead=True).manifest.chains) == 2


# answers


def test_an_engine_answers_a_chain_as_its_two_tasks_do(encoder: Path) -> None:
    engine = load(encoder)
    found = engine.predict("opinions", TEXTS)
    assert sum(map(len, found)) >= len(TEXTS)
    for text, answer in zip(TEXTS, found, strict=True):
        spans = engine.predict("names", [text])[0]
        assert [(one["start"], one["end"], one["entity_group"]) for one in answer] == [
            (one["start"], one["end"], one["entity_group"]) for one in spans
        ]
        for one in answer:
            assert text[one["start"] : one["end"]] == one["word"]
            then = engine.predict("topic", [{"text": text, "text_pair": one["word"]}])[0]
            assert [each["label"] for each in one["then"]] == [each["label"] for each in then]
            assert one["then"][0]["score"] == pytest.approx(then[0]["score"], abs=1e-5)
    few = engine.predict("opinions", TEXTS, {"topic": {"top_k": 1}, "names": {"ignore_labels": ["a", "b", "c"]}})
    assert few == [[], [], []]


def test_an_engine_ranks_what_it_generates(decoder: Path) -> None:
    engine = load(decoder)
    for text in ("good", "the parcel arrived"):
        (ranked,) = engine.predict("best", [text])
        (plain,) = engine.predict("forth", [text], {"num_beams": 3, "num_return_sequences": 3})
        assert [{**one, "then": 0} for one in ranked] in [
            [{**one, "then": 0} for one in p] for p in permutations(plain)
        ]
        scores = [one["then"][0]["score"] for one in ranked if one["then"]]
        assert scores
        assert scores == sorted(scores, reverse=True)


def test_what_is_wrong_with_an_item_or_a_name_is_said(encoder: Path) -> None:
    engine = load(encoder)
    with pytest.raises(InputError, match="input 1: an input of token_classification is a string or an object"):
        engine.predict("opinions", ["good", 3])
    both = list(engine.score(["good", 3], ["opinions", "topic"], errors=True))
    assert isinstance(both[1]["opinions"], InputError)
    assert both[0]["opinions"] == engine.predict("opinions", ["good"])[0]
    with pytest.raises(UnknownTaskError, match="this model has names, score, topic; chains: opinions"):
        engine.predict("gone", ["good"])
    with pytest.raises(UnknownTaskError, match="'opinions' is a chain of tasks, which is asked among"):
        engine.task("opinions")
    with pytest.raises(InputError, match="an answer of a chain comes at once"):
        engine.prepare_all("opinions", ["good"], stream=True)


def test_what_the_second_task_refuses_is_an_error_of_its_row(tmp_path: Path) -> None:
    short = {**ENCODER, "topic": ("classification", {"labels": ["a", "b"], "max_length": 20, "on_long": "error"})}
    checkpoint = write_checkpoint(tmp_path / "bert", tiny("bert", tasks=short))
    engine = load(surgery.add_chain(checkpoint, SPANS).folder)
    found = [answer["opinions"] for answer in engine.score(["good", f"{TEXTS[0]} " * 3], ["opinions"], errors=True)]
    assert isinstance(found[0], list)
    assert isinstance(found[1], InputError)
    with pytest.raises(InputError, match="this task allows"):
        engine.predict("opinions", ["good", f"{TEXTS[0]} " * 3])


# the page


def test_the_page_is_true() -> None:
    """What an answer looks like, the fields that a chain has, and the chains of its run file."""
    page = (ROOT / "docs/chains.md").read_text(encoding="utf-8")
    (answer,) = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL))
    assert all(set(one) == set(FollowedSpan.__annotations__) for one in answer)
    named = {name for code in re.findall(r"`([^`\n]+)`", page) for name in re.findall(r"\w+", code)}
    assert {field for link in LINKS.values() for field in link.model_fields if field != "name"} | {*LINKS} <= named
    (chains,) = (yaml.safe_load(block)["chains"] for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL))
    assert [make_chain(name, fields).link for name, fields in chains.items()] == ["spans", "rerank"]


# the command line


def test_commands_add_show_ask_and_remove_chains(folder: Path) -> None:
    added = run(
        "chains", "add", folder, "some", "--link", "spans", "--first", "names", "--then", "topic", "--labels", "a,b"
    )
    assert added.returncode == 0, added.stderr
    assert added.stdout.strip().endswith("opinions (names, topic), some (names, topic)")
    shown = run("inspect", folder).stdout
    assert 'some: chain of names and topic by spans\n  labels ["a", "b"], span "text_pair", text "text"' in shown
    assert [chain["name"] for chain in json.loads(run("inspect", folder, "--json").stdout)["chains"]] == [
        "opinions",
        "some",
    ]
    asked = run("predict", folder, *TEXTS, "--task", "some", "--task", "opinions")
    assert asked.returncode == 0, asked.stderr
    engine = load(folder)
    for line, answer in zip(asked.stdout.splitlines(), engine.score(TEXTS, ["some", "opinions"]), strict=True):
        assert {one["entity_group"] for one in json.loads(line)["some"]} <= {"a", "b"}
        assert json.loads(line).keys() == answer.keys()
    removed = run("chains", "remove", folder, "some", "opinions")
    assert removed.stdout.strip().endswith("no chains")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--link", "loop", "--first", "names", "--then", "topic"], "link 'loop' is unknown; allowed: spans, rerank"),
        (
            ["--link", "spans", "--first", "names", "--then", "topic", "--label", "a"],
            "label: not allowed here; allowed: name, first, then, link, labels, span, text",
        ),
        (["--link", "spans", "--first", "names", "--then", "score"], "then 'score' is a similarity"),
        (["--link", "rerank", "--first", "names", "--then", "topic"], "label: Field required"),
    ],
)
def test_a_chain_that_cannot_be_is_one_sentence(encoder: Path, options: list[str], message: str) -> None:
    done = run("chains", "add", encoder, "x", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
