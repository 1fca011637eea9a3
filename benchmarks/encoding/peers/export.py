"""A trunk's folder to ONNX graphs: with mean pooling for bare engines, without for those that pool themselves.

    PYTHON -m benchmarks.encoding.peers.export FOLDER       (writes FOLDER/onnx/pooled.onnx and FOLDER/onnx/model.onnx)

By the exporter whose graphs ONNX Runtime's optimizer knows: it fuses their attention, in the newer ones none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def pooled_trunk(folder: Path, *, attention: str, pooling: bool = True) -> Any:
    """A torch module from the three inputs, each (rows, seq), to embeddings, or to states without `pooling`."""
    import torch
    from transformers import AutoModel

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = AutoModel.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention, add_pooling_layer=False
            )

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            inputs = dict(zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True))
            hidden = self.trunk(**inputs).last_hidden_state
            if not pooling:
                return hidden
            mask = attention_mask[:, :, None].to(hidden.dtype)
            return (hidden * mask).sum(1) / mask.sum(1)

    return Pooled().eval()


def export(folder: Path) -> None:
    import torch

    (folder / "onnx").mkdir(exist_ok=True)
    ids = torch.ones(2, 8, dtype=torch.long)
    axes = {name: {0: "rows", 1: "seq"} for name in INPUTS}
    outputs = {"pooled": ("embeddings", {0: "rows"}), "model": ("last_hidden_state", {0: "rows", 1: "seq"})}
    for stem, (name, free) in outputs.items():
        trunk = pooled_trunk(folder, attention="eager", pooling=stem == "pooled")
        torch.onnx.export(
            trunk, (ids, ids, 0 * ids), str(folder / "onnx" / f"{stem}.onnx"), input_names=list(INPUTS),
            output_names=[name], dynamic_axes=axes | {name: free}, opset_version=17, dynamo=False,
        )  # fmt: skip


def fuse(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """A graph with one operator for each attention, norm and activation, by ONNX Runtime's own optimizer."""
    from onnxruntime.transformers import optimizer

    sizes = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
    optimizer.optimize_model(str(source), "bert", opt_level=0, **sizes).save_model_to_file(str(target))


if __name__ == "__main__":
    export(Path(sys.argv[1]))
