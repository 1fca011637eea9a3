"""A model's trunk and heads as graphs in a folder, in one precision. Knows no checkpoint and judges nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mtserve.backends.pasts import reach
from mtserve.bundle import GRAPHS, CacheShape, Dtype, Exported, HeadGraph, TrunkGraph
from mtserve.export import fusing, graphs, quantizing
from mtserve.export.storing import Stored
from mtserve.model import Model
from mtserve.trunk import is_causal

_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "optimum", "torch", "transformers")


@dataclass(frozen=True)
class Made:
    """The graphs of a model's trunk and of some of its heads, in fp32.

    of(…, keeps)   whether keys and values are kept between steps, where the family is causal
    """

    trunk: graphs.Graph
    fused: Mapping[str, int]
    heads: Mapping[str, tuple[graphs.Graph, HeadGraph]]
    cache: CacheShape | None
    model: Model

    @classmethod
    def of(cls, model: Model, names: Sequence[str], *, fuse: bool, keeps: bool) -> Made:
        """Raises ExportError for a family or a head that cannot be exported."""
        config = model.trunk.config
        pooled = any(model.head(name).reads == "pooled" for name in names)
        cache = graphs.cache_shape(config) if keeps and is_causal(model.trunk) else None
        fused: Mapping[str, int] = {}
        if fuse and cache is None:
            trunk, fused = fusing.fused(graphs.fusible_trunk_graph(model.trunk, pooled=pooled), config)
        else:
            trunk = graphs.trunk_graph(model.trunk, pooled=pooled, cache=cache)
        heads = {}
        for name in names:
            head = model.head(name)
            graph, takes = graphs.head_graph(head, hidden=int(config.hidden_size), task=name)
            heads[name] = (
                graph,
                HeadGraph(
                    path=f"heads/{name}.onnx",
                    takes=takes,
                    per_token=head.per_token,
                    reads=head.reads,
                    inputs=graph.inputs,
                ),
            )
        return cls(trunk, fused, heads, cache, model)

    def write(self, folder: Path, dtype: Dtype, variant: str = "", *, checkpoint: str) -> Exported:
        """Graphs and weights into a fresh folder; `checkpoint` is the mark of what they are of."""
        (folder / "heads").mkdir(parents=True)
        trunk = quantizing.made(self.trunk.model, dtype, variant)
        stored = Stored()
        stored.take_trunk(trunk)
        models = {GRAPHS: trunk}
        for name, (graph, entry) in self.heads.items():
            head = quantizing.head_made(graph.model, dtype)
            stored.take_head(head, name)
            models[entry.path] = head
        stored.write(folder)
        for path, model in models.items():
            (folder / path).write_bytes(model.SerializeToString())
        longest = reach(self.model.trunk.config)
        return Exported(
            dtype=dtype,
            variant=variant,
            opset=max(one.version for one in trunk.opset_import if one.domain in ("", "ai.onnx")),
            vocab_size=int(self.model.trunk.config.vocab_size),
            trunk=TrunkGraph(
                inputs=self.trunk.inputs,
                outputs=self.trunk.outputs,
                exporter=self.trunk.exporter,
                fused=dict(self.fused),
                cache=self.cache,
                reach=None if longest == float("inf") else int(longest),
            ),
            heads={name: entry for name, (_, entry) in self.heads.items()},
            checkpoint=checkpoint,
            versions={name: version(name) for name in _PACKAGES},
        )
