"""What export wrote of a checkpoint, as data: the part of a bundle's manifest that speaks of its graphs. Reads nothing.

bundle/  mtserve.json             the manifest, written last
         trunk.onnx               the trunk, once
         heads/<task>.onnx        a head each
         weights.safetensors      every large tensor of all graphs once; they name it as their external data
         tokenizer.json  golden/  calibration/  README.md
"""

from __future__ import annotations

from typing import Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field

from mtserve.errors import ConfigError

Dtype = Literal["fp32", "fp16", "int8"]
Takes = Literal["positions", "pooled", "rows"]
"""What a head is given: indexes of positions, the pooler's output of rows, or whole rows (`mtserve.export.graphs`)."""
GRAPHS = "trunk.onnx"
WEIGHTS = "weights.safetensors"
OPSETS = range(17, 24)
"""Versions of ONNX's operators that this version opens."""
ONNX = "onnx-"
"""Before the dtype in the name of a bundle's profile: its answers are those of no PyTorch profile."""


def as_dtype(name: str) -> Dtype:
    """Raises ConfigError for a name that is none."""
    for dtype in get_args(Dtype):
        if name == dtype:
            return cast("Dtype", dtype)
    raise ConfigError(f"dtype {name!r} is unknown; allowed: {', '.join(get_args(Dtype))}")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CacheShape(_Entry):
    """Keys and values of a causal trunk: of each layer both (rows, heads, known, size)."""

    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    size: int = Field(ge=1)


class TrunkGraph(_Entry):
    """The trunk's graph.

    inputs, outputs   names, in order
    exporter          `dynamo`, or `torchscript` where operators were to be fused
    fused             operators that ONNX Runtime's optimizer joined, by name
    reach             longest row that may go on from a past; None where the family sets no limit
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    exporter: Literal["dynamo", "torchscript"]
    fused: dict[str, int] = {}
    cache: CacheShape | None = None
    reach: int | None = None


class HeadGraph(_Entry):
    """A head's graph. `per_token`: it answers for each position that it is given, else once a row."""

    path: str
    takes: Takes
    per_token: bool
    reads: Literal["first", "last", "pooled", "all"]
    inputs: tuple[str, ...]


class Exported(_Entry):
    """The graphs of a bundle, and what they were made of and with.

    dtype        of the trunk's weights and of what it computes in
    variant      how 8-bit weights were made; empty of others
    opset        of ONNX
    vocab_size   rows of the trunk's embeddings
    checkpoint   sha256 of the manifest that was exported
    versions     of what exported it
    """

    dtype: Dtype
    variant: str = ""
    opset: int
    vocab_size: int = Field(ge=1)
    trunk: TrunkGraph
    heads: dict[str, HeadGraph]
    checkpoint: str
    versions: dict[str, str] = {}

    @property
    def profile(self) -> str:
        """The profile in which the bundle answers."""
        return ONNX + self.dtype
