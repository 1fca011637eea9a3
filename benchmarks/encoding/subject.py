"""The folder that every contestant loads: a trunk with a clean tokenizer, our checkpoint of it, its ONNX graphs.

Measures nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from benchmarks.encoding.contestants import ROOT, PeerError, Pythons
from benchmarks.encoding.peers.ours import TASK
from benchmarks.encoding.texts import SINGLE
from benchmarks.resident import make_checkpoint
from mtserve.text import Text, text_spec

LABELS = [f"label{at}" for at in range(8)]
FIVE = tuple(f"task{at}" for at in range(1, 6))
"""Tasks on single texts with equal options, so that one text makes one row for all of them."""


def make_subject(trunk: Path, folder: Path) -> Path:
    """A copy of a trunk's folder with the checkpoint in it.

    Padding and truncation that the tokenizer's file brings along are taken out: left in, they would make a peer encode
    128 tokens where a text has ten.
    """
    shutil.copytree(trunk, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = config_of(folder)
    config.setdefault("position_embedding_type", "absolute")  # CTranslate2's converter asks for it
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    longest = min(SINGLE.max_length, config["max_position_embeddings"])
    tasks: dict[str, tuple[str, dict[str, Any]]] = {TASK: ("similarity", {"method": "cosine", "max_length": longest})}
    tasks |= dict.fromkeys(FIVE, ("classification", {"labels": LABELS, "max_length": longest}))
    make_checkpoint(folder, folder / "checkpoint", tasks)
    return folder


def export(folder: Path, pythons: Pythons) -> None:
    """Write the ONNX graphs, by the peers' Python. Raises PeerError."""
    argv = [pythons.of("peers"), "-W", "ignore", "-m", "benchmarks.encoding.peers.export", str(folder)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"the export to ONNX failed: {done.stderr.strip().splitlines()[-1:]}")


def base_trunk(beside: Path, folder: Path) -> Path:
    """A trunk of BERT-base shapes with random weights, and the tokenizer of another."""
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (beside / name).exists():
            shutil.copy(beside / name, folder / name)
    return folder


def open_text(folder: Path) -> Text:
    raw = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return Text(raw, text_spec(raw, pad_id=config_of(folder).get("pad_token_id") or 0, eos_id=None))


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found
