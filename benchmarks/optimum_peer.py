"""What optimum-onnx makes of a stock model; runs in an environment of its own (transformers 4.57), reads no mtserve.

    python optimum_peer.py REQUEST.json     # {"models": {task: {"folder", "kind"}}, "rows": [[ids, types], …], "home"}

Prints, for each model: bytes of its fp32 and dynamically quantised graphs, logits of each row alone, milliseconds of
the first row.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import (
    ORTModelForMultipleChoice,
    ORTModelForSequenceClassification,
    ORTModelForTokenClassification,
    ORTQuantizer,
)
from optimum.onnxruntime.configuration import AutoQuantizationConfig

_KINDS = {
    "classification": ("text-classification", ORTModelForSequenceClassification),
    "similarity": ("text-classification", ORTModelForSequenceClassification),
    "token_classification": ("token-classification", ORTModelForTokenClassification),
    "multiple_choice": ("multiple-choice", ORTModelForMultipleChoice),
}
_ROUNDS = 20


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    home, found = Path(request["home"]), {}
    for task, of in request["models"].items():
        name, cls = _KINDS[of["kind"]]
        plain, small = home / task / "fp32", home / task / "int8"
        main_export(of["folder"], plain, task=name, do_validation=False)
        quantizer = ORTQuantizer.from_pretrained(plain)
        quantizer.quantize(save_dir=small, quantization_config=AutoQuantizationConfig.avx512_vnni(is_static=False))
        found[task] = {
            "fp32": _measured(cls, plain, request["rows"], choices=name == "multiple-choice"),
            "int8": _measured(cls, small, request["rows"], choices=name == "multiple-choice"),
        }
    sys.stdout.write(json.dumps(found))


def _measured(cls: Any, folder: Path, rows: list[tuple[list[int], list[int]]], *, choices: bool) -> dict[str, Any]:
    model = cls.from_pretrained(folder)
    logits, times = [], []
    for ids, types in rows:
        logits.append(np.asarray(model(**_inputs(model, ids, types, choices=choices)).logits)[0].tolist())
    first = _inputs(model, *rows[0], choices=choices)
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        model(**first)
        times.append(1e3 * (time.perf_counter() - began))
    size = sum(path.stat().st_size for path in folder.glob("*.onnx*"))
    return {"bytes": size, "logits": logits, "ms": statistics.median(times)}


def _inputs(model: Any, ids: list[int], types: list[int], *, choices: bool) -> dict[str, Any]:
    given = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}
    wanted = {name: np.array([of], np.int64) for name, of in given.items() if name in model.input_names}
    return {name: of[:, None] for name, of in wanted.items()} if choices else wanted


if __name__ == "__main__":
    main()
