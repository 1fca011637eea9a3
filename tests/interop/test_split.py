"""One task as a stock model: Transformers loads it, computes the same, and answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, pipeline

import tests.tiny
from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError, ConfigError, UnknownTaskError
from mtserve.interop.split import split_head
from mtserve.loading import load_checkpoint
from tests.interop.tokenizers import BARE_JSON
from tests.tiny import Tiny, tiny, write_checkpoint

SHORT = {"max_length": 48}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "topic": ("classification", {"labels": ["good", "bad", "fine"], **SHORT}),
    "tags": ("classification", {"labels": ["red", "green"], "multi_label": True, **SHORT}),
    "score": ("similarity", {"low": 0, "high": 5, **SHORT}),
    "cosine": ("similarity", {"method": "cosine", **SHORT}),
    "choice": ("multiple_choice", SHORT),
    "names": ("token_classification", {"labels": ["person", "place"], **SHORT}),
    "ended": ("classification", {"labels": ["one", "two"], "append": "[EOS] [SEP]", **SHORT}),
}
GENERATION: dict[str, tuple[str, dict[str, Any]]] = {
    "forth": ("generation", {"template": "one : {source} [SEP]{target}[CLS]", "max_new_tokens": 9, **SHORT}),
    "back": (
        "generation",
        {"template": "{source}\n{target}", "max_new_tokens": 7, "generation": {"num_beams": 2}, **SHORT},
    ),
}
FAMILIES = ["bert", "distilbert", "gpt2", "llama", "roberta"]
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "similarity": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "token_classification": "AutoModelForTokenClassification",
    "generation": "AutoModelForCausalLM",
}
TEXTS = ["ana moved from porto to oslo in may .", "the parcel arrived two days late"]


def sealed(folder: Path, family: str, tasks: dict[str, tuple[str, dict[str, Any]]] = TASKS) -> tuple[Tiny, Checkpoint]:
    """A tiny checkpoint; the tokenizer of a causal trunk puts nothing around a text, as theirs do."""
    causal = family in ("gpt2", "llama")
    with pytest.MonkeyPatch.context() as patch:
        if causal:
            patch.setattr(tests.tiny, "TOKENIZER_JSON", BARE_JSON)
        small = tiny(family, tasks=tasks | (GENERATION if causal and tasks is TASKS else {}))
        return small, write_checkpoint(folder, small)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return sealed(tmp_path_factory.mktemp("split") / str(request.param), str(request.param))[1]


def item_of(kind: str) -> Any:
    if kind == "multiple_choice":
        return {"question": TEXTS[0], "choices": ["a book", "an umbrella", "a tin of soup"]}
    return {"text": TEXTS[0], "text_pair": TEXTS[1]} if kind == "similarity" else TEXTS[0]


def test_stock_models_compute_the_same_logits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine = load_checkpoint(checkpoint)
    causal = checkpoint.manifest.trunk.causal
    for name, task in engine.tasks.items():
        if name == "cosine":
            continue
        split_head(checkpoint, name, tmp_path / name)
        auto = AUTO["classification" if name == "choice" and causal else task.kind.name]
        model, report = getattr(transformers, auto).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        work = engine.prepare(name, task.kind.parse(item_of(task.kind.name)))
        rows = work.rows
        engine.step([work])
        for row, wanted in zip(rows, work.logits, strict=True):
            given = {"input_ids": row.ids, "token_type_ids": row.type_ids}
            inputs = {key: torch.as_tensor(given[key]).long()[None] for key in given if key in _inputs(tmp_path / name)}
            if "MultipleChoice" in type(model).__name__:
                inputs = {key: tensor[None] for key, tensor in inputs.items()}
            with torch.no_grad():
                found = model.eval()(**inputs).logits[0].numpy()
            if task.kind.name == "generation":
                found = found[-1:]
            assert np.allclose(5 * wanted if name == "score" else wanted, found, atol=1e-5), name
    assert ("forth" in engine.tasks) == causal


def _inputs(folder: Path) -> list[str]:
    return list(AutoTokenizer.from_pretrained(folder).model_input_names)


def test_pipelines_give_the_same_scores(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine = load_checkpoint(checkpoint)
    for name in ("topic", "tags", "ended"):
        split_head(checkpoint, name, tmp_path / name)
        classify = pipeline("text-classification", model=str(tmp_path / name), top_k=None)
        for text in TEXTS:
            ours, theirs = engine.predict(name, [text])[0], classify([text])[0]
            assert [one["label"] for one in theirs] == [one["label"] for one in ours]
            assert [one["score"] for one in theirs] == pytest.approx([one["score"] for one in ours], abs=1e-5)

    split_head(checkpoint, "score", tmp_path / "score")
    score = pipeline("text-classification", model=str(tmp_path / "score"))
    separator = checkpoint.manifest.text.pair_separator or ""
    given = {"text": TEXTS[0], "text_pair": separator + TEXTS[1]}
    theirs = score([given])[0]["score"]
    ours = engine.predict("score", [item_of("similarity")])[0]["score"]
    assert min(max(theirs, 0), 5) == pytest.approx(ours, abs=1e-5)

    split_head(checkpoint, "names", tmp_path / "names")
    tag = pipeline("token-classification", model=str(tmp_path / "names"), aggregation_strategy="none")
    for text in TEXTS:
        ours = engine.predict("names", [text], {"aggregation_strategy": "none"})[0]
        theirs = tag(text)
        assert [(t["entity"], t["start"], t["end"]) for t in theirs] == [
            (o["entity"], o["start"], o["end"]) for o in ours
        ]
        assert [float(t["score"]) for t in theirs] == pytest.approx([o["score"] for o in ours], abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("name", "prompt"), [("forth", "one : {} [SEP]"), ("back", "{}\n")])
def test_generate_makes_the_same_answers(family: str, name: str, prompt: str, tmp_path: Path) -> None:
    small, checkpoint = sealed(tmp_path / "c", family)
    notes = split_head(checkpoint, name, tmp_path / "x")
    assert any("a prompt is" in note for note in notes)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    batch = tokenizer([prompt.format(text) for text in TEXTS], return_tensors="pt", padding=True)
    made = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    theirs = tokenizer.batch_decode(made, skip_special_tokens=True)
    assert theirs == [answer[0]["generated_text"] for answer in small.engine.predict(name, TEXTS)]
    generate = pipeline("text-generation", model=str(tmp_path / "x"))
    assert generate(prompt.format(TEXTS[0]), return_full_text=False)[0]["generated_text"] == theirs[0]


def test_the_segment_id_of_all_tokens_is_in_the_stock_model(tmp_path: Path) -> None:
    one = {"with": ("generation", {"template": "{source}[SEP]{target}", "type_id": 7, "max_new_tokens": 9, **SHORT})}
    small, checkpoint = sealed(tmp_path / "c", "gpt2", one)
    split_head(checkpoint, "with", tmp_path / "x")
    generate = pipeline("text-generation", model=str(tmp_path / "x"))
    for text in TEXTS:
        (theirs,) = generate(text + "[SEP]", return_full_text=False)
        assert theirs["generated_text"] == small.engine.predict("with", [text])[0][0]["generated_text"]


def test_what_has_no_stock_model_is_said(tmp_path: Path) -> None:
    _, checkpoint = sealed(tmp_path / "c", "gpt2")
    with pytest.raises(ConfigError, match="task 'cosine' compares the trunk's states and has no weights"):
        split_head(checkpoint, "cosine", tmp_path / "x")
    with pytest.raises(UnknownTaskError, match="unknown task 'nope'"):
        split_head(checkpoint, "nope", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    notes = split_head(checkpoint, "choice", tmp_path / "x")
    assert any("no class for multiple choice: GPT2ForSequenceClassification" in note for note in notes)
    assert "the second text of a pair begins with '\\n', which the caller puts there" in notes
    with pytest.raises(CheckpointError, match="holds something; choose an empty folder"):
        split_head(checkpoint, "choice", tmp_path / "x")


def test_a_task_of_one_trunk_comes_back_the_same(tmp_path: Path) -> None:
    """Split and merged again, a checkpoint has the trunk and the answers that it had."""
    from mtserve.interop.models import import_models

    small, checkpoint = sealed(tmp_path / "c", "bert")
    names = ["names", "topic", "tags", "score", "choice"]  # the first one's class has no pooler
    for name in names:
        split_head(checkpoint, name, tmp_path / name)
    options = dict.fromkeys(names, SHORT) | {"score": {"low": 0, "high": 5, **SHORT}}
    folders = {name: str(tmp_path / name) for name in names}
    merged = import_models(tmp_path / "x", folders, kinds={}, options=options, golden={})
    engine = load_checkpoint(merged)
    for name in names:
        item = item_of(TASKS[name][0])
        one, other = (e.prepare(name, e.task(name).kind.parse(item)) for e in (small.engine, engine))
        small.engine.step([one])
        engine.step([other])
        for a, b in zip(one.logits, other.logits, strict=True):
            assert np.allclose(a, b, atol=1e-5)
    ours, theirs = (c.folder / c.manifest.trunk.weights for c in (checkpoint, merged))
    assert ours.read_bytes() == theirs.read_bytes()
