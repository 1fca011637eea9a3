"""Checkpoints of the notebook: what its model computes, the imported tasks answer; what is not one is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mtserve
from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError, ConfigError
from mtserve.inspection import verify
from mtserve.interop.notebook import import_notebook
from mtserve.weights import load_model
from tests.interop import notebook_model as nb

SOURCES = ["i do not know where he has gone", "the parcel arrived two days late , ana", "Où ?"]
KINDS = {"translate": "generation", "classify": "classification"}
LABELS = {"classify": {"labels": ["modern", "original", "translate"]}}
THREE = {"stsb": "similarity", "rte": "classification", "commonsense_qa": "multiple_choice"}
RTE = {"rte": {"labels": ["entailment", "not_entailment"]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nb.gpt2_folder(tmp_path_factory.mktemp("gpt2") / "tiny-gpt2")


def shakespeare(folder: Path, output: Path, base: Path, **more: Any) -> Checkpoint:
    chosen = {"model": str(base), "kinds": KINDS, "options": LABELS, "golden": {}, **more}
    return import_notebook(folder, output, **chosen)


@pytest.mark.parametrize("form", ["bin", "bin with sharing", "bin in shards", "safetensors", "safetensors in shards"])
def test_gpt2_answers_as_the_notebooks_model_does(form: str, base: Path, tmp_path: Path) -> None:
    model, tokenizer = nb.shakespeare(base)
    size = len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<bos>", "<eos>", "<pad>", "<cls>"]) == list(range(size - 4, size))
    written = nb.write(tmp_path / "notebook", nb.state(model, copies="sharing" not in form), form=form)
    checkpoint = shakespeare(written, tmp_path / "x", base, allow_pickle="bin" in form)
    assert all(report.reproduced and report.rows == 1 for report in verify(checkpoint))
    engine = mtserve.load(tmp_path / "x")

    served = load_model(checkpoint)
    targets = ["he is gone , sir", "it came late", "where ?"]
    for source, target in zip(SOURCES, targets, strict=True):
        given = nb.features(tokenizer, [f"{source}<bos>{target}<eos>"])
        given["token_type_ids"] = torch.ones_like(given["input_ids"])
        length = int(given["attention_mask"].sum())
        with torch.no_grad():
            wanted = model("translate", **given)[0, :length]
        task = engine.task("translate")
        example = task.kind.labelled(text=source, target=target)
        (row,), labels = task.kind.features(example, task.options, engine.text)
        assert row.ids.tolist() == given["input_ids"][0, :length].tolist()
        assert [int(label) for label in labels if label >= 0] == tokenizer(f"{target}<eos>")["input_ids"]
        ids, types = (torch.as_tensor(array).long()[None] for array in (row.ids, row.type_ids))
        with torch.no_grad():
            found = served("translate", ids, torch.ones_like(ids), types)[0]
        assert torch.allclose(found, wanted, atol=1e-5)

    for source in SOURCES:
        given = nb.features(tokenizer, [f"{source}<cls>"])
        with torch.no_grad():
            wanted = model("classify", **given)[0].softmax(-1).tolist()
        found = {one["label"]: one["score"] for one in engine.predict("classify", [source])[0]}
        assert found == pytest.approx(dict(zip(LABELS["classify"]["labels"], wanted, strict=True)), abs=1e-5)


def test_gpt2_translates_as_the_notebooks_model_generates(base: Path, tmp_path: Path) -> None:
    model, tokenizer = nb.shakespeare(base)
    written = nb.write(tmp_path / "notebook", nb.state(model), form="safetensors")
    shakespeare(written, tmp_path / "x", base, options={**LABELS, "translate": {"max_new_tokens": 24}})
    engine = mtserve.load(tmp_path / "x")
    assert engine.task("translate").options.model_dump()["type_id"] == 1
    for source in SOURCES:
        prompt = tokenizer(source + "<bos>", return_tensors="pt")
        wanted = model.taskmodels_dict["translate"].generate(
            **prompt, token_type_ids=torch.ones_like(prompt["input_ids"]), max_new_tokens=24, do_sample=False
        )
        without = model.taskmodels_dict["translate"].generate(**prompt, max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(wanted[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert engine.predict("translate", [source])[0][0]["generated_text"] == text
        assert wanted.tolist() != without.tolist()  # the habit changes what it says


def test_roberta_answers_as_the_notebooks_model_does(tmp_path: Path) -> None:
    base = nb.roberta_folder(tmp_path / "tiny-roberta")
    model, tokenizer = nb.understanding(base)
    written = nb.write(tmp_path / "notebook", nb.state(model), form="bin")
    checkpoint = import_notebook(
        written, tmp_path / "x", model=str(base), kinds=THREE, options=RTE, golden={}, allow_pickle=True
    )
    assert all(report.reproduced for report in verify(checkpoint))
    engine = mtserve.load(tmp_path / "x")

    def logits(task: str, item: dict[str, Any]) -> Any:
        work = engine.prepare(task, engine.task(task).kind.parse(item))
        engine.step([work])
        return np.stack(work.logits)

    one, two = "a man is feeding his dog", "someone gives food to a pet ."
    with torch.no_grad():
        rte, stsb = (model(task, **nb.features(tokenizer, [one], [two])) for task in ("rte", "stsb"))
        choices = ["an umbrella", "a tin of soup", "a book", "red", "north"]
        nested = {k: v[None] for k, v in nb.features(tokenizer, [two] * 5, choices).items()}
        chosen = model("commonsense_qa", **nested)
    assert np.allclose(logits("rte", {"text": one, "text_pair": two})[0], rte[0], atol=1e-5)
    assert np.allclose(logits("stsb", {"text": one, "text_pair": two})[0] * 5, stsb[0], atol=1e-5)
    assert np.allclose(logits("commonsense_qa", {"question": two, "choices": choices})[:, 0], chosen[0], atol=1e-5)
    clipped = min(max(float(stsb), 0), 5)
    assert engine.predict("stsb", [{"text": one, "text_pair": two}])[0]["score"] == pytest.approx(clipped, abs=1e-5)


def test_the_checkpoint_says_where_it_came_from(base: Path, tmp_path: Path) -> None:
    model, _ = nb.shakespeare(base)
    written = nb.write(tmp_path / "notebook", nb.state(model), form="safetensors")
    golden = {"classify": ["good", "bad"]}
    checkpoint = shakespeare(written, tmp_path / "x", base, kinds={"classify": "classification"}, golden=golden)
    said = checkpoint.manifest.provenance["import"]
    assert said["special_tokens"] == ["<bos>", "<eos>", "<pad>", "<cls>"]
    assert said["left_out"] == ["translate"]
    assert list(said["files"]) == ["model.safetensors"]
    assert [row.input["text"] for row in checkpoint.golden("classify")] == ["good", "bad"]
    task = checkpoint.task("classify")
    assert {"append": "<cls>", "max_length": 128}.items() <= task.options.items()
    size = checkpoint.text().vocab_size
    assert (checkpoint.manifest.text.eos_id, checkpoint.manifest.text.pad_id) == (size - 3, size - 2)
    for path in (tmp_path / "x").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
    assert "| classify | classification | modern, original, translate |" in (tmp_path / "x/README.md").read_text()


def broken(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "copy":
        tensors["taskmodels_dict.classify.transformer.h.1.mlp.c_fc.weight"][0, 0] += 1e-3
    elif how == "lacking":
        for name in [name for name in tensors if name.endswith("h.1.ln_2.weight")]:
            del tensors[name]
    elif how == "foreign":
        tensors["module.x"] = torch.zeros(1)
    elif how == "untied":
        tensors["taskmodels_dict.translate.lm_head.weight"] = torch.zeros_like(tensors["encoder.wte.weight"])
    elif how == "headless":
        del tensors["taskmodels_dict.classify.score.weight"]
    elif how == "narrow":
        for name in [name for name in tensors if name.endswith("h.0.ln_1.bias")]:
            tensors[name] = torch.zeros(8)
    return tensors


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("copy", r"taskmodels_dict\.classify\.transformer\.h\.1\.mlp\.c_fc\.weight differs from encoder\.h\.1\.mlp"),
        ("lacking", r"trunk's tensor h\.1\.ln_2\.weight is missing by the model's config"),
        ("foreign", r"module\.x is no tensor of the notebook's model"),
        ("untied", r"task 'translate': lm_head\.weight differs from the trunk's wte\.weight"),
        ("headless", r"task 'classify': tensor score\.weight is missing"),
        ("narrow", r"tensor h\.0\.ln_1\.bias is \(8,\) in the file, \(32,\) by the model's config"),
    ],
)
def test_weights_that_are_not_the_notebooks_are_refused(how: str, said: str, base: Path, tmp_path: Path) -> None:
    model, _ = nb.shakespeare(base)
    written = nb.write(tmp_path / "notebook", broken(nb.state(model), how), form="safetensors")
    with pytest.raises(CheckpointError, match=said):
        shakespeare(written, tmp_path / "x", base)
    assert not (tmp_path / "x").exists()


def test_trunk_tensors_need_not_stand_twice(base: Path, tmp_path: Path) -> None:
    """Newer savers write a shared tensor once, under any of its names."""
    model, _ = nb.shakespeare(base)
    tensors = nb.state(model)
    for name in [name for name in tensors if name.startswith("taskmodels_dict.translate.")]:
        del tensors[name]
    tensors["taskmodels_dict.translate.transformer.wpe.weight"] = tensors.pop("encoder.wpe.weight")
    shakespeare(nb.write(tmp_path / "notebook", tensors, form="safetensors"), tmp_path / "x", base)
    whole = nb.write(tmp_path / "whole", nb.state(model), form="safetensors")
    marks = [
        c.manifest.trunk.fingerprint
        for c in (shakespeare(whole, tmp_path / "y", base), Checkpoint.open(tmp_path / "x"))
    ]
    assert marks[0] == marks[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"kinds": {"style": "classification"}, "options": {}}, "holds no task 'style'; it has classify, translate"),
        ({"kinds": {"classify": "sorting"}}, "'sorting' is no kind of task; allowed: classification"),
        ({"options": {}}, r"task 'classify': options.labels: Field required"),
        ({"special_tokens": ["<b>", "<e>", "<p>"]}, r"tokenizer beside .* has 300, and 3 are added; name the 4"),
        ({"special_tokens": ["<b>", "a", "<p>", "<c>"]}, "a is a token of the tokenizer already"),
        ({"options": {**LABELS, "style": {}}}, "options name the task 'style'; allowed: translate, classify"),
        ({"golden": {"style": ["x"]}}, "golden inputs name the task 'style'; allowed: translate, classify"),
    ],
)
def test_mistakes_are_sentences(more: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    model, _ = nb.shakespeare(base)
    written = nb.write(tmp_path / "notebook", nb.state(model), form="safetensors")
    with pytest.raises(ConfigError, match=said):
        shakespeare(written, tmp_path / "x", base, **more)


def test_a_head_that_reads_a_pooler_needs_one(tmp_path: Path) -> None:
    base = nb.roberta_folder(tmp_path / "tiny-roberta")
    model, _ = nb.understanding(base)
    tensors = {name: tensor for name, tensor in nb.state(model).items() if ".pooler." not in name}
    written = nb.write(tmp_path / "notebook", tensors, form="safetensors")
    given: dict[str, Any] = {"model": str(base), "options": RTE, "golden": {}}
    with pytest.raises(CheckpointError, match="'commonsense_qa' reads the trunk's pooler"):
        import_notebook(written, tmp_path / "x", kinds=THREE, **given)
    only = {"rte": "classification"}
    marks = [import_notebook(written, tmp_path / n, kinds=only, **given).manifest.trunk.fingerprint for n in "xy"]
    assert marks[0] == marks[1]  # what nothing reads is not random


def test_pickles_are_read_on_request_and_hold_tensors_alone(base: Path, tmp_path: Path) -> None:
    model, _ = nb.shakespeare(base)
    written = nb.write(tmp_path / "notebook", nb.state(model), form="bin")
    with pytest.raises(ConfigError, match="is a pickle, a form that can run code when it is read; --allow-pickle"):
        shakespeare(written, tmp_path / "x", base)

    @dataclasses.dataclass
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"encoder.wte.weight": Trap()}, written / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is no file of tensors that torch can map"):
        shakespeare(written, tmp_path / "x", base, allow_pickle=True)
    assert not (tmp_path / "sprung").exists()


def test_an_index_names_files_beside_it(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "notebook"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"holds no weights; looked for model\.safetensors, "):
        shakespeare(folder, tmp_path / "x", base)
    index = folder / "model.safetensors.index.json"
    for content, said in (
        (json.dumps({"weight_map": {"a": "../other.safetensors"}}), "names ../other.safetensors, which is no file"),
        ("[]", "is no index of weight files"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=said):
            shakespeare(folder, tmp_path / "x", base)
