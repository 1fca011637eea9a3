"""Stock models over one frozen trunk: merged they answer as each did alone; what shares no trunk is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig

from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError, ConfigError
from mtserve.inspection import verify
from mtserve.interop.models import import_models
from mtserve.loading import load_checkpoint
from tests.interop.tokenizers import BARE_JSON, byte_tokenizer
from tests.tiny import FAMILIES, TOKENIZER_JSON, trunk_of

SHORT = {"max_length": 48}
TAGS = {0: "I-place", 1: "B-person", 2: "O", 3: "I-person", 4: "B-place"}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("TokenClassification", {"id2label": TAGS, "label2id": {tag: at for at, tag in TAGS.items()}}),
    "topic": ("SequenceClassification", {"id2label": {0: "good", 1: "bad", 2: "fine"}}),
    "tags": ("SequenceClassification", {"num_labels": 2, "problem_type": "multi_label_classification"}),
    "score": ("SequenceClassification", {"num_labels": 1}),
    "choice": ("MultipleChoice", {}),
    "next": ("CausalLM", {}),
}
ORDER = ("O", "B-place", "I-place", "B-person", "I-person")
TEXT = "ana moved from porto to oslo in may ."
PAIR = {"text": TEXT, "text_pair": "the parcel arrived two days late"}
CAUSAL = ("gpt2", "llama")
Change = Callable[[Any], object]
Write = Callable[..., Path]


def names_for(family: str) -> list[str]:
    return [name for name in HEADS if name != ("choice" if family in CAUSAL else "next")]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a stock task model of a family's tiny trunk, after `change` was made to it."""

    def written(
        family: str, name: str, *, place: str = "", change: Change | None = None, tokenizer: str = "", **config: Any
    ) -> Path:
        auto, options = HEADS[name]
        folder = tmp_path / (place or f"{family}-{name}")
        model = getattr(transformers, f"AutoModelFor{auto}").from_config(
            AutoConfig.for_model(family, **{**FAMILIES[family], **options, **config})
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        kept = model.base_model.state_dict().keys()
        if not tokenizer:
            model.base_model.load_state_dict({k: v for k, v in trunk_of(family).state_dict().items() if k in kept})
        if change is not None:
            change(model)
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(tokenizer or (BARE_JSON if family in CAUSAL else TOKENIZER_JSON))
        return folder

    torch.manual_seed(3)
    return written


def merged(output: Path, folders: dict[str, Path], **more: Any) -> Checkpoint:
    special = {"next": {"max_new_tokens": 5}, "score": {"high": 5}}
    options = {name: {**SHORT, **special.get(name, {})} for name in folders}
    given = {"kinds": {}, "golden": {}, "options": options, **more}
    return import_models(output, {name: str(folder) for name, folder in folders.items()}, **given)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "roberta"])
def test_merged_models_answer_as_each_did_alone(family: str, write: Write, tmp_path: Path) -> None:
    folders = {name: write(family, name) for name in names_for(family)}
    checkpoint = merged(tmp_path / "x", folders)
    assert all(report.reproduced and report.rows == 1 for report in verify(checkpoint))
    kinds = {task.name: task.kind for task in checkpoint.manifest.tasks}
    assert kinds["score"] == "similarity"
    assert kinds["tags"] == kinds["topic"] == "classification"
    assert checkpoint.task("tags").options["multi_label"] is True
    assert checkpoint.task("tags").options["labels"] == ["LABEL_0", "LABEL_1"]
    assert checkpoint.task("names").options["labels"] == ["place", "person"]
    engine = load_checkpoint(checkpoint)
    for name, folder in folders.items():
        task = engine.task(name)
        model = getattr(transformers, f"AutoModelFor{HEADS[name][0]}").from_pretrained(folder).eval()
        items: dict[str, Any] = {"choice": {"question": TEXT, "choices": ["red", "green"]}, "score": PAIR}
        work = engine.prepare(name, task.kind.parse(items.get(name, TEXT)))
        rows = work.rows
        engine.step([work])
        for row, ours in zip(rows, work.logits, strict=True):
            inputs = {"input_ids": torch.as_tensor(row.ids).long()[None]}
            if getattr(model.config, "type_vocab_size", 0) > 1:
                inputs["token_type_ids"] = torch.as_tensor(row.type_ids).long()[None]
            if name == "choice":
                inputs = {key: tensor[None] for key, tensor in inputs.items()}
            with torch.no_grad():
                theirs = model(**inputs).logits[0].numpy()
            if name == "names":
                theirs = theirs[:, [list(TAGS.values()).index(tag) for tag in ORDER]]
            expected = {"next": theirs[-1:], "score": theirs / 5}.get(name, theirs)
            assert np.allclose(ours, expected, atol=1e-5), name


