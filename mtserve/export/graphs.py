"""A model's trunk and heads as ONNX graphs. Knows no files, no text and no profile.

The trunk is one graph over padded rows; of a causal family it takes keys and values of what rows know, none of them or
many, and gives those of the new tokens. A head takes the trunk's states where they lie and picks what it reads itself:

| takes | inputs | of |
|---|---|---|
| positions | hidden (rows, seq, hidden), at (n,): rows and seq as one axis | heads of single positions |
| pooled | pooled (rows, hidden), at (n,): rows | heads of the trunk's pooler output |
| rows | hidden (rows, seq, hidden), at (n,): rows; mask, for pairs texts: both (n, seq) | heads of whole rows |

Exported by `torch.onnx.export` from the program that torch.export traces, but for fused trunks (`fusing`).
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import onnx
import torch
from optimum.utils import NormalizedConfigManager
from torch import Tensor, nn
from torch.export import Dim
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from mtserve.bundle import CacheShape, Takes
from mtserve.errors import ExportError
from mtserve.heads import Head, PairHead, TrunkStates
from mtserve.trunk import WORD_TYPE_FAMILIES, accepted

OPSET = 20
Exporter = Literal["dynamo", "torchscript"]
_ROWS, _SEQ, _KNOWN = 3, 7, 5
_STATES = ("hidden", "pooled")


@dataclass(frozen=True)
class Graph:
    """An ONNX graph with what goes in and comes out, in order."""

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    exporter: Exporter


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed
    """Keys and values of one layer: those known before, (rows, heads, known, size), and those that a pass adds."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.new = key_states, value_states
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) if not torch.compiler.is_exporting() else self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, 0


class TrunkGraph(nn.Module):
    """A trunk as a function of tensors, all (rows, seq) int64 but `attention_mask`, which of a causal one is (rows,
    known + seq): hidden states, the pooler's output where it is asked for, and of each layer the new keys and values.
    """

    def __init__(self, trunk: PreTrainedModel, *, pooled: bool, cache: CacheShape | None) -> None:
        super().__init__()
        self.trunk, self.pooled, self.cache = trunk, pooled, cache
        config = trunk.config
        self.word_types = config.model_type in WORD_TYPE_FAMILIES
        self.types = "token_type_ids" in accepted(trunk) and getattr(config, "type_vocab_size", 0) > 1
        self.inputs = ["input_ids", "attention_mask"]
        self.inputs += ["token_type_ids"] if self.types or self.word_types else []
        self.outputs = ["hidden", *(["pooled"] if pooled else [])]
        if cache is not None:
            layers = [f"{what}.{layer}" for layer in range(cache.layers) for what in ("keys", "values")]
            self.inputs += ["position_ids", *(f"known_{name}" for name in layers)]
            self.outputs += [f"new_{name}" for name in layers]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, tensors, strict=True))
        ids, asked = given["input_ids"], dict[str, Any](attention_mask=given["attention_mask"])
        if self.word_types:
            words, types = self.trunk.get_input_embeddings(), given["token_type_ids"]
            asked["inputs_embeds"] = words(ids) + words(types) * (types > 0)[:, :, None]
        else:
            asked["input_ids"] = ids
        if self.types:
            asked["token_type_ids"] = given["token_type_ids"]
        layers: list[_Layer] = []
        if self.cache is not None:
            past = tensors[len(self.inputs) - 2 * self.cache.layers :]
            layers = [_Layer(*pair) for pair in zip(past[::2], past[1::2], strict=True)]
            asked |= {"position_ids": given["position_ids"], "past_key_values": Cache(layers), "use_cache": True}
        elif hasattr(self.trunk.config, "use_cache"):
            asked["use_cache"] = False
        output = self.trunk(**asked)
        found = [output.last_hidden_state, *([output.pooler_output] if self.pooled else [])]
        for layer in layers:
            assert layer.new is not None
            found += layer.new
        return tuple(found)

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with, of sizes that nothing else has."""
        config, kv = self.trunk.config, 0 if self.cache is None else _KNOWN
        shape = (_ROWS, _SEQ)
        ids = torch.arange(_ROWS * _SEQ).reshape(shape) % config.vocab_size
        given: dict[str, Tensor] = {
            "input_ids": ids,
            "attention_mask": torch.ones(_ROWS, kv + _SEQ, dtype=torch.long),
            "token_type_ids": torch.zeros(shape, dtype=torch.long),
            "position_ids": (kv + torch.arange(_SEQ)).expand(shape).contiguous(),
        }
        found = [given[name] for name in self.inputs if name in given]
        if self.cache is not None:
            past = torch.zeros(_ROWS, self.cache.heads, kv, self.cache.size)
            found += [past.clone() for _ in range(2 * self.cache.layers)]
        return tuple(found)

    def axes(self) -> list[dict[int, str]]:
        """Names of each input's dynamic axes."""
        rows, seq = {0: "rows"}, {0: "rows", 1: "seq"}
        mask = seq if self.cache is None else {0: "rows", 1: "known + seq"}
        of = {"input_ids": seq, "attention_mask": mask, "token_type_ids": seq, "position_ids": seq}
        return [of.get(name, {**rows, 2: "known"}) for name in self.inputs]


