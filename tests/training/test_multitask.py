"""The model of the write-ups: heads as `from_pretrained` makes them, one trunk, folders that load without its code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import mtserve
from mtserve.errors import CheckpointError, ConfigError, UnknownTaskError
from tests.tiny import EOS, FAMILIES, PAD, TOKENIZER_JSON
from training.stock.multitask import MultitaskModel
from training.stock.serving import to_checkpoint

Folder = Callable[[str], Path]
Ids = Tensor

CLASSIFY, TAG, LM = AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForCausalLM


def config(family: str, **extra: Any) -> Any:
    return AutoConfig.for_model(family, **{**FAMILIES[family], **extra})


def whole(folder: Path, family: str, stock: str, **extra: Any) -> Any:
    """A random stock task model, saved; its weights are spread widely so that each of them matters."""
    torch.manual_seed(1)
    auto = getattr(transformers, stock)
    model = auto.from_config(config(family, **extra))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return auto.from_pretrained(folder).eval()


def tied_groups(model: Any) -> list[list[str]]:
    """Names that stand for one tensor, where there are several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def ids(rows: int = 2, length: int = 7) -> Ids:
    return torch.arange(rows * length).reshape(rows, length) % 60 + 10


@pytest.mark.parametrize(
    ("family", "stock"),
    [
        ("albert", "AutoModelForMaskedLM"),
        ("bert", "AutoModelForMaskedLM"),
        ("bert", "AutoModelForPreTraining"),
        ("bert", "AutoModelForNextSentencePrediction"),
        ("bert", "AutoModelForSequenceClassification"),
        ("deberta-v2", "AutoModelForTokenClassification"),
        ("distilbert", "AutoModelForMaskedLM"),
        ("electra", "AutoModelForMaskedLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("gpt2", "AutoModelForSequenceClassification"),
        ("llama", "AutoModelForCausalLM"),
        ("modernbert", "AutoModelForSequenceClassification"),
        ("mpnet", "AutoModelForMaskedLM"),
        ("roberta", "AutoModelForMultipleChoice"),
        ("xlm-roberta", "AutoModelForQuestionAnswering"),
    ],
)
def test_a_task_model_is_what_from_pretrained_makes(family: str, stock: str, tmp_path: Path) -> None:
    theirs = whole(tmp_path, family, stock)
    model = MultitaskModel.create(str(tmp_path), {"t": getattr(transformers, stock)}, {"t": config(family)})
    ours = model.eval().taskmodels_dict["t"]
    assert type(ours) is type(theirs)
    assert tied_groups(ours) == tied_groups(theirs)
    row = ids()[:, None].repeat(1, 3, 1) if stock.endswith("MultipleChoice") else ids()
    assert torch.equal(model("t", row)[0], theirs(input_ids=row)[0])
    state = ours.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())
    model.check_sharing()


def test_an_output_matrix_that_differs_from_the_embeddings_stays_its_own_as_in_from_pretrained(tmp_path: Path) -> None:
    whole(tmp_path, "gpt2", "AutoModelForCausalLM", tie_word_embeddings=False)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    theirs = LM.from_pretrained(tmp_path).eval()
    model = MultitaskModel.create(str(tmp_path), {"t": LM}, {"t": config("gpt2")}).eval()
    assert torch.equal(model("t", ids()).logits, theirs(input_ids=ids()).logits)
    model.check_sharing()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_shares_its_trunk_whichever_task_comes_first(family: str, trunk_folder: Folder) -> None:
    """A token classifier's own trunk has no pooler, which a sequence classifier beside it may need."""
    classes = {"tag": TAG, "classify": CLASSIFY}
    configs = {name: config(family, num_labels=3) for name in classes}
    one = MultitaskModel.create(str(trunk_folder(family)), classes, configs)
    two = MultitaskModel.create(str(trunk_folder(family)), dict(reversed(classes.items())), configs)
    one.check_sharing()
    assert one("classify", ids(), attention_mask=torch.ones(2, 7, dtype=torch.long)).logits.shape == (2, 3)
    for name in classes:
        assert torch.equal(one(name, ids()).logits, two(name, ids()).logits)
        assert getattr(one.taskmodels_dict[name], one.taskmodels_dict[name].base_model_prefix) is one.encoder
    taken = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in one.parameters()}
    own = sum(tensor.numel() for name in classes for tensor in one.head_tensors(name).values())
    assert sum(taken.values()) == sum(tensor.numel() for tensor in one.encoder.parameters()) + own


