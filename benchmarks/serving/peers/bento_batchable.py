"""BentoML's own batchable endpoints, one a task, over stock models in one process: `bentoml serve FILE:Five`."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock
from typing import Any

import bentoml
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HOW: dict[str, Any] = {"batchable": True, "max_batch_size": 32, "max_latency_ms": 10_000}
FOLDERS = sorted(Path(os.environ["MODELS"]).iterdir())


@bentoml.service(name="five", workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Five:
    def __init__(self) -> None:
        torch.set_num_threads(2)
        self.lock = Lock()
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDERS[0])
        self.models = [
            AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval() for folder in FOLDERS
        ]

    def _scores(self, number: int, texts: list[str]) -> list[list[float]]:
        with self.lock, torch.inference_mode():
            encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            return self.models[number](**encoded).logits.softmax(-1).tolist()

    @bentoml.api(route="/task1", **HOW)
    def task1(self, inputs: list[str]) -> list[list[float]]:
        return self._scores(0, inputs)

    @bentoml.api(route="/task2", **HOW)
    def task2(self, inputs: list[str]) -> list[list[float]]:
        return self._scores(1, inputs)

    @bentoml.api(route="/task3", **HOW)
    def task3(self, inputs: list[str]) -> list[list[float]]:
        return self._scores(2, inputs)

    @bentoml.api(route="/task4", **HOW)
    def task4(self, inputs: list[str]) -> list[list[float]]:
        return self._scores(3, inputs)

    @bentoml.api(route="/task5", **HOW)
    def task5(self, inputs: list[str]) -> list[list[float]]:
        return self._scores(4, inputs)
