"""Five LitServe APIs, one a task, each in a worker process of its own with a stock model: python FILE FOLDER PORT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve as ls
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Task(ls.LitAPI):
    """Batches what waits, at most 16 texts."""

    def __init__(self, folder: Path, **how: Any) -> None:
        super().__init__(**how)
        self.folder = folder

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(self.folder, dtype=torch.float32).eval()

    def decode_request(self, request: dict[str, str], **_: Any) -> str:
        return request["inputs"]

    @torch.inference_mode()
    def predict(self, texts: list[str], **_: Any) -> list[list[float]]:
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return self.model(**encoded).logits.softmax(-1).tolist()

    def encode_response(self, scores: list[float], **_: Any) -> dict[str, Any]:
        return {"scores": scores}


if __name__ == "__main__":
    home, port = Path(sys.argv[1]), int(sys.argv[2])
    how = {"max_batch_size": 16, "batch_timeout": 0.005}
    apis = [Task(folder, api_path=f"/{folder.name}", **how) for folder in sorted(home.iterdir())]
    server = ls.LitServer(apis, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