def gpt2(folder: Folder, **extra: Any) -> MultitaskModel:
    """S1's pair of tasks."""
    configs = {"translate": config("gpt2", **extra), "classify": config("gpt2", num_labels=3, **extra)}
    return MultitaskModel.create(str(folder("gpt2")), {"translate": LM, "classify": CLASSIFY}, configs)


def test_the_check_names_what_is_not_shared(trunk_folder: Folder) -> None:
    model = gpt2(trunk_folder)
    pointers = [task.transformer.h[1].mlp.c_proj.weight.data_ptr() for task in model.taskmodels_dict.values()]
    assert pointers == [model.encoder.h[1].mlp.c_proj.weight.data_ptr()] * 2
    model.taskmodels_dict["translate"].lm_head.weight = nn.Parameter(model.encoder.wte.weight.clone())
    with pytest.raises(CheckpointError, match=r"'translate': lm_head.weight is not tied to transformer.wte.weight"):
        model.check_sharing()
    model.taskmodels_dict["translate"].tie_weights()
    model.taskmodels_dict["classify"].transformer = AutoModel.from_config(config("gpt2"))
    with pytest.raises(CheckpointError, match=r"task 'classify' does not share the trunk's wte.weight"):
        model.check_sharing()


def test_configs_are_never_shared(trunk_folder: Folder) -> None:
    """Transformers writes `problem_type` into a config at the first forward pass."""
    given = config("bert", num_labels=2)
    model = MultitaskModel.create(str(trunk_folder("bert")), {"a": CLASSIFY, "b": CLASSIFY}, {"a": given, "b": given})
    a, b = (task.config for task in model.taskmodels_dict.values())
    model("a", ids(), labels=torch.tensor([0, 1]))
    assert (a.problem_type, b.problem_type, given.problem_type, model.config.problem_type) == (
        "single_label_classification",
        None,
        None,
        None,
    )


def test_fresh_heads_follow_from_seed_and_name(trunk_folder: Folder) -> None:
    folder = str(trunk_folder("bert"))

    def head(name: str, seed: int) -> Tensor:
        made = MultitaskModel.create(folder, {name: CLASSIFY}, {name: config("bert")}, seed=seed)
        return made.head_tensors(name)["classifier.weight"]

    torch.manual_seed(5)
    first = head("a", 0)
    before = torch.random.get_rng_state()
    assert torch.equal(first, head("a", 0))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, head("a", 1))
    assert not torch.equal(first, head("b", 0))


def test_training_moves_the_one_trunk_and_each_head(trunk_folder: Folder) -> None:
    model = gpt2(trunk_folder).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses: dict[str, list[float]] = {"translate": [], "classify": []}
    for _ in range(12):
        for name, labels in (("translate", ids()), ("classify", torch.tensor([0, 2]))):
            loss = model(name, ids(), attention_mask=torch.ones_like(ids()), labels=labels).loss
            loss.backward()
            losses[name].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert all(values[-1] < values[0] / 2 for values in losses.values())
    assert [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])] == []
    model.check_sharing()


