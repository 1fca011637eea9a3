"""infinity: its asynchronous engine in this process, without HTTP; it sorts a queue of texts and batches it itself.

For its optimum engine this process works in a folder of its own, where it finds the one graph that it is to use by a
name without a folder. The graph is fused beforehand: its own optimisation calls optimum as optimum can no longer be.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.encoding.peers.base import Peer
from benchmarks.encoding.peers.batching import Floats
from benchmarks.encoding.peers.export import config_of, fuse


class Infinity(Peer):
    """One engine at a time: the batch size is fixed when it starts. `engine` is torch or optimum (ONNX Runtime)."""

    def __init__(self, folder: Path, *, threads: int, engine: str, dtype: str) -> None:
        torch.set_num_threads(threads)
        if engine == "optimum":
            os.chdir(_with_graph_alone(folder))
        os.environ["DO_NOT_TRACK"] = "1"
        from infinity_emb import AsyncEmbeddingEngine, EngineArgs  # reads this when it is imported

        self._start, self._arguments = AsyncEmbeddingEngine.from_args, EngineArgs
        self._folder = "." if engine == "optimum" else str(folder)
        self._kind, self._dtype = engine, dtype
        self._loop = asyncio.new_event_loop()
        self._engine: Any = None
        self._rows = 0
        self.use({"rows": 32})
        names = ("infinity-emb", "torch", "transformers", "onnxruntime", "optimum", "sentence-transformers")
        self.versions = {f"{name} (infinity)" if at else name: version(name) for at, name in enumerate(names)}

    def use(self, setting: Mapping[str, Any]) -> None:
        if setting["rows"] == self._rows:
            return
        if self._engine is not None:
            self._loop.run_until_complete(self._engine.astop())
        self._rows = setting["rows"]
        arguments = self._arguments(
            model_name_or_path=self._folder, engine=self._kind, device="cpu", dtype=self._dtype,
            batch_size=self._rows, bettertransformer=False, model_warmup=False, onnx_disable_optimize=True,
        )  # fmt: skip
        self._engine = self._start(arguments)
        self._loop.run_until_complete(self._engine.astart())

    def encode(self, inputs: Sequence[Any]) -> Floats:
        made, _ = self._loop.run_until_complete(self._engine.embed(sentences=list(inputs)))
        return np.stack(made).astype(np.float32)


def _with_graph_alone(folder: Path) -> Path:
    """The model with one ONNX graph, a fused one; it takes any that it finds."""
    own = folder.with_name(folder.name + "-optimum")
    if not own.exists():
        own.mkdir()
        for path in folder.iterdir():
            if path.is_file():
                (own / path.name).symlink_to(path)
        fuse(folder / "onnx" / "model.onnx", own / "model.onnx", config_of(folder))
    return own


open_peer = Infinity
