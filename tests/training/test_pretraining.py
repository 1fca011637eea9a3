"""Masked language modelling: heads, what is hidden, evaluation through the engine, and losses that fall."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from mtserve.backends.eager import EagerBackend
from mtserve.backends.staging import padded
from mtserve.engine import Engine, Task
from mtserve.errors import CheckpointError, ConfigError
from mtserve.model import Model
from mtserve.tasks import KINDS
from mtserve.tasks.base import IGNORED, HeadSpec
from mtserve.text import Text, text_spec
from tests.test_contract import stock_logits
from tests.tiny import CORPUS, EOS, FAMILIES, PAD, TOKENIZER_JSON, tiny
from training.pretraining import TRAINING_KINDS, MaskedLM, MaskedLMExample, MaskedLMOptions, load_head
from training.trainer.learner import Learned, Learner, collate
from training.trainer.optimizer import parameter_groups

KIND, OPTIONS = MaskedLM(), MaskedLMOptions(max_length=48)
MASKED = sorted(set(FAMILIES) - {"gpt2", "llama"})
LONG = " ".join(CORPUS.split()[:40])


def text_with(mask: str | None) -> Text:
    made = Tokenizer.from_str(TOKENIZER_JSON)
    if mask is not None:
        made.add_special_tokens([mask])
    return Text(made.to_str(), text_spec(made.to_str(), pad_id=PAD, eos_id=EOS))


TEXT = text_with("[MASK]")
MASK = TEXT.literal("[MASK]")[0]


def features(source: str, **options: Any) -> Any:
    return KIND.features(MaskedLMExample(text=source), MaskedLMOptions(**{"max_length": 48, **options}), TEXT)


def hide(source: str, seed: int = 0, **options: Any) -> Any:
    rows, how = features(source, **options)
    return rows, *KIND.corrupt(rows, how, np.random.default_rng(seed))


def bert() -> Model:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **{**FAMILIES["bert"], "vocab_size": TEXT.vocab_size})
    return Model(AutoModel.from_config(config))


@pytest.mark.parametrize("family", MASKED)
def test_logits_equal_the_stock_model_and_the_output_matrix_is_the_embedding(family: str) -> None:
    small = tiny(family, only=("topic",))
    small.model.add("mlm", KIND.head(OPTIONS))
    texts = ["the parcel arrived two days late", "good", "what do you open when it starts to rain ?"]
    rows = [row for text in texts for row in small.text.rows(text, limits=OPTIONS.limits)]
    with torch.no_grad():
        ours = small.model("mlm", *padded(rows, pad_id=PAD))
    theirs = stock_logits(small, "mlm", rows)
    for at, row in enumerate(rows):
        assert torch.equal(ours[at, : len(row)], theirs[at, : len(row)])
    embedding = small.model.trunk.get_input_embeddings().weight
    assert len(small.model.tied("mlm")) == 1
    assert [p for p in small.model.parameters() if p.shape == embedding.shape and p is not embedding] == []
    small.model("mlm", *padded(rows, pad_id=PAD)).sum().backward()
    idle = [name for name, p in small.model.head("mlm").named_parameters() if p.grad is None]
    assert idle == []  # an output bias that the family has twice is one


def test_a_causal_family_has_no_such_head() -> None:
    with pytest.raises(CheckpointError, match="llama has no stock model for masked_lm"):
        tiny("llama", only=()).model.add("mlm", HeadSpec(architecture="masked_lm"))


def test_the_head_that_a_folder_was_pretrained_with_can_be_kept(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", **FAMILIES["bert"])
    torch.manual_seed(3)
    stock = AutoModelForMaskedLM.from_config(config).eval()
    torch.nn.init.normal_(stock.cls.predictions.bias)
    stock.save_pretrained(tmp_path / "whole")
    stock.bert.save_pretrained(tmp_path / "bare")
    model = Model(AutoModel.from_pretrained(tmp_path / "whole").eval())
    model.add("mlm", KIND.head(OPTIONS))
    fresh = {name: tensor.clone() for name, tensor in model.head_tensors("mlm").items()}
    assert not load_head(model, "mlm", tmp_path / "bare")
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.head_tensors("mlm").items())
    assert load_head(model, "mlm", tmp_path / "whole")
    ids = torch.tensor([[1, 5, 6, 2]])
    with torch.no_grad():
        ours = model("mlm", ids, torch.ones_like(ids), torch.zeros_like(ids))
        assert torch.equal(ours, stock(ids, attention_mask=torch.ones_like(ids)).logits)


def test_an_output_matrix_of_its_own_is_read_too_and_tokens_added_by_the_run_stay_fresh(tmp_path: Path) -> None:
    """A language model whose output matrix is not tied would else learn to speak from nothing."""
    torch.manual_seed(0)
    raw = {**FAMILIES["llama"], "tie_word_embeddings": False}
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **raw)).eval()
    stock.save_pretrained(tmp_path)
    model = Model(AutoModel.from_pretrained(tmp_path).eval())
    words = model.trunk.config.vocab_size
    model.trunk.resize_token_embeddings(words + 2)
    kind = TRAINING_KINDS["generation"]
    model.add("forth", kind.head(kind.options()))
    fresh = model.head_tensors("forth")["lm_head.weight"].clone()
    assert load_head(model, "forth", tmp_path)
    loaded = model.head_tensors("forth")["lm_head.weight"]
    assert torch.equal(loaded[:words], stock.lm_head.weight)
    assert torch.equal(loaded[words:], fresh[words:])


def test_a_loss_of_counted_positions_is_the_loss_of_all() -> None:
    """Only positions with a target go through a head as wide as the vocabulary."""
    torch.manual_seed(0)
    raw = {**FAMILIES["bert"], "vocab_size": TEXT.vocab_size}
    model = Model(AutoModel.from_config(AutoConfig.for_model("bert", **raw)))
    model.add("words", KIND.head(OPTIONS))
    learner = Learner(model, {"words": Learned(KIND, OPTIONS)}).eval()
    given = [KIND.corrupt(*features(text), np.random.default_rng(0)) for text in (LONG, "the parcel", LONG[:90])]
    given.append(tuple([*one, *other] for one, other in zip(given[0], given[1], strict=True)))  # two windows
    batch = collate(given, pad_id=PAD)
    found = learner("words", **batch)["loss"]
    ids, mask, types = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    whole = KIND.loss(model("words", ids, mask, types), batch["rows"], batch["targets"], OPTIONS)
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)
    other = tiny("gpt2", only=("forth",))
    task = other.engine.task("forth")
    pairs = [
        task.kind.labelled(text="good bad", target="fine"),
        task.kind.labelled(text="one", target="red green blue"),
    ]
    batch = collate([task.kind.features(pair, task.options, other.text) for pair in pairs], pad_id=PAD)
    found = Learner(other.model, {"forth": Learned(task.kind, task.options)}).eval()("forth", **batch)["loss"]
    ids, mask, types = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    whole = task.kind.loss(other.model("forth", ids, mask, types), batch["rows"], batch["targets"], task.options)
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)


def test_what_is_hidden_is_the_target_and_nothing_else_changes() -> None:
    for seed in range(50):
        rows, hidden, targets = hide(LONG, seed)
        at = targets[0] != IGNORED
        assert at.sum() == round(0.15 * rows[0].own_tokens)
        assert not (at & rows[0].special).any()
        assert (targets[0][at] == rows[0].ids[at]).all()
        assert (hidden[0].ids[~at] == rows[0].ids[~at]).all()
        assert hidden[0].ids.dtype == rows[0].ids.dtype


def test_shares_are_those_of_the_paper() -> None:
    count: Counter[str] = Counter()
    for seed in range(400):
        rows, hidden, targets = hide(LONG, seed)
        at = targets[0] != IGNORED
        count["own"] += rows[0].own_tokens
        count["chosen"] += int(at.sum())
        count["masked"] += int((hidden[0].ids[at] == MASK).sum())
        count["kept"] += int((hidden[0].ids[at] == rows[0].ids[at]).sum())
    assert count["chosen"] / count["own"] == pytest.approx(0.15, abs=0.01)
    assert count["masked"] / count["chosen"] == pytest.approx(0.8, abs=0.03)
    assert count["kept"] / count["chosen"] == pytest.approx(0.1, abs=0.03)  # a random token is rarely the same


def test_hiding_follows_from_the_draw_alone_and_differs_between_draws() -> None:
    again = [hide(LONG, seed)[1][0].ids.tolist() for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    rows, _, _ = hide(LONG)
    assert rows[0].ids.tolist() == features(LONG)[0][0].ids.tolist()


@pytest.mark.parametrize("source", ["a", "good one"])
def test_a_short_row_hides_at_least_one_token_and_an_empty_one_none(source: str) -> None:
    assert (hide(source)[2][0] != IGNORED).sum() == 1
    rows, hidden, targets = hide("")
    assert hidden[0].ids.tolist() == rows[0].ids.tolist()
    assert (targets[0] == IGNORED).all()


def test_windows_are_hidden_each() -> None:
    _, hidden, targets = hide(LONG, on_long="window", max_length=16, stride=0)
    assert len(hidden) == len(targets) > 2
    assert all((target != IGNORED).any() for target in targets)


def test_other_kinds_are_trained_on_as_they_are() -> None:
    rows, target = features(LONG)
    for name, kind in KINDS.items():
        assert kind.corrupt(rows, target, np.random.default_rng(0)) == (rows, target), name


def test_the_mask_token_is_found_named_or_missed() -> None:
    sample = MaskedLMExample(text="good")
    other = text_with("<mask>")
    assert KIND.features(sample, OPTIONS, other)[1]["mask"] == other.literal("<mask>")[0]
    own = text_with("<hide>")
    named = MaskedLMOptions(mask_token="<hide>")
    assert KIND.features(sample, named, own)[1]["mask"] == own.literal("<hide>")[0]
    with pytest.raises(ConfigError, match=r"no special token \[MASK\] or <mask>; name its mask token in the option"):
        KIND.features(sample, OPTIONS, own)
    with pytest.raises(ConfigError, match="no special token good"):  # one token, but a word
        KIND.features(sample, MaskedLMOptions(mask_token="good"), TEXT)


def test_evaluation_through_the_engine_is_the_loss_of_its_own_rows() -> None:
    model = bert().eval()
    model.add("mlm", KIND.head(OPTIONS))
    engine = Engine([Task("mlm", KIND, OPTIONS)], EagerBackend(model, pad_id=PAD), TEXT)
    examples = [MaskedLMExample(text=t) for t in (LONG, "the parcel arrived two days late", "good")]
    predictions = engine.predict("mlm", examples)
    assert predictions == engine.predict("mlm", examples)
    found = KIND.metrics(predictions, examples, OPTIONS)
    pairs = [KIND._evaluated(example, OPTIONS, TEXT) for example in examples]
    rows, targets = [rows for rows, _ in pairs], [targets for _, targets in pairs]
    with torch.no_grad():
        logits = model("mlm", *padded([row for of in rows for row in of], pad_id=PAD))
    loss = KIND.loss(logits, rows, targets, OPTIONS)
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    tokens = [one["token"] for prediction in predictions for one in prediction]
    assert tokens == [int(t) for of in targets for target in of for t in target[target != IGNORED]]
    right = sum(one["guess"] == one["token"] for prediction in predictions for one in prediction)
    assert found["masked_accuracy"] == pytest.approx(right / len(tokens))


def test_the_constant_is_the_most_frequent_token_of_training() -> None:
    training = [features("rain rain rain good"), features("good the rain")]
    rain, bad = (TEXT.plain(word)[0] for word in ("rain", "bad"))
    predictions = [[{"token": rain, "guess": bad, "loss": 9.0}, {"token": bad, "guess": bad, "loss": 9.0}]]
    constant = KIND.constants(predictions, [], training, OPTIONS)
    assert [one["guess"] for one in constant[0]] == [rain, rain]
    shares = [5 / (7 + TEXT.vocab_size), 1 / (7 + TEXT.vocab_size)]
    assert [one["loss"] for one in constant[0]] == pytest.approx(-np.log(shares))
    found = KIND.metrics(constant, [MaskedLMExample(text="")], OPTIONS)
    assert found == {"masked_accuracy": 0.5, "loss": pytest.approx(-np.log(shares).mean())}
    assert np.isnan(
        list(KIND.metrics([KIND.baseline([], OPTIONS)], [MaskedLMExample(text="")], OPTIONS).values())
    ).all()


def test_both_losses_of_berts_pretraining_fall() -> None:
    """Masked words, and whether one sentence follows another: two tasks on one trunk, a batch of each in a step."""
    words = CORPUS.split()
    sentences = [" ".join(words[at : at + 8]) for at in range(0, 40, 8)]
    model, follows = bert(), KINDS["classification"]
    labels = follows.options.model_validate({"labels": ["next", "other"], "max_length": 48})
    pairs = [
        {"text": sentences[at], "text_pair": other, "label": label}
        for at in range(len(sentences) - 1)
        for other, label in ((sentences[at + 1], "next"), (sentences[0], "other"))
    ]
    examples = [follows.labelled.model_validate(pair) for pair in pairs]
    data: dict[str, Any] = {
        "words": (KIND, OPTIONS, [features(sentence) for sentence in sentences]),
        "follows": (follows, labels, [follows.features(example, labels, TEXT) for example in examples]),
    }
    for name, (kind, options, _) in data.items():
        model.add(name, kind.head(options))
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=4e-3, weight_decay=0.01))
    losses: dict[str, list[float]] = {name: [] for name in data}
    for step in range(60):
        for name, (kind, options, items) in data.items():
            drawn = [kind.corrupt(*item, np.random.default_rng([step, at])) for at, item in enumerate(items)]
            rows, targets = [rows for rows, _ in drawn], [target for _, target in drawn]
            logits = model(name, *padded([row for of in rows for row in of], pad_id=PAD))
            loss = kind.loss(logits, rows, targets, options)
            losses[name].append(loss.item())
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(losses["words"][-5:]) < 0.7 * np.mean(losses["words"][:5])
    assert np.mean(losses["follows"][-5:]) < 0.5 * np.log(2)  # a constant answer costs log 2


def test_masked_lm_is_a_kind_of_training_alone() -> None:
    assert set(TRAINING_KINDS) - set(KINDS) == {"masked_lm"}
    assert isinstance(KIND.sample(OPTIONS), MaskedLMExample)
