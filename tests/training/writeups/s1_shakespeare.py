"""The first write-up's live run: GPT-2 that translates into Shakespeare's English and tells three styles apart.

A folder of parallel files: `<split>.input0.txt` (the text), `<split>.label` (its style, `modern` or `original`) and
`<split>.paraphrase_250_input0.txt` (the text in neutral words). One direction is trained: neutral words to a style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from training import MultitaskModel, MultitaskTrainer
from training.stock.collation import FeatureCollator

Splits = dict[str, Dataset]
SPLITS = ("train", "dev", "test")


def lines(path: Path) -> list[str]:
    """Lines without the empty one after the last line end; an empty line inside would shift every pair after it."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def load(folder: Path, style: str) -> dict[str, Splits]:
    """Pairs of one direction, and every text of either style beside every paraphrase."""
    data: dict[str, Splits] = {"translate": {}, "classify": {}}
    for split in SPLITS:
        originals = lines(folder / f"{split}.input0.txt")
        labels = lines(folder / f"{split}.label")
        paraphrases = lines(folder / f"{split}.paraphrase_250_input0.txt")
        rows = list(zip(originals, labels, paraphrases, strict=True))
        pairs = [{"translate": neutral, "original": text} for text, label, neutral in rows if label == style]
        texts = [{"text": text, "style": label} for text, label, _ in rows]
        texts += [{"text": neutral, "style": "translate"} for _, _, neutral in rows]
        data["translate"][split] = Dataset.from_list(pairs)
        data["classify"][split] = Dataset.from_list(texts)
    return data


def label_map(styles: Sequence[str]) -> dict[str, int]:
    """Class ids in alphabetical order, made once, of the training split."""
    return {style: index for index, style in enumerate(sorted(set(styles)))}


def converters(tokenizer: Any, styles: Mapping[str, int], *, max_length: int) -> dict[str, Any]:
    fixed = {"max_length": max_length, "padding": "max_length", "truncation": True}
    bos, eos = tokenizer.bos_token, tokenizer.eos_token

    def translate(example: Mapping[str, str]) -> Any:
        """One example: neutral words, <bos>, the target, <eos>; only target and <eos> are labels."""
        features = tokenizer(example["translate"] + bos + example["original"] + eos, **fixed)
        ids = np.asarray(features["input_ids"])
        after = np.cumsum(ids == tokenizer.bos_token_id) - (ids == tokenizer.bos_token_id)  # tokens after <bos>
        upto = np.cumsum(ids == tokenizer.eos_token_id) - (ids == tokenizer.eos_token_id)  # up to the first <eos>
        features["labels"] = np.where((after > 0) & (upto == 0), ids, -100).tolist()
        features["token_type_ids"] = [1] * max_length
        return features

    def classify(batch: Mapping[str, list[str]]) -> Any:
        features = tokenizer([text + tokenizer.cls_token for text in batch["text"]], **fixed)
        features["labels"] = [styles[style] for style in batch["style"]]
        return features

    return {"translate": translate, "classify": classify}


def featurised(data: dict[str, Splits], tokenizer: Any, *, max_length: int) -> tuple[dict[str, Splits], dict[str, int]]:
    styles = label_map(data["classify"]["train"]["style"])
    features: dict[str, Splits] = {}
    for task, convert in converters(tokenizer, styles, max_length=max_length).items():
        columns = ["input_ids", "attention_mask", "labels"] + ["token_type_ids"] * (task == "translate")
        features[task] = {}
        for split, rows in data[task].items():
            made = rows.map(convert, batched=task == "classify", remove_columns=rows.column_names)
            made.set_format(type="torch", columns=columns)
            features[task][split] = made
    return features, styles


def token_accuracy(found: Any) -> dict[str, float]:
    """Share of target tokens that the position before them predicts."""
    labels = found.label_ids[:, 1:]
    right = found.predictions[:, :-1].argmax(-1) == labels
    return {"token_accuracy": float(right[labels != -100].mean())}


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))}


def make_model(model_name: str, tokenizer: Any) -> MultitaskModel:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "cls_token_id": tokenizer.cls_token_id,
    }
    model = MultitaskModel.create(
        model_name=model_name,
        model_type_dict={"translate": AutoModelForCausalLM, "classify": AutoModelForSequenceClassification},
        model_config_dict={
            "translate": AutoConfig.from_pretrained(model_name, **ids),
            "classify": AutoConfig.from_pretrained(model_name, num_labels=3, **ids),
        },
    )
    model.resize_token_embeddings(len(tokenizer))
    return model


def main(
    folder: Path,
    *,
    model_name: str,
    output_dir: str,
    style: str = "original",
    epochs: float = 3,
    learning_rate: float = 1e-5,
    accumulation: int = 32,
    max_length: int = 128,
) -> tuple[MultitaskTrainer, Any, dict[str, Splits], dict[str, int]]:
    tokenizer = AutoTokenizer.from_pretrained(
        model_name, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", cls_token="<cls>"
    )
    multitask_model = make_model(model_name, tokenizer)
    last = multitask_model.config.n_layer - 1
    for name in ("translate", "classify"):
        shared = multitask_model.taskmodels_dict[name].transformer.h[last].mlp.c_proj.weight
        assert shared.data_ptr() == multitask_model.encoder.h[last].mlp.c_proj.weight.data_ptr()
    multitask_model.check_sharing()

    features, styles = featurised(load(folder, style), tokenizer, max_length=max_length)
    trainer = MultitaskTrainer(
        model=multitask_model,
        args=TrainingArguments(
            output_dir=output_dir,
            learning_rate=learning_rate,
            do_train=True,
            num_train_epochs=epochs,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            optim="adafactor",
            save_steps=3000,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        data_collator=FeatureCollator(pad_id=tokenizer.pad_token_id),
        train_dataset={task: splits["train"] for task, splits in features.items()},
        eval_dataset={task: splits["dev"] for task, splits in features.items()},
        compute_metrics={"translate": token_accuracy, "classify": accuracy},
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    trainer.evaluate({task: splits["test"] for task, splits in features.items()}, metric_key_prefix="test")
    return trainer, tokenizer, features, styles
