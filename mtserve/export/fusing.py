"""Operators of a trunk's graph joined into those that ONNX Runtime has kernels for. Knows no files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
from onnxruntime.transformers import optimizer
from optimum.utils import NormalizedConfigManager
from transformers import PretrainedConfig

from mtserve.export.graphs import Graph

_LIKE_BERT = "bert"


def fused(graph: Graph, config: PretrainedConfig) -> tuple[Graph, Mapping[str, int]]:
    """The graph with what ONNX Runtime's optimizer could join, and how often each joined operator is in it."""
    known = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside) / "plain.onnx"
            path.write_bytes(graph.model.SerializeToString())
            found = optimizer.optimize_model(
                str(path),
                model_type=_LIKE_BERT,
                num_heads=known.num_attention_heads,
                hidden_size=known.hidden_size,
                opt_level=0,
            )
            counts = {name: int(count) for name, count in found.get_fused_operator_statistics().items() if count}
    finally:
        logging.disable(before)
    made: onnx.ModelProto = found.model
    return replace(graph, model=made, inputs=tuple(one.name for one in made.graph.input)), counts
