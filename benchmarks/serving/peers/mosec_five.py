"""mosec with a route a task, each with a worker process and a stock model: python FILE FOLDER --port PORT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mosec import Runtime, Server, Worker


class Task(Worker):
    """Batches what waits, at most 16 texts."""

    folder: Path

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.set_num_threads(1)
        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(self.folder, dtype=torch.float32).eval()

    def forward(self, data: list[dict[str, str]]) -> list[dict[str, Any]]:
        texts = [one["inputs"] for one in data]
        with self.torch.inference_mode():
            encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            scores = self.model(**encoded).logits.softmax(-1).tolist()
        return [{"scores": each} for each in scores]


ROUTES = {}
for folder in sorted(Path(os.environ["MODELS"]).iterdir()):
    made = type(f"Task_{folder.name}", (Task,), {"folder": folder, "__module__": __name__})
    globals()[made.__name__] = made  # worker processes look it up by its name
    ROUTES[f"/{folder.name}"] = [Runtime(made, num=1, max_batch_size=16, max_wait_time=5)]

if __name__ == "__main__":
    server = Server()
    server.register_runtime(ROUTES)
    server.run()
