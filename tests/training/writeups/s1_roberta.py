"""The first write-up's own tasks: three formats, three task models over one RoBERTa, one converter each.

STS-B is regression on a pair (scores from 0 to 5), RTE classification of a pair, CommonsenseQA a choice among five.
Rows have the columns of GLUE and of CommonsenseQA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from training import MultitaskModel, MultitaskTrainer
from training.stock.collation import FeatureCollator

Splits = Mapping[str, Dataset]
TASKS = ("stsb", "rte", "commonsense_qa")
ANSWERS = "ABCDE"


def converters(tokenizer: Any, *, max_length: int) -> dict[str, Any]:
    """A batch of raw columns to a batch of features, by task."""

    def pair(batch: Mapping[str, Any]) -> Any:
        pairs = list(zip(batch["sentence1"], batch["sentence2"], strict=True))
        features = tokenizer(pairs, max_length=max_length, truncation=True, padding="max_length")
        features["labels"] = batch["label"]
        return features

    def choice(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        features: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for question, choices, answer in zip(batch["question"], batch["choices"], batch["answerKey"], strict=True):
            pairs = [(question, text) for text in choices["text"]]
            encoded = tokenizer(pairs, max_length=max_length, truncation=True, padding="max_length")
            features["input_ids"].append(encoded["input_ids"])  # one list a choice
            features["attention_mask"].append(encoded["attention_mask"])
            features["labels"].append(ANSWERS.index(answer) if answer else 0)  # the test split has no answers
        return features

    return {"stsb": pair, "rte": pair, "commonsense_qa": choice}


def featurised(data: Mapping[str, Splits], tokenizer: Any, *, max_length: int) -> dict[str, dict[str, Dataset]]:
    columns = ["input_ids", "attention_mask", "labels"]
    features: dict[str, dict[str, Dataset]] = {}
    for task, convert in converters(tokenizer, max_length=max_length).items():
        features[task] = {}
        for split, rows in data[task].items():
            features[task][split] = rows.map(convert, batched=True, remove_columns=rows.column_names)
            features[task][split].set_format(type="torch", columns=columns)
    return features


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))}


def correlation(found: Any) -> dict[str, float]:
    scores = found.predictions[:, 0]
    return {
        "pearson": float(pearsonr(scores, found.label_ids).statistic),
        "spearmanr": float(spearmanr(scores, found.label_ids).statistic),
    }


def main(
    data: Mapping[str, Splits],
    *,
    model_name: str,
    output_dir: str,
    epochs: float = 3,
    learning_rate: float = 1e-5,
    batch_size: int = 8,
    max_length: int = 128,
) -> tuple[MultitaskTrainer, dict[str, dict[str, Dataset]]]:
    multitask_model = MultitaskModel.create(
        model_name=model_name,
        model_type_dict={
            "stsb": AutoModelForSequenceClassification,
            "rte": AutoModelForSequenceClassification,
            "commonsense_qa": AutoModelForMultipleChoice,
        },
        model_config_dict={
            "stsb": AutoConfig.from_pretrained(model_name, num_labels=1),
            "rte": AutoConfig.from_pretrained(model_name, num_labels=2),
            "commonsense_qa": AutoConfig.from_pretrained(model_name),
        },
    )
    for task in TASKS:
        words = multitask_model.taskmodels_dict[task].roberta.embeddings.word_embeddings.weight
        assert words.data_ptr() == multitask_model.encoder.embeddings.word_embeddings.weight.data_ptr()
    multitask_model.check_sharing()

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    features = featurised(data, tokenizer, max_length=max_length)
    trainer = MultitaskTrainer(
        model=multitask_model,
        args=TrainingArguments(
            output_dir=output_dir,
            learning_rate=learning_rate,
            do_train=True,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            save_steps=3000,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        data_collator=FeatureCollator(pad_id=tokenizer.pad_token_id),
        train_dataset={task: splits["train"] for task, splits in features.items()},
        eval_dataset={task: splits["validation"] for task, splits in features.items()},
        compute_metrics={"stsb": correlation, "rte": accuracy, "commonsense_qa": accuracy},
    )
    trainer.train()
    trainer.evaluate()
    return trainer, features