def test_pairs_of_a_causal_family_are_read_as_its_own_tokenizer_makes_them(write: Write, tmp_path: Path) -> None:
    """GPT-2's tokenizer has no template, and a stock model is given no segment ids, which would be words."""
    tokenizer = byte_tokenizer(["<|endoftext|>"])
    folder = write("gpt2", "score", tokenizer=tokenizer.to_str(), vocab_size=300, pad_token_id=0)
    engine = load_checkpoint(merged(tmp_path / "x", {"score": folder}))
    work = engine.prepare("score", engine.task("score").kind.parse(PAIR))
    engine.step([work])
    ids = tokenizer.encode(PAIR["text"], "\n" + PAIR["text_pair"]).ids
    with torch.no_grad():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert np.allclose(work.logits[0], theirs / 5, atol=1e-5)


def bump(name: str) -> Change:
    def change(model: Any) -> None:
        model.base_model.get_parameter(name).data[..., 0] += 1e-3

    return change


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (bump("encoder.layer.1.output.dense.bias"), {}, r"bert-topic and \S*other differ in encoder\.layer\.1\.output"),
        (
            bump("pooler.dense.weight"),
            {},
            r"differ in pooler\.dense\.bias|differ in pooler\.dense\.weight \(a pooler is",
        ),
        (None, {"layer_norm_eps": 0.5}, r"the config of \S*other makes another trunk of the same tensors"),
        (None, {"num_hidden_layers": 1}, r"differ in encoder\.layer\.1\."),
    ],
)
def test_another_trunk_is_refused(
    change: Change | None, config: dict[str, Any], said: str, write: Write, tmp_path: Path
) -> None:
    folders = {"topic": write("bert", "topic"), "tags": write("bert", "tags", place="other", change=change, **config)}
    with pytest.raises(CheckpointError, match=said):
        merged(tmp_path / "x", folders)
    assert not (tmp_path / "x").exists()


def test_another_tokenizer_is_refused(write: Write, tmp_path: Path) -> None:
    topic, tags = write("bert", "topic"), write("bert", "tags")
    raw = json.loads(TOKENIZER_JSON)
    (tags / "tokenizer.json").write_text(json.dumps(raw | {"truncation": None, "padding": None}, indent=2))
    merged(tmp_path / "x", {"topic": topic, "tags": tags})  # written otherwise, but the same
    raw["normalizer"]["lowercase"] = False
    (tags / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"tokenizers of \S*bert-topic and \S*bert-tags differ"):
        merged(tmp_path / "y", {"topic": topic, "tags": tags})


@pytest.mark.parametrize(
    ("name", "config", "more", "said"),
    [
        ("score", {}, {"options": {"score": SHORT}}, r"""say it: --options score='\{"low": 0, "high": 5\}'"""),
        (
            "topic",
            {},
            {"kinds": {"topic": "multiple_choice"}},
            "is a BertForSequenceClassification, which multiple_choice",
        ),
        ("topic", {}, {"options": {"topic": {"labels": ["bad", "good", "fine"]}}}, "trained on the labels"),
        ("names", {"id2label": {0: "O", 1: "I-x"}}, {}, "outputs of task 'names' are O, I-x; allowed: IOB2"),
        ("topic", {}, {"options": {}}, "task 'topic': max_length 128 is over the trunk's 96 positions"),
        ("next", {"is_decoder": False}, {}, "task 'next': generation needs a causal trunk; this bert is none"),
        ("score", {}, {"kinds": {"topic": "similarity"}}, "kinds name the task 'topic'; allowed: score"),
        ("score", {}, {"golden": {"topic": ["x"]}}, "golden inputs name the task 'topic'; allowed: score"),
    ],
)
def test_mistakes_are_sentences(
    name: str, config: dict[str, Any], more: dict[str, Any], said: str, write: Write, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        merged(tmp_path / "x", {name: write("bert", name, **config)}, **more)
    assert not (tmp_path / "x").exists()


def test_a_kind_that_no_architecture_says(write: Write, tmp_path: Path) -> None:
    folder = write("bert", "topic")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["BertForPreTraining"]}))
    with pytest.raises(ConfigError, match="has the architecture BertForPreTraining, which is no task of a known kind"):
        merged(tmp_path / "x", {"topic": folder})


def test_a_checkpoint_of_models_says_where_they_came_from(write: Write, tmp_path: Path) -> None:
    golden = {"topic": ["the town"], "tags": [{"text": "one", "text_pair": "two"}]}
    names = ("topic", "tags")
    checkpoint = merged(tmp_path / "x", {name: write("bert", name) for name in names}, golden=golden)
    said = {"imported_from": "models", "models": {"topic": "bert-topic", "tags": "bert-tags"}}
    assert checkpoint.manifest.provenance == {"import": said}
    assert [row.input for row in checkpoint.golden("tags")] == golden["tags"]
    for path in (tmp_path / "x").rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path
    config = json.loads((tmp_path / "x/trunk/config.json").read_text())
    assert not {"id2label", "problem_type", "_name_or_path"} & config.keys()
