"""A captured pass beside the modules and beside `torch.compile`: time of a pass, and the seconds to make it.

    python -m benchmarks.compiled [TRUNK] [--rounds 30]     (the demo's packaged encoder by default)

`torch.compile` gets the stock trunk with frozen weights, for one shape of input alone, which is its best case;
ours takes any. All end at the trunk's last hidden states, in two threads; medians over rounds in which they take turns.
Knows no peers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor

from mtserve.backends.serving import DTYPES, Served
from mtserve.model import Model
from mtserve.trunk import load_trunk

SHAPES = ((1, 16), (1, 128), (8, 14), (8, 64))
Pass = Callable[[], Any]


class Stock(nn.Module):
    """The stock trunk over rows without padding, so that no mask is needed."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.trunk(input_ids=ids).last_hidden_state
        return states


def compiled(trunk: str, dtype: torch.dtype, ids: torch.Tensor) -> tuple[Pass, float]:
    """A compiled pass over just this input, and the seconds to make it."""
    torch._dynamo.reset()
    began = time.perf_counter()
    made = torch.compile(Stock(load_trunk(trunk).to(dtype)), dynamic=False)
    with inductor.patch(freezing=True, cpp_wrapper=True), torch.no_grad():
        made(ids)
    return lambda: made(ids), time.perf_counter() - began


def ours(model: Model, profile: str, ids: torch.Tensor, *, capture: bool) -> tuple[Pass, float]:
    began = time.perf_counter()
    served = Served(model, profile, capture=capture)
    assert (served.captured is not None) == capture
    flat, types = ids.flatten(), torch.zeros(ids.numel(), dtype=torch.long)
    positions, layout = torch.arange(ids.shape[1]).repeat(len(ids)), served.layout([ids.shape[1]] * len(ids))
    served.encode(flat, types, positions, layout)
    return lambda: served.encode(flat, types, positions, layout), time.perf_counter() - began


def main() -> None:
    from mtserve.demo.run import packaged_trunk

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trunk", nargs="?")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    trunk = given.trunk or str(packaged_trunk())
    torch.set_num_threads(2)
    model = Model(load_trunk(trunk)).eval()
    print("profile  rows x tokens   modules ms   captured ms   torch.compile ms   seconds to make each")  # noqa: T201
    for profile in ("fp32", "bf16"):
        for rows, tokens in SHAPES:
            ids = torch.randint(4, model.trunk.config.vocab_size, (rows, tokens))
            made = [
                ours(model, profile, ids, capture=False),
                ours(model, profile, ids, capture=True),
                compiled(trunk, DTYPES[profile], ids),
            ]
            times: list[list[float]] = [[], [], []]
            with torch.no_grad():
                for _ in range(given.rounds):
                    for (run, _), into in zip(made, times, strict=True):
                        run()
                        began = time.perf_counter()
                        for _ in range(5):
                            run()
                        into.append((time.perf_counter() - began) / 5 * 1e3)
            cells = "   ".join(f"{statistics.median(of[1:]):10.2f}" for of in times)
            seconds = " / ".join(f"{seconds:.1f}" for _, seconds in made)
            print(f"{profile:7} {rows:6} x {tokens:<6} {cells}      {seconds}")  # noqa: T201


if __name__ == "__main__":
    main()
