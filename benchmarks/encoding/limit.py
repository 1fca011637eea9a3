"""What this machine can do: its best rate of matrix products, and how many operations a model needs for real tokens.

The limit of a model on some rows is the second over the first. Knows no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 384, 1536), (4096, 1536, 384), (4096, 768, 3072))
"""(m, k, n): a product of (m, k) and (k, n)."""
SMALL = ((64, 64, 64), (128, 32, 64))
PRECISIONS = ("fp32", "bf16", "int8")


def best_rate(precision: str, *, seconds: float, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> tuple[float, str]:
    """Operations a second, and of which product: the best of several shapes and libraries.

    Each is repeated for so many seconds, and its median counts.
    """
    found: dict[str, float] = {}
    with torch.inference_mode():
        for shape in shapes:
            for library, product in products(precision, shape).items():
                try:
                    rate = 2 * shape[0] * shape[1] * shape[2] / _median(product, seconds)
                except (NotImplementedError, RuntimeError):  # this build of torch does not have the kernel
                    continue
                found[f"{' x '.join(map(str, shape))} by {library}"] = rate
    best = max(found, key=lambda name: found[name])
    return found[best], best


def products(precision: str, shape: tuple[int, int, int]) -> dict[str, Callable[[], Any]]:
    """The same product by each library that torch has for it."""
    m, k, n = shape
    if precision == "int8":
        left, right = (torch.randint(-127, 127, size, dtype=torch.int8) for size in ((m, k), (k, n)))
        return {"torch._int_mm": lambda: torch._int_mm(left, right)}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    inputs, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return {
        "torch.nn.functional.linear": lambda: functional.linear(inputs, weight),
        "oneDNN with packed weights": _packed(inputs, weight),
    }


def _packed(inputs: torch.Tensor, weight: torch.Tensor) -> Callable[[], Any]:
    packed: list[torch.Tensor] = []

    def product() -> Any:
        if not packed:
            packed.append(torch.ops.mkldnn._reorder_linear_weight(weight, len(inputs)))
        return torch.ops.mkldnn._linear_pointwise(inputs, packed[0], None, "none", [], "")

    return product


def _median(product: Callable[[], Any], seconds: float) -> float:
    taken: list[float] = []
    product()
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        started = time.perf_counter()
        product()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def operations(config: Mapping[str, Any], lengths: Sequence[int]) -> float:
    """Of a BERT-like trunk for rows of these lengths, no padding: its matrix products and those of attention.

    A multiplication and an addition are two operations; embeddings, norms, activations and softmax count nothing.
    """
    hidden, inner, layers = (int(config[n]) for n in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    linear = 2 * (4 * hidden**2 + 2 * hidden * inner) * sum(lengths)
    attention = 4 * hidden * sum(length**2 for length in lengths)
    return float(layers * (linear + attention))
