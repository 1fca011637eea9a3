"""The write-ups' own code, on tiny models and a few made-up rows, with what transformers 5 removed put right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

import mtserve
from tests.tiny import CORPUS, FAMILIES, TOKENIZER_JSON, trunk_of
from tests.training.writeups import s1_roberta, s1_shakespeare
from training.stock.multitask import MultitaskModel
from training.stock.serving import to_checkpoint

SPECIAL = ["<bos>", "<eos>", "<pad>", "<cls>"]
TARGETS = ["thou art a kind man", "where hast thou gone", "the rain doth fall in the town", "i know thee not"]
MODERN = ["you are a kind man", "where have you gone", "the rain falls in the town", "i do not know you"]
NEUTRAL = ["a man is kind", "where did he go", "rain in the town", "no one i know"]


def roberta(folder: Path) -> str:
    """A random RoBERTa with its tokenizer, as a hub model's folder looks."""
    trunk_of("roberta").save_pretrained(folder)
    tokenizer = Tokenizer.from_str(TOKENIZER_JSON)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    return str(folder)


def gpt2(folder: Path) -> str:
    """A random GPT-2 with a byte-level vocabulary whose last entry is the end of text, as GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([CORPUS, *TARGETS, *MODERN, *NEUTRAL], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|endoftext|>")
    assert end == size - 1
    torch.manual_seed(0)
    wanted = {**FAMILIES["gpt2"], "vocab_size": size, "bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    AutoModel.from_config(AutoConfig.for_model("gpt2", **wanted)).save_pretrained(folder)
    return str(folder)


def strap(folder: Path) -> Path:
    """Parallel files of all three splits; every file ends with a line end."""
    folder.mkdir()
    for split in s1_shakespeare.SPLITS:
        texts = [text for pair in zip(TARGETS, MODERN, strict=True) for text in pair]
        labels = ["original", "modern"] * len(TARGETS)
        neutral = [text for text in NEUTRAL for _ in range(2)]
        for name, content in (("input0.txt", texts), ("label", labels), ("paraphrase_250_input0.txt", neutral)):
            (folder / f"{split}.{name}").write_text("".join(line + "\n" for line in content), encoding="utf-8")
    return folder


def glue() -> dict[str, dict[str, Dataset]]:
    """Rows with the columns of GLUE and CommonsenseQA."""
    words = ["red", "green", "blue", "great", "awful", "good"]
    stsb = [
        {"sentence1": f"a {words[i % 6]} book", "sentence2": f"the {words[i % 5]} man", "label": float(i % 6), "idx": i}
        for i in range(12)
    ]
    rte = [{"sentence1": f"{words[i % 6]} town", "sentence2": words[i % 4], "label": i % 2, "idx": i} for i in range(8)]
    csqa = [
        {
            "question": f"what is {words[i]}",
            "choices": {"label": list("ABCDE"), "text": [*words[i:], *words][:5]},
            "answerKey": "ABCDE"[i % 5],
        }
        for i in range(6)
    ]
    hidden = [{**row, "answerKey": ""} for row in csqa]
    return {
        "stsb": {"train": Dataset.from_list(stsb), "validation": Dataset.from_list(stsb[:6])},
        "rte": {"train": Dataset.from_list(rte), "validation": Dataset.from_list(rte[:4])},
        "commonsense_qa": {
            "train": Dataset.from_list(csqa),
            "validation": Dataset.from_list(csqa[:3]),
            "test": Dataset.from_list(hidden),
        },
    }


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_roberta_with_three_formats(tmp_path: Path) -> None:
    name = roberta(tmp_path / "roberta")
    fresh = MultitaskModel.create(
        name, {"x": s1_roberta.AutoModelForMultipleChoice}, {"x": AutoConfig.from_pretrained(name)}
    )
    trainer, features = s1_roberta.main(
        glue(), model_name=name, output_dir=str(tmp_path / "out"), batch_size=4, epochs=1, max_length=32
    )
    model = trainer.model
    assert trainer.state.global_step == 3 + 2 + 2
    for task in s1_roberta.TASKS:
        losses = logged(trainer, f"train_loss_{task}")
        assert losses
        assert all(math.isfinite(loss) for loss in losses)
        assert logged(trainer, f"eval_{task}_loss")
    for metric in ("eval_stsb_pearson", "eval_stsb_spearmanr", "eval_rte_accuracy", "eval_commonsense_qa_accuracy"):
        assert -1 <= logged(trainer, metric)[0] <= 1
    model.check_sharing()
    moved = {
        name: not torch.equal(p, q)
        for (name, p), q in zip(model.encoder.named_parameters(), fresh.encoder.parameters(), strict=True)
    }
    assert all(moved[name] for name in moved if "position" not in name and "token_type" not in name)
    assert features["commonsense_qa"]["train"][0]["input_ids"].shape == (5, 32)
    assert features["commonsense_qa"]["test"][:]["labels"].tolist() == [0] * 6
    assert features["stsb"]["train"][:]["labels"].tolist() == [float(i % 6) for i in range(12)]
    assert model.taskmodels_dict["stsb"].config.problem_type == "regression"


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("shakespeare")
    name, data = gpt2(folder / "gpt2"), strap(folder / "data")
    kwargs: dict[str, Any] = {"model_name": name, "output_dir": str(folder / "out"), "max_length": 48}
    return name, *s1_shakespeare.main(data, epochs=60, learning_rate=1e-2, accumulation=2, **kwargs)


def test_shakespeare_special_tokens_are_the_next_free_ids(shakespeare: Any) -> None:
    name, trainer, tokenizer, *_ = shakespeare
    size = AutoConfig.from_pretrained(name).vocab_size
    found = tokenizer.convert_tokens_to_ids(SPECIAL)
    assert sorted(found) == [size, size + 1, size + 2, size + 3]
    model = trainer.model
    for config in (model.config, *(task.config for task in model.taskmodels_dict.values())):
        assert config.vocab_size == size + 4 == len(tokenizer)
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == found[:3]


def test_shakespeare_labels_are_the_target_and_its_end(shakespeare: Any) -> None:
    """Defect 50: nobody looked at what the mask leaves."""
    *_, tokenizer, features, styles = shakespeare
    labels = features["translate"]["train"]["labels"]
    decoded = [tokenizer.decode(row[row != -100]) for row in labels]
    assert decoded == [target + "<eos>" for target in TARGETS]
    assert styles == {"modern": 0, "original": 1, "translate": 2}
    assert {task: {split: len(rows) for split, rows in of.items()} for task, of in features.items()} == {
        "translate": {"train": 4, "dev": 4, "test": 4},
        "classify": {"train": 16, "dev": 16, "test": 16},
    }


def test_shakespeare_learns_both_tasks_over_one_trunk(shakespeare: Any) -> None:
    name, trainer, tokenizer, *_ = shakespeare
    for task in ("translate", "classify"):
        losses = logged(trainer, f"train_loss_{task}")
        assert losses[-1] < losses[0] / 2
    assert logged(trainer, "eval_classify_accuracy")[-1] > 0.7  # half of the rows are of one class
    assert logged(trainer, "test_translate_token_accuracy")[-1] > 0.5
    trainer.model.check_sharing()
    before = s1_shakespeare.make_model(name, tokenizer)
    after = dict(trainer.model.named_parameters())
    unmoved = [key for key, tensor in before.named_parameters() if torch.equal(tensor, after[key])]
    assert not unmoved


def test_shakespeare_with_the_rate_of_the_write_up(tmp_path: Path) -> None:
    """1e-5, Adafactor, batches of 2, 32 of them a step."""
    trainer, *_ = s1_shakespeare.main(
        strap(tmp_path / "data"),
        model_name=gpt2(tmp_path / "gpt2"),
        output_dir=str(tmp_path / "out"),
        epochs=1,
        max_length=48,
    )
    assert trainer.state.global_step == 1
    assert type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__ == "Adafactor"
    assert [len(logged(trainer, f"train_loss_{task}")) > 0 for task in ("translate", "classify")] == [True, True]


def test_shakespeare_can_be_served(shakespeare: Any, tmp_path: Path) -> None:
    """Serving makes the rows that training made, and its answers are those of the trained model."""
    _, trainer, tokenizer, features, styles = shakespeare
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    end = ("<cls>", tokenizer.cls_token_id)
    backend.post_processor = processors.TemplateProcessing(single="$A <cls>", pair="$A $B <cls>", special_tokens=[end])
    tasks: dict[str, Any] = {
        "translate": ("generation", {"template": "{source}<bos>{target}", "max_new_tokens": 24, "max_length": 48}),
        "classify": ("classification", {"labels": list(styles), "max_length": 48}),
    }
    golden = {"translate": NEUTRAL[:2], "classify": MODERN[:2]}
    to_checkpoint(trainer.model, tmp_path / "x", tasks, tokenizer_json=backend.to_str(), source="tiny", golden=golden)
    engine = mtserve.load(tmp_path / "x")
    for task, texts in (
        ("translate", NEUTRAL),
        ("classify", [t for p in zip(TARGETS, MODERN, strict=True) for t in p]),
    ):
        works = engine.prepare_all(task, texts)
        for work, feature in zip(works, features[task]["train"], strict=False):
            row = work.rows[0].ids
            assert row.tolist() == feature["input_ids"][: len(row)].tolist()
    row = features["classify"]["train"][1]
    with torch.no_grad():
        logits = trainer.model.eval()(
            "classify", row["input_ids"][None], attention_mask=row["attention_mask"][None]
        ).logits
    served = {entry["label"]: entry["score"] for entry in engine.predict("classify", [MODERN[0]])[0]}
    expected = dict(zip(styles, logits.softmax(-1)[0].tolist(), strict=True))
    assert served == pytest.approx(expected, abs=1e-5)
    translated = engine.predict("translate", [NEUTRAL[0]])[0][0]["generated_text"]
    model = trainer.model.taskmodels_dict["translate"]
    prompt = tokenizer(NEUTRAL[0] + "<bos>", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert translated == tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