def test_type_ids_reach_only_trunks_that_have_types(trunk_folder: Folder) -> None:
    types = torch.ones_like(ids())
    causal = gpt2(trunk_folder).eval()
    assert torch.equal(causal("translate", ids(), token_type_ids=types).logits, causal("translate", ids()).logits)
    assert not torch.equal(
        causal.taskmodels_dict["translate"](ids(), token_type_ids=types).logits, causal("translate", ids()).logits
    )
    bert = MultitaskModel.create(str(trunk_folder("bert")), {"t": CLASSIFY}, {"t": config("bert")}).eval()
    assert not torch.equal(bert("t", ids(), token_type_ids=types).logits, bert("t", ids()).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_grow_every_matrix_and_follow_from_the_seed(tied: bool, tmp_path: Path) -> None:
    whole(tmp_path, "gpt2", "AutoModelForCausalLM", tie_word_embeddings=tied)
    configs = {"translate": AutoConfig.from_pretrained(tmp_path), "classify": config("gpt2", num_labels=3)}
    size = configs["translate"].vocab_size + 4

    def grown(seed: int) -> MultitaskModel:
        made = MultitaskModel.create(str(tmp_path), {"translate": LM, "classify": CLASSIFY}, configs)
        torch.manual_seed(seed + 100)
        made.resize_token_embeddings(size, seed=seed)
        return made

    one, again, other = grown(0), grown(0), grown(1)
    translate = one.taskmodels_dict["translate"]
    assert translate.lm_head.weight.shape[0] == one.encoder.wte.weight.shape[0] == size
    assert (translate.lm_head.weight is one.encoder.wte.weight) is tied
    assert [one.config.vocab_size] * 2 == [task.config.vocab_size for task in one.taskmodels_dict.values()]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert not torch.equal(one.encoder.wte.weight[-4:], other.encoder.wte.weight[-4:])
    assert torch.equal(one.encoder.wte.weight[:-4], other.encoder.wte.weight[:-4])
    assert one("translate", torch.tensor([[size - 1]])).logits.shape == (1, 1, size)


def test_task_models_may_grow_one_by_one(tmp_path: Path, trunk_folder: Folder) -> None:
    """The way of the write-up."""
    model = gpt2(trunk_folder).eval()
    size = model.config.vocab_size + 4
    model.taskmodels_dict["classify"].resize_token_embeddings(size)
    with pytest.raises(CheckpointError, match=f"config of task 'translate' has {size - 4} tokens, the trunk {size}"):
        model.save(tmp_path / "early")
    model.taskmodels_dict["translate"].resize_token_embeddings(size)
    model.save(tmp_path / "saved")
    again = MultitaskModel.load(tmp_path / "saved").eval()
    assert torch.equal(again("translate", ids()).logits, model("translate", ids()).logits)
    assert again.config.vocab_size == size


def test_gradients_are_the_same_with_checkpointing(trunk_folder: Folder) -> None:
    model = gpt2(trunk_folder).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model("translate", ids(), labels=ids()).loss.backward()
        found.append(model.encoder.h[0].attn.c_attn.weight.grad.clone())
    assert model.encoder.h[0].gradient_checkpointing
    torch.testing.assert_close(found[0], found[1])


def test_a_saved_model_loads_without_the_code_that_made_it(tmp_path: Path, trunk_folder: Folder) -> None:
    model = gpt2(trunk_folder).eval()
    model.resize_token_embeddings(model.config.vocab_size + 4)
    model.save(tmp_path / "saved")
    again = MultitaskModel.load(tmp_path / "saved").eval()
    again.check_sharing()
    assert list(again.taskmodels_dict) == ["translate", "classify"]
    for name in again.taskmodels_dict:
        assert torch.equal(again(name, ids()).logits, model(name, ids()).logits)
    assert again.taskmodels_dict["classify"].config.num_labels == 3
    files = sorted(path for path in (tmp_path / "saved").rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    stored = [name for path in files if path.suffix == ".safetensors" for name in safe_open(path, "pt").keys()]  # noqa: SIM118
    assert sorted(stored) == sorted([*model.encoder.state_dict(), "score.weight"])
    plain = AutoModel.from_pretrained(tmp_path / "saved" / "trunk")
    assert torch.equal(plain.wte.weight, model.encoder.wte.weight)
    with pytest.raises(CheckpointError, match="holds something"):
        model.save(tmp_path / "saved")


def test_a_saved_model_with_a_missing_tensor_is_refused(tmp_path: Path, trunk_folder: Folder) -> None:
    classes = {"t": AutoModelForMaskedLM}
    MultitaskModel.create(str(trunk_folder("bert")), classes, {"t": config("bert")}).save(tmp_path / "saved")
    path = tmp_path / "saved" / "heads" / "t" / "model.safetensors"
    tensors = load_file(path)
    del tensors["cls.predictions.transform.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, the first is cls\.predictions"):
        MultitaskModel.load(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="no saved multitask model"):
        MultitaskModel.load(tmp_path)


def test_a_state_dict_has_each_tensor_once_and_loads_strictly(tmp_path: Path, trunk_folder: Folder) -> None:
    model, other = gpt2(trunk_folder), gpt2(trunk_folder)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    state = model.state_dict()
    assert sorted(state) == sorted(
        [*(f"encoder.{n}" for n in model.encoder.state_dict()), "heads.task:classify.score.weight"]
    )
    save_file(state, tmp_path / "model.safetensors")  # refuses tensors that share memory
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.taskmodels_dict["translate"].lm_head.weight, model.encoder.wte.weight)
    del state["encoder.wte.weight"]
    with pytest.raises(RuntimeError, match=r"encoder\.wte\.weight"):
        other.load_state_dict(state)


def test_rows_that_would_be_pooled_at_a_wrong_token_are_refused(trunk_folder: Folder) -> None:
    rows = torch.tensor([[20, 21, 30, PAD], [22, 23, 24, 30]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    fine = gpt2(trunk_folder, cls_token_id=30)
    assert fine("classify", rows, attention_mask=mask).logits.shape == (2, 3)
    cut = rows.clone()
    cut[1, 3] = 25
    with pytest.raises(ConfigError, match="task 'classify': row 1 ends with token 25 instead of cls_token_id 30"):
        fine("classify", cut, attention_mask=mask)
    same = gpt2(trunk_folder, pad_token_id=EOS)  # a text that ends with the end token, and a pad token that is the same
    rows[:, 2:] = torch.tensor([[EOS, EOS], [24, EOS]])
    with pytest.raises(ConfigError, match=f"row 0 ends with token {EOS}, .* pad_token_id {EOS} must be no token"):
        same("classify", rows, attention_mask=mask)
    assert same("translate", rows, attention_mask=mask).logits.shape[:2] == (2, 4)


def test_the_trunk_takes_the_special_ids_that_the_tasks_agree_on(trunk_folder: Folder) -> None:
    model = gpt2(trunk_folder, pad_token_id=77, eos_token_id=78)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (77, 78)
    ends = model.taskmodels_dict["translate"].generation_config
    assert (ends.pad_token_id, ends.eos_token_id) == (77, 78)  # `generate` reads these alone
    configs = {"a": config("gpt2", pad_token_id=77), "b": config("gpt2", pad_token_id=78)}
    assert MultitaskModel.create(str(trunk_folder("gpt2")), {"a": LM, "b": LM}, configs).config.pad_token_id == PAD


@pytest.mark.parametrize(
    ("classes", "configs", "said"),
    [
        ({"a": CLASSIFY}, {"b": config("bert")}, "must have the same tasks, at least one: a; b"),
        ({}, {}, "at least one: none; none"),
        ({"a/b": CLASSIFY}, {"a/b": config("bert")}, "'a/b' is no task name"),
        ({"a": AutoModelForMultipleChoice}, {"a": config("gpt2")}, "gpt2 has no AutoModelForMultipleChoice"),
        ({"a": CLASSIFY}, {"a": config("bert", hidden_size=16)}, "not the shared one: in embeddings"),
        ({"a": CLASSIFY}, {"a": config("roberta", num_hidden_layers=3)}, "not the shared one: in encoder.layer.2"),
    ],
)
def test_what_cannot_be_made_is_said(classes: Any, configs: Any, said: str, trunk_folder: Folder) -> None:
    with pytest.raises(ConfigError, match=said):
        MultitaskModel.create(str(trunk_folder("bert")), classes, configs)


def test_an_unknown_task_is_named(trunk_folder: Folder) -> None:
    with pytest.raises(UnknownTaskError, match="rte"):
        gpt2(trunk_folder)("rte", ids())


def test_a_sealed_model_serves_what_it_computes(tmp_path: Path, trunk_folder: Folder) -> None:
    labels = ["good", "bad", "fine"]
    classes = {"topic": CLASSIFY, "choice": AutoModelForMultipleChoice}
    configs = {"topic": config("bert", num_labels=3), "choice": config("bert")}
    model = MultitaskModel.create(str(trunk_folder("bert")), classes, configs)
    short = {"max_length": 48}
    options: dict[str, Any] = {
        "topic": ("classification", {"labels": labels, **short}),
        "choice": ("multiple_choice", short),
    }
    golden = {"topic": ["the town"], "choice": [{"question": "what", "choices": ["red", "green"]}]}
    sealed = to_checkpoint(
        model, tmp_path / "x", options, tokenizer_json=TOKENIZER_JSON, source="random", golden=golden
    )
    engine = mtserve.load(tmp_path / "x")
    text = engine.prepare("topic", engine.task("topic").kind.parse("the town"))
    row = torch.as_tensor(text.rows[0].ids)[None]
    scores = model("topic", row, attention_mask=torch.ones_like(row)).logits.softmax(-1)[0].tolist()
    found = {entry["label"]: entry["score"] for entry in engine.predict("topic", ["the town"])[0]}
    assert found == pytest.approx(dict(zip(labels, scores, strict=True)), abs=1e-6)
    assert {task.name for task in sealed.manifest.tasks if task.golden} == {"topic", "choice"}
    model.taskmodels_dict["topic"].config.id2label = {0: "bad", 1: "good", 2: "fine"}
    with pytest.raises(ConfigError, match="trained on the labels"):
        to_checkpoint(model, tmp_path / "y", options, tokenizer_json=TOKENIZER_JSON, source="random")
    wrong = {"choice": ("classification", {"labels": labels, **short})}
    with pytest.raises(ConfigError, match="is a BertForMultipleChoice, which classification"):
        to_checkpoint(model, tmp_path / "y", wrong, tokenizer_json=TOKENIZER_JSON, source="random")