class HeadGraph(nn.Module):
    """A head that picks what it reads from the trunk's states: (n, n_out)."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.takes: Takes = "pooled" if head.reads == "pooled" else "positions"
        if head.reads == "all" and not head.per_token:
            self.takes = "rows"
        self.inputs = ["pooled" if self.takes == "pooled" else "hidden", "at"]
        if self.takes == "rows":
            self.inputs += ["mask", *(["texts"] if isinstance(head, PairHead) else [])]
        self.outputs = ["logits"]

    def forward(self, states: Tensor, at: Tensor, mask: Tensor | None = None, texts: Tensor | None = None) -> Tensor:
        if self.takes == "rows":
            assert mask is not None
            return cast("Tensor", self.head(TrunkStates(states.index_select(0, at), None, mask, texts)))
        found = (states if self.takes == "pooled" else states.flatten(0, 1)).index_select(0, at)
        alone = torch.ones_like(at)[:, None]
        if self.takes == "pooled":
            return cast("Tensor", self.head(TrunkStates(found[:, None], found, alone)))
        logits: Tensor = self.head(TrunkStates(found[:, None], None, alone))
        return logits[:, 0] if self.head.per_token else logits

    def example(self, hidden: int) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        n = _ROWS - 1
        at = torch.arange(n)
        if self.takes == "pooled":
            return torch.randn(_ROWS, hidden), at
        states = torch.randn(_ROWS, _SEQ, hidden)
        if self.takes == "positions":
            return states, torch.arange(_SEQ + 1)
        mask, texts = torch.ones(n, _SEQ, dtype=torch.long), torch.ones(n, _SEQ, dtype=torch.long)
        texts[:, _SEQ // 2 :] = 2
        return states, at, mask, *([texts] if "texts" in self.inputs else [])

    def axes(self) -> list[dict[int, str]]:
        of: dict[str, dict[int, str]] = {"hidden": {0: "rows", 1: "seq"}, "pooled": {0: "rows"}, "at": {0: "n"}}
        return [of.get(name, {0: "n", 1: "seq"}) for name in self.inputs]


def cache_shape(config: PretrainedConfig) -> CacheShape:
    """Of a causal family, by the names that optimum knows its sizes under. Raises ExportError for one it does not."""
    try:
        known = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        heads = known.num_attention_heads
        size = getattr(config, "head_dim", None) or known.hidden_size // heads
        return CacheShape(
            layers=known.num_layers, heads=getattr(config, "num_key_value_heads", None) or heads, size=size
        )
    except (AttributeError, KeyError) as error:
        raise ExportError(f"optimum knows no sizes of keys and values of {config.model_type}: {error}") from error


def trunk_graph(trunk: PreTrainedModel, *, pooled: bool, cache: CacheShape | None) -> Graph:
    """Raises ExportError where PyTorch cannot trace the family."""
    module = TrunkGraph(_exportable(trunk, "sdpa"), pooled=pooled, cache=cache)
    return _exported(module, module.example(), module.axes(), f"the trunk of {trunk.config.model_type}")


def head_graph(head: Head, *, hidden: int, task: str) -> tuple[Graph, Takes]:
    """Raises ExportError as `trunk_graph`."""
    module = HeadGraph(head)
    return _exported(module, module.example(hidden), module.axes(), f"the head of task {task!r}"), module.takes


def fusible_trunk_graph(trunk: PreTrainedModel, *, pooled: bool) -> Graph:
    """The graph of a trunk without a cache as the older exporter writes it, from the plain attention: the one form in
    which ONNX Runtime's optimizer knows an attention."""
    module = TrunkGraph(_exportable(trunk, "eager"), pooled=pooled, cache=None).eval()
    names, stream = [*module.inputs, *module.outputs], io.BytesIO()
    states = {"hidden": {0: "rows", 1: "seq"}, "pooled": {0: "rows"}}
    axes = dict(zip(module.inputs, module.axes(), strict=True)) | {n: states[n] for n in module.outputs}
    with _quiet(f"the trunk of {trunk.config.model_type}"):
        torch.onnx.export(
            module, module.example(), cast("Any", stream), input_names=module.inputs, output_names=module.outputs,
            dynamic_axes={name: axes[name] for name in names}, dynamo=False, opset_version=17,
        )  # fmt: skip
    made = onnx.load_from_string(stream.getvalue())
    return Graph(made, tuple(one.name for one in made.graph.input), tuple(module.outputs), "torchscript")


