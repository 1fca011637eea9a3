"""Who takes part: every engine in every precision that it has, with the settings among which its fastest is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.encoding.contestants import Contestant

OURS = "mtserve"
FIFO = {"order": "given", "rows": 8}
BUDGET = {"order": "sorted", "tokens": 4096}
_PADDED: Sequence[Mapping[str, Any]] = ({"tokens": 512}, {"tokens": 1024}, {"tokens": 4096}, {"rows": 8})
_STREAMED = (*_PADDED, {"tokens": 512, "streams": 2}, {"tokens": 1024, "streams": 2}, {"rows": 8, "streams": 2})
_BY_ROWS: Sequence[Mapping[str, Any]] = ({"rows": 8}, {"rows": 32}, {"rows": 64})
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def ours(*precisions: str) -> list[Contestant]:
    settings = ({"tokens": BUDGET["tokens"]},)  # a server's default; nothing is tried for ours
    return [Contestant(OURS, p, "ours", options={"precision": p}, settings=settings) for p in precisions]


def plain(name: str, precision: str, *settings: Mapping[str, Any]) -> Contestant:
    """The stock trunk in the environment that we run in."""
    return Contestant(name, precision, "plain_torch", options={"dtype": _DTYPES[precision]}, settings=settings)


def from_ids(calibration: Path, *, threads: int, alone: bool = False) -> list[Contestant]:
    """Those that take token ids and give mean-pooled embeddings; `alone`: of one row, with nothing to try."""
    settings = ({"rows": 1},) if alone else _STREAMED if threads > 1 else _PADDED
    vino = {"calibration": str(calibration)}
    return [
        *ours("fp32", "bf16", "int8"),
        *(plain("torch, sorted", precision, *(settings if alone else (BUDGET, *_PADDED[:2]))) for precision in _DTYPES),
        *(Contestant("ONNX Runtime", p, "ort", "peers", {"precision": p}, settings) for p in ("fp32", "int8")),
        *(
            Contestant("OpenVINO", p, "vino", "peers", {"precision": p, **vino}, settings)
            for p in ("fp32", "bf16", "int8", "int8+bf16")
        ),
        *(Contestant("CTranslate2", p, "ct2", "peers", {"precision": p}, settings) for p in ("fp32", "int8")),
    ]


def from_texts() -> list[Contestant]:
    """Those that take texts."""
    made = ours("fp32", "bf16", "int8")
    for precision, dtype in _DTYPES.items():
        named = {"dtype": dtype}
        made += [
            Contestant("sentence-transformers", precision, "sentence", "peers", named, _BY_ROWS),
            Contestant("Transformers pipeline", precision, "pipelines", "peers", named, _BY_ROWS),
            Contestant(
                "infinity, torch", precision, "infinity", "infinity", {"engine": "torch", **named}, _BY_ROWS
            ),
        ]  # fmt: skip
    optimum = {"engine": "optimum", "dtype": "float32"}
    return [*made, Contestant("infinity, optimum", "fp32", "infinity", "infinity", optimum, _BY_ROWS)]