def _exported(
    module: TrunkGraph | HeadGraph, example: Sequence[Tensor], axes: Sequence[dict[int, str]], what: str
) -> Graph:
    with _quiet(what):
        dynamic = [dict.fromkeys(one, Dim.DYNAMIC) for one in axes]
        program = torch.onnx.export(
            module.eval(), tuple(example), input_names=module.inputs, output_names=module.outputs,
            dynamic_shapes=(tuple(dynamic),) if isinstance(module, TrunkGraph) else _named(module, dynamic),
            dynamo=True, opset_version=OPSET, verbose=False,
        )  # fmt: skip
        assert program is not None
        made = program.model_proto
    _name_axes(made, dict(zip(module.inputs, axes, strict=True)))
    return Graph(made, tuple(one.name for one in made.graph.input), tuple(module.outputs), "dynamo")


def _named(module: HeadGraph, dynamic: Sequence[dict[int, Any]]) -> dict[str, dict[int, Any]]:
    return dict(zip(("states", "at", "mask", "texts"), dynamic, strict=False))


def _name_axes(model: onnx.ModelProto, axes: dict[str, dict[int, str]]) -> None:
    """Give dynamic axes our names, in the inputs and where they come out again."""
    renamed: dict[str, str] = {}
    for one in model.graph.input:
        for at, name in axes[one.name].items():
            dim = one.type.tensor_type.shape.dim[at]
            renamed.setdefault(dim.dim_param, name)
            dim.dim_param = name
    for one in model.graph.output:
        for dim in one.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = renamed.get(dim.dim_param, dim.dim_param)
    del model.graph.value_info[:]  # they speak of the old names
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # where in whose files the exporter found what it exports
        part.doc_string = ""


def _exportable(trunk: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Another tree of modules over the same weights, with a config of its own and this attention where it has one."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*trunk.parameters(), *trunk.buffers())}
    made = copy.deepcopy(trunk, memo)
    if made._can_set_attn_implementation():
        try:
            made.set_attn_implementation(attention)
        except ValueError:
            made.set_attn_implementation("eager")
    return made.eval()


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """What the exporters say as they go is kept away; what they fail with is an ExportError."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # an export fails in many ways
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ExportError(f"{what} cannot be exported by PyTorch {torch.__version__}: {reason}") from error
    finally:
        logging.disable(before)
